"""Do private steps gain by clipping differences of gradients (DIFF2) instead of gradients? At equal noise multipliers.

    python benchmarks/diff2.py

Robust regression, d = 20, n = 1,000, 100 steps; each row's gradient is clipped to 1. DIFF2 restarts every 10 steps with
a clipped gradient and adds clipped differences in between, of rows at this iterate and the one before it; a difference
is clipped to C2 times the step's length, and its noise is in proportion to that. Printed is the distance to the truth.
"""

import torch
from torch import Tensor

ROWS, SIZE, STEPS, RESTART, BOUND, MULTIPLIER, SEEDS = 1000, 20, 100, 10, 1.0, 10.0, 10


def clipped(rows: Tensor, bound: float | Tensor) -> Tensor:
    """The mean of rows that are cut to a norm."""
    norms = rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return (rows * (bound / norms).clamp(max=1)).mean(0)


def run(seed: int, rate: float, slope: float | None) -> float:
    """Distance to the truth after all steps; `slope` is C2, None: ordinary private steps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    truth, inputs = normal(SIZE) / SIZE**0.5, normal(ROWS, SIZE)
    targets = inputs @ truth + 0.1 * normal(ROWS)

    def rows(x: Tensor) -> Tensor:
        residual = inputs @ x - targets
        return (residual / (1 + residual.square()).sqrt()).unsqueeze(1) * inputs  # pseudo-Huber

    x, before, estimate = torch.zeros(SIZE, dtype=torch.float64), None, torch.zeros(SIZE, dtype=torch.float64)
    for step in range(STEPS):
        if slope is None or before is None or step % RESTART == 0:
            bound: float | Tensor = BOUND
            estimate = clipped(rows(x), BOUND) + MULTIPLIER * BOUND / ROWS * normal(SIZE)
        else:
            bound = slope * (x - before).norm()
            estimate = estimate + clipped(rows(x) - rows(before), bound) + MULTIPLIER * bound / ROWS * normal(SIZE)
        before, x = x, x - rate * estimate
    return float((x - truth).norm())


def main() -> None:
    """A table: mean over the seeds, and its standard error."""
    for rate in (0.5, 0.1, 0.05):
        for slope in (None, 1.0, 5.0, 20.0):
            found = torch.tensor([run(seed, rate, slope) for seed in range(SEEDS)])
            name = "plain" if slope is None else f"DIFF2, C2 = {slope:g}"
            print(f"rate {rate:<5} {name:16} {found.mean():.3f} ± {found.std() / SEEDS**0.5:.3f}", flush=True)


if __name__ == "__main__":
    main()
