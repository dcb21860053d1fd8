"""What the assistant says in a conversation, whatever the template."""

from typing import Any

import pytest

from grade_lightning.data.batches import CollateTexts
from grade_lightning.data.conversations import encode_conversation
from grade_lightning.errors import InputError
from grade_lightning.policies.chat import Chat
from tests.data.chats import KINDS, TURNS, make_tokenizer

TALK = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "It is four"},
    {"role": "user", "content": "It is four"},
    {"role": "assistant", "content": "Good film."},
]
THINKS = (  # Qwen3's fashion: the last turn has thoughts, be they empty; earlier turns have lost them
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and '</t>' not in m.content %}<t>\n</t>\n{% endif %}"
    "{{ m.content if loop.last else m.content.split('</t>\n')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BEGINS_THOUGHTS = (  # DeepSeek-R1's: the generation prompt begins thoughts that no conversation keeps
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<t>\n{% endif %}"
)
SYSTEM_LAST = (  # Mistral's: the system prompt goes to the last that the user says
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.index0 >= messages | length - 2 %}{{ system }} {% endif %}{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def learned(tokenizer: Any, messages: list[dict[str, Any]], first: int = 0) -> list[str]:
    """Texts that are learned, one for each run of tokens."""
    ids, mask = encode_conversation(tokenizer, Chat(messages), first=first)
    assert len(ids) == len(mask)
    runs: list[list[int]] = []
    for before, here, token in zip([0, *mask], mask, ids, strict=False):
        if here:
            runs = [*runs, [token]] if not before else [*runs[:-1], [*runs[-1], token]]
    found: list[str] = [tokenizer.decode(run, skip_special_tokens=False) for run in runs]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [name for name in TURNS if name != "none"])
def test_the_assistant_alone_is_learned_with_its_ends(kind: str, template: str) -> None:
    tokenizer = make_tokenizer(kind, template)
    turn = {"EOS": "</s>", None: ""}.get(TURNS[template], TURNS[template])
    said = [text.strip().replace(" <", "<") for text in learned(tokenizer, TALK)]
    end = "\n</s>" if turn == "" else turn  # a template without ends has the tokenizer's, once
    assert said == [f"It is four{turn}", f"Good film.{end}"]
    whole = encode_conversation(tokenizer, Chat(TALK))[0]
    assert whole[: len(whole) - (turn == "")] == _written(tokenizer)[: len(whole) - (turn == "")]
    assert learned(tokenizer, TALK, first=2) == learned(tokenizer, TALK)[1:]


def _written(tokenizer: Any) -> list[int]:
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (THINKS, ["It is four<|im_end|>", "<t>\n</t>\nGood film.<|im_end|>"]),
        (BEGINS_THOUGHTS, ["It is four<|im_end|>", "Good film.<|im_end|>"]),
        (SYSTEM_LAST, [" It is four</s>", " Good film.</s>"]),
        (MARKED, ["It is four<|im_end|>", "Good film.<|im_end|>"]),
    ],
    ids=["thinks", "begins thoughts", "system last", "marked"],
)
def test_templates_that_write_a_turn_differently_where_others_follow(template: str, expected: list[str]) -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    tokenizer.chat_template = template
    system = [{"role": "system", "content": "no"}] if template == SYSTEM_LAST else []
    assert learned(tokenizer, [*system, *TALK]) == expected


def test_calls_of_tools_are_learned_and_their_answers_are_not() -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    tokenizer.chat_template = (
        "{% if tools %}tools: {{ tools | length }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content or '' }}{% for c in m.tool_calls or [] %}call {{ c.function.name }}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    talk: list[dict[str, Any]] = [TALK[0], call, {"role": "tool", "content": "4"}, TALK[1]]
    assert learned(tokenizer, talk) == ["call add<|im_end|>", "It is four<|im_end|>"]
    row = {"messages": talk, "tools": '[{"type": "function"}]'}
    batch = CollateTexts(tokenizer, 99)([row])
    assert str(tokenizer.decode(batch["input_ids"][0])).startswith("tools: 1\n")


def test_a_conversation_that_the_assistant_begins() -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    assert learned(tokenizer, TALK[1:]) == ["It is four<|im_end|>", "Good film.<|im_end|>"]


def test_a_template_that_hides_what_the_assistant_says() -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}\n{% endfor %}"
    with pytest.raises(InputError, match=r"column 'messages': .* put {% generation %} and {% endgeneration %} around"):
        learned(tokenizer, TALK)
    tokenizer.chat_template = "{% generation %}{% endgeneration %}" + tokenizer.chat_template
    with pytest.raises(InputError, match=r"column 'messages': the chat template marks nothing that the assistant says"):
        learned(tokenizer, TALK)


def test_a_template_that_fails_and_one_that_is_missing() -> None:
    with pytest.raises(InputError, match=r"column 'messages': the chat template does not take .*\(no system\)"):
        learned(make_tokenizer("bytes", "gemma"), [{"role": "system", "content": "no"}, *TALK])
    with pytest.raises(InputError, match=r"column 'messages' holds messages, but the tokenizer has no chat template"):
        learned(make_tokenizer("bytes", "none"), TALK)


def test_the_end_after_a_user_is_not_learned() -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    ids, mask = encode_conversation(tokenizer, Chat(TALK[:3]))
    assert ids[-1] == tokenizer.eos_token_id
    assert mask[-1] == 0
    assert any(mask)
