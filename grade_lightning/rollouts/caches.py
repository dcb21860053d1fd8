"""What a model keeps of the tokens that it has read."""

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from grade_lightning.policies import Policy


def keys_and_values(policy: Policy) -> DynamicCache | None:
    """An empty cache of keys and values; None where the model keeps something else, such as a recurrent state."""
    cache = DynamicCache(config=policy.base.config.get_text_config())
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    return cache if plain and not policy.base._is_stateful else None
