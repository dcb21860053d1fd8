"""Stop strings end a completion where they are complete, and nowhere else."""

import pytest
import torch

from grade_lightning.errors import InputError
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rollouts import Distribution, Engine, Sampler
from grade_lightning.rollouts.stopping import cut, stopped, tokens_until
from tests.conftest import make_prompts
from tests.data.chats import KINDS, make_tokenizer
from tests.rewards.making import make_rollout
from tests.rollouts.rolling import logps_of, make_policy, roll, teacher_forced


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [["is four"], [". Good", "It"], ["Zür"], ["</s>"], ["film.."]])
def test_as_few_tokens_as_it_takes(kind: str, stop: list[str]) -> None:
    tokenizer = make_tokenizer(kind, "none")
    ids = tokenizer.encode("né à Zürich. Good film. It is four</s> It", add_special_tokens=False)

    def said(count: int) -> bool:
        text = str(tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False))
        return any(words in text for words in stop)

    assert tokens_until(tokenizer, ids, stop) == next((n for n in range(1, len(ids) + 1) if said(n)), None)
    assert stopped(tokenizer, torch.tensor([ids]), stop).tolist() == [said(len(ids))]


def test_what_follows_is_padding() -> None:
    rollout = make_rollout(label=[0, 1, 0])
    short = cut(rollout, ["w5", "w9"])
    assert short.completion_ids.tolist() == [[4, 5, 1, 1], [8, 0, 1, 1], [0, 1, 1, 1]]
    assert short.completion_mask.sum(-1).tolist() == short.sampled.sum(-1).tolist() == [2, 2, 1]
    assert rollout.ended.tolist() == [False, True, True]
    assert short.ended.tolist() == [True, True, True]
    assert short.has_eos.tolist() == [False, True, True]
    assert cut(rollout, []) is rollout
    again = Rollout.unpack(short.pack(), short.tokenizer)
    assert again.ended.tolist() == [True, True, True]
    assert short.select(torch.tensor([0])).ended.tolist() == [True]


def test_one_that_ran_out_of_room_has_not_ended() -> None:
    short = cut(make_rollout(), ["w9"])
    assert short.ended.tolist() == [False, True, True]


@pytest.mark.parametrize("block", [1, 3, 8])
@pytest.mark.parametrize("static", [False, True])
def test_completions_end_there_with_the_same_distribution(block: int, static: bool, own_random_state: None) -> None:
    rollout = roll(make_policy(), repeat=12, block=block, static_cache=static, stop=["w5", "w7 w3"])
    stops = 0
    for ids, length in zip(rollout.completion_ids, rollout.lengths, strict=True):
        said, last = rollout.tokenizer.decode(ids[: length - 1]), int(ids[length - 1])
        assert "w5" not in said
        assert "w7 w3" not in said
        stops += last == 5
        assert length == 8 or last in (0, 3, 5)
    assert stops > 1
    assert rollout.ended.sum() >= stops
    expected = teacher_forced(rollout, "gpt2", Distribution(max_new_tokens=8))
    torch.testing.assert_close(logps_of(rollout), expected, rtol=0, atol=1e-4)


class Ignores(Engine):
    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        tokens = torch.tensor([[6, 7, 8]]).repeat(len(prompts), 1)
        return Rollout(prompts.ids, prompts.mask, tokens, tokens > 0, -tokens.float(), policy.tokenizer)


def test_an_engine_may_leave_it_to_the_sampler() -> None:
    rollout = Sampler(engine=Ignores(), stop=["w7"])(make_policy(), Prompts.of(make_prompts()))
    assert rollout.completion_ids.tolist() == [[6, 7]] * 3
    assert logps_of(rollout).tolist() == [[-6, -7]] * 3


def test_settings_for_transformers_have_them() -> None:
    assert Sampler(stop="w7").settings(make_policy()).stop_strings == ["w7"]
    assert Sampler().settings(make_policy()).stop_strings is None


def test_an_empty_string() -> None:
    with pytest.raises(InputError, match=r"sampler.stop: an empty string would end every completion"):
        Sampler(stop=["a", ""])
