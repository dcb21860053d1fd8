"""What several benchmarks share: a GPT-2 of random weights, random prompts, and a reward that costs next to nothing."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from grade_lightning.policies import Pass, Policy
from grade_lightning.rewards import DifferentiableReward

HUGE_ALLOCATIONS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment in which the C library gives freed tensors back at once, so that resident memory is what is alive."""


class Words(DifferentiableReward):
    """The share of tokens in the first half of the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.ones: Tensor
        self.register_buffer("ones", (torch.arange(vocabulary) < vocabulary // 2).float().unsqueeze(-1), False)

    def table(self) -> Tensor:
        """One number for each token."""
        return self.ones

    def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Their mean."""
        return (embeddings.squeeze(-1) * mask).sum(-1) / mask.sum(-1)


class Prompts(IterableDataset[dict[str, Any]]):
    """Batches of random prompts without end."""

    def __init__(self, rows: int, vocabulary: int, length: int = 32) -> None:
        self.shape, self.vocabulary = (rows, length), vocabulary

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            ids = torch.randint(2, self.vocabulary, self.shape)
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "columns": {}}


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Words w2, w3, …; the end-of-sequence token has no logit, so that completions run to their full length."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, vocabulary)}, "<eos>": vocabulary}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )


def model(
    vocabulary: int, layers: int = 4, width: int = 256, positions: int = 128, dtype: torch.dtype = torch.float32
) -> GPT2LMHeadModel:
    """A GPT-2 without dropout, by the global random state."""
    config = GPT2Config(
        n_embd=width, n_layer=layers, n_head=max(1, width // 64), n_positions=positions, vocab_size=vocabulary,
        bos_token_id=0, eos_token_id=None, pad_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    network: GPT2LMHeadModel = GPT2LMHeadModel(config).to(dtype)  # type: ignore[arg-type]
    return network


def policy(vocabulary: int, training_pass: Pass | None = None, **size: Any) -> Policy:
    """The same as a policy, with its reference."""
    return Policy.from_model(model(vocabulary, **size), tokenizer(vocabulary), training_pass=training_pass)


class Memory:
    """Peak memory of what runs inside of it, above what was there: `with Memory(device) as memory: …; memory.peak`.

    On a GPU the bytes of tensors; else resident bytes of the process (Linux), whose high-water mark is set back first.
    """

    def __init__(self, device: str) -> None:
        self.device, self.peak, self.before = device, 0, 0

    def __enter__(self) -> "Memory":
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _resident("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        now = torch.cuda.max_memory_allocated() if self.device == "cuda" else _resident("VmHWM")
        self.peak = now - self.before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def matrix_rate(
    rows: int, inner: int, columns: int, device: str, dtype: torch.dtype, clock: Callable[[], float]
) -> float:
    """Operations a second of a product (rows × inner) (inner × columns), the best of five: what is possible here."""
    left, right = (torch.randn(count, inner, device=device, dtype=dtype) for count in (rows, columns))
    best = float("inf")
    for _ in range(6):  # the first one warms up
        wait(device)
        began = clock()
        left @ right.mT
        wait(device)
        best = min(best, clock() - began)
    return 2 * rows * inner * columns / best


def wait(device: str) -> None:
    """Wait for the GPU, if there is one."""
    if device == "cuda":
        torch.cuda.synchronize()


def note(text: str) -> None:
    """Say how far it is."""
    print(text, file=sys.stderr, flush=True)
