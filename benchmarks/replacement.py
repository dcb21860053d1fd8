"""How well does the reward's gradient know what another token would have done? No training.

At random positions of sampled completions the token is replaced by others that the policy might have drawn there, the
tokens after it are kept, and the reward is asked again. That is compared, within a position, with what a gradient w
says to first order, w · e_v: the completion's own gradient, its average over the batch, both together, and the own one
averaged over neighbours, completions in which a share of the tokens is drawn anew. The correlation and the slope (1: as
long as it should be) are over all positions; intervals (95 %) leave out one prompt at a time.

python benchmarks/replacement.py --policy MODEL --reward REWARD --train imdb_train.parquet --test imdb_test.parquet
"""

import argparse
from pathlib import Path

import torch
from credit import reviews
from torch import Tensor

from grade_lightning.functional.intervals import jackknife
from grade_lightning.methods import GradeSTE
from grade_lightning.numerics import hash_seed
from grade_lightning.policies import Policy
from grade_lightning.records import Rollout
from grade_lightning.rewards import ClassifierReward
from grade_lightning.rollouts import Sampler


class Completions:
    """Sampled completions, the distribution of each token, and a classifier that reads them."""

    def __init__(self, module: GradeSTE, reward: ClassifierReward, rollout: Rollout) -> None:
        self.reward, self.rollout = reward, rollout
        hidden = module.policy.hidden(
            module.policy.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], rollout.completion_ids.shape[1]
        )
        logits = module.policy.vocabulary(hidden.flatten(0, 1)).at(slice(None))
        self.probs = logits.view(*hidden.shape[:2], -1).softmax(-1)

    def scores(self, completions: Tensor, row: int) -> Tensor:
        """Rewards of completions (k, T) of the prompt of a row."""
        one = self.rollout
        ids = torch.cat([one.prompt_ids[row].expand(len(completions), -1), completions], dim=1)
        return self.reward.score_embeddings(self.reward.table()[ids], one.mask[row].expand(len(ids), -1))

    def gradient(self, completions: Tensor) -> Tensor:
        """∂R/∂e at the tokens of completions (B, T), (B, T, width)."""
        one, table = self.rollout, self.reward.table()
        embedded = table[completions].requires_grad_()
        with torch.enable_grad():
            whole = torch.cat([table[one.prompt_ids], embedded], dim=1)
            (found,) = torch.autograd.grad(self.reward.score_embeddings(whole, one.mask).sum(), embedded)
        return found

    def neighbour(self, share: float) -> Tensor:
        """The completions with a share of their tokens drawn anew, each given the tokens that stood before it."""
        ids = self.rollout.completion_ids
        drawn = torch.multinomial(self.probs.flatten(0, 1), 1).view_as(ids)
        return torch.where((torch.rand(ids.shape) < share) & self.rollout.sampled, drawn, ids)


@torch.no_grad()
def measure(found: Completions, positions: int, others: int, share: float) -> tuple[dict[str, Tensor], Tensor]:
    """Predictions of each kind and the rewards, (B, positions, others), less their mean at the position."""
    rollout, table = found.rollout, found.reward.table()
    kept, own = rollout.sampled.unsqueeze(-1), found.gradient(rollout.completion_ids)
    mean = ((own * kept).sum((0, 1)) / kept.sum()).expand_as(own)
    near = {count: [found.gradient(found.neighbour(share)) for _ in range(count)] for count in (1, 4, 16)}
    kinds = {"own": own, "mean of the batch": mean, "own + 2 means": own + 2 * mean}
    kinds |= {f"mean of {n} neighbours": torch.stack(gradients).mean(0) for n, gradients in near.items()}
    predicted: dict[str, list[Tensor]] = {name: [] for name in kinds}
    rewards = []
    for row in range(len(rollout.ids)):
        places = rollout.sampled[row].nonzero().flatten()
        for place in places[torch.randint(len(places), (positions,))].tolist():
            tokens = torch.multinomial(found.probs[row, place], others, replacement=True)
            completions = rollout.completion_ids[row].repeat(others, 1)
            completions[:, place] = tokens
            rewards.append(found.scores(completions, row))
            for name, gradient in kinds.items():
                predicted[name].append(table[tokens] @ gradient[row, place])
    shape = (len(rollout.ids), positions, others)

    def centred(values: list[Tensor]) -> Tensor:
        table = torch.stack(values).double().view(shape)
        return table - table.mean(-1, keepdim=True)

    return {name: centred(values) for name, values in predicted.items()}, centred(rewards)


def figures(predicted: Tensor, rewards: Tensor) -> Tensor:
    """Slope of the rewards on a prediction, and their correlation."""
    along, size, whole = (predicted * rewards).sum(), predicted.square().sum(), rewards.square().sum()
    return torch.stack([along / size, along / (size * whole).sqrt()])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("policy", "reward", "train", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--positions", type=int, default=5, help="of each completion")
    parser.add_argument("--others", type=int, default=24, help="tokens that are tried at a position")
    parser.add_argument("--share", type=float, default=0.5, help="of tokens that a neighbour has anew")
    parser.add_argument("--seed", type=int, default=1)
    o = parser.parse_args()
    reward = ClassifierReward(str(o.reward))
    module = GradeSTE(policy=str(o.policy), reward=reward, sampler=Sampler(max_new_tokens=48))
    module.configure_model()
    assert isinstance(module.policy, Policy)
    batch = next(reviews(o.train, o.test, module.policy, o.prompts))
    torch.manual_seed(hash_seed(o.seed))
    with torch.no_grad():
        prompts = module.prompts(batch)
        found = Completions(module, reward, module.draw(prompts, torch.arange(len(prompts))))
        predicted, rewards = measure(found, o.positions, o.others, o.share)
    print("| gradient | slope | correlation |\n|---|--:|--:|")
    for name, values in predicted.items():
        interval = jackknife(lambda rows, x=values: figures(x[rows], rewards[rows]), len(rewards))  # type: ignore[misc]
        cells = [f"{e:.2f} ({a:.2f} … {b:.2f})" for e, a, b in zip(*(x.tolist() for x in interval), strict=True)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
