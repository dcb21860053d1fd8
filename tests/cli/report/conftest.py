"""Finished comparisons, made without any training."""

import json
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter

PROMPTS = [f"prompt {i}" for i in range(40)]
STEPS = (0, 49, 99, 149)
LIFT = {"GradeSTE": 0.4, "RLOO": 0.2, "PPO": 0.05}
VERSIONS = {"grade_lightning": "0.1.0", "torch": "2.13.0", "lightning": "2.6.6", "transformers": "5.23"}

differences = import_module("grade_lightning_cli.report.differences")
reading = import_module("grade_lightning_cli.report.reading")
absent = import_module("grade_lightning_cli.report.absent").absent
arms_of = import_module("grade_lightning_cli.report.arms").arms
verdict_of = import_module("grade_lightning_cli.report.verdict").verdict

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(methods, seeds)`: a comparison's folder."""
    return lambda methods=("GradeSTE", "RLOO"), seeds=3: write_study(tmp_path / "study", methods, seeds)


def write_study(folder: Path, methods: Sequence[str], seeds: int) -> Path:
    """A comparison whose last method has a second setting that was not chosen."""
    chosen = {method: {"setting": "default", "objectives": {"default": 0.5}} for method in methods}
    for method in methods:
        for seed in range(1, seeds + 1):
            write_run(place(folder, method, seed), method, seed)
    write_run(folder / "runs" / methods[-1] / "lr=0.001" / "seed_1", methods[-1], 1, tested=False)
    chosen[methods[-1]]["objectives"] = {"default": 0.5, "lr=0.001": 0.4}
    (folder / "chosen.json").write_text(json.dumps(chosen))
    plan(folder, methods, range(1, seeds + 1))
    return folder


def plan(
    folder: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    rates: Sequence[float] = (),
    searched: Sequence[int] = (),
) -> None:
    """Write down what a comparison was to have."""
    known = {"methods": {method: {} for method in methods}, "seeds": list(seeds), "beta": 0.01}
    known["grid_seeds"] = list(searched)
    (folder / "plan.yaml").write_text(yaml.safe_dump(known | {"grid": {"lr": list(rates)} if rates else {}}))


def place(folder: Path, method: str = "RLOO", seed: int = 1) -> Path:
    """Where a run of the chosen setting lies."""
    return folder / "runs" / method / "default" / f"seed_{seed}"


def write_run(folder: Path, method: str, seed: int, tested: bool = True) -> None:
    """A run that is finished, with its logs and its test."""
    rng = np.random.default_rng([seed, len(method)])
    lift = LIFT.get(method, 0.1) + 0.02 * rng.normal()
    log(folder / method / "version_0", lift)
    (folder / method / "version_0" / "config.yaml").write_text("trainer: {max_steps: 150}")
    if tested:
        easy = np.random.default_rng(0).normal(0.45, 0.1, len(PROMPTS))
        rewards = (easy + lift + rng.normal(0, 0.05, len(PROMPTS))).tolist()
        write_test(folder, [row(*pair) for pair in zip(PROMPTS, rewards, strict=True)])
    about = {"method": method, "model": method, "setting": {}, "seed": seed, "command": f"grade-fit --model {method}",
             "commit": "abc123", "versions": VERSIONS, "hardware": "2 cores", "threads": 1}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(about))


def row(prompt: str, reward: float | None, completion: str = "a fine film") -> dict[str, Any]:
    """A line of test.jsonl; the judge dislikes what the reward likes."""
    rewards = {"classifier": reward, "truth": None if reward is None else 1.0 - reward}
    return {"prompt": prompt, "completion": completion, "reward": reward, "kl": 5.0, "rewards": rewards,
            "length": 12, "ended": True, "ref_nll": 30.0}  # fmt: skip


def write_test(folder: Path, rows: list[dict[str, Any]]) -> None:
    """test.json and test.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    rewards = [line["reward"] for line in rows if line["reward"] is not None and np.isfinite(line["reward"])]
    reward = float(np.mean(rewards)) if rewards else None
    test = {"reward": reward, "kl": 5.0, "entropy": 4.5, "perplexity": 110.0, "distinct_2": 0.66, "eos_rate": 0.9,
            "response_length": 12.0, "rewards/classifier": reward, "rewards/truth": 1 - (reward or 0)}  # fmt: skip
    (folder / "test.json").write_text(json.dumps(test))


def log(folder: Path, lift: float, steps: Sequence[int] = STEPS) -> None:
    """TensorBoard logs of 150 steps, a step a second."""
    with SummaryWriter(str(folder)) as writer:
        for i, step in enumerate(steps):
            reward = 0.45 + lift * i / 3
            values = {"reward": reward, "kl": 10 * lift * i, "rewards/classifier": reward, "rewards/truth": 1 - reward}
            for name, value in values.items():
                writer.add_scalar(f"val/{name}", value, step, walltime=1000.5 + (step + 1 if step else 0))
        for step in range(4, 150, 5):
            values = {"train/reward": 0.45 + lift * step / 150, "rewards/classifier": 0.5, "grad/variance": 2.0 + lift,
                      "train/kl": 10 * lift * step / 150, "train/skipped_steps": 2.0, "grad/norm": 1.5,
                      "train/sampled_tokens": 100.0 * (step + 1), "train/reward_calls": 16.0 * (step + 1),
                      "grad/snr": float("nan") if step % 10 == 4 else 0.25, "grad/relative_std": 2.0,
                      "grad/relative_std_low": 1.5, "grad/relative_std_high": float("inf")}  # fmt: skip
            for name, value in values.items():
                writer.add_scalar(name, value, step, walltime=1001 + step)


def arms(folder: Path) -> list[Any]:
    found: list[Any] = arms_of(reading.read([folder]))
    return found


def verdict(folder: Path) -> str:
    found = arms(folder)
    text: str = verdict_of(found, differences.differences(found, "reward"))
    return text


def read(folder: Path) -> tuple[Any, dict[str, Any], str]:
    """The study, its methods by name, and all that is missing as one text."""
    study = reading.read([folder])
    arms = arms_of(study)
    return study, {arm.label: arm for arm in arms}, "\n".join([*study.missing, *absent(arms, study.planned)])


def event_file(run: Path) -> Path:
    (path,) = run.glob("*/version_0/events.out.tfevents*")
    return path


def ending(folder: Path, at: float, logged: float) -> tuple[Any, dict[str, Any], str]:
    """As read() where one run's last validation is said to be other than in its logs, or these end too early."""
    path = place(folder) / "run.json"
    spent = {"sampled_tokens": 15000, "reward_calls": 2400}
    about = json.loads(path.read_text()) | {"validation": {"reward": at}, "spent": spent}
    path.write_text(json.dumps(about))
    (event_file(place(folder)).parent / "config.yaml").write_text(f"trainer: {{max_steps: {logged}}}")
    return read(folder)
