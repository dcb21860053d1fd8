"""Activations as one operation."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.activations import GELUTanh, NewGELUActivation

from grade_lightning.policies import Policy
from tests.conftest import make_model, make_tokenizer


def test_function_and_derivatives_are_the_same() -> None:
    values = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    old, new = NewGELUActivation()(values), GELUTanh()(values)
    torch.testing.assert_close(new, old)
    first = [torch.autograd.grad(y.sum(), values, create_graph=True)[0] for y in (new, old)]
    torch.testing.assert_close(*first)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), values)[0] for y in first))


def test_a_policy_has_them_and_is_written_as_it_was(tmp_path: Path) -> None:
    policy = Policy.from_model(make_model("gpt2"), make_tokenizer())
    kinds = [type(module) for module in policy.modules()]
    assert NewGELUActivation not in kinds
    assert kinds.count(GELUTanh) == 2 * policy.base.config.n_layer  # the reference has them, too
    policy.save_pretrained(tmp_path)
    written = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert written.config.activation_function == "gelu_new"
    ids = torch.arange(2, 14).reshape(2, 6)
    with torch.no_grad(), policy.evaluating():
        torch.testing.assert_close(written(ids).logits, policy.model(ids).logits, rtol=1e-4, atol=1e-5)
