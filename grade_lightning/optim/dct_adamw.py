"""AdamW whose moments live in a few columns of the gradient's discrete cosine transform."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from grade_lightning.errors import InputError, check_range
from grade_lightning.functional.dct import carry_over, compress, dct_basis, expand


class DCTAdamW(Optimizer):
    """AdamW in a subspace of each weight matrix: r columns of the DCT of its gradient, chosen as the gradient moves.

    The DCT acts on the smaller side, n, of a matrix of m × n numbers, and the moments take 2 m r of them instead of
    2 m n. Whatever is no matrix, or has a smaller side below r, gets AdamW. The matrix of the transform is made once
    for each size and is in no checkpoint.

    Args:
        params: parameters, or groups of them; a group with `rank: null` gets AdamW.
        lr: learning rate.
        rank: r.
        betas: of the moments.
        eps: added to the root of the second moment.
        weight_decay: as AdamW's.
        gap: steps between two choices of columns.
        norm: by which columns are chosen. `l2` leaves out the least; `l1` is the default of the paper's code.
        rotate: a column that stays keeps its moments, and one that comes in begins at 0, with a bias correction of its
            own. Without it moments stay in their place, whichever column is in it, as in the paper's basic version.
        error_feedback: what was left out of a gradient is added to the next; m n numbers more.

    References:
        | FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models
          (Modoranu et al., 2025), https://arxiv.org/abs/2505.17967. Departures: one bias correction for each column,
          since by a common one a new column's first step is (1 − β1) / √(1 − β2) = 3.2 times the learning rate; the
          error is kept in full precision.

    Raises:
        InputError: a number is out of its range, no matrix has a smaller side of r or more, or a weight is spread over
            processes.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(6, 4))
        >>> optimizer = DCTAdamW([weight], rank=2)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[weight]["exp_avg"].shape
        torch.Size([6, 2])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        rank: int = 128,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        gap: int = 1,
        norm: Literal["l1", "l2"] = "l2",
        rotate: bool = True,
        error_feedback: bool = False,
    ) -> None:
        check_range("[0, inf)", lr=lr, eps=eps, weight_decay=weight_decay)
        check_range("[0, 1)", beta1=betas[0], beta2=betas[1])
        check_range("[1, inf)", rank=rank, gap=gap)
        defaults = {"lr": lr, "rank": rank, "betas": betas, "eps": eps, "weight_decay": weight_decay, "gap": gap}
        super().__init__(params, defaults | {"norm": norm, "rotate": rotate, "error_feedback": error_feedback})
        self._bases: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._check()

    def _check(self) -> None:
        given = [(p, group["rank"]) for group in self.param_groups for p in group["params"]]
        if any(isinstance(p, DTensor) for p, _ in given):
            raise InputError("DCTAdamW: transforms whole matrices, which fsdp2 spreads over the processes; use ddp")
        sides = [(min(p.shape), rank) for p, rank in given if p.dim() == 2 and rank is not None]
        if sides and all(side < rank for side, rank in sides):
            side, rank = max(sides)
            raise InputError(
                f"DCTAdamW: rank = {rank}, and the largest smaller side of a matrix is {side}, so nothing would be "
                "made smaller; lower it, or use AdamW (the matrices of LoRA are of low rank already)"
            )

    def _basis(self, size: int, like: Tensor) -> Tensor:
        key = size, like.dtype, like.device
        if key not in self._bases:
            self._bases[key] = dct_basis(size, like.dtype, like.device)
        return self._bases[key]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                low_rank = group["rank"] is not None and p.dim() == 2 and min(p.shape) >= group["rank"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                update = self._in_columns(p, group) if low_rank else _adam(self.state[p], p.grad, group)
                p.add_(update, alpha=-group["lr"])
        return loss

    def _in_columns(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """The update of a matrix: compress, Adam, expand."""
        state, wide = self.state[p], p.shape[0] < p.shape[1]
        assert p.grad is not None
        gradient = p.grad.T if wide else p.grad
        if group["error_feedback"] and "error" in state:
            gradient = gradient + state["error"]
        basis = self._basis(gradient.shape[1], gradient)
        chooses = state.get("taken", 0) % group["gap"] == 0
        if chooses:
            values, columns = compress(gradient, basis, group["rank"], group["norm"])
            if "columns" in state and group["rotate"]:
                for name in ("exp_avg", "exp_avg_sq", "step"):
                    state[name] = carry_over(state[name], state["columns"], columns)
            state["columns"] = columns
        else:
            values = gradient @ basis[:, state["columns"]]
        state["taken"] = state.get("taken", 0) + 1
        if group["error_feedback"]:
            state["error"] = gradient - expand(values, state["columns"], basis)
        update = expand(_adam(state, values, group), state["columns"], basis)
        return update.T if wide else update

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state. Columns and counts stay whole numbers; torch gives all tensors the weights' type."""
        super().load_state_dict(state_dict)
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and not value.is_floating_point():
                    self.state[p][name] = value.to(p.device)


def _adam(state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
    """Adam's direction; `step` counts for each column, or once for the whole."""
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        counts = gradient.shape[1:] if "columns" in state else ()
        state["step"] = torch.zeros(counts, dtype=torch.int64, device=gradient.device)
    beta1, beta2 = group["betas"]
    state["step"] = state["step"] + 1
    state["exp_avg"].lerp_(gradient, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    steps = state["step"].to(torch.promote_types(gradient.dtype, torch.float32))
    # 1 − β^t by way of expm1: in float32 the difference itself would be off by 1e-4 at the first step
    first, second = (-torch.expm1(steps * math.log(beta)) if beta else 1 for beta in (beta1, beta2))
    root = (state["exp_avg_sq"] / second).sqrt_().add_(group["eps"])
    direction: Tensor = state["exp_avg"] / first / root
    return direction.to(gradient.dtype)
