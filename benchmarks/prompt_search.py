"""Does the gradient find better prompts than chance, at as many evaluations?

A frozen model continues openings of reviews behind a prompt of some tokens, which is searched: by `PromptSearch`, or by
trying exchanges at random among the same candidates. Each step of both draws the same number of completions. The
figures are mean rewards on prompts of the test split that the search does not see, all with the same noise.

python benchmarks/prompt_search.py --policy MODEL --reward REWARD --train imdb_train.parquet --test imdb_test.parquet
"""

import argparse
import contextlib
import io
import shlex
import sys
import time
import warnings
from statistics import mean, stdev

import torch
from common import note
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from grade_lightning.data import LocalFiles, TextDataModule
from grade_lightning.methods import PromptSearch
from grade_lightning.policies import Policy
from grade_lightning.records import Experience
from grade_lightning.rewards import ClassifierReward
from grade_lightning.rollouts import Sampler


class RandomSearch(PromptSearch):
    """Exchanges are tried at random."""

    def promise(self, experience: Experience, tokens: Tensor) -> Tensor:
        """The same of all tokens, but for chance."""
        return torch.rand(len(tokens), self.policy.anatomy.size, device=tokens.device)


def run(o: argparse.Namespace, method: type[PromptSearch], seed: int, steps: int) -> tuple[float, float, float, str]:
    """Reward on the test split and its half width, seconds, and the prompt."""
    seed_everything(seed, verbose=False)
    hops = {"hops": o.hops} if method is PromptSearch else {}
    module = method(
        Policy(o.policy),
        ClassifierReward(o.reward),
        sampler=Sampler(max_new_tokens=o.length),
        start=o.start,
        candidates=o.candidates,
        tries=o.tries,
        fluency=o.fluency,
        **hops,
    )
    data = TextDataModule(
        LocalFiles(o.train, o.test), batch_size=o.batch, eval_batch_size=128, max_prompt_tokens=o.prompt_tokens,
        reward_size=0, val_size=o.batch, test_size=o.held_out,
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        if steps:
            trainer.fit(module, data)
        taken = time.perf_counter() - began
        (found,) = trainer.test(module, data, verbose=False)
    return found["test/reward"], found["test/reward_ci95"], taken, module.text


def main() -> None:
    """Search with each seed, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("policy", "reward", "train", "test"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--start", default=" It was a film that we saw in the town")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--prompt_tokens", type=int, default=16)
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--fluency", type=float, default=0.0)
    parser.add_argument("--hops", type=int, default=2)
    parser.add_argument("--held_out", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    o = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"`python benchmarks/prompt_search.py {shlex.join(sys.argv[1:])}`\n")
    before, half, _, text = run(o, PromptSearch, o.seeds[0], 0)
    print(f"Before: {before:.3f} ± {half:.3f} with `{text}`; no evaluation.\n")
    print("| search | seed | held-out reward | s | prompt |\n|---|--:|--:|--:|---|")
    rewards: dict[str, list[float]] = {}
    for seed in o.seeds:
        for method in (PromptSearch, RandomSearch):
            reward, half, taken, text = run(o, method, seed, o.steps)
            rewards.setdefault(method.__name__, []).append(reward)
            print(f"| {method.__name__} | {seed} | {reward:.3f} ± {half:.3f} | {taken:.0f} | `{text}` |", flush=True)
    if len(o.seeds) > 1:
        for name, found in rewards.items():
            note(f"{name}: {mean(found):.3f} ± {stdev(found):.3f} over {len(found)} seeds")
        wins = sum(a > b for a, b in zip(*rewards.values(), strict=True))
        note(f"PromptSearch is ahead in {wins} of {len(o.seeds)} seeds")


if __name__ == "__main__":
    main()
