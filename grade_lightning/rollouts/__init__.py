"""From prompts to completions."""

from .discrete import Rollout as Rollout
from .discrete import Sampler as Sampler
