"""A causal language model with adapters, and its frozen reference."""

from .causal import LoRA as LoRA
from .causal import Policy as Policy
from .causal import ValueHead as ValueHead
from .loading import bundled_folder as bundled_folder
from .loading import resolve_model as resolve_model
