r"""How fast are the engines, and how much of a GRPO step is sampling?

Completions of 16 prompts, four of each, drawn with the same settings from the same weights: some prompts ask for a
word, some for a list, so lengths vary. "generate" is transformers' own, with the whole batch until the last completion
has ended and without log-probabilities (a policy gradient then needs one more pass over them). The others hand over
weights, if they have any of their own, and log-probabilities.

One rollout of each in turn is a round, so that a busy machine slows all alike; medians over rounds. Beside the time on
the clock stands the time of the processor, which others on the machine do not lengthen. Tokens are those of the
completions, up to their ends. The rest of a GRPO step (scores, reference, training pass, AdamW) is measured in
Lightning's Trainer with a rollout that is drawn already.

python benchmarks/engines.py SmolLM2-135M-Instruct --rounds 3
"""

import argparse
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader
from transformers.utils.logging import disable_progress_bar

from grade_lightning.functional.sequences import completion_mask
from grade_lightning.methods import GRPO
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rewards import FunctionReward
from grade_lightning.rollouts import (
    ContinuousBatchingEngine,
    Distribution,
    Engine,
    Sampler,
    TransformersEngine,
    VLLMEngine,
)

ASKED = [
    "Name a colour. One word.",
    "What is 7 + 5? Answer with the number only.",
    "Is water wet? Yes or no.",
    "Name a fruit. One word.",
    "What is the capital of France? One word.",
    "Say hello.",
    "Name three animals.",
    "What day comes after Monday?",
    "Why is the sky blue? One sentence.",
    "Name five cities.",
    "What is a verb? One sentence.",
    "Give two uses of a brick.",
    "Tell me a short story about a fox.",
    "Explain how bread is made.",
    "Write a poem about the sea.",
    "List ten things to pack for a trip.",
]
GROUP = 4
MICRO = 4
"""Micro-batches of a training step."""


class Generate(Engine):
    """`generate` of transformers as it is."""

    @torch.no_grad()
    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        """One completion for each prompt, without log-probabilities."""
        settings = Sampler(distribution.max_new_tokens, temperature=distribution.temperature).settings(policy)
        with policy.evaluating() as model:
            ids = model.generate(prompts.ids, attention_mask=prompts.mask, generation_config=settings)  # type: ignore[operator]
        completions = ids[:, prompts.ids.shape[1] :]
        mask = completion_mask(completions, policy.eos_ids)
        completions = completions.masked_fill(~mask, policy.tokenizer.pad_token_id)
        return Rollout(prompts.ids, prompts.mask, completions, mask, None, policy.tokenizer, {}, policy.eos_ids)


class Drawn(Engine):
    """Gives a rollout that was drawn before."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout

    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        """The rollout."""
        return self.rollout


@dataclass
class Seen:
    """Of each round of an engine."""

    sync: list[float] = field(default_factory=list)
    draw: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class Clock(Callback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.processor: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """It begins."""
        if batch_idx % MICRO == 0:
            self.began = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """It is over."""
        if (batch_idx + 1) % MICRO:
            return
        self.seconds.append(time.perf_counter() - self.began[0])
        self.processor.append(time.process_time() - self.began[1])


def prompts_of(policy: Policy) -> Prompts:
    """The prompts in the chat template, padded on the left."""
    texts = [
        policy.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        for text in ASKED
    ]
    batch = policy.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    return Prompts(batch["input_ids"], batch["attention_mask"])


def rest_of_a_step(policy: Policy, prompts: Prompts, rollout: Rollout, rounds: int) -> Clock:
    """Of GRPO steps in which nothing is drawn."""

    def reward(completions: list[str], **_: Any) -> list[float | None]:
        return [float(len(text)) for text in completions]

    module = GRPO(
        policy=policy,
        reward=FunctionReward(reward),
        sampler=Sampler(rollout.completion_ids.shape[1], engine=Drawn(rollout)),
        num_generations=GROUP,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-9),
    )
    clock = Clock()
    batch = {"input_ids": prompts.ids, "attention_mask": prompts.mask, "columns": {}}
    Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=rounds,
        accumulate_grad_batches=MICRO,  # 64 whole rows at once are 23 GB of activations
        callbacks=[clock],
    ).fit(module, DataLoader([batch] * (MICRO * rounds), batch_size=None))  # type: ignore[arg-type]
    return clock


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="whole steps")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--without", nargs="*", default=[], help="engines to leave out")
    args = parser.parse_args()
    disable_progress_bar()
    policy = Policy(args.model)
    policy.load()
    prompts = prompts_of(policy)
    many = prompts.repeat(torch.full((len(prompts),), GROUP))
    engines: dict[str, Engine] = {
        "generate": Generate(),
        "TransformersEngine": TransformersEngine(),
        "ContinuousBatchingEngine": ContinuousBatchingEngine(),
    }
    if find_spec("vllm") is not None:
        engines["VLLMEngine"] = VLLMEngine(max_length=prompts.ids.shape[1] + args.length)
    engines = {name: engine for name, engine in engines.items() if name not in args.without}
    seen = {name: Seen() for name in engines}
    rollout: Rollout | None = None
    for name, engine in engines.items():
        began = time.perf_counter()
        Sampler(4, engine=engine)(policy, prompts)
        print(f"{name}: first rollout, of 4 tokens, {time.perf_counter() - began:.1f} s", flush=True)
    for number in range(args.rounds):
        for name, engine in engines.items():
            torch.manual_seed(number)
            sampler = Sampler(args.length, engine=engine)
            began, processor = time.perf_counter(), time.process_time()
            engine.sync(policy, number)
            synced = time.perf_counter()
            drawn = sampler.draw(policy, sampler.distribution, many)
            own = seen[name]
            own.sync.append(synced - began)
            own.draw.append(time.perf_counter() - synced)
            own.processor.append(time.process_time() - processor)
            own.tokens.append(int(drawn.lengths.sum()))
            rollout = drawn if drawn.engine_logps is not None else rollout
            print(
                f"round {number}: {name}: {own.sync[-1]:.1f} + {own.draw[-1]:.1f} s ({own.processor[-1]:.1f} s of the "
                f"processor), {own.tokens[-1]} tokens",
                flush=True,
            )
    assert rollout is not None
    clock = rest_of_a_step(policy, prompts, rollout, args.steps)
    rest, processor = median(clock.seconds), median(clock.processor)
    print(f"\n{torch.get_num_threads()} threads; the rest of a GRPO step: {rest:.1f} s ({processor:.1f} s)")
    lengths = sorted(rollout.lengths.tolist())
    print(f"completions of {lengths[0]} to {lengths[-1]} tokens, median {median(lengths):g}\n")
    print("| engine | hand over, s | draw, s | tokens/s | tokens per s of the processor | share of a GRPO step |")
    print("|---|---|---|---|---|---|")
    for name, own in seen.items():
        speeds = [n / (a + b) for n, a, b in zip(own.tokens, own.sync, own.draw, strict=True)]
        clean = [n / a for n, a in zip(own.tokens, own.processor, strict=True)]
        spent = median(own.processor)
        print(
            f"| {name} | {median(own.sync):.2f} | {median(own.draw):.1f} | {_spread(speeds)} | {_spread(clean)} | "
            f"{spent / (spent + processor):.0%} |"
        )


def _spread(values: list[float]) -> str:
    return f"{median(values):.0f} ({min(values):.0f}–{max(values):.0f})"


if __name__ == "__main__":
    main()
