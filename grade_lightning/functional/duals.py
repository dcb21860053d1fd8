"""Dual ascent: what a unit of a bounded quantity costs, moved until the bound holds."""


def ascended(multiplier: float, excess: float, rate: float) -> float:
    """The multiplier of a bound after a step of projected gradient ascent on the dual; never below 0.

    Args:
        multiplier: λ as it is.
        excess: by how much the bound is exceeded; below 0 where there is room.
        rate: step size.

    Example:
        >>> ascended(0.5, excess=2.0, rate=0.1), ascended(0.5, excess=-20.0, rate=0.1)
        (0.7, 0.0)
    """
    return max(0.0, multiplier + rate * excess)


def scaled(multiplier: float, ratio: float, share: float = 1.0, most: float = 0.2) -> float:
    """The multiplier after a step in proportion to itself: dual ascent in its logarithm, which never reaches 0.

    Args:
        multiplier: λ as it is.
        ratio: of the quantity to its target.
        share: of a whole step.
        most: a whole step changes λ by at most this share of it.

    References:
        | Fine-Tuning Language Models from Human Preferences (Ziegler et al., 2019), https://arxiv.org/abs/1909.08593

    Example:
        >>> round(scaled(1.0, ratio=1.1), 6), scaled(1.0, ratio=5.0), scaled(1.0, ratio=0.0, share=0.5)
        (1.1, 1.2, 0.9)
    """
    return multiplier * (1 + min(max(ratio - 1, -most), most) * share)
