from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grade_lightning.data.batches import CollatePairs, CollateTexts, encode
from grade_lightning.errors import InputError
from grade_lightning.policies.encoding import encode_completions, with_end
from tests.data.chats import make_tokenizer

HI = [{"role": "user", "content": "Hi"}]


def tokens(tokenizer: Any, ids: list[int]) -> list[str]:
    found: list[str] = tokenizer.convert_ids_to_tokens(ids)
    return found


@pytest.mark.parametrize(
    ("bos", "eos", "one", "front"),
    [
        (True, False, False, ["<s>"]),
        (True, True, False, ["<s>"]),  # an EOS of the tokenizer's own would end the prompt
        (False, True, False, []),
        (False, False, False, []),  # it has a BOS, as SmolLM2's, and puts none
        (False, False, True, ["<s>"]),  # GPT-2's stands between texts
        (True, False, True, ["<s>"]),
    ],
)
def test_what_stands_in_front_of_a_text(bos: bool, eos: bool, one: bool, front: list[str]) -> None:
    tokenizer = make_tokenizer("bytes", "none", bos, eos, one)
    assert tokens(tokenizer, encode(tokenizer, "Hi")) == [*front, "Hi"]
    assert tokens(tokenizer, encode(tokenizer, "<s>Hi")) == ["<s>", "Hi"]


@pytest.mark.parametrize("template", ["chatml", "smollm2", "llama3", "mistral", "gemma", "zephyr", "plain"])
@pytest.mark.parametrize("one", [False, True])
def test_rendered_text_is_read_as_its_conversation(template: str, one: bool) -> None:
    tokenizer = make_tokenizer("metaspace", template, bos=not one, one=one)
    text = str(tokenizer.apply_chat_template(HI, tokenize=False, add_generation_prompt=True))
    assert encode(tokenizer, text) == encode(tokenizer, HI)


def test_a_text_that_another_speaker_begins_has_been_rendered_too() -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    assert tokens(tokenizer, encode(tokenizer, "<|im_start|>tool\n2"))[0] == "<|im_start|>"
    assert tokens(tokenizer, encode(tokenizer, "It is <|im_start|>"))[0] == "<s>"


@pytest.mark.parametrize("empty", ["", " ", None])
def test_a_turn_in_which_nothing_is_said_yet(empty: str | None) -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    assert encode(tokenizer, [*HI, {"role": "assistant", "content": empty}]) == encode(tokenizer, HI)


def test_a_conversation_that_the_template_refuses() -> None:
    tokenizer = make_tokenizer("bytes", "gemma")
    with pytest.raises(InputError, match=r"'prompt': the chat template does not take .*\(no system\); change it"):
        encode(tokenizer, [{"role": "system", "content": "Be kind."}, *HI])


def test_a_completion_over_whose_beginning_a_token_would_reach() -> None:
    """After a prompt of its own it has no space in front, as alone it would."""
    vocabulary = {token: i for i, token in enumerate(["</s>", "<unk>", "▁", *"Say:noa\n.", ":n"])}
    inner = Tokenizer(models.BPE(vocabulary, [(":", "n")], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    assert tokenizer.tokenize("Say:no") == ["▁", "S", "a", "y", ":n", "o"]
    (ids,) = encode_completions(tokenizer, ["Say:"], [encode(tokenizer, "Say:")], ["no"])
    assert tokens(tokenizer, ids) == ["n", "o", "</s>"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no", ["no", "</s>"]),
        ("no</s>", ["no", "</s>"]),
        ("no</s>\n", ["no", "</s>"]),
        ("no<|im_end|>\n</s>", ["no", "<|im_end|>"]),  # Phi-3's template writes both; a rollout stops at the first
        ("</s>no", ["</s>", "no", "</s>"]),
        ("", ["</s>"]),
        ("no\n", ["no", "Ċ", "</s>"]),
    ],
)
def test_one_end(text: str, expected: list[str]) -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokens(tokenizer, with_end(tokenizer, ids)) == expected


def test_ends_of_the_generation_settings_are_ends_too() -> None:
    tokenizer = make_tokenizer("bytes", "none")
    (fine,) = tokenizer.encode("no", add_special_tokens=False)
    texts, pairs = CollateTexts(tokenizer, 64, [fine]), CollatePairs(tokenizer, 64, [fine])
    assert texts([{"text": "Hi no"}])["input_ids"][0, -1] == 1  # with its space it is another token
    assert texts([{"text": "no"}])["input_ids"][0].tolist() == [0, fine]
    assert pairs([{"prompt": "\n", "chosen": "no", "rejected": "!"}])["chosen_ids"].tolist() == [[fine]]


def test_the_answer_of_a_rendered_prompt_ends_with_its_turn() -> None:
    tokenizer = make_tokenizer("bytes", "gemma")
    text = str(tokenizer.apply_chat_template(HI, tokenize=False, add_generation_prompt=True))
    (row,) = CollatePairs(tokenizer, 64)([{"prompt": text, "chosen": "no", "rejected": "!"}])["chosen_ids"].tolist()
    assert tokens(tokenizer, row) == ["no", "<end_of_turn>"]
    (row,) = CollatePairs(tokenizer, 64)([{"prompt": "Hi", "chosen": "no", "rejected": "!"}])["chosen_ids"].tolist()
    assert tokens(tokenizer, row) == ["no", "</s>"]
