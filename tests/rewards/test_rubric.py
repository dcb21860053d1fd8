"""Questions: their places, their chat templates, and the tokens that answer them."""

import pytest
from transformers import PreTrainedTokenizerFast

from grade_lightning.errors import InputError
from grade_lightning.rewards.rubric import RUBRIC, Rubric, answer_ids
from tests.data.chats import TEMPLATES, make_tokenizer
from tests.rewards.sequences import words


def test_what_is_asked() -> None:
    """Braces of the texts are texts, and what a prompt says of places is none."""
    rubric = Rubric("{x} {prompt} | {completion} | {1}")
    assert rubric.ask("a {completion}", "b {prompt}") == "{x} a {completion} | b {prompt} | {1}"
    assert Rubric(RUBRIC).ask("p", "c").startswith("Prompt:\np\n\nResponse:\nc\n\nIs")


@pytest.mark.parametrize(
    "text", ["", "{prompt}", "{completion}{completion}", "{completion}{prompt}", "{prompt}{prompt}{completion}"]
)
def test_a_rubric_without_places_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"must have \{completion\} once") as caught:
        Rubric(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name not in ("none",)])
def test_a_chat_template_asks_as_a_user(template: str) -> None:
    tokenizer = make_tokenizer("bytes", template)
    front, back = Rubric("{prompt}, is {completion} good?").around("p", tokenizer)
    asked = [{"role": "user", "content": "p, is it good?"}]
    assert front + "it" + back == tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)


def test_a_template_that_fails_or_leaves_out_is_one_line() -> None:
    tokenizer = words()
    for template, says in (
        ("{{ raise_exception('no') }}", "does not take"),
        ("hello", "leaves out what the user says"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(InputError, match=says) as caught:
            Rubric("{completion}").around("", tokenizer)
        assert "\n" not in str(caught.value)


def test_tokens_that_say_a_word() -> None:
    tokenizer: PreTrainedTokenizerFast = words("yes", "Yes", "no")
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in ("yes", "Yes", "no")}
    assert answer_ids(tokenizer, "yes") == sorted([ids["yes"], ids["Yes"]])
    assert answer_ids(tokenizer, "no") == [ids["no"]]
    with pytest.raises(InputError, match="no token of it says 'maybe'; choose another word"):
        answer_ids(tokenizer, "maybe")
