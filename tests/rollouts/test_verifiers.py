"""Environments of `verifiers`: by a stand-in, and by the library itself where it is installed."""

import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from grade_lightning.errors import InputError
from grade_lightning.records import Prompts
from grade_lightning.rollouts import Distribution, Turns, VerifiersEnvironment
from grade_lightning.rollouts.verifiers import _loaded
from tests.conftest import make_prompts
from tests.rollouts.rolling import make_policy
from tests.rollouts.test_turns import Scripted

PROMPT = [{"role": "user", "content": "Say it three times."}]


class OverlongError(Exception):
    """The library's error for prompts that have become too long."""


class StandIn:
    """Asks until the policy has said it three times, or there is no room; the reward is how often."""

    def __init__(self, breaks: bool = False, group: bool = False) -> None:
        self.breaks = breaks
        self.rubric = SimpleNamespace(has_group_rewards=group, score_rollout=self.score)

    async def rollout(self, given: Any, client: Any, model: str, sampling: dict[str, Any]) -> dict[str, Any]:
        messages: list[Any] = list(given["prompt"])
        state: dict[str, Any] = {"said": [], "answer": given["answer"], "error": None}
        while len(state["said"]) < 3:
            if self.breaks and state["said"]:
                return state | {"error": TimeoutError("no sandbox")}
            try:
                response = await client.get_response(messages, model, sampling, None, state=state)
            except OverlongError:
                break
            state["said"].append(response.message.content)
            more = {"role": "user", "content": f"w{len(state['said']) + 3}"}
            messages = [*messages, {"role": "assistant", "content": state["said"][-1]}, more]
        return state

    async def score(self, state: dict[str, Any]) -> None:
        state["reward"] = sum(state["answer"] in text for text in state["said"])


class Client:
    """A client of the library asks what is native to it."""

    def __init__(self, client: Any) -> None:
        self.client = client

    async def get_response(self, prompt: Any, model: str, sampling: Any, tools: Any = None, **kwargs: Any) -> Any:
        native, more = await self.to_native_prompt(prompt)  # type: ignore[attr-defined]
        said = await self.get_native_response(native, model, sampling, tools, **more, **kwargs)  # type: ignore[attr-defined]
        return await self.from_native_response(said)  # type: ignore[attr-defined]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def module(name: str, **contents: Any) -> None:
        made = ModuleType(name)
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, name, made)

    def load(name: str, **arguments: Any) -> StandIn:
        if name != "thrice":
            raise ValueError(f"no environment\n{name}")
        return StandIn(**arguments)

    module("verifiers", load_environment=load)
    module("verifiers.clients", Client=Client)
    module("verifiers.errors", OverlongPromptError=OverlongError)
    module("verifiers.types", ResponseMessage=SimpleNamespace, Response=SimpleNamespace)
    _loaded.cache_clear()
    yield
    _loaded.cache_clear()


@pytest.mark.usefixtures("stand_in")
def test_its_rollout_asks_turn_by_turn_and_scores_at_the_end() -> None:
    one = VerifiersEnvironment("thrice", answer="[{content}]")
    assert one.reset({"prompt": PROMPT, "answer": "w6"}) == []
    assert one.step("w6") == ([{"role": "user", "content": "[w4]"}], None, False)
    assert one.step("w7") == ([{"role": "user", "content": "[w5]"}], None, False)
    assert one.step("w6") == ([], 2.0, True)
    assert one.close() is None


@pytest.mark.usefixtures("stand_in")
def test_a_conversation_that_a_limit_ends_is_scored() -> None:
    one = VerifiersEnvironment("thrice")
    one.reset({"prompt": PROMPT, "answer": "w6"})
    one.step("w6")
    assert one.close() == 1.0
    assert one.close() is None


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("workers", [1, 2])
def test_in_conversations(workers: int) -> None:
    """One environment for all of them; each has a rollout of its own."""
    columns = {"prompt": [PROMPT, PROMPT], "answer": ["w6", "w6 w6"]}
    prompts = Prompts.of(make_prompts((3, 2)) | {"columns": columns})

    def make() -> VerifiersEnvironment:
        return VerifiersEnvironment("thrice", answer="{content}")

    full = Turns(make, engine=Scripted(), workers=workers).generate(make_policy(), Distribution(), prompts)
    assert full.completions == ["w6 w4 w6 w6 w5 w6 w6 w6"] * 2
    assert full.columns["turn_rewards"] == [[0.0, 0.0, 3.0], [0.0, 0.0, 2.0]]
    short = Turns(make, max_turns=2, engine=Scripted(), workers=workers)
    rollout = short.generate(make_policy(), Distribution(), prompts)
    assert rollout.columns["turn_rewards"] == [[0.0, 2.0], [0.0, 1.0]]


@pytest.mark.usefixtures("stand_in")
def test_what_goes_wrong_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = VerifiersEnvironment("thrice", {"breaks": True})
    broken.reset({"prompt": PROMPT, "answer": "w6"})
    with pytest.raises(TimeoutError, match="no sandbox"):
        broken.step("w6")
    assert broken.close() is None
    with pytest.raises(InputError, match=r"^VerifiersEnvironment\.name: other: no environment other; install it"):
        VerifiersEnvironment("other")
    with pytest.raises(InputError, match="compares the completions of a group"):
        VerifiersEnvironment("thrice", {"group": True})
    monkeypatch.setitem(sys.modules, "verifiers", None)
    _loaded.cache_clear()
    with pytest.raises(InputError, match=r"verifiers 0\.1.*pip install 'grade-lightning\[verifiers-environments\]'"):
        VerifiersEnvironment("thrice")


def test_the_library_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment of two turns with a rubric, as somebody would write it for the library."""
    vf = pytest.importorskip("verifiers", minversion="0.1.14")
    if not hasattr(vf, "MultiTurnEnv"):
        pytest.skip("verifiers 0.2 and later have another interface")

    class Guess(vf.MultiTurnEnv):  # type: ignore[name-defined]
        async def env_response(self, messages: Any, state: Any, **kwargs: Any) -> Any:
            return [{"role": "user", "content": "w9"}]

    def said(completion: Any, answer: str, **_: Any) -> float:
        return float(sum(answer in str(one["content"]) for one in completion if one["role"] == "assistant"))

    rows = import_module("datasets").Dataset.from_list([{"question": "Say w6.", "answer": "w6"}])
    made = Guess(dataset=rows, rubric=vf.Rubric(funcs=[said]), max_turns=2, system_prompt="Be short.")
    monkeypatch.setattr(vf, "load_environment", lambda name, **_: made)
    _loaded.cache_clear()
    (row,) = made.get_dataset().to_list()
    prompts = Prompts.of(make_prompts((3,)) | {"columns": {name: [value] for name, value in row.items()}})

    def make() -> VerifiersEnvironment:
        return VerifiersEnvironment("guess", answer="{content}")

    rollout = Turns(make, engine=Scripted()).generate(make_policy(), Distribution(), prompts)
    assert rollout.completions == ["w6 w9 w6 w6"]
    assert rollout.columns["turn_rewards"] == [[0.0, 2.0]]
    cut = Turns(make, max_turns=1, engine=Scripted()).generate(make_policy(), Distribution(), prompts)
    assert cut.columns["turn_rewards"] == [[1.0]]
    _loaded.cache_clear()
