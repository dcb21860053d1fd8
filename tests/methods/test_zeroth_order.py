"""Training by values alone: its gradient, what the sides share, what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grade_lightning.errors import InputError
from grade_lightning.functional.zeroth_order import direction
from grade_lightning.methods import ZerothOrder
from grade_lightning.numerics import hash_seed
from grade_lightning.policies import Policy
from grade_lightning.records import Rollout
from grade_lightning.rewards import FunctionReward, Reward
from grade_lightning.rollouts import Sampler
from tests.conftest import make_model, make_prompts, make_tokenizer
from tests.methods.toy_task import Toy, assert_same, batches, fit, make, trainer, weights

pytestmark = pytest.mark.usefixtures("own_random_state")


class Bowl(Reward):
    """−|w|² of the weights themselves, whatever the completion."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.parameters_of_the_policy = (parameters,)

    def forward(self, rollout: Rollout) -> Tensor:
        norm = torch.stack([p.detach().square().sum() for p in self.parameters_of_the_policy[0]]).sum()
        return -norm.expand(len(rollout.ids))


def bowl(**kwargs: Any) -> tuple[ZerothOrder, list[nn.Parameter]]:
    policy = Policy.from_model(make_model("llama", torch.float64), make_tokenizer())
    trained = [p for p in policy.model.parameters() if p.dim() == 1][:1]  # sixteen scales
    policy.requires_grad_(False)
    with torch.no_grad():
        for p in trained:
            p.requires_grad_(True).fill_(0.1)
    settings: dict[str, Any] = {"sampler": Sampler(max_new_tokens=1), "beta": 0.0, "epsilon": 1e-3}
    module = ZerothOrder(policy, Bowl(trained), **settings | kwargs)
    module._started = False
    return module, trained


def test_the_gradient_is_the_slope_times_the_direction() -> None:
    """Of |w|² the slope along z is exactly 2 w·z."""
    module, trained = bowl(directions=2)
    module.draw_loss(next(iter(batches(1, 1)))).backward()
    directions = [[direction(p, hash_seed(seed, i)) for i, p in enumerate(trained)] for seed in module._seeds]
    slopes = [2 * sum((p.detach() * z).sum() for p, z in zip(trained, zs, strict=True)) for zs in directions]
    for i, p in enumerate(trained):
        expected = sum(d * zs[i] for d, zs in zip(slopes, directions, strict=True)) / 2
        torch.testing.assert_close(p.grad, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_a_bowl_is_gone_down() -> None:
    """Of n weights a step of 1 / 2 (n + 2) takes off 1 / (n + 2) of it on average."""
    module, trained = bowl()
    optimizer = torch.optim.SGD(trained, lr=0.5 / (16 + 2))
    batch = {name: value[:1] for name, value in make_prompts().items()}
    for _ in range(32):
        optimizer.zero_grad()
        module.draw_loss(batch).backward()
        optimizer.step()
    assert float(trained[0].detach().square().sum()) < 0.35 * 0.01 * 16


def test_nothing_is_backpropagated_and_any_reward_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def length(completions: list[str], **_: Any) -> list[float | None]:
        return [None, *(float(len(text)) for text in completions[1:])]

    module = made()
    module.reward = FunctionReward(length)
    monkeypatch.setattr(Tensor, "backward", None)
    before = weights(module)
    fit(module, 2, batches(2, 1))
    assert not any(torch.equal(value, before[name]) for name, value in weights(module).items())


def test_both_sides_have_the_same_noise() -> None:
    """So small an ε changes no token."""
    module = made(epsilon=1e-7, directions=2)
    found = module.collect(next(iter(batches())))
    plus, minus = found.rollout.completion_ids.view(2, 2, 12, -1).unbind(1)
    assert torch.equal(plus, minus)
    assert not torch.equal(plus[0], plus[1])  # another direction has other noise


def made(**kwargs: Any) -> ZerothOrder:
    module = make(ZerothOrder, **kwargs)
    assert isinstance(module, ZerothOrder)
    return module


@pytest.mark.slow
def test_a_resumed_run_is_the_run_with_a_clip_that_remembers(tmp_path: Any) -> None:
    settings: dict[str, Any] = {"clip": 0.5, "lr": 1e-3}
    whole = made(**settings)
    fit(whole, 2, batches(2, 1), max_epochs=2)
    half, first = made(**settings), trainer()
    first.fit(half, batches(2, 1))
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = made(**settings)
    trainer(max_epochs=2).fit(resumed, batches(2, 1), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert_same(weights(resumed), weights(whole))
    assert resumed._sizes.tolist() == whole._sizes.tolist()
    assert len(whole._sizes) == 4


def test_slopes_far_beyond_the_median_are_cut() -> None:
    gradients = []
    for clip in (None, 2.0):
        module, trained = bowl(clip=clip)
        module._sizes = torch.full((5,), 1e-3, dtype=torch.float64)
        torch.manual_seed(0)
        module.draw_loss(next(iter(batches(1, 1)))).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
    slope = float(module._sizes[-1])
    assert slope > 2e-3
    torch.testing.assert_close(gradients[1], gradients[0] * 2e-3 / slope)


def test_half_precision_without_copies_is_refused() -> None:
    policy = Policy.from_model(make_model("llama", torch.bfloat16), make_tokenizer())
    with pytest.raises(InputError, match=r"^--model.copies false: .*set it to true[^\n]*$"):
        ZerothOrder(policy, Toy(), copies=False).configure_model()
