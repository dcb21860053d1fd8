"""Align language models through their sampled tokens (GRADE-STE) or by policy gradients, as Lightning modules."""

from grade_lightning.advantages import OptimalTokenBaseline, grouped
from grade_lightning.callbacks import Checkpoint, Completions, Export, GradientVariance, PredictionWriter, Summary
from grade_lightning.columns import Columns
from grade_lightning.corrections import EngineCorrection
from grade_lightning.data import BundledReviews, HubDataset, LocalFiles, Source, TextDataModule
from grade_lightning.errors import DivergenceError, InputError
from grade_lightning.estimators import Gumbel, ReinMax, StraightThrough, TokenEstimator
from grade_lightning.gates import by_advantage
from grade_lightning.kl import KL
from grade_lightning.memory import PromptMemory
from grade_lightning.methods import (
    AEPO,
    CAPO,
    CISPO,
    COPO,
    DAPO,
    DPO,
    GPPO,
    GRPO,
    GSPO,
    IPO,
    PPO,
    RLOO,
    SAPO,
    STPPO,
    AgenticAEPO,
    DrGRPO,
    Grade,
    GradeSTE,
    Reinforce,
    ReinforcePlusPlus,
    RewardModel,
    SupervisedFineTuning,
    TurnPPO,
)
from grade_lightning.modules import AlignmentModule, PolicyGradientModule, PreferenceModule, TrainableModule
from grade_lightning.policies import LoRA, Pass, Policy
from grade_lightning.records import Batching, Experience, Prompts, Rollout, Scores, StepOutput, TokenStats
from grade_lightning.rewards import (
    ClassifierReward,
    DifferentiableReward,
    FunctionReward,
    OverlongPenalty,
    Reward,
    WeightedSum,
)
from grade_lightning.rollouts import Distribution, Engine, Environment, Sampler, TransformersEngine, Turns
from grade_lightning.schedules import Constant, Cosine, Exponential, Linear, Schedule
from grade_lightning.selection import DynamicSampling, Selection
from grade_lightning.stateful import Stateful
from grade_lightning.strategies import FSDP2
from grade_lightning.terms import Critic, EntropyBonus, Proximal, Term, TokenTerm

__version__ = "0.1.0"

__all__ = [
    "AEPO",
    "CAPO",
    "CISPO",
    "COPO",
    "DAPO",
    "DPO",
    "FSDP2",
    "GPPO",
    "GRPO",
    "GSPO",
    "IPO",
    "KL",
    "PPO",
    "RLOO",
    "SAPO",
    "STPPO",
    "AgenticAEPO",
    "AlignmentModule",
    "Batching",
    "BundledReviews",
    "Checkpoint",
    "ClassifierReward",
    "Columns",
    "Completions",
    "Constant",
    "Cosine",
    "Critic",
    "DifferentiableReward",
    "Distribution",
    "DivergenceError",
    "DrGRPO",
    "DynamicSampling",
    "Engine",
    "EngineCorrection",
    "EntropyBonus",
    "Environment",
    "Experience",
    "Exponential",
    "Export",
    "FunctionReward",
    "Grade",
    "GradeSTE",
    "GradientVariance",
    "Gumbel",
    "HubDataset",
    "InputError",
    "Linear",
    "LoRA",
    "LocalFiles",
    "OptimalTokenBaseline",
    "OverlongPenalty",
    "Pass",
    "Policy",
    "PolicyGradientModule",
    "PredictionWriter",
    "PreferenceModule",
    "PromptMemory",
    "Prompts",
    "Proximal",
    "ReinMax",
    "Reinforce",
    "ReinforcePlusPlus",
    "Reward",
    "RewardModel",
    "Rollout",
    "Sampler",
    "Schedule",
    "Scores",
    "Selection",
    "Source",
    "Stateful",
    "StepOutput",
    "StraightThrough",
    "Summary",
    "SupervisedFineTuning",
    "Term",
    "TextDataModule",
    "TokenEstimator",
    "TokenStats",
    "TokenTerm",
    "TrainableModule",
    "TransformersEngine",
    "TurnPPO",
    "Turns",
    "WeightedSum",
    "by_advantage",
    "grouped",
]
