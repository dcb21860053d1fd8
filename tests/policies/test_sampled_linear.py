"""Linear layers whose weight gradient is of some rows, in a policy."""

import pytest
import torch
from torch import nn

from grade_lightning.errors import InputError
from grade_lightning.methods import GradeSTE
from grade_lightning.policies import LoRA, Policy, RowSampling
from grade_lightning.policies.sampled_linear import SampledLinear
from grade_lightning.rollouts import Sampler
from tests.conftest import make_model, make_tokenizer
from tests.methods.toy_task import Toy, batches, fit


def gradients(layer: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    inputs = inputs.clone().requires_grad_()
    (layer(inputs) * torch.linspace(-1, 1, 3, dtype=inputs.dtype)).square().sum().backward()
    found = [inputs.grad, *(p.grad for p in (layer.bias, layer.weight))]
    for p in layer.parameters():
        p.grad = None
    return [x for x in found if x is not None]


def test_all_but_the_weight_gradient_is_exact_and_that_is_right_on_average() -> None:
    torch.manual_seed(0)
    plain, inputs = nn.Linear(4, 3).double(), torch.randn(2, 20, 4, dtype=torch.float64) ** 3
    sampled, whole = SampledLinear(plain, 0.3), SampledLinear(plain, 1.0)
    assert torch.equal(sampled(inputs), plain(inputs))
    truth = gradients(plain, inputs)
    for found, expected in zip(gradients(whole, inputs), truth, strict=True):
        torch.testing.assert_close(found, expected)
    draws = [gradients(sampled, inputs) for _ in range(300)]
    for found, expected in zip(draws[0][:2], truth[:2], strict=True):
        torch.testing.assert_close(found, expected)
    weight = torch.stack([draw[2] for draw in draws])
    assert not torch.allclose(weight[0], truth[2])
    assert ((weight.mean(0) - truth[2]).abs() <= 5 * weight.std(0) / 300**0.5).all()


def test_it_keeps_a_part_of_its_input_for_the_backward_pass() -> None:
    layer, kept = SampledLinear(nn.Linear(64, 3), 0.25), list[torch.Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        layer(torch.randn(200, 64))
    assert sorted(x.numel() for x in kept) == [50, 3 * 64, 50 * 64]
    with torch.no_grad():
        assert torch.equal(layer(torch.ones(1, 64)), nn.functional.linear(torch.ones(1, 64), layer.weight, layer.bias))


@pytest.mark.parametrize("lora", [None, LoRA(r=4, dropout=0.0)], ids=["full", "lora"])
def test_a_policy_trains_with_it_under_the_same_names(lora: LoRA | None) -> None:
    """Of LoRA it is the adapters' layers: those of the base are not trained."""
    settings = RowSampling(0.2)
    plain = Policy.from_model(make_model("llama"), make_tokenizer(), lora)
    policy = Policy.from_model(make_model("llama"), make_tokenizer(), lora, row_sampling=settings)
    assert plain.state_dict().keys() == policy.state_dict().keys()
    layers = [name for name, layer in policy.model.named_modules() if isinstance(layer, SampledLinear)]
    assert len(layers) == 2 * 3 * (1 if lora is None else 2)
    module = GradeSTE(policy, Toy(), sampler=Sampler(max_new_tokens=4))
    run = fit(module, 2, batches(2, 2))
    assert not run.without_gradient[1]
    assert all(torch.tensor(step["train/loss"]).isfinite() for step in run.steps)


def test_layers_that_are_not_there_are_named() -> None:
    with pytest.raises(InputError, match=r"^--model.policy.row_sampling.layers \['c_attn'\]: .*there are [^\n]*q_proj"):
        Policy.from_model(make_model("llama"), make_tokenizer(), row_sampling=RowSampling(0.5, ("c_attn",)))


@pytest.mark.parametrize("ratio", [0.0, 1.1])
def test_a_ratio_is_a_share(ratio: float) -> None:
    with pytest.raises(InputError, match=rf"^row_sampling.ratio = {ratio}: must be"):
        RowSampling(ratio)
