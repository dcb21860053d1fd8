"""Low-rank adapters."""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from grade_lightning.errors import InputError, check_range

from .low_bit import is_low_bit, owner, plain_weight

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


def with_adapters(model: PreTrainedModel, lora: LoRA) -> nn.Module:
    """The model with adapters, of which alone it trains the weights.

    Raises:
        InputError: peft is missing, or the model has no layers of the wanted names.
    """
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


def merged_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """State under the model's own names with the adapters added; the model itself stays as it is, to the bit.

    Weights of few bits are written in the model's floating-point type: the sum with an adapter has more.
    """
    deltas = {
        f"{name}.base_layer.weight": module.get_delta_weight(module.active_adapters[0])
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    wide = {
        f"{name}.weight": plain_weight(module, model.dtype)
        for name, module in model.named_modules()
        if is_low_bit(module)
    }
    state = {name: wide.get(name, value) for name, value in model.state_dict().items() if owner(name) == name}
    return {
        name.replace(".base_layer.", "."): (value + deltas[name]).to(value.dtype) if name in deltas else value
        for name, value in state.items()
        if ".lora_" not in name
    }
