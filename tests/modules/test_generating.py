"""Completions of a few prompts."""

import pytest

from grade_lightning.methods import GradeSTE
from grade_lightning.policies import Policy
from grade_lightning.rollouts import Sampler
from tests.conftest import make_model, make_tokenizer

pytestmark = pytest.mark.usefixtures("own_random_state")


def test_completions_are_the_samplers() -> None:
    """As the DataModule writes prompts: a longer one beside it changes nothing."""
    policy = Policy.from_model(make_model("llama"), make_tokenizer())
    module = GradeSTE(policy=policy, sampler=Sampler(max_new_tokens=4, top_k=1))
    alone = module.generate("w2 w3")
    assert alone == module.generate(["w2 w3", "w4 w5 w6 w7"])[:1]
    assert 0 < len(alone[0].split()) <= 4
