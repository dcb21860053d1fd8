"""The policy: a causal language model, perhaps with LoRA adapters, beside its frozen reference."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grade_lightning.distributed import gather_full_state, is_first_process
from grade_lightning.errors import InputError

from .activations import fuse_activations
from .anatomy import Anatomy, examine
from .context import context_length
from .continuing import continues
from .endings import end_ids
from .loading import check_vocabulary, config_without_dropout, load_pretrained, resolve_model, torch_dtype
from .lora import LoRA, merged_state, with_adapters
from .low_bit import as_plain, is_low_bit, keep_gradients, low_bit
from .modes import evaluating
from .network import Frozen, Network
from .passes import Pass, WholePass
from .sampled_linear import RowSampling, sample_rows
from .saving import true_settings
from .sharing import obstacle


class Policy(nn.Module, Network):
    """A causal language model that is trained, and the frozen one that it started as.

    Nothing is read in `__init__`; :meth:`load` does that. With LoRA the reference is the same network with its
    adapters switched off, so one copy of the weights is in memory; else it is a frozen copy.

    Args:
        path: a folder, a name on the Hub, or `"bundled"`.
        lora: train adapters instead of all weights.
        dtype: of the weights. With full fine-tuning keep float32 and set `--trainer.precision bf16-mixed`; a base
            under LoRA can be bfloat16.
        attn_implementation: as in transformers (`sdpa`, `eager`, `flash_attention_2`); its choice by default.
        gradient_checkpointing: recompute activations in the backward pass. The rollout is not affected.
        dropout: keep the dropout of the model's own configuration. Off by default: with it the policy that learns
            is not the one that sampled, and the KL at step 0 is not 0. (LoRA's own dropout is separate.)
        torch_compile: compile the training pass of the network below the head. The rollout is not affected.
        training_pass: how rollouts go through the network when they are measured; each sequence whole by default
            (`WholePass`), each prompt once for all its completions (`SharedPrefixPass`), without padding
            (`PackedPass`), or a chunk of positions at a time (`ChunkedPass`).
        row_sampling: weight gradients of some layers from a part of their rows; exact by default.
        load_in_4bit: read the linear layers of a base under LoRA in 4 bits (QLoRA; needs the extra `bits`).

    References:
        QLoRA: Efficient Finetuning of Quantized LLMs (Dettmers et al., 2023), https://arxiv.org/abs/2305.14314

    Example:
        >>> Policy("gpt2", lora=LoRA(r=8)).lora.r
        8
    """

    phase = "policy"

    def __init__(
        self,
        path: str = "bundled",
        lora: LoRA | None = None,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        dropout: bool = False,
        torch_compile: bool = False,
        training_pass: Pass | None = None,
        row_sampling: RowSampling | None = None,
        load_in_4bit: bool = False,
    ) -> None:
        super().__init__()
        if load_in_4bit and lora is None:
            raise InputError(
                "policy.load_in_4bit: weights of 4 bits cannot be trained; set --model.policy.lora.r 16 as well, or "
                "leave it out"
            )
        self.path = path
        self.lora = lora
        self.dtype = torch_dtype(dtype)
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.dropout = dropout
        self.torch_compile = torch_compile
        self.training_pass = training_pass or WholePass()
        self.row_sampling = row_sampling
        self.load_in_4bit = load_in_4bit
        self._eos_ids: list[int] | None = None
        self._compiled: tuple[Callable[..., Any]] | None = None
        self._anatomy: Anatomy | None = None
        self.model: Any = None
        self.reference: nn.Module | None = None

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        lora: LoRA | None = None,
        reference: bool = True,
        training_pass: Pass | None = None,
        row_sampling: RowSampling | None = None,
    ) -> "Policy":
        """Wrap a model that is in memory already; it is used, not copied (its reference is a copy)."""
        path = model.config.name_or_path or type(model).__name__
        policy = cls(path=path, lora=lora, training_pass=training_pass, row_sampling=row_sampling)
        policy.dtype = model.dtype
        if tokenizer is not None:
            policy.tokenizer = tokenizer
        policy._adopt(model, reference)
        return policy

    def load(self, reference: bool = True) -> None:
        """Read the weights, add the adapters, make the reference (unless not wanted). Does nothing the second time."""
        if self.model is not None:
            return
        path = resolve_model(self.path, "policy")
        kwargs: dict[str, Any] = {} if self.dropout else {"config": config_without_dropout(path)}
        if self.attn_implementation is not None:
            kwargs["attn_implementation"] = self.attn_implementation
        if self.load_in_4bit:
            kwargs |= low_bit(self.path, 4, self.dtype)
        model = load_pretrained(AutoModelForCausalLM, path, dtype=self.dtype, use_safetensors=True, **kwargs)
        check_vocabulary(self.path, model, self.tokenizer)
        self._adopt(model.train(), reference)

    def _adopt(self, model: PreTrainedModel, reference: bool) -> None:
        keep_gradients(model)
        fuse_activations(model)
        if self.lora is None:
            if any(is_low_bit(module) for module in model.modules()):
                raise InputError(
                    f"{self.path}: its weights have few bits and cannot be trained; set --model.policy.lora.r 16"
                )
            if reference:
                self.reference = copy.deepcopy(model).requires_grad_(False).eval()
            self.model = model
        else:
            self.model = with_adapters(model, self.lora)
        with self.evaluating():
            self._anatomy = examine(self.base, self.path)
            self._anatomy = replace(self._anatomy, continues=continues(self))
            self.training_pass.check(self)
            if self.training_pass.shares_prompts:
                self._anatomy = replace(self._anatomy, obstacle=obstacle(self))
        embedding: Any = self.base.get_input_embeddings()
        rows, logits = embedding.weight.shape[0], self.anatomy.size
        if rows != logits:
            raise InputError(f"{self.path}: embeds {rows} tokens, but has logits of {logits}; make the numbers equal")
        self._warn()
        if self.row_sampling is not None:
            sample_rows(self.model, self.row_sampling)
        if self.gradient_checkpointing:
            self.checkpoint_activations()

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass from here on."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def _warn(self) -> None:
        name, unused = type(self.base).__name__, self.anatomy.unused
        if self.anatomy.body is None:
            rank_zero_warn(
                f"{self.path}: {name} cannot be cut into body and head; it is used whole, which is correct and takes "
                "the memory of all logits"
            )
        if unused:
            rank_zero_warn(
                f"{self.path}: no text reaches {len(unused)} of the trainable parameters of {name}, such as "
                f"{unused[0]}; they are not trained"
            )
        if self.anatomy.obstacle:
            rank_zero_warn(
                f"{self.path}: {name} cannot share prompts in the training pass ({self.anatomy.obstacle}); each "
                "sequence goes through it whole"
            )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, padding on the left and with a padding token."""
        tokenizer: PreTrainedTokenizerBase = load_pretrained(
            AutoTokenizer, resolve_model(self.path, "policy"), padding_side="left"
        )
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise InputError(
                    f"{self.path}: the tokenizer has neither a padding nor an end-of-sequence token; set one"
                )
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model itself, without the wrapper of its adapters."""
        model: PreTrainedModel = self.model if self.lora is None else self.model.get_base_model()
        return model

    @property
    def anatomy(self) -> Anatomy:
        """Where the network is cut into body and head."""
        if self._anatomy is None:
            raise RuntimeError("Policy.load() was not called")
        return self._anatomy

    @property
    def shares_prompts(self) -> bool:
        """Whether the training pass gains by completions of a prompt that go through it together."""
        return self.training_pass.shares_prompts and not self.anatomy.obstacle

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.anatomy.width

    @property
    def context_length(self) -> int | None:
        """The longest sequence that the model takes, where its configuration says so."""
        return context_length(self.base.config)

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end a completion: :func:`.endings.end_ids`, unless others were set."""
        return end_ids(self.tokenizer, self.base.generation_config) if self._eos_ids is None else self._eos_ids

    @eos_ids.setter
    def eos_ids(self, ids: list[int]) -> None:
        self._eos_ids = ids

    def forward(self, inputs: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        """Logits of the last `length` positions; in training use :meth:`hidden` and :meth:`vocabulary`."""
        return self.logits(inputs, attention_mask, length)

    @property
    def body(self) -> Callable[..., Any]:
        """The network below the head, compiled if that is wanted."""
        if not self.torch_compile:
            return super().body
        if self._compiled is None:
            from torch._functorch import config

            config.donated_buffer = False  # replay goes through one graph several times
            self._compiled = (torch.compile(super().body, dynamic=True),)  # in a tuple it is no module of its own
        return self._compiled[0]

    @property
    def frozen(self) -> Frozen:
        """The reference as a network."""
        model: Any = self.base if self.reference is None else self.reference
        return Frozen(model, self.anatomy, self.as_reference, self.training_pass.states)

    def states(self, inputs: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Tensor:
        """As of any network, in the way of the training pass."""
        return self.training_pass.states(self, inputs, attention_mask, positions)

    @contextmanager
    def as_reference(self) -> Iterator[nn.Module]:
        """The reference network in evaluation mode: the frozen copy, or this one without its adapters."""
        if self.reference is not None:
            yield self.reference.eval()
        else:
            with self.evaluating(), self.model.disable_adapter():
                yield self.model

    def evaluating(self) -> AbstractContextManager[PreTrainedModel]:
        """The model as a sampler needs it."""
        return evaluating(self.model)

    def train(self, mode: bool = True) -> "Policy":
        """Set the mode of the policy; the reference stays in evaluation mode."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def save_pretrained(self, folder: str | Path, merge: bool = True) -> None:
        """Write a Hugging Face folder with tokenizer.

        Where the weights are spread over processes, all of them must call it. The first one writes.

        Args:
            folder: where.
            merge: add the adapters to the weights that are written; else write them alone, with the name of their base.
        """
        merged, alone = self.lora is not None and merge, self.lora is not None and not merge
        model: Any = self.model if alone else self.base
        options = {"save_embedding_layers": False} if alone else {}
        state = gather_full_state(merged_state(self.base) if merged else model.state_dict())
        if is_first_process():
            with as_plain(self.base), true_settings(self.base, {} if alone else state, self.eos_ids) as settings:
                model.save_pretrained(folder, state_dict=state, **options)
                if alone and settings is not None:
                    settings.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
