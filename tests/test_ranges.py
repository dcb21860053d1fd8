"""Every number that a user can set has a range, and one line says so."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest

import grade_lightning.methods
from grade_lightning.budget import KnapsackBudget
from grade_lightning.callbacks import Completions, GradientVariance
from grade_lightning.corrections import EngineCorrection
from grade_lightning.data import BundledProducts, BundledReviews, BundledSums, TextDataModule
from grade_lightning.errors import InputError
from grade_lightning.estimators import Gumbel
from grade_lightning.kl import KL
from grade_lightning.memory import PromptMemory
from grade_lightning.methods import (
    AEPO,
    CAPO,
    CISPO,
    COPO,
    CPL,
    D3S,
    DAPO,
    DCPO,
    DPO,
    DRPO,
    EGPO,
    GPPO,
    GRPO,
    GSPO,
    IPO,
    KTO,
    NGRPO,
    PPO,
    RLOO,
    SAPO,
    STPPO,
    AgenticAEPO,
    DrGRPO,
    Grade,
    GradeSTE,
    KnapsackRL,
    OnlineIPO,
    PromptSearch,
    Reinforce,
    ReinforcePlusPlus,
    RewardModel,
    TurnPPO,
    ZerothOrder,
)
from grade_lightning.modules import PolicyGradientModule, PreferenceModule
from grade_lightning.policies import LoRA
from grade_lightning.rewards import FunctionReward, NoReward, OverlongPenalty, RewardPreference, WeightedSum
from grade_lightning.rollouts import Branching, Environment, RelaxedEngine, Sampler, TransformersEngine
from grade_lightning.schedules import Constant, Cosine, Exponential, Linear
from grade_lightning.selection import DropSolved, DynamicSampling
from grade_lightning.terms import DriftPenalty, EntropyBonus, Proximal


def a_sum(weight: float) -> WeightedSum:
    return WeightedSum([NoReward()], [weight])


def a_function(timeout: float) -> FunctionReward:
    return FunctionReward(print, timeout)


def a_memory(capacity: int) -> PromptMemory:
    return PromptMemory(capacity)


def a_target(target: float) -> KL:
    return KL(0.1, target=target)


def a_branching(**settings: float) -> Branching:
    return Branching(Environment, **settings)  # type: ignore[arg-type]


SEED = 2**32 - 1
WRONG: dict[Callable[..., Any], dict[str, Any]] = {
    Sampler: {"max_new_tokens": [0], "min_new_tokens": [-1, 49], "temperature": [0], "top_k": [0]}
    | {"top_p": [0, 1.1]},
    TransformersEngine: {"block": [0]},
    RelaxedEngine: {"block": [0]},
    a_branching: {
        "share": [-0.1, 1.1],
        "probability": [-0.1, 1.1],
        "penalty": [-0.1, 1.1],
        "weight": [-0.1],
        "window": [0],
    },
    a_memory: {"capacity": [0]},
    OverlongPenalty: {"buffer": [-1]},
    DynamicSampling: {"max_retries": [-1]},
    KL: {"beta": [-0.1], "horizon": [0]},
    a_target: {"target": [0]},
    Gumbel: {"draws": [0]},
    Constant: {"start": [0]},
    **{key: {"start": [0], "end": [0], "steps": [0]} for key in (Linear, Cosine, Exponential)},
    LoRA: {"r": [0], "alpha": [0], "dropout": [-0.1, 1]},
    TextDataModule: {key: [-1.0] for key in ("reward_size", "prompt_size", "val_size", "test_size", "num_workers")}
    | {"batch_size": [0], "eval_batch_size": [0], "max_prompt_chars": [0], "max_prompt_tokens": [1]}
    | {"max_text_tokens": [1], "seed": [-1, SEED + 1]},
    BundledReviews: {"num_train": [0], "num_test": [-1]},
    BundledProducts: {"num_train": [0], "num_test": [-1], "calls": [-0.1, 1.1]},
    BundledSums: {"num_train": [0], "num_test": [-1], "carries": [-0.1, 1.1]},
    Completions: {"every_n_steps": [0], "rows": [0]},
    GradientVariance: {"window": [1], "prompts": [1], "draws": [1], "probe_every_n_steps": [-1], "sketch": [0]},
    a_sum: {"weight": []},
    a_function: {"timeout": [0]},
    GradeSTE: {"beta": [-0.1], "hops": [-1], "tolerance": [-0.1], "num_generations": [0]},
    Grade: {"beta": [-0.1], "top_k": [0], "block": [0]},
    RewardModel: {"hidden": [0], "centring": [-0.1]},
    Reinforce: {"decay": [-0.1, 1.1]},
    ReinforcePlusPlus: {"epsilon": [-0.1], "gamma": [-0.1, 1.1]},
    PPO: {"epsilon": [-0.1], "epsilon_value": [-0.1], "vf_coef": [-0.1]}
    | {key: [-0.1, 1.1] for key in ("gamma", "lam", "decay")},
    RLOO: {"num_generations": [0, 1], "epochs": [0], "minibatches": [0]},
    GRPO: {"epsilon": [-0.1]},
    DrGRPO: {"epsilon": [-0.1]},
    DAPO: {"epsilon_low": [-0.1, 1.1], "epsilon_high": [-0.1], "max_retries": [-1], "overlong_buffer": [-1]},
    GSPO: {"epsilon_low": [-0.1, 1.1], "epsilon_high": [-0.1]},
    GPPO: {
        "epsilon_low": [-0.1, 1.1],
        "epsilon_high": [-0.1],
        "low_scale": [-0.1],
        "high_scale": [-0.1],
        "dual": [0.9],
        "spread": [0],
    },
    Proximal: {"eta": [0]},
    EntropyBonus: {"coefficient": [-0.1], "target": [-0.1], "step": [-0.1]},
    EngineCorrection: {"cap": [0.9]},
    CAPO: {"max_objective_change": [0], "max_policy_change": [0], "epsilon": [-0.1]},
    AgenticAEPO: {"entropy_scale": [-0.1], "epsilon_low": [-0.1, 1.1], "epsilon_high": [-0.1]},
    **{
        method: {key: [-0.1] for key in ("epsilon", "epsilon_value", "vf_coef")}
        | {key: [-0.1, 1.1] for key in ("gamma", "lam", "decay")}
        for method in (TurnPPO, STPPO)
    },
    AEPO: {key: [0] for key in ("temperature_high", "temperature_low")}
    | {key: [-0.1] for key in ("target_entropy", "weight", "most", "epsilon")}
    | {"correct": []},
    COPO: {"sharpness": [0], "threshold": [], "epsilon": [-0.1], "dual": [0.9]},
    CISPO: {"low": [-0.1, 1.1], "high": [0.9]},
    SAPO: {"tau_pos": [-0.1], "tau_neg": [-0.1]},
    DCPO: {"epsilon_low": [-0.1], "epsilon_high": [-0.1], "dual": [0.9], "memory": [-1]},
    NGRPO: {"best": [math.inf], "virtual": [-1], "epsilon_low": [-0.1, 1.1], "epsilon_high": [-0.1]},
    KnapsackRL: {"min_rollouts": [0], "max_rollouts": [1], "epsilon_low": [-0.1, 1.1], "epsilon_high": [-0.1]}
    | {"threshold": [math.inf], "bound": [0], "dual": [0.9]},
    KnapsackBudget: {"threshold": [math.inf], "least": [0], "most": [1], "known_after": [0], "newest": [0]}
    | {"capacity": [0]},
    D3S: {"epsilon": [-0.1]},
    DRPO: {"threshold": [math.inf], "length_temperature": [0], "failure_temperature": [0], "slack": [-1e-4]}
    | {"drift_penalty": [-1]},
    DriftPenalty: {"coefficient": [-1], "slack": [-1e-4]},
    DropSolved: {"best": [math.inf]},
    DPO: {"label_smoothing": [-0.1, 0.6], "trace_weight": [-0.1, 1.1]},
    IPO: {"beta": [0], "num_generations": [1]},
    CPL: {"alpha": [0], "contrastive_bias": [0, 1.1], "bc_coeff": [-0.1]},
    OnlineIPO: {"beta": [0], "num_generations": [1]},
    EGPO: {"beta": [0], "num_generations": [1]},
    RewardPreference: {"temperature": [0]},
    KTO: {"beta": [0], "desirable_weight": [-1], "undesirable_weight": [-1], "threshold": [math.inf]},
    PromptSearch: {"candidates": [0], "tries": [0], "fluency": [-0.1], "hops": [-1]},
    ZerothOrder: {"beta": [-0.1], "epsilon": [0], "directions": [0], "clip": [0]},
}
CASES = [
    (make, name, value)
    for make, options in WRONG.items()
    for name, values in options.items()
    for value in (*values, math.nan)
]


@pytest.mark.parametrize(
    ("make", "name", "value"), CASES, ids=[f"{make.__name__}-{name}-{value}" for make, name, value in CASES]
)
def test_what_is_out_of_range_is_one_line(make: Callable[..., Any], name: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"^([\w.]+\.)?{name} = {value}: (must be|.* give) [^\n]+$"):
        make(**{name: value})


@pytest.mark.parametrize("make", [a_sum, Sampler, KL])
def test_infinity_is_named(make: Callable[..., Any]) -> None:
    name = {a_sum: "weight", Sampler: "temperature", KL: "beta"}[make]
    with pytest.raises(InputError, match=rf"{name} = inf: must be .*below inf"):
        make(**{name: math.inf})


@pytest.mark.parametrize(
    ("make", "edges"),
    [
        (Sampler, {"min_new_tokens": 48, "top_p": 1.0, "top_k": 10**9}),
        (PPO, {"epsilon": math.inf, "epsilon_value": math.inf, "gamma": 0.0, "lam": 1.0, "decay": 0.0, "vf_coef": 0.0}),
        (CISPO, {"low": 1.0, "high": 1.0}),
        (GPPO, {"epsilon_low": 1.0, "epsilon_high": 0.0, "dual": math.inf}),
        (DPO, {"label_smoothing": 0.5}),
        (TextDataModule, {"seed": SEED, "test_size": 0}),
    ],
)
def test_the_edges_are_in_range(make: Callable[..., Any], edges: dict[str, Any]) -> None:
    make(**edges)


def test_no_number_is_left_out() -> None:
    """Of the methods and what they are made of: an option whose type is a number stands in the table above."""
    shared = {"policy", "reward", "judges", "sampler", "kl", "optimizer", "lr_scheduler", "self", "kwargs"}
    inherited = {"beta", "num_generations", "epochs", "minibatches"}  # checked by their base, in two of them above
    for method in vars(grade_lightning.methods).values():
        if isinstance(method, type):
            options = inspect.signature(method).parameters.values()
            numbers = {
                o.name for o in options if isinstance(o.default, (int, float)) and not isinstance(o.default, bool)
            }
            own = issubclass(method, (PolicyGradientModule, PreferenceModule))
            left = numbers - shared - (inherited if own else set()) - set(WRONG.get(method, {}))
            assert not left, f"{method.__name__}: {left}"
