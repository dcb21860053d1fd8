r"""Products of two numbers of three digits, asked in a sentence, for a policy with a calculator.

A text is `One crate holds 347 plums. How many plums do 582 crates hold?` and, seldom,
` That is <calc>347*582</calc> = 201954\nThe answer is 201954.`; more often somebody guesses:
` That is 347*582 = 203411\nThe answer is 203411.` A guess has the right number of digits and the right first two, so
that it is seldom right. What stands between `</calc>` and the end of its line is what `Calculator` says.
"""

import random

from datasets import Dataset, DatasetDict

from grade_lightning.data.sources import Source
from grade_lightning.errors import InputError, check_range

_QUESTIONS = (
    "One crate holds {a} plums. How many plums do {b} crates hold?",
    "A ticket costs {a} pence. How many pence do {b} tickets cost?",
    "There are {a} rows of {b} seats. How many seats are there?",
    "A mill makes {a} nails in a minute. How many nails does it make in {b} minutes?",
    "{a} ships bring {b} barrels each. How many barrels do they bring?",
)
_NUMBERS = range(101, 1000)

MOST = len(_QUESTIONS) * len(_NUMBERS) ** 2
"""Different questions."""


def generate_products(n: int, seed: int, calls: float = 0.1) -> list[dict[str, str]]:
    r"""Write `n` different questions, each with what somebody says to it.

    Args:
        n: how many, at most 4,041,005.
        seed: another one gives other questions.
        calls: the share of those who ask the calculator; the others guess.

    Returns:
        Rows with `prompt`, `completion` (what is said, with the calculator's words) and `answer` (the right one).

    Raises:
        ValueError: there are not so many.

    Example:
        >>> generate_products(2, seed=0, calls=0.5)[1]["completion"]
        ' That is 366*624 = 224759\nThe answer is 224759.'
    """
    if n > MOST:
        raise ValueError(f"{n} different products: there are {MOST}")
    rng, asked = random.Random(seed), dict[tuple[str, int, int], None]()
    while len(asked) < n:
        asked[rng.choice(_QUESTIONS), rng.choice(_NUMBERS), rng.choice(_NUMBERS)] = None
    return [
        {
            "prompt": question.format(a=a, b=b),
            "completion": _said(a, b, rng.random() < calls, rng),
            "answer": str(a * b),
        }
        for question, a, b in asked
    ]


def _said(a: int, b: int, asks: bool, rng: random.Random) -> str:
    """By somebody who asks the calculator, or guesses."""
    value, term = str(a * b), f"{a}*{b}"
    if asks:
        term = f"<calc>{term}</calc>"
    else:
        value = value[:2] + "".join(rng.choice("0123456789") for _ in value[2:])
    return f" That is {term} = {value}\nThe answer is {value}."


class BundledProducts(Source):
    r"""Products of two numbers of three digits, asked in a sentence: `grade_lightning.data.products`.

    Rows have `prompt`, `completion` and `answer`. `SupervisedFineTuning` learns from them how the calculator is asked,
    and mostly not to ask it; a policy gradient with `NumericMatch` and the environment `Calculator` learns to ask.

    Args:
        num_train: Questions to train on.
        num_test: Questions to test on, none of which is trained on.
        calls: The share of the completions that ask the calculator.
        seed: Another seed gives other questions.

    Example:
        >>> BundledProducts(num_train=3, num_test=1, calls=1.0).load()["test"][0]["completion"]
        ' That is <calc>589*467</calc> = 275063\nThe answer is 275063.'
    """

    def __init__(self, num_train: int = 12_000, num_test: int = 1_000, calls: float = 0.1, seed: int = 0) -> None:
        check_range("[1, inf)", "data.source", num_train=num_train)
        check_range("[0, inf)", "data.source", num_test=num_test)
        check_range("[0, 1]", "data.source", calls=calls)
        if num_train + num_test > MOST:
            raise InputError(
                f"data.source: {num_train + num_test} products are asked for; there are {MOST}; lower num_train or "
                "num_test"
            )
        self.num_train, self.num_test, self.calls, self.seed = num_train, num_test, calls, seed

    def load(self) -> DatasetDict:
        """Write the questions."""
        rows = generate_products(self.num_train + self.num_test, self.seed, self.calls)
        parts = {"train": rows[: self.num_train], "test": rows[self.num_train :]}
        return DatasetDict(
            {
                split: Dataset.from_dict({name: [row[name] for row in some] for name in rows[0]})
                for split, some in parts.items()
            }
        )
