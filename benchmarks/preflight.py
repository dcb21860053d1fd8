"""How far off is the memory that `grade-fit --preflight` estimates?

The estimate comes from two small batches. Beside it stands the peak of one whole step of the real batch, every text as
long as the settings allow, as PyTorch's profiler counts the bytes that are allocated, with weights and optimizer state
added, which are exact. The model is a GPT-2 of 6 × 192 with a vocabulary of 4,096 and random weights; on a CPU.

python benchmarks/preflight.py
"""

import argparse
import io
from contextlib import redirect_stdout
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import model, note, tokenizer
from grade_lightning_cli.config import build
from grade_lightning_cli.preflight import inventory, measure
from grade_lightning_cli.preflight.memory import Memory
from lightning.pytorch import Trainer
from torch.profiler import ProfilerActivity, profile

from grade_lightning.modules import TrainableModule

VOCABULARY, TEXTS = 4_096, 300
RUNS = {
    "`GRPO`, batch 64": "--model=GRPO --data.batch_size=64",
    "`PPO`, batch 64": "--model=PPO --data.batch_size=64",
    "`RLOO` with LoRA (`lora.r 8`), batch 64": "--model=RLOO --data.batch_size=64 --model.policy.lora.r=8",
    "`RLOO` with `gradient_checkpointing`, batch 64": (
        "--model=RLOO --data.batch_size=64 --model.policy.gradient_checkpointing=true"
    ),
    "`SupervisedFineTuning`, batch 32": "--model=SupervisedFineTuning --data.batch_size=32",
    "`DPO`, pairs from rollouts, batch 64": "--model=DPO --data.batch_size=64",
    "`GRPO`, `bf16-mixed`, 2 minibatches of 2 micro-batches of 16": (
        "--model=GRPO --data.batch_size=16 --model.minibatches=2 --trainer.accumulate_grad_batches=2 "
        "--trainer.precision=bf16-mixed"
    ),
}


def brevity(completions: list[str], **_: Any) -> list[float]:
    """A reward that needs no memory."""
    return [-float(len(text)) for text in completions]


class Beside(measure._Measure):
    """Profiles a step of the real batch, too."""

    memory: Memory
    peak: int

    def _memory(self, trainer: Trainer, module: TrainableModule, batch: Any, size: int) -> Memory:
        self.memory = super()._memory(trainer, module, batch, size)
        rows = module.batching.rows(self.data.batch_size)
        longest = measure.longest(batch, rows, inventory.lengths(module, self.data))
        module.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            measure.step(trainer, module, longest)
        results: Any = seen.profiler
        events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
        self.peak = max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
        return self.memory


def compare(args: list[str]) -> tuple[float, float]:
    """Bytes of a run: as estimated, and as seen by the profiler."""
    run = build(args)
    beside = Beside(run.datamodule)
    run.trainer.callbacks, run.trainer.logger = [beside], None
    try:
        with redirect_stdout(io.StringIO()):
            run.trainer.fit(run.model, datamodule=run.datamodule)
    except measure.Done:
        pass
    parts = beside.memory.parts
    stays = sum(parts.values()) - parts["gradients"]  # those are made, and seen, in the step
    return beside.memory.total(run.datamodule.batch_size), beside.peak + stays


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="words of the runs' names; all by default")
    only = parser.parse_args().only
    print("| run | estimate (MB) | profiler (MB) | off |")
    print("|---|--:|--:|--:|")
    with TemporaryDirectory() as folder:
        model(VOCABULARY, layers=6, width=192, positions=256).save_pretrained(folder)
        tokenizer(VOCABULARY - 1).save_pretrained(folder)
        texts = Path(folder, "texts.csv")
        texts.write_text("text\n" + "\n".join(f"w{2 + i} " + "w2 w3 " * 100 for i in range(TEXTS)) + "\n")
        data = f"--data.source=LocalFiles --data.source.train={texts} --data.reward_size=0 --data.val_size=64"
        shared = f"{data} --data.prompt_size=128 --trainer.accelerator=cpu --trainer.enable_progress_bar=false"
        for name, own in RUNS.items():
            if not any(word in name for word in only):
                continue
            note(name)
            args = [*own.split(), *shared.split(), f"--model.policy.path={folder}"]
            if "SupervisedFineTuning" not in name:
                args += ["--model.reward=FunctionReward", "--model.reward.function=preflight.brevity"]
            estimate, seen = compare(args)
            off = estimate / seen - 1
            much = f" {'too much' if off > 0 else 'too little'}" if abs(off) >= 0.0005 else ""
            print(f"| {name} | {estimate / 1e6:.1f} | {seen / 1e6:.1f} | {100 * abs(off):.1f} %{much} |", flush=True)


if __name__ == "__main__":
    main()
