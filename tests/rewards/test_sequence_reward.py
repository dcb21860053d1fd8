"""Sequence classifiers as rewards: against transformers' own pipeline, and against finite differences."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.policies import low_bit
from grade_lightning.records import Rollout
from grade_lightning.rewards import SequenceClassifierReward
from grade_lightning.rewards.retokenize import texts_of
from tests.conftest import VOCABULARY, make_model, make_tokenizer
from tests.rewards.making import make_rollout
from tests.rewards.sequences import CHAT, KINDS, said_by_pipeline, text_of, words, write_classifier

every_kind = pytest.mark.parametrize("kind", KINDS)
STEPS = 1, -1, 2, -2
SINGLE_INSIDE = "llama", "qwen3", "gemma", "gemma3_text", "deberta"
"""Some of their layers compute in float32 whatever the weights are."""
TALK = [{"role": "user", "content": "w7 w8"}]


def loaded(folder: Path, **kwargs: Any) -> SequenceClassifierReward:
    reward = SequenceClassifierReward(str(folder), **kwargs)
    reward.load(make_tokenizer(), VOCABULARY)
    return reward


def rows(rollout: Rollout, *numbers: int) -> Rollout:
    return rollout.select(torch.tensor(numbers))


def same(found: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
    assert len(found) == 1 or found.std() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@every_kind
def test_scores_are_those_of_the_pipeline(kind: str, side: str, tmp_path: Path) -> None:
    """Whole batches and each row alone; the pipeline pads its batch on one side or the other."""
    rollout = make_rollout()
    folder = write_classifier(tmp_path, kind, words(padding_side=side))
    reward = loaded(folder)
    assert reward.differentiable
    alone = said_by_pipeline(folder, text_of(rollout))
    same(reward(rollout), alone)
    if kind in ("llama", "gpt2") and side == "right":  # encoders and absolute positions are off in its padded batches
        same(reward(rollout), said_by_pipeline(folder, text_of(rollout), batch_size=3))
    for row in range(3):
        same(reward(rows(rollout, row)), alone[row : row + 1])
    same(reward.score(rollout).total, reward.pathwise(rollout).total)


@every_kind
def test_gradients_are_those_of_finite_differences(kind: str, tmp_path: Path) -> None:
    folder, rollout = write_classifier(tmp_path, kind, words(), torch.float64), make_rollout()
    reward = loaded(folder, dtype="float64", output="sigmoid", scale=3.0, shift=-1.0)
    (adjoint,) = reward.pathwise(rollout).adjoints
    completion = reward.table()[rollout.completion_ids]
    direction = torch.randn(completion.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = direction * rollout.completion_mask.unsqueeze(-1)
    step = 1e-3
    at = {k: reward.score_embeddings(*reward.place(rollout, completion + k * step * direction)) for k in STEPS}
    truth = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)  # to the fourth order
    found = (adjoint.gradient * direction).sum((1, 2))
    assert truth.abs().max() > 1e-3
    tolerance = 2e-3 if kind in SINGLE_INSIDE else 1e-6
    torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance)
    assert not adjoint.gradient[~rollout.completion_mask].any()


def test_a_model_without_padding(tmp_path: Path) -> None:
    folder, rollout = write_classifier(tmp_path, "llama", words(), pad_token_id=None), make_rollout()
    same(loaded(folder)(rollout), said_by_pipeline(folder, text_of(rollout)))


def test_the_last_token_may_be_padding_of_the_model(tmp_path: Path) -> None:
    """The library pools before tokens that are its padding, of which the EOS often is one."""
    tokenizer, rollout = words(), make_rollout()
    folder = write_classifier(tmp_path, "llama", tokenizer, pad_token_id=0)
    reward = loaded(folder)
    same(reward(rollout), said_by_pipeline(folder, text_of(rollout)))
    gradient = reward.pathwise(rollout).adjoints[0].gradient
    assert not gradient[1, 1].any()  # the EOS
    assert gradient[1, 0].any()


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_one_of_several_labels(kind: str, tmp_path: Path) -> None:
    names = {0: "bad", 1: "fair", 2: "good"}
    folder, rollout = write_classifier(tmp_path, kind, words(), num_labels=3, id2label=names), make_rollout()
    for label, number in (("fair", 1), (2, 2), ("2", 2)):
        for output, function in (("logit", "none"), ("sigmoid", "sigmoid"), ("softmax", "softmax")):
            found = loaded(folder, label=label, output=output, scale=2.0, shift=0.5)(rollout)
            same(found, 2 * said_by_pipeline(folder, text_of(rollout), function, number) + 0.5)


@pytest.mark.parametrize("kind", ["llama", "bert", "deberta-v2"])
def test_another_vocabulary_is_scored_in_its_own_tokens(kind: str, tmp_path: Path) -> None:
    framed = kind != "llama"
    folder = write_classifier(tmp_path, kind, words("[CLS]", "[SEP]", framed=framed))
    reward, rollout = loaded(folder), make_rollout()
    assert not reward.differentiable
    texts = texts_of(rollout)
    if not framed:
        texts = [text + " <eos>" * ended for text, ended in zip(texts, rollout.ended.tolist(), strict=True)]
    same(reward(rollout), said_by_pipeline(folder, texts))
    with pytest.raises(InputError, match=r"vocabulary \(21 tokens\) is not the policy's \(19\)"):
        reward.pathwise(rollout)


def talking(rollout: Rollout) -> Rollout:
    """The second prompt is a conversation, the third one that the assistant has begun to answer."""
    begun = [*TALK, {"role": "assistant", "content": "w9 "}]
    return replace(rollout, columns={"prompt": ["w3 w4", TALK, begun]})


WRITTEN = ["w2 w3 w7 w8 <eos> w5 w2 w4 w8 <eos> w5", "w2 w3 w7 w8 <eos> w5 w2 w4 w9 <eos> w5"]
"""By `CHAT`, of completions "w8 <eos>" and "<eos>"."""


@pytest.mark.parametrize("extra", [[], ["w99"]], ids=["own", "foreign"])
def test_conversations_are_written_by_its_own_template(extra: list[str], tmp_path: Path) -> None:
    tokenizer = words(*extra)
    tokenizer.chat_template = CHAT
    folder = write_classifier(tmp_path, "llama", tokenizer)
    reward, rollout = loaded(folder), talking(make_rollout())
    same(reward(rollout)[1:], said_by_pipeline(folder, WRITTEN))
    same(reward(rollout)[:1], said_by_pipeline(folder, text_of(rollout)[:1]))
    if not extra:
        gradient = reward.pathwise(rollout).adjoints[0].gradient
        assert gradient[1, :2].abs().sum(-1).all()  # also the EOS, which the template writes
        assert not gradient[1, 2:].any()


def test_without_a_template_conversations_are_plain_text(tmp_path: Path) -> None:
    reward, rollout = loaded(write_classifier(tmp_path, "llama", words())), make_rollout()
    same(reward(talking(rollout)), reward(rollout))


def test_in_half_precision(tmp_path: Path) -> None:
    folder, rollout = write_classifier(tmp_path, "llama", words()), make_rollout()
    found = loaded(folder, dtype="bfloat16", output="sigmoid")
    assert found.table().dtype == torch.bfloat16
    assert found(rollout).dtype == torch.float32
    torch.testing.assert_close(found(rollout), loaded(folder, output="sigmoid")(rollout), atol=0.1, rtol=0)


def test_8_bits_need_what_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_classifier(tmp_path, "llama", words())
    monkeypatch.setattr(low_bit, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(InputError, match=r"load_in_8bit needs bitsandbytes: pip install .*; or set dtype") as caught:
        loaded(folder, load_in_8bit=True)
    assert "\n" not in str(caught.value)


def test_in_8_bits(tmp_path: Path) -> None:
    """Close to float32, and with a gradient."""
    pytest.importorskip("bitsandbytes")
    folder, rollout = write_classifier(tmp_path, "llama", words()), make_rollout()
    found, wide = loaded(folder, load_in_8bit=True), loaded(folder)
    assert {p.dtype for p in found.parameters()} == {torch.int8, torch.float32}
    torch.testing.assert_close(found(rollout), wide(rollout), atol=0.05, rtol=0.05)
    ours, theirs = (reward.pathwise(rollout).adjoints[0].gradient for reward in (found, wide))
    assert (ours - theirs).norm() < 0.1 * theirs.norm()


def test_what_is_longer_than_the_context_is_cut_and_has_no_gradient(tmp_path: Path) -> None:
    tokenizer = words()
    tokenizer.model_max_length = 7
    reward, rollout = loaded(write_classifier(tmp_path, "llama", tokenizer)), make_rollout()
    with pytest.warns(UserWarning, match="longer than its context of 7 tokens"):
        gradient = reward.pathwise(rollout).adjoints[0].gradient
    assert gradient[0].abs().sum(-1).bool().tolist() == [True, True, False, False]
    assert reward.context_length == 7


BAD = "{{ raise_exception('no assistants') }}"


@pytest.mark.parametrize(
    ("change", "kwargs", "says"),
    [
        ({"num_labels": 3}, {}, r"3 labels, 0 \(LABEL_0\).*choose one by --model.reward.label"),
        ({"num_labels": 3}, {"label": "nice"}, r"no label 'nice'; its labels are 0 \(LABEL_0\)"),
        ({"num_labels": 3}, {"label": 3}, "no label 3"),
        ({}, {"output": "softmax"}, "softmax over one label is always 1"),
        ({"template": BAD}, {}, "chat template does not take .*no assistants.*plain text"),
        ({"template": "{% if %}"}, {}, "chat template does not take"),
        ({"template": "hello"}, {}, "leaves out what the assistant says"),
        ({"vocab_size": 18}, {}, "embeds 18 tokens but the policy has 19 logits"),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_line(
    change: dict[str, Any], kwargs: dict[str, Any], says: str, tmp_path: Path
) -> None:
    tokenizer = words()
    tokenizer.chat_template = change.pop("template", None)
    folder = write_classifier(tmp_path, "llama", tokenizer, **change)
    with pytest.raises(InputError, match=says) as caught:
        loaded(folder, **kwargs)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_generative_model_is_no_classifier(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"holds LlamaForCausalLM and no classifier \(score.weight is missing\)"):
        loaded(tmp_path)


def test_a_folder_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config.json"):
        loaded(tmp_path)
    folder = write_classifier(tmp_path / "half", "llama", words())
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard"}))
    with pytest.raises(InputError, match="cannot be loaded"):
        loaded(folder)
