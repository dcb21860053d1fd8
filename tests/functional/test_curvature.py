"""The closed forms against an explicit head of four tokens and three dimensions."""

import torch

from grade_lightning.functional.curvature import objective_change, policy_change
from grade_lightning.functional.scores import score_fisher, score_norm


def test_closed_forms_against_an_explicit_head() -> None:
    """With g the gradient of A log π_a at W, u = g h the change of the logits: ⟨g, g⟩, (v·u)² − uᵀFu, (v·u)²."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    lr = 0.3
    for advantage in (1.3, -0.7, 0.0):
        h = torch.randn(3, dtype=torch.float64, generator=generator)
        for token in range(4):
            leaf = weight.clone().requires_grad_()
            logps = (leaf @ h).log_softmax(-1)
            (g,) = torch.autograd.grad(advantage * logps[token], leaf)
            logps = logps.detach()
            probs, u = logps.exp(), g @ h
            v = torch.eye(4, dtype=torch.float64)[token] - probs
            fisher = probs.diag() - probs.outer(probs)
            first, second = (v @ u).square(), u @ fisher @ u
            a, index = torch.tensor(advantage, dtype=torch.float64), torch.tensor(token)
            parts = score_norm(logps, index), score_fisher(logps, index), h @ h
            truth = lr * (g * g).sum() + 0.5 * lr**2 * advantage * (first - second)
            torch.testing.assert_close(objective_change(a, *parts, lr), truth, rtol=1e-12, atol=1e-15)
            truth = 0.5 * lr**2 * first
            torch.testing.assert_close(policy_change(a, parts[0], parts[2], lr), truth, rtol=1e-12, atol=1e-15)


def test_it_is_the_expansion_of_the_objective() -> None:
    """m_H is lr ⟨g, ∇J⟩ + ½ lr² gᵀ ∇²J g of J = A π_a / sg(π_a), the part of the sampled token: by autograd."""
    generator = torch.Generator().manual_seed(1)
    weight, h = torch.randn(4, 3, dtype=torch.float64, generator=generator), torch.tensor([0.3, -1.0, 0.5]).double()
    advantage, lr, token = torch.tensor(0.8, dtype=torch.float64), 0.2, torch.tensor(2)
    start = (weight @ h).log_softmax(-1)
    (g,) = torch.autograd.grad(advantage * ((leaf := weight.clone().requires_grad_()) @ h).log_softmax(-1)[token], leaf)

    def objective(step: torch.Tensor) -> torch.Tensor:
        return advantage * (((weight + step * g) @ h).log_softmax(-1)[token] - start[token]).exp()

    zero = torch.zeros((), dtype=torch.float64)
    slope = torch.func.grad(objective)(zero)
    bend = torch.func.grad(torch.func.grad(objective))(zero)
    parts = score_norm(start, token), score_fisher(start, token), h @ h
    torch.testing.assert_close(objective_change(advantage, *parts, lr), lr * slope + lr**2 * bend / 2)
