"""Rows of tokens as a tensor."""

import pytest

from grade_lightning.errors import InputError
from grade_lightning.policies.padding import pad
from tests.data.chats import make_tokenizer


@pytest.mark.parametrize(("left", "expected"), [(False, [[5, 6], [7, 2]]), (True, [[5, 6], [2, 7]])])
def test_the_mask_comes_from_the_lengths(left: bool, expected: list[list[int]]) -> None:
    tokens, mask = pad([[5, 6], [7]], make_tokenizer("bytes", "none"), left)
    assert tokens.tolist() == expected
    assert mask.sum(-1).tolist() == [2, 1]


def test_a_tokenizer_with_nothing_to_pad_with() -> None:
    tokenizer = make_tokenizer("bytes", "none")
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"neither a pad_token nor an eos_token to pad with; set its pad_token"):
        pad([[5]], tokenizer)
