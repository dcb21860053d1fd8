"""The classifier, its folder, and the vocabulary that it shares with the policy."""

from pathlib import Path

import pytest
import torch

from grade_lightning.errors import InputError
from grade_lightning.rewards import Classifier, ClassifierReward, WeightedSum
from tests.conftest import CONFIGS, VOCABULARY, make_tokenizer
from tests.rewards.making import make_classifier, make_rollout, words_in


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


def test_another_vocabulary_has_no_gradient_and_both_sizes_are_said(folder: Path) -> None:
    reward = ClassifierReward(str(folder))
    reward.load(words_in([0, 1, 3, 2, 4]), 5)
    assert not reward.differentiable
    with pytest.raises(InputError, match=rf"\({VOCABULARY} tokens\).*\(5\).*RLOO.*RewardModel"):
        reward.pathwise(make_rollout())
    both = WeightedSum([reward, ClassifierReward.from_classifier(make_classifier())])
    both.load(words_in([0, 1, 3, 2, 4]), 5)
    assert not both.differentiable


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
