"""Numbers as people read them."""

import math

from .statistics import Estimate


def number(x: float) -> str:
    """Three digits that count, at most three decimals, but two digits of what is small; a dash for NaN.

    Example:
        >>> number(0.92817), number(12.53), number(-216.4), number(0.00042), number(float("nan"))
        ('0.928', '12.5', '−216', '0.00042', '–')
    """
    if not math.isfinite(x):
        return "–"
    text = f"{x:.1e}" if 0 < abs(x) < 1e-6 else f"{x:,.{_decimals(x)}f}"
    return text.replace("-", "−")


def _decimals(x: float) -> int:
    power = math.floor(math.log10(abs(x))) if x else -2
    return min(3, max(0, 2 - power)) if power >= -2 else 1 - power


def interval(e: Estimate) -> str:
    """A mean with its interval, in the digits that the interval leaves.

    Example:
        >>> interval(Estimate(0.92813, 0.0182, "prompts", 1, 9, 2)).split()
        ['0.928', '±', '0.018']
        >>> interval(Estimate(0.99974, 4.2e-5, "prompts", 1, 9, 0)).split()
        ['0.999740', '±', '0.000042']
    """
    if math.isnan(e.mean):
        return "–"
    if math.isnan(e.half_width):
        return number(e.mean)
    rounding = e.half_width <= 1e-12 * max(1.0, abs(e.mean))
    decimals = 3 if rounding else _decimals(e.half_width)
    return f"{e.mean:,.{decimals}f}\xa0±\xa0{0 if rounding else e.half_width:,.{decimals}f}".replace("-", "−")


def shown(e: Estimate | None) -> str:
    """The same for a cell of a table: with the number of values that are not there; a dash where there is no estimate.

    Example:
        >>> shown(Estimate(0.9281, 0.0182, "prompts", 1, 9, 2)).split()
        ['0.928', '±', '0.018', '(2', 'null)']
    """
    if e is None or math.isnan(e.mean):
        return "–"
    return interval(e) + (f" ({e.left_out} null)" if e.left_out and e.prompts > 1 else "")


def probability(p: float) -> str:
    """A p-value; a dash for NaN."""
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
