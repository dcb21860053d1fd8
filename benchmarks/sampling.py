r"""What does drawing completions cost: with the weights in another layout, as they are, and in bfloat16?

A GPT-2 of random weights, or a real model (`--model`), draws `--batch` completions of `--length` tokens, four to each
prompt, with `TransformersEngine`, in the ways that `--ways` names by turns. *GB/s* is the size of the weights that a
token's pass reads (all but the embeddings, unless the head shares them; bfloat16 counts half), times the tokens of a
completion, over the seconds: at most what the memory delivers, which is measured first (the sum of a tensor of 1 GB).
*Cores* are the seconds of the processor over those of the clock. *Ratio* is to the last of the ways, within a round;
*nats* the mean difference between the log-probabilities of the drawn tokens and those of the training pass. Medians
over rounds.

python benchmarks/sampling.py --model my/SmolLM2-135M-Instruct --batch 8
"""

import argparse
import time
import warnings
from statistics import median

import torch
from common import note, policy

from grade_lightning.functional.sequences import token_logps
from grade_lightning.policies import LoRA, Policy
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rollouts import Sampler, TransformersEngine

WAYS = {
    "as they are": {"prepack": False},
    "prepacked": {},
    "bfloat16": {"bfloat16": True},
    "bfloat16, as they are": {"bfloat16": True, "prepack": False},
}


def bandwidth() -> float:
    """Bytes that the memory delivers in a second, the best of five."""
    large, best = torch.ones(2**28), float("inf")
    for _ in range(5):
        began = time.perf_counter()
        large.sum()
        best = min(best, time.perf_counter() - began)
    return large.nbytes / best


def weights_read(learner: Policy) -> int:
    """Bytes of the weights of a pass over one token."""
    seen = {id(p): p.nbytes for p in learner.base.parameters()}
    embedding, head = (getattr(learner.base, f"get_{kind}_embeddings")() for kind in ("input", "output"))
    if embedding.weight is not head.weight:
        seen.pop(id(embedding.weight))
    return sum(seen.values())


@torch.no_grad()
def difference(learner: Policy, rollout: Rollout) -> float:
    """Mean absolute difference between log-probabilities of the engine and of the training pass, in nats."""
    logits = learner.logits(learner.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], rollout.completion_ids.shape[1])
    assert rollout.engine_logps is not None
    found = token_logps(logits.log_softmax(-1), rollout.completion_ids)
    return float((found - rollout.engine_logps).abs()[rollout.sampled].mean())


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with real weights")
    parser.add_argument("--lora", type=int, help="rank of adapters of that model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--length", type=int, nargs="+", default=[64])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["prepacked", "as they are"])
    parser.add_argument("--rounds", type=int, default=5)
    o = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(1)
    if o.model is None:
        positions = o.prompt + max(o.length)
        learner = policy(o.vocabulary, layers=o.layers, width=o.width, positions=positions)
    else:
        learner = Policy(o.model, o.lora and LoRA(o.lora, dropout=0.0))
        learner.load(reference=False)
    learner.eos_ids = []
    ids = torch.randint(2, 4_000, (o.batch // 4, o.prompt)).repeat_interleave(4, 0)
    prompts = Prompts(ids, torch.ones_like(ids))
    print(f"the memory delivers {bandwidth() / 1e9:.0f} GB/s\n")
    print("| tokens | weights | s | tokens/s | GB/s | cores | ratio | (range) | nats |\n|--:|---" + "|--:" * 7 + "|")
    for length in o.length:
        samplers = {way: Sampler(length, engine=TransformersEngine(**WAYS[way])) for way in o.ways}
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in samplers}
        gaps = dict[str, float]()
        for turn in range(o.rounds + 1):  # the first does not count
            for way, sampler in samplers.items():
                began = time.perf_counter(), time.process_time()
                rollout = sampler(learner, prompts)
                took = time.perf_counter() - began[0], time.process_time() - began[1]
                note(f"{length} tokens, {way}: {took[0]:.2f} s")
                if turn:
                    found[way].append(took)
                else:
                    gaps[way] = difference(learner, rollout)
        for way, times in found.items():
            ratios = [x[0] / y[0] for x, y in zip(times, found[o.ways[-1]], strict=True)]
            seconds = median(wall for wall, _ in times)
            size = weights_read(learner) / (2 if way.startswith("bfloat16") else 1)
            cells = [f"{length}", way, f"{seconds:.2f}", f"{o.batch * length / seconds:.0f}"]
            cells += [f"{size * length / seconds / 1e9:.1f}", f"{median(c / w for w, c in times):.1f}"]
            cells += [f"{median(ratios):.2f}", f"{min(ratios):.2f}–{max(ratios):.2f}", f"{gaps[way]:.1e}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
