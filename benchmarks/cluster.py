"""How would a step scale from 1 to 64 GPUs, under DDP and FSDP2? A simulation: none of it has run on a GPU.

Weak scaling: every GPU has the same number of completions, so that the efficiency is the time of a step on one GPU over
that on n. A step is the slowest rank's sampling and training, and then the exchange of weights and gradients:

- sampling: a rank decodes until its longest completion ends; each token reads all weights once from the memory
  (`--memory-bandwidth`, of which `--decoding` is reached) and costs `--overhead` seconds a layer. Lengths are geometric
  (each token ends its completion with probability `--end`), cut at `--length`;
- training: `--flops` floating-point operations for each weight and token, at `--utilisation` of `--peak-flops`;
- exchange, by rings, after the backward pass and not hidden behind it: DDP reduces the gradients, 2 (n − 1) / n of
  their bytes; FSDP2 gathers the weights once a step, holds them, and scatters the gradients, each (n − 1) / n of its
  bytes. The ring's slowest link is `--nvlink` within a node of `--gpus-per-node` and `--network` beyond it; each of
  its hops costs `--latency`, once for each message: a bucket of `--bucket` bytes under DDP, a layer under FSDP2.

Parameters are counted, from the models' configurations; everything else is assumed. Activations are in no number.

python benchmarks/cluster.py --figure docs/figures/cluster.png
"""

import argparse
import math
import warnings
from typing import NamedTuple

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from grade_lightning.policies import LoRA, Policy

ADAM = 8
"""Bytes of the optimizer's state for each trained parameter."""


class Job(NamedTuple):
    """A model and what is trained of it."""

    name: str
    parameters: int
    trained: int
    layers: int
    weight: int
    """Bytes of a weight: 4 where all are trained in bf16-mixed, 2 under LoRA."""

    @property
    def full(self) -> bool:
        """Whether everything is trained; the reference is then a copy."""
        return self.trained == self.parameters


def jobs() -> list[Job]:
    """GPT-2 small and Qwen3-4B, all weights and LoRA of rank 16; nothing is allocated."""
    qwen = Qwen3Config(
        hidden_size=2560,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=9728,
        vocab_size=151_936,
        tie_word_embeddings=True,
    )
    found = []
    for name, model, config in (
        ("GPT-2 small", GPT2LMHeadModel, GPT2Config()),
        ("Qwen3-4B", Qwen3ForCausalLM, qwen),
    ):
        for lora in (None, LoRA()):
            with torch.device("meta"):
                policy = Policy.from_model(model(config), lora=lora, reference=False)
            sizes = [(p.numel(), p.requires_grad) for p in policy.parameters()]
            trained = sum(size for size, required in sizes if required)
            every = sum(size for size, _ in sizes)
            title = f"{name}, {'all weights' if lora is None else 'LoRA'}"
            found.append(Job(title, every, trained, config.num_hidden_layers, 4 if lora is None else 2))
    return found


def exchanged(job: Job, gpus: int, strategy: str) -> float:
    """Bytes that each GPU sends in a step."""
    share = (gpus - 1) / gpus
    if strategy == "DDP":
        return 2 * share * 4 * job.trained
    return share * (job.weight * job.parameters + 4 * job.trained)


def exchange(job: Job, gpus: int, strategy: str, o: argparse.Namespace) -> float:
    """Seconds of it."""
    bandwidth = o.nvlink if gpus <= o.gpus_per_node else o.network
    messages = math.ceil(4 * job.trained / o.bucket) if strategy == "DDP" else job.layers
    return exchanged(job, gpus, strategy) / bandwidth + 2 * (gpus - 1) * messages * o.latency


def work(job: Job, gpus: int, o: argparse.Namespace) -> float:
    """Seconds until the slowest GPU has sampled and trained, mean over `--steps` steps."""
    generator = torch.Generator().manual_seed(o.seed)
    shape = (max(o.gpus), o.steps, o.batch)  # fewer GPUs have the first of the same completions
    lengths = torch.full(shape, float(o.length))
    if o.end > 0:
        lengths = lengths.geometric_(o.end, generator=generator).clamp(max=o.length)
    decoding = job.weight * job.parameters / (o.decoding * o.memory_bandwidth) + job.layers * o.overhead
    training = o.flops * job.parameters / (o.utilisation * o.peak_flops)
    seconds = lengths.amax(-1) * decoding + (lengths + o.prompt).sum(-1) * training
    return float(seconds[:gpus].amax(0).mean())


def memory(job: Job, gpus: int, strategy: str) -> float:
    """Bytes on each GPU without activations: weights, gradients, Adam, the reference, and a reward of the same size."""
    frozen = (2 if job.full else 1) * job.weight * job.parameters  # under LoRA the reference is the policy
    moving = (4 + ADAM) * job.trained
    if strategy == "DDP":
        return job.weight * job.parameters + moving + frozen
    return job.weight * job.parameters * (1 + 1 / gpus) + moving / gpus + frozen


def efficiency(job: Job, gpus: int, strategy: str, o: argparse.Namespace) -> float:
    """Time of a step on one GPU over that on so many."""
    return step(job, 1, strategy, o) / step(job, gpus, strategy, o)


def step(job: Job, gpus: int, strategy: str, o: argparse.Namespace) -> float:
    """Seconds of a step."""
    return work(job, gpus, o) + exchange(job, gpus, strategy, o)


def draw(o: argparse.Namespace, every: list[Job]) -> None:
    """Efficiency against GPUs; what the longest completion alone costs is dotted."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(every), figsize=(3.2 * len(every), 3), layout="constrained", sharey=True)
    for axis, job in zip(axes, every, strict=True):
        for strategy, style in {"DDP": {"marker": "o"}, "FSDP2": {"marker": "s", "linestyle": "--"}}.items():
            axis.plot(o.gpus, [efficiency(job, n, strategy, o) for n in o.gpus], label=strategy, **style)
        alone = [work(job, 1, o) / work(job, n, o) for n in o.gpus]
        axis.plot(o.gpus, alone, color="0.5", linestyle=":", label="stragglers alone")
        axis.set(title=job.name, xlabel="GPUs", xscale="log", ylim=(0, 1.05))
        axis.set_xticks(o.gpus, [str(n) for n in o.gpus])
        axis.minorticks_off()
    axes[0].set_ylabel("efficiency (simulated)")
    axes[0].legend(fontsize="small")
    figure.savefig(o.figure, dpi=120)


def options(args: list[str] | None = None) -> argparse.Namespace:
    """Every assumption."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16, help="completions of a GPU in a step")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--length", type=int, default=256, help="longest completion, tokens")
    parser.add_argument("--end", type=float, default=0.01, help="probability that a token ends its completion")
    parser.add_argument("--flops", type=float, default=16, help="for each weight and token: forward 2, backward 4, "
                        "reference 2, two hops of GradeSTE 4, reward 4")  # fmt: skip
    parser.add_argument("--peak-flops", type=float, default=989e12, help="of a GPU in bfloat16; an H200's")
    parser.add_argument("--utilisation", type=float, default=0.4, help="part of it that training reaches")
    parser.add_argument("--memory-bandwidth", type=float, default=4.8e12, help="bytes/s; an H200's")
    parser.add_argument("--decoding", type=float, default=0.5, help="part of it that decoding reaches")
    parser.add_argument("--overhead", type=float, default=5e-4, help="seconds for each layer of a decoded token")
    parser.add_argument("--nvlink", type=float, default=300e9, help="bytes/s of a GPU in a ring within a node")
    parser.add_argument("--network", type=float, default=40e9, help="bytes/s of a GPU in a ring over several nodes")
    parser.add_argument("--latency", type=float, default=1e-5, help="seconds of a ring's hop")
    parser.add_argument("--bucket", type=float, default=25e6, help="bytes of DDP's messages")
    parser.add_argument("--steps", type=int, default=200, help="simulated steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--figure", help="PNG to draw")
    return parser.parse_args(args)


def main() -> None:
    """Print the tables."""
    warnings.filterwarnings("ignore")
    o, every = options(), jobs()
    rows = [(job, strategy) for job in every for strategy in ("DDP", "FSDP2")]
    print("| efficiency | " + " | ".join(f"{n} GPUs" if n > 1 else "1 GPU" for n in o.gpus) + " |")
    print("|---" + "|--:" * len(o.gpus) + "|")
    for job, strategy in rows:
        cells = [f"{efficiency(job, n, strategy, o):.2f}" for n in o.gpus]
        print(f"| {job.name}, {strategy} | " + " | ".join(cells) + " |")
    most = max(o.gpus)
    print(f"\n| | step on 1 GPU, s | on {most}, s | GB sent by each of {most} | GB on 1 GPU | GB on each of {most} |")
    print("|---" + "|--:" * 5 + "|")
    for job, strategy in rows:
        cells = [f"{step(job, n, strategy, o):.2f}" for n in (1, most)]
        cells.append(f"{exchanged(job, most, strategy) / 1e9:.2f}")
        cells += [f"{memory(job, n, strategy) / 1e9:.1f}" for n in (1, most)]
        print(f"| {job.name}, {strategy} | " + " | ".join(cells) + " |")
    if o.figure:
        draw(o, every)


if __name__ == "__main__":
    main()
