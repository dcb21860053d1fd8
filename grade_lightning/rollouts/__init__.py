"""From prompts to completions."""

from .discrete import Rollout as Rollout
from .discrete import Sampler as Sampler
from .relaxed import RelaxedRollout as RelaxedRollout
from .relaxed import RelaxedSampler as RelaxedSampler
