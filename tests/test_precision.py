"""Weights and matrix products may be in half precision; probabilities, KL, entropies, rewards and noise never are."""

import warnings
from dataclasses import fields
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grade_lightning.estimators import Gumbel
from grade_lightning.methods import GradeSTE, RewardModel, SupervisedFineTuning, ZerothOrder
from grade_lightning.modules import AlignmentModule
from grade_lightning.policies import Policy
from grade_lightning.records import TokenStats
from tests.conftest import make_model, make_tokenizer
from tests.methods.stages import labelled, text
from tests.methods.toy_task import (
    assert_same,
    assert_the_reward_rises,
    batches,
    every_method,
    fit,
    make,
    some_methods,
    trainer,
    weights,
)

WEIGHTS = {"32-true": torch.float32, "bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}
every_precision = pytest.mark.parametrize("precision", WEIGHTS)
half_precision = pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])


class Draws(TorchDispatchMode):
    """Keeps of what type the noise is, and the probabilities that tokens are drawn from."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name == "exponential_" or (name == "cumsum" and kwargs.get("dtype") == torch.float64):  # `drawing.draw`
            self.found.add(args[0].dtype)
        return func(*args, **kwargs)


def floats(owner: Any) -> dict[str, torch.dtype]:
    """The types of an object's floating-point tensors."""
    values = {field.name: getattr(owner, field.name) for field in fields(owner)}
    return {name: x.dtype for name, x in values.items() if isinstance(x, Tensor) and x.is_floating_point()}


@some_methods
@half_precision
def test_what_must_be_float32_is(
    method: type[AlignmentModule], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every rollout, its scores, every measurement and every step; and KL is 0 at the start."""
    settings: dict[str, Any] = {"estimator": Gumbel()} if method is GradeSTE else {}  # which has noise
    module = make(method, **settings)
    found: list[tuple[str, dict[str, torch.dtype]]] = []
    measured, loss = TokenStats.__init__, module.loss

    def measure(self: TokenStats, *args: Any, **kwargs: Any) -> None:
        measured(self, *args, **kwargs)
        found.append(("TokenStats", floats(self)))

    def watched(experience: Any) -> Any:
        step = loss(experience)
        rollout = getattr(experience, "relaxed", experience.rollout)
        found.append(("Rollout", {"logps": rollout.engine_logps.dtype}))
        found.extend((type(part).__name__, floats(part)) for part in (experience, experience.scores, step))
        found.append(("parts", {name: x.dtype for name, x in experience.scores.parts.items()}))
        found.append(("metrics", {name: x.dtype for name, x in step.metrics.items() if x.is_floating_point()}))
        return step

    monkeypatch.setattr(TokenStats, "__init__", measure)
    monkeypatch.setattr(module, "loss", watched)
    with Draws() as draws:
        run = fit(module, 2, precision=precision)
    assert {p.dtype for p in module.parameters()} == {WEIGHTS[precision]}
    assert {"Rollout", "Scores", "StepOutput", "metrics"} < {name for name, _ in found}
    assert method.__name__ == "Grade" or "TokenStats" in {name for name, _ in found}
    assert [(name, types) for name, types in found if not set(types.values()) <= {torch.float32, torch.float64}] == []
    assert draws.found == {torch.float32}
    # of its neighbours, to which ZerothOrder moves it, the policy is not the reference
    assert abs(run.steps[0]["train/kl"]) < (0.1 if method is ZerothOrder else 1e-3)
    assert all(torch.isfinite(torch.tensor(step["train/loss"])) for step in run.steps)


@every_method
def test_evaluation_is_in_float32(method: type[AlignmentModule]) -> None:
    module = make(method)
    trainer(precision="bf16-true").validate(module, batches(1), verbose=False)
    found = module.last_evaluation
    columns = [getattr(found, name) for name in ("reward", "kl", "entropy", "ref_nll")] + [*found.parts.values()]
    assert {column.dtype for column in columns} == {torch.float32}


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("precision", [*WEIGHTS, "16-mixed"])
def test_the_reward_rises(method: type[AlignmentModule], lora: bool, precision: str) -> None:
    if precision == "16-mixed" and not torch.cuda.is_available():
        pytest.skip("needs a GPU: on a processor Lightning makes it bf16-mixed")
    device = "cuda" if precision == "16-mixed" else "cpu"
    assert_the_reward_rises(method, lora, precision=precision, accelerator=device)


@pytest.mark.slow
@every_method
@every_precision
def test_a_resumed_run_is_the_run(method: type[AlignmentModule], precision: str, tmp_path: Any) -> None:
    whole, half, resumed = make(method), make(method), make(method)
    fit(whole, 2, max_epochs=2, precision=precision)
    first = trainer(precision=precision)
    first.fit(half, batches(2))
    first.save_checkpoint(tmp_path / "half.ckpt")
    again = trainer(max_epochs=2, precision=precision)
    again.fit(resumed, batches(2), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert [name for name, value in weights(half).items() if torch.equal(value, weights(whole)[name])] == []
    assert_same(weights(resumed), weights(whole))


@half_precision
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_the_stages_before_learn(stage: str, precision: str, tmp_path: Any) -> None:
    make_model("llama", scale=3.0).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    torch.manual_seed(0)
    module: LightningModule = SupervisedFineTuning(Policy(str(tmp_path)), lambda p: torch.optim.Adam(p, lr=1e-2))
    data = text
    if stage == "reward":
        module, data = RewardModel(str(tmp_path), optimizer=lambda p: torch.optim.Adam(p, lr=1e-2)), labelled
    run = trainer(precision=precision, log_every_n_steps=1)
    (before,) = run.validate(module, data(1), verbose=False)
    run.fit(module, data(30))
    assert run.callback_metrics["train/loss"].dtype == torch.float32
    (after,) = trainer(precision=precision).test(module, data(1), verbose=False)
    assert after["test/loss"] < before["val/loss"]


@pytest.mark.parametrize(("precision", "warned"), [("bf16-true", True), ("bf16-mixed", False)])
def test_weights_too_coarse_to_train_are_warned_of(precision: str, warned: bool) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(make(GradeSTE), 1, precision=precision)
    assert any("bf16-mixed" in str(warning.message) for warning in found) is warned


def test_half_precision_swallows_small_updates() -> None:
    """What the documentation says of bf16-true: of GPT-2-sized weights one in six moves at a learning rate of 1e-5."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter((0.02 * torch.randn(100_000)).bfloat16())
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    torch.optim.AdamW([weight], lr=1e-5).step()
    assert float((weight.detach() != before).float().mean()) == pytest.approx(0.16, abs=0.01)
