from typing import Any

import pytest
from transformers import GenerationConfig

from grade_lightning.policies.endings import end_ids, end_of_turn
from tests.data.chats import TURNS, make_tokenizer


@pytest.mark.parametrize("template", list(TURNS))
def test_end_of_turn_is_what_the_template_writes(template: str) -> None:
    tokenizer = make_tokenizer("bytes", template)
    mark = TURNS[template]
    expected = None if mark is None else mark.replace("EOS", "</s>")
    found = end_of_turn(tokenizer)
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m['content'] }} </s>{% endfor %}", "</s>"),  # Llama 2 puts a space between
        ("{% for m in messages %}{{ m['content'] }}.</s>{% endfor %}", None),
        ("{% for m in messages %}{{ m['content'] }}<end>{% endfor %}", None),  # several tokens
        ("{% for m in messages %}{{ m['role'] }}</s>{% endfor %}", None),  # without what is said
        ("{{ raise_exception('no') }}", None),
        ("{% for m in messages %}{{ m['content'] }}<|end|>\n{% endfor %}</s>", "<|end|>"),  # Phi-3: the first of both
    ],
)
def test_only_a_token_that_stands_there_ends_a_turn(template: str, expected: str | None) -> None:
    tokenizer: Any = make_tokenizer("bytes", "none")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = template
    found = end_of_turn(tokenizer)
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == expected


def test_a_new_template_is_seen() -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.chat_template = None
    assert end_of_turn(tokenizer) is None


@pytest.mark.parametrize(
    ("configured", "expected"), [(None, [1]), (5, [5, 1]), ([5, 1, 6], [5, 1, 6]), ([], [1]), (1, [1])]
)
def test_union_of_settings_tokenizer_and_template(configured: Any, expected: list[int]) -> None:
    settings = GenerationConfig(eos_token_id=configured)
    assert end_ids(make_tokenizer("bytes", "mistral"), settings) == expected
    chat = make_tokenizer("bytes", "chatml")
    assert end_ids(chat, settings) == [*expected, chat.convert_tokens_to_ids("<|im_end|>")]
    assert end_ids(chat) == [1, chat.convert_tokens_to_ids("<|im_end|>")]
