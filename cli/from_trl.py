"""`grade-from-trl`: what TRL's settings are called here.

Names and defaults are those of TRL 1.16. What a configuration leaves out has TRL's default, which is not always ours.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from grade_lightning.errors import InputError

from .compare.options import as_flags

Names = Mapping[str, str]

TRAINING: Names = {
    "model_name_or_path": "model.policy.path",
    "dtype": "model.policy.dtype",
    "attn_implementation": "model.policy.attn_implementation",
    "gradient_checkpointing": "model.policy.gradient_checkpointing",
    "load_in_4bit": "model.policy.load_in_4bit",
    "lora_r": "model.policy.lora.r",
    "lora_alpha": "model.policy.lora.alpha",
    "lora_dropout": "model.policy.lora.dropout",
    "learning_rate": "model.optimizer.lr",
    "weight_decay": "model.optimizer.weight_decay",
    "adam_epsilon": "model.optimizer.eps",
    "per_device_train_batch_size": "data.batch_size",
    "per_device_eval_batch_size": "data.eval_batch_size",
    "dataloader_num_workers": "data.num_workers",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "max_steps": "trainer.max_steps",
    "num_train_epochs": "trainer.max_epochs",
    "max_grad_norm": "trainer.gradient_clip_val",
    "logging_steps": "trainer.log_every_n_steps",
    "output_dir": "trainer.default_root_dir",
    "seed": "seed_everything",
}
SAMPLING: Names = {
    "max_completion_length": "model.sampler.max_new_tokens",
    "temperature": "model.sampler.temperature",
    "top_p": "model.sampler.top_p",
    "top_k": "model.sampler.top_k",
    "num_generations": "model.num_generations",
    "num_iterations": "model.epochs",
    "beta": "model.kl.beta",
    "chat_template_kwargs": "data.chat_template_kwargs",
}
PREFERENCES: Names = {"beta": "model.beta", "max_length": "data.max_text_tokens"}
NAMES: dict[str, dict[str, str]] = {
    "GRPO": {**TRAINING, **SAMPLING},
    "RLOO": {**TRAINING, **SAMPLING},
    "DPO": {**TRAINING, **PREFERENCES},
    "KTO": {**TRAINING, **PREFERENCES} | {name: f"model.{name}" for name in ("desirable_weight", "undesirable_weight")},
    "SFT": {**TRAINING, "max_length": "data.max_text_tokens"},
    "Reward": {name: ours for name, ours in TRAINING.items() if not ours.startswith("model.policy.")}
    | {"model_name_or_path": "model.backbone", "dtype": "model.dtype", "max_length": "data.max_text_tokens"}
    | {"center_rewards_coefficient": "model.centring"},
}
"""For each trainer of TRL, its names and ours."""
OWN: dict[str, dict[str, str]] = {
    "GRPO": {"epsilon": "model.epsilon", "scale_rewards": "model.scale_rewards"},
    "DrGRPO": {"epsilon": "model.epsilon"},
    "DAPO": {"epsilon": "model.epsilon_low", "epsilon_high": "model.epsilon_high"},
    "GSPO": {"epsilon": "model.epsilon_low", "epsilon_high": "model.epsilon_high"},
    "CISPO": {"epsilon_high": "model.high"},
    "SAPO": {"sapo_temperature_pos": "model.tau_pos", "sapo_temperature_neg": "model.tau_neg"},
    "DPO": {"label_smoothing": "model.label_smoothing"},
}
"""Those of single methods."""
METHODS: dict[str, dict[str, str]] = {
    "GRPO": {"dapo": "DAPO", "grpo": "GRPO", "dr_grpo": "DrGRPO", "cispo": "CISPO", "sapo": "SAPO"},
    "RLOO": {"": "RLOO"},
    "DPO": {"sigmoid": "DPO", "ipo": "IPO"},
    "KTO": {"kto": "KTO"},
    "SFT": {"nll": "SupervisedFineTuning"},
    "Reward": {"": "RewardModel"},
}
"""Our method for TRL's `loss_type`, of which the first is its default."""
_ALWAYS: dict[str, Any] = {
    "weight_decay": 0.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "max_grad_norm": 1.0,
}
_SAMPLED: dict[str, Any] = {"temperature": 1.0, "max_completion_length": 512, "num_iterations": 1}
DEFAULTS: dict[str, dict[str, Any]] = {
    "GRPO": _ALWAYS | _SAMPLED | {"learning_rate": 1e-6, "num_generations": 8, "beta": 0.0, "epsilon": 0.2},
    "RLOO": _ALWAYS | _SAMPLED | {"learning_rate": 1e-6, "num_generations": 2, "beta": 0.05},
    "DPO": _ALWAYS | {"learning_rate": 1e-6, "beta": 0.1, "max_length": 1024},
    "KTO": _ALWAYS | {"learning_rate": 1e-6, "beta": 0.1, "max_length": 1024},
    "SFT": _ALWAYS | {"learning_rate": 2e-5, "max_length": 1024},
    "Reward": _ALWAYS | {"learning_rate": 1e-4, "max_length": 1024, "center_rewards_coefficient": None},
}
"""TRL's, of what decides the result."""
FIXED: dict[str, dict[str, Any]] = {
    "DAPO": {"model.max_retries": 0, "model.overlong_buffer": 0},  # TRL's is the loss alone
    "DPO": {"model.pairs": "data"},
    "IPO": {"model.pairs": "data"},
    "KTO": {"model.labels": "data"},
    "RewardModel": {"model.learns_from": "pairs"},
}
"""What a method needs to do what TRL does."""
_SCHEDULER = "give a torch scheduler as --model.lr_scheduler; without one the rate falls on a straight line to 0"
REASONS: dict[str, str] = {
    "lr_scheduler_type": _SCHEDULER,
    "warmup_steps": _SCHEDULER,
    "warmup_ratio": _SCHEDULER,
    "reward_weights": "rewards and their weights are arguments of --model.reward WeightedSum",
    "reward_funcs": "a function is --model.reward FunctionReward --model.reward.function my_rewards.score",
    "reward_model_name_or_path": "--model.reward SequenceClassifierReward --model.reward.path NAME",
    "dataset_name": "--data.source HubDataset --data.source.name NAME, or LocalFiles for files",
    "use_vllm": "--model.sampler.engine VLLMEngine, or VLLMServer with --model.sampler.engine.base_url",
    "disable_dropout": "a model's dropout is off here; --model.policy.dropout true keeps it",
    "eval_steps": "--trainer.val_check_interval, which counts micro-batches",
    "save_steps": "see --help checkpoint",
    "report_to": "--trainer.logger, any of Lightning's",
}
_NOTHING = {"lr_scheduler_type": "linear", "warmup_steps": 0, "warmup_ratio": 0.0, "use_vllm": False}
"""What is so here anyway."""


@dataclass(frozen=True)
class Converted:
    """A configuration of TRL as options of `grade-fit`.

    Args:
        options: ours and their values; `model` is the method.
        left: what was not converted, and why.
    """

    options: dict[str, Any]
    left: dict[str, str] = field(default_factory=dict)

    @property
    def flags(self) -> list[str]:
        """Arguments of `grade-fit`."""
        return [flag for key, value in self.options.items() for flag in as_flags(key, value)]

    def __str__(self) -> str:
        """The command, then what was not converted, as comments."""
        command = " \\\n    ".join(["grade-fit", *map(shlex.quote, self.flags)])
        return "\n".join([command, *(f"# not converted: {name}: {reason}" for name, reason in self.left.items())])


def from_trl(trainer: str, config: Any) -> Converted:
    """What a configuration of TRL is here.

    Args:
        trainer: `GRPO`, `RLOO`, `DPO`, `KTO`, `SFT` or `Reward`.
        config: a mapping, or TRL's own `GRPOConfig` and so on. What is left out has TRL's default.

    Raises:
        InputError: another trainer, or a loss that is not here.

    Example:
        >>> found = from_trl("GRPO", {"loss_type": "grpo", "beta": 0.04, "use_liger_kernel": True})
        >>> found.options["model"], found.options["model.kl.beta"], found.options["model.num_generations"]
        ('GRPO', 0.04, 8)
        >>> found.left
        {'use_liger_kernel': 'True has no counterpart'}
    """
    if trainer not in NAMES:
        raise InputError(f"{trainer}: no trainer that is converted; there are {', '.join(NAMES)}")
    given = asdict(config) if is_dataclass(config) and not isinstance(config, type) else dict(config)
    values = {name: value for name, value in (DEFAULTS[trainer] | given).items() if value is not None}
    method = _method(trainer, values)
    options: dict[str, Any] = {"model": method, **FIXED.get(method, {})}
    _steps(trainer, method, values, options)
    names = NAMES[trainer] | OWN.get(method, {})
    left: dict[str, str] = {}
    for name, value in values.items():
        if name in names:
            options[names[name]] = value
        elif name in given and (name not in _NOTHING or _NOTHING[name] != value):
            left[name] = REASONS.get(name, f"{value!r} has no counterpart")
    return Converted(options, left)


def _method(trainer: str, values: dict[str, Any]) -> str:
    """Our method; what says which is taken out of the values."""
    known, level = METHODS[trainer], values.pop("importance_sampling_level", "token")
    loss = values.pop("loss_type", next(iter(known)))
    loss = loss[0] if isinstance(loss, list | tuple) and len(loss) == 1 else loss
    if not isinstance(loss, str) or loss not in known:
        raise InputError(f"loss_type: TRL's {loss!r} of {trainer} is not here; there are {', '.join(known)}")
    return "GSPO" if level == "sequence" else known[loss]


def _steps(trainer: str, method: str, values: dict[str, Any], options: dict[str, Any]) -> None:
    """Where a value means something else here, change it; take out what several of them say together."""
    if trainer in ("DPO", "Reward"):  # sequences are counted here, pairs there
        values["per_device_train_batch_size"] *= 2
    if float(values.get("max_steps", -1)) > 0:
        values.pop("num_train_epochs", None)
    else:
        values.pop("max_steps", None)
        if float(values["num_train_epochs"]).is_integer():
            values["num_train_epochs"] = int(values["num_train_epochs"])
    betas = values.pop("adam_beta1", 0.9), values.pop("adam_beta2", 0.999)
    if betas != (0.9, 0.999):
        options["model.optimizer.betas"] = list(betas)
    for name, precision in (("bf16", "bf16-mixed"), ("fp16", "16-mixed")):
        if values.pop(name, False):
            options["trainer.precision"] = precision
    adapters = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}  # TRL's, which only count with use_peft
    if values.pop("use_peft", False):
        values |= adapters | {name: values[name] for name in adapters if name in values}
    else:
        for name in adapters:
            values.pop(name, None)
    if trainer == "Reward":
        values.setdefault("center_rewards_coefficient", 0.0)
    if values.get("top_k") == 0:
        del values["top_k"]
    if trainer in ("GRPO", "RLOO"):
        accumulated = values["gradient_accumulation_steps"]
        drawn = values.get("steps_per_generation", accumulated)
        if drawn % accumulated == 0:
            values.pop("steps_per_generation", None)
            options["model.minibatches"] = drawn // accumulated
    if trainer == "GRPO" and values["beta"]:
        options |= {"model.kl.estimator": "k3", "model.kl.placement": "loss"}
    if method == "GRPO":
        scale = values.get("scale_rewards", "group")
        values["scale_rewards"] = {"True": "group", "False": "none"}.get(str(scale), scale)
    elif method in ("DAPO", "GSPO"):
        values.setdefault("epsilon_high", values["epsilon"])


def main(args: Sequence[str] | None = None) -> None:
    """The command; errors of input are one line and status 2."""
    parser = argparse.ArgumentParser("grade-from-trl", description="Print the command that a configuration of TRL is.")
    parser.add_argument("trainer", help=f"{', '.join(NAMES)}: whose configuration it is.")
    parser.add_argument("config", type=Path, help="A YAML or JSON file, as TRL's command takes it.")
    given = parser.parse_args(args)
    try:
        values = yaml.safe_load(given.config.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise InputError(f"{given.config}: no names with values in it")
        print(from_trl(given.trainer, values))
    except (InputError, OSError, yaml.YAMLError) as error:
        print(f"grade-from-trl: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
