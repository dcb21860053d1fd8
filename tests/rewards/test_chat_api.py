"""The client against a real local server and its faults; no fault takes longer than a moment."""

import logging
from collections.abc import Callable
from threading import Barrier, Event
from typing import Any

import pytest

from grade_lightning.errors import InputError
from grade_lightning.rewards.chat_api import ChatAPI
from grade_lightning.waiting import wait_for
from tests.rewards.serving import Answer, says, serving

HI = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
KEY = "sk-very-secret"


def api(url: str, **kwargs: Any) -> ChatAPI:
    settings: dict[str, Any] = {"backoff": 0.0, "retries": 2, "timeout": 30.0, "key_variable": "JUDGE_TEST_KEY"}
    return ChatAPI(url, **settings | kwargs)


def refused(client: ChatAPI, says: str, **kwargs: Any) -> str:
    with pytest.raises(InputError, match=says) as caught:
        wait_for(client.ask([HI], **kwargs))
    assert "\n" not in str(caught.value)
    assert client.url in str(caught.value)
    return str(caught.value)


def always(status: int, text: str, **headers: str) -> Callable[[dict[str, Any], int], Answer]:
    return lambda request, number: (status, headers, text)


def test_answers_come_in_the_order_of_the_questions() -> None:
    def echo(request: dict[str, Any], number: int) -> Answer:
        return says(request["messages"][0]["content"])

    with serving(echo) as served:
        requests = [{"messages": [{"role": "user", "content": f"q{i}"}]} for i in range(20)]
        answers = wait_for(api(served.url + "/").ask(requests))
    assert [answer["choices"][0]["message"]["content"] for answer in answers] == [f"q{i}" for i in range(20)]
    assert set(served.paths) == {"/v1/chat/completions"}


def test_so_many_at_a_time_and_no_more() -> None:
    """Each waits for three others: with fewer at a time none would be answered."""
    barrier = Barrier(4)

    def together(request: dict[str, Any], number: int) -> Answer:
        barrier.wait(timeout=60)
        return says("yes")

    with serving(together) as served:
        wait_for(api(served.url, concurrency=4).ask([HI] * 12))
    assert served.most == 4
    assert len(served.requests) == 12


@pytest.mark.parametrize(
    "fault",
    [(429, {"Retry-After": "0"}, "busy"), (429, {}, ""), (500, {}, "oops"), (503, {}, ""), (200, {}, "<html>")],
    ids=str,
)
def test_what_fails_for_now_is_tried_again(fault: Answer) -> None:
    with serving(lambda request, number: fault if number < 2 else says("yes")) as served:
        (answer,) = wait_for(api(served.url).ask([HI]))
    assert answer["choices"][0]["message"]["content"] == "yes"
    assert len(served.requests) == 3


@pytest.mark.parametrize(
    ("fault", "message", "tries"),
    [
        (always(429, "quota"), r"status 429 Too Many Requests: 'quota'; lower concurrency.* \(3 tries\)", 3),
        (always(500, "a\nb"), r"status 500 Internal Server Error: 'a b'; look at the server's own log \(3 tries\)", 3),
        (always(200, "<html>"), r"answers '<html>', which is no JSON; check base_url \(3 tries\)", 3),
        (always(404, "no model m"), r"status 404 Not Found: 'no model m'; check base_url, model and request$", 1),
        (always(302, "", Location="http://x.test"), r"status 302 Found", 1),
        (always(200, "{}", **{"Content-Length": "9"}), r"no connection \(|no answer within", 3),
    ],
)
def test_what_fails_for_good_is_one_line(fault: Any, message: str, tries: int) -> None:
    with serving(fault) as served:
        refused(api(served.url, timeout=0.5), message)
    assert len(served.requests) == tries


def test_a_server_that_is_slow_is_one_line() -> None:
    done = Event()

    def slow(request: dict[str, Any], number: int) -> Answer:
        done.wait(timeout=60)
        return says("yes")

    with serving(slow) as served:
        try:
            refused(api(served.url, timeout=0.2), r"no answer within 0.2 s; raise timeout.* \(3 tries\)")
        finally:
            done.set()


def test_a_server_that_is_down_is_one_line() -> None:
    with serving(always(200, "")) as served:
        url = served.url
    text = refused(api(url), r"no connection \(\w+\); start the server, or check base_url", retries=0)
    assert "tries" not in text


def test_others_are_not_asked_when_one_fails_for_good() -> None:
    with serving(always(400, "bad")) as served:
        with pytest.raises(InputError, match="status 400"):
            wait_for(api(served.url, concurrency=1).ask([HI] * 50))
        assert len(served.requests) < 50


def test_the_key_is_sent_and_told_to_nobody(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_TEST_KEY", KEY)
    with serving(lambda request, number: says("yes") if number == 0 else (400, {}, f"no key {KEY}")) as served:
        client = api(served.url)
        wait_for(client.ask([HI]))
        said = refused(client, r"status 400 Bad Request: 'no key \*\*\*'")
    assert served.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in said + caplog.text + str(vars(client))


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused_or_missing(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(always(status, f"Incorrect API key provided: {KEY[:6]}***")) as served:
        refused(api(served.url), r"wants a key, and none is in the environment variable JUDGE_TEST_KEY")
        assert "Authorization" not in served.headers[0]
        monkeypatch.setenv("JUDGE_TEST_KEY", KEY)
        assert "sk-" not in refused(api(served.url), "refuses the key in the environment variable JUDGE_TEST_KEY")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", f"https://me:{KEY}@x.test/v1", f"http://x/v1?k={KEY}"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InputError, match=r"must be like http://localhost:8000/v1") as caught:
        api(url)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("concurrency", 0), ("timeout", 0), ("retries", -1), ("backoff", -1.0), ("timeout", float("nan"))],
)
def test_numbers_that_cannot_work(name: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"{name} = {value}: must be"):
        api("http://localhost:8000/v1", **{name: value})
