"""From completions to scalars, differentiable or not."""

from .base import DifferentiableReward as DifferentiableReward
from .base import NoReward as NoReward
from .base import Reward as Reward
from .base import Scores as Scores
from .base import WeightedSum as WeightedSum
from .base import unique_name as unique_name
from .classifier import Classifier as Classifier
from .classifier import ClassifierReward as ClassifierReward
from .rules import FunctionReward as FunctionReward
