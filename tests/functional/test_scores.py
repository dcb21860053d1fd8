"""The score's closed forms against the vector itself."""

import torch

from grade_lightning.functional.scores import score_fisher, score_norm


def test_closed_forms_against_the_vector() -> None:
    """Of six distributions over five tokens, one of them with tokens that are never sampled."""
    logits = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[5, 3:] = -torch.inf
    logps, tokens = logits.log_softmax(-1), torch.tensor([0, 1, 2, 3, 4, 0])
    for row, token, norm, fisher in zip(
        logps, tokens, score_norm(logps, tokens), score_fisher(logps, tokens), strict=True
    ):
        probs = row.exp()
        v = torch.eye(5, dtype=torch.float64)[token] - probs
        torch.testing.assert_close(norm, v @ v, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(fisher, v @ (probs.diag() - probs.outer(probs)) @ v, rtol=1e-12, atol=1e-15)
