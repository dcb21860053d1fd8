"""DPO on pairs with reasoning traces and pairs without: the weights, the measured one, and what is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grade_lightning.errors import InputError
from grade_lightning.methods import DPO
from grade_lightning.modules.traced import _difference
from grade_lightning.policies import Policy
from tests.conftest import VOCABULARY, make_model, make_tokenizer
from tests.methods.toy_task import assert_same, trainer, weights
from tests.modules.toys import Watch, constant, distance, gradient, loader

pytestmark = pytest.mark.usefixtures("own_random_state")


def make(trace_weight: Any, pairs: Any = "data") -> Any:
    policy = Policy.from_model(make_model("gpt2", torch.float64, scale=4.0), make_tokenizer())
    module = DPO(
        trace_weight=trace_weight,
        policy=policy,
        pairs=pairs,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        lr_scheduler=constant,
    )
    module.configure_model()
    return module


def batch(traces: list[bool]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = {name: torch.randint(2, VOCABULARY, (len(traces), 5), generator=generator) for name in ("chosen", "rejected")}
    found: dict[str, Any] = {f"{name}_ids": value for name, value in ids.items()}
    found |= {f"{name}_mask": torch.ones_like(value) for name, value in ids.items()}
    prompts = torch.randint(2, VOCABULARY, (len(traces), 3), generator=generator)
    found |= {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    return found | {"columns": {"trace": traces}}


def rollout(traces: list[Any]) -> Any:
    return SimpleNamespace(columns={"trace": traces * 2})


def test_each_kind_counts_by_its_own_mean() -> None:
    """One pair with a trace weighs as much as three without, at a half."""
    losses = torch.tensor([4.0, 1.0, 2.0, 3.0])
    assert make(0.5).average(losses, rollout([True, False, False, False])).item() == pytest.approx(3.0)
    assert make(0.2).average(losses, rollout([True, False, False, False])).item() == pytest.approx(0.2 * 4 + 0.8 * 2)
    assert make(0.2).average(losses, rollout([False] * 4)).item() == pytest.approx(0.8 * 2.5)
    assert make(None).average(losses, rollout([True] * 4)).item() == pytest.approx(2.5)


def test_two_processes_have_the_average_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one of them has no pair of a kind; DDP takes the mean of their gradients."""
    losses, traces = torch.tensor([4.0, 1.0, 2.0, 3.0]), [True, True, False, True]
    whole, halves = make(0.3).average(losses, rollout(traces)), [slice(0, 2), slice(2, 4)]
    counts = torch.tensor([[sum(traces[half]), 2 - sum(traces[half])] for half in halves])

    class Two:
        def mean(self, values: torch.Tensor) -> torch.Tensor:
            assert values.tolist() in counts.tolist()
            return counts.float().mean(0)

    monkeypatch.setattr(DPO, "reduce", Two())
    found = [make(0.3).average(losses[half], rollout(traces[half])) for half in halves]
    torch.testing.assert_close(torch.stack(found).mean(), whole)


def test_the_gradient_is_the_mixture_of_both() -> None:
    traces = [True, False, True, False, False]
    traced, empty, mixed = (gradient(make(weight), batch(traces)) for weight in (1.0, 0.0, 0.3))
    mixture = {name: 0.3 * traced[name] + 0.7 * empty[name] for name in mixed}
    assert distance(mixed, mixture) < 1e-9
    assert distance(traced, empty) > 0.1


@pytest.mark.parametrize("kind", [[1, 1, 0, 1, 1, 1], [1, 0, 0, 0, 1, 1]], ids=["five", "three"])
def test_the_variance_of_a_mean_is_estimated_without_bias(kind: list[int]) -> None:
    """Of gradients with variance 1 in each of 200 directions: 200 / n, also where the halves are unequal."""
    chosen = torch.tensor(kind, dtype=torch.bool)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(200):
        given = 3 + torch.randn(6, 200, generator=generator)
        weights = torch.zeros(200, requires_grad=True)
        difference, factor = _difference(given @ weights, chosen)
        (slope,) = torch.autograd.grad(difference, weights)
        found.append(slope.square().sum() * factor)
    assert torch.stack(found).mean().item() == pytest.approx(200 / sum(kind), rel=0.05)


def test_the_weight_of_least_variance() -> None:
    """12.0 and 1.02, the reference's numbers; a half until both are known."""
    module = make("variance")
    assert module.alpha == 0.5
    module._noise = torch.tensor([[12.0, 1.0], [0.0, 0.0]])
    assert module.alpha == 0.5
    module._noise = torch.tensor([[24.0, 2.0], [1.02, 1.0]])
    assert module.alpha == pytest.approx(0.0783, abs=1e-4)


def test_variances_are_measured_and_resumed(tmp_path: Path) -> None:
    """In the first of ten steps; a run that is resumed has them, and ends with the same bits."""
    rows = loader(batch([True, False, True, False]))
    whole, watch = make("variance"), Watch()
    trainer(callbacks=[watch], log_every_n_steps=1, max_epochs=2).fit(whole, rows)
    assert watch.logged[0]["train/trace_weight"] == 0.5
    assert 0 < watch.logged[1]["train/trace_weight"] != 0.5
    assert whole._noise[:, 1].tolist() == [1, 1]

    half, first = make("variance"), trainer()
    first.fit(half, rows)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make("variance")
    trainer(max_epochs=2).fit(resumed, rows, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert_same(weights(resumed), weights(whole))
    torch.testing.assert_close(resumed._noise, whole._noise)


def test_what_cannot_work_is_named() -> None:
    with pytest.raises(InputError, match=r"trace_weight: weighs pairs by their column 'trace', .* set pairs to data"):
        make(0.5, "rollouts")
    with pytest.raises(InputError, match=r"no column 'trace' for trace_weight; add it"):
        make(0.5).average(torch.ones(2), SimpleNamespace(columns={}))
    with pytest.raises(InputError, match=r"column 'trace': None is neither true nor false"):
        make(0.5).average(torch.ones(2), rollout([True, None]))
