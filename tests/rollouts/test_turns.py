"""Turns: what is the policy's and what the environment's, and the same distribution for the learner in every turn."""

from typing import Any

import pytest
import torch
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rollouts import Distribution, Engine, Environment, Sampler, Turns
from tests.conftest import make_prompts
from tests.rollouts.rolling import SETTINGS, logps_of, make_policy


class Talks(Environment):
    """Says w4 w5 after each turn of the policy, and is worth 1, 2, … of them; the row may say when it is over."""

    def reset(self, row: dict[str, Any]) -> list[dict[str, str]]:
        self.turns, self.last = 0, row.get("last", 99)
        return [{"role": "system", "content": "w9"}] if row.get("begins") else []

    def step(self, text: str) -> tuple[list[dict[str, str]], float | None, bool]:
        self.turns += 1
        answer = [{"role": "tool", "content": "w4 "}, {"role": "tool", "content": "w5"}]
        return answer, float(self.turns) if self.turns < 3 else None, self.turns >= self.last


class Scripted(Engine):
    """Says as many 6 as this is the turn, then ends; log-probabilities tell the turn."""

    def __init__(self) -> None:
        self.asked: list[Prompts] = []
        self.synced: list[int] = []

    def sync(self, policy: Policy, step: int) -> None:
        self.synced.append(step)

    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        self.asked.append(prompts)
        turn, rows = len(self.asked), len(prompts)
        tokens = torch.tensor([[6] * turn + [0, 1]]).repeat(rows, 1)
        mask = torch.tensor([[True] * (turn + 1) + [False]]).repeat(rows, 1)
        logps = torch.full(tokens.shape, -float(turn)) * mask
        return Rollout(prompts.ids, prompts.mask, tokens, mask, logps, policy.tokenizer, eos_ids=[0])


def test_the_policy_and_the_environment_speak_by_turns() -> None:
    """Of two completions one is over after a turn; what the other is answered is read, and not trained on."""
    engine, policy = Scripted(), make_policy()
    prompts = Prompts.of(make_prompts((3, 2)) | {"columns": {"last": [1, 9], "begins": [False, True]}})
    rollout = Sampler(engine=Turns(Talks, max_turns=3, engine=engine))(policy, prompts, step=7)
    assert engine.synced == [7]
    assert rollout.completion_ids.tolist() == [[6, 0, *[1] * 12], [9, 6, 0, 4, 5, 6, 6, 0, 4, 5, 6, 6, 6, 0]]
    assert rollout.completion_mask.sum(-1).tolist() == rollout.lengths.tolist() == [2, 14]
    assert rollout.sampled[0].int().tolist() == [1, 1, *[0] * 12]
    assert rollout.sampled[1].int().tolist() == [0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1]
    assert rollout.turns is not None
    assert rollout.turns[1].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2]
    assert logps_of(rollout)[1].tolist() == [0, -1, -1, 0, 0, -2, -2, -2, 0, 0, -3, -3, -3, -3]
    assert rollout.columns == {
        "last": [1, 9],
        "begins": [False, True],
        "returns": [1.0, 3.0],
        "turn_rewards": [[1.0], [1.0, 2.0, 0.0]],
    }
    assert rollout.ended.tolist() == [True, True]
    assert rollout.eos_ids == [0]


def test_each_turn_is_asked_for_with_all_that_was_said() -> None:
    """Of those that go on alone, padded on the left."""
    engine, prompts = Scripted(), make_prompts((3, 2))
    columns: dict[str, Any] = {"last": [9, 1]}
    Turns(Talks, max_turns=2, engine=engine).generate(
        make_policy(), Distribution(), Prompts.of(prompts | {"columns": columns})
    )
    first, second = engine.asked
    assert torch.equal(first.ids, prompts["input_ids"])
    assert torch.equal(first.mask, prompts["attention_mask"].bool().to(first.mask.dtype))
    assert second.ids.tolist() == [[*prompts["input_ids"][0].tolist(), 6, 0, 4, 5]]
    assert second.mask.tolist() == [[1] * 7]


def test_no_more_turns_than_allowed() -> None:
    """The last answer would be read by nobody."""
    rollout = Turns(Talks, max_turns=1, engine=Scripted()).generate(
        make_policy(), Distribution(), Prompts.of(make_prompts())
    )
    assert rollout.completion_ids.tolist() == [[6, 0]] * 3
    assert torch.equal(rollout.sampled, rollout.completion_mask)
    for name in ("max_turns", "turn_tokens"):
        with pytest.raises(InputError, match=name):
            Turns(Talks, **{name: 0})  # type: ignore[arg-type]


def test_no_more_tokens_than_allowed() -> None:
    """Of all turns and answers together: 2 + 2 + 3 fit into 9, another answer and a token do not. A turn is cut."""
    policy, prompts = make_policy(), Prompts.of(make_prompts())
    rollout = Turns(Talks, max_turns=5, engine=Scripted()).generate(policy, Distribution(9), prompts)
    assert rollout.completion_ids.tolist() == [[6, 0, 4, 5, 6, 6, 0]] * 3
    cut = Turns(Talks, max_turns=5, turn_tokens=2, engine=Scripted()).generate(policy, Distribution(8), prompts)
    assert cut.completion_ids.tolist() == [[6, 0, 4, 5, 6, 6]] * 3
    assert cut.ended.tolist() == [False] * 3


class Opens(Environment):
    """Begins with as many words as the row says."""

    def reset(self, row: dict[str, Any]) -> list[dict[str, str]]:
        return [{"role": "system", "content": " ".join(["w9"] * row["words"])}]

    def step(self, text: str) -> tuple[list[dict[str, str]], float | None, bool]:
        return [], None, True


@pytest.mark.parametrize("words", [[0, 10, 3], [8, 8, 8]], ids=str)
def test_an_opening_that_leaves_the_policy_no_room_is_refused(words: list[int]) -> None:
    """Whether all rows are too long, or one is; the line says how long, and what to do."""
    prompts = Prompts.of(make_prompts() | {"columns": {"words": words}})
    with pytest.raises(InputError, match=rf"environment Opens: .* {max(words)} tokens.* 8 at most.*max_new_tokens"):
        Turns(Opens).generate(make_policy(), Distribution(max_new_tokens=8), prompts)


def test_an_opening_may_leave_a_single_token() -> None:
    prompts = Prompts.of(make_prompts() | {"columns": {"words": [0, 7, 3]}})
    rollout = Turns(Opens).generate(make_policy(), Distribution(max_new_tokens=8), prompts)
    assert rollout.lengths[1] == 8
    assert rollout.sampled[1].int().tolist() == [0] * 7 + [1]


def test_the_engine_gets_the_columns_of_the_rows_that_are_left() -> None:
    engine = Scripted()
    columns = {"last": [9, 1, 9], "name": ["a", "b", "c"]}
    Turns(Talks, max_turns=2, engine=engine).generate(
        make_policy(), Distribution(), Prompts.of(make_prompts() | {"columns": columns})
    )
    assert [asked.columns["name"] for asked in engine.asked] == [["a", "b", "c"], ["a", "c"]]


@pytest.mark.parametrize("when", ["reset", "step"])
def test_an_environment_that_raises_is_named(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: Any) -> Any:
        raise ConnectionError("the tool\nis down")

    monkeypatch.setattr(Talks, when, down)
    with pytest.raises(InputError, match=r"^environment Talks: it raised ConnectionError: the tool is down$") as raised:
        Turns(Talks).generate(make_policy(), Distribution(), Prompts.of(make_prompts()))
    assert isinstance(raised.value.__cause__, ConnectionError)


def test_where_one_environment_raises_its_completion_ends_and_the_others_go_on() -> None:
    class Fragile(Talks):
        def step(self, text: str) -> tuple[list[dict[str, str]], float | None, bool]:
            if self.last == 0:
                raise TimeoutError("no answer")
            return super().step(text)

    engine, policy = Scripted(), make_policy()
    prompts = Prompts.of(make_prompts((3, 2)) | {"columns": {"last": [0, 2]}})
    with pytest.warns(UserWarning, match=r"Fragile: it raised TimeoutError: no answer; the completion ends"):
        rollout = Turns(Fragile, engine=engine).generate(policy, Distribution(), prompts)
    assert rollout.lengths.tolist() == [2, 7]
    assert rollout.columns["returns"] == [None, 3.0]


def learned(policy: Policy, rollout: Rollout, distribution: Distribution) -> Tensor:
    """Log-probabilities of the sampled tokens in one pass over all turns."""
    with torch.no_grad():
        logits = policy(policy.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], rollout.completion_ids.shape[1])
    rows = slice(0, len(rollout.positions))
    logps = distribution.sampled_logits(rollout, rollout.take(logits), rows).log_softmax(-1)
    return logps.gather(-1, rollout.tokens.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("name", ["plain", "temperature", "top-k", "top-p", "minimum", "all"])
def test_the_training_pass_sees_what_was_sampled_in_every_turn(name: str) -> None:
    """Left padding, answers in between, turns that end early."""
    policy = make_policy()
    sampler = Sampler(**SETTINGS[name] | {"max_new_tokens": 24}, engine=Turns(Talks, max_turns=3, turn_tokens=6))
    torch.manual_seed(0)
    prompts = {name: value.repeat(4, 1) for name, value in make_prompts().items()}
    rollout = sampler(policy, Prompts.of(prompts))
    assert rollout.turns is not None
    assert int(rollout.turns.max()) == 2
    assert not rollout.sampled.equal(rollout.completion_mask)
    found = learned(policy, rollout, sampler.distribution)
    torch.testing.assert_close(found, rollout.take(logps_of(rollout)), rtol=1e-4, atol=1e-4)


def test_the_seed_decides() -> None:
    policy, engine, prompts = make_policy(), Turns(Talks, max_turns=2), Prompts.of(make_prompts())
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(engine.generate(policy, Distribution(max_new_tokens=6), prompts).ids)
    assert torch.equal(found[0], found[1])
    assert found[0].tolist() != found[2].tolist()


class Chatty(Scripted):
    """Says 6 7 8 in each turn, whatever it is to stop at."""

    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        tokens = torch.tensor([[6, 7, 8]]).repeat(len(prompts), 1)
        return Rollout(prompts.ids, prompts.mask, tokens, tokens > 0, None, policy.tokenizer, eos_ids=[0])


def test_a_stop_string_ends_each_turn() -> None:
    sampler = Sampler(engine=Turns(Talks, max_turns=2, engine=Chatty()), stop="w7")
    rollout = sampler(make_policy(), Prompts.of(make_prompts((3,))))
    assert rollout.completion_ids.tolist() == [[6, 7, 4, 5, 6, 7]]
    assert rollout.ended.tolist() == [True]
    assert not rollout.has_eos.any()
