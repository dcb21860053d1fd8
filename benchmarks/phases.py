"""Where does the time of a step go?

Every method names its phases for `torch.profiler`: sampling, reward, policy (forward pass), reference (forward pass),
hops, vocabulary. Beside them here: the backward pass and the optimizer. Milliseconds of a step, and shares of it, for
the model and the sizes of step.py; on a GPU the time of its kernels.

python benchmarks/phases.py
"""

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import mean
from typing import Any

from common import Prompts, Words, policy, wait
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import DataLoader

from grade_lightning.methods import GRPO, RLOO, GradeSTE
from grade_lightning.modules import AlignmentModule
from grade_lightning.rollouts import Sampler

METHODS: dict[str, Callable[..., AlignmentModule]] = {"GradeSTE": partial(GradeSTE, hops=2), "RLOO": RLOO, "GRPO": GRPO}
PHASES = {
    "sampling": "sampling",
    "reward": "reward",
    "policy": "policy, forward",
    "reference": "reference, forward",
    "hops": "hops",
    "vocabulary": "vocabulary",
    "backward": "backward",
    "optimizer": "optimizer, logging",
}


class Phases(Callback):
    """Profiles all steps but the first ones."""

    def __init__(self, device: str, warm: int) -> None:
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
        self.device, self.warm, self.profile = device, warm, profile(activities=activities)
        self.seconds: list[float] = []
        self.began = 0.0

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Begin."""
        if trainer.global_step == self.warm:
            self.profile.start()
        wait(self.device)
        self.began = time.perf_counter()

    def on_before_backward(self, *args: Any) -> None:
        """Name the backward pass, too."""
        self.backward = record_function("backward")
        self.backward.__enter__()

    def on_after_backward(self, *args: Any) -> None:
        """End it."""
        self.backward.__exit__(None, None, None)

    def on_before_optimizer_step(self, *args: Any) -> None:
        """What torch itself calls the optimizer's step is the whole of it: Lightning runs the rest inside."""
        self.optimizer = record_function("optimizer")
        self.optimizer.__enter__()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """End."""
        self.optimizer.__exit__(None, None, None)
        wait(self.device)
        if trainer.global_step > self.warm:
            self.seconds.append(time.perf_counter() - self.began)

    def on_train_end(self, *args: Any) -> None:
        """Stop."""
        self.profile.stop()

    def milliseconds(self) -> dict[str, float]:
        """Of each phase in a step, and of what is left."""
        kind = "device_time_total" if self.device == "cuda" else "cpu_time_total"
        events = {event.key: getattr(event, kind) / 1000 / len(self.seconds) for event in self.profile.key_averages()}
        found = {name: events.get(key, 0.0) for key, name in PHASES.items()}
        whole = 1000 * mean(self.seconds)
        return found | {"everything else": whole - sum(found.values()), "step": whole}


def main() -> None:
    """Profile, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm", type=int, default=2, help="steps that do not count")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=8_000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    o = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    columns: dict[str, dict[str, float]] = {}
    for name, method in METHODS.items():
        seed_everything(1, verbose=False)
        network = policy(o.vocabulary, layers=o.layers, width=o.width, positions=32 + o.length)
        module = method(policy=network, reward=Words(o.vocabulary), sampler=Sampler(max_new_tokens=o.length))
        phases = Phases(o.device, o.warm)
        trainer = Trainer(
            accelerator="gpu" if o.device == "cuda" else "cpu",
            devices=1,
            max_steps=o.warm + o.steps,
            callbacks=[phases],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        prompts = Prompts(o.batch // getattr(module, "num_generations", 1), o.vocabulary)
        trainer.fit(module, DataLoader(prompts, batch_size=None))
        columns[name] = phases.milliseconds()
    print("| phase | " + " | ".join(f"{name}, ms | share" for name in columns) + " |")
    print("|---" + "|--:" * (2 * len(columns)) + "|")
    for phase in next(iter(columns.values())):
        cells = [f"{c[phase]:.0f} | {c[phase] / c['step']:.0%}" for c in columns.values()]
        print(f"| {phase} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
