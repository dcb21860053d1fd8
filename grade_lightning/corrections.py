"""Corrections: weights of completions that an engine drew from a slightly different policy than the one in training."""

from typing import Literal

from torch import Tensor

from grade_lightning.errors import InputError, check_range
from grade_lightning.functional.corrections import truncated_importance
from grade_lightning.records import Experience


class EngineCorrection:
    """Truncated importance weights: the training pass's probability of what was drawn over the engine's, up to a cap.

    Engines of other kernels or of lower precision draw from a distribution that is not quite the policy's, so every
    gradient is biased. An advantage is multiplied by the weight. With it the first batch's check of the engine is left
    out; `train/engine_kl` says how far off the engine is.

    Args:
        cap: the largest weight.
        level: `token`: of each token by itself; `sequence`: of the whole completion.
    """

    def __init__(self, cap: float = 2.0, level: Literal["token", "sequence"] = "token") -> None:
        check_range("[1, inf]", "correction", cap=cap)
        self.cap = cap
        self.level = level

    def __call__(self, seen: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Weights, (B, T), and what is logged.

        Args:
            seen: completions with the statistics of the policy that drew them.

        Raises:
            InputError: the engine does not say with which probability it drew.
        """
        engine, mask = seen.rollout.engine_logps, seen.rollout.sampled
        if engine is None:
            raise InputError(
                "correction: the engine gives no log-probabilities; let it fill in Rollout.engine_logps, or leave out "
                "--model.correction"
            )
        weights = truncated_importance(seen.old.logps, engine.to(seen.old.logps), mask, self.cap, self.level)
        tokens = mask.sum()
        figures = {
            "engine_kl": ((engine - seen.old.logps) * mask).sum() / tokens,
            "engine_weight": (weights * mask).sum() / tokens,
        }
        return weights, figures
