"""Attention by sequence is `sdpa` under the mask of the row, and computes no more than each sequence's pairs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from grade_lightning.policies import PackedPass, Policy, by_sequence
from tests.conftest import make_model, make_tokenizer

LENGTHS = 5, 1, 9, 3


def mask_of(window: int) -> Tensor:
    sequence = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    place = torch.arange(len(sequence))
    ahead = place.unsqueeze(1) - place
    return ((sequence == sequence.unsqueeze(1)) & (ahead >= 0) & (ahead < window))[None, None]


@pytest.mark.parametrize("window", [100, 4])
@pytest.mark.parametrize("groups", [1, 2])
def test_it_is_attention_under_the_mask(groups: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, with keys that several heads share, and with a window."""
    torch.manual_seed(0)
    module = nn.Module()
    module.num_key_value_groups = groups  # type: ignore[assignment]
    sizes = (4, 4 // groups, 4 // groups)
    inputs = [torch.randn(1, heads, sum(LENGTHS), 8, dtype=torch.float64, requires_grad=True) for heads in sizes]
    query, key, value = inputs
    shapes: list[tuple[int, bool]] = []

    def watched(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        shapes.append((query.shape[2], mask is None))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(by_sequence, "sdpa_attention_forward", watched)
    weights = torch.randn(1, sum(LENGTHS), 4, 8, dtype=torch.float64)
    found, truth = (
        attend(module, query, key, value, mask_of(window), scaling=0.3)[0]
        for attend in (by_sequence._attend, sdpa_attention_forward)
    )
    assert shapes == [(length, length <= window) for length in LENGTHS]
    torch.testing.assert_close(found, truth)
    for own, other in zip(*(torch.autograd.grad((x * weights).sum(), inputs) for x in (found, truth)), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("case", ["several rows", "no mask", "a mask that is added"])
def test_whatever_else_there_is_goes_to_sdpa(case: str) -> None:
    torch.manual_seed(0)
    rows = 2 if case == "several rows" else 1
    query, key, value = torch.randn(3, rows, 2, sum(LENGTHS), 8)
    mask = mask_of(100).expand(rows, -1, -1, -1)
    given = {"no mask": None, "a mask that is added": torch.zeros(mask.shape).masked_fill(~mask, -1e9)}.get(case, mask)
    found, truth = (
        attend(nn.Module(), query, key, value, given)[0] for attend in (by_sequence._attend, sdpa_attention_forward)
    )
    assert torch.equal(found, truth)


def test_where_it_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy.from_model(make_model("llama"), make_tokenizer(), training_pass=PackedPass())
    inputs = policy.embed(torch.ones(1, 3, dtype=torch.long))

    def possible(tokens: int = 3, device: str = "cpu") -> bool:
        return by_sequence.can_attend_by_sequence(policy, inputs.to(device), tokens)

    assert possible()
    assert not possible(tokens=by_sequence.LONGEST + 1)
    assert not possible(device="meta")
    monkeypatch.setattr(policy, "torch_compile", True)
    assert not possible()
    monkeypatch.setattr(policy, "torch_compile", False)
    policy.checkpoint_activations()
    assert not possible()
    policy.eval()
    assert possible()
