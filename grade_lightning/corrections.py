"""Corrections: weights of completions that an engine drew from a slightly different policy than the one in training."""

from typing import Literal

import torch
from torch import Tensor

from grade_lightning.errors import InputError, check_range
from grade_lightning.functional.corrections import WeightLevel, effective_share, truncated_importance
from grade_lightning.records import Rollout


class EngineCorrection:
    """Truncated importance weights: the training pass's probability of what was drawn over the engine's, up to a cap.

    Engines of other kernels, of lower precision or of older weights draw from a distribution that is not quite the
    policy's, so every gradient is biased. A policy gradient multiplies its advantages by the weight, GradeSTE the
    reward's gradient. With it the first batch's check of the engine is left out; `train/engine_kl` says how far off the
    engine is.

    Args:
        cap: the largest weight.
        level: `token`: of each token by itself; `prefix`: of the completion so far; `sequence`: of all of it.
    """

    def __init__(self, cap: float = 2.0, level: Literal["token", "prefix", "sequence"] = "token") -> None:
        check_range("[1, inf]", "correction", cap=cap)
        self.cap = cap
        self.level = level

    def __call__(
        self, logps: Tensor, rollout: Rollout, level: WeightLevel | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weights, (B, T), and what is logged.

        Args:
            logps: of the policy that drew, as the training pass sees it, (B, T).
            rollout: what was drawn.
            level: another one than that of the setting.

        Raises:
            InputError: the engine does not say with which probability it drew.
        """
        engine, mask = rollout.engine_logps, rollout.sampled
        if engine is None:
            raise InputError(
                "correction: the engine gives no log-probabilities; let it fill in Rollout.engine_logps, or leave out "
                "--model.correction"
            )
        weights = truncated_importance(logps, engine.to(logps), mask, self.cap, level or self.level)
        tokens = mask.sum()
        figures = {
            "engine_weight": (weights * mask).sum() / tokens,
            "engine_truncated": ((weights >= self.cap) & mask).sum() / tokens,
        }
        return weights, figures


@torch.no_grad()
def engine_figures(logps: Tensor, rollout: Rollout) -> dict[str, Tensor]:
    """How far the engine was from the policy as the training pass sees it; nothing if it does not say.

    Args:
        logps: of the policy that drew, (B, T).
        rollout: what was drawn.
    """
    engine, mask = rollout.engine_logps, rollout.sampled
    if engine is None:
        return {}
    difference = (engine - logps).masked_fill(~mask, 0)
    return {
        "engine_kl": difference.sum() / mask.sum(),
        "engine_gap": difference.abs().sum() / mask.sum(),
        "engine_ess": effective_share(logps, engine.to(logps), mask),
    }
