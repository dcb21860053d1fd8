"""Conversations × templates × tokenizers: what a rollout reads and writes has the tokens that training reads."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from grade_lightning.data.batches import CollatePairs, CollatePrompts, CollateTexts, encode
from grade_lightning.policies.endings import end_ids, end_of_turn
from tests.data.chats import KINDS, TEMPLATES, TURNS, WORDS, make_tokenizer, with_template
from tests.fuzz import cases, check_all

words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
turns = st.lists(st.tuples(words, words), max_size=2)
system = st.one_of(st.none(), words)
limits = st.sampled_from([3, 8, 4_000])


def conversation(template: str, first: str | None, before: list[tuple[str, str]], asked: str) -> list[dict[str, str]]:
    """A conversation that ends with a question."""
    messages = [{"role": "system", "content": first}] if first and template != "gemma" else []
    for question, answer in before:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": asked}]


def rows_of(batch: Any, name: str = "input_ids", mask: str = "attention_mask") -> list[list[int]]:
    return [ids[keep.bool()].tolist() for ids, keep in zip(batch[name], batch[mask], strict=True)]


def check_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """A plain text: one BOS where the tokenizer wants one, and one end."""
    own, plain = tokenizer(text)["input_ids"], tokenizer.encode(text, add_special_tokens=False)
    wants = own[:1] == [tokenizer.bos_token_id] or tokenizer.bos_token_id == tokenizer.eos_token_id
    front = [tokenizer.bos_token_id] if wants else []
    assert encode(tokenizer, text) == front + plain
    assert encode(tokenizer, tokenizer.bos_token + text) == (
        tokenizer.encode(tokenizer.bos_token + text, add_special_tokens=False)
    )
    for written in (text, text + tokenizer.eos_token, text + tokenizer.eos_token + "\n"):
        (ids,) = rows_of(CollateTexts(tokenizer, 4_000)([{"text": written}]))
        assert ids == front + plain + [tokenizer.eos_token_id]


def check_conversation(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, str]], answer: str, part: str
) -> None:
    """A conversation, and the answer to it."""
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    prompt = encode(tokenizer, messages)
    assert prompt == tokenizer.encode(text, add_special_tokens=False)  # as transformers has it
    assert encode(tokenizer, text) == prompt
    assert prompt.count(tokenizer.bos_token_id) == text.count(tokenizer.bos_token)
    ends, turn = end_ids(tokenizer), end_of_turn(tokenizer)
    mark = TURNS[template]
    assert turn == (None if mark is None else tokenizer.convert_tokens_to_ids(mark.replace("EOS", tokenizer.eos_token)))
    assert set(ends) == {tokenizer.eos_token_id} | ({turn} if turn is not None else set())
    last = tokenizer.eos_token_id if turn is None else turn

    pair = CollatePairs(tokenizer, 4_000)([{"prompt": messages, "chosen": answer, "rejected": part}])
    (completion,) = rows_of(pair, "chosen_ids", "chosen_mask")
    assert rows_of(pair) == [prompt]
    assert completion[-1] == last
    assert not set(completion[:-1]) & set(ends)
    both = tokenizer.encode(text + answer, add_special_tokens=False)
    assert tokenizer.decode(prompt + completion[:-1]) == tokenizer.decode(both)
    if both[: len(prompt)] == prompt:
        assert prompt + completion[:-1] == both
    assert rows_of(CollateTexts(tokenizer, 4_000)([{"prompt": messages, "completion": answer}])) == [
        prompt + completion
    ]

    said = [*messages, {"role": "assistant", "content": answer}]
    whole = str(tokenizer.apply_chat_template(said, tokenize=False))
    if turn is not None:
        (ids,) = rows_of(CollateTexts(tokenizer, 4_000)([{"text": whole}]))
        assert ids[-1] == last
        assert not set(ids[-2:-1]) & set(ends)
        if whole.startswith(text + answer) and both[: len(prompt)] == prompt:
            assert ids == prompt + completion

    begun = encode(tokenizer, [*messages, {"role": "assistant", "content": part}])
    assert begun[-1] not in ends
    assert str(tokenizer.decode(begun)).endswith(part)
    assert str(tokenizer.decode(begun)) in str(tokenizer.decode(tokenizer.encode(whole, add_special_tokens=False))) or (
        not answer.startswith(part)
    )


def check_cuts(tokenizer: PreTrainedTokenizerBase, text: str, answer: str, limit: int) -> None:
    """What is cut is said, once, and nothing else is."""
    row = {"prompt": text, "chosen": answer, "rejected": "no"}
    whole = CollatePairs(tokenizer, 4_000)([row])
    full = [*rows_of(whole, "chosen_ids", "chosen_mask"), *rows_of(whole, "rejected_ids", "rejected_mask")]
    full += rows_of(CollateTexts(tokenizer, 4_000)([{"text": text}]))
    full += rows_of(CollatePrompts(tokenizer, 200, 4_000)([{"text": text}]))
    cut = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pairs, texts = CollatePairs(tokenizer, limit), CollateTexts(tokenizer, limit)
        prompts = CollatePrompts(tokenizer, 200, limit)
        for _ in range(2):
            batch = pairs([row])
            cut = [*rows_of(batch, "chosen_ids", "chosen_mask"), *rows_of(batch, "rejected_ids", "rejected_mask")]
            cut += rows_of(texts([{"text": text}])) + rows_of(prompts([{"text": text}]))
    assert cut == [ids[:limit] for ids in full]
    columns = ("chosen", "rejected", "text", "prompt from text")
    expected = [name for name, ids in zip(columns, full, strict=True) if len(ids) > limit]
    assert [str(line.message).split("'")[1] for line in said] == expected


def check(tokenizer: PreTrainedTokenizerBase, template: str, drawn: Any) -> None:
    first, before, asked, answer, more, limit = drawn
    check_text(tokenizer, asked)
    check_cuts(tokenizer, asked, " " + answer, limit)
    if TEMPLATES[template] is not None:
        check_conversation(
            tokenizer, template, conversation(template, first, before, asked), f"{answer} {more}", answer
        )


chats = st.tuples(system, turns, words, words, words, limits)


@pytest.mark.slow
@cases(100, 600)
def test_rollouts_and_training_read_the_same_tokens(count: int) -> None:
    made: dict[Any, PreTrainedTokenizerBase] = {}

    def one(key: Any, drawn: Any) -> None:
        if key not in made:
            made[key] = make_tokenizer(*key)
        check(made[key], key[1], drawn)

    kinds = st.tuples(
        st.sampled_from(KINDS), st.sampled_from(list(TEMPLATES)), st.booleans(), st.booleans(), st.booleans()
    )
    check_all(count, one, kinds, chats)


@pytest.mark.parametrize("name", ["imdb-gpt2", "stories260K"])
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_tokenizers_of_real_models(name: str, template: str, shared: Path) -> None:
    tokenizer = with_template(AutoTokenizer.from_pretrained(shared / "models" / name), template)
    check_all(10, lambda drawn: check(tokenizer, template, drawn), chats)
