"""What a written folder says of its weights and its ends."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel


@contextmanager
def true_settings(
    model: PreTrainedModel, state: Mapping[str, Tensor], eos_ids: list[int]
) -> Iterator[GenerationConfig | None]:
    """While it is written, the settings say which tokens end a text, and no tie between matrices that differ.

    Args:
        model: whose configuration and generation settings are written; both are as before afterwards.
        state: the weights that are written.
        eos_ids: the end tokens.

    Returns:
        The generation settings, if the model has any.
    """
    settings, configs = model.generation_config, [model.config, model.config.get_text_config()]
    ties = [getattr(config, "tie_word_embeddings", None) for config in configs]
    ends = settings.eos_token_id if settings is not None else None
    try:
        if settings is not None and eos_ids:
            settings.eos_token_id = eos_ids if len(eos_ids) > 1 else eos_ids[0]
        if any(ties) and not _tied(model, state):
            for config, tie in zip(configs, ties, strict=True):
                if tie is not None:
                    config.tie_word_embeddings = False
        yield settings
    finally:
        if settings is not None:
            settings.eos_token_id = ends
        for config, tie in zip(configs, ties, strict=True):
            if tie is not None:
                config.tie_word_embeddings = tie


def _tied(model: PreTrainedModel, state: Mapping[str, Tensor]) -> bool:
    """Whether the head's matrix and the embeddings' are equal; also where the state has only one of them."""
    parts = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [next((name for name, module in model.named_modules() if module is part), None) for part in parts]
    matrices = [state[f"{name}.weight"] for name in names if f"{name}.weight" in state]
    return len(matrices) < 2 or matrices[0] is matrices[1] or torch.equal(*matrices)
