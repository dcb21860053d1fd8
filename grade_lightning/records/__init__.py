"""The nouns: what one stage of a step hands to the next. No behaviour beyond selecting, joining and packing."""

from .batching import Batching as Batching
from .batching import View as View
from .evaluation import Evaluation as Evaluation
from .experience import Experience as Experience
from .prompts import Prompts as Prompts
from .relaxed_rollout import RelaxedRollout as RelaxedRollout
from .rollout import Rollout as Rollout
from .rows import batch_rows as batch_rows
from .rows import slice_rows as slice_rows
from .scores import Scores as Scores
from .scores import unique_name as unique_name
from .speech import spoken as spoken
from .step_output import StepOutput as StepOutput
from .token_stats import TokenStats as TokenStats
