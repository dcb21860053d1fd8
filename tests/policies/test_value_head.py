"""The value head."""

import pytest
import torch

from grade_lightning.policies import ValueHead


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_value_head_takes_the_hidden_states_of_any_policy(dtype: torch.dtype) -> None:
    """Zero at first; then its weights times the hidden state plus its bias, in its own precision."""
    torch.manual_seed(0)
    head, hidden = ValueHead(4), torch.randn(2, 3, 4).to(dtype)
    assert not head(hidden).any()
    torch.nn.init.normal_(head.weight)
    torch.nn.init.constant_(head.bias, 0.5)
    values = head(hidden)
    assert values.dtype == torch.float32
    assert values.shape == (2, 3)
    torch.testing.assert_close(values, (hidden.float() * head.weight[0]).sum(-1) + 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(hidden).dtype == torch.float32
    values.sum().backward()
    assert head.bias.grad == 6
