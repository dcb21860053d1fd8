"""The model that learns to ask a calculator: every text is tokens that it has, cut where the calculator speaks."""

import torch

from benchmarks.calculator import tokenizer, untrained
from grade_lightning.data import generate_products


def test_every_text_is_made_of_tokens_and_comes_back() -> None:
    """In the parts, too, in which an episode is read: a tool's answer is encoded by itself."""
    words = tokenizer()
    for row in generate_products(100, seed=7, calls=0.5):
        text = row["prompt"] + row["completion"]
        ids = words(text)["input_ids"]
        assert words.unk_token_id not in ids
        assert words.decode(ids) == text
        for end in ("</calc>", "\n", "?"):
            before, found, after = text.partition(end)
            if found:
                assert words(before + found)["input_ids"] + words(after)["input_ids"] == ids


def test_the_weights_are_always_the_same_ones() -> None:
    words = tokenizer()
    one, two = (untrained(words, width=16, layers=1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
