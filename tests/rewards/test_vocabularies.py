"""What tokens of one vocabulary are in another's pieces."""

import torch

from grade_lightning.rewards.vocabularies import pieces_of_vocabulary, translated_table
from tests.conftest import VOCABULARY, make_tokenizer
from tests.rewards.making import words_in
from tests.rewards.tongues import byte_tokenizer, word_pieces


def test_tokens_are_read_as_they_are_read_in_texts() -> None:
    """With a space they begin a word, without one they continue it; case and space may be nothing to the reward."""
    policy, foreign = byte_tokenizer(), word_pieces()
    found = pieces_of_vocabulary(policy, len(policy) + 2, foreign)

    def of(token: str) -> list[str]:
        (number,) = policy.encode(token, add_special_tokens=False)
        return list(foreign.convert_ids_to_tokens(found[number]))

    assert of("a") == ["##a"]
    assert of(" play") == ["play"]
    assert of(" the") == ["the"]
    assert of("A") == ["##a"]
    assert of(" ") == of("\n") == []
    assert found[policy.eos_token_id] == found[policy.encode("日")[0]] == []  # no text, and no character
    assert found[-2:] == [[], []]  # logits without a token
    assert max(map(len, found)) > 1


def test_the_same_words_in_another_order() -> None:
    order = [0, 1, *range(VOCABULARY - 1, 1, -1)]
    found = pieces_of_vocabulary(make_tokenizer(), VOCABULARY, words_in(order))
    place = torch.tensor(order).argsort().tolist()
    assert found == [[], [], *([i] for i in place[2:])]


def test_the_table_is_the_mean_of_the_pieces() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    found = translated_table([[1, 1, 2], [], [5], []], table)
    own = torch.stack([(2 * table[1] + table[2]) / 3, table[5]])
    torch.testing.assert_close(found[[0, 2]], own)
    torch.testing.assert_close(found[[1, 3]], own.mean(0).expand(2, 4))


def test_in_half_precision_the_table_keeps_its_type() -> None:
    found = translated_table([[0, 1], []], torch.ones(2, 3, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.ones(2, 3, dtype=torch.bfloat16))
