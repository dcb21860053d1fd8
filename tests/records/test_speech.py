"""Who says what: the opening, the policy's turns, and what they are answered."""

import torch

from grade_lightning.records import Prompts, spoken
from grade_lightning.rollouts import Distribution, Sampler, Turns
from tests.conftest import make_prompts
from tests.rollouts.rolling import make_policy
from tests.rollouts.test_turns import Scripted, Talks


def test_every_text_is_with_who_said_it() -> None:
    """Of one that is over after a turn, and of one that is opened; special tokens and padding are nobody's words."""
    prompts = Prompts.of(make_prompts((3, 2)) | {"columns": {"last": [1, 9], "begins": [False, True]}})
    rollout = Turns(Talks, max_turns=2, engine=Scripted()).generate(make_policy(), Distribution(), prompts)
    assert spoken(rollout) == [
        [("policy", "w6")],
        [("environment", "w9"), ("policy", "w6"), ("environment", "w4 w5"), ("policy", "w6 w6")],
    ]


def test_turns_without_an_answer_are_two_texts() -> None:
    class Silent(Talks):
        def step(self, text: str) -> tuple[list[dict[str, str]], float | None, bool]:
            return [], None, False

    engine = Turns(Silent, max_turns=2, engine=Scripted())
    rollout = engine.generate(make_policy(), Distribution(), Prompts.of(make_prompts((3,))))
    assert spoken(rollout) == [[("policy", "w6"), ("policy", "w6 w6")]]


def test_without_turns_the_policy_says_all() -> None:
    torch.manual_seed(0)
    rollout = Sampler(6)(make_policy(), Prompts.of(make_prompts()))
    assert spoken(rollout) == [[("policy", text)] for text in rollout.completions]
