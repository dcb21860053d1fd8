"""Log-odds of answers against probabilities."""

import torch

from grade_lightning.functional.judgement import log_odds


def test_of_several_tokens_that_say_the_same() -> None:
    logits = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probs = logits.softmax(-1)
    yes, no = probs[:, 2] + probs[:, 5], probs[:, [0, 7, 8]].sum(-1)
    torch.testing.assert_close(log_odds(logits, [2, 5], [0, 7, 8]).sigmoid(), yes / (yes + no))
