"""Prompts whose gradients oppose each other, with their texts."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from grade_lightning.callbacks.loggers import log_table
from grade_lightning.callbacks.probe import Probed
from grade_lightning.distributed import Reduce
from grade_lightning.functional.opposition import Opposition, opposition
from grade_lightning.records import slice_rows


class Opposing(NamedTuple):
    """What a probe says of opposing signals."""

    found: Opposition
    texts: list[str]
    """Of each block."""

    @property
    def figures(self) -> dict[str, float]:
        """What is logged."""
        return {
            "probe/opposing_share": self.found.share,
            "probe/least_cosine": self.found.cosine,
            "probe/alignment_ratio": self.found.ratio,
        }

    def rows(self) -> list[tuple[str, str, str]]:
        """The pair that opposes each other most, and the extremes of both sides."""
        one, two = self.found.pair
        most = (f"cosine {self.found.cosine:.2f}", self.texts[one], self.texts[two])
        sides = zip(*self.found.sides, strict=True)
        return [most, *(("farthest apart", self.texts[left], self.texts[right]) for left, right in sides)]

    def table(self) -> str:
        """The same as Markdown."""
        return "\n".join(["| | one side | the other |", "|---|---|---|", *map(_line, self.rows())])


def opposing(
    trainer: Trainer, module: LightningModule, batch: Any, probed: Probed, products: Tensor, spare: int
) -> Opposing | None:
    """Compare the mean gradients of a probe's blocks; None where there is one alone, or one is infinite.

    Args:
        trainer: whose run it is.
        module: may have a tokenizer, for the texts.
        batch: that was probed.
        probed: what was found.
        products: Gram matrix of all gradients, those of a block in a row.
        spare: further rows in the batch for each that is trained on.
    """
    if probed.blocks < 2 or not bool(products.isfinite().all()):
        return None
    draws = len(products) // probed.blocks
    means = products.view(probed.blocks, draws, probed.blocks, draws).mean((1, 3))
    rows = probed.size * (1 + spare)
    blocks = range(probed.blocks // trainer.world_size)
    own = [_text(module, slice_rows(batch, block * rows, rows), block) for block in blocks]
    texts = [text for process in Reduce(trainer).gather(own) for text in process]
    return Opposing(opposition(means), texts)


def write(trainer: Trainer, seen: Opposing) -> None:
    """Write the texts, where the logger takes some."""
    rows = [dict(zip(("pair", "one side", "the other"), row, strict=True)) for row in seen.rows()]
    log_table(trainer, "probe/opposing", rows, seen.table(), trainer.global_step)


def _text(module: LightningModule, part: Any, block: int) -> str:
    """The prompts, or the beginning of the texts, of a block; else its number."""
    tokenizer = getattr(module, "tokenizer", None)
    if tokenizer is None or not isinstance(part, Mapping) or "input_ids" not in part:
        return f"block {block}"
    texts = [" ".join(text.split()) for text in tokenizer.batch_decode(part["input_ids"], skip_special_tokens=True)]
    return " / ".join(text if len(text) <= 200 else f"{text[:199]}…" for text in texts)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
