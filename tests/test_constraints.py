"""Bounds on rewards: the Lagrangian by hand, multipliers that move by what was logged, and exact resumes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from grade_lightning.constraints import Constrained, Constraint
from grade_lightning.data.loading import ResumableLoader
from grade_lightning.distributed import Reduce
from grade_lightning.errors import InputError
from grade_lightning.kl import KL
from grade_lightning.methods import DPO, GRPO, RLOO, Grade, GradeSTE
from grade_lightning.modules import AlignmentModule
from grade_lightning.records import Experience, Rollout, Scores
from grade_lightning.rewards import DifferentiableReward, Reward, WeightedSum
from tests.conftest import VOCABULARY, make_prompts
from tests.methods.toy_task import Toy, assert_same, batches, fit, make, trainer, weights
from tests.rewards.making import adjoint, constant, make_rollout

pytestmark = pytest.mark.usefixtures("own_random_state")


class Late(DifferentiableReward):
    """The fraction of tokens with an id above 14."""

    def table(self) -> Tensor:
        return torch.eye(VOCABULARY)

    def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        return (embeddings[..., 15:].sum(-1) * mask).sum(-1) / mask.sum(-1)


def bounded(**kwargs: Any) -> Constrained:
    return Constrained(Toy(), [Constraint(Late(), **{"at_most": 0.1, "rate": 1.0} | kwargs)])


# ---- the Lagrangian -------------------------------------------------------------------------------------------------


def two_bounds() -> Constrained:
    constraints = [
        Constraint(constant(5.0, 1.0, None, name="cost"), at_most=2.0, initial=0.5),
        Constraint(constant(0.0, 3.0, 4.0, name="use"), at_least=1.0, initial=2.0),
    ]
    return Constrained(constant(1.0, 2.0, 3.0, name="cost"), constraints)


def test_rewards_and_what_is_beyond_the_bounds() -> None:
    """R − λ (c − κ) above, R + λ (c − κ) below; who abstains is at the bound, and evaluation shows R."""
    reward = two_bounds()
    scores = reward.score(make_rollout())
    assert scores.total.tolist() == [1 - 0.5 * 3 - 2 * 1, 2 + 0.5 * 1 + 2 * 2, 3 + 2 * 3]
    assert list(scores.parts) == ["cost", "use", "cost-2"]
    torch.testing.assert_close(scores.parts["cost"], torch.tensor([5.0, 1.0, torch.nan]), equal_nan=True)
    assert scores.parts["cost-2"].tolist() == reward.eval().score(make_rollout()).total.tolist() == [1, 2, 3]


def test_gradients_are_those_of_the_sum() -> None:
    reward = bounded(initial=0.7)
    found = reward.pathwise(make_rollout())
    own, other = Toy().pathwise(make_rollout()), Late().pathwise(make_rollout())
    torch.testing.assert_close(adjoint(found), adjoint(own) - 0.7 * adjoint(other))
    torch.testing.assert_close(found.total, own.total - 0.7 * (other.total - 0.1))


def seen(reward: Reward) -> Experience:
    return Experience(make_rollout(), reward.score(make_rollout()))


def test_multipliers_move_by_the_mean_of_those_that_answer() -> None:
    reward = two_bounds()
    reward.multipliers.observe(seen(reward), Reduce())
    assert reward.multipliers.values == pytest.approx({"cost": 0.5 + 0.1 * (3 - 2), "use": 2 - 0.1 * (7 / 3 - 1)})


def test_multipliers_are_those_of_all_processes() -> None:
    """Not the mean of two means, where one process has more answers than the other."""

    class Two(Reduce):
        def sum(self, values: Tensor) -> Tensor:
            return values + torch.tensor([[30.0, 0.0], [8.0, 0.0]])

    reward = two_bounds()
    reward.multipliers.observe(seen(reward), Two())
    assert reward.multipliers.values["cost"] == pytest.approx(0.5 + 0.1 * (36 / 10 - 2))


def test_without_an_answer_a_multiplier_stays() -> None:
    reward = Constrained(constant(1.0, 2.0, 3.0), [Constraint(constant(None, None, None), at_most=0.0, initial=0.3)])
    reward.multipliers.observe(seen(reward), Reduce())
    assert list(reward.multipliers.values.values()) == [0.3]


def test_rewards_of_tokens_keep_their_sum() -> None:
    class Spread(Reward):
        def forward(self, rollout: Rollout) -> Tensor:
            return rollout.sampled.sum(-1).float()

        def score(self, rollout: Rollout) -> Scores:
            return Scores(self(rollout), {"Spread": self(rollout)}, per_token=rollout.sampled.float())

    scores = Constrained(Toy(), [Constraint(Spread(), at_most=1.5, initial=0.5)]).score(make_rollout())
    torch.testing.assert_close(scores.at_tokens(make_rollout().sampled).sum(-1), scores.total)


# ---- in a run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "kwargs", "accumulate"),
    [(RLOO, {}, 1), (GRPO, {"epochs": 2}, 2), (GradeSTE, {}, 1), (GradeSTE, {}, 2), (Grade, {}, 1)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_multipliers_follow_what_was_logged(
    method: type[AlignmentModule], kwargs: dict[str, Any], accumulate: int
) -> None:
    """λ moves once for each optimizer step or window, by the mean of all its rows; what is logged is what was used."""
    module = make(method, **kwargs)
    module.reward = bounded()
    window = kwargs.get("epochs", 1) * accumulate
    recorder = fit(module, 4 * window, batches(4 * window, repeat=8), accumulate_grad_batches=accumulate)
    assert len(recorder.steps) == 4 * window
    multiplier = 0.0
    for start in range(0, len(recorder.steps), window):
        rows = recorder.steps[start : start + window]
        assert [row["multiplier/Late"] for row in rows] == pytest.approx([multiplier] * window, rel=1e-5)
        rows = rows[:accumulate] if method is GRPO else rows
        mean = sum(row["rewards/Late"] for row in rows) / len(rows)
        multiplier = max(0.0, multiplier + mean - 0.1)
    assert isinstance(module.reward, Constrained)
    assert module.reward.multipliers.values["Late"] == pytest.approx(multiplier, rel=1e-4)
    assert multiplier > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", [GradeSTE, RLOO])
def test_a_bound_holds_where_it_would_not(method: type[AlignmentModule]) -> None:
    """Of tokens that are rewarded some are bounded: without the bound training makes more of them."""
    ends = []
    for constrained in (False, True):
        module = make(method)
        module.reward = bounded(rate=2.0 if constrained else 1e-9)
        steps = fit(module, 24, batches(24, repeat=16)).steps
        ends.append([sum(step[name] for step in steps[-6:]) / 6 for name in ("rewards/Late", "rewards/Toy")])
    (free, _), (held, reward) = ends
    assert free > 0.2
    assert held == pytest.approx(0.1, abs=0.05)
    assert reward > 0.6


def resumable(method: type[AlignmentModule], folder: Path, save: bool) -> tuple[AlignmentModule, Any]:
    kwargs: dict[str, Any] = {"kl_target": 0.05, "kl_rate": 0.1} if method is GradeSTE else {"epochs": 2}
    kwargs |= {"kl": KL(0.0, target=0.05, rate=0.1)} if method is RLOO else {}
    module = make(method, **kwargs)
    module.reward = bounded()
    callbacks = [ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)] if save else []
    return module, trainer(callbacks=callbacks, enable_checkpointing=save, log_every_n_steps=1)


@pytest.mark.parametrize("method", [GradeSTE, RLOO])
def test_a_run_with_bounds_resumes_exactly(method: type[AlignmentModule], tmp_path: Path) -> None:
    """Weights, multipliers and β, in mid-window, too."""
    rows: Any = [
        {name: value.repeat(4, 1) for name, value in make_prompts().items()} | {"columns": {}} for _ in range(3)
    ]
    repeats = 2 if method is RLOO else 1
    whole, fitted = resumable(method, tmp_path, save=True)
    fitted.fit(whole, ResumableLoader(rows, repeats=repeats, batch_size=None))
    for step in (1, 2, 3) if method is RLOO else (1, 2):
        module, again = resumable(method, tmp_path, save=False)
        torch.manual_seed(99)
        loader: Any = ResumableLoader(rows, repeats=repeats, batch_size=None)
        again.fit(module, loader, ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
        assert_same(weights(module), weights(whole))
        assert module.part_states() == whole.part_states()
        assert module.beta == whole.beta
    assert whole.part_states()["reward multipliers"]["Late"] > 0
    assert whole.beta > 0


def test_a_bound_on_the_kl_begins_at_nothing_and_ends_there() -> None:
    """β rises from 0 while the KL is beyond it, and is 0 while there is room."""
    tight = make(GradeSTE, beta=0.0, kl_target=1e-3, kl_rate=0.5)
    steps = fit(tight, 4).steps
    beta = 0.0
    for step in steps:
        assert step["train/beta"] == pytest.approx(beta, rel=1e-5)
        beta = max(0.0, beta + 0.5 * (step["train/kl"] - 1e-3))
    assert tight.beta == pytest.approx(beta, rel=1e-4)
    assert beta > 0
    roomy = make(GradeSTE, beta=0.1, kl_target=1e3, kl_rate=0.5)
    fit(roomy, 2)
    assert roomy.beta == 0.0


# ---- what cannot work -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({}, "give one of at_most and at_least"),
        ({"at_most": 1.0, "at_least": 0.0}, "give one of at_most and at_least"),
        ({"at_most": math.inf}, "constraint.at_most = inf"),
        ({"at_most": 1.0, "rate": 0.0}, r"constraint.rate = 0.0"),
        ({"at_most": 1.0, "initial": -1.0}, r"constraint.initial = -1.0"),
    ],
)
def test_a_bound_that_is_none(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Constraint(Toy(), **kwargs)


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="there are no constraints"):
        Constrained(Toy(), [])
    with pytest.raises(InputError, match=r"moves with what is sampled, and DPO keeps the best and the worst"):
        DPO(reward=bounded())
    with pytest.raises(InputError, match=r"WeightedSum: has Constrained as a part.*turn them around"):
        RLOO(reward=WeightedSum([bounded(), Toy()]))
    with pytest.raises(InputError, match=r"kl\.rate: needs a kl.target"):
        KL(0.1, rate=0.1)
