"""How much noise does credit take away from a policy gradient, at the same parameters?

Of each set of prompts RLOO's gradient is estimated again and again, with credit, without, and with the optimal token
baseline, from the same completions; all have the same mean (tests/test_credit.py), so the ratios of their variances say
it. The credit has learned from other prompts before and learns nothing meanwhile. Intervals (95 %) leave out one set at
a time.

On text: python benchmarks/credit.py --policy MODEL --reward REWARD --train imdb_train.parquet --test imdb_test.parquet
In the laboratory, random policies of eight tokens and pooled random rewards: python benchmarks/credit.py
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import Prompts as RandomPrompts
from common import note, tokenizer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from grade_lightning.credit import CriticCredit, PathwiseCredit, PrefixCredit, RegressionCredit
from grade_lightning.data import LocalFiles, TextDataModule
from grade_lightning.functional.intervals import ratio_interval
from grade_lightning.functional.moments import gram, moments
from grade_lightning.kl import KL
from grade_lightning.methods import RLOO
from grade_lightning.numerics import hash_seed
from grade_lightning.policies import Policy
from grade_lightning.records import Batching, Rollout, Scores
from grade_lightning.rewards import ClassifierReward, DifferentiableReward
from grade_lightning.rollouts import Sampler

VOCABULARY = 8


CREDITS = {
    "pathwise": PathwiseCredit,
    "critic": CriticCredit,
    "regression": RegressionCredit,
    "prefix": PrefixCredit,
}


class Pooled(DifferentiableReward):
    """A random network of the mean of random embeddings; the larger its weights, the less linear it is."""

    reads_prefixes = True

    def __init__(self, scale: float, width: int = 8) -> None:
        super().__init__()
        self.register_buffer("embeddings", torch.randn(VOCABULARY, width))
        self.network = nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, 1), nn.Sigmoid())
        for p in self.network.parameters():
            nn.init.normal_(p, std=scale)

    def table(self) -> Tensor:
        """The embeddings."""
        found = self.get_buffer("embeddings")
        return found

    def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Of their mean."""
        mean = (embeddings * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        found: Tensor = self.network(mean).squeeze(-1)
        return found

    @torch.no_grad()
    def with_prefixes(self, rollout: Rollout) -> Scores:
        """Of the mean of all tokens before each."""
        keep = rollout.mask.unsqueeze(-1)
        means = (self.table()[rollout.ids] * keep).cumsum(1) / keep.cumsum(1).clamp(min=1)
        length = rollout.completion_ids.shape[1]
        found = self.network(means[:, -length - 1 :]).squeeze(-1)
        return Scores(found[:, -1], {}, prefixes=found[:, :-1])


def laboratory(length: int, scale: float, seed: int) -> tuple[Policy, DifferentiableReward]:
    """A policy and a reward of random weights."""
    torch.manual_seed(seed)
    config = GPT2Config(n_embd=32, n_head=2, n_layer=2, n_positions=32 + length, vocab_size=VOCABULARY)
    config.bos_token_id = config.eos_token_id = None
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config)
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(4)
    policy = Policy.from_model(model, tokenizer(VOCABULARY), reference=False)
    policy.reference = model
    policy.eos_ids = []
    return policy, Pooled(scale)


def reviews(train: Path, test: Path, policy: Policy, prompts: int) -> Iterator[dict[str, Any]]:
    """Batches of the prompts of reviews."""
    data = TextDataModule(LocalFiles(str(train), str(test)), batch_size=prompts, max_prompt_tokens=32)
    data.prepare_data()
    data.attach(policy.tokenizer, Batching())
    data.setup()
    return iter(data.train_dataloader())


def gradients(module: RLOO, others: list[RLOO], batch: dict[str, Any]) -> list[Tensor]:
    """Of the same completions with credit and by other methods, each (d,)."""
    with module.collecting():
        seen = module.collect(batch)
    parameters = [p for p in module.policy.parameters() if p.requires_grad]
    found = []
    for method in (module, *others):
        loss = method.loss(seen).loss
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return found


def learn(module: RLOO, batches: Iterator[dict[str, Any]], count: int) -> None:
    """As in training, without any step."""
    assert module.credit is not None
    for _ in range(count):
        with module.collecting():
            seen = module.collect(next(batches))
        with torch.no_grad():
            output = module.loss(seen)
        assert output.experience is not None
        module.credit.observe(output.experience, module.reduce)


def measure(
    policy: Policy, reward: DifferentiableReward, length: int, batches: Iterator[dict[str, Any]], o: argparse.Namespace
) -> list[Tensor]:
    """Of each set the variance of one estimate, with credit, without, and with the optimal token baseline."""
    common: dict[str, Any] = {"policy": policy, "reward": reward, "sampler": Sampler(length), "kl": KL(0.0)}
    credit = CREDITS[o.credit](decay=o.decay)
    module = RLOO(**common, num_generations=o.generations, credit=credit)
    others = [RLOO(baseline, o.generations, **common) for baseline in ("others", "token")]
    for method in (module, *others):
        method.configure_model()
        method.train()
    torch.manual_seed(hash_seed(o.seed, "learn"))
    learn(module, batches, o.learn)
    found = []
    for i in range(o.sets):
        batch = next(batches)
        torch.manual_seed(hash_seed(o.seed, i))
        drawn = [gradients(module, others, batch) for _ in range(o.draws)]
        traces = torch.stack([moments(gram(torch.stack(rows))).trace for rows in zip(*drawn, strict=True)])
        found.append(traces)
        note(f"{length} tokens, set {i + 1}: {float(traces[1] / traces[0]):.2f}")
    note(f"slope {credit.slope:.2f}, r² {float(credit.fitted()['credit_r2']):.2f}")
    return found


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("policy", "reward", "train", "test"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--sets", type=int, default=8, help="sets of prompts, or problems: the units of the intervals")
    parser.add_argument("--prompts", type=int, default=4, help="of a set")
    parser.add_argument("--generations", type=int, default=4, help="completions of each prompt")
    parser.add_argument("--length", type=int, nargs="*", default=[5, 20], help="tokens of a completion at most")
    parser.add_argument("--draws", type=int, default=24, help="estimates of each set")
    parser.add_argument("--learn", type=int, default=30, help="batches from which the credit learns before")
    parser.add_argument("--credit", choices=CREDITS, default="pathwise")
    parser.add_argument("--decay", type=float, default=0.9)
    parser.add_argument("--scale", type=float, default=0.5, help="of the laboratory's rewards")
    parser.add_argument("--seed", type=int, default=1)
    o = parser.parse_args()
    print("| tokens | variance of RLOO over that with credit | of the optimal token baseline |\n|--:|--:|--:|")
    for length in o.length:
        found: list[Tensor] = []
        if o.policy is None:
            for seed in range(o.sets):
                one = argparse.Namespace(**vars(o) | {"sets": 1, "seed": seed})
                rows = iter(RandomPrompts(o.prompts, VOCABULARY, length=4))
                found += measure(*laboratory(length, o.scale, seed), length, rows, one)
        else:
            policy = Policy(str(o.policy))
            policy.load()
            batches = reviews(o.train, o.test, policy, o.prompts)
            found = measure(policy, ClassifierReward(str(o.reward)), length, batches, o)
        with_credit, *others = torch.stack(found).double().unbind(-1)
        ratios = [ratio_interval(other, with_credit) for other in others]
        cells = [f"{float(r.estimate):.2f} ({float(r.low):.2f} … {float(r.high):.2f})" for r in ratios]
        print(f"| {length} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
