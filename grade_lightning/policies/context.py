"""The context: how long a sequence a model takes."""

from transformers import PretrainedConfig

CHANGING = "dynamic", "longrope"
"""Rotary schemes whose frequencies change when a batch grows beyond the original context: keys that were cached before
are of other frequencies than those of a whole pass, and a row depends on the longest of its batch."""


def context_length(config: PretrainedConfig) -> int | None:
    """The longest sequence for which sampling and training are the same; None where the configuration does not say.

    Example:
        >>> from transformers import LlamaConfig
        >>> context_length(LlamaConfig(max_position_embeddings=64))
        64
        >>> rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
        >>> context_length(LlamaConfig(max_position_embeddings=64, rope_parameters=rope))
        32
    """
    text = config.get_text_config()
    limits = [getattr(text, "max_position_embeddings", None)]
    scheme = getattr(text, "rope_parameters", None) or {}
    for part in (scheme, *scheme.values()):  # one for all layers, or one for each kind of layer
        if isinstance(part, dict) and part.get("rope_type") in CHANGING:
            limits.append(part.get("original_max_position_embeddings"))
            limits.append(getattr(text, "original_max_position_embeddings", None))
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return min(known, default=None)
