"""Rewards of another vocabulary with a gradient at the policy's tokens."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.methods import GradeSTE
from grade_lightning.records import RelaxedRollout, Rollout
from grade_lightning.rewards import ClassifierReward, JudgeReward, SequenceClassifierReward, TranslatedReward
from grade_lightning.rewards.retokenize import texts_of
from tests.conftest import VOCABULARY, make_tokenizer
from tests.methods.toy_task import assert_same, batches, fit, make, trainer, weights
from tests.rewards.making import adjoint, make_classifier, make_rollout, words_in
from tests.rewards.sequences import said_by_pipeline, words, write_classifier
from tests.rewards.tongues import byte_tokenizer, rollout_of, word_pieces

POLICY = byte_tokenizer()
BYTES = POLICY.encode("日")
EOS = POLICY.eos_token_id


def translated(folder: Path, **settings: Any) -> TranslatedReward:
    """A BERT of word pieces, for a policy of bytes."""
    tokenizer = word_pieces()
    write_classifier(folder, "bert", tokenizer, vocab_size=len(tokenizer), pad_token_id=0, **settings)
    reward = TranslatedReward(SequenceClassifierReward(str(folder)))
    reward.load(POLICY, len(POLICY))
    return reward


def foreign_gradient(reward: TranslatedReward, rollout: Rollout) -> tuple[list[list[str]], Tensor]:
    """The pieces of each text, and the gradient at them."""
    inner = reward.reward
    assert inner.foreign is not None
    ids = [inner.foreign(text)["input_ids"] for text in texts_of(rollout)]
    found = []
    for row in ids:
        x = inner.embed(torch.tensor([row])).detach().requires_grad_()
        total = inner.score_embeddings(x, torch.ones(1, len(row)))
        found.append(torch.autograd.grad(total.sum(), x)[0][0])
    padded = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
    return [inner.foreign.convert_ids_to_tokens(row) for row in ids], padded


TEXTS = ("the cat", " played."), ("a", [*BYTES, EOS]), ("hel", "lo!"), ("it", [EOS, *POLICY.encode(" cat")])


def test_the_score_is_that_of_the_foreign_pipeline(tmp_path: Path) -> None:
    """Bit for bit that of the reward itself; whole batches, rows alone, and by its value or its gradient."""
    reward, rollout = translated(tmp_path), rollout_of(POLICY, *TEXTS)
    found = reward.pathwise(rollout)
    assert torch.equal(found.total, reward.reward(rollout))
    assert torch.equal(found.total, reward.score(rollout).total)
    torch.testing.assert_close(found.total, said_by_pipeline(tmp_path, texts_of(rollout)), rtol=1e-5, atol=1e-5)
    assert found.total.std() > 1e-3
    assert found.parts.keys() == {"classifier"}
    for row in range(len(TEXTS)):
        alone = reward.pathwise(rollout.select(torch.tensor([row])))
        torch.testing.assert_close(alone.total, found.total[row : row + 1])
        gradient = found.adjoints[0].gradient[row, : alone.adjoints[0].gradient.shape[1]]
        torch.testing.assert_close(alone.adjoints[0].gradient[0], gradient, rtol=1e-4, atol=1e-6)


def test_tokens_share_the_gradients_of_their_pieces(tmp_path: Path) -> None:
    reward, rollout = translated(tmp_path), rollout_of(POLICY, *TEXTS)
    pieces, truth = foreign_gradient(reward, rollout)
    (found,) = reward.pathwise(rollout).adjoints
    tokens = [
        POLICY.convert_ids_to_tokens(rollout.completion_ids[i, rollout.sampled[i]].tolist()) for i in range(len(TEXTS))
    ]

    def at(row: int, piece: str) -> Tensor:
        return truth[row, pieces[row].index(piece)]

    def same(row: int, token: int, expected: Tensor) -> None:
        torch.testing.assert_close(found.gradient[row, token], expected, rtol=1e-4, atol=1e-6)
        assert expected.abs().max() > 1e-3 or not expected.any()

    assert pieces[0] == ["[CLS]", "the", "cat", "play", "##ed", ".", "[SEP]"]
    assert tokens[0][0] == "Ġplay"
    same(0, 0, at(0, "play"))
    rest = len(tokens[0]) - 2
    for token in range(1, 1 + rest):  # "ed", in one token or two
        same(0, token, at(0, "##ed") / rest)
    same(0, rest + 1, at(0, "."))
    for token in range(3):
        same(1, token, at(1, "日") / 3)
    same(1, 3, torch.zeros_like(truth[0, 0]))  # the end
    assert pieces[2] == ["[CLS]", "hello", "!", "[SEP]"]  # begun by the prompt
    share = sum(len(token) for token in tokens[2][:-1]) / len("hello")
    begun = found.gradient[2, : len(tokens[2]) - 1].sum(0)
    torch.testing.assert_close(begun, share * at(2, "hello"), rtol=1e-4, atol=1e-6)
    same(3, 0, torch.zeros_like(truth[0, 0]))  # a special token in the middle
    assert not found.gradient[~rollout.sampled].any()


def test_a_token_of_several_pieces_has_the_gradients_of_all(tmp_path: Path) -> None:
    reward, rollout = translated(tmp_path), rollout_of(POLICY, ("a", " cat"), ("a", " rain"))
    pieces, truth = foreign_gradient(reward, rollout)
    assert POLICY.convert_ids_to_tokens(rollout.completion_ids[1].tolist()) == ["Ġrain"]
    assert pieces[1] == ["[CLS]", "a", "r", "##a", "##i", "##n", "[SEP]"]
    (found,) = reward.pathwise(rollout).adjoints
    torch.testing.assert_close(found.gradient[1, 0], truth[1, 2:6].sum(0), rtol=1e-4, atol=1e-6)
    rain = reward.reward.table()[reward.reward.foreign.convert_tokens_to_ids(["r", "##a", "##i", "##n"])]  # type: ignore[union-attr]
    torch.testing.assert_close(found.table[rollout.completion_ids[1, 0]], rain.mean(0))


ORDER = [0, 1, *range(VOCABULARY - 1, 1, -1)]
"""The same words, numbered the other way round."""


def renumbered(rollout: Rollout) -> Rollout:
    place = torch.tensor(ORDER).argsort()
    prompts, completions = place[rollout.prompt_ids], place[rollout.completion_ids]
    return replace(rollout, prompt_ids=prompts, completion_ids=completions, tokenizer=words_in(ORDER))


def test_the_same_words_by_other_numbers_have_the_same_gradient(tmp_path: Path) -> None:
    make_classifier(dtype=torch.float32).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    plain, other = ClassifierReward(str(tmp_path)), TranslatedReward(ClassifierReward(str(tmp_path)))
    plain.load(make_tokenizer(), VOCABULARY)
    other.load(words_in(ORDER), VOCABULARY)
    rollout = make_rollout()
    truth, found = plain.pathwise(rollout), other.pathwise(renumbered(rollout))
    assert other.reward.foreign is not None
    torch.testing.assert_close(found.total, truth.total)
    renamed = adjoint(found)[..., torch.tensor(ORDER).argsort()]
    others = [0, *range(2, VOCABULARY)]  # all but padding
    torch.testing.assert_close(renamed[..., others], adjoint(truth)[..., others])
    assert adjoint(truth)[1, 1].any()  # at the end of a completion that ended by itself


def test_with_the_same_vocabulary_nothing_is_translated(tmp_path: Path) -> None:
    make_classifier(dtype=torch.float32).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    plain, wrapped = ClassifierReward(str(tmp_path)), TranslatedReward(ClassifierReward(str(tmp_path)))
    for reward in (plain, wrapped):
        reward.load(make_tokenizer(), VOCABULARY)
    rollout = make_rollout()
    truth, found = plain.pathwise(rollout), wrapped.pathwise(rollout)
    assert torch.equal(found.total, truth.total)
    assert torch.equal(adjoint(found), adjoint(truth))
    assert wrapped.context_length == plain.context_length == 64


def test_soft_tokens_move_the_pieces(tmp_path: Path) -> None:
    """Hard ones not at all; between two tokens of one piece each, the score of the mixed embedding."""
    reward, rollout = translated(tmp_path), rollout_of(POLICY, ("a", " the"), ("a", " the"))
    the, play = (POLICY.encode(word)[0] for word in (" the", " play"))
    assert rollout.completion_ids.tolist() == [[the]] * 2
    weights = torch.tensor([[[1.0, 0.0]], [[0.6, 0.4]]], requires_grad=True)
    names = "prompt_ids", "prompt_mask", "completion_ids", "completion_mask"
    fields = {name: getattr(rollout, name) for name in names}
    soft = RelaxedRollout(
        **fields, engine_logps=None, tokenizer=POLICY, weights=weights, indices=torch.tensor([[[the, play]]] * 2),
        logits=torch.zeros(2, 1, len(POLICY)), tau=1.0,
    )  # fmt: skip
    total = reward.relaxed(soft).total
    inner = reward.reward
    assert inner.foreign is not None
    ids = torch.tensor([inner.foreign("a the")["input_ids"]])
    mixed = inner.embed(ids).clone()
    (one,) = inner.foreign.convert_tokens_to_ids(["play"])
    mixed[0, 2] = 0.6 * mixed[0, 2] + 0.4 * inner.embed(torch.tensor(one))
    torch.testing.assert_close(total[:1], inner(rollout)[:1])
    torch.testing.assert_close(total[1:], inner.score_embeddings(mixed, torch.ones_like(ids)))
    (gradient,) = torch.autograd.grad(total.sum(), weights)
    assert gradient.abs().min() > 0


def test_pieces_beyond_the_context_have_no_gradient(tmp_path: Path) -> None:
    reward, rollout = translated(tmp_path), rollout_of(POLICY, ("the", " cat cat play"))
    reward.reward.tokenizer.model_max_length = 3  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="longer than its context of 3 tokens"):
        gradient = reward.pathwise(rollout).adjoints[0].gradient
    assert gradient[0, 0].any()
    assert not gradient[0, -1].any()


def test_alone_a_foreign_reward_says_how_to_wrap_it(tmp_path: Path) -> None:
    reward = translated(tmp_path)
    with pytest.raises(InputError, match=r"--model\.reward TranslatedReward --model\.reward\.reward Seq"):
        reward.reward.pathwise(rollout_of(POLICY, ("a", "b")))


def test_no_gradient_reaches_the_reward_and_nothing_of_it_is_saved(tmp_path: Path) -> None:
    reward = translated(tmp_path)
    assert not any(p.requires_grad for p in reward.parameters())
    assert not any("words" in name for name in reward.state_dict())
    before = reward.table()
    reward.load(POLICY, len(POLICY))  # before each stage
    assert reward.table() is before
    assert not reward.train().training


def another(folder: Path) -> TranslatedReward:
    """Of a policy of words, read by a classifier that numbers them otherwise and puts its own around them."""
    tokenizer = words("[CLS]", "[SEP]", "w99", framed=True)
    write_classifier(folder, "bert", tokenizer, vocab_size=len(tokenizer))
    return TranslatedReward(SequenceClassifierReward(str(folder)))


def aligned(folder: Path, seed: int = 0) -> GradeSTE:
    module = make(GradeSTE, seed=seed)
    assert isinstance(module, GradeSTE)
    module.reward = another(folder)
    return module


def test_a_resumed_run_is_the_run(tmp_path: Path) -> None:
    """The same bits; the checkpoint holds nothing of the reward."""
    whole = aligned(tmp_path)
    fit(whole, 2, batches(2), max_epochs=2)
    first = aligned(tmp_path)
    run = trainer(max_epochs=1)
    run.fit(first, batches(2))
    run.save_checkpoint(tmp_path / "half.ckpt")
    resumed = aligned(tmp_path, seed=9)
    seed_everything(0, verbose=False)
    trainer(max_epochs=2).fit(resumed, batches(2), ckpt_path=tmp_path / "half.ckpt")
    assert_same(weights(resumed), weights(whole))


def test_a_judge_is_not_translated() -> None:
    with pytest.raises(InputError, match="JudgeReward reads more than prompt and completion"):
        TranslatedReward(JudgeReward("judge"))


def test_the_token_of_a_stop_string_has_its_gradient(tmp_path: Path) -> None:
    reward, rollout = translated(tmp_path), rollout_of(POLICY, ("the cat", " played."))
    stopped = replace(rollout, stop=["."])
    assert stopped.ended.all()
    (found,), (truth,) = reward.pathwise(stopped).adjoints, reward.pathwise(rollout).adjoints
    assert torch.equal(found.gradient, truth.gradient)
    assert truth.gradient[0, -1].any()
