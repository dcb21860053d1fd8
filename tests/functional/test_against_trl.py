"""Losses, gradients and advantages against those of TRL 1.16: its own code, on stand-ins for its trainers."""

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grade_lightning.advantages import group_standardised
from grade_lightning.functional.aggregation import Normalizers, sequence_mean
from grade_lightning.functional.gates import clipped
from grade_lightning.functional.ratios import importance_ratio
from grade_lightning.gates import by_advantage
from grade_lightning.kl import KL
from grade_lightning.levels import token_level
from grade_lightning.methods import CISPO, DAPO, DPO, GRPO, GSPO, IPO, RLOO, SAPO, DrGRPO
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.records import Experience, Rollout, Scores, TokenStats
from grade_lightning.rollouts import Sampler
from grade_lightning.terms import PolicyLoss
from tests.conftest import make_tokenizer

GROUPS, SIZE, LENGTH, LONGEST = 3, 4, 7, 9
NO_KL = KL()


@pytest.fixture(scope="module")
def trl() -> Any:
    """The three trainers; what is called below is not public, so no other version will do."""
    version = str(pytest.importorskip("trl").__version__)
    if not version.startswith("1.16."):
        pytest.skip(f"made for TRL 1.16, found {version}")
    names = {"grpo": "GRPOTrainer", "rloo": "RLOOTrainer", "dpo": "DPOTrainer"}
    modules = {name: pytest.importorskip(f"trl.trainer.{name}_trainer") for name in names}
    return SimpleNamespace(**{name: getattr(modules[name], trainer) for name, trainer in names.items()})


class Batch:
    """Three groups of four completions of one to seven tokens, some way from where they were sampled.

    Args:
        on_policy: no way at all.
        abstains: two rewards are missing.
        same: every completion is as good as the others.
    """

    def __init__(self, on_policy: bool = False, abstains: bool = False, same: bool = False) -> None:
        generator = torch.Generator().manual_seed(3)
        rows = GROUPS * SIZE
        noise, drift, gap = torch.randn(3, rows, LENGTH, dtype=torch.float64, generator=generator)
        lengths = torch.randint(1, LENGTH + 1, (rows, 1), generator=generator)
        lengths[0] = LENGTH
        self.mask = torch.arange(LENGTH) < lengths
        self.old = -noise.abs() - 0.1
        moved = self.old.clone() if on_policy else self.old + 0.3 * drift + 0.3 * gap[:, :1]
        self.logps = moved.requires_grad_()
        self.ref = self.old + 0.5 * gap
        self.rewards = torch.randn(rows, dtype=torch.float64, generator=generator)
        if same:
            self.rewards = torch.ones_like(self.rewards)
        if abstains:
            self.rewards[[1, 6]] = torch.nan

    def measured(self, logps: Tensor) -> TokenStats:
        return TokenStats(logps, logps - self.ref, torch.zeros_like(logps), torch.zeros_like(logps), self.ref)

    def experience(self, method: PolicyGradientModule) -> Experience:
        """Ours, with its advantages."""
        rows = len(self.mask)
        prompts, ids = torch.full((rows, 2), 5), torch.full((rows, LENGTH), 4)
        groups = torch.arange(rows) // SIZE
        rollout = Rollout(prompts, torch.ones_like(prompts), ids, self.mask, self.old, make_tokenizer(), groups=groups)
        totals = Normalizers(float(self.mask.sum()), rows)
        seen = Experience(rollout, Scores(self.rewards, {}), method.beta, normalizers=totals)
        return method.appraise(seen, self.measured(self.old))

    def trainer(self, **settings: Any) -> Any:
        """What TRL's methods read of a trainer; its model's answers are this batch's."""
        model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
        ref_model = object()

        def answers(which: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
            logps = self.old if which is model else self.ref if which is ref_model else self.logps
            return logps, torch.zeros_like(logps), None

        rows = len(self.mask)
        completions = [[4] * int(length) for length in self.mask.sum(-1)]
        generated: tuple[Any, ...] = ([[5, 5]] * rows, completions, None, [""] * rows, None, {}, None, None)
        args = {
            "per_device_train_batch_size": rows,
            "gradient_checkpointing_kwargs": None,
            "gradient_accumulation_steps": 1,
            "steps_per_generation": 1,
            "use_bias_correction_kl": False,
            "delta": None,
            "sapo_temperature_pos": 1.0,
            "sapo_temperature_neg": 1.05,
        }
        known = {
            "model": model,
            "ref_model": ref_model,
            "args": SimpleNamespace(**args | {name: settings.pop(name) for name in args if name in settings}),
            "accelerator": SimpleNamespace(
                device="cpu", num_processes=1, process_index=0, gather=lambda x: x, reduce=lambda x, reduction: x
            ),
            "_get_per_token_logps_and_entropies": answers,
            "_generate": lambda prompts: generated,
            "_calculate_rewards": lambda *_: self.rewards.unsqueeze(1).clone(),
            "_tokenizer": SimpleNamespace(pad_token_id=1),
            "_metrics": {"train": defaultdict(list)},
            "_logs": defaultdict(list) | {"rewards": defaultdict(list), "extra": defaultdict(list)},
            "_pending_extra_logs": {},
            "_pending_metrics": {},
            "_entropy_bonus_enabled": False,
            "aux_loss_enabled": False,
            "beta": 0.0,
            "current_gradient_accumulation_steps": 1,
            "environment_factories": None,
            "environments": None,
            "epsilon_low": 0.2,
            "epsilon_high": 0.2,
            "importance_sampling_level": "token",
            "loss_type": "grpo",
            "mask_truncated_completions": False,
            "max_completion_length": LONGEST,
            "multi_objective_aggregation": "sum_then_normalize",
            "normalize_advantages": False,
            "num_generations": SIZE,
            "num_iterations": 2,  # so that the old log-probabilities are kept
            "off_policy_mask_threshold": None,
            "pad_to_multiple_of": None,
            "reward_clip_range": None,
            "reward_func_names": ["reward"],
            "reward_weights": torch.ones(1),
            "scale_rewards": "group",
            "tools": None,
            "top_entropy_quantile": 1.0,
            "use_vllm": False,
        }
        assert settings.keys() <= known.keys()
        return SimpleNamespace(**known | settings)


def ours(method: PolicyGradientModule, batch: Batch) -> tuple[Tensor, Tensor]:
    """Value and gradient at the log-probabilities, from the rewards on."""
    loss = method.add_terms(batch.experience(method), batch.measured(batch.logps)).loss
    return loss.detach(), torch.autograd.grad(loss, batch.logps)[0]


def line_of(method: PolicyGradientModule) -> PolicyLoss:
    """Its gate, level and aggregation."""
    line = method.terms[0]
    assert isinstance(line, PolicyLoss)
    return line


def ratio_of(line: PolicyLoss, seen: Experience, logps: Tensor) -> Tensor:
    return importance_ratio(logps, seen.old.logps, seen.sampled, lambda values, _: line.level(values, seen))


def theirs(trainer: Any, batch: Batch, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same of TRL, and its advantages."""
    stand_in = batch.trainer(**settings)
    if trainer.__name__ == "RLOOTrainer":
        generated = stand_in._generate([])
        stand_in._generate = lambda prompts: (generated[0], generated[1], generated[3])
    inputs = trainer._generate_and_score_completions(stand_in, [{"prompt": "w5 w5"}] * len(batch.mask))
    loss = trainer._compute_loss(stand_in, None, inputs)
    return loss.detach(), torch.autograd.grad(loss, batch.logps)[0], inputs["advantages"]


def equal(found: Tensor, truth: Tensor) -> None:
    """To seven digits: the aggregation's weights are float32."""
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-9)


SAMPLER = Sampler(max_new_tokens=LONGEST)
METHODS: dict[str, tuple[PolicyGradientModule, dict[str, Any]]] = {
    "GRPO": (GRPO(num_generations=SIZE), {"beta": 0.04}),
    "GRPO, batch": (GRPO(num_generations=SIZE, scale_rewards="batch", kl=NO_KL), {"scale_rewards": "batch"}),
    "GRPO, none": (GRPO(num_generations=SIZE, scale_rewards="none", kl=NO_KL), {"scale_rewards": "none"}),
    "Dr. GRPO": (DrGRPO(num_generations=SIZE, sampler=SAMPLER), {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "DAPO": (DAPO(num_generations=SIZE), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "CISPO": (CISPO(num_generations=SIZE), {"loss_type": "cispo", "epsilon_high": 5.0}),
    "CISPO, 1.3": (CISPO(num_generations=SIZE, high=1.3), {"loss_type": "cispo", "epsilon_high": 1.3}),
    "SAPO": (SAPO(num_generations=SIZE), {"loss_type": "sapo"}),
    "SAPO, 3 and 4": (
        SAPO(num_generations=SIZE, tau_pos=3.0, tau_neg=4.0),
        {"loss_type": "sapo", "sapo_temperature_pos": 3.0, "sapo_temperature_neg": 4.0},
    ),
    "GSPO": (
        GSPO(num_generations=SIZE),
        {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    ),
    "GSPO, 0.2": (
        GSPO(num_generations=SIZE, epsilon_low=0.1, epsilon_high=0.2),
        {"importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.2},
    ),
}
every_method = pytest.mark.parametrize("name", METHODS)


@every_method
@pytest.mark.parametrize("abstains", [False, True])
def test_advantages(trl: Any, name: str, abstains: bool) -> None:
    """From the same rewards, NaN where a reward abstains."""
    method, settings = METHODS[name]
    batch = Batch(abstains=abstains)
    _, _, truth = theirs(trl.grpo, batch, **settings)
    found = batch.experience(method).advantages
    equal(found * batch.mask, truth.unsqueeze(1) * batch.mask)
    assert bool((truth == 0).any()) == abstains


@every_method
@pytest.mark.parametrize("on_policy", [False, True])
def test_gradients(trl: Any, name: str, on_policy: bool) -> None:
    """From rewards to the gradient at each token's log-probability, KL included; off-policy, clips are at work."""
    method, settings = METHODS[name]
    batch = Batch(on_policy)
    _, truth, _ = theirs(trl.grpo, batch, **settings)
    _, found = ours(method, batch)
    equal(found, truth)
    assert found[batch.mask].abs().median() > 1e-3 or name == "GSPO"
    experience = batch.experience(method)
    line = line_of(method)
    ratio = ratio_of(line, experience, batch.logps)
    gated = (line.gate(ratio, experience) != ratio)[batch.mask].double().mean()
    assert gated == 0 if on_policy or name == "CISPO" else gated > 0.1


@pytest.mark.parametrize("name", [name for name, (_, settings) in METHODS.items() if "beta" not in settings])
def test_values(trl: Any, name: str) -> None:
    """CISPO's is the same expression. Of the others TRL returns the surrogate, and we Σ w c A log π: by design."""
    method, settings = METHODS[name]
    batch = Batch()
    found, _ = ours(method, batch)
    truth, _, advantages = theirs(trl.grpo, batch, **settings)
    surplus, logps = advantages.unsqueeze(1).expand_as(batch.logps), batch.logps.detach()
    line, seen = line_of(method), replace(batch.experience(method), advantages=surplus)
    weights = line.aggregate(batch.mask, Normalizers(float(batch.mask.sum()), len(batch.mask)))
    ratio = ratio_of(line, seen, logps)
    equal(found, -(weights * line.gate(ratio, seen) * surplus * logps).sum())
    if isinstance(method, CISPO):
        equal(found, truth)
        return
    low, high = 1 - settings.get("epsilon_low", 0.2), 1 + settings.get("epsilon_high", 0.2)
    surrogate = torch.minimum(ratio * surplus, ratio.clamp(low, high) * surplus)
    if isinstance(method, SAPO):
        up, down = settings.get("sapo_temperature_pos", 1.0), settings.get("sapo_temperature_neg", 1.05)
        tau = torch.full_like(surplus, down).masked_fill(surplus > 0, up)
        surrogate = 4 / tau * torch.sigmoid(tau * (ratio - 1)) * surplus
    equal(truth, -(weights * surrogate).sum())
    assert (found - truth).abs() > 1e-2


def test_dual_clip_is_trl_s_delta(trl: Any) -> None:
    """Its upper bound of a ratio with a negative advantage; there are such ratios."""
    dual = PolicyGradientModule(
        advantage=group_standardised,
        level=token_level,
        gate=by_advantage(clipped, low=0.8, high=1.2, dual=1.5),
        aggregate=sequence_mean,
        clips=True,
        num_generations=SIZE,
    )
    batch = Batch()
    _, truth, advantages = theirs(trl.grpo, batch, delta=1.5)
    equal(ours(dual, batch)[1], truth)
    beyond = (batch.logps - batch.old > math.log(1.5)) & (advantages < 0).unsqueeze(1) & batch.mask
    assert beyond.any()
    assert (truth[beyond] == 0).all()


# ---- the KL ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("on_policy", [False, True])
def test_k3_in_the_loss(trl: Any, loss_type: str, on_policy: bool) -> None:
    """Value and gradient, without TRL's correction: all rewards are the same, so that there is nothing but the KL."""
    kl = KL(0.7, "k3", "loss")
    methods: dict[str, PolicyGradientModule] = {
        "grpo": GRPO(num_generations=SIZE, kl=kl),
        "dapo": DAPO(num_generations=SIZE, kl=kl),
        "dr_grpo": DrGRPO(num_generations=SIZE, kl=kl, sampler=SAMPLER),
    }
    batch = Batch(on_policy, same=True)
    truth = theirs(trl.grpo, batch, beta=0.7, loss_type=loss_type)
    found = ours(methods[loss_type], batch)
    equal(found[0], truth[0])
    equal(found[1], truth[1])
    assert found[1].norm() > 0.01


@pytest.mark.parametrize("on_policy", [False, True])
def test_trl_s_corrected_k3_is_another_kl(trl: Any, on_policy: bool) -> None:
    """Its default multiplies k3 by the ratio. On policy that has the value of k3 and the gradient of our k2.

    Off policy the gradient is that of k2 times the ratio; ours has no ratio.
    """
    batch = Batch(on_policy, same=True)
    value, corrected, _ = theirs(trl.grpo, batch, beta=0.7, use_bias_correction_kl=True)
    k3_value, k3 = ours(GRPO(num_generations=SIZE, kl=KL(0.7, "k3", "loss")), batch)
    _, k2 = ours(GRPO(num_generations=SIZE, kl=KL(0.7, "k2", "loss")), batch)
    equal(corrected, (batch.logps - batch.old).exp().detach() * k2)
    assert (corrected - k3).norm() > 0.1 * k3.norm()
    if on_policy:
        equal(corrected, k2)
        equal(value, k3_value)
    else:
        assert (corrected - k2).norm() > 0.1 * k2.norm()
        assert (value - k3_value).abs() > 1e-3


# ---- RLOO -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("abstains", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rloo(trl: Any, beta: float, abstains: bool) -> None:
    """Advantages, with k1 of the whole completion in the reward, and the gradient of the first step on a rollout.

    TRL returns −mean(A), whose gradient comes from a ratio of 1; ours is −mean(A log π) itself.
    """
    batch = Batch(on_policy=True, abstains=abstains)
    method = RLOO(num_generations=SIZE, kl=KL(beta, credit="sequence"))
    value, truth, advantages = theirs(trl.rloo, batch, beta=beta)
    surplus = batch.experience(method).advantages
    equal(surplus * batch.mask, advantages.unsqueeze(1) * batch.mask)
    found_value, found = ours(method, batch)
    equal(found, truth)
    equal(value, -advantages.mean())
    equal(found_value, -(advantages * (batch.logps.detach() * batch.mask).sum(-1)).mean())
    assert found[batch.mask].abs().median() > 1e-3
    assert (advantages == 0).sum() == (2 if abstains else 0)


def test_rloo_off_policy(trl: Any) -> None:
    """TRL then multiplies by the completion's ratio, and clips it; ours has no ratio."""
    batch = Batch()
    method = RLOO(num_generations=SIZE, kl=NO_KL)
    _, truth, _ = theirs(trl.rloo, batch, epsilon_low=1.0, epsilon_high=1e3)
    ratio = ((batch.logps - batch.old) * batch.mask).sum(-1, keepdim=True).exp().detach()
    _, found = ours(method, batch)
    equal(truth, ratio * found)
    _, cut, _ = theirs(trl.rloo, batch)
    lost = (cut == 0) & batch.mask
    assert 0 < lost.sum() < batch.mask.sum()
    assert (found[lost] != 0).all()
    equal(cut[~lost], truth[~lost])


# ---- pairs ----------------------------------------------------------------------------------------------------------


class Pairs:
    """Four pairs of completions after a prompt of one token; the first half is preferred to the second."""

    def __init__(self, rows: int = 8) -> None:
        generator = torch.Generator().manual_seed(4)
        logps, gap = torch.randn(2, rows, LENGTH, dtype=torch.float64, generator=generator)
        lengths = torch.randint(1, LENGTH + 1, (rows, 1), generator=generator)
        self.mask = torch.arange(LENGTH) < lengths
        self.logps = (-logps.abs()).requires_grad_()
        self.ref = -logps.abs() + gap

    def ours(self, method: DPO | IPO) -> tuple[Tensor, Tensor]:
        ratio = (self.logps - self.ref).masked_fill(~self.mask, 0)
        zero = torch.zeros_like(ratio)
        stats = TokenStats(zero, ratio, zero, zero, zero)
        pairs = len(ratio) // 2
        chosen = stats.map(lambda x: x[:pairs]), self.mask[:pairs]
        rejected = stats.map(lambda x: x[pairs:]), self.mask[pairs:]
        loss = method.pair_loss(chosen, rejected).mean()
        return loss.detach(), torch.autograd.grad(loss, self.logps)[0]

    def theirs(self, trainer: Any, loss_type: str, beta: float, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        def model(**_: Any) -> Any:  # its log-probabilities are 0 outside of the completion
            names = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
            others = {name: torch.zeros_like(self.logps, dtype=torch.bool) for name in names}
            return SimpleNamespace(log_probs=self.logps.masked_fill(~self.mask, 0), **others)

        stand_in = SimpleNamespace(
            model=SimpleNamespace(training=True),
            accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
            aux_loss_enabled=False,
            ld_alpha=None,
            precompute_ref_logps=True,
            f_divergence_type="reverse_kl",
            loss_types=[loss_type],
            loss_weights=[1.0],
            beta=beta,
            label_smoothing=label_smoothing,
            use_weighting=False,
            _metrics={"train": defaultdict(list)},
            _total_train_tokens=0,
            _tp_size=1,
        )
        ids = torch.full((len(self.mask), 1 + LENGTH), 4)
        ref_chosen, ref_rejected = (self.ref * self.mask).sum(-1).chunk(2)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "completion_mask": torch.nn.functional.pad(self.mask.long(), (1, 0)),
            "ref_chosen_logps": ref_chosen,
            "ref_rejected_logps": ref_rejected,
        }
        loss = trainer._compute_loss(stand_in, model, inputs, return_outputs=False)
        return loss.detach(), torch.autograd.grad(loss, self.logps)[0]


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_dpo_and_ipo(trl: Any, beta: float) -> None:
    """Value and gradient; IPO with TRL's mean over the tokens."""
    pairs = Pairs()
    methods: list[tuple[DPO | IPO, str]] = [(DPO(beta=beta), "sigmoid"), (IPO(beta=beta), "ipo")]
    for method, loss_type in methods:
        for found, truth in zip(pairs.ours(method), pairs.theirs(trl.dpo, loss_type, beta), strict=True):
            equal(found, truth)
            assert truth.abs().max() > 1e-3


def test_label_smoothing_is_the_conservative_one(trl: Any) -> None:
    """TRL has it in `aot` alone, which of a single pair is DPO; its `robust` subtracts the other term, and rescales."""
    pair, method = Pairs(rows=2), DPO(beta=0.4, label_smoothing=0.1)
    for found, truth in zip(pair.ours(method), pair.theirs(trl.dpo, "aot", 0.4, 0.1), strict=True):
        equal(found, truth)
    flipped = Pairs(rows=2)
    robust, _ = flipped.theirs(trl.dpo, "robust", 0.4, 0.1)
    margin = 0.4 * ((flipped.logps - flipped.ref).detach() * flipped.mask).sum(-1)
    up, down = (torch.nn.functional.logsigmoid(sign * (margin[0] - margin[1])) for sign in (1, -1))
    equal(robust, (-0.9 * up + 0.1 * down) / 0.8)
    assert (robust - pair.ours(method)[0]).abs() > 1e-3
