"""The weight of advantages by entropy."""

import torch

from grade_lightning.functional.entropy_balance import entropy_weight


def test_the_weight_is_a_line_that_stops_at_zero() -> None:
    z = torch.tensor([[-6.0, -5.0, -1.0, 0.0, 2.0]], dtype=torch.float64)
    truth = torch.tensor([[0.0, 0.0, 0.8, 1.0, 1.4]], dtype=torch.float64)
    torch.testing.assert_close(entropy_weight(z, 0.2), truth, rtol=0, atol=1e-15)
    assert torch.equal(entropy_weight(z, 0.0), torch.ones_like(z))
