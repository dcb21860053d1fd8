"""Weights of few bits: how they are read, and how they are written as plain ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils.import_utils import is_accelerate_available, is_bitsandbytes_available

from grade_lightning.errors import InputError


def low_bit(path: str, bits: Literal[4, 8], dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told so that it reads the linear layers of a model in few bits.

    Args:
        path: the model, for messages.
        bits: 8: LLM.int8(); 4: QLoRA's NormalFloat, its scales quantized too.
        dtype: of the products, and of all other weights.

    Raises:
        InputError: bitsandbytes or accelerate is not installed.
    """
    absent = [
        name
        for name, there in (("bitsandbytes", is_bitsandbytes_available()), ("accelerate", is_accelerate_available()))
        if not there
    ]
    if absent:
        raise InputError(
            f"{path}: load_in_{bits}bit needs {' and '.join(absent)}: pip install 'grade-lightning[bits]'; or set "
            "dtype to bfloat16 instead"
        )
    if bits == 8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": config}


def keep_gradients(model: nn.Module) -> None:
    """Let gradients pass through weights of 4 bits after the model was sampled, too.

    Processors with AVX512-BF16 would have the weights packed anew at the first call in evaluation mode, for products
    that have no backward pass.
    """
    for module in model.modules():
        vars(module).update({"support_avx512bf16_for_cpu": False} if is_low_bit(module) else {})


def is_low_bit(module: nn.Module) -> bool:
    """Whether its weight is stored in few bits.

    Example:
        >>> is_low_bit(nn.Linear(2, 2))
        False
    """
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and not weight.is_floating_point()


def plain_weight(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """A weight of few bits as a matrix of floating-point numbers; needs peft."""
    from peft.utils.integrations import dequantize_bnb_weight

    stored: Any = module.weight
    weight: Tensor = dequantize_bnb_weight(stored, state=getattr(module, "state", None))
    return weight.detach().to(dtype)


def owner(key: str) -> str:
    """The parameter that an entry of a state belongs to: a weight of few bits has its scales beside it.

    Example:
        >>> owner("up_proj.weight"), owner("up_proj.weight.absmax")
        ('up_proj.weight', 'up_proj.weight')
    """
    module, beside, _ = key.partition(".weight.")
    return f"{module}.weight" if beside else key


@contextmanager
def as_plain(model: PreTrainedModel) -> Iterator[None]:
    """While it is written with plain weights, the model does not say that it was read in few bits."""
    said = [(vars(model), "hf_quantizer"), (vars(model.config), "quantization_config")]
    kept = [(own, name, own.pop(name)) for own, name in said if name in own]
    try:
        yield
    finally:
        for own, name, value in kept:
            own[name] = value
