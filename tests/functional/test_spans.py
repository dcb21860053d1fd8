"""Shares of characters, against counting them one by one."""

import torch

from grade_lightning.functional.spans import shares


def cut(generator: torch.Generator, length: int, parts: int) -> torch.Tensor:
    """A text of some characters in parts, of which some are empty."""
    inner = torch.randint(0, length + 1, (parts - 1,), generator=generator).sort().values
    ends = torch.cat([torch.tensor([0]), inner, torch.tensor([length])])
    return torch.stack([ends[:-1], ends[1:]], dim=-1)


def test_shares_are_those_of_counted_characters() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        tokens, pieces = cut(generator, 12, 5), cut(generator, 12, 4)
        found = shares(tokens, pieces)
        for j, (begin, end) in enumerate(pieces.tolist()):
            for t, (first, last) in enumerate(tokens.tolist()):
                common = len(set(range(begin, end)) & set(range(first, last)))
                assert abs(float(found[t, j]) - common / max(end - begin, 1)) < 1e-6
        assert torch.equal(found.sum(0) > 0.99, pieces[:, 1] > pieces[:, 0])


def test_tokens_of_the_same_characters_share_them() -> None:
    """Three bytes of one character; the piece has a further one."""
    tokens = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 2]])
    torch.testing.assert_close(shares(tokens, torch.tensor([[0, 1]])), torch.tensor([[1 / 3]] * 3 + [[0.0]]))
    both = shares(tokens, torch.tensor([[0, 2]])).squeeze(1)
    torch.testing.assert_close(both, torch.tensor([0.25] * 4))


def test_in_batches_and_of_what_nobody_wrote() -> None:
    tokens = torch.tensor([[[0, 2], [2, 2]], [[0, 1], [1, 2]]])
    pieces = torch.tensor([[[0, 2], [5, 6]], [[0, 0], [0, 2]]])
    truth = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.5], [0.0, 0.5]]])
    assert torch.equal(shares(tokens, pieces), truth)
