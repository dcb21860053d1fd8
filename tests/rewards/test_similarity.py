"""The cosine of embeddings, against transformers' own forward pass of each text by itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from grade_lightning.errors import InputError
from grade_lightning.rewards import SimilarityReward
from grade_lightning.rewards.retokenize import texts_of
from tests.policies.tiny import tiny_config
from tests.rewards.tongues import byte_tokenizer, rollout_of, word_pieces

TARGET = "the cat plays"


def write_encoder(folder: Path) -> Path:
    """A random encoder in which tokens matter to each other."""
    tokenizer = word_pieces()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model: Any = AutoModel.from_config(tiny_config("bert", vocab_size=len(tokenizer), pad_token_id=0))
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def embedded(folder: Path, text: str, pooling: str) -> torch.Tensor:
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    found: torch.Tensor = states.mean(0) if pooling == "mean" else states[0]
    return found


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_scores_are_cosines_of_embeddings(pooling: Any, tmp_path: Path) -> None:
    policy = byte_tokenizer()
    reward = SimilarityReward(str(write_encoder(tmp_path)), TARGET, pooling, scale=2.0)
    reward.load(policy, len(policy))
    rollout = rollout_of(policy, ("the dog", " played with it"), ("a", " cat"))
    goal = embedded(tmp_path, TARGET, pooling)
    truth = [2 * torch.cosine_similarity(embedded(tmp_path, t, pooling), goal, dim=0) for t in texts_of(rollout)]
    found = reward.score(rollout)
    torch.testing.assert_close(found.total, torch.stack(truth))
    assert found.parts.keys() == {"similarity"}
    assert found.total.std() > 1e-3
    assert not list(reward.state_dict().keys() & {"goal"})


def test_an_empty_target_is_refused() -> None:
    with pytest.raises(InputError, match="target is empty"):
        SimilarityReward("folder", target=" ")
