"""The seams of a step: a part from outside in each, in a real Trainer, by the gradient that it has."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.functional.aggregation import sequence_sum
from grade_lightning.functional.gates import reinforce
from grade_lightning.gates import by_advantage
from grade_lightning.kl import KL
from grade_lightning.levels import token_level, turn_level
from grade_lightning.methods import DAPO, GRPO, PPO, RLOO, GradeSTE, ReinforcePlusPlus
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rollouts import Sampler, TransformersEngine
from tests.conftest import make_model, make_prompts, make_tokenizer
from tests.methods.toy_task import Toy, trainer, weights
from tests.modules.seams import (
    PerToken,
    Playback,
    Tool,
    Wide,
    make_turns,
    two_turns,
)
from tests.modules.toys import (
    build,
    distance,
    flat,
    gradient,
    loader,
    move,
    plain,
    prompts,
    run,
)

pytestmark = pytest.mark.usefixtures("own_random_state")


# ---- an engine from outside -----------------------------------------------------------------------------------------


def test_an_engine_is_told_of_the_weights_before_each_rollout() -> None:
    """Of two windows with four optimizer steps each: as they are after none and after four."""
    engine = Playback()
    module = build(GRPO, sampler=Sampler(12, engine=engine), num_generations=4, epochs=4)
    run(module, prompts(3), prompts(3, seed=1))
    assert engine.synced == [0, 4]
    assert engine.calls == 2


def test_an_engine_that_samples_from_old_weights_is_noticed() -> None:
    class Stale(TransformersEngine):
        """Keeps the weights that it saw first."""

        own: Policy | None = None

        def generate(self, policy: Policy, distribution: Any, prompts: Prompts) -> Rollout:
            if self.own is None:
                self.own = copy.deepcopy(policy)
                with torch.no_grad():
                    for parameter in self.own.model.parameters():
                        parameter.mul_(1.5)
            return super().generate(self.own, distribution, prompts)

    module = build(RLOO, torch.float32, sampler=Sampler(6, engine=Stale()))
    with pytest.raises(InputError, match="not sampled from the policy that is trained"):
        trainer().fit(module, loader(make_prompts((4, 4)) | {"columns": {}}))


def test_completions_that_nobody_sampled_need_no_log_probabilities() -> None:
    class Silent(Playback):
        def generate(self, policy: Policy, distribution: Any, prompts: Prompts) -> Rollout:
            rollout = super().generate(policy, distribution, prompts)
            rollout.engine_logps = None
            return rollout

    loud, silent = (
        run(build(GRPO, sampler=Sampler(12, engine=engine), **plain(GRPO)), prompts(4)).gradients[0]
        for engine in (Playback(), Silent())
    )
    assert distance(silent, loud) == 0


def test_an_engine_may_pad_to_a_width_of_its_own() -> None:
    """Rewards of tokens are cut as the completions are; the gradient is that without the padding."""
    settings: dict[str, Any] = {"reward": PerToken(), "num_generations": 4, "kl": KL()}
    found = [
        gradient(build(ReinforcePlusPlus, sampler=Sampler(15, engine=engine), **settings), prompts(4))
        for engine in (Wide(), Playback())
    ]
    assert distance(*found) == 0


# ---- turns ----------------------------------------------------------------------------------------------------------


def test_two_turns_of_an_environment_are_one_completion() -> None:
    """Turn, answer, turn: what the policy heard is what was written, and its log-probabilities are its own."""
    module = make_turns()
    rollout = module.draw(Prompts.of(make_prompts()))
    tokenizer, answer = make_tokenizer(), [7, 8, 9]
    for row in range(len(rollout.ids)):
        kept = rollout.completion_mask[row]
        ids, sampled = rollout.completion_ids[row][kept], rollout.sampled[row][kept]
        assert ids[~sampled].tolist() == answer
        assert rollout.turns[row][kept].diff().sum() == 1
        first = ids[: int((~sampled).long().argmax())]
        assert 1 <= len(first) <= 4
        assert tokenizer.decode(first, skip_special_tokens=True) in rollout.completions[row]
    with torch.no_grad():
        stats = module.measure(rollout)
    torch.testing.assert_close(stats.logps.float(), rollout.engine_logps, rtol=1e-4, atol=1e-4)
    assert not stats.logps[~rollout.sampled].any()
    assert rollout.columns["returns"] == [1.0] * len(rollout.ids)


def logps_by_hand(module: PolicyGradientModule, rollout: Rollout) -> list[Tensor]:
    """Of the sampled tokens, row by row, by the plain model on the whole text."""
    found = []
    for row in range(len(rollout.ids)):
        ids = rollout.ids[row][rollout.mask[row].bool()].unsqueeze(0)
        length = int(rollout.lengths[row])
        logits = module.policy.base(input_ids=ids).logits[0, -length - 1 : -1]
        every = logits.log_softmax(-1).gather(-1, ids[0, -length:, None]).squeeze(-1)
        found.append(every[rollout.sampled[row][rollout.completion_mask[row]]])
    return found


@pytest.mark.parametrize("credit", ["token", "sequence"])
def test_what_a_tool_says_is_attended_to_and_not_trained_on(credit: Any) -> None:
    """The gradient is that of the policy's own tokens, given all that was said before them."""
    module = make_turns(RLOO, num_generations=2, kl=KL(0.0, credit=credit))
    move(module)
    seen = module.collect(make_prompts((5, 3)) | {"columns": {}})
    module.loss(seen).loss.backward()
    ours = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    rewards = seen.scores.total.double()
    surplus = torch.stack([rewards[i] - rewards[i ^ 1] for i in range(4)])
    rows = logps_by_hand(module, seen.rollout)
    (-sum((a * row.sum() for a, row in zip(surplus, rows, strict=True)), torch.zeros(())) / 4).backward()
    truth = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert distance(ours, truth) < 1e-6


def test_another_answer_of_a_tool_is_another_context() -> None:
    class Other(Tool):
        answer = "w3 w3 w3"

    one, two = make_turns(), make_turns()
    two.sampler = two_turns(Other)
    drawn = []
    for module in (one, two):
        torch.manual_seed(0)
        drawn.append(module.draw(Prompts.of(make_prompts())))
    first = [rollout.completion_ids[:, 0].tolist() for rollout in drawn]
    assert first[0] == first[1]
    assert drawn[0].completion_ids.tolist() != drawn[1].completion_ids.tolist()


@pytest.mark.parametrize("method", [PPO, GRPO, ReinforcePlusPlus, DAPO, GradeSTE])
def test_every_kind_of_method_takes_turns(method: type[Any]) -> None:
    kwargs: dict[str, Any] = {"num_generations": 2, "minibatches": 1} if method is not GradeSTE else {"hops": "exact"}
    if method is DAPO:
        kwargs |= {"max_retries": 0, "overlong_buffer": 0}
    module = make_turns(method, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **kwargs)
    before = weights(module)
    fitted = trainer(log_every_n_steps=1)
    fitted.fit(module, loader(make_prompts((4, 3, 5)) | {"columns": {}}, visits=module.batching.steps_per_batch))
    assert fitted.callback_metrics["train/loss"].isfinite()
    assert not torch.equal(flat(weights(module)), flat(before))
    rollout = module.last_rollout[0]
    assert fitted.callback_metrics["train/response_length"] == pytest.approx(
        float(rollout.sampled.sum()) / len(rollout.ids)
    )


def test_a_ratio_may_be_taken_over_turns() -> None:
    """The geometric mean over each turn's own tokens; the tool's are in none."""
    module = make_turns(GRPO, num_generations=2)
    seen = module.sample(Prompts.of(make_prompts((5, 3))))
    values = torch.randn(seen.rollout.sampled.shape)
    found = turn_level(values, seen)
    for row in range(len(values)):
        for turn in (0, 1):
            own = (seen.rollout.turns[row] == turn) & seen.rollout.sampled[row]
            torch.testing.assert_close(found[row][own], values[row][own].mean().expand(int(own.sum())))


# ---- a line without a class -----------------------------------------------------------------------------------------


def test_a_plain_line_needs_no_more_than_its_parts() -> None:
    """REINFORCE from its parts, without a class of its own."""
    policy = Policy.from_model(make_model("gpt2", torch.float64, scale=4.0), make_tokenizer())
    module = PolicyGradientModule(
        advantage=lambda seen, reduce: seen.rewards.unsqueeze(1).expand(seen.rollout.sampled.shape),
        level=token_level,
        gate=by_advantage(reinforce),
        aggregate=sequence_sum,
        clips=False,
        policy=policy,
        reward=Toy(),
        sampler=Sampler(12, engine=Playback()),
    )
    module.configure_model()
    found = gradient(module, prompts(4))
    seen = module.collect(prompts(4))
    module.zero_grad()
    now = module.measure(seen.rollout)
    (-(seen.scores.total.unsqueeze(1) * now.logps)[seen.rollout.sampled].sum() / len(seen.rollout.ids)).backward()
    truth = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert distance(found, truth) < 1e-9
