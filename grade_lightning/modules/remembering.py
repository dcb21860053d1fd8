"""What a method remembers from batch to batch: its parts that do, shown each batch once, and saved in checkpoints."""

from dataclasses import replace
from typing import Any

from grade_lightning.distributed import Reduce
from grade_lightning.errors import InputError
from grade_lightning.kl import Coefficient
from grade_lightning.records import Experience, StepOutput, TokenStats
from grade_lightning.rewards import Reward
from grade_lightning.stateful import Stateful


class Remembering:
    """Shows batches to the :class:`Stateful` parts of a module, those of its reward among them."""

    reward: Reward
    reduce: Reduce
    coefficient: Coefficient
    beta: float

    def check_rewards(self) -> None:
        """Check that what moves is the reward itself.

        Raises:
            InputError: it is a part of another reward, which would hide from it what was sampled.
        """
        for part in self.reward.modules():
            if part is not self.reward and any(isinstance(value, Stateful) for value in vars(part).values()):
                raise InputError(
                    f"reward {self.reward.name}: has {type(part).__name__} as a part, which moves with what is sampled "
                    "and must be the reward itself; turn them around"
                )

    def parts(self) -> dict[str, Any]:
        """Those that may remember something, or ask for statistics of their own, by name."""
        remembered = {name: part for name, part in vars(self.reward).items() if isinstance(part, Stateful)}
        own = {} if self.coefficient.kl.target is None else {"kl": self.coefficient}
        return own | {f"reward {name}": part for name, part in remembered.items()}

    def stateful(self) -> dict[str, Stateful]:
        """Those that do remember something."""
        return {name: part for name, part in self.parts().items() if isinstance(part, Stateful)}

    def observe(self, seen: Experience) -> None:
        """Show them what was trained on, when its loss is known; nothing with an infinite reward."""
        if self.reduce.sum(seen.scores.total.isinf().sum()):
            return
        for part in self.stateful().values():
            part.observe(seen, self.reduce)
        self.beta = self.coefficient.beta

    def part_states(self) -> dict[str, dict[str, Any]]:
        """What they remember, as a checkpoint holds it."""
        return {name: part.state_dict() for name, part in self.stateful().items()}

    def load_part_states(self, states: dict[str, dict[str, Any]]) -> None:
        """Restore it; of a part without a state, or of another, there is none."""
        for name, part in self.stateful().items():
            if states.get(name):
                part.load_state_dict(states[name])
        self.beta = self.coefficient.beta


def as_seen(experience: Experience, step: StepOutput) -> Experience:
    """A batch as parts look at it after its loss: no adjoints, and the statistics of the training pass."""
    scores = replace(experience.scores, adjoints=[])
    return replace(Experience(experience.rollout, scores, experience.beta), old=step.stats.detach())


def joined(parts: list[Experience]) -> Experience:
    """The micro-batches of an optimizer step as one batch."""
    whole = Experience.join(parts)
    length = whole.rollout.completion_ids.shape[1]
    return replace(whole, beta=parts[0].beta, old=TokenStats.join([part.old for part in parts], length))
