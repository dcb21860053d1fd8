"""Rewards: pathwise gradients, sums, Python functions, the classifier and its folder."""

import asyncio
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from threading import Event
from typing import Any

import numpy
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from grade_lightning.errors import InputError
from grade_lightning.methods import GradeSTE
from grade_lightning.policies import Policy
from grade_lightning.rewards import (
    Classifier,
    ClassifierReward,
    DifferentiableReward,
    FunctionReward,
    Reward,
    Scores,
    WeightedSum,
)
from grade_lightning.rollouts import Rollout
from tests.conftest import CONFIGS, VOCABULARY, make_model, make_prompts, make_tokenizer


def make_classifier(name: str = "gpt2", dtype: torch.dtype = torch.float64, seed: int = 3) -> Classifier:
    backbone: Any = make_model(name, dtype).base_model
    torch.manual_seed(seed)
    classifier = Classifier(backbone, hidden=8).to(dtype)
    with torch.no_grad():
        for parameter in classifier.head.parameters():
            parameter.mul_(3)
    return classifier


def make_rollout(**columns: list[Any]) -> Rollout:
    """Three completions of 4, 2 and 1 tokens after prompts padded on the left."""
    prompts = make_prompts()
    return Rollout(
        prompt_ids=prompts["input_ids"],
        prompt_mask=prompts["attention_mask"],
        completion_ids=torch.tensor([[4, 5, 6, 7], [8, 0, 1, 1], [0, 1, 1, 1]]),
        completion_mask=torch.arange(4) < torch.tensor([[4], [2], [1]]),
        logps=torch.zeros(3, 4),
        tokenizer=make_tokenizer(),
        columns=columns,
        eos_ids=[0],
    )


def one_hot_gradient(reward: DifferentiableReward, rollout: Rollout) -> Tensor:
    """∂ Σ reward / ∂ one-hot completion tokens, with the whole sequence as one-hot @ table."""
    one_hot = torch.nn.functional.one_hot(rollout.ids, VOCABULARY).to(reward.table().dtype).requires_grad_()
    total = reward.score_embeddings(one_hot @ reward.table(), rollout.mask).sum()
    (gradient,) = torch.autograd.grad(total, one_hot)
    return gradient[:, rollout.prompt_ids.shape[1] :]


def adjoint(scores: Scores) -> Tensor:
    return torch.stack([part() for part in scores.adjoints]).sum(0)


# ---- pathwise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["probability", "logit"])
@pytest.mark.parametrize("name", CONFIGS)
def test_pathwise_is_the_gradient_at_the_one_hot_tokens(name: str, output: Any) -> None:
    reward, rollout = ClassifierReward.from_classifier(make_classifier(name), output), make_rollout()
    scores, truth = reward.pathwise(rollout), one_hot_gradient(reward, rollout)
    # transformers computes RMSNorm and rotary embeddings in float32 even in a float64 model
    tolerance = 1e-12 if name == "gpt2" else 1e-5
    assert (adjoint(scores) - truth).norm() < tolerance * truth.norm()
    assert (truth[0].norm(dim=-1) > 0).all()
    assert (adjoint(scores)[~rollout.completion_mask] == 0).all()
    torch.testing.assert_close(scores.total, reward.score(rollout).total)
    assert not scores.total.requires_grad


def test_pathwise_works_without_gradients_and_leaves_none() -> None:
    reward, rollout = ClassifierReward.from_classifier(make_classifier()), make_rollout()
    with torch.no_grad():
        scores = reward.pathwise(rollout)
    torch.testing.assert_close(adjoint(scores), one_hot_gradient(reward, rollout))
    assert all(parameter.grad is None for parameter in reward.parameters())


# ---- sums ---------------------------------------------------------------------------------------------------------


def constant(*values: float | None, name: str = "rule") -> FunctionReward:
    def rule(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return list(values)

    rule.__name__ = name
    return FunctionReward(rule)


def test_weighted_sum_adds_totals_and_adjoints() -> None:
    parts = [ClassifierReward.from_classifier(make_classifier(name)) for name in ("gpt2", "llama")]
    rollout = make_rollout()
    total = WeightedSum([*parts], [2.0, -0.5])
    assert total.differentiable
    scores = total.pathwise(rollout)
    one, two = (part.score(rollout).total for part in parts)
    torch.testing.assert_close(scores.total, 2 * one - 0.5 * two)
    torch.testing.assert_close(total(rollout), scores.total)
    truth = 2 * one_hot_gradient(parts[0], rollout) - 0.5 * one_hot_gradient(parts[1], rollout)
    assert (adjoint(scores) - truth).norm() < 1e-5 * truth.norm()
    assert torch.equal(scores.parts["classifier"], one)
    assert torch.equal(scores.parts["classifier-2"], two)


def test_where_one_reward_abstains_the_others_count_alone() -> None:
    total = WeightedSum([constant(1, None, None), constant(2, 3, None)], [10, 1])
    scores = total.score(make_rollout())
    assert scores.total[:2].tolist() == [12, 3]
    assert scores.total[2].isnan()
    assert scores.parts["rule"].isnan().tolist() == [False, True, True]
    assert scores.parts["rule-2"].isnan().tolist() == [False, False, True]


def test_parts_of_the_same_name_are_all_kept() -> None:
    three = WeightedSum([constant(1, 1, 1), constant(2, 2, 2), constant(3, 3, 3), constant(4, 4, 4, name="other")])
    parts = {name: float(value[0]) for name, value in three.score(make_rollout()).parts.items()}
    assert parts == {"rule": 1, "rule-2": 2, "rule-3": 3, "other": 4}


def test_parts_of_nested_sums_are_all_kept() -> None:
    nested = WeightedSum([constant(1, 1, 1), WeightedSum([constant(2, 2, 2), constant(3, 3, 3)])])
    parts = nested.score(make_rollout()).parts
    assert sorted(float(value[0]) for value in parts.values()) == [1, 2, 3]


def test_names_that_hold_a_hyphen_are_all_kept() -> None:
    parts = WeightedSum([constant(1, 1, 1, name="a-b"), constant(2, 2, 2, name="a-b")]).score(make_rollout()).parts
    assert sorted(float(value[0]) for value in parts.values()) == [1, 2]


def test_scores_are_taken_apart_and_joined_with_all_their_parts() -> None:
    scores = WeightedSum([constant(1, None, 3), constant(2, None, 4, name="other")]).score(make_rollout())
    part = scores.select(torch.tensor([2, 1]))
    assert part.total[0] == 7
    assert part.total[1].isnan()
    assert {name: value[0].item() for name, value in part.parts.items()} == {"rule": 3, "other": 4}
    assert all(value[1].isnan() for value in part.parts.values())
    assert scores.total.shape == (3,)

    joined = Scores.join([part, scores])
    torch.testing.assert_close(joined.total, torch.tensor([7, torch.nan, 3, torch.nan, 7]), equal_nan=True)
    assert joined.parts.keys() == scores.parts.keys()
    torch.testing.assert_close(joined.parts["rule"], torch.tensor([3, torch.nan, 1, torch.nan, 3]), equal_nan=True)


def test_parts_of_scores_have_no_adjoints() -> None:
    """They are of all rows: a method that sends gradients through the reward trains on whole rollouts."""
    scores = ClassifierReward.from_classifier(make_classifier()).pathwise(make_rollout())
    assert len(scores.adjoints) == 1
    assert scores.select(torch.tensor([0])).adjoints == []
    assert Scores.join([scores, scores]).adjoints == []


def test_a_sum_is_differentiable_when_all_parts_are() -> None:
    classifier = ClassifierReward.from_classifier(make_classifier())
    assert WeightedSum([classifier]).differentiable
    assert not WeightedSum([classifier, constant(1, 1, 1)]).differentiable
    assert not WeightedSum([WeightedSum([classifier, constant(1, 1, 1)])]).differentiable


@pytest.mark.parametrize("weights", [[], [1.0, 2.0]])
def test_one_weight_for_each_reward(weights: list[float]) -> None:
    with pytest.raises(InputError, match="1 rewards but"):
        WeightedSum([constant(1)], weights)
    with pytest.raises(InputError, match="0 rewards"):
        WeightedSum([])


class Abstains(ClassifierReward):
    """Of the second completion."""

    how = "add"

    def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        scores, nan = super().score_embeddings(embeddings, mask), torch.tensor([0.0, math.nan, 0.0])
        if self.how == "add":
            return scores + nan
        return scores * (1 + nan) if self.how == "multiply" else scores.where(~nan.isnan(), math.nan)


@pytest.mark.parametrize("how", ["add", "multiply", "where"])
def test_a_differentiable_reward_that_abstains_moves_nothing(how: str) -> None:
    classifier, rollout = make_classifier(), make_rollout()
    reward, plain = Abstains.from_classifier(classifier), ClassifierReward.from_classifier(classifier)
    assert isinstance(reward, Abstains)
    reward.how = how
    answered = torch.tensor([0, 2])
    alone, both = reward.pathwise(rollout), WeightedSum([reward, plain], [2.0, 3.0]).pathwise(rollout)
    assert alone.total.isnan().tolist() == [False, True, False]
    assert not adjoint(alone)[1].any()
    torch.testing.assert_close(adjoint(alone)[answered], adjoint(plain.pathwise(rollout))[answered])
    torch.testing.assert_close(both.total[1], 3 * plain(rollout)[1])
    torch.testing.assert_close(adjoint(both)[1], 3 * adjoint(plain.pathwise(rollout))[1])


def test_infinities_that_cancel_are_no_abstention() -> None:
    total = WeightedSum([constant(math.inf, 1, None), constant(-math.inf, None, None)]).score(make_rollout()).total
    assert total[:2].tolist() == [math.inf, 1]
    assert total[2].isnan()


# ---- what GRADE needs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: constant(1),
        lambda: WeightedSum([constant(1)]),
        lambda: WeightedSum([constant(1), ClassifierReward()]),
        lambda: WeightedSum([ClassifierReward(), constant(1)]),
        lambda: WeightedSum([ClassifierReward(), WeightedSum([ClassifierReward(), constant(1)])]),
    ],
    ids=["alone", "sum", "first", "last", "nested"],
)
def test_grade_says_at_construction_what_to_do_about_a_scalar_reward(make: Callable[[], Reward]) -> None:
    """Before anything is loaded."""
    with pytest.raises(InputError, match=r"reward rule: not differentiable.*ClassifierReward"):
        GradeSTE(Policy("nowhere"), make())


# ---- Python functions ---------------------------------------------------------------------------------------------


def test_a_function_gets_texts_and_columns_by_keyword() -> None:
    seen: dict[str, Any] = {}

    def rule(prompts: list[str], completions: list[str], label: list[int], **columns: Any) -> list[float | None]:
        seen.update(prompts=prompts, completions=completions, label=label, columns=columns)
        return [1, None, 0.5]

    rollout = make_rollout(label=[1, 0, 1], note=["a", "b", "c"], prompts=["x"], completions=["y"])
    reward = FunctionReward(rule)
    scores = reward.score(rollout)
    assert seen["prompts"] == rollout.prompts
    assert seen["completions"] == ["w4 w5 w6 w7", "w8", ""]
    assert seen["label"] == [1, 0, 1]
    assert seen["columns"] == {"note": ["a", "b", "c"]}
    assert scores.total.dtype == torch.float32
    assert scores.total[[0, 2]].tolist() == [1, 0.5]
    assert math.isnan(scores.total[1])
    assert list(scores.parts) == ["rule"]
    assert not reward.differentiable


@pytest.mark.parametrize("values", [[1.0], [1.0] * 4, []])
def test_a_function_of_the_wrong_length_is_named(values: list[float]) -> None:
    with pytest.raises(InputError, match=rf"rule: {len(values)} values for 3 completions"):
        constant(*values).score(make_rollout())


NO_NUMBERS = [["a", 1, 2], ["1", "2", "3"], ["a\nb"] * 3, [[1], [2], [3]], [1j] * 3, [10**400] * 3, 1.0, None]
NO_LISTS = ["123", b"123", {0: 1, 1: 1, 2: 1}, {1, 2, 3}, torch.tensor(1.0), torch.ones(3, 1), numpy.ones((3, 2))]


@pytest.mark.parametrize("value", NO_NUMBERS + NO_LISTS, ids=lambda value: type(value).__name__)
def test_a_function_of_the_wrong_type_is_named(value: Any) -> None:
    with pytest.raises(InputError, match=r"^reward rule: must return a list of numbers or None, not .+$"):
        returns(value).score(make_rollout())


def returns(value: Any, timeout: float | None = None) -> FunctionReward:
    def rule(**_: Any) -> Any:
        return value

    return FunctionReward(rule, timeout)


@pytest.mark.parametrize(
    "make",
    [
        lambda: [1, 0.5, True],
        lambda: (1, 0.5, 1),
        lambda: iter([1, 0.5, 1]),
        lambda: (value for value in [1, 0.5, 1]),
        lambda: {"a": 1, "b": 0.5, "c": 1}.values(),
        lambda: torch.tensor([1, 0.5, 1], dtype=torch.bfloat16, requires_grad=True),
        lambda: [torch.tensor(1), numpy.float32(0.5), Fraction(1)],
        lambda: numpy.array([1, 0.5, 1]),
        lambda: numpy.array([1, 0.5, True], dtype=object),
    ],
)
def test_a_function_may_return_numbers_in_many_forms(make: Callable[[], Any]) -> None:
    assert returns(make())(make_rollout()).tolist() == [1, 0.5, 1]


@pytest.mark.parametrize("form", [list, torch.tensor, numpy.array])
def test_a_nan_that_a_function_computes_is_a_mistake_and_no_abstention(form: Callable[..., Any]) -> None:
    """An infinite reward leaves its step out."""
    assert returns(form([1.0, math.nan, -math.inf]))(make_rollout()).tolist() == [1, math.inf, -math.inf]
    assert returns([1, None, math.nan])(make_rollout())[1].isnan()


def raising(error: BaseException) -> Iterator[float]:
    raise error
    yield 1.0


@pytest.mark.parametrize("timeout", [None, 60.0])
@pytest.mark.parametrize("lazily", [False, True])
def test_a_function_that_raises_is_named_in_one_line(lazily: bool, timeout: float | None) -> None:
    def rule(**_: Any) -> Any:
        values = raising(KeyError("no\nsuch column"))
        return values if lazily else list(values)

    with pytest.raises(InputError, match=r"^reward rule: the function raised KeyError: .*such column.*$"):
        FunctionReward(rule, timeout).score(make_rollout())


def test_a_function_that_is_interrupted_is_no_mistake_of_its_own() -> None:
    with pytest.raises(KeyboardInterrupt):
        returns(raising(KeyboardInterrupt())).score(make_rollout())


# ---- slow and asynchronous ones -----------------------------------------------------------------------------------


def test_a_slow_function_is_named_with_its_timeout() -> None:
    never = Event()
    reward = FunctionReward(lambda **_: never.wait(), timeout=0.05)
    with pytest.raises(InputError, match=r"no answer within 0\.05 s for 3 completions; make the function faster or"):
        reward.score(make_rollout())
    assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())
    never.set()


def test_a_slow_generator_and_a_slow_coroutine_are_in_the_time_too() -> None:
    never = Event()
    with pytest.raises(InputError, match=r"no answer within 0\.05 s"):
        FunctionReward(lambda **_: (never.wait() for _ in range(3)), timeout=0.05).score(make_rollout())

    async def rule(**_: Any) -> list[float]:
        await asyncio.Event().wait()
        return [1, 2, 3]

    with pytest.raises(InputError, match=r"reward rule: no answer within 0\.05 s"):
        FunctionReward(rule, timeout=0.05).score(make_rollout())
    never.set()


def test_a_timeout_that_the_function_raises_itself_is_not_ours() -> None:
    with pytest.raises(InputError, match="the function raised TimeoutError: the server"):
        FunctionReward(lambda **_: list(raising(TimeoutError("the server"))), timeout=60).score(make_rollout())


def test_a_run_whose_function_never_returns_ends() -> None:
    """With status 1 here, where nobody turns the error into 2; the thread does not keep the process alive."""
    code = """
import threading
from types import SimpleNamespace
from grade_lightning.rewards import FunctionReward
rollout = SimpleNamespace(prompts=["p"], completions=["c"], columns={})
FunctionReward(lambda **_: threading.Event().wait(), timeout=0.1)(rollout)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "no answer within 0.1 s for 1 completions" in done.stderr


class Asynchronous:
    """Its event loop must be the same in all calls, as a client's connections need it."""

    def __init__(self) -> None:
        self.loops: list[asyncio.AbstractEventLoop] = []

    async def __call__(self, completions: list[str], **_: Any) -> list[float | None]:
        await asyncio.sleep(0)
        self.loops.append(asyncio.get_running_loop())
        return [float(len(text.split())) for text in completions]


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_an_asynchronous_function_is_awaited_within_a_running_loop_too(timeout: float | None) -> None:
    function = Asynchronous()
    reward = FunctionReward(function, timeout)

    async def notebook() -> list[float]:
        return reward.score(make_rollout()).total.tolist()

    assert reward(make_rollout()).tolist() == [4, 1, 0]
    assert asyncio.run(notebook()) == [4, 1, 0]
    assert function.loops[0] is function.loops[1]


def test_an_asynchronous_function_that_fails_is_named() -> None:
    async def rule(**_: Any) -> list[float]:
        raise ValueError("too many requests")

    with pytest.raises(InputError, match="reward rule: the function raised ValueError: too many requests"):
        FunctionReward(rule).score(make_rollout())


def test_a_function_gets_every_completion_as_text() -> None:
    """Also an empty one, and others than English."""
    rollout = make_rollout()
    rollout.completions = ["", "naïve 読む 🙂\u2028", "\ufffd"]
    seen: list[str] = []

    def rule(completions: list[str], **_: Any) -> list[float | None]:
        seen.extend(completions)
        return [float(len(text)) for text in completions]

    assert FunctionReward(rule)(rollout).tolist() == [0, 11, 1]
    assert seen == rollout.completions


def test_a_callable_object_is_named_by_its_class() -> None:
    class Brevity:
        def __call__(self, completions: list[str], **_: Any) -> list[float | None]:
            return [-float(len(text.split())) for text in completions]

    reward = FunctionReward(Brevity())
    assert reward.name == "Brevity"
    assert reward(make_rollout()).tolist() == [-4, -1, 0]


# ---- classifier ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_classifier(dtype=torch.float32).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_probability_is_the_sigmoid_of_the_logit() -> None:
    classifier, rollout = make_classifier(), make_rollout()
    probability = ClassifierReward.from_classifier(classifier)(rollout)
    logit = ClassifierReward.from_classifier(classifier, "logit")(rollout)
    torch.testing.assert_close(probability, logit.sigmoid())
    assert ((probability > 0) & (probability < 1)).all()
    assert logit.std() > 0.1


def test_padding_does_not_count() -> None:
    """Each sequence scored alone and unpadded: a mean over hidden states, then two linear layers."""
    classifier, rollout = make_classifier(), make_rollout()
    found = ClassifierReward.from_classifier(classifier, "logit")(rollout)
    for row, (ids, mask) in enumerate(zip(rollout.ids, rollout.mask.bool(), strict=True)):
        states = classifier.backbone(input_ids=ids[mask].unsqueeze(0)).last_hidden_state[0]
        torch.testing.assert_close(found[row], classifier.head(states.mean(0))[0].detach())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_classifier_survives_its_folder(name: str, tmp_path: Path) -> None:
    classifier, rollout = make_classifier(name, torch.float32), make_rollout()
    classifier.save_pretrained(tmp_path)
    again = Classifier.from_pretrained(str(tmp_path))
    truth, found = (c.eval()(c.embed(rollout.ids), rollout.mask) for c in (classifier, again))
    torch.testing.assert_close(found, truth)
    assert again.hidden == 8


def test_a_reward_loads_its_folder_frozen_and_in_evaluation_mode(folder: Path) -> None:
    reward = ClassifierReward(str(folder))
    reward.load(make_tokenizer(), VOCABULARY)
    reward.train()
    assert not any(module.training for module in reward.modules())
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    truth = ClassifierReward.from_classifier(make_classifier(dtype=torch.float32))
    torch.testing.assert_close(reward(make_rollout()), truth(make_rollout()))
    assert reward.table().shape[0] == VOCABULARY


def test_a_table_has_the_rows_of_the_policy(folder: Path) -> None:
    """Backbones pad their vocabulary: more rows than the policy has logits are cut, fewer are an error."""
    reward = ClassifierReward(str(folder))
    reward.load(make_tokenizer(), VOCABULARY - 2)
    assert reward.table().shape[0] == VOCABULARY - 2
    with pytest.raises(InputError, match=rf"embeds {VOCABULARY} tokens.*{VOCABULARY + 1} logits"):
        ClassifierReward(str(folder)).load(make_tokenizer(), VOCABULARY + 1)


def test_another_vocabulary_is_refused_with_both_sizes(folder: Path) -> None:
    words = {word: i for i, word in enumerate(["<eos>", "<pad>", "w3", "w2", "x"])}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")))
    with pytest.raises(InputError, match=rf"\({VOCABULARY} tokens\).*\(5\).*RewardModel"):
        ClassifierReward(str(folder)).load(other, 5)


def test_the_same_words_in_another_order_are_refused(folder: Path) -> None:
    order = [0, 1, *range(VOCABULARY - 1, 1, -1)]
    names = ["<eos>", "<pad>", *(f"w{i}" for i in range(2, VOCABULARY))]
    words = {names[i]: place for place, i in enumerate(order)}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")))
    with pytest.raises(InputError, match="vocabulary"):
        ClassifierReward(str(folder)).load(other, VOCABULARY)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("reward_head.json", None),
        ("reward_head.json", b"{"),
        ("reward_head.json", b"{}"),
        ("reward_head.json", b'{"hidden": 9}'),
        ("reward_head.safetensors", None),
        ("reward_head.safetensors", b""),
        ("reward_head.safetensors", "half"),
        ("model.safetensors", "half"),
        ("config.json", None),
    ],
    ids=str,
)
def test_a_damaged_folder_is_named(folder: Path, file: str, content: bytes | str | None) -> None:
    path = folder / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if isinstance(content, str) else content)
    with pytest.raises(InputError) as caught:
        ClassifierReward(str(folder)).load(make_tokenizer(), VOCABULARY)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
