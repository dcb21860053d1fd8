"""A vLLM server: what it is asked, what is made of its answers, and its faults, each in one line."""

import json
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from grade_lightning.errors import InputError
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rollouts import Distribution, Sampler, VLLMServer
from tests.conftest import make_prompts
from tests.rewards.serving import Answer, serving
from tests.rollouts.agreement import gap
from tests.rollouts.rolling import make_policy


class Served:
    """Speaks as vLLM does; says token 5 again and again, with its log-probability under the weights that it has."""

    def __init__(self) -> None:
        self.model: Any = None

    def __call__(self, request: dict[str, Any], number: int) -> Answer:
        if "method" in request:
            assert request["method"] == "reload_weights"
            folder = request["kwargs"]["weights_path"]
            self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
            return 200, {}, json.dumps({"results": [None]})
        if not request:
            return 200, {}, ""
        return 200, {}, json.dumps(self.said(request))

    def said(self, request: dict[str, Any]) -> dict[str, Any]:
        ids, count = request["prompt"], request["max_tokens"]
        with torch.no_grad():
            logits = self.model(torch.tensor([ids + [5] * count])).logits[0, len(ids) - 1 : -1]
        logps = (logits / request["temperature"]).log_softmax(-1)[:, 5].tolist()
        return {"choices": [{"token_ids": [5] * count, "logprobs": {"token_logprobs": logps}}]}


def draw(policy: Policy, url: str, timeout: float = 60.0) -> Rollout:
    torch.manual_seed(0)
    sampler = Sampler(6, temperature=0.9, engine=VLLMServer(url, timeout=timeout))
    return sampler(policy, Prompts.of(make_prompts()).repeat(torch.full((3,), 2)))


def test_it_has_the_weights_of_each_rollout() -> None:
    policy = make_policy("llama")
    asked = Distribution(max_new_tokens=6, temperature=0.9)
    with serving(Served()) as server:
        before = draw(policy, server.url.removesuffix("/v1"))
        assert gap(policy, asked, before) < 2e-5
        with torch.no_grad():
            for parameter in policy.base.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        after = draw(policy, server.url.removesuffix("/v1"))
    assert gap(policy, asked, after) < 2e-5
    assert gap(policy, asked, before) > 1e-3
    first = [request for request in server.requests if "prompt" in request][:6]
    assert len({request["seed"] for request in first}) == 6
    assert sorted(len(request["prompt"]) for request in first) == [3, 3, 4, 4, 5, 5]
    assert server.paths[:2] == ["/collective_rpc", "/reset_prefix_cache"]
    assert not Path(server.requests[0]["kwargs"]["weights_path"]).exists()


def other(**changes: Any) -> dict[str, Any]:
    return {"choices": [{"token_ids": [5] * 6, "logprobs": {"token_logprobs": [-1.0] * 6}} | changes]}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((500, {}, "CUDA out of memory\nin the engine"), r"status 500: CUDA out of memory in the engine; look at"),
        ((200, {}, "<html>"), r"answers what is no JSON"),
        ((200, {}, json.dumps({"choices": []})), r"its answer has no"),
        ((200, {}, json.dumps(other(token_ids=[99] * 6))), r"completion 0 has token 99"),
        ((200, {}, json.dumps(other(token_ids=[5] * 4))), r"completion 0 has 4 tokens and 6 log-probabilities"),
    ],
    ids=["dies", "no JSON", "empty", "other tokens", "too few"],
)
def test_a_fault_is_one_line(answer: Answer, said: str) -> None:
    served = Served()
    with (
        serving(lambda request, number: answer if "prompt" in request else served(request, number)) as server,
        pytest.raises(InputError, match=said) as caught,
    ):
        draw(make_policy("llama"), server.url.removesuffix("/v1"))
    assert "\n" not in str(caught.value)


def test_a_late_answer_is_one_line() -> None:
    over = Event()

    def late(request: dict[str, Any], number: int) -> Answer:
        over.wait(60)
        return 200, {}, ""

    with serving(late) as server:
        try:
            with pytest.raises(InputError, match=r"no answer within 0\.1 s; raise engine\.timeout; the run resumes"):
                draw(make_policy("llama"), server.url.removesuffix("/v1"), timeout=0.1)
        finally:
            over.set()


def test_a_server_that_is_not_there_is_one_line() -> None:
    with serving(Served()) as server:
        url = server.url.removesuffix("/v1")
    with pytest.raises(InputError, match=r"no connection .*start the server"):
        draw(make_policy("llama"), url)


@pytest.mark.parametrize("url", ["localhost:8000", "http://user:key@host", "ftp://host"])
def test_an_address_that_cannot_work_is_named(url: str) -> None:
    with pytest.raises(InputError, match=r"engine\.base_url") as caught:
        VLLMServer(url)
    assert "key@" not in str(caught.value)


def test_a_rollout_that_was_begun_does_not_wait_for_the_server() -> None:
    """The server answers when the rollout was begun, and not before; its seeds are those of that moment."""
    begun, served = Event(), Served()

    def late(request: dict[str, Any], number: int) -> Answer:
        assert begun.wait(60) or "prompt" not in request
        return served(request, number)

    policy, prompts = make_policy("llama"), Prompts.of(make_prompts())
    with serving(late) as server:
        engine = VLLMServer(server.url.removesuffix("/v1"))
        begun.set()
        engine.sync(policy, 0)
        begun.clear()
        torch.manual_seed(0)
        waiting = engine.start(policy, Distribution(max_new_tokens=3), prompts)
        drawn = torch.randint(2**62, (1,))
        begun.set()
        assert waiting().completion_ids.tolist() == [[5] * 3] * len(prompts)
        torch.manual_seed(0)
        torch.randint(2**62, (len(prompts),))
        assert torch.equal(torch.randint(2**62, (1,)), drawn)
