"""Which tokens of a text are learned."""

from typing import Any

import pytest
import torch

from grade_lightning.data import InMemory, TextDataModule
from grade_lightning.data.text_batches import CollateLabelled, CollateTexts
from grade_lightning.errors import InputError
from grade_lightning.records import Batching
from tests.data.chats import make_tokenizer

ASK = {"role": "user", "content": "2+2?"}
SAID = {"role": "assistant", "content": "It is four"}
CALL, TOOL = {"role": "assistant", "content": "Hi"}, {"role": "tool", "content": "no"}
CHATML = make_tokenizer("bytes", "chatml")


def learned(*rows: dict[str, Any], **options: Any) -> list[str]:
    batch = CollateTexts(CHATML, **{"max_tokens": 99} | options)(rows)
    pairs = zip(batch["input_ids"], batch["loss_mask"].bool(), strict=True)
    return [CHATML.decode(ids[mask], skip_special_tokens=False) for ids, mask in pairs]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "It is four"}, "<s>It is four</s>"),
        ({"prompt": "2+2?", "completion": " It is four"}, " It is four</s>"),
        ({"prompt": [ASK], "completion": "It is four"}, "It is four<|im_end|>"),
        ({"prompt": [ASK], "completion": [CALL, TOOL, SAID]}, "Hi<|im_end|>It is four<|im_end|>"),
        ({"prompt": [ASK, CALL, ASK], "completion": [SAID]}, "It is four<|im_end|>"),
        ({"messages": [ASK, CALL, ASK, SAID], "prompt": [ASK, CALL, ASK]}, "Hi<|im_end|>It is four<|im_end|>"),
    ],
)
def test_what_is_learned(row: dict[str, Any], expected: str) -> None:
    assert learned(row, row) == [expected] * 2


def test_padding_is_never_learned() -> None:
    batch = CollateTexts(CHATML, 99)([{"text": "Hi"}, {"text": "It is four"}])
    assert torch.equal(batch["loss_mask"], batch["attention_mask"])
    assert batch["attention_mask"].sum() < batch["attention_mask"].numel()


def test_a_cut_that_leaves_nothing_to_learn_is_told_once() -> None:
    rows: list[dict[str, Any]] = [{"messages": [ASK, SAID]}, {"messages": [ASK, SAID], "tools": None}]
    collate = CollateTexts(CHATML, 4)
    with pytest.warns(UserWarning, match=r"column 'messages': 2 of 2 rows, .* nothing to learn in their first 4 tok"):
        batch = collate(rows)
    assert not batch["loss_mask"].any()
    assert collate._told


def test_labelled_conversations() -> None:
    batch = CollateLabelled(CollateTexts(CHATML, 99))([{"prompt": [ASK], "completion": "Hi", "label": 1}])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert CHATML.decode(batch["input_ids"][0]) == (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>"
    )


def test_a_conversation_that_ends_with_the_user() -> None:
    rows = [{"messages": [ASK, SAID, {"role": "user", "content": f"Hi {i}"}]} for i in range(20)]
    data = TextDataModule(InMemory(rows), batch_size=2, prompt_size=10, val_size=5, test_size=5)
    data.attach(CHATML, Batching("text"))
    data.setup()
    with pytest.raises(InputError, match=r"column 'messages', row \d+: its last message is of 'user', .* drop the row"):
        data.train_dataloader()
    data.attach(CHATML, Batching("prompts"))
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert set(batch["columns"]) == {"prompt"}
    assert str(CHATML.decode(batch["input_ids"][0])).endswith("<|im_start|>assistant\n")
