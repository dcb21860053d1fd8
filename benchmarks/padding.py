r"""What does padding cost in a training pass, with prompts and completions as long as those of a real model?

The lengths are those of completions that a model (`--model`, a folder of an instruct model) samples for a few
questions; without one they are drawn at random: prompts of 16 to 32 tokens, completions uniformly up to `--length`.
What is timed is a Llama of random weights of the given size on sequences of these lengths: a training pass (loss and
backward pass, the reference's forward pass included; no sampling, no optimizer) of RLOO and of GradeSTE, with
`WholePass` and with `PackedPass`. Both get the rollout as the sampler leaves it: padded to its longest prompt and its
longest completion.

*Even* is the same pass over sequences without any padding: as many, of the mean length of prompts and of completions,
so about as many tokens. It is what the real tokens cost; *packed / even* is 1 where packing leaves nothing of the
padding.

Seconds are those of the processor, medians over rounds; ratios are medians of the ratios within a round. *Share* is the
share of real tokens among the padded ones. The head is no part of it: no pass computes logits of padding.

OMP_NUM_THREADS=1 python benchmarks/padding.py --rounds 3 --model /my/SmolLM2-135M-Instruct
"""

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from common import Words, note, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from grade_lightning import PackedPass
from grade_lightning.functional.aggregation import Normalizers
from grade_lightning.functional.dense_rows import cheapest_rows
from grade_lightning.methods import RLOO, GradeSTE
from grade_lightning.modules import AlignmentModule
from grade_lightning.policies import Pass, Policy, WholePass
from grade_lightning.records import Experience, Prompts, Rollout
from grade_lightning.rollouts import Sampler

PASSES: dict[str, type[Pass]] = {"padded": WholePass, "packed": PackedPass, "even": WholePass}
METHODS: dict[str, Callable[..., AlignmentModule]] = {
    "RLOO": RLOO,
    "GradeSTE": GradeSTE,
    "GradeSTE, hops 2": partial(GradeSTE, hops=2),
}
QUESTIONS = (
    "Name one fruit.",
    "What is the capital of France? Answer in one word.",
    "Write two sentences about the sea in winter, for a child of six years.",
    "How many legs does a spider have?",
)


def sampled(o: argparse.Namespace) -> tuple[list[int], list[int]]:
    """Tokens of prompts and of completions, of a real model or at random."""
    torch.manual_seed(o.seed)
    if o.model is None:
        prompts, completions = (torch.randint(low, high + 1, (o.batch,)) for low, high in ((16, 32), (1, o.length)))
        return prompts.tolist(), completions.tolist()
    policy = Policy(o.model)
    policy.load(reference=False)
    asked = [QUESTIONS[i % len(QUESTIONS)] for i in range(o.batch)]
    chats = [[{"role": "user", "content": question}] for question in asked]
    found = policy.tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    batch = {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"], "columns": {}}
    rollout = Sampler(max_new_tokens=o.length)(policy, Prompts.of(batch))
    prompts, completions = rollout.host_lengths
    return prompts.tolist(), completions.tolist()


def module(o: argparse.Namespace, method: str, name: str) -> AlignmentModule:
    """A method on a Llama of random weights, with one pass or the other."""
    torch.manual_seed(o.seed)
    config = LlamaConfig(
        hidden_size=o.width, intermediate_size=8 * o.width // 3, num_hidden_layers=o.layers,
        num_attention_heads=max(1, o.width // 64), num_key_value_heads=max(1, o.width // 192), vocab_size=o.vocabulary,
        max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=0, eos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    policy = Policy.from_model(LlamaForCausalLM(config), tokenizer(o.vocabulary), training_pass=PASSES[name]())
    made = METHODS[method](policy=policy, reward=Words(o.vocabulary))
    made.configure_model()
    return made


def rollout_of(o: argparse.Namespace, prompts: list[int], completions: list[int], made: AlignmentModule) -> Rollout:
    """Random tokens of these lengths."""
    p, t = max(prompts), max(completions)
    prompt_mask = torch.arange(p) >= p - torch.tensor(prompts).unsqueeze(1)
    mask = torch.arange(t) < torch.tensor(completions).unsqueeze(1)
    ids = torch.randint(2, o.vocabulary, (len(prompts), p + t))
    return Rollout(
        prompt_ids=ids[:, :p],
        prompt_mask=prompt_mask.long(),
        completion_ids=ids[:, p:],
        completion_mask=mask,
        engine_logps=None,
        tokenizer=made.tokenizer,
        groups=torch.arange(len(prompts)) // 2,
    )


def seconds(made: AlignmentModule, rollout: Rollout) -> float:
    """Of the processor, for a pass."""
    scores = made.score(rollout)
    seen = Experience(rollout, scores, normalizers=Normalizers(int(rollout.sampled.sum()), len(rollout.ids)))
    made.zero_grad()
    began = time.process_time()
    made.loss(seen).loss.backward()
    return time.process_time() - began


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of an instruct model whose lengths are taken")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="completions")
    parser.add_argument("--length", type=int, default=96, help="longest completion")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", type=int, default=1)
    o = parser.parse_args()
    warnings.filterwarnings("ignore")
    prompts, completions = sampled(o)
    together = [p + t - 1 for p, t in zip(prompts, completions, strict=True)]
    padded = max(prompts) + max(completions) - 1
    share = sum(together) / (len(together) * padded)
    rows = cheapest_rows(together, padded, o.width)
    note(f"prompts {prompts}, completions {completions}, {'as they are' if rows is None else max(rows) + 1} rows")
    even = [[round(sum(own) / len(own))] * len(own) for own in (prompts, completions)]
    tokens = sum(together), len(together) * (even[0][0] + even[1][0] - 1)
    columns = ["method", "tokens", "share", *(f"{name}, s" for name in PASSES)]
    columns += ["packed / padded", "(range)", "packed / even", "(range)"]
    print(f"| {' | '.join(columns)} |")
    print("|---" + "|--:" * (len(columns) - 1) + "|")
    for method in o.methods:
        made = {name: module(o, method, name) for name in PASSES}
        ragged, flat = (rollout_of(o, *lengths, made["padded"]) for lengths in ((prompts, completions), even))
        found: dict[str, list[float]] = {name: [] for name in PASSES}
        for turn in range(o.rounds + 1):  # the first does not count
            for name in list(PASSES)[:: -1 if turn % 2 else 1]:
                took = seconds(made[name], flat if name == "even" else ragged)
                note(f"{method}, {name}: {took:.2f} s")
                if turn:
                    found[name].append(took)
        cells = [method, str(tokens[0]), f"{share:.2f}", *(f"{median(found[name]):.2f}" for name in PASSES)]
        for other, scale in (("padded", 1.0), ("even", tokens[1] / tokens[0])):
            ratios = [scale * x / y for x, y in zip(found["packed"], found[other], strict=True)]
            cells += [f"{median(ratios):.2f}", f"{min(ratios):.2f}–{max(ratios):.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
