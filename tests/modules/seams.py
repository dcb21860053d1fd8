"""One small part for each seam of a step, as somebody outside of the library would write it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from grade_lightning.advantages import group_centred
from grade_lightning.distributed import Reduce
from grade_lightning.functional.aggregation import sequence_sum
from grade_lightning.functional.gates import clipped
from grade_lightning.gates import by_advantage
from grade_lightning.levels import token_level
from grade_lightning.memory import PromptMemory
from grade_lightning.methods import RLOO
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.policies import Policy
from grade_lightning.records import Experience, Prompts, Rollout, Scores, TokenStats
from grade_lightning.rewards import Reward
from grade_lightning.rollouts import Distribution, Engine, Environment, Message, Sampler, TransformersEngine, Turns
from grade_lightning.selection import Selection
from grade_lightning.stateful import Stateful
from grade_lightning.terms import Term
from tests.conftest import make_model, make_tokenizer
from tests.methods.toy_task import Toy
from tests.modules.toys import Prescribed, constant


class Playback(Prescribed):
    """An engine outside of the policy: it is told when the weights have changed, and plays back given completions."""

    def __init__(self) -> None:
        super().__init__()
        self.synced: list[int] = []

    def sync(self, policy: Policy, step: int) -> None:
        self.synced.append(step)


class Wide(Prescribed):
    """Pads its completions to a width of its own."""

    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        found = super().generate(policy, distribution, prompts)
        tokens: dict[str, Any] = {
            name: pad(getattr(found, name), (0, 3)) for name in ("completion_mask", "engine_logps", "sampled")
        }
        return replace(found, completion_ids=pad(found.completion_ids, (0, 3), value=1), **tokens)


class Tool(Environment):
    """Answers the first turn with three words, and ends after the second."""

    answer = "w7 w8 w9"

    def __init__(self) -> None:
        self.heard: list[str] = []

    def reset(self, row: dict[str, Any]) -> list[Message]:
        return []

    def step(self, text: str) -> tuple[list[Message], float | None, bool]:
        self.heard.append(text)
        return [{"role": "tool", "content": self.answer}], 0.5, len(self.heard) == 2


class Ragged(Selection):
    """One, three and four completions of three prompts, and so on."""

    def allocate(self, prompts: Prompts, budget: int) -> Tensor:
        return torch.tensor([1, 3, 4, 4]).repeat(len(prompts))[: len(prompts)]


class Greedy(Engine):
    """The likeliest tokens: without noise, and nobody says with which probability."""

    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        rollout = TransformersEngine().generate(policy, replace(distribution, top_k=1), prompts)
        return replace(rollout, engine_logps=None)


class TwoThirds(Selection):
    """Drops the third of each prompt's completions with the lowest scores; remembers sum and number of the others'."""

    def __init__(self) -> None:
        self.memory = PromptMemory()

    def keep(self, seen: Experience, wanted: int) -> Tensor:
        layout = seen.rollout.layout
        table = layout.table(seen.scores.total).nan_to_num(nan=-torch.inf)
        rank = table.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        sizes = (~table.isinf()).sum(-1, keepdim=True)
        return layout.rows((rank < sizes - sizes // 3).float()).nonzero().squeeze(1).cpu()

    def observe(self, seen: Experience, reduce: Reduce) -> None:
        values: dict[int, list[float]] = {}
        for key, score in zip(seen.rollout.prompt_keys, seen.scores.total.tolist(), strict=True):
            values.setdefault(key, []).append(score)
        sums = torch.tensor([[sum(scores), len(scores)] for scores in values.values()])
        self.memory.update(list(values), sums, lambda known, new: new if known is None else known + new, reduce)

    def state_dict(self) -> dict[str, Any]:
        return self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.load_state_dict(state)


class Counted(Term, Stateful):
    """Adds nothing, and counts what it is shown."""

    def __init__(self) -> None:
        self.batches = 0
        self.labels: list[Any] = []

    def __call__(self, seen: Experience, now: TokenStats, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        return 0 * now.logps.sum(), {}

    def observe(self, seen: Experience, reduce: Reduce) -> None:
        self.batches += 1
        self.labels = seen.rollout.columns.get("label", [])

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]


class Tilt(nn.Module, Term):
    """A term with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tilt = nn.Parameter(torch.zeros(()))

    def forward(self, seen: Experience, now: TokenStats, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        return self.tilt * now.logps.detach().sum() + 0 * now.logps.sum(), {}


class Longer(Selection):
    """Keeps completions of more than three tokens: one of two processes may have fewer of them."""

    def keep(self, seen: Experience, wanted: int) -> Tensor:
        return (seen.rollout.lengths > 3).nonzero().squeeze(1)


class Picked(Selection):
    """Keeps these rows, or these tokens, whatever they are."""

    def __init__(self, rows: Any = None, tokens: bool = True) -> None:
        self.rows, self.every = rows, tokens

    def keep(self, seen: Experience, wanted: int) -> Tensor | None:
        return None if self.rows is None else torch.tensor(self.rows, dtype=torch.bool if True in self.rows else None)

    def tokens(self, seen: Experience) -> Tensor | None:
        return torch.full_like(seen.rollout.sampled, self.every)


class LikelyTokens(Selection):
    """Trains on tokens alone that the policy gave at least a twentieth, and that are not the first."""

    def tokens(self, seen: Experience) -> Tensor:
        later = torch.arange(seen.old.logps.shape[1], device=seen.old.logps.device) > 0
        return (seen.old.logps.exp() > 0.05) & later


class Imitation(Term):
    """A second line: the likelihood of completions with a positive advantage."""

    def __init__(self, weight: float = 0.3) -> None:
        self.weight = weight

    def __call__(self, seen: Experience, now: TokenStats, reduce: Reduce) -> tuple[Tensor, dict[str, Tensor]]:
        weights = sequence_sum(seen.mask & (seen.advantages > 0), seen.normalizers)
        loss = -(weights * now.logps).sum()
        return self.weight * loss, {"imitation": loss.detach()}


class PerToken(Reward):
    """A hundredth of each token's id, token by token."""

    def forward(self, rollout: Rollout) -> Tensor:
        return self.score(rollout).total

    def score(self, rollout: Rollout) -> Scores:
        each = (rollout.completion_ids / 100).masked_fill(~rollout.sampled, 0)
        return Scores(each.sum(-1), {self.name: each.sum(-1)}, per_token=each)


class Seams(PolicyGradientModule):
    """A method of such parts: a selection with a memory, two terms, a gate that looks at old probabilities."""

    def __init__(self, **kwargs: Any) -> None:
        inner = by_advantage(clipped, low=0.8, high=1.2)

        def gate(ratio: Tensor, seen: Experience) -> Tensor:
            return torch.where(seen.old.logps.exp() < 0.02, ratio, inner(ratio, seen))

        parts: dict[str, Any] = {"selection": TwoThirds(), "terms": [Imitation()]}
        super().__init__(
            advantage=group_centred,
            level=token_level,
            gate=gate,
            aggregate=sequence_sum,
            clips=True,
            **parts | kwargs,
        )


def two_turns(tool: type[Tool] = Tool, **kwargs: Any) -> Sampler:
    return Sampler(12, engine=Turns(tool, turn_tokens=4, **kwargs))


def make_turns(method: type[Any] = RLOO, **kwargs: Any) -> Any:
    policy = Policy.from_model(make_model("gpt2", torch.float64, scale=4.0), make_tokenizer())
    reward = kwargs.pop("reward", Toy())
    module = method(policy=policy, reward=reward, sampler=two_turns(), lr_scheduler=constant, **kwargs)
    module.configure_model()
    return module
