"""Of a reward of another vocabulary: how far does training get with each gradient that `translated.py` compares?

GradeSTE with its defaults maximises the cosine to a target text by an encoder of another tokenizer. The score is exact
in all runs; the gradient is that of `TranslatedReward` (shared), that of candidates (the k likeliest tokens in each
place, re-tokenised in their context, to first order), or that of a score which is distilled into a classifier on the
policy's backbone: by completions of the base policy before the run, and by each batch of it. RLOO, which needs no
gradient of the reward, is beside them. Held-out prompts; the scores that are given are the encoder's own.

python benchmarks/translated_runs.py --policy POLICY --reward ENCODER --data imdb_train.parquet > runs.md
"""

import argparse
import copy
import shlex
import sys
import time
import warnings
from statistics import mean, stdev
from typing import Any

import torch
from common import note
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from translated import Lab, Read

from grade_lightning.data import LocalFiles, TextDataModule
from grade_lightning.functional.replay import Adjoint
from grade_lightning.methods import RLOO, GradeSTE
from grade_lightning.modules import AlignmentModule
from grade_lightning.records import Batching, Prompts, Rollout, Scores
from grade_lightning.rewards import Classifier, ClassifierReward, Reward, TranslatedReward
from grade_lightning.rollouts import Sampler

KINDS = "shared", "candidates, first order", "distilled online", "RLOO"


class Exact(Reward):
    """The encoder's score with a gradient of another make."""

    differentiable = True

    def __init__(self, lab: Lab) -> None:
        super().__init__()
        self.lab = (lab,)

    def forward(self, rollout: Rollout) -> Tensor:
        """The encoder's own score."""
        return self.lab[0].reward(rollout)

    def pathwise(self, rollout: Rollout) -> Scores:
        """With the gradient."""
        lab = self.lab[0]
        lab.o.length = rollout.completion_ids.shape[1]
        read = lab.read(rollout)
        return Scores(read.scores, {self.name: read.scores}, [self.adjoint(lab, read)])

    def adjoint(self, lab: Lab, read: Read) -> Adjoint:
        """At the tokens."""
        raise NotImplementedError


class Candidates(Exact):
    """The likeliest tokens in each place, to first order."""

    def adjoint(self, lab: Lab, read: Read) -> Adjoint:
        """Of the swaps."""
        return lab.candidates(read, lab.swaps(read.rollout), "means")


class Distilled(Exact):
    """A classifier on the policy's backbone that learns the score along with the run."""

    def __init__(self, lab: Lab, data: TextDataModule, count: int) -> None:
        super().__init__(lab)
        data.attach(lab.policy.tokenizer, Batching())
        data.setup()
        sampler, rows = Sampler(max_new_tokens=lab.o.tokens), []
        for batch in data.train_dataloader():
            given = Prompts.of(batch)
            rows.append(sampler(lab.policy, given.repeat(torch.full((len(given),), 4))))
            if sum(len(part.ids) for part in rows) >= count:
                break
        with torch.no_grad():
            scores = [lab.reward(part) for part in rows]
        every = torch.cat(scores)
        self.mean, self.std = every.mean(), every.std()
        self.classifier = Classifier(copy.deepcopy(lab.policy.model.base_model)).requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.classifier.parameters(), lr=5e-4)
        for epoch in range(4):
            left = [self.learn(part, score) for part, score in zip(rows, scores, strict=True)]
            note(f"distilled: epoch {epoch}, {mean(left):.2f} of the variance is left")

    @torch.enable_grad()
    def learn(self, rollout: Rollout, scores: Tensor) -> float:
        """One step."""
        loss = (self.classifier.score(rollout.ids, rollout.mask) - (scores - self.mean) / self.std).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def adjoint(self, lab: Lab, read: Read) -> Adjoint:
        """The classifier's own, once it has seen these."""
        self.learn(read.rollout, read.scores)
        frozen = copy.deepcopy(self.classifier).requires_grad_(False)
        (found,) = ClassifierReward.from_classifier(frozen, output="logit").pathwise(read.rollout).adjoints
        return Adjoint(found.gradient * self.std, found.table)


def run(o: argparse.Namespace, kind: str, seed: int) -> dict[str, float]:
    """Figures of the held-out prompts after training, and seconds of the processor."""
    seed_everything(seed, verbose=False)
    lab = Lab(argparse.Namespace(**vars(o), length=o.tokens, k=o.candidates))
    lab.policy.train()
    data = TextDataModule(
        LocalFiles(o.data), batch_size=o.batch, eval_batch_size=64, max_prompt_tokens=32, val_size=o.held_out
    )
    rewards: dict[str, Any] = {
        "shared": lambda: TranslatedReward(lab.reward),
        "candidates, first order": lambda: Candidates(lab),
        "distilled online": lambda: Distilled(lab, data, o.students),
        "RLOO": lambda: lab.reward,
    }
    sampler, reward = Sampler(max_new_tokens=o.tokens), rewards[kind]()
    parts: dict[str, Any] = {"policy": lab.policy, "reward": reward, "sampler": sampler}
    module: AlignmentModule = RLOO(**parts) if kind == "RLOO" else GradeSTE(**parts, hops=2)
    trainer = Trainer(
        accelerator="cpu", max_steps=o.steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    began = time.process_time()
    trainer.fit(module, data)
    taken = time.process_time() - began
    (found,) = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False,
    ).validate(module, data, verbose=False)  # fmt: skip
    wanted = {"similarity": "reward", "± prompts": "reward_ci95", "KL, nats": "kl", "perplexity": "perplexity"}
    return {name: float(found[f"val/{key}"]) for name, key in wanted.items()} | {"processor s": taken}


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--reward", required=True, help="an encoder with another tokenizer")
    parser.add_argument("--data", required=True, help="a parquet file with a column `text`")
    parser.add_argument("--target", default="This movie is wonderful, I loved every minute of it.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--students", type=int, default=1024)
    parser.add_argument("--held_out", type=int, default=128)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    o = parser.parse_args()
    warnings.filterwarnings("ignore")
    found: dict[str, list[dict[str, float]]] = {}
    for seed in o.seeds:
        for kind in o.kinds:
            found.setdefault(kind, []).append(run(o, kind, seed))
            note(f"seed {seed}, {kind}: {found[kind][-1]}")
    names = list(found[o.kinds[0]][0])
    print(f"`{shlex.join(['python', *sys.argv])}`\n\n| | {' | '.join(names)} |\n|---|{'--:|' * len(names)}")
    for kind, runs in found.items():
        cells = []
        for name in names:
            values = [run[name] for run in runs]
            spread = f" ± {stdev(values):.3g}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3g}{spread}")
        print(f"| {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
