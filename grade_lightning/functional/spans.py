"""Two ways to cut the same texts into tokens: how much of a piece of the one comes from each token of the other."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def shares(tokens: Int[Tensor, "*b t 2"], pieces: Int[Tensor, "*b l 2"]) -> Float[Tensor, "*b t l"]:
    """The share of each piece's characters that comes from each token; of tokens that cover a piece it sums to 1.

    Tokens may share characters, as those that are bytes of the same character do: they share them equally.

    Args:
        tokens: first character of each token and the one after its last; the same number twice where it has none.
        pieces: the same of the pieces. One that no token covers is nobody's: 0.

    Example:
        >>> tokens = torch.tensor([[0, 4], [4, 6], [6, 6]])  # "play", "ed" and an end
        >>> pieces = torch.tensor([[0, 6], [6, 6]])  # "played" and an end
        >>> shares(tokens, pieces)
        tensor([[0.6667, 0.0000],
                [0.3333, 0.0000],
                [0.0000, 0.0000]])
    """
    begins = torch.maximum(tokens[..., :1], pieces[..., 0].unsqueeze(-2))
    ends = torch.minimum(tokens[..., 1:], pieces[..., 1].unsqueeze(-2))
    common = (ends - begins).clamp(min=0).float()
    return common / common.sum(-2, keepdim=True).clamp(min=1)
