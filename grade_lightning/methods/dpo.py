"""Direct preference optimisation."""

from functools import partial
from typing import Any, Literal

from grade_lightning.errors import check_range
from grade_lightning.functional import preferences
from grade_lightning.modules import TracedModule
from grade_lightning.modules.preference import of_sums


class DPO(TracedModule):
    """Learns from pairs: raises the log-odds of the chosen completion over the rejected one, against a reference.

    Args:
        label_smoothing: the probability that a preference is the wrong way round.
        beta: how strongly the policy is held to its reference.
        trace_weight: α of pairs of the data whose column `trace` is true, against those of which it is false (BVPO);
            `variance`: the α with which the gradient varies least; None: there is no such column.
        **kwargs: those of :class:`~grade_lightning.modules.PreferenceModule`.

    References:
        | Direct Preference Optimization: Your Language Model is Secretly a Reward Model (Rafailov et al., 2023),
          https://arxiv.org/abs/2305.18290
        | pairs from rollouts: Direct Language Model Alignment from Online AI Feedback (Guo et al., 2024),
          https://arxiv.org/abs/2402.04792
        | `trace_weight`: From Noisy Traces to Stable Gradients: Bias-Variance Optimized Preference Optimization for
          Aligning Large Reasoning Models (Zhu et al., 2025), https://arxiv.org/abs/2510.05095
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        beta: float = 0.1,
        trace_weight: float | Literal["variance"] | None = None,
        **kwargs: Any,
    ) -> None:
        check_range("[0, 0.5]", label_smoothing=label_smoothing)
        loss = partial(preferences.dpo, beta=beta, label_smoothing=label_smoothing)
        super().__init__(trace_weight, pair_loss=of_sums(loss), beta=beta, **kwargs)
