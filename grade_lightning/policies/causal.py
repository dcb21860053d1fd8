"""The policy: a causal language model, perhaps with LoRA adapters, beside its frozen reference."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.profiler import record_function
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from grade_lightning.errors import InputError, check_range
from grade_lightning.functional.sequences import position_ids
from grade_lightning.functional.vocabulary import Head, Vocabulary, linear
from grade_lightning.strategies import is_first_process, whole

from .loading import (
    check_vocabulary,
    config_without_dropout,
    embedding_table,
    load_pretrained,
    resolve_model,
    torch_dtype,
)

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (needs the extra `lora`).

    Args:
        r: rank.
        alpha: scale; the update is multiplied by alpha / r.
        dropout: dropout on the adapters' input while training; the rollout never has any.
        target_modules: names of the layers to adapt. By default the attention projections q, k, v and o where the
            model has layers of these names, else peft's choice for the architecture.

    References:
        | LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), https://arxiv.org/abs/2106.09685
        | Defaults: GRADE (Nel, 2025), https://arxiv.org/abs/2601.11574
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_range("[1, inf)", "lora", r=self.r)
        check_range("(0, inf)", "lora", alpha=self.alpha)
        check_range("[0, 1)", "lora", dropout=self.dropout)


class Policy(nn.Module):
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

    Example:
        >>> Policy("gpt2", lora=LoRA(r=8)).lora.r
        8
    """

    def __init__(
        self,
        path: str = "bundled",
        lora: LoRA | None = None,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        dropout: bool = False,
        torch_compile: bool = False,
    ) -> None:
        super().__init__()
        self.path = path
        self.lora = lora
        self.dtype = torch_dtype(dtype)
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.dropout = dropout
        self.torch_compile = torch_compile
        self._compiled: tuple[Callable[..., Any]] | None = None
        self.model: Any = None
        self.reference: nn.Module | None = None

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        lora: LoRA | None = None,
        reference: bool = True,
    ) -> "Policy":
        """Wrap a model that is in memory already; it is used, not copied (its reference is a copy)."""
        policy = cls(path=model.config.name_or_path or type(model).__name__, lora=lora)
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
        model = load_pretrained(AutoModelForCausalLM, path, dtype=self.dtype, use_safetensors=True, **kwargs)
        check_vocabulary(self.path, model, self.tokenizer)
        self._adopt(model.train(), reference)

    def _adopt(self, model: PreTrainedModel, reference: bool) -> None:
        ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
        rows, logits = (end.weight.shape[0] for end in ends)
        if rows != logits:
            raise InputError(f"{self.path}: embeds {rows} tokens, but has logits of {logits}; make them as many")
        if self.lora is None:
            if reference:
                self.reference = copy.deepcopy(model).requires_grad_(False).eval()
            self.model = model
        else:
            self.model = _with_adapters(model, self.lora)
        if self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

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
    def cache_name(self) -> str:
        """What the model calls its key-value cache: `cache`, or `past_key_values` before transformers 5.24."""
        return "cache" if "cache" in inspect.signature(self.base.forward).parameters else "past_key_values"

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        width: int = self.base.config.get_text_config().hidden_size
        return width

    @property
    def context_length(self) -> int | None:
        """The longest sequence that the model takes, where its configuration says so."""
        return getattr(self.base.config.get_text_config(), "max_position_embeddings", None)

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end a completion: those of the generation settings, else the tokenizer's."""
        config: GenerationConfig | None = self.base.generation_config
        ids = config.eos_token_id if config is not None else None
        ids = self.tokenizer.eos_token_id if ids is None else ids
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings of `ids`, scaled as the model scales them; (…) → (…, width)."""
        embeddings: Tensor = self.base.get_input_embeddings()(ids)
        return embeddings

    def table(self) -> Tensor:
        """What :meth:`embed` returns for each token id, without a graph; (vocabulary, width)."""
        return embedding_table(self.base)

    def reference_table(self) -> Tensor:
        """The same for the reference."""
        with self.as_reference():
            return embedding_table(self.base if self.reference is None else self.reference)

    def forward(self, inputs: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        """Logits of the last `length` positions, all at once; in training use :meth:`hidden` and :meth:`vocabulary`.

        Args:
            inputs: input embeddings, (b, l, width).
            attention_mask: (b, l), 0 for padding.
            length: number of positions wanted, counted from the end.

        Returns:
            Logits, (b, length, vocabulary).
        """
        return _all_logits(self.vocabulary, self.hidden(inputs, attention_mask, length))

    @record_function("policy")
    def hidden(self, inputs: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        """Final hidden states of the last `length` positions, (b, length, width); arguments as in :meth:`forward`."""
        return _hidden(self._body, inputs, attention_mask, length)

    @property
    def _body(self) -> Callable[..., Any]:
        """The network below the head."""
        below: Callable[..., Any] = self.base.base_model
        if not self.torch_compile:
            return below
        if self._compiled is None:
            from torch._functorch import config

            config.donated_buffer = False  # replay goes through one graph several times
            self._compiled = (torch.compile(below, dynamic=True),)  # in a tuple it is no module of its own
        return self._compiled[0]

    def reference_logits(self, inputs: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        """Logits of the frozen reference, in evaluation mode; as :meth:`forward`."""
        return _all_logits(self.reference_vocabulary, self.reference_hidden(inputs, attention_mask, length))

    @record_function("reference")
    def reference_hidden(self, inputs: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        """Final hidden states of the frozen reference, in evaluation mode; as :meth:`hidden`."""
        with self.as_reference():
            model: Any = self.base if self.reference is None else self.reference
            return _hidden(model.base_model, inputs, attention_mask, length)

    def vocabulary(self, hidden: Tensor, elements: int | None = None) -> Vocabulary:
        """The logits of hidden states (n, width), so many `elements` at a time."""
        head, parameters, size = _head(self.base)
        return Vocabulary(hidden, head, parameters, size, elements)

    def reference_vocabulary(self, hidden: Tensor) -> Vocabulary:
        """The same for the reference's hidden states; its head gets no gradient."""
        head, parameters, size = _head(self.base if self.reference is None else self.reference)

        def as_reference(*args: Tensor) -> Tensor:
            with self.as_reference():
                return head(*args)

        return Vocabulary(hidden, as_reference, [p.detach() for p in parameters], size)

    def reference_embed(self, ids: Tensor) -> Tensor:
        """Input embeddings of `ids` as the reference has them, without a graph."""
        with torch.no_grad(), self.as_reference():
            model: Any = self.base if self.reference is None else self.reference
            embeddings: Tensor = model.get_input_embeddings()(ids)
        return embeddings

    @contextmanager
    def as_reference(self) -> Iterator[nn.Module]:
        """The reference network in evaluation mode: the frozen copy, or this one without its adapters."""
        if self.reference is not None:
            yield self.reference.eval()
        else:
            with self.evaluating(), self.model.disable_adapter():
                yield self.model

    @contextmanager
    def evaluating(self) -> Iterator[PreTrainedModel]:
        """The model as a sampler needs it: evaluation mode (no dropout, no checkpointing, the cache usable).

        In training mode with gradient checkpointing transformers drops the key-value cache with only a warning, and
        every token is sampled without its context.
        """
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            yield self.model
        finally:
            for module, mode in modes.items():
                module.training = mode

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
        state = whole(_merged_state(self.base) if merged else model.state_dict())
        if is_first_process():
            model.save_pretrained(folder, state_dict=state, **options)
            self.tokenizer.save_pretrained(folder)


class ValueHead(nn.Linear):
    """The value of each position, from its hidden state; 0 everywhere at first.

    Args:
        width: of the hidden states.

    Example:
        >>> ValueHead(4)(torch.ones(2, 3, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values, float32; (…, width) → (…)."""
        return super().forward(hidden.to(self.weight.dtype)).squeeze(-1).float()


def _with_adapters(model: PreTrainedModel, lora: LoRA) -> nn.Module:
    try:
        import peft
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise  # it is there, and does not fit what else is
        raise InputError("LoRA needs peft: pip install 'grade-lightning[lora]'") from error
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = lora.target_modules or [name for name in ATTENTION_PROJECTIONS if name in leaves] or None
    config = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    try:
        adapted: nn.Module = peft.get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"LoRA: {' '.join(str(error).split())}; set --model.policy.lora.target_modules") from error
    return adapted


def _merged_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """State under the model's own names with the adapters added; the model itself stays as it is, to the bit."""
    deltas = {
        f"{name}.base_layer.weight": module.get_delta_weight(module.active_adapters[0])
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    return {
        name.replace(".base_layer.", "."): (value + deltas[name]).to(value.dtype) if name in deltas else value
        for name, value in model.state_dict().items()
        if ".lora_" not in name
    }


def _all_logits(vocabulary: Callable[[Tensor], Vocabulary], hidden: Tensor) -> Tensor:
    whole = vocabulary(hidden.flatten(0, 1))
    return whole.head(whole.hidden, *whole.parameters).view(*hidden.shape[:2], -1)


def _hidden(below: Callable[..., Any], inputs: Tensor, attention_mask: Tensor, length: int) -> Tensor:
    output = below(
        inputs_embeds=inputs,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state[:, -length:]
    return hidden


def _head(model: Any) -> tuple[Head, list[Tensor], int]:
    """What a transformers model makes of its final hidden states, by its own code: head, soft cap, scale.

    The network below the head is put aside, and the model's own `forward` is run over given hidden states.
    """
    output = model.get_output_embeddings()
    prefix = next(name for name, module in model.named_modules() if module is output)
    names = [f"{prefix}.{name}" for name, _ in output.named_parameters()]

    def head(hidden: Tensor, *parameters: Tensor) -> Tensor:
        below = model.base_model
        state = dict(zip(names, parameters, strict=True))
        with ExitStack() as stack:
            stack.enter_context(_forward(below, lambda *args, **kwargs: _Below(hidden.unsqueeze(0))))
            if type(output) is nn.Linear:
                stack.enter_context(_forward(output, lambda x: linear(x, output.weight, output.bias)))
            logits: Tensor = functional_call(model, state, kwargs={"inputs_embeds": hidden.unsqueeze(0)}).logits
        return logits.squeeze(0)

    return head, list(output.parameters()), output.weight.shape[0]


@contextmanager
def _forward(module: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Another forward for a while; one that somebody has put there comes back."""
    own = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


class _Below:
    """What the network below the head returns: hidden states, and None for whatever else a model asks of it."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None
