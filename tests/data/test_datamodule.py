import logging
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from lightning.fabric.utilities.data import _replace_dunder_methods
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.data import _update_dataloader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from grade_lightning.data import (
    BundledReviews,
    LabelledBatch,
    LocalFiles,
    PairBatch,
    PromptBatch,
    Source,
    TextBatch,
    TextDataModule,
    opening,
)
from grade_lightning.data.loading import ResumableLoader
from grade_lightning.errors import InputError
from grade_lightning.modules import TrainableModule
from grade_lightning.records import Batching, View

SMALL: dict[str, Any] = {
    "batch_size": 4,
    "eval_batch_size": 8,
    "reward_size": 20,
    "prompt_size": 30,
    "val_size": 10,
}


def letters(bos: bool = True, pad: bool = True, chat: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with a token a byte, which puts a BOS in front if it has one."""
    vocabulary = ["<bos>", "<eos>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = {"eos_token": "<eos>"} | ({"bos_token": "<bos>"} if bos else {}) | ({"pad_token": "<pad>"} if pad else {})
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}<bos>{{ m.role }}:{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}bot:{% endif %}"
        )
    return tokenizer


BOS, EOS, PAD = 0, 1, 2


class Rows(Source):
    def __init__(self, train: dict[str, list[Any]], test: dict[str, list[Any]] | None = None) -> None:
        self.tables = {"train": train} | ({"test": test} if test else {})
        self.loads = 0

    def load(self) -> DatasetDict:
        self.loads += 1
        return DatasetDict({split: Dataset.from_dict(table) for split, table in self.tables.items()})


def texts(n: int, start: int = 0) -> list[str]:
    return [f"Film {i} ran. It {'rained' * (i % 3)}. More {i}." for i in range(start, start + n)]


def labelled(n: int, start: int = 0) -> dict[str, list[Any]]:
    return {"text": texts(n, start), "label": [i % 2 for i in range(n)], "stars": list(range(n))}


def ready(
    source: Source,
    view: View = "prompts",
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> TextDataModule:
    data = TextDataModule(source, **SMALL | options)
    data.attach(tokenizer or letters(), Batching(view))
    data.prepare_data()
    data.setup()
    return data


def real(batch: Any, ids: str = "input_ids", mask: str = "attention_mask") -> list[list[int]]:
    """The ids that the mask lets through."""
    pairs = zip(batch[ids], batch[mask], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


@pytest.mark.slow
def test_defaults_split_the_bundled_reviews_exactly() -> None:
    data = TextDataModule()
    data.setup()
    sizes = {name: len(rows) for name, rows in data.splits.items()}
    assert sizes == {"test": 2_000, "validation": 2_000, "prompts": 10_000, "reward": 5_000}
    assert data.dropped == {"in_test": 0, "duplicate": 0, "same_prompt": 0}


def test_splits_share_no_text_and_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    train = labelled(100)
    train["text"] += [train["text"][0] + " ", train["text"][0], *texts(5, start=200)]
    train["label"] += [0] * 7
    train["stars"] += [0] * 7
    with caplog.at_level(logging.INFO):
        data = ready(Rows(train, labelled(10, start=200)), max_prompt_chars=15)
    assert {name: len(rows) for name, rows in data.splits.items()} == {
        "test": 10,
        "validation": 10,
        "prompts": 30,
        "reward": 20,
    }
    for part in (str.strip, lambda text: opening(text, 15)):
        parts = [{part(text) for text in rows["text"]} for rows in data.splits.values()]
        assert sum(map(len, parts)) == len(set().union(*parts))
    assert data.dropped == {"in_test": 5, "duplicate": 2, "same_prompt": 0}
    line = "2 duplicated texts, 5 texts in test, 0 prompts in another split"
    assert sum(line in message for message in caplog.messages) == 1


def test_shared_prompts_are_dropped_before_sizes_are_taken() -> None:
    train: dict[str, list[Any]] = {
        "text": [f"Same {i // 2}. And {i}." for i in range(200)],
        "label": [0, 1] * 100,
    }
    data = ready(Rows(train), max_prompt_chars=9)
    assert [len(rows) for rows in data.splits.values()] == [10, 10, 30, 20]
    prompts = [{opening(text, 9) for text in rows["text"]} for rows in data.splits.values()]
    assert sum(map(len, prompts)) == len(set().union(*prompts))
    assert data.dropped["same_prompt"] > 0


def test_splits_are_seeded_and_made_once() -> None:
    source = Rows(labelled(100), labelled(30, start=100))
    data = ready(source, test_size=20)
    before = {name: rows["text"][:] for name, rows in data.splits.items()}
    assert len(before["test"]) == 20
    data.setup("test")
    assert source.loads == 1
    again = ready(source, test_size=20)
    assert {name: rows["text"][:] for name, rows in again.splits.items()} == before
    other = ready(source, test_size=20, seed=1)
    assert all(other.splits[name]["text"][:] != rows for name, rows in before.items())


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            Rows(labelled(50), labelled(9)),
            {},
            r"data.source: 41 of 50 train rows .* 9 texts in test.*60 are asked for",
        ),
        (
            Rows(labelled(65)),
            {},
            r"lower data.test_size \(10\) or data.val_size \(10\) or data.prompt_size \(30\)",
        ),
        (
            Rows(labelled(60), labelled(9, 60)),
            {"test_size": 10},
            r"data.test_size: 10, but .* 9 test rows; lower",
        ),
    ],
)
def test_too_few_rows(source: Source, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ready(source, **options)


def test_pairs_are_split_for_a_reward_model_where_one_is_trained() -> None:
    """Its rows are none that a policy is trained on with the same sizes, and those of a policy stay the same."""
    table = preferences(60) | {"margin": [float(i) for i in range(60)]}
    policy, reward = (ready(Rows(table), view, test_size=10, prompt_size=20) for view in ("pairs", "preferences"))
    assert len(policy.splits["reward"]) == 0
    assert len(reward.splits["reward"]) == 20
    assert reward.splits["prompts"]["prompt"] == policy.splits["prompts"]["prompt"]
    assert not {*reward.splits["reward"]["prompt"]} & {*policy.splits["prompts"]["prompt"]}
    batch = next(iter(reward.train_dataloader()))
    assert len(batch["input_ids"]) == len(batch["rejected_ids"]) == len(batch["margins"])


def test_margins_are_numbers() -> None:
    table = preferences(60) | {"margin": ["much"] * 60}
    data = ready(Rows(table), "preferences", test_size=10, prompt_size=20)
    with pytest.raises(InputError, match=r"column 'margin', row \d+: 'much' is not a number"):
        data.train_dataloader()


def test_without_labels_the_reward_split_is_empty() -> None:
    data = ready(Rows({"text": texts(50)}, {"text": texts(5, 50)}), "labelled")
    assert [len(rows) for rows in data.splits.values()] == [5, 10, 30, 0]
    with pytest.raises(InputError, match=r"no column 'label' to train a reward model on; add it"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_size": 0}, "data.prompt_size: 0, so the split 'prompts' is empty; raise it"),
        (
            {"batch_size": 31},
            "data.batch_size: 31, but the split 'prompts' has 30 rows; lower it or raise data.prompt_size",
        ),
    ],
)
def test_train_split_too_small(options: dict[str, Any], message: str) -> None:
    data = ready(Rows(labelled(100)), **options)
    with pytest.raises(InputError, match=message):
        data.train_dataloader()


def test_empty_validation_split() -> None:
    data = ready(Rows(labelled(100)), val_size=0, test_size=3)
    assert len(data.test_dataloader().dataset) == 3  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"data\.val_size: 0, so the split 'validation' is empty"):
        data.val_dataloader()


@pytest.mark.parametrize("bos", [True, False])
def test_prompt_batches(bos: bool) -> None:
    data = ready(Rows(labelled(100)), tokenizer=letters(bos), max_prompt_tokens=24)
    batches: list[PromptBatch] = list(data.train_dataloader())
    assert len(batches) == 30 // 4
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.dtype == mask.dtype == torch.int64
        assert ids.shape == mask.shape
        assert ids.shape[1] <= 24
        assert mask[:, -1].all()
        assert (mask.diff(dim=1) >= 0).all()
        assert (ids[mask == 0] == PAD).all()
        assert set(batch["columns"]) == {"label", "stars", "prompt"}
        stars = [texts(100)[star] for star in batch["columns"]["stars"]]
        for row, prompt, text in zip(real(batch), batch["columns"]["prompt"], stars, strict=True):
            assert row.count(BOS) == bos
            assert not bos or row[0] == BOS
            assert prompt == opening(text, 200)[: 24 - bos]
            assert letters().decode(row, skip_special_tokens=True) == prompt


def test_mask_is_right_when_padding_is_eos() -> None:
    data = ready(Rows(labelled(100)), "text", letters(pad=False))
    lengths = [len(text) + 2 for text in data.splits["validation"]["text"]]
    batches: list[TextBatch] = list(data.val_dataloader())
    assert torch.cat([batch["attention_mask"].sum(1) for batch in batches]).tolist() == lengths
    assert all(row[-1] == EOS and row.count(EOS) == 1 for batch in batches for row in real(batch))


def test_tokenizer_that_cannot_pad() -> None:
    tokenizer = letters(pad=False)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"neither a pad_token nor an eos_token .* set its pad_token"):
        next(iter(ready(Rows(labelled(100)), tokenizer=tokenizer).train_dataloader()))


def test_prompt_column_as_it_stands() -> None:
    prompts = [f"Say  {i}.\nNow. Then. " for i in range(80)]
    data = ready(Rows({"prompt": prompts, "answer": list(range(80))}))
    for batch in data.train_dataloader():
        assert set(batch["columns"]) == {"prompt", "answer"}
        assert batch["columns"]["prompt"] == [prompts[i] for i in batch["columns"]["answer"]]
        assert [letters().decode(row[1:]) for row in real(batch)] == batch["columns"]["prompt"]
        assert all(row[0] == BOS for row in real(batch))


def test_long_prompt_in_a_prompt_column() -> None:
    prompts = [f"Say {i}." for i in range(80)]
    prompts[13] += "!" * 40
    source = Rows({"prompt": prompts})
    with pytest.raises(
        InputError, match=r"'prompt', row 13 \(split .*48 tokens; raise --data.max_prompt_tokens .*drop"
    ):
        ready(source, prompt_size=60, max_prompt_tokens=47)
    ready(source, prompt_size=60, max_prompt_tokens=48)
    assert ready(source, prompt_size=60).max_prompt_tokens == 48


def test_conversations_go_through_the_chat_template() -> None:
    prompts = [[{"role": "user", "content": f"Hi {i}"}] for i in range(80)]
    data = ready(Rows({"prompt": prompts}), tokenizer=letters(chat=True))
    batch: PromptBatch = next(iter(data.test_dataloader()))
    for row, prompt in zip(real(batch), batch["columns"]["prompt"], strict=True):
        assert letters().decode(row) == f"<bos>user:{prompt[0]['content']}bot:"
    with pytest.raises(InputError, match=r"column 'prompt' holds messages, but .* no chat template; write"):
        ready(Rows({"prompt": prompts}))


def test_prompt_without_tokens() -> None:
    source = Rows({"prompt": [f"Say {i}" for i in range(80)]})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"!": 0}, [])))
    with pytest.raises(InputError, match=r"no token of 'Say .*; drop the row or use another tokenizer"):
        ready(source, tokenizer=tokenizer)


def test_labelled_batches() -> None:
    data = ready(Rows(labelled(100)), "labelled", max_text_tokens=24)
    all_texts = set(texts(100))
    seen = set()
    batches: list[LabelledBatch] = [*data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()]
    for batch in batches:
        assert batch["labels"].dtype == torch.int64
        assert batch["input_ids"].shape[1] <= 24
        assert (batch["attention_mask"].diff(dim=1) <= 0).all()
        for row, label in zip(real(batch), batch["labels"], strict=True):
            text = str(letters().decode(row, skip_special_tokens=True))
            assert row[0] == BOS
            assert (row[-1] == EOS) == (len(row) < 24 or len(text) == 22)
            number = int(text.split()[1])
            assert any(full.startswith(text) for full in all_texts)
            assert label == number % 2
            seen.add(number)
    assert len(seen) == 20 + 10 + 10


def test_text_view_trains_on_the_prompts_split() -> None:
    source = Rows({"prompt": [f"{i} + 1 =" for i in range(80)], "completion": [f" {i + 1}" for i in range(80)]})
    data = ready(source, "text")
    rows = [row for batch in data.train_dataloader() for row in real(batch)]
    expected = {p + c for p, c in zip(*data.splits["prompts"][:].values(), strict=True)}
    assert {letters().decode(row, skip_special_tokens=True) for row in rows} <= expected
    assert len(rows) == 28


def preferences(n: int, each: int = 1) -> dict[str, list[Any]]:
    """Pairs, `each` of them to a prompt."""
    return {
        "prompt": [f"Say {i // each}:" for i in range(n)],
        "chosen": [f" yes {i}{'!' * (i % 5)}" for i in range(n)],
        "rejected": [f" no {i}" for i in range(n)],
        "stars": list(range(n)),
    }


@pytest.mark.parametrize("bos", [True, False])
def test_pair_batches(bos: bool) -> None:
    table = preferences(80)
    data = ready(Rows(table), "pairs", letters(bos))
    batches: list[PairBatch] = list(data.train_dataloader())
    assert len(batches) == 30 // 4
    for batch in batches:
        assert list(batch) == [
            "input_ids",
            "attention_mask",
            "chosen_ids",
            "chosen_mask",
            "rejected_ids",
            "rejected_mask",
            "columns",
        ]
        assert set(batch["columns"]) == {"prompt", "stars"}
        stars = batch["columns"]["stars"]
        assert batch["columns"]["prompt"] == [table["prompt"][star] for star in stars]
        prompts = real(batch)
        assert [letters().decode(row) for row in prompts] == ["<bos>" * bos + table["prompt"][star] for star in stars]
        assert batch["attention_mask"][:, -1].all()
        for name in ("chosen", "rejected"):
            ids, mask = batch[f"{name}_ids"], batch[f"{name}_mask"]  # type: ignore[literal-required]
            assert ids.dtype == mask.dtype == torch.int64
            assert ids.shape == mask.shape == (4, max(len(table[name][star]) for star in stars) + 1)
            assert (mask.diff(dim=1) <= 0).all()
            assert (ids[mask == 0] == PAD).all()
            completions = [letters().decode(row) for row in real(batch, f"{name}_ids", f"{name}_mask")]
            assert completions == [table[name][star] + "<eos>" for star in stars]
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    assert any((batch["chosen_mask"] == 0).any() for batch in batches)


def completions(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], **options: Any) -> list[list[int]]:
    """The chosen and rejected tokens of one pair."""
    table = preferences(80)
    for name, value in row.items():
        table[name] = [value if name != "prompt" else f"{value}{i}" for i in range(80)]
    batch = next(iter(ready(Rows(table), "pairs", tokenizer, **options).train_dataloader()))
    return [real(batch, f"{name}_ids", f"{name}_mask")[0] for name in ("chosen", "rejected")]


def test_long_completions_are_cut_and_have_no_eos() -> None:
    tokenizer = letters()
    chosen, rejected = completions(tokenizer, {"chosen": " abcdef", "rejected": " abc"}, max_text_tokens=5)
    assert tokenizer.decode(chosen) == " abcd"
    assert tokenizer.decode(rejected) == " abc<eos>"


def test_eos_of_completions() -> None:
    tokenizer = letters()
    chosen, rejected = completions(tokenizer, {"chosen": "a<eos>", "rejected": ""})
    assert tokenizer.decode(chosen) == "a<eos>"
    assert rejected == [EOS]
    tokenizer.eos_token = None
    assert [tokenizer.decode(ids) for ids in completions(tokenizer, {"chosen": "a", "rejected": "b"})] == ["a", "b"]
    with pytest.raises(InputError, match=r"column 'rejected': .* no token of '' and has no eos_token; drop the row or"):
        completions(tokenizer, {"rejected": ""})


def test_prompt_and_completion_have_the_tokens_of_both_together() -> None:
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<unk>", "▁", *"Say:0123456789no", "▁n"])}
    inner = Tokenizer(models.BPE(vocabulary, [("▁", "n")], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    assert tokenizer.tokenize("no") == ["▁n", "o"]  # what a completion must not become
    table = preferences(80) | {"chosen": ["no"] * 80, "rejected": [" no"] * 80}
    batch: PairBatch = next(iter(ready(Rows(table), "pairs", tokenizer).train_dataloader()))
    assert tokenizer.convert_ids_to_tokens(real(batch, "chosen_ids", "chosen_mask")[0]) == ["n", "o", "<eos>"]
    assert tokenizer.convert_ids_to_tokens(real(batch, "rejected_ids", "rejected_mask")[0]) == ["▁n", "o", "<eos>"]


def test_token_over_the_end_of_the_prompt() -> None:
    vocabulary = {token: i for i, token in enumerate(["<eos>", *"Say :0123456789no", ":n"])}
    inner = Tokenizer(models.BPE(vocabulary, [(":", "n")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    table = preferences(80) | {"chosen": ["no"] * 80, "rejected": [" no"] * 80}
    batch: PairBatch = next(iter(ready(Rows(table), "pairs", tokenizer).train_dataloader()))
    assert tokenizer.convert_ids_to_tokens(real(batch)[0])[-1] == ":"
    assert tokenizer.convert_ids_to_tokens(real(batch, "chosen_ids", "chosen_mask")[0]) == ["n", "o", "<eos>"]


def test_pairs_of_conversations() -> None:
    table = preferences(80)
    table["prompt"] = [[{"role": "user", "content": prompt}] for prompt in table["prompt"]]
    data = ready(Rows(table), "pairs", letters(chat=True))
    batch: PairBatch = next(iter(data.train_dataloader()))
    star = batch["columns"]["stars"][0]
    assert letters().decode(real(batch)[0]) == f"<bos>user:Say {star}:bot:"
    assert letters().decode(real(batch, "chosen_ids", "chosen_mask")[0]) == table["chosen"][star] + "<eos>"


def test_pairs_are_evaluated_as_prompts_with_their_completions() -> None:
    data = ready(Rows(preferences(80)), "pairs")
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        batch: PairBatch = next(iter(loader))
        sides = {f"{side}_{part}" for side in ("chosen", "rejected") for part in ("ids", "mask")}
        assert set(batch) == {"input_ids", "attention_mask", "columns"} | sides
        chosen = zip(batch["chosen_ids"], batch["chosen_mask"].bool(), strict=True)
        assert [letters().decode(ids[mask][:-1]) for ids, mask in chosen] == batch["columns"]["chosen"]
        assert set(batch["columns"]) == {"prompt", "chosen", "rejected", "stars"}  # as in the view "prompts"
        assert [letters().decode(row[1:]) for row in real(batch)] == batch["columns"]["prompt"]


def test_splits_of_pairs_share_no_prompt() -> None:
    table = {name: values + values[:7] for name, values in preferences(400, each=4).items()}
    data = ready(Rows(table), "pairs")
    prompts = [set(rows["prompt"]) for rows in data.splits.values()]
    assert [len(rows) for rows in data.splits.values()] == [10, 10, 30, 0]
    assert sum(map(len, prompts)) == len(set().union(*prompts))
    assert len(set(data.splits["prompts"]["prompt"])) < 30  # several pairs of a prompt may be in a split
    assert data.dropped["duplicate"] == 7
    assert data.dropped["same_prompt"] > 0


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["chosen"], r"data.source: no column 'chosen' to train on preferences; add a text 'prompt' and two"),
        (["chosen", "rejected"], r"data.source: no column 'chosen' or 'rejected' to train"),
    ],
)
def test_pairs_without_their_columns(missing: list[str], message: str) -> None:
    table = {name: values for name, values in preferences(80).items() if name not in missing}
    data = ready(Rows(table), "pairs")
    assert len(list(data.val_dataloader())) == 2
    with pytest.raises(InputError, match=message):
        data.train_dataloader()
    with pytest.raises(InputError, match="no column 'prompt' or 'chosen' or 'rejected'"):
        ready(Rows(labelled(100)), "pairs").train_dataloader()


@pytest.mark.parametrize("value", [None, [{"role": "assistant", "content": "yes"}]])
def test_completion_that_is_no_text(value: Any) -> None:
    table = preferences(60)
    table["rejected"] = [value if value or i == 13 else "no" for i in range(60)]
    data = ready(Rows(table), "pairs", prompt_size=40, batch_size=1)
    row = 13 if value is None else data._numbers["prompts"][0]
    assert row in data._numbers["prompts"]
    with pytest.raises(InputError, match=rf"^column 'rejected', row {row} \(split 'prompts'\): .* is not a text;"):
        data.train_dataloader()


def test_long_prompt_of_a_pair() -> None:
    with pytest.raises(InputError, match=r"column 'prompt', row \d+ .*8 tokens; raise --data.max_prompt_tokens"):
        ready(Rows(preferences(80)), "pairs", max_prompt_tokens=6)


def unpaired(n: int) -> dict[str, list[Any]]:
    """Rows as TRL's KTO reads them."""
    table = preferences(n)
    return {"prompt": table["prompt"], "completion": table["chosen"], "label": [i % 3 == 0 for i in range(n)]}


def test_unpaired_batches() -> None:
    """Prompts on the left, completions with their end on the right, and labels; rows for no reward model."""
    table = unpaired(80)
    data = ready(Rows(table), "unpaired", reward_size=None)
    assert len(data.splits["reward"]) == 0
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        assert [letters().decode(row[1:]) for row in real(batch)] == batch["columns"]["prompt"]
        rows = [table["prompt"].index(prompt) for prompt in batch["columns"]["prompt"]]
        found = real(batch, "completion_ids", "completion_mask")
        assert [letters().decode(ids) for ids in found] == [table["completion"][row] + "<eos>" for row in rows]
        assert batch["desirable"].tolist() == [table["label"][row] for row in rows]
    prompts = next(iter(ready(Rows({"prompt": table["prompt"]}), "unpaired").val_dataloader()))
    assert set(prompts) == {"input_ids", "attention_mask", "columns"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"label": None}, r"no column 'label' to train on labelled completions; add a 'prompt', a 'completion'"),
        (
            {"label": [1] * 80},
            r"column 'label' \(split 'prompts'\): all rows have True, .* of the other label",
        ),
        (
            {"completion": [[{"role": "assistant", "content": "a"}] * 2] * 80},
            r"column 'completion', row \d+ .* not a text",
        ),
    ],
    ids=["label", "one label", "completion"],
)
def test_unpaired_rows_that_cannot_be_learnt_from(wrong: dict[str, Any], message: str) -> None:
    table = {name: values for name, values in (unpaired(80) | wrong).items() if values is not None}
    with pytest.raises(InputError, match=message):
        ready(Rows(table), "unpaired").train_dataloader()


def order(loader: DataLoader[Any]) -> list[int]:
    return [star for batch in loader for star in batch["columns"]["stars"]]


def test_training_order_is_seeded_by_epoch() -> None:
    source = Rows(labelled(100))
    first, second = ready(source).train_dataloader(), ready(source).train_dataloader()
    epochs = []
    for epoch in range(2):
        first.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        epochs.append(order(first))
    second.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert order(second) == epochs[1] != epochs[0]
    assert order(ready(source).val_dataloader()) == order(ready(source).val_dataloader())


def test_loading_leaves_the_global_random_state_alone() -> None:
    data = ready(Rows(labelled(100)))
    state = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_collating_can_move_to_workers() -> None:
    data = ready(Rows(labelled(100)))
    rows = data.splits["prompts"].select(range(4))
    collate = data.train_dataloader().collate_fn
    there = pickle.loads(pickle.dumps(collate))(list(rows))
    assert torch.equal(there["input_ids"], collate(list(rows))["input_ids"])
    data.num_workers = 1
    assert order(data.train_dataloader()) == order(ready(Rows(labelled(100))).train_dataloader())


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_given_out_several_times(workers: int) -> None:
    data = ready(Rows(labelled(100)), num_workers=workers)
    once = [batch["columns"]["stars"] for batch in data.train_dataloader()]
    data.attach(letters(), Batching(epochs=3))
    loader = data.train_dataloader()
    assert len(loader) == 3 * len(once) == 21
    assert [batch["columns"]["stars"] for batch in loader] == [stars for stars in once for _ in range(3)]
    assert len(data.val_dataloader()) == 2


@pytest.mark.parametrize("inside_trainer", [True, False])
def test_repeats_survive_a_distributed_sampler(inside_trainer: bool) -> None:
    data = ready(Rows(labelled(100)))
    data.attach(letters(), Batching(epochs=3))
    # inside the hooks that make loaders, a Trainer keeps the arguments; elsewhere it looks for attributes
    with _replace_dunder_methods(DataLoader, "dataset") if inside_trainer else nullcontext():
        loader = data.train_dataloader()
    sampler: DistributedSampler[Any] = DistributedSampler(data.splits["prompts"], num_replicas=2, rank=0)
    other = _update_dataloader(loader, sampler)
    assert isinstance(other, ResumableLoader)
    assert other.sampler is sampler
    assert (len(other), other.repeats) == (3 * (15 // 4), 3)
    seen = order(other)
    assert seen[:4] == seen[4:8] == seen[8:12] != seen[12:16]


def test_rows_of_a_batch_are_the_methods_to_say() -> None:
    data = ready(Rows(labelled(100)), batch_size=32)
    data.attach(letters(), Batching(generations=8))
    assert next(iter(data.train_dataloader()))["input_ids"].shape[0] == 4
    assert next(iter(data.val_dataloader()))["input_ids"].shape[0] == 8
    data.attach(letters(), Batching(spare=1))
    with pytest.raises(InputError, match=r"data.batch_size: 32, which takes 64 rows a batch, but .* 30 rows; lower it"):
        data.train_dataloader()


class Reader(TrainableModule):
    """Only remembers what it was given, and what it was told of the lengths."""

    tokenizer = letters()

    def __init__(self, batching: Batching = Batching()) -> None:
        super().__init__(torch.optim.SGD, None)
        self.own, self.lengths = batching, (0, 0)
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    @property
    def batching(self) -> Batching:
        return self.own

    def check_lengths(self, prompt: int, text: int) -> None:
        self.lengths = prompt, text

    def save_pretrained(self, folder: str, merge: bool = True) -> None: ...

    def draw_loss(self, batch: PromptBatch) -> Tensor:  # type: ignore[override]
        return self.weight

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        self.seen.append(batch["columns"]["stars"])
        return self.weight

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[str]:
        return batch["columns"]["prompt"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_trainer_attaches_its_module(tmp_path: Path) -> None:
    whole = Reader()
    source = Rows(labelled(100))
    data = TextDataModule(source, **SMALL)
    trainer = make_trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    trainer.fit(whole, datamodule=data)
    assert whole.seen[:7] != whole.seen[7:]
    assert source.loads == 1
    assert whole.lengths == (data.max_prompt_tokens, data.max_text_tokens)
    predicted: Any = trainer.predict(whole, datamodule=data)
    assert sum(map(len, predicted)) == 10


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_trainer_asks_its_module_for_rows_and_steps(tmp_path: Path) -> None:
    module = Reader(Batching(minibatches=4))
    trainer = make_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(module, datamodule=TextDataModule(Rows(labelled(100)), **SMALL))
    assert [len(stars) for stars in module.seen] == [16] * 4
    assert module.seen[0] == module.seen[3]
    assert trainer.estimated_stepping_batches == 4


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (1, 7), (1, 10), (1, 14), (3, 3), (3, 8), (3, 21), (3, 22)])
def test_resumed_training_sees_the_batches_that_were_left(tmp_path: Path, epochs: int, steps: int) -> None:
    source = Rows(labelled(100))
    whole, rest = Reader(Batching(epochs=epochs)), Reader(Batching(epochs=epochs))
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(tmp_path, max_epochs=3, callbacks=save)
    trainer.fit(whole, datamodule=TextDataModule(source, **SMALL))
    trainer = make_trainer(tmp_path, max_epochs=3, enable_checkpointing=False)
    trainer.fit(rest, datamodule=TextDataModule(source, **SMALL), ckpt_path=tmp_path / f"step={steps}.ckpt")
    assert len(whole.seen) == 21 * epochs
    assert rest.seen == whole.seen[steps:]


def test_loader_before_attach_says_what_to_do() -> None:
    data = TextDataModule(BundledReviews(100, 10), **SMALL)
    data.setup()
    with pytest.raises(RuntimeError, match="attach"):
        data.train_dataloader()


@pytest.mark.slow
def test_imdb(shared: Path) -> None:
    files = [shared / "data" / f"imdb_{split}.parquet" for split in ("train", "test")]
    if not all(path.is_file() for path in files):
        pytest.skip("needs imdb_train.parquet and imdb_test.parquet beside the checkout")
    sizes: dict[str, Any] = {"reward_size": None, "prompt_size": None, "val_size": None}
    data = ready(LocalFiles(*map(str, files)), batch_size=16, max_prompt_tokens=32, **sizes)
    assert data.dropped["in_test"] == 123
    assert {name: len(rows) for name, rows in data.splits.items()} == {
        "test": 24_801,
        "validation": 2_000,
        "prompts": 10_000,
        "reward": 5_000,
    }
    for part in (str.strip, lambda text: opening(text, 200)):
        parts = [{part(text) for text in rows["text"]} for rows in data.splits.values()]
        assert sum(map(len, parts)) == len(set().union(*parts))
    assert not any("<br" in text for text in data.splits["test"]["text"])
    assert next(iter(data.train_dataloader()))["input_ids"].shape == (16, 32)


@pytest.mark.parametrize(("batch_size", "processes"), [(15, 2), (16, 2), (8, 4), (9, 4), (30, 1)])
def test_each_device_needs_a_batch_of_its_own(batch_size: int, processes: int) -> None:
    """Else some of them would have none, or rows that others have, too."""
    data = TextDataModule(BundledReviews(80, 20), **SMALL | {"batch_size": batch_size})
    data.attach(letters(), Batching())
    data.setup()
    data.trainer = Trainer(accelerator="cpu", logger=False)
    data.trainer.strategy.world_size = processes  # type: ignore[attr-defined]
    if 30 // (batch_size * processes):
        assert len(data.train_dataloader())
    else:
        with pytest.raises(
            InputError, match=rf"{batch_size} on each of {processes} devices, but .* has 30 rows; lower"
        ):
            data.train_dataloader()


@pytest.mark.parametrize("view", ["prompts", "text", "labelled"])
def test_rows_of_similar_length_need_less_padding(view: View) -> None:
    """Texts of 2 to 61 words: of a step's tokens few are padding, of random rows' many."""
    rows: list[str] = [" ".join(f"word{i}" for _ in range(2 + i % 60)) for i in range(240)]
    table: dict[str, list[Any]] = {"text": rows, "label": [i % 2 for i in range(240)]}
    if view == "prompts":
        table["prompt"] = rows
    sizes: dict[str, Any] = {
        "prompt_size": 64,
        "reward_size": 64,
        "val_size": 8,
        "test_size": 8,
        "max_text_tokens": 500,
    }
    shares = []
    for group in (None, 8):
        data = ready(Rows(table), view, batch_size=8, group_by_length=group, **sizes)
        batches = list(data.train_dataloader())
        assert sum(len(batch["input_ids"]) for batch in batches) == 64
        masks = [batch["attention_mask"] for batch in batches]
        shares.append(sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks))
    assert shares[0] < 0.65
    assert shares[1] > 0.85
