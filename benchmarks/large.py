"""How well is a large GPU used, by a Qwen3 of half a billion to 1.5 billion parameters in bfloat16?

Random weights. For GradeSTE and RLOO: seconds of sampling and of the training pass (forward, backward; no
optimizer), peak memory, and

- tokens/s of the rollout, and the part of the bound that memory bandwidth sets: every decoding step reads all weights
  once, and the keys and values of what is there so far;
- model FLOP utilisation of the training pass: 2 FLOPs for each weight and token in a forward pass, 4 in a backward pass
  with weights, 2 in a forward pass of the reference; weights of the head count at completions alone, and nothing counts
  that is computed twice;
- the largest batch that fits, by doubling up to `--most`, while `--limit` seconds are not over: all of it should take
  less than ten minutes.

Then what one device alone can check, on a few completions: the KL at step 0 (0), the log-probabilities by which the
engine drew against the learner's, the gradient in bfloat16 against that in float32 on the same completions, and that
the same step twice gives the same gradient. Nothing here needs a second device or NCCL.

python benchmarks/large.py --size 0.6B
python benchmarks/large.py --size tiny --batch 4 --prompt 8 --length 8 --device cpu --repeats 1 --most 8
"""

import argparse
import time
import warnings
from statistics import median
from typing import Any

import torch
from common import Memory, Prompts, Words, note, tokenizer, wait
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from grade_lightning.methods import RLOO, GradeSTE
from grade_lightning.modules import AlignmentModule
from grade_lightning.policies import Policy
from grade_lightning.records import Experience
from grade_lightning.rollouts import Sampler, TransformersEngine

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 512},
    "0.6B": {"hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072, "vocab_size": 151_936},
    "1.7B": {"hidden_size": 2048, "num_hidden_layers": 28, "intermediate_size": 6144, "vocab_size": 151_936},
}
METHODS: dict[str, tuple[type[AlignmentModule], dict[str, Any]]] = {
    "GradeSTE": (GradeSTE, {}),
    "RLOO": (RLOO, {"num_generations": 4}),
}


def make(o: argparse.Namespace) -> Policy:
    """The policy and its reference."""
    torch.manual_seed(o.seed)
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128} if o.size != "tiny" else {}
    config = Qwen3Config(
        **SIZES[o.size],
        **heads,
        max_position_embeddings=o.prompt + o.length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=1,
    )
    with torch.device(o.device):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)  # type: ignore[arg-type]
    shared = Policy.from_model(model, tokenizer(config.vocab_size))
    shared.torch_compile = o.torch_compile
    if o.checkpointing:
        shared.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return shared


def step(module: AlignmentModule, batch: dict[str, Any], device: str) -> tuple[float, float]:
    """Seconds of sampling with the reward, and of the training pass."""
    module.zero_grad(set_to_none=True)
    wait(device)
    began = time.perf_counter()
    experience = module.collect(batch)
    wait(device)
    sampled = time.perf_counter()
    module.loss(experience).loss.backward()
    wait(device)
    return sampled - began, time.perf_counter() - sampled


def utilisation(o: argparse.Namespace, policy: Policy, seconds: float) -> float:
    """Of the device's peak, by the training pass."""
    table = policy.base.get_input_embeddings().weight.numel()
    body = sum(p.numel() for p in policy.base.parameters()) - table
    flops = o.batch * (2 + 4 + 2) * (body * (o.prompt + o.length) + table * o.length)  # policy, backward, reference
    return flops / seconds / o.peak_flops


def bound(o: argparse.Namespace, policy: Policy) -> float:
    """Tokens/s of a rollout that does nothing but read."""
    config: Any = policy.base.config
    weights = sum(p.numel() * p.element_size() for p in policy.base.parameters())
    kept = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # bytes of a position
    read = sum(weights + o.batch * kept * (o.prompt + t) for t in range(o.length))
    return o.batch * o.length * o.bandwidth / read


def gradient(module: AlignmentModule, experience: Experience) -> Tensor:
    """Of all weights, in float32; the noise of the estimator is the same each time."""
    module.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    module.loss(experience).loss.backward()
    found = torch.cat([p.grad.float().flatten() for p in module.parameters() if p.grad is not None])
    module.zero_grad(set_to_none=True)
    return found


def checks(module: AlignmentModule, batch: dict[str, Any]) -> dict[str, float]:
    """What a device says of its own arithmetic; the weights of the module are in float32 afterwards."""
    experience = module.collect(batch)
    with torch.no_grad():
        stats = module.loss(experience).stats
    rollout = experience.rollout
    assert stats is not None
    assert rollout.engine_logps is not None
    own, again = gradient(module, experience), gradient(module, experience)
    module.policy.float()
    exact = gradient(module, experience)
    return {
        "largest KL of a position at step 0": float(stats.kl.abs().max()),
        "log-probabilities, engine against learner": float((stats.logps - rollout.engine_logps).abs().max()),
        "gradient, cosine of bfloat16 to float32": float(torch.cosine_similarity(own, exact, dim=0)),
        "gradient, length of bfloat16 by float32": float(own.norm() / exact.norm()),
        "gradient, the same step twice": float((own - again).norm() / own.norm()),
    }


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.6B")
    parser.add_argument("--batch", type=int, default=64, help="completions")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--static-cache", action="store_true", help="compiled decoding")
    parser.add_argument("--torch-compile", action="store_true", help="compiled training pass")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--no-largest", action="store_true", help="do not look for the largest batch")
    parser.add_argument("--most", type=int, default=2**14, help="completions beyond which none is looked for")
    parser.add_argument("--limit", type=float, default=420, help="seconds after which no larger batch is tried")
    parser.add_argument("--peak-flops", type=float, default=989e12, help="of the device in bfloat16; H200 by default")
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes/s of its memory; H200 by default")
    parser.add_argument("--seed", type=int, default=1)
    o = parser.parse_args()
    began = time.perf_counter()
    warnings.filterwarnings("ignore")
    shared = make(o)
    reward = Words(SIZES[o.size]["vocab_size"]).to(o.device)
    print(f"Qwen3 {o.size}, {sum(p.numel() for p in shared.base.parameters()) / 1e9:.2f} billion parameters")
    print("| step | sampling, s | tokens/s | of the bound | training pass, s | MFU | memory, MB | largest batch |")
    print("|---" + "|--:" * 7 + "|")
    for name, (method, settings) in METHODS.items():
        sampler = Sampler(max_new_tokens=o.length, engine=TransformersEngine(static_cache=o.static_cache))
        module = method(policy=shared, reward=reward, sampler=sampler, **settings).train()

        def batch(size: int, generations: int = settings.get("num_generations", 1)) -> dict[str, Any]:
            rows = next(iter(Prompts(size // generations, SIZES[o.size]["vocab_size"], o.prompt)))
            return {key: value.to(o.device) if torch.is_tensor(value) else value for key, value in rows.items()}

        step(module, batch(o.batch), o.device)
        seconds = []
        with Memory(o.device) as memory:
            for _ in range(o.repeats):
                seconds.append(step(module, batch(o.batch), o.device))
                note(f"{name}: sampling {seconds[-1][0]:.2f} s, training pass {seconds[-1][1]:.2f} s")
        sampling, training = (median(column) for column in zip(*seconds, strict=True))
        speed = o.batch * o.length / sampling
        largest = o.batch
        while not o.no_largest and 2 * largest <= o.most and time.perf_counter() - began < o.limit:
            try:
                step(module, batch(2 * largest), o.device)
            except torch.OutOfMemoryError:
                break
            largest *= 2
            note(f"{name}: {largest} completions fit")
        module.zero_grad(set_to_none=True)
        cells = [f"{sampling:.2f}", f"{speed:.0f}", f"{speed / bound(o, shared):.0%}", f"{training:.2f}"]
        cells += [f"{utilisation(o, shared, training):.1%}", f"{memory.peak / 1e6:.0f}"]
        cells.append("" if o.no_largest else str(largest))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print("\n| check | |\n|---|--:|")
    for what, value in checks(module, batch(4)).items():
        print(f"| {what} | {value:.3g} |", flush=True)
    note(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
