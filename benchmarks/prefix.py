"""When does it pay that the completions of a prompt go through the training pass behind one copy of it?

For prompts of P tokens and G completions of T each: seconds and memory of RLOO's training pass (loss and backward pass,
the reference's forward pass included; no sampling, no optimizer) with `SharedPrefixPass` and with `WholePass`, on a
model of random weights. A training pass has `--completions` completions (of as many prompts as that makes), so that a
row of the table is the same work. Seconds are medians over rounds, each of which goes through all settings and both
passes once; on a CPU they are those of the processor, which other work on the machine
does not lengthen. The ratio is the median of the ratios within a round. Memory is the peak of a pass above what was
there before it, in another process with the C library told to give freed tensors back at once; on a GPU, of tensors.

`k` is how many completions stand behind one copy of the prompt, `tokens` the share of tokens that goes through the
network, and `pairs` that of the pairs of positions that attention computes.

python benchmarks/prefix.py --rounds 5
python benchmarks/prefix.py --device cuda --width 1024 --layers 24 --dtype bfloat16
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
import warnings
from statistics import median
from typing import NamedTuple

import torch
from common import HUGE_ALLOCATIONS, Memory, Prompts, Words, note, tokenizer, wait
from transformers import LlamaConfig, LlamaForCausalLM

from grade_lightning import SharedPrefixPass
from grade_lightning.functional.aggregation import Normalizers
from grade_lightning.functional.packing import completions_per_row
from grade_lightning.kl import KL
from grade_lightning.methods import RLOO
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.policies import Pass, Policy, WholePass
from grade_lightning.records import Experience, Rollout, Scores

PASSES: dict[str, type[Pass]] = {"whole": WholePass, "shared": SharedPrefixPass}


class Setting(NamedTuple):
    """The sizes of a group."""

    prompt: int
    completion: int
    group: int

    def shares(self, width: int) -> tuple[int, float, float]:
        """Completions in a row, and the shares of tokens and of pairs of positions."""
        p, t, g = self
        k = completions_per_row(p, t, g, width)
        rows = [k] * (g // k) + [g % k] * (g % k > 0)
        tokens, pairs = sum(p + n * t for n in rows), sum((p + n * t) ** 2 for n in rows)
        return k, tokens / (g * (p + t)), pairs / (g * (p + t) ** 2)


def module(o: argparse.Namespace, name: str) -> PolicyGradientModule:
    """RLOO on a small Llama, with the one pass or the other."""
    torch.manual_seed(o.seed)
    config = LlamaConfig(
        hidden_size=o.width, intermediate_size=3 * o.width, num_hidden_layers=o.layers,
        num_attention_heads=max(1, o.width // 64), vocab_size=o.vocabulary, max_position_embeddings=4096,
        bos_token_id=0, eos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(o.device, getattr(torch, o.dtype))  # type: ignore[arg-type]
    policy = Policy.from_model(model, tokenizer(o.vocabulary), training_pass=PASSES[name]())
    made = RLOO(policy=policy, reward=Words(o.vocabulary).to(o.device), num_generations=2, kl=KL(0.05))
    made.configure_model()
    return made


def experience(o: argparse.Namespace, setting: Setting, made: PolicyGradientModule) -> Experience:
    """Random completions of full length, with random scores."""
    torch.manual_seed(o.seed)
    count = max(1, o.completions // setting.group)
    prompts = next(iter(Prompts(count, o.vocabulary, setting.prompt)))["input_ids"].repeat_interleave(setting.group, 0)
    ids = torch.randint(2, o.vocabulary, (len(prompts), setting.completion))
    prompts, ids = prompts.to(o.device), ids.to(o.device)
    rollout = Rollout(
        prompt_ids=prompts,
        prompt_mask=torch.ones_like(prompts),
        completion_ids=ids,
        completion_mask=torch.ones_like(ids, dtype=torch.bool),
        engine_logps=None,
        tokenizer=made.tokenizer,
        groups=torch.arange(count).repeat_interleave(setting.group),
    )
    scores = Scores(torch.randn(len(ids), device=o.device), {})
    return Experience(rollout, scores, normalizers=Normalizers(ids.numel(), len(ids)))


def step(made: PolicyGradientModule, seen: Experience, device: str) -> float:
    """Seconds of a pass."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    made.zero_grad()
    wait(device)
    began = clock()
    made.loss(seen).loss.backward()
    wait(device)
    return clock() - began


def times(o: argparse.Namespace, settings: list[Setting]) -> dict[Setting, dict[str, list[float]]]:
    """Seconds of all rounds."""
    made = {name: module(o, name) for name in PASSES}
    seen = {setting: experience(o, setting, made["whole"]) for setting in settings}
    found: dict[Setting, dict[str, list[float]]] = {setting: {name: [] for name in PASSES} for setting in settings}
    warm_up(o, made)
    for turn in range(o.rounds):
        for setting in settings:
            for name in list(PASSES)[:: -1 if turn % 2 else 1]:
                found[setting][name].append(step(made[name], seen[setting], o.device))
                note(f"round {turn + 1}: {name} {tuple(setting)} {found[setting][name][-1]:.3f} s")
    return found


def warm_up(o: argparse.Namespace, made: dict[str, PolicyGradientModule]) -> None:
    """A small pass of each, which does not count."""
    for one in made.values():
        step(one, experience(o, Setting(8, 8, 2), one), o.device)


def peaks(o: argparse.Namespace) -> list[list[int]]:
    """Bytes of a pass of each setting, whole and shared, in a process of their own."""
    done = subprocess.run(
        [sys.executable, *sys.argv, "--measure-memory"],
        env=os.environ | HUGE_ALLOCATIONS, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found: list[list[int]] = json.loads(done.stdout)
    return found


def measure_memory(o: argparse.Namespace, settings: list[Setting]) -> None:
    """What :func:`peaks` runs."""
    made = {name: module(o, name) for name in PASSES}
    found: list[list[int]] = []
    warm_up(o, made)
    for setting in settings:
        found.append([])
        for name in PASSES:
            seen = experience(o, setting, made[name])
            with Memory(o.device) as memory:
                step(made[name], seen, o.device)
            found[-1].append(memory.peak)
            note(f"memory: {name} {tuple(setting)} {memory.peak / 1e6:.0f} MB")
    print(json.dumps(found))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 128, 512, 1024])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--completions", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--measure-memory", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """The table."""
    o = arguments()
    warnings.simplefilter("ignore")
    settings = [Setting(*sizes) for sizes in itertools.product(o.prompts, o.lengths, o.groups)]
    if o.measure_memory:
        measure_memory(o, settings)
        return
    found = times(o, settings)
    memory = peaks(o) if not o.no_memory else [[]] * len(settings)
    print("| P | T | G | k | tokens | pairs | whole, s | shared, s | ratio | (range) | whole, MB | shared, MB |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for setting, used in zip(settings, memory, strict=True):
        whole, shared = (found[setting][name] for name in PASSES)
        ratios = [two / one for one, two in zip(whole, shared, strict=True)]
        k, tokens, pairs = setting.shares(o.width)
        figures = [str(k), f"{tokens:.2f}", f"{pairs:.2f}", f"{median(whole):.2f}", f"{median(shared):.2f}"]
        spread = f"{min(ratios):.2f}–{max(ratios):.2f}"
        row = [*map(str, setting), *figures, f"{median(ratios):.2f}", spread, *(f"{x / 1e6:,.0f}" for x in used)]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
