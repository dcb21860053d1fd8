"""Of a reward of another vocabulary: which gradient at the policy's tokens points where the true one points?

A small language model (`--policy`), and the cosine to a target text by an encoder of another tokenizer (`--reward`).
The completions are so short, and the top-k of the sampler so small, that all can be enumerated: the exact gradient of
the expected reward, and the exact mean of what GradeSTE (straight-through, all hops, no KL) makes of each translation.
`cosine` and `length` are of that mean to the true gradient, `one` is the mean cosine of single estimates of 8
completions. Intervals (95 %) are over the prompts.

python benchmarks/translated.py --policy POLICY --reward ENCODER --data imdb_train.parquet > translated.md
"""

import argparse
import copy
import itertools
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from common import note
from datasets import load_dataset
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from grade_lightning.data.texts import opening
from grade_lightning.functional.replay import Adjoint
from grade_lightning.functional.sequences import completion_mask, masked_sum, token_logps
from grade_lightning.functional.spans import shares
from grade_lightning.methods import GradeSTE
from grade_lightning.policies import Policy
from grade_lightning.records import Experience, Prompts, Rollout, Scores
from grade_lightning.rewards import Classifier, ClassifierReward, SimilarityReward, TranslatedReward
from grade_lightning.rewards.retokenize import Pieces, pack
from grade_lightning.rewards.spans import rollout_spans
from grade_lightning.rewards.vocabularies import pieces_of_vocabulary, translated_table
from grade_lightning.rollouts import Sampler

ROWS = 128


class Read(NamedTuple):
    """Completions as the reward reads them."""

    rollout: Rollout
    pieces: Pieces
    gradient: Tensor
    """Of each piece, (B, L, width)."""
    scores: Tensor


class Lab:
    """Policy, reward, and the tables that are compared."""

    def __init__(self, o: argparse.Namespace) -> None:
        self.o, self.policy, self.reward = o, Policy(o.policy), SimilarityReward(o.reward, o.target)
        self.sampler = Sampler(max_new_tokens=o.length, top_k=o.k)
        reward = TranslatedReward(self.reward)
        self.method = GradeSTE(self.policy, reward, sampler=self.sampler, hops="exact", beta=0.0)
        self.method.configure_model()
        self.method.train(False)
        self.parameters = [p for p in self.policy.model.parameters() if p.requires_grad]
        assert self.reward.foreign is not None
        self.foreign, self.table, self.mean = self.reward.foreign, self.reward.table(), reward.table()
        size, tokenizer = self.policy.anatomy.size, self.policy.tokenizer
        pieces = pieces_of_vocabulary(tokenizer, size, self.foreign)
        texts = [text.strip() for text in tokenizer.batch_decode([[i] for i in range(size)])]
        alone = self.foreign(texts, add_special_tokens=False)["input_ids"]
        self.alone = translated_table([a if p else [] for a, p in zip(alone, pieces, strict=True)], self.table)
        self.neutral = self.mean[torch.tensor([bool(p) for p in pieces])].mean(0)
        self.sums = torch.stack([self._centred(p) for p in pieces])

    def _centred(self, pieces: Sequence[int]) -> Tensor:
        return (self.table[torch.tensor(pieces, dtype=torch.long)] - self.neutral).sum(0)

    # ---- the truth ----------------------------------------------------------------------------------------------

    def every(self, prompt: str) -> Rollout:
        """All completions that the sampler can draw."""
        tokenizer, eos = self.policy.tokenizer, torch.tensor(self.policy.eos_ids)
        ids = torch.tensor([tokenizer.encode(prompt)])
        rows = torch.zeros(1, 0, dtype=torch.long)
        for _ in range(self.o.length):
            whole = torch.cat([ids.expand(len(rows), -1), rows], 1)
            with torch.no_grad():
                logits = torch.cat([self.policy.model(input_ids=part).logits[:, -1] for part in whole.split(ROWS)])
            top, ended = logits.topk(self.o.k).indices, torch.isin(rows, eos).any(-1)
            choices = zip(rows, ended, top, strict=True)
            rows = torch.stack([torch.cat([r, v.view(1)]) for r, end, t in choices for v in (eos[:1] if end else t)])
        mask = completion_mask(rows, self.policy.eos_ids)
        prompts = ids.expand(len(rows), -1)
        rows = rows.masked_fill(~mask, tokenizer.pad_token_id)
        eos_ids = self.policy.eos_ids
        return Rollout(prompts, torch.ones_like(prompts), rows, mask, None, tokenizer, {}, eos_ids)

    def logps(self, rollout: Rollout) -> Tensor:
        """Log-probabilities of completions, with graph, (B,)."""
        logits = self.policy(self.policy.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], self.o.length)
        sampled = self.sampler.distribution.logits(logits, rollout.eos_ids, rollout.completion_ids)
        return masked_sum(token_logps(sampled.log_softmax(-1), rollout.completion_ids), rollout.completion_mask)

    def gradient(self, value: Tensor) -> Tensor:
        """At the policy's parameters, (d,)."""
        return parameters_to_vector(torch.autograd.grad(value, self.parameters, materialize_grads=True))

    # ---- translations -------------------------------------------------------------------------------------------

    def read(self, rollout: Rollout) -> Read:
        """Scores, and the gradient at the reward's own pieces."""
        pieces = self.reward.translate(rollout, self.foreign)
        gradients: list[Tensor] = []
        scores = []
        for ids, mask in zip(pieces.ids.split(ROWS), pieces.mask.split(ROWS), strict=True):
            embeddings = self.reward.embed(ids).detach().requires_grad_()
            total = self.reward.score_embeddings(embeddings, mask)
            gradients += torch.autograd.grad(total.sum(), embeddings)
            scores.append(total.detach())
        return Read(rollout, pieces, torch.cat(gradients), torch.cat(scores))

    def translations(self, read: Read) -> Iterator[tuple[str, Adjoint]]:
        """All that need no training."""
        share = shares(rollout_spans(read.rollout, read.pieces), read.pieces.spans)[:, -self.o.length :]
        per_token = share / share.sum(-1, keepdim=True).clamp(min=1)
        yield "shared: `TranslatedReward`", Adjoint(share @ read.gradient, self.mean)
        yield "shared, but whole to each token", Adjoint((share > 0).float() @ read.gradient, self.mean)
        yield "shared, table of tokens by themselves", Adjoint(share @ read.gradient, self.alone)
        yield "shared, mean gradients, sums as table", Adjoint(per_token @ read.gradient, self.sums)
        swaps = self.swaps(read.rollout)
        for pairing in ("means", "sums"):
            yield f"candidates, first order, {pairing}", self.candidates(read, swaps, pairing)
        yield "candidates, each by a forward pass", self.candidates(read, swaps, "scores")

    def swaps(self, rollout: Rollout) -> dict[tuple[int, int, int], list[int]]:
        """Pieces of each text in which a token is replaced by a further one of the top-k: by row, place and token."""
        with torch.no_grad():
            logits = self.policy(self.policy.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], self.o.length)
        keys, rows, first = [], [], rollout.prompt_ids.shape[1]
        for b, t, v in itertools.product(range(len(logits)), range(self.o.length), range(self.o.k)):
            ids, token = rollout.ids[b, rollout.mask[b].bool()].tolist(), int(logits[b, t].topk(self.o.k).indices[v])
            if first + t < len(ids) and ids[first + t] != token:
                keys.append((b, t, token))
                rows.append(
                    [*ids[: first + t], token, *ids[first + t + 1 :][: 0 if token in rollout.eos_ids else None]]
                )
        texts = self.policy.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return dict(zip(keys, self.foreign(texts)["input_ids"], strict=True))

    def candidates(self, read: Read, swaps: dict[tuple[int, int, int], list[int]], pairing: str) -> Adjoint:
        """What each swap is worth."""
        size = self.policy.anatomy.size
        values = torch.zeros(*read.rollout.completion_ids.shape, size)
        known = self.known(swaps.values()) if pairing == "scores" else {}
        for (b, t, v), new in swaps.items():
            old = read.pieces.ids[b, read.pieces.mask[b].bool()].tolist()
            found = known[tuple(new)] - read.scores[b] if known else self.worth(old, new, read.gradient[b], pairing)
            values[b, t, v] = found
        used = values.flatten(0, 1).any(0).nonzero().squeeze(1)
        return Adjoint(values[..., used], torch.eye(size)[:, used])

    @torch.no_grad()
    def known(self, rows: Any) -> dict[tuple[int, ...], Tensor]:
        """The score of each row of pieces."""
        unique, found = [list(row) for row in dict.fromkeys(map(tuple, rows))], {}
        for start in range(0, len(unique), ROWS):
            part = unique[start : start + ROWS]
            ids, mask = pack(part, None, torch.device("cpu"))
            scores = self.reward.score_embeddings(self.reward.embed(ids), mask)
            found |= dict(zip(map(tuple, part), scores, strict=True))
        return found

    def worth(self, old: list[int], new: list[int], gradient: Tensor, pairing: str) -> Tensor:
        """To first order, by the pieces that change."""
        front = _common(old, new)
        back = _common(old[front:][::-1], new[front:][::-1])
        was, now = old[front : len(old) - back], new[front : len(new) - back]
        here = gradient[front : len(old) - back]
        if pairing == "sums" or not was:
            here = here.mean(0) if was else gradient[front - 1 : front + 1].mean(0)
            return here @ (self._centred(now) - self._centred(was))
        after = self.table[torch.tensor(now)] if now else self.neutral.unsqueeze(0)
        after = after if len(was) == len(now) else after.mean(0)
        return (here * (after - self.table[torch.tensor(was)])).sum()

    def ste(self, read: Read, adjoint: Adjoint, weights: Tensor) -> Tensor:
        """GradeSTE's gradient of Σ weights · reward."""
        weighted = Adjoint(adjoint.gradient * weights.view(-1, 1, 1), adjoint.table)
        loss = self.method.loss(Experience(read.rollout, Scores(read.scores, {}, [weighted]), 0.0)).loss
        return self.gradient(-loss * len(weights))


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))


class Student:
    """The score distilled into a classifier on the policy's own backbone, by sampled completions."""

    def __init__(self, lab: Lab, prompts: list[str]) -> None:
        began, count, rollouts = time.perf_counter(), lab.o.students, []
        texts = [prompt for prompt in prompts for _ in range(-(-count // len(prompts)))]
        for start in range(0, len(texts), 64):
            part = lab.policy.tokenizer(
                texts[start : start + 64], return_tensors="pt", padding=True, padding_side="left"
            )
            rollouts.append(lab.sampler(lab.policy, Prompts(part["input_ids"], part["attention_mask"], {})))
        rollout = Rollout.join(rollouts)
        with torch.no_grad():
            scores = torch.cat([lab.reward(rollout.select(i)) for i in torch.arange(len(texts)).split(64)])
        targets = (scores - scores.mean()) / scores.std()
        classifier = Classifier(copy.deepcopy(lab.policy.model.base_model)).requires_grad_(True)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3)
        order = [rows for _ in range(4) for rows in torch.randperm(len(texts)).split(64)]
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(order))
        for rows in order:
            part = rollout.select(rows)
            loss = (classifier.score(part.ids, part.mask) - targets[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self.reward, self.scale = ClassifierReward.from_classifier(classifier, output="logit"), scores.std()
        note(f"student: {float(loss):.2f} of the variance is left, {time.perf_counter() - began:.0f} s")

    def adjoint(self, rollout: Rollout) -> Adjoint:
        """Its own gradient."""
        (found,) = self.reward.pathwise(rollout).adjoints
        return Adjoint(found.gradient * self.scale, found.table)


def measure(lab: Lab, prompts: list[str], students: dict[str, Student]) -> dict[str, list[tuple[float, ...]]]:
    """Cosine and relative length of the mean, and cosine of one: of each translation and prompt."""
    results: dict[str, list[tuple[float, ...]]] = {}
    for prompt in prompts:
        read = lab.read(lab.every(prompt))
        probs = lab.logps(read.rollout).detach().exp()
        truth = lab.gradient((lab.logps(read.rollout).exp() * read.scores).sum())
        generator = torch.Generator().manual_seed(1)
        draws = [probs.multinomial(8, True, generator=generator) for _ in range(lab.o.draws)]
        named = list(lab.translations(read))
        named += [(name, student.adjoint(read.rollout)) for name, student in students.items()]
        for name, adjoint in named:
            mean, ones = lab.ste(read, adjoint, probs), []
            for rows in draws:
                own = Read(read.rollout.select(rows), read.pieces, read.gradient, read.scores[rows])
                one = lab.ste(own, Adjoint(adjoint.gradient[rows], adjoint.table), torch.ones(8))
                ones.append(_cosine(one, truth))
            found = _cosine(mean, truth), float(mean.norm() / truth.norm()), sum(ones) / len(ones)
            results.setdefault(name, []).append(found)
        ones = []
        for rows in draws:
            centred = read.scores[rows] - read.scores[rows].mean()
            ones.append(_cosine(lab.gradient((lab.logps(read.rollout.select(rows)) * centred).sum()), truth))
        results.setdefault("RLOO", []).append((1.0, 1.0, sum(ones) / len(ones)))
        note(f"{prompt!r}: {', '.join(f'{name} {found[-1][0]:.2f}' for name, found in results.items())}")
    return results


def _cosine(one: Tensor, two: Tensor) -> float:
    return float(torch.cosine_similarity(one, two, dim=0))


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--reward", required=True, help="an encoder with another tokenizer")
    parser.add_argument("--data", required=True, help="a parquet file with a column `text`")
    parser.add_argument("--target", default="This movie is wonderful, I loved every minute of it.")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--chars", type=int, default=40, help="of the longest prompts")
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--length", type=int, default=3, help="of the completions, tokens")
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--students", type=int, default=1024, help="completions that the distilled score learns from")
    o = parser.parse_args()
    torch.manual_seed(0)
    lab = Lab(o)
    reviews = load_dataset("parquet", data_files=o.data, split="train").shuffle(seed=0)["text"]
    texts = [opening(text.replace("<br />", " "), o.chars) for text in itertools.islice(reviews, o.prompts + 512)]
    prompts, others = texts[: o.prompts], texts[o.prompts :]
    kinds = {"distilled, from other prompts": others, "distilled, from these prompts": prompts}
    results = measure(lab, prompts, {name: Student(lab, known) for name, known in kinds.items()} if o.students else {})
    print(f"`{shlex.join(['python', *sys.argv])}`\n\n| translation | cosine | length | one |\n|---|--:|--:|--:|")
    for name, rows in results.items():
        values = torch.tensor(rows)
        half = 1.96 * values.std(0) / len(rows) ** 0.5
        cells = (f"{mean:.2f} ± {h:.2f}" for mean, h in zip(values.mean(0), half, strict=True))
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
