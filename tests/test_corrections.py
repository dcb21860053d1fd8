"""The correction of an engine that is somewhat off, in a run."""

import copy
import itertools
import math
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from grade_lightning.corrections import EngineCorrection
from grade_lightning.errors import InputError
from grade_lightning.functional.corrections import truncated_importance
from grade_lightning.kl import KL
from grade_lightning.methods import GRPO, RLOO, GradeSTE
from grade_lightning.policies import Policy
from grade_lightning.records import Experience, Prompts, Rollout
from grade_lightning.rewards import Classifier, ClassifierReward
from grade_lightning.rollouts import Distribution, Sampler, TransformersEngine
from tests.conftest import make_tokenizer
from tests.methods import enumeration
from tests.methods.toy_task import fit, make
from tests.modules.toys import Prescribed, build, distance, gradient, plain, prompts, run

pytestmark = pytest.mark.usefixtures("own_random_state")


class Rounded(Prescribed):
    """Draws from log-probabilities that are off by up to half of a nat."""

    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        found = super().generate(policy, distribution, prompts)
        assert found.engine_logps is not None
        noise = torch.linspace(-0.5, 0.5, found.engine_logps.numel()).view_as(found.engine_logps)
        return replace(found, engine_logps=found.engine_logps + noise)


class Mute(Prescribed):
    def generate(self, *args: Any) -> Rollout:
        return replace(super().generate(*args), engine_logps=None)


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("level", ["token", "prefix", "sequence"])
def test_advantages_have_the_weights(level: Any, epochs: int) -> None:
    settings = plain(RLOO, kl=KL(), epochs=2, sampler=Sampler(12, engine=Rounded()))
    bare = build(RLOO, **settings).collect(prompts(4))
    module = build(RLOO, **settings, correction=EngineCorrection(1.1, level))
    seen = module.collect(prompts(4))
    engine = seen.rollout.engine_logps
    assert engine is not None
    weights = truncated_importance(seen.old.logps, engine, seen.mask, 1.1, level)
    assert ((weights != 1) & seen.mask).sum() > 0
    torch.testing.assert_close(seen.advantages, bare.advantages * weights)


def test_an_engine_that_is_right_changes_nothing() -> None:
    batch = prompts(4)
    settings = plain(GRPO, sampler=Sampler(12, engine=Prescribed()))
    one, two = (gradient(build(GRPO, **settings, correction=c), batch) for c in (None, EngineCorrection()))
    assert distance(two, one) < 1e-6


def test_an_engine_that_is_off_is_refused_only_without_a_correction() -> None:
    settings = plain(GRPO, sampler=Sampler(12, engine=Rounded()))
    with pytest.raises(InputError, match="differ from those of the engine"):
        run(build(GRPO, **settings), prompts(4))
    watch = run(build(GRPO, **settings, correction=EngineCorrection()), prompts(4))
    assert 0.8 < watch.logged[0]["train/engine_weight"] < 1.2
    assert abs(watch.logged[0]["train/engine_kl"]) > 1e-3
    assert watch.logged[0]["train/engine_gap"] == pytest.approx(0.25, abs=0.1)
    assert 0 < watch.logged[0]["train/engine_ess"] < 1
    assert watch.logged[0]["train/engine_truncated"] == 0  # half a nat is a factor of 1.65


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_completions_drawn_in_bfloat16_train_every_weight(precision: str) -> None:
    """Casts that sampling made without a graph must not stand for weights in the training pass."""
    sampler = Sampler(max_new_tokens=6, engine=TransformersEngine(bfloat16=True))
    module = make(RLOO, sampler=sampler, correction=EngineCorrection())
    steps = fit(module, 2, precision=precision)
    assert not any(steps.without_gradient)
    assert (1e-5 if precision == "32-true" else 0) <= steps.steps[0]["train/engine_gap"] < 0.1
    assert steps.steps[0]["train/engine_ess"] > 0.9


def few_tokens(seed: int) -> PreTrainedModel:
    """A GPT-2 of three tokens."""
    torch.manual_seed(seed)
    config = GPT2Config(n_embd=8, n_head=2, n_layer=2, n_positions=8, vocab_size=3, bos_token_id=0, eos_token_id=0)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = cast(torch.nn.Module, GPT2LMHeadModel(config)).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(8)
    return cast(PreTrainedModel, model)


def few_classifier() -> Classifier:
    base: Any = few_tokens(3).base_model
    return Classifier(base, hidden=8).double()


def test_an_engine_that_says_nothing_is_one_line() -> None:
    module = build(GRPO, **plain(GRPO, sampler=Sampler(12, engine=Mute())), correction=EngineCorrection())
    with pytest.raises(InputError, match="no log-probabilities"):
        module.draw_loss(prompts(4))


# ---- an engine with old weights -------------------------------------------------------------------------------------


def test_rloo_has_its_gradient_back() -> None:
    """The mean over all batches that other weights draw is off, and with the weights of completions it is not."""
    line, problem = enumeration.Line("RLOO"), enumeration.make_problem()
    old = copy.copy(problem)
    old.logits = problem.logits + 3 * (problem.ref_logits - problem.logits)
    truth, stale = enumeration.truth(line, problem, problem.logits), problem.measure(old.logits).logps
    found = {}
    for level in (None, "token", "sequence"):
        module = enumeration.make(line, problem)
        module.correction = None if level is None else EngineCorrection(math.inf, level)
        found[level] = torch.zeros_like(truth)
        for outcomes, probability in enumeration.batches(line, old, 1.0):
            seen = enumeration.experience(line, problem, module, outcomes)
            seen = replace(seen, rollout=replace(seen.rollout, engine_logps=stale[outcomes]))
            found[level] += probability * enumeration.update(module, seen, None)
    assert (found["sequence"] - truth).norm() < 1e-12
    assert (found["token"] - truth).norm() > 1e-3 * truth.norm()
    assert (found[None] - truth).norm() > 0.1 * truth.norm()


class Few:
    """GradeSTE on three tokens of which two end nothing: all fifteen completions of up to three, and who draws them."""

    def __init__(self, kl_prefix: Any) -> None:
        self.method = GradeSTE(
            Policy.from_model(few_tokens(1), make_tokenizer()),
            ClassifierReward.from_classifier(few_classifier()),
            sampler=Sampler(max_new_tokens=3),
            hops="exact",
            beta=0.3,
            kl_prefix=kl_prefix,
        )
        with torch.no_grad():
            for p in self.method.policy.model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))))
        every = [list(x) for n in (1, 2, 3) for x in itertools.product(range(3), repeat=n)]
        self.completions = [x for x in every if 0 not in x[:-1] and (x[-1] == 0 or len(x) == 3)]
        self.old = self.logps(Policy.from_model(few_tokens(2), make_tokenizer()))
        self.own = self.logps(self.method.policy)

    def rollout(self, policy: Policy, completion: list[int]) -> Rollout:
        one = torch.ones(1, 1, dtype=torch.long)
        prompts = Prompts(2 * one, one, {"completions": [[completion]]})
        return Prescribed().generate(policy, self.method.sampler.distribution, prompts)

    def logps(self, policy: Policy) -> list[Tensor]:
        found = [self.rollout(policy, completion).engine_logps for completion in self.completions]
        return [x for x in found if x is not None]

    def mean(self, drawn_by: list[Tensor], correction: EngineCorrection | None) -> Tensor:
        """Of the gradient, over all completions."""
        self.method.correction = correction
        total: Any = 0
        assert sum(float(x.sum().exp()) for x in drawn_by) == pytest.approx(1)
        for completion, engine in zip(self.completions, drawn_by, strict=True):
            rollout = replace(self.rollout(self.method.policy, completion), engine_logps=engine)
            self.method.zero_grad()
            self.method.loss(
                Experience(rollout, self.method.reward.pathwise(rollout), self.method.beta)
            ).loss.backward()
            parts = [p.grad.flatten() for p in self.method.parameters() if p.grad is not None]
            total = total + engine.sum().exp() * torch.cat(parts)
        found: Tensor = total
        return found


@pytest.mark.parametrize("kl_prefix", ["none", "policy", "full"])
def test_grade_ste_has_its_own_mean_back(kl_prefix: Any) -> None:
    few = Few(kl_prefix)
    truth = few.mean(few.own, None)
    assert (few.mean(few.old, None) - truth).norm() > 0.1 * truth.norm()
    for level in ("prefix", "sequence"):
        found = few.mean(few.old, EngineCorrection(math.inf, level))
        assert (found - truth).norm() < 1e-10 * truth.norm()


def test_grade_ste_needs_the_ratio_of_the_sequence() -> None:
    with pytest.raises(InputError, match=r"correction\.level = token.*prefix or sequence"):
        GradeSTE(correction=EngineCorrection())
