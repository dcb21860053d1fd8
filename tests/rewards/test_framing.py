"""Completions in their own tokens within a chat template: the tokens of the whole rendered conversation."""

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from grade_lightning.records import Rollout
from grade_lightning.rewards.framing import frame
from tests.data.chats import KINDS, TEMPLATES, TURNS, make_tokenizer

TALK = [{"role": "user", "content": "2+2?"}]


def rollout_of(tokenizer: PreTrainedTokenizerBase, completion: str, end: int | None) -> Rollout:
    written = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    both = tokenizer.encode(str(written) + completion, add_special_tokens=False)
    prompt = tokenizer.encode(str(written), add_special_tokens=False)
    words = [*both[len(prompt) :], *([] if end is None else [end])]
    return Rollout(
        prompt_ids=torch.tensor([prompt]),
        prompt_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        completion_ids=torch.tensor([words]),
        completion_mask=torch.ones(1, len(words), dtype=torch.bool),
        engine_logps=None,
        tokenizer=tokenizer,
        columns={"prompt": [TALK]},
        eos_ids=[] if end is None else [end],
    )


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("template", [name for name in TEMPLATES if name not in ("none", "mistral")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_framed_completion_is_the_rendered_conversation(kind: str, template: str, ended: bool) -> None:
    """In the fashions of ChatML, Llama, Gemma, Zephyr …; the end of the turn has a place if the template writes it."""
    tokenizer = make_tokenizer(kind, template)
    turn = TURNS[template]
    end = tokenizer.convert_tokens_to_ids(str(tokenizer.eos_token) if turn in ("EOS", None) else turn)
    assert isinstance(end, int)
    rollout = rollout_of(tokenizer, "It is four.", end if ended else None)
    found = frame(rollout, tokenizer)
    whole = [*TALK, {"role": "assistant", "content": "It is four."}]
    truth = tokenizer.encode(str(tokenizer.apply_chat_template(whole, tokenize=False)), add_special_tokens=False)
    assert tokenizer.decode(found.ids[0][found.mask[0].bool()]) == tokenizer.decode(truth)
    places = found.places[0]
    if turn is None and ended:
        assert places[-1] == -1
        places = places[:-1]
    assert found.ids[0][places].tolist() == rollout.completion_ids[0][: len(places)].tolist()
    assert places.diff().eq(1).all()


def test_a_completion_that_a_stop_string_ended_keeps_its_words() -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    plain = rollout_of(tokenizer, "It is four.", None)
    stopped = replace(plain, stop=["four."])
    assert stopped.ended.all()
    one, two = frame(plain, tokenizer), frame(stopped, tokenizer)
    assert torch.equal(one.ids, two.ids)
    assert torch.equal(one.places, two.places)
