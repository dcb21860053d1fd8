r"""Sums, worked out one term at a time by someone who often forgets to carry.

A text is `47+8+5+0=55\n60`: the prompt has four terms, of which the last may be 0, and each line after it is the sum so
far, up to the last term that is not 0. The last line is the answer, which `NumericMatch` checks. Who forgets to carry
writes 45 for 47 + 8, and goes on from there. No later step makes that good, so a sum is as hard as it has carries.
"""

import random

_FIRST, _OTHERS, _TERMS = range(10, 73), range(1, 10), range(2, 5)
"""What a sum begins with, what is added to it, and how many terms are not 0: no sum has three digits."""

MOST = sum(len(_FIRST) * len(_OTHERS) ** (count - 1) for count in _TERMS)
"""Different sums."""


def generate_sums(n: int, seed: int, carries: float = 0.25) -> list[dict[str, str]]:
    r"""Write `n` different sums with their workings; two, three and four terms are as frequent while there are any.

    Args:
        n: how many, at most 51,597.
        seed: another one gives other sums.
        carries: the share of carries that the workings remember; with 1 all are right.

    Returns:
        Rows with `prompt`, `completion` (the workings) and `answer` (the right one, whatever the workings say).

    Raises:
        ValueError: there are not so many.

    Example:
        >>> generate_sums(1, seed=0, carries=0.0)
        [{'prompt': '58+7+1+0=', 'completion': '55\n56', 'answer': '66'}]
    """
    if n > MOST:
        raise ValueError(f"{n} different sums: there are {MOST}")
    left = {count: len(_FIRST) * len(_OTHERS) ** (count - 1) for count in _TERMS}
    rng, sums = random.Random(seed), dict[tuple[int, ...], None]()
    while len(sums) < n:
        count = rng.choice([count for count, unused in left.items() if unused])
        terms = rng.choice(_FIRST), *(rng.choice(_OTHERS) for _ in range(count - 1))
        left[count] -= terms not in sums
        sums[terms] = None
    order = list(sums)
    rng.shuffle(order)  # the short sums may have come to an end
    return [
        {
            "prompt": "+".join(map(str, [*terms, 0, 0][: _TERMS[-1]])) + "=",
            "completion": _workings(terms, carries, rng),
            "answer": str(sum(terms)),
        }
        for terms in order
    ]


def _workings(terms: tuple[int, ...], carries: float, rng: random.Random) -> str:
    """The sums so far, a line each."""
    total, lines = terms[0], []
    for term in terms[1:]:
        forgotten = total % 10 + term >= 10 and rng.random() >= carries
        total += term - 10 * forgotten
        lines.append(str(total))
    return "\n".join(lines)
