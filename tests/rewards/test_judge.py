"""A language model as a judge: against a plain forward pass of transformers, and against finite differences."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from grade_lightning.errors import InputError
from grade_lightning.methods import GradeSTE
from grade_lightning.records import Rollout
from grade_lightning.rewards import JudgeReward
from tests.conftest import CONFIGS, VOCABULARY, make_model, make_tokenizer
from tests.methods.toy_task import batches, fit, make
from tests.rewards.making import make_rollout
from tests.rewards.sequences import CHAT, words, write_classifier

ASKS = "w2 {prompt} w3 {completion} w4 w5"
STEPS = 1, -1, 2, -2
every_kind = pytest.mark.parametrize("kind", CONFIGS)


def write_judge(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, tokenizer: Any = None, size: int = 0
) -> Path:
    model: Any = make_model(kind, dtype, scale=4.0)
    if size:
        model.resize_token_embeddings(size)
    model.save_pretrained(folder)
    (tokenizer or words()).save_pretrained(folder)
    return folder


def loaded(folder: Path, **kwargs: Any) -> JudgeReward:
    settings: dict[str, Any] = {"rubric": ASKS, "yes": "w6", "no": "w7"}
    reward = JudgeReward(str(folder), **settings | kwargs)
    reward.load(make_tokenizer(), VOCABULARY)
    return reward


def questions(rollout: Rollout) -> list[str]:
    pairs = zip(rollout.prompts, rollout.completions, strict=True)
    return [f"w2 {prompt} w3 {completion} w4 w5" for prompt, completion in pairs]


def plain(folder: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str], yes: int, no: int) -> Tensor:
    """P(yes) / (P(yes) + P(no)), each question by itself."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for text in texts:
        with torch.no_grad():
            ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
            probs = model(input_ids=ids).logits[0, -1].double().softmax(-1)
        found.append(probs[yes] / (probs[yes] + probs[no]))
    return torch.stack(found).float()


@every_kind
def test_scores_are_those_of_a_plain_forward(kind: str, tmp_path: Path) -> None:
    """Whole batches and each row by itself; the third completion has no words."""
    folder, rollout = write_judge(tmp_path, kind), make_rollout()
    reward = loaded(folder)
    assert reward.differentiable
    truth = plain(folder, words(), questions(rollout), 6, 7)
    assert truth.std() > 1e-3
    torch.testing.assert_close(reward(rollout), truth, rtol=1e-5, atol=1e-5)
    for row in range(3):
        alone = reward(rollout.select(torch.tensor([row])))
        torch.testing.assert_close(alone, truth[row : row + 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reward.pathwise(rollout).total, truth, rtol=1e-5, atol=1e-5)
    logits = loaded(folder, output="logit")(rollout)
    torch.testing.assert_close(logits.sigmoid(), truth, rtol=1e-5, atol=1e-5)


@every_kind
def test_gradients_are_those_of_finite_differences(kind: str, tmp_path: Path) -> None:
    reward, rollout = loaded(write_judge(tmp_path, kind, torch.float64), dtype="float64"), make_rollout()
    (adjoint,) = reward.pathwise(rollout).adjoints
    completion = reward.table()[rollout.completion_ids]
    direction = torch.randn(completion.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = direction * rollout.completion_mask.unsqueeze(-1)
    step = 1e-3
    at = {k: reward.score_embeddings(*reward.place(rollout, completion + k * step * direction)) for k in STEPS}
    truth = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)  # to the fourth order
    found = (adjoint.gradient * direction).sum((1, 2))
    assert truth[:2].abs().max() > 1e-3
    tolerance = 1e-6 if kind in ("gpt2", "gpt_neox") else 2e-3  # the others compute their norms in float32
    torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance)
    assert not adjoint.gradient[~rollout.completion_mask].any()
    assert not adjoint.gradient[2].any()  # an EOS alone, which the judge does not see


def test_another_vocabulary_is_asked_in_its_own_tokens(tmp_path: Path) -> None:
    tokenizer, rollout = words("yes", "no"), make_rollout()
    folder = write_judge(tmp_path, tokenizer=tokenizer, size=VOCABULARY + 2)
    reward = loaded(folder, yes="yes", no="no")
    assert not reward.differentiable
    truth = plain(folder, tokenizer, questions(rollout), VOCABULARY, VOCABULARY + 1)
    torch.testing.assert_close(reward(rollout), truth, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"vocabulary \(21 tokens\) is not the policy's \(19\)"):
        reward.pathwise(rollout)


def test_a_chat_template_asks(tmp_path: Path) -> None:
    tokenizer, rollout = words(), make_rollout()
    tokenizer.chat_template = CHAT
    folder = write_judge(tmp_path, tokenizer=tokenizer)
    texts = [f"w2 w3 {question} <eos> w5 w2 w4" for question in questions(rollout)]
    torch.testing.assert_close(loaded(folder)(rollout), plain(folder, words(), texts, 6, 7), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_cut_at_its_beginning(tmp_path: Path) -> None:
    """The question at the end stays, and what is cut has no gradient."""
    tokenizer, rollout = words(), make_rollout()
    folder = write_judge(tmp_path, "gpt2", tokenizer=tokenizer)
    reward = loaded(folder)
    assert reward.context_length == 64 - 4
    reward._loaded.config.n_positions = 5
    with pytest.warns(UserWarning, match=r"3 of 3 questions are longer than its context of 5 tokens"):
        gradient = reward.pathwise(rollout).adjoints[0].gradient
    assert gradient.abs().sum(-1).bool().tolist() == [[False, True, True, True], [True] + 3 * [False], 4 * [False]]
    texts = [" ".join(text.split()[-5:]) for text in questions(rollout)]
    torch.testing.assert_close(reward(rollout), plain(folder, tokenizer, texts, 6, 7), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"yes": "maybe"}, "no token of it says 'maybe'"),
        ({"no": "w6"}, "yes and no are the same token"),
        ({"dtype": "int8"}, "not a floating-point type"),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_line(kwargs: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = write_judge(tmp_path)
    with pytest.raises(InputError, match=says) as caught:
        loaded(folder, **kwargs)
    assert "\n" not in str(caught.value)


def test_a_classifier_is_no_judge(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path, "llama", words())
    with pytest.raises(InputError, match=r"holds LlamaForSequenceClassification and no language model.*is missing"):
        loaded(folder)


@pytest.mark.usefixtures("own_random_state")
def test_grade_ste_trains_through_it(tmp_path: Path) -> None:
    """Its gradient and its value are of one thing: what it says rises, by more than four standard errors."""
    module = make(GradeSTE, beta=0.0)
    module.reward = loaded(write_judge(tmp_path), output="logit")
    steps = fit(module, 8, batches(8, repeat=32)).steps
    rewards = [step["rewards/judge"] for step in steps]
    error = steps[0]["train/reward_std"] * (2 / 96) ** 0.5
    assert rewards[-1] - rewards[0] > 4 * error


def test_the_questions_end_together(tmp_path: Path) -> None:
    """Tokens of the whole question, in front of which padding is."""
    rollout = make_rollout()
    framed = loaded(write_judge(tmp_path)).framed(rollout)
    found = [row[keep.bool()].tolist() for row, keep in zip(framed.ids, framed.mask, strict=True)]
    assert found == [words().encode(text) for text in questions(rollout)]
    assert framed.mask[:, -1].all()


def test_what_a_stop_string_ended_is_read_whole(tmp_path: Path) -> None:
    reward, rollout = loaded(write_judge(tmp_path)), make_rollout()
    rollout = replace(rollout, eos_ids=[])
    stopped = replace(rollout, stop=[rollout.completions[0].split()[-1]])
    assert stopped.ended.any()
    assert torch.equal(reward(stopped), reward(rollout))
