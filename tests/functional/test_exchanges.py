"""Exchanges of tokens against what they do."""

import torch

from grade_lightning.functional.exchanges import best_exchanges, exchange_gains, likely_tokens


def test_gains_are_those_of_a_linear_objective() -> None:
    generator = torch.Generator().manual_seed(0)
    table, weights = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(7, 4), (3, 4)])
    tokens = torch.tensor([2, 6, 0])

    def objective(prompt: torch.Tensor) -> float:
        return float((table[prompt] * weights).sum())

    gains = exchange_gains(weights, table, tokens)
    for place in range(3):
        for token in range(7):
            other = tokens.clone()
            other[place] = token
            assert abs(objective(other) - objective(tokens) - float(gains[place, token])) < 1e-12


def test_likely_tokens_are_of_those_allowed() -> None:
    logps = torch.tensor([[0.0, -1.0, -2.0, -3.0], [-3.0, -2.0, -1.0, 0.0]])
    allowed = torch.tensor([False, True, True, True])
    found = likely_tokens(logps, allowed, 2)
    assert found.tolist() == [[False, True, True, False], [False, False, True, True]]
    assert likely_tokens(logps, allowed, 100).tolist() == [allowed.tolist()] * 2


def test_the_best_exchanges_are_tried_and_no_others() -> None:
    gains = torch.tensor([[9.0, 1.0, -torch.inf], [5.0, 9.0, -1.0]])
    tokens = torch.tensor([0, 1])
    assert best_exchanges(gains, tokens, 2) == [[0, 0], [1, 1]]
    assert best_exchanges(gains, tokens, 9) == [[0, 0], [1, 1], [0, 2]]
    assert best_exchanges(gains, tokens, 9, lambda prompt: 1 not in prompt) == [[0, 0], [0, 2]]
