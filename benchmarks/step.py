r"""How long does a step take, and how much memory, beside TRL and beside GRADE unrolled?

A step is all of it: sampling, reward, reference, loss, backward pass, optimizer. Every contestant trains the same GPT-2
of random weights on the same number of completions (those with groups, four of each prompt), all of full length: the
end-of-sequence token has no logit. PPO's step is one batch of completions with its four updates. Ours and the
unrolled ones run in Lightning's Trainer, TRL's in its own with its own optimizer (no gradient checkpointing, no
clipping); the reward is a table look-up. Ours run the reference in each step, except `RLOO, no reference`, which is a
step between two that run it (`kl.every`); TRL's run it only where β > 0. `RLOO, weights as they are` samples without
copies of the weights in another layout.

The unrolled ones have the gradient of `GradeSTE(estimator=Gumbel(), hops="exact", kl_prefix="policy")` by autograd
through straight-through tokens: "cache" keeps one graph through the key-value cache; "as published" runs the whole
prefix again at every step, with the model's own gradient checkpointing (each layer is computed again in the backward
pass) and the logits of all positions; "one checkpoint" does so with one checkpoint for each step and one position's
logits, the least memory that running the prefix again can have.

A line says what matrix products of these shapes reach here, and how long those of RLOO's training pass (policy forward
and backward, reference forward, head) take at that rate: what a step takes beyond it is sampling, and work that is no
product. `--model FOLDER` takes the weights and the tokenizer of a real model, with `--lora` adapters of that rank on
its attention projections; products for gradients of weights are then left out of the line. With `--ragged` completions
end by chance, after a third of `--length` on average if nothing cut them off; ours alone.

Each contestant is a process of its own; ours keep freed memory, as the commands do, TRL's with `--keep-memory` alone.
One step of each in turn is a round, so that a busy machine slows all alike; medians over rounds, and medians
of the ratio to another contestant of the same round, from six rounds on with a 95 % interval of that median (by order,
whatever the distribution). Memory is the peak in the second step of another process,
above what was there before it without gradients (weights, reference, optimizer state): tensors on a GPU, else resident
memory with the C library told to give freed tensors back at once.

python benchmarks/step.py --rounds 10
python benchmarks/step.py --model my/SmolLM2-135M-Instruct --lora 16 --no-memory --only RLOO "TRL RLOO, β = 0.05"
python benchmarks/step.py --rounds 1 --warm 0 --no-memory --batch 8 --length 256 \
  --only "GradeSTE, hops 2" "unrolled, as published" --beside "GradeSTE, hops 2"
"""

import argparse
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from common import HUGE_ALLOCATIONS, Memory, Prompts, Words, matrix_rate, model, note, policy, tokenizer, wait
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from scipy.stats import quantile_test
from torch import Tensor
from torch.nn.functional import gumbel_softmax
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from grade_lightning.allocator import keep_freed_memory
from grade_lightning.functional import divergences, sequences
from grade_lightning.kl import KL
from grade_lightning.methods import GRPO, PPO, RLOO, Grade, GradeSTE
from grade_lightning.modules import AlignmentModule
from grade_lightning.policies import LoRA, PackedPass, Pass, Policy, SharedPrefixPass, WholePass
from grade_lightning.records import Experience, Rollout, Scores, StepOutput, TokenStats
from grade_lightning.rewards import DifferentiableReward
from grade_lightning.rollouts import Sampler, TransformersEngine

GROUP, ENDLESS = 4, 10**6
PASSES: dict[str, type[Pass]] = {one.__name__: one for one in (WholePass, PackedPass, SharedPrefixPass)}


# ---- GRADE unrolled -----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Unrolling(Experience):
    """Straight-through completions."""

    logits: Tensor
    """(B, T, V), with graph."""
    reward: Tensor
    """(B,), with graph."""


class Unrolled(AlignmentModule):
    """GRADE-STE by autograd: the sampled token, as a straight-through Gumbel-softmax, is the next input.

    Args:
        prefix: `cache` keeps keys and values, and with them the graph; `published` and `checkpoint` run the whole
            prefix again at every step.
        tau: temperature τ of the relaxed tokens.
        beta: coefficient β of the exact KL.
        **kwargs: those of :class:`~grade_lightning.modules.AlignmentModule`.
    """

    backpropagates_reward = True

    def __init__(
        self, prefix: Literal["cache", "published", "checkpoint"], tau: float = 1.0, beta: float = 0.002, **kwargs: Any
    ) -> None:
        super().__init__(beta=beta, optimizer=lambda params: torch.optim.AdamW(params, lr=3e-4), **kwargs)
        self.prefix, self.tau = prefix, tau

    def configure_model(self) -> None:
        """With the model's own checkpointing, if that is asked for."""
        super().configure_model()
        if self.prefix == "published":
            self.policy.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def collect(self, batch: dict[str, Any]) -> Unrolling:
        """Sample with one graph; the reward is read once, of the straight-through tokens."""
        assert isinstance(self.reward, DifferentiableReward)
        prompts, table = batch["input_ids"], self.reward.table()
        logits, tokens = (torch.stack(steps, dim=1) for steps in zip(*self.unroll(prompts), strict=True))
        ids, mask = tokens.argmax(-1), torch.ones_like(tokens[..., 0], dtype=torch.bool)
        embeddings = torch.cat([table[prompts], tokens.to(table.dtype) @ table], dim=1)
        reward = self.reward.score_embeddings(embeddings, torch.cat([batch["attention_mask"], mask], dim=1))
        rollout = Rollout(
            prompt_ids=prompts,
            prompt_mask=batch["attention_mask"],
            completion_ids=ids,
            completion_mask=mask,
            engine_logps=sequences.token_logps(logits.detach().float().log_softmax(-1), ids),
            tokenizer=self.tokenizer,
            eos_ids=self.policy.eos_ids,
        )
        return Unrolling(rollout, Scores(reward.detach(), {}), logits=logits, reward=reward)

    def unroll(self, prompts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (B, V) and straight-through token (B, V) of each step."""
        network, table, cache = self.policy.model, self.policy.base.get_input_embeddings().weight, DynamicCache()
        assert isinstance(table, Tensor)
        inputs = table[prompts]
        for _ in range(self.sampler.max_new_tokens):
            if self.prefix == "cache":
                output = network(inputs_embeds=inputs, use_cache=True, **{self.policy.cache_name: cache})
            elif self.prefix == "published":
                output = network(inputs_embeds=inputs, use_cache=False)
            else:
                run = partial(network, use_cache=False, logits_to_keep=1)
                output = checkpoint(run, inputs_embeds=inputs, use_reentrant=False)
            logits = output.logits[:, -1].clone()  # a view would keep the logits of all positions
            token = gumbel_softmax(logits, self.tau, hard=True)
            yield logits, token
            fed = (token @ table).unsqueeze(1)
            inputs = fed if self.prefix == "cache" else torch.cat([inputs, fed], dim=1)

    def loss(self, experience: Experience) -> StepOutput:
        """Reward − β KL; the reference reads the sampled tokens, without a graph."""
        assert isinstance(experience, Unrolling)
        rollout = experience.rollout
        inputs = self.policy.frozen.embed(rollout.ids[:, :-1])
        with torch.no_grad():
            reference = self.policy.frozen.logits(inputs, rollout.mask[:, :-1], rollout.completion_ids.shape[1])
        logps, ref_logps = (self.sampler.distribution.log_distribution(x) for x in (experience.logits, reference))
        kl = divergences.categorical_kl(logps, ref_logps)
        own, others = (sequences.token_logps(x, rollout.completion_ids) for x in (logps.detach(), ref_logps))
        loss = self.beta * kl.sum(-1).mean() - experience.reward.mean()
        assert rollout.engine_logps is not None
        entropy = sequences.entropy(logps.detach())
        return StepOutput(loss, TokenStats(rollout.engine_logps, own - others, kl.detach(), entropy, others))


# ---- contestants: a training that waits for its turn before every step ----------------------------------------------


class Contestant(ABC):
    """A training of which each step waits for a line, and answers with another.

    Args:
        o: the settings.
    """

    def __init__(self, o: argparse.Namespace) -> None:
        self.o = o
        self._memory: Memory | None = None
        self._ready, self._began = False, 0.0

    @abstractmethod
    def train(self) -> None:
        """Train without end, with :meth:`begin` and :meth:`end` around every step."""

    @abstractmethod
    def network(self) -> torch.nn.Module:
        """What is trained."""

    def begin(self) -> None:
        """Wait for the turn, and start the clock."""
        if not self._ready:
            self._ready = True
            print("{}", file=self.o.answers, flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # nobody asks for more
        if self.o.peak:
            self.network().zero_grad(set_to_none=True)
            self._memory = Memory(self.o.device).__enter__()
        wait(self.o.device)
        self._began = clock(self.o)

    def end(self) -> None:
        """Stop the clock, and hand the turn back."""
        wait(self.o.device)
        answer = {"seconds": clock(self.o) - self._began}
        if self._memory is not None:
            self._memory.__exit__()
            answer["megabytes"] = self._memory.peak / 1e6
        print(json.dumps(answer), file=self.o.answers, flush=True)


class Process:
    """A contestant in a process of its own, as its user would run it, beside whatever others are waiting for.

    Args:
        name: of the contestant.
        peak: measure its memory, with the C library told to give freed tensors back at once.
    """

    def __init__(self, name: str, peak: bool = False) -> None:
        command = [sys.executable, __file__, *sys.argv[1:], "--contestant", name, *(["--peak"] if peak else [])]
        environment = os.environ | (HUGE_ALLOCATIONS if peak else {})
        self.name = name
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def step(self) -> dict[str, float]:
        """Seconds of one step, and megabytes if these are wanted."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, float]:
        """What it says next; the first time that it is ready."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: stopped with {self._process.wait()}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


class Ours(Contestant):
    """A module of this library, or one made like them, in Lightning's Trainer."""

    def __init__(self, o: argparse.Namespace, make: Callable[..., AlignmentModule], **settings: Any) -> None:
        super().__init__(o)
        seed_everything(o.seed, verbose=False)
        self.rows = o.batch // settings.get("num_generations", 1)
        engine = TransformersEngine(prepack=settings.pop("prepack", True))
        sampler = Sampler(max_new_tokens=o.length, engine=engine)
        training_pass = PASSES[o.training_pass]()
        if o.model is None:
            learner = policy(o.vocabulary, training_pass=training_pass, **size(o))
        else:
            learner = Policy(o.model, o.lora and LoRA(o.lora, dropout=0.0), o.dtype, training_pass=training_pass)
            learner.load()
            learner.eos_ids = []
        if o.ragged:
            learner.eos_ids = list(range(2, 2 + max(1, 3 * o.vocabulary // o.length)))
        self.module = make(policy=learner, reward=Words(o.vocabulary), sampler=sampler, **settings)

    def train(self) -> None:
        """By `Trainer.fit`."""
        trainer = Trainer(
            accelerator="gpu" if self.o.device == "cuda" else "cpu",
            devices=1,
            precision=self.o.precision,
            max_steps=ENDLESS,
            callbacks=[Turns(self, self.module.batching.steps_per_batch)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        prompts = Prompts(self.rows, self.o.vocabulary, self.o.prompt)
        trainer.fit(self.module, DataLoader(prompts, batch_size=None))

    def network(self) -> torch.nn.Module:
        """The module."""
        return self.module


class Turns(Callback):
    """Begins and ends a step of a contestant, of as many batches as a window is visited."""

    def __init__(self, contestant: Contestant, visits: int) -> None:
        self.contestant, self.visits = contestant, visits

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin."""
        if batch_idx % self.visits == 0:
            self.contestant.begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End."""
        if (batch_idx + 1) % self.visits == 0:
            self.contestant.end()


class TRL(Contestant):
    """A trainer of TRL."""

    def __init__(self, o: argparse.Namespace, name: str, beta: float) -> None:
        super().__init__(o)
        import datasets
        import trl

        seed_everything(o.seed, verbose=False)
        self.folder = tempfile.TemporaryDirectory()  # the reference is read from it
        words, reward = tokenizer(o.vocabulary), Words(o.vocabulary)
        if o.model is None:
            model(o.vocabulary, **size(o)).save_pretrained(self.folder.name)
        else:
            words = AutoTokenizer.from_pretrained(o.model)
        ids = torch.tensor([i for i in range(2, min(o.vocabulary, 4096)) if words.encode(words.decode([i])) == [i]])
        rows = ids[torch.randint(len(ids), (4096, o.prompt))].tolist()
        texts = [" ".join(words.convert_ids_to_tokens(row)) if o.model is None else words.decode(row) for row in rows]
        prompts = [text for text in texts if len(words.encode(text)) == o.prompt]

        def share(completion_ids: list[list[int]], **columns: Any) -> list[float]:
            tokens = torch.tensor(completion_ids)
            scores: list[float] = reward.score_embeddings(reward.table()[tokens], torch.ones_like(tokens)).tolist()
            return scores

        config = getattr(trl, f"{name}Config")(
            output_dir=self.folder.name,
            per_device_train_batch_size=o.batch,
            num_generations=GROUP,
            max_completion_length=o.length,
            beta=beta,
            num_iterations=1,
            learning_rate=3e-4,
            max_grad_norm=0.0,
            max_steps=ENDLESS,
            gradient_checkpointing=False,
            bf16=o.precision == "bf16-mixed",
            use_cpu=o.device == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            model_init_kwargs={"dtype": o.dtype},
            generation_kwargs={"min_new_tokens": o.length},
        )
        contestant = self

        class Ticks(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                contestant.begin()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                contestant.end()

        self.trainer = getattr(trl, f"{name}Trainer")(
            model=o.model or self.folder.name,
            peft_config=adapters(o),
            reward_funcs=share,
            args=config,
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
            processing_class=words,
            callbacks=[Ticks()],
        )

    def train(self) -> None:
        """By its own `train`."""
        self.trainer.train()

    def network(self) -> torch.nn.Module:
        """The policy."""
        network: torch.nn.Module = self.trainer.model
        return network


CONTESTANTS: dict[str, Callable[[argparse.Namespace], Contestant]] = {
    "GradeSTE": lambda o: Ours(o, GradeSTE),
    "GradeSTE, hops 2": lambda o: Ours(o, GradeSTE, hops=2),
    "GradeSTE, hops 4": lambda o: Ours(o, GradeSTE, hops=4),
    "GradeSTE, exact": lambda o: Ours(o, GradeSTE, hops="exact"),
    "Grade (soft)": lambda o: Ours(o, Grade),
    "RLOO": lambda o: Ours(o, RLOO, num_generations=GROUP),
    "RLOO, no reference": lambda o: Ours(o, RLOO, num_generations=GROUP, kl=KL(0.0, every=ENDLESS)),
    "RLOO, weights as they are": lambda o: Ours(o, RLOO, num_generations=GROUP, prepack=False),
    "GRPO": lambda o: Ours(o, GRPO, num_generations=GROUP),
    "PPO, 4 updates": lambda o: Ours(o, PPO, num_generations=GROUP),
    "unrolled, cache": lambda o: Ours(o, partial(Unrolled, prefix="cache")),
    "unrolled, as published": lambda o: Ours(o, partial(Unrolled, prefix="published")),
    "unrolled, one checkpoint": lambda o: Ours(o, partial(Unrolled, prefix="checkpoint")),
    "TRL RLOO, β = 0": lambda o: TRL(o, "RLOO", 0.0),
    "TRL RLOO, β = 0.05": lambda o: TRL(o, "RLOO", 0.05),
    "TRL GRPO, β = 0": lambda o: TRL(o, "GRPO", 0.0),
    "TRL GRPO, β = 0.04": lambda o: TRL(o, "GRPO", 0.04),
}


def adapters(o: argparse.Namespace) -> Any:
    """Peft's settings of what ours has; None: all weights are trained."""
    if not o.lora:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=o.lora, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )


def size(o: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the model."""
    dtype = getattr(torch, o.dtype)
    return {"layers": o.layers, "width": o.width, "positions": o.prompt + o.length, "dtype": dtype}


def clock(o: argparse.Namespace) -> float:
    """Seconds that have passed, or that this process has computed."""
    return time.process_time() if o.clock == "cpu" else time.perf_counter()


def bound(o: argparse.Namespace) -> str:
    """What the matrix products of RLOO's training pass would take at the rate that such products reach here."""
    tokens, sampled, dtype = o.batch * (o.prompt + o.length - 1), o.batch * o.length, getattr(torch, o.dtype)

    def now() -> float:
        return clock(o)

    body = matrix_rate(tokens, o.width, 4 * o.width, o.device, dtype, now)
    head = matrix_rate(sampled, o.width, o.vocabulary, o.device, dtype, now)
    passes = (3, 4) if o.lora else (4, 5)  # without gradients of weights there is one product less
    products = 2 * o.body * tokens / body, 2 * o.width * o.vocabulary * sampled / head
    seconds = sum(count * one for count, one in zip(passes, products, strict=True))
    rates = f"{body / 1e9:.0f} GFLOP/s in the body, {head / 1e9:.0f} in the head"
    return f"matrix products: {rates}; RLOO's training pass at that rate: {seconds:.3f} s"


# ---- measuring --------------------------------------------------------------------------------------------------


def times(o: argparse.Namespace, names: list[str]) -> dict[str, list[float]]:
    """Seconds of the steps of each contestant, one for each round."""
    found: dict[str, list[float]] = {name: [] for name in names}
    contestants = {name: Process(name) for name in names}
    for contestant in contestants.values():  # all are loaded before the first is timed
        contestant.answer()
    for turn in range(o.warm + o.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody is always the first
            seconds = contestants[name].step()["seconds"]
            note(f"round {turn + 1 - o.warm} of {o.rounds}, {name}: {seconds:.3f} s")
            if turn >= o.warm:
                found[name].append(seconds)
    for contestant in contestants.values():
        contestant.close()
    return found


def ratio(seconds: list[float], others: list[float]) -> str:
    """Median of what one takes over what another takes in the same round, and its interval."""
    found = [x / y for x, y in zip(seconds, others, strict=True)]
    low, high = quantile_test(found, p=0.5).confidence_interval(0.95)
    return f"{median(found):.2f}" + ("" if math.isnan(low) or low == high else f" ({low:.2f}–{high:.2f})")


def peak(name: str) -> float:
    """Megabytes of a contestant's second step."""
    process = Process(name, peak=True)
    process.answer()
    megabytes = [process.step()["megabytes"] for _ in range(2)][1]
    process.close()
    note(f"memory, {name}: {megabytes:.0f} MB")
    return megabytes


def compete(o: argparse.Namespace) -> None:
    """Be a contestant; what it prints goes to the error stream."""
    o.answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contestant = CONTESTANTS[o.contestant](o)
    if o.device == "cpu" and not o.peak and (o.keep_memory or isinstance(contestant, Ours)):
        keep_freed_memory()
    contestant.train()


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, metavar="CONTESTANT", default=list(CONTESTANTS))
    parser.add_argument("--beside", nargs="+", choices=CONTESTANTS, metavar="CONTESTANT", default=["RLOO"])
    parser.add_argument("--rounds", type=int, default=5, help="0: memory alone")
    parser.add_argument("--warm", type=int, default=2, help="steps of each that do not count")
    parser.add_argument("--length", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--batch", type=int, default=16, help="completions")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8_000)
    parser.add_argument("--model", help="a folder with real weights; then width, layers and vocabulary are its own")
    parser.add_argument("--lora", type=int, help="rank of adapters of that model, which alone are trained")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true", help="of the trainer")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: seconds of the process, for a busy machine"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--training-pass", choices=PASSES, default="WholePass", help="of ours")
    parser.add_argument("--ragged", action="store_true", help="completions end by chance; ours alone")
    parser.add_argument("--no-memory", action="store_true", help="seconds alone")
    parser.add_argument("--keep-memory", action="store_true", help="freed memory is kept for TRL's, too")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    o = parser.parse_args()
    o.body = 12 * o.layers * o.width**2
    if o.model is not None:
        config = AutoConfig.from_pretrained(o.model)
        o.layers, o.width, o.vocabulary = config.num_hidden_layers, config.hidden_size, config.vocab_size
        with torch.device("meta"):
            o.body = AutoModelForCausalLM.from_config(config).num_parameters(exclude_embeddings=True)
    elif o.lora:
        parser.error("--lora: give --model, too")
    if o.ragged:
        o.only = [name for name in o.only if not name.startswith(("TRL", "unrolled"))]
    warnings.filterwarnings("ignore")
    disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "transformers", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if o.contestant:
        compete(o)
    if o.rounds:
        print(bound(o) + "\n", flush=True)
    found = times(o, o.only) if o.rounds else {name: [math.nan] for name in o.only}
    beside = [name for name in o.beside if name in found]
    print("| step | s | " + "".join(f"× {name} | " for name in beside) + "tokens/s | memory, MB |")
    print("|---" + "|--:" * (len(beside) + 3) + "|")
    for name, seconds in found.items():
        ratios = [ratio(seconds, found[other]) for other in beside]
        speed = "" if o.ragged else f"{o.batch * o.length / median(seconds):.0f}"
        memory = "" if o.no_memory else f"{peak(name):.0f}"
        cells = [f"{median(seconds):.3f}", *ratios]
        print(
            f"| {name} | {' | '.join(cells)} | {speed} | {memory} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
