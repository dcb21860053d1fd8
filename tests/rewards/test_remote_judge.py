"""A judge behind a server: against the same judge in memory, and what it makes of answers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from grade_lightning.errors import InputError
from grade_lightning.methods import RLOO
from grade_lightning.rewards import RemoteJudge
from tests.conftest import VOCABULARY, make_tokenizer
from tests.methods.toy_task import make, trainer
from tests.rewards.making import make_rollout
from tests.rewards.serving import Answer, a_model, says, serving
from tests.rewards.test_judge import ASKS, loaded, questions, write_judge


def judge(url: str, **kwargs: Any) -> RemoteJudge:
    settings: dict[str, Any] = {"rubric": ASKS, "backoff": 0.0, "retries": 1, "key_variable": "JUDGE_TEST_KEY"}
    return RemoteJudge("m", url, **settings | kwargs)


def answered(text: str, **kwargs: Any) -> float:
    with serving(lambda request, number: says(text)) as served:
        (score,) = judge(served.url, **kwargs).scores_of(["q"])
    return score


def test_it_says_what_the_model_says_in_memory(tmp_path: Path) -> None:
    folder, rollout = write_judge(tmp_path), make_rollout()
    with serving(a_model(folder)) as served:
        remote = judge(served.url, yes="w6", no="w7")
        remote.load(make_tokenizer(), VOCABULARY)
        scores = remote.score(rollout)
    torch.testing.assert_close(scores.total, loaded(folder)(rollout), rtol=1e-5, atol=1e-5)
    assert list(scores.parts) == ["judge"]
    assert served.questions[0] == "w2 Hello there w3 Fine thanks w4 w5"
    assert sorted(served.questions[1:]) == sorted(questions(rollout))
    asked = {"model": "m", "temperature": 0.0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}
    assert {name: value for name, value in served.requests[0].items() if name != "messages"} == asked


def test_the_same_question_is_asked_once() -> None:
    """Within a batch and later; the oldest answers are forgotten first."""
    with serving(lambda request, number: says("yes", {"yes": math.log(0.6), "no": math.log(0.2)})) as served:
        remote = judge(served.url, cache=2)
        assert remote.scores_of(["a", "b", "a"]) == pytest.approx([0.75] * 3)
        assert remote.scores_of(["b", "c"]) == pytest.approx([0.75] * 2)
        assert sorted(served.questions) == ["a", "b", "c"]
        remote.scores_of(["b", "c"])
        assert len(served.questions) == 3
        remote.scores_of(["a"])
        assert served.questions[3:] == ["a"]


def test_probabilities_of_all_ways_to_say_it() -> None:
    likely = {
        " Yes": math.log(0.2),
        "yes": math.log(0.1),
        "No": math.log(0.1),
        "YES": -math.inf,
        "maybe": math.log(0.6),
    }
    with serving(lambda request, number: says("", likely if number == 0 else {"maybe": 0.0})) as served:
        known, unknown = (judge(served.url).scores_of(["q"])[0] for _ in range(2))
    assert known == pytest.approx(0.75)
    assert math.isnan(unknown)


@pytest.mark.parametrize(
    ("text", "kwargs", "score"),
    [
        ("Yes.", {"output": "answer"}, 1.0),
        (" no", {"output": "answer"}, 0.0),
        ("Not sure", {"output": "answer"}, math.nan),
        ("", {"output": "answer"}, math.nan),
        ("GOOD", {"output": "answer", "yes": "good", "no": "bad"}, 1.0),
        ("Score: 7.5/10", {"output": "number"}, 7.5),
        ("-3", {"output": "number"}, -3.0),
        ("none", {"output": "number"}, math.nan),
    ],
)
def test_what_an_answer_says(text: str, kwargs: dict[str, Any], score: float) -> None:
    assert answered(text, **kwargs) == pytest.approx(score, nan_ok=True)


def test_an_answer_that_says_nothing_abstains_with_a_warning() -> None:
    with serving(lambda request, number: says("yes" if number else "perhaps")) as served:
        remote = judge(served.url, output="answer", concurrency=1)
        with pytest.warns(UserWarning, match="1 of 3 answers say neither 'yes' nor 'no'"):
            assert remote(make_rollout()).isnan().sum() == 1


def test_fields_of_the_request() -> None:
    with serving(lambda request, number: says("yes")) as served:
        judge(served.url, output="answer", request={"max_tokens": None, "seed": 1}).scores_of(["q"])
    assert served.requests[0] == {
        "model": "m",
        "temperature": 0.0,
        "seed": 1,
        "messages": [{"role": "user", "content": "q"}],
    }


@pytest.mark.parametrize(
    ("answer", "kwargs", "message"),
    [
        (says("yes"), {}, "answers without log-probabilities; use a server or model that has them, or set output"),
        ((200, {}, '{"error": "x"}'), {"output": "answer"}, r"answers \"\{'error': 'x'\}\", which is not a chat comp"),
        ((200, {}, "[]"), {}, "which is not a chat completion"),
        ((200, {}, "<html>"), {}, "which is no JSON"),
    ],
)
def test_garbage_is_one_line(answer: Answer, kwargs: dict[str, Any], message: str) -> None:
    with serving(lambda request, number: answer) as served, pytest.raises(InputError, match=message) as caught:
        judge(served.url, **kwargs).load(make_tokenizer(), VOCABULARY)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_down_is_noticed_before_training() -> None:
    """At once, and once only: a later stage does not ask again."""
    with serving(lambda request, number: says("yes")) as served:
        remote = judge(served.url, output="answer")
        for _ in range(2):
            remote.load(make_tokenizer(), VOCABULARY)
        assert len(served.requests) == 1
    module = make(RLOO)
    module.reward = judge(served.url, output="answer")
    with pytest.raises(InputError, match="no connection"):
        trainer().fit(module, [])
    assert module.meter.spent["reward_calls"] == 0


def test_two_words_are_two() -> None:
    with pytest.raises(InputError, match="yes and no are both"):
        judge("http://localhost:8000/v1", yes="No", no=" no ")


@pytest.mark.parametrize(
    ("said", "number"), [("about 1,000.5", 1000.5), (".5 of it", 0.5), ("-5e-1", -0.5), ("4", 4.0)]
)
def test_numbers_as_they_are_written(said: str, number: float) -> None:
    judge = RemoteJudge("a judge", output="number")
    assert judge._score({"choices": [{"message": {"content": said}}]}) == number


@pytest.mark.parametrize("word", ["very good", "A+", ""])
def test_an_answer_is_one_word(word: str) -> None:
    with pytest.raises(InputError, match="is not a single word"):
        RemoteJudge("a judge", yes=word)
