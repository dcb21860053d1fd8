"""What a chat template gets beside the messages."""

from typing import Any

import pytest

from grade_lightning.errors import InputError
from grade_lightning.policies.chat import as_text, chat_of
from tests.data.chats import make_tokenizer

ASK = {"role": "user", "content": "2+2?"}


@pytest.mark.parametrize(
    ("variables", "row", "expected"),
    [
        ({}, {}, "none 0 "),
        ({"mood": "bad"}, {}, "bad 0 "),
        ({"mood": "bad"}, {"chat_template_kwargs": {"mood": "good", "more": None}, "tools": None}, "good 0 "),
        ({}, {"tools": [{"type": "function"}]}, "none 1 "),
        ({}, {"tools": '[{"type": "function"}, {}]'}, "none 2 "),
    ],
)
def test_the_template_gets_variables_and_tools(variables: Any, row: Any, expected: str) -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    begin = "{{ mood | default('none') }} {{ tools | default([], true) | length }} "
    tokenizer.chat_template = begin + str(tokenizer.chat_template)
    assert as_text(tokenizer, chat_of([ASK], row, variables)) == (
        f"{expected}<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_text_is_left_alone() -> None:
    assert chat_of("Hi", {"tools": "["}, {"mood": "bad"}) == "Hi"


@pytest.mark.parametrize("tools", ["[", '{"a": 1}', 3])
def test_tools_that_are_no_list(tools: Any) -> None:
    with pytest.raises(InputError, match=r"column 'tools': .*; write a list of .*schemas"):
        chat_of([ASK], {"tools": tools}, {})


@pytest.mark.parametrize("wrong", ["{{ messages[9].content + 'a' }}", "{{ messages | sum }}", "{{ 1 + messages }}"])
def test_a_template_is_a_program_that_may_fail(wrong: str) -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    tokenizer.chat_template = wrong
    with pytest.raises(InputError, match=r"column 'prompt': the chat template does not take .*; change it or drop it"):
        as_text(tokenizer, [ASK])
