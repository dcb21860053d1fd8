"""From completions to scalars, differentiable or not."""

from .base import Reward as Reward
from .classifier import Classifier as Classifier
from .classifier import ClassifierReward as ClassifierReward
from .differentiable import DifferentiableReward as DifferentiableReward
from .functions import FunctionReward as FunctionReward
from .group_normalized import GroupNormalizedSum as GroupNormalizedSum
from .improvement import ImprovementReward as ImprovementReward
from .judge import JudgeReward as JudgeReward
from .length import OverlongPenalty as OverlongPenalty
from .no_reward import NoReward as NoReward
from .pairwise import FunctionPreference as FunctionPreference
from .pairwise import JudgePreference as JudgePreference
from .pairwise import PairwiseJudge as PairwiseJudge
from .pairwise import RewardPreference as RewardPreference
from .remote_judge import RemoteJudge as RemoteJudge
from .sequence_classifier import SequenceClassifier as SequenceClassifier
from .sequence_reward import SequenceClassifierReward as SequenceClassifierReward
from .similarity import SimilarityReward as SimilarityReward
from .translated import TranslatedReward as TranslatedReward
from .verifiers import ExactMatch as ExactMatch
from .verifiers import FormatReward as FormatReward
from .verifiers import JSONSchema as JSONSchema
from .verifiers import MathAnswer as MathAnswer
from .verifiers import NumericMatch as NumericMatch
from .verifiers import Verifier as Verifier
from .weighted_sum import WeightedSum as WeightedSum
