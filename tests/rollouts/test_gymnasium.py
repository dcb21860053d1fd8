"""Environments of Gymnasium: small ones of text, in conversations."""

import sys
from typing import Any

import pytest

from grade_lightning.errors import InputError
from grade_lightning.records import Prompts
from grade_lightning.rollouts import Distribution, GymnasiumEnvironment, Turns
from tests.conftest import make_prompts
from tests.rollouts.rolling import make_policy
from tests.rollouts.test_turns import Scripted

gymnasium = pytest.importorskip("gymnasium")


class Corridor(gymnasium.Env):  # type: ignore[name-defined]
    """From w5 to w7 by steps to the right; it begins where the number says, and ends with a reward."""

    observation_space = gymnasium.spaces.Text(20)
    action_space = gymnasium.spaces.Discrete(2)
    closed = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.place = 0 if seed is None else seed
        return f"w{self.place + 5}", {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.place += 1 if action == 1 else -1
        return f"w{self.place + 5}", float(self.place == 2), self.place == 2, self.place == -2, {}

    def close(self) -> None:
        type(self).closed += 1


class Parrot(Corridor):
    """Takes a text, and says it."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return f"[{action}]", 0.25, False, True, {}


class Pixels(Corridor):
    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return [0, 0], {}


@pytest.fixture(autouse=True)
def _registered() -> Any:
    for kind in (Corridor, Parrot, Pixels):
        gymnasium.register(f"{kind.__name__}-v0", entry_point=kind, disable_env_checker=True, order_enforce=False)
    yield
    for kind in (Corridor, Parrot, Pixels):
        gymnasium.registry.pop(f"{kind.__name__}-v0")


def test_named_actions_of_a_discrete_space() -> None:
    """The one that is named last; as a word, not as a part of one; none of them is the end."""
    one = GymnasiumEnvironment("Corridor-v0", actions=["left", "right"], observation="<{text}>")
    assert one.reset({"seed": 1, "other": 3}) == [{"role": "environment", "content": "<w6>"}]
    assert one.step("not right but left") == ([{"role": "environment", "content": "<w5>"}], 0.0, False)
    assert one.step("right") == ([{"role": "environment", "content": "<w6>"}], 0.0, False)
    assert one.step("right") == ([{"role": "environment", "content": "<w7>"}], 1.0, True)
    assert one.reset({})[0]["content"] == "<w5>"
    assert one.step("upright") == ([], None, True)
    assert one.step("left left")[2] is False
    assert one.step("left") == ([{"role": "environment", "content": "<w3>"}], 0.0, True)


def test_an_action_may_be_the_text() -> None:
    one = GymnasiumEnvironment("Parrot-v0")
    one.reset({})
    assert one.step(" to the\nleft ") == ([{"role": "environment", "content": "\n[to the\nleft]\n"}], 0.25, True)


def test_in_a_conversation() -> None:
    """The scripted policy says `w6`, then `w6 w6`: the second name is right. Each is closed once."""
    Corridor.closed = 0

    def make() -> GymnasiumEnvironment:
        return GymnasiumEnvironment("Corridor-v0", actions=["nothing", "w6"], observation="{text}")

    prompts = Prompts.of(make_prompts((3, 2)) | {"columns": {"seed": [0, 1]}})
    rollout = Turns(make, engine=Scripted()).generate(make_policy(), Distribution(), prompts)
    assert rollout.columns["turn_rewards"] == [[0.0, 1.0], [1.0]]
    assert rollout.sampled.int().tolist() == [[0, 1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0, 0]]
    assert rollout.completions == ["w5 w6 w6 w6 w6", "w6 w6"]
    assert Corridor.closed == 2


def test_what_is_no_text_and_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"observation is of list, and the policy reads text; wrap it"):
        GymnasiumEnvironment("Pixels-v0").reset({})
    with pytest.raises(InputError, match=r"^GymnasiumEnvironment\.id: Nowhere-v0: .*; name one that is registered$"):
        GymnasiumEnvironment("Nowhere-v0")
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(InputError, match=r"needs gymnasium: pip install 'grade-lightning\[gymnasium\]'"):
        GymnasiumEnvironment("Corridor-v0")
