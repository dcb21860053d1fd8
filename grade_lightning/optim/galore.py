"""GaLore of pytorch-optimizer, told which weights are matrices, and with a state that checkpoints can hold."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from grade_lightning.errors import InputError, check_range

_KEPT = "ortho_matrix", "last_svd_step"


class GaLore(Optimizer):
    """AdamW whose moments live in the leading singular vectors of each weight matrix's gradient.

    The algorithm is that of `pytorch_optimizer` (the extra `optimizers`), which projects in the groups that have a rank
    and keeps its projections as objects. Here matrices with a smaller side above the rank are such a group, and
    checkpoints hold tensors.

    Args:
        params: parameters.
        lr: learning rate.
        rank: r, singular vectors of the smaller side.
        gap: steps between two decompositions.
        scale: of the update that is projected back.
        betas: of the moments.
        eps: added to the root of the second moment.
        weight_decay: as AdamW's.

    References:
        | GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection (Zhao et al., 2024),
          https://arxiv.org/abs/2403.03507

    Raises:
        InputError: `pytorch-optimizer` is missing, a number is out of its range, or no matrix is wide enough.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        rank: int = 128,
        gap: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        try:
            import pytorch_optimizer
        except ModuleNotFoundError as error:
            if error.name != "pytorch_optimizer":
                raise
            raise InputError("GaLore needs pytorch-optimizer: pip install 'grade-lightning[optimizers]'") from error
        check_range("[1, inf)", rank=rank, gap=gap)
        check_range("(0, inf)", scale=scale)
        projection = {"rank": rank, "update_proj_gap": gap, "scale": scale, "projection_type": "std"}
        groups = matrices_apart(params, rank, projection)
        try:
            self._inner = pytorch_optimizer.GaLore(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        except ValueError as error:
            raise InputError(f"GaLore: {' '.join(str(error).split())}; check --model.optimizer") from error
        super().__init__(self._inner.param_groups, self._inner.defaults)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step."""
        self._inner.param_groups, self._inner.state = self.param_groups, self.state
        return self._inner.step(closure)

    def state_dict(self) -> dict[str, Any]:
        """The state, with the tensors of the projections."""
        whole = super().state_dict()
        return whole | {"state": {number: _plain(entries) for number, entries in whole["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector

        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for state in (self.state[p] for p in group["params"] if "projector" in self.state[p]):
                projector = GaLoreProjector(**{name: group[name] for name in ("rank", "update_proj_gap", "scale")})
                vars(projector).update(state["projector"])
                state["projector"] = projector


def matrices_apart(params: Iterable[Tensor], rank: int, projection: dict[str, Any]) -> list[dict[str, Any]]:
    """Two groups of parameters: matrices with a smaller side above the rank, with the options of a group; and the rest.

    Raises:
        InputError: there are matrices, and none is wide enough.

    Example:
        >>> from torch import ones
        >>> [len(group["params"]) for group in matrices_apart([ones(4, 6), ones(4), ones(9, 1)], 2, {"rank": 2})]
        [1, 2]
    """
    every = list(params)
    wide = [p for p in every if p.dim() == 2 and min(p.shape) > rank]
    matrices = [p for p in every if p.dim() == 2]
    if matrices and not wide:
        side = max(min(p.shape) for p in matrices)
        raise InputError(
            f"GaLore: rank = {rank}, and the largest smaller side of a matrix is {side}, "
            "so nothing would be made smaller; lower it, or use AdamW (the matrices of LoRA are of low rank already)"
        )
    rest = [p for p in every if p.dim() != 2 or min(p.shape) <= rank]
    return [group for group in ({"params": wide, **projection}, {"params": rest}) if group["params"]]


def _plain(entries: dict[str, Any]) -> dict[str, Any]:
    projector = entries.get("projector")
    return entries if projector is None else entries | {"projector": {name: vars(projector)[name] for name in _KEPT}}
