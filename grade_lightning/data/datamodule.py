"""The DataModule: one set of splits that share nothing, read in four ways."""

from functools import partial
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from grade_lightning.data.accepting import SourceLike, as_source
from grade_lightning.data.batches import Collate, CollatePrompts
from grade_lightning.data.cuts import COUNTED, PromptLengths, share_cut, token_lengths
from grade_lightning.data.loading import EpochSampler, ResumableLoader, resume_epoch
from grade_lightning.data.mapping import Transform
from grade_lightning.data.reading import Reading
from grade_lightning.data.sizes import USUAL, split_to_fit
from grade_lightning.data.sources import BundledReviews as BundledReviews
from grade_lightning.data.texts import keys_of, split_rows
from grade_lightning.data.views import VIEWS, Limits, Split
from grade_lightning.errors import InputError, check_range
from grade_lightning.modules import TrainableModule
from grade_lightning.records import Batching


class TextDataModule(LightningDataModule):
    """Texts or prompts in four splits, of which no two share a text or a prompt.

    `reward` (to train a reward model), `prompts` (to train a policy) and `validation` come out of the
    source's train rows, `test` out of its test rows or, where it has none, out of the train rows too. A
    duplicated text is kept once; a text or prompt that two splits would share stays in the first of test,
    validation, prompts and reward. `dropped` counts what that left out.

    How the rows are read is said by the module's :class:`~grade_lightning.records.Batching`: its `view` "prompts" gives
    `PromptBatch`es and trains on `prompts`; "labelled" gives `LabelledBatch`es and trains on `reward`; "text" gives
    `TextBatch`es and trains on `prompts`; "pairs" trains on `PairBatch`es of `prompts` and otherwise gives
    `PairBatch`es or, without completions, `PromptBatch`es; "unpaired" is the same with `UnpairedBatch`es;
    "preferences" gives `PreferenceBatch`es and trains on `reward`. All validate on `validation` and test on `test`.

    Args:
        source: Where the rows come from: a source, a dataset or a list of rows, a file or folder, or the name of a
            dataset of the Hub; `None` for the bundled reviews.
        batch_size: Sequences in a training step, on each device; a method that samples several completions for
            each prompt draws fewer prompts.
        eval_batch_size: Rows in a batch to validate, test or predict.
        reward_size: Rows in the split `reward`; `None` for 5,000, or fewer where the table is smaller. It is 0 where
            rows have no label, unless a reward model is trained on them as pairs; and, by default, where the label is
            that of a completion that the policy learns from.
        prompt_size: Rows in the split `prompts`; `None` for 10,000, or fewer.
        val_size: Rows in the split `validation`; `None` for 2,000, or fewer.
        test_size: Rows in the split `test`; `None` for all test rows, or `val_size` if the source has none.
        max_prompt_chars: Of a `text`, the prompt is the first sentence, or the first two where they fit.
        max_prompt_tokens: Where to cut such a prompt; `None` for the longest of the data, as far as the model's context
            has room beside a completion. A column `prompt` is not cut: a longer one is an error.
        max_text_tokens: Where to cut a whole text, or a chosen or rejected completion.
        columns: Names of the source's columns by TRL's, such as `prompt: question`.
        transform: A function that gets each row as a dict, its columns mapped, and returns it changed; None drops it.
        chat: Whether prompts that are text are what a user says in a conversation.
        system_prompt: What begins the conversations; with one, all prompts are conversations.
        chat_template_kwargs: Variables for the chat template, such as `enable_thinking: false`.
        group_by_length: So many training rows that follow each other have prompts, or texts, of similar length, so that
            there is less padding: give the rows of a step, over all devices. `None` for rows in random order.
        num_workers: Processes that prepare batches.
        seed: Of the splits and the shuffling.
        prompts: Instead of a source: texts, or conversations as lists of messages.

    Example:
        >>> data = TextDataModule(BundledReviews(60, 20), reward_size=20, prompt_size=30, val_size=10)
        >>> data.setup()
        >>> {name: len(rows) for name, rows in data.splits.items()}
        {'test': 20, 'validation': 10, 'prompts': 30, 'reward': 20}
    """

    def __init__(
        self,
        source: SourceLike | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        reward_size: int | None = None,
        prompt_size: int | None = None,
        val_size: int | None = None,
        test_size: int | None = None,
        max_prompt_chars: int = 200,
        max_prompt_tokens: int | None = None,
        max_text_tokens: int = 128,
        columns: dict[str, str] | None = None,
        transform: Transform | None = None,
        chat: bool = False,
        system_prompt: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        group_by_length: int | None = None,
        num_workers: int = 0,
        seed: int = 42,
        prompts: list[str] | list[list[dict[str, Any]]] | None = None,
    ) -> None:
        super().__init__()
        sizes = {"reward_size": reward_size, "prompt_size": prompt_size, "val_size": val_size, "test_size": test_size}
        check_range("[0, inf)", "data", **sizes, num_workers=num_workers)
        check_range("[0, 4294967295]", "data", seed=seed)
        check_range("[2, inf)", "data", group_by_length=group_by_length)
        counts = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "max_prompt_chars": max_prompt_chars}
        check_range("[1, inf)", "data", **counts)
        check_range(f"[{LEAST}, inf)", "data", max_prompt_tokens=max_prompt_tokens, max_text_tokens=max_text_tokens)
        self.source = as_source(source, prompts)
        self._reader = Reading(columns or {}, transform, chat, system_prompt)
        self._template = chat_template_kwargs or {}
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.reward_size, self.prompt_size, self.val_size, self.test_size = (
            reward_size,
            prompt_size,
            val_size,
            test_size,
        )
        self.max_prompt_chars, self._given_prompt_tokens = max_prompt_chars, max_prompt_tokens
        self.max_text_tokens, self.group_by_length = max_text_tokens, group_by_length
        self.num_workers, self.seed = num_workers, seed
        self.splits: dict[str, Dataset] = {}
        self.dropped: dict[str, int] = {}
        self._loaded: DatasetDict | None = None
        self._reading: tuple[PreTrainedTokenizerBase, Batching] | None = None
        self._prompts: PromptLengths | None = None
        self._room: int | None = None
        self._told: dict[tuple[str, str, int], set[str]] = {}

    @property
    def max_prompt_tokens(self) -> int:
        """Most tokens of a prompt: as given, or as found in :meth:`setup`."""
        if self._given_prompt_tokens is not None:
            return self._given_prompt_tokens
        longest = LEAST if self._prompts is None else max(LEAST, self._prompts.longest)
        return longest if self._room is None else max(LEAST, min(longest, self._room))

    def attach(self, tokenizer: PreTrainedTokenizerBase, batching: Batching) -> None:
        """Choose how rows are read; `setup` takes both from the trainer's LightningModule.

        Args:
            tokenizer: A Hugging Face tokenizer.
            batching: What a training batch is.
        """
        self._reading = tokenizer, batching

    def prepare_data(self) -> None:
        """Download or parse the source, once on each machine."""
        self._loaded = self._reader(self.source)

    def setup(self, stage: str | None = None) -> None:
        """Split the rows, the first time, and check them against the tokenizer and view.

        Args:
            stage: Lightning's; all splits are made whatever it is.
        """
        module = self.trainer.lightning_module if self.trainer is not None else None
        if isinstance(module, TrainableModule):
            self.attach(module.tokenizer, module.batching)
            if self._given_prompt_tokens is not None:  # as early as can be
                module.check_lengths(self.max_prompt_tokens, self.max_text_tokens)
        if not self.splits:
            self._split(self._loaded or self._reader(self.source))
            self._loaded = None
        if self._reading is not None and VIEWS[self._reading[1].view].reads_prompts:
            self._room = module.prompt_room(self.max_text_tokens) if isinstance(module, TrainableModule) else None
            self._measure_prompts(self._reading[0])
        if isinstance(module, TrainableModule):
            module.check_lengths(self.max_prompt_tokens, self.max_text_tokens)

    def _split(self, data: DatasetDict) -> None:
        train, test = data["train"], data.get("test")
        given = {"validation": self.val_size, "prompts": self.prompt_size, "reward": self._reward_size(train)}
        if test is None:
            given = {"test": self.val_size if self.test_size is None else self.test_size} | given
        sizes = {name: USUAL[name] if size is None else size for name, size in given.items()}
        train_keys = keys_of(train[:], self.max_prompt_chars)
        test_keys = None if test is None else keys_of(test[:], self.max_prompt_chars)
        (rows, self.dropped), asked = split_to_fit(
            lambda sizes: split_rows(train_keys, test_keys, sizes, self.test_size, self.seed),
            sizes,
            [name for name, size in given.items() if size is None],
        )
        found = sum(len(rows[name]) for name in asked)
        if found < sum(asked.values()):
            usable = f"data.source: {found} of {len(train)} train rows can be used (left out: {self._reasons()}), but "
            if not any(given.values()):  # nobody gave a size, and the usual ones cannot shrink further
                raise InputError(f"{usable}the splits need {list(given.values()).count(None)} at least; add rows")
            raise InputError(
                f"{usable}{sum(asked.values())} are asked for; lower "
                + " or ".join(f"data.{_OPTIONS[name]} ({size})" for name, size in asked.items() if size)
            )
        if len(rows["test"]) < (self.test_size or 0):
            raise InputError(f"data.test_size: {self.test_size}, but there are {len(rows['test'])} test rows; lower it")
        self.splits = {
            name: (test if name == "test" and test is not None else train).select(numbers)
            for name, numbers in rows.items()
        }
        self._numbers = rows
        if any(self.dropped.values()):
            rank_zero_info(f"Rows left out so that splits share nothing: {self._reasons()}")
        if asked != sizes:
            shares = {name: f"{size} of {sizes[name]}" for name, size in asked.items() if sizes[name]}
            taken = ", ".join(f"{share} for data.{_OPTIONS[name]}" for name, share in shares.items())
            rank_zero_info(f"The {len(train)} train rows are fewer than the usual splits take, which shrink: {taken}")

    def _reward_size(self, train: Dataset) -> int | None:
        """As given where the rows have labels, or are read as pairs to train a reward model on; else 0."""
        view = None if self._reading is None else self._reading[1].view
        if view == "unpaired":
            return self.reward_size or 0
        return self.reward_size if "label" in train.column_names or view == "preferences" else 0

    def _reasons(self) -> str:
        return (
            f"{self.dropped['duplicate']} duplicated texts, {self.dropped['in_test']} texts in test, "
            f"{self.dropped['same_prompt']} prompts in another split"
        )

    def _measure_prompts(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Tokenise all prompts, once; check those that are not cut."""
        if self._prompts is None or self._prompts.tokenizer is not tokenizer:
            collate = CollatePrompts(tokenizer, self.max_prompt_chars, 0, self._template)
            forks = self.num_workers > 0
            parts = {
                name: token_lengths(collate, self.splits[name], forks=forks)
                for name in ("prompts", "validation", "test")
            }
            self._prompts = PromptLengths(tokenizer, parts)
        self._prompts.check(self._numbers, self.max_prompt_tokens, self._given_prompt_tokens is not None)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the view's split, in another order each epoch."""
        _, batching = self._read()
        split, rows = VIEWS[batching.view].split, batching.rows(self.batch_size)
        processes = self.trainer.world_size if self.trainer is not None else 1
        if 0 < len(self.splits[split]) < rows * processes:
            takes = f", which takes {rows} rows a batch" if rows != self.batch_size else ""
            takes += f" on each of {processes} devices" if processes > 1 else ""
            raise InputError(
                f"data.batch_size: {self.batch_size}{takes}, but the split '{split}' has "
                f"{len(self.splits[split])} rows; lower it or raise data.{_OPTIONS[split]}"
            )
        return self._loader(split, train_rows=rows)

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of `validation`."""
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of `test`."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of `test`."""
        return self._loader("test")

    def _read(self) -> tuple[PreTrainedTokenizerBase, Batching]:
        if self._reading is None:
            raise RuntimeError("call attach(tokenizer, batching) first; with a TrainableModule a Trainer does")
        return self._reading

    def _loader(self, split: Split, train_rows: int | None = None) -> DataLoader[Any]:
        tokenizer, batching = self._read()
        rows, train, view = self.splits[split], train_rows is not None, VIEWS[batching.view]
        if train or not view.reads_prompts:
            view.check(rows, self._numbers[split])
        if not len(rows):
            raise InputError(f"data.{_OPTIONS[split]}: 0, so the split '{split}' is empty; raise it")
        limits = Limits(
            self.max_prompt_chars, self.max_prompt_tokens, self.max_text_tokens, self._ends(), self._template
        )
        collate = view.collate(tokenizer, limits, train)
        self._tell_cuts(split, collate)
        place = (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
        run = self.group_by_length if train else None
        lengths = None if run is None else self._lengths(split, collate)
        resumable = partial(ResumableLoader, repeats=batching.steps_per_batch, on_resume=self._resume)
        return (resumable if train else DataLoader)(
            rows,
            batch_size=train_rows if train else self.eval_batch_size,
            sampler=EpochSampler(rows, self.seed, *place, lengths, run or 1) if train else None,
            drop_last=train,
            collate_fn=collate,
            num_workers=self.num_workers,
            # without one, each epoch would draw from the global generator, as a rollout's noise does
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _lengths(self, split: Split, collate: Collate) -> list[int]:
        """Tokens of each row, of all columns together: of prompts as they were measured."""
        if isinstance(collate, CollatePrompts) and self._prompts is not None:
            found = self._prompts.parts[split]
        else:
            found = token_lengths(collate, self.splits[split], forks=self.num_workers > 0)
        return [sum(lengths) for lengths in zip(*found.values(), strict=True)]

    def _ends(self) -> list[int]:
        module = self.trainer.lightning_module if self.trainer is not None else None
        return module.eos_ids if isinstance(module, TrainableModule) else []

    def _resume(self, loader: ResumableLoader, behind: int) -> None:
        if self.trainer is not None:
            resume_epoch(self.trainer, loader, behind)

    @rank_zero_only
    def _tell_cuts(self, split: Split, collate: Collate) -> None:
        """One line with the share of the rows that are cut, column by column."""
        key = (split, type(collate).__name__, collate.max_tokens)
        if key not in self._told:
            option = "max_text_tokens"
            if isinstance(collate, CollatePrompts) and self._prompts is not None:
                option = "max_prompt_tokens"
                lengths = {name: found for name, found in self._prompts.parts[split].items() if name != "prompt"}
            else:
                lengths = token_lengths(collate, self.splits[split], COUNTED, self.num_workers > 0)
            found = share_cut(lengths, collate.max_tokens)
            self._told[key] = set(found)
            if found:
                rank_zero_warn(
                    f"split '{split}': {' and '.join(found.values())} are longer than {collate.max_tokens} tokens and "
                    f"are cut; --data.{option} moves the limit"
                )
        collate.cut.said |= self._told[key]


LEAST = 2
"""Tokens of a prompt or text at least: with a BOS, one would be none."""
_OPTIONS: dict[str, str] = {
    "reward": "reward_size",
    "prompts": "prompt_size",
    "validation": "val_size",
    "test": "test_size",
}
