"""Where the policy's tokens are in a text."""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from grade_lightning.errors import InputError
from grade_lightning.rewards.retokenize import retokenize
from grade_lightning.rewards.spans import check_fast, rollout_spans, token_spans
from tests.conftest import make_tokenizer
from tests.rewards.tongues import byte_tokenizer, rollout_of, word_pieces

POLICY = byte_tokenizer()
BYTES = POLICY.encode("日")


def said(ids: list[int]) -> tuple[str, list[str]]:
    text = str(POLICY.decode(ids, skip_special_tokens=True))
    return text, [text[begin:end] for begin, end in token_spans(POLICY, ids, text)]


def test_tokens_say_their_own_characters() -> None:
    ids = POLICY.encode("the cat played, didn't it?")
    text, parts = said(ids)
    assert "".join(parts) == text
    assert parts == [POLICY.decode([i]) for i in ids]
    assert max(map(len, parts)) > 2


def test_bytes_of_a_character_all_have_its_place() -> None:
    assert len(BYTES) == 3
    _, parts = said([*POLICY.encode("a"), *BYTES, *POLICY.encode("b")])
    assert parts == ["a", "日", "日", "日", "b"]


def test_special_tokens_have_no_place_even_between_bytes() -> None:
    eos = POLICY.eos_token_id
    _, parts = said([eos, BYTES[0], eos, *BYTES[1:], *POLICY.encode("b"), eos])
    assert parts == ["", "日", "", "日", "日", "b", ""]


def test_bytes_that_never_become_a_character() -> None:
    """In the middle they are with what comes after them, at the end with each other."""
    text, parts = said([BYTES[0], BYTES[0], *POLICY.encode("b"), BYTES[0], BYTES[1]])
    assert text == "\ufffd\ufffdb\ufffd"
    assert parts == ["\ufffd\ufffdb"] * 3 + ["\ufffd"] * 2


def test_words_with_the_space_before_them() -> None:
    tokenizer = make_tokenizer()
    assert token_spans(tokenizer, [4, 5, 0, 16], "w4 w5 w16") == [(0, 2), (2, 5), (5, 5), (5, 9)]


def test_characters_that_decoding_takes_away() -> None:
    """Spaces before punctuation."""
    inner = Tokenizer(models.WordLevel({"so": 0, ".": 1, "!": 2}, unk_token="so"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert token_spans(tokenizer, [0, 1, 0, 2], "so. so!") == [(0, 2), (2, 3), (3, 6), (6, 7)]


def test_of_a_rollout_with_padding_and_ends() -> None:
    rollout = rollout_of(POLICY, ("the cat", " played"), ("a", [*BYTES, POLICY.eos_token_id]))
    pieces = retokenize(rollout, word_pieces())
    spans = rollout_spans(rollout, pieces)
    assert pieces.texts == ["the cat played", "a日"]
    assert not spans[~rollout.mask.bool()].any()
    prompt = rollout.prompt_ids.shape[1]
    assert spans[1, prompt : prompt + 4].tolist() == [[1, 2]] * 3 + [[2, 3]]
    assert int(spans[0, prompt, 0]) == len("the cat")
    alone = rollout.select(torch.tensor([1]))
    assert torch.equal(rollout_spans(alone, retokenize(alone, word_pieces())), spans[1:, rollout.mask[1].bool()])


TALK = [{"role": "user", "content": "the cat"}]


def test_in_a_conversation_what_was_said_is_found() -> None:
    foreign = word_pieces()
    foreign.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}! {% endfor %}"
    rollout = rollout_of(POLICY, ("the cat", " played "), ended=True, prompt=[TALK])
    pieces = retokenize(rollout, foreign, chat=True)
    spans = rollout_spans(rollout, pieces)
    prompt = rollout.prompt_ids.shape[1]
    assert pieces.texts == ["user: the cat! assistant: played! "]
    assert not spans[:, :prompt].any()
    parts = [pieces.texts[0][begin:end] for begin, end in spans[0, prompt:].tolist()]
    assert "".join(parts) == "played"  # without what the template takes away, and without the end
    foreign.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(InputError, match="does not write what the assistant says as it is"):
        rollout_spans(rollout, retokenize(rollout, foreign, chat=True))


def test_a_conversation_without_a_template_is_what_was_said() -> None:
    """Neither the words of the policy's template nor the system's; the end is that of the completion."""
    talk = [{"role": "system", "content": "be brief"}, *TALK]
    rollout = rollout_of(POLICY, ("<system>be brief<user>the cat<assistant>", "played"), ended=True, prompt=[talk])
    other = byte_tokenizer(270)
    pieces = retokenize(rollout, other, chat=True)
    spans = rollout_spans(rollout, pieces)
    prompt = rollout.prompt_ids.shape[1]
    assert pieces.texts == ["the cat\nplayed"]
    assert pieces.ids[0].tolist() == [*other.encode("the cat\nplayed"), other.eos_token_id]
    assert not spans[:, :prompt].any()
    assert "".join(pieces.texts[0][begin:end] for begin, end in spans[0, prompt:].tolist()) == "played"
    assert spans[0, -1].tolist() == pieces.spans[0, -1].tolist() == [14, 15]


def test_a_slow_tokenizer_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda self: False))
    with pytest.raises(InputError, match=r"policy: its tokenizer .* tokenizer.json") as caught:
        check_fast(POLICY, "policy")
    assert "\n" not in str(caught.value)
