"""Blends of GradeSTE's gradient: a length that is fitted, and a mix whose unbiased part is the truth by enumeration."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from grade_lightning import blends
from grade_lightning.blends import Calibrated, Debiased, Mixed
from grade_lightning.errors import InputError
from grade_lightning.functional.divergences import categorical_kl
from grade_lightning.functional.mixing import Errors, mix_weight
from grade_lightning.methods import GradeSTE
from grade_lightning.policies import Policy
from grade_lightning.records import Experience, Prompts, Rollout
from grade_lightning.rewards import ClassifierReward
from grade_lightning.rollouts import Sampler
from tests.conftest import make_tokenizer
from tests.methods.toy_task import Toy, assert_same, batches, fit, make, trainer, weights
from tests.modules.toys import Prescribed
from tests.test_corrections import few_classifier, few_tokens

pytestmark = pytest.mark.usefixtures("own_random_state")


class Pairs:
    """GradeSTE on three tokens, with every pair of its seven completions of up to two."""

    def __init__(self, blend: Calibrated | None, **settings: Any) -> None:
        self.method = GradeSTE(
            Policy.from_model(few_tokens(1), make_tokenizer()),
            ClassifierReward.from_classifier(few_classifier()),
            sampler=Sampler(max_new_tokens=2, temperature=0.8),
            hops="exact",
            beta=0.3,
            blend=blend,
            num_generations=2,
            **settings,
        )
        with torch.no_grad():
            for p in self.method.policy.model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))))
        every = [list(x) for n in (1, 2) for x in itertools.product(range(3), repeat=n)]
        self.completions = [x for x in every if 0 not in x[:-1] and (x[-1] == 0 or len(x) == 2)]
        self.trained = [p for p in self.method.policy.parameters() if p.requires_grad]

    def rollout(self, rows: list[list[int]]) -> Rollout:
        two = torch.full((len(rows), 1), 2)
        prompts = Prompts(two, torch.ones_like(two), {"completions": [[row] for row in rows]})
        found = Prescribed().generate(self.method.policy, self.method.sampler.distribution, prompts)
        return replace(found, groups=torch.zeros(len(rows), dtype=torch.long))

    def gradient(self, loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, self.trained, allow_unused=True)
        return torch.cat(
            [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(self.trained, found, strict=True)]
        )

    def mean(self) -> Tensor:
        """Of the gradient, over all pairs."""
        every = self.rollout(self.completions)
        assert every.engine_logps is not None
        probs = every.engine_logps.sum(-1).exp()
        assert float(probs.sum()) == pytest.approx(1)
        total: Any = 0
        for i, j in itertools.product(range(len(probs)), repeat=2):
            rollout = self.rollout([self.completions[i], self.completions[j]])
            seen = Experience(rollout, self.method.reward.pathwise(rollout), self.method.beta)
            total = total + probs[i] * probs[j] * self.gradient(self.method.loss(seen).loss)
        found: Tensor = total
        return found

    def truth(self) -> Tensor:
        """Of −E[R] + β E[KL], by autograd."""
        policy, rollout = self.method.policy, self.rollout(self.completions)
        attention, length = rollout.mask[:, :-1], rollout.completion_ids.shape[1]
        own, other = (
            self.method.sampler.distribution.log_distribution(x.logits(x.embed(rollout.ids[:, :-1]), attention, length))
            for x in (policy, policy.frozen)
        )
        logps = own.gather(-1, rollout.completion_ids.unsqueeze(-1)).squeeze(-1)
        probs = (logps * rollout.sampled).sum(-1).exp()
        kl = (categorical_kl(own, other.detach()) * rollout.sampled).sum(-1)
        rewards = self.method.reward.score(rollout).total
        return self.gradient(-(probs * (rewards - self.method.beta * kl)).sum())


def known(blend: Any, slope: float = 1.7) -> Any:
    """With a direction from nowhere, as from earlier batches."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    credit = blend.credit
    along = torch.randn(1, 4, dtype=torch.float64, generator=generator)
    credit._tables, credit._sums = [table], [torch.ones(1, 1, dtype=torch.float64), along]
    credit._fit = torch.tensor([slope, 1.0, 4.0], dtype=torch.float64)
    return blend


@pytest.mark.parametrize("kl_prefix", ["none", "full"])
@pytest.mark.parametrize("credit", [False, True], ids=["without credit", "with credit"])
def test_without_the_biased_part_the_mean_is_the_truth(credit: bool, kl_prefix: Any) -> None:
    """Reward and KL, at another temperature, over all pairs of completions."""
    pairs = Pairs(known(Mixed(weight=0.0)) if credit else Mixed(weight=0.0), kl_prefix=kl_prefix)
    truth = pairs.truth()
    assert (pairs.mean() - truth).norm() < 1e-10 * truth.norm()


def test_the_mix_is_one_of_both() -> None:
    truth, straight = (Pairs(known(Mixed(weight=x))).mean() for x in (0.0, 1.0))
    assert (straight - truth).norm() > 0.1 * truth.norm()
    torch.testing.assert_close(Pairs(known(Mixed(weight=0.3))).mean(), 0.3 * straight + 0.7 * truth)


def test_the_slope_is_a_factor_of_the_rewards_part_alone() -> None:
    plain, scaled, reward = Pairs(None), Pairs(known(Calibrated(), slope=2.5)), Pairs(None)
    reward.method.beta = 0.0
    torch.testing.assert_close(scaled.mean(), plain.mean() + 1.5 * reward.mean())


def test_a_slope_that_is_not_positive_turns_nothing_around() -> None:
    assert [known(Calibrated(), slope=slope).slope for slope in (-2.0, 0.0, 0.5)] == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("generations", [1, 4])
def test_the_slope_is_that_of_rewards_on_what_the_direction_predicts(generations: int) -> None:
    """A reward that adds up over tokens is predicted, with a slope a little above 1 (three seeds: 1.14 to 1.17)."""
    module = make(GradeSTE, blend=Calibrated(), lr=0.0, num_generations=generations)
    module.reward = Sum()
    run = fit(module, 16, batches(16, repeat=96))
    last = run.steps[-1]
    assert run.steps[0]["train/credit_slope"] == 1
    assert last["train/credit_slope"] == pytest.approx(1.15, abs=0.15)  # a token also makes later ones more likely
    assert last["train/credit_r2"] > 0.2


class Sum(Toy):
    """Not divided by the length."""

    def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        return (embeddings[..., 10:].sum(-1) * mask).sum(-1)


def test_parts_of_a_batch_are_compared() -> None:
    """Each gradient is that of its part alone; without a difference there is no bias."""
    module = make(GradeSTE, blend=Mixed(every=1), num_generations=2)
    module.configure_model()
    assert isinstance(module, GradeSTE)
    batch = next(iter(batches(1, repeat=2)))
    kept: list[Any] = []
    blend = module.blend
    assert isinstance(blend, Mixed)
    real = blend.look_at

    def look_at(vocabulary: Any, rollout: Rollout, both: Any, parameters: Any) -> None:
        parameters = list(parameters)
        real(vocabulary, rollout, both, parameters)
        real(vocabulary, rollout, (both[0], both[0]), parameters)
        kept.append(rollout)

    blend.look_at = look_at  # type: ignore[method-assign]
    with module.collecting():
        seen = module.collect(batch)
    module.beta = 0.0
    module.loss(seen)
    assert len(kept) == 1
    found, same = (Errors(*x) for x in blend._found)
    assert (
        float(same.biased)
        == pytest.approx(float(same.shared), abs=1e-6)
        == pytest.approx(float(same.unbiased), abs=1e-6)
    )
    assert abs(float(same.bias)) < 1e-6
    assert float(found.biased) == float(same.biased)
    gradients = []
    for part in range(2):
        rows = (seen.rollout.layout.row % 2 == part).nonzero().squeeze(1)
        rollout = seen.rollout.select(rows)
        module.blend = None
        loss = module.loss(Experience(rollout, module.reward.pathwise(rollout), 0.0)).loss * len(rows)
        trained = [p for p in module.policy.parameters() if p.requires_grad]
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]).double())
    one, two = gradients
    assert float(found.biased) == pytest.approx(float((one - two).square().sum()) / 4, rel=1e-4)


@pytest.mark.parametrize("blend", [Calibrated, Mixed, Debiased])
def test_a_resumed_run_is_the_run(blend: Any, tmp_path: Path) -> None:
    settings = {} if blend is Calibrated else {"every": 2}
    whole, resumed = (make(GradeSTE, blend=blend(**settings), num_generations=2) for _ in range(2))
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(max_steps=5, callbacks=[save], enable_checkpointing=True).fit(whole, batches(5))
    trainer(max_steps=5).fit(resumed, batches(5), ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
    assert_same(weights(resumed), weights(whole))
    if blend is Mixed:
        assert isinstance(whole, GradeSTE)
        assert isinstance(whole.blend, Mixed)
        assert whole.blend._errors is not None
        assert whole.blend.weight == float(mix_weight(Errors(*whole.blend._errors)))


def test_the_mean_with_its_average_difference_is_the_truth() -> None:
    """Over all pairs of completions; without it there is a bias."""
    pairs, blend = Pairs(known(Debiased())), known(Debiased())
    truth, straight = pairs.truth(), pairs.mean()
    assert (straight - truth).norm() > 0.1 * truth.norm()
    looking = Pairs(blend)
    every = looking.rollout(looking.completions)
    assert every.engine_logps is not None
    probs = every.engine_logps.sum(-1).exp()
    weighed: list[list[Tensor]] = []
    for i, j in itertools.product(range(len(probs)), repeat=2):
        rollout = looking.rollout([looking.completions[i], looking.completions[j]])
        looking.method._look, blend._new, blend._batches = True, [], 0
        looking.method.loss(Experience(rollout, looking.method.reward.pathwise(rollout), looking.method.beta))
        weighed.append([x.double() * probs[i] * probs[j] for x in blend._new])
    total = [torch.stack(parts).sum(0) for parts in zip(*weighed, strict=True)]
    blend._difference = total
    assert (looking.mean() - truth).norm() < 1e-6 * truth.norm()


def test_the_average_difference_is_that_of_batches_so_far() -> None:
    """Of two batches with decay ½, begun at 0: a quarter of the first and a half of the second."""
    blend, given = Debiased(decay=0.5), torch.nn.Parameter(torch.zeros(2))
    module = make(GradeSTE, blend=blend, num_generations=2)
    module.configure_model()
    with module.collecting():
        seen = module.collect(next(iter(batches(1, repeat=2))))
    seen = replace(seen, old=module.loss(seen).stats)
    for value in (3.0, 6.0):
        blend._new, blend._batches = [torch.full((2,), 2 * value)], 2
        blend.observe(seen, module.reduce)
    held = blend.held([given])
    assert isinstance(held, Tensor)
    assert float(held) == 0
    torch.testing.assert_close(torch.autograd.grad(held, given)[0], torch.full((2,), 3.75))


def test_the_mix_is_logged_and_is_all_of_the_first_step() -> None:
    blend = Mixed(every=1)
    run = fit(make(GradeSTE, blend=blend, num_generations=4), 3, batches(3, repeat=8))
    assert run.steps[0]["train/mix_weight"] == 1
    assert all(0 <= step["train/mix_weight"] <= 1 for step in run.steps)
    assert blend._errors is not None
    blend._errors = torch.tensor([0.0, 1.0, 0.0, 3.0])
    blend.due = lambda step: False  # type: ignore[method-assign]
    again = fit(make(GradeSTE, blend=blend, num_generations=4), 1, batches(1, repeat=8))
    assert again.steps[0]["train/mix_weight"] == 0.25


def test_what_cannot_work_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"num_generations = 1: blend Mixed compares the completions of a prompt"):
        GradeSTE(blend=Mixed())
    monkeypatch.setattr(blends, "DTensor", torch.Tensor)  # as if all weights were sharded
    with pytest.raises(InputError, match=r"weights that are sharded cannot be looked at; set blend.weight"):
        fit(make(GradeSTE, blend=Mixed(), num_generations=2), 1, batches(1, repeat=2))
    monkeypatch.undo()
    module = make(GradeSTE, blend=Mixed(parts=5), num_generations=2)
    with pytest.raises(InputError, match=r"3 prompts in a batch cannot be split into 5 parts"):
        fit(module, 1, batches(1, repeat=1))
