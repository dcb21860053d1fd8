"""What one sees and keeps of a run."""

from .beta_by_judge import BetaByJudge as BetaByJudge
from .checkpoint import AtomicCheckpointIO as AtomicCheckpointIO
from .checkpoint import Checkpoint as Checkpoint
from .completions import Completions as Completions
from .error_control import EControl as EControl
from .export import Export as Export
from .gradient_variance import GradientVariance as GradientVariance
from .predictions import PredictionWriter as PredictionWriter
from .private_pairs import PrivatePairs as PrivatePairs
from .progress import Progress as Progress
from .signals import Requeue as Requeue
from .signals import Terminate as Terminate
from .summary import Summary as Summary
