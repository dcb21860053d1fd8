"""PromptSearch: a planted token is found in one step; the search is seeded, resumed and exported; wrong uses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from grade_lightning.callbacks import GradientVariance
from grade_lightning.errors import InputError
from grade_lightning.methods import PromptSearch
from grade_lightning.policies import LoRA, Policy
from grade_lightning.records import Rollout, Scores
from grade_lightning.rewards import DifferentiableReward
from grade_lightning.rollouts import Sampler
from tests.conftest import VOCABULARY, make_tokenizer, mostly_slow
from tests.methods import test_contract as contract
from tests.methods.toy_task import Toy, batches, fit, make, trainer

pytestmark = pytest.mark.usefixtures("own_random_state")
PLANTED = 14


class Planted(DifferentiableReward):
    """The share of one token in the completion."""

    def table(self) -> Tensor:
        return torch.eye(VOCABULARY)

    def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        shares: Tensor = (embeddings[..., PLANTED] * mask).sum(-1) / mask.sum(-1)
        return shares


def copier() -> Policy:
    """A model whose next token is most likely its last one: nothing but an embedding and the same matrix as head."""
    config = GPT2Config(
        n_embd=VOCABULARY, n_head=1, n_layer=1, n_positions=64, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.wte.weight.copy_(torch.eye(VOCABULARY))
        model.transformer.ln_f.weight.fill_(1.5)
    return Policy.from_model(model, make_tokenizer())


def search(**kwargs: Any) -> PromptSearch:
    settings: dict[str, Any] = {"policy": copier(), "reward": Planted(), "sampler": Sampler(max_new_tokens=6)}
    return PromptSearch(**settings | {"start": "w5 w6 w7"} | kwargs)


def rows(*words: int, count: int = 16) -> DataLoader[Any]:
    """The same prompt several times."""
    ids = torch.tensor([words] * count)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "columns": {}}
    return DataLoader([batch] * 8, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("hops", [0, 2, "exact"])
def test_a_planted_token_is_found_in_one_step(hops: Any) -> None:
    """The model copies the last token of its prompt, which is the last one searched: of all exchanges that is it."""
    module = search(slot="w9", candidates=VOCABULARY, tries=1, hops=hops)
    found = fit(module, 1, rows(3, 9), max_steps=1).steps[0]
    assert module.tokens == [5, 6, PLANTED]
    assert module.text == f"w5 w6 w{PLANTED}"
    assert found["train/exchanged"] == 1
    assert found["train/gain"] > 0.5


def test_weights_stay_and_the_reward_does_not_read_the_prompt() -> None:
    module = search(slot="w9", candidates=VOCABULARY)
    before = {name: value.clone() for name, value in module.policy.state_dict().items()}
    seen: list[Tensor] = []

    class Reading(Planted):
        def score(self, rollout: Rollout) -> Scores:
            seen.append(rollout.prompt_ids)
            return super().score(rollout)

    module.reward = Reading()
    fit(module, 2, rows(3, 9, 4), max_steps=2)
    assert all(torch.equal(value, before[name]) for name, value in module.policy.state_dict().items())
    assert seen
    assert all(ids.tolist() == [[3, 4]] * 16 for ids in seen)


def test_a_prompt_that_is_no_better_is_not_taken() -> None:
    module = search(slot="w9", start=f"w{PLANTED}", candidates=VOCABULARY)
    steps = fit(module, 3, rows(3, 9), max_steps=3).steps
    assert module.tokens == [PLANTED]
    assert [step["train/exchanged"] for step in steps] == [0, 0, 0]
    assert [step["train/gain"] for step in steps] == [0, 0, 0]


def test_fluency_weighs_against_the_reward() -> None:
    """The copier finds repetitions likely; with enough weight on that, they are what the search ends at."""
    module = search(slot="w9", start="w5 w6", candidates=VOCABULARY, fluency=10.0)
    fit(module, 4, rows(3, 9), max_steps=4)
    assert len(set(module.tokens)) == 1
    assert module.tokens[0] != PLANTED


def test_only_likely_tokens_are_candidates() -> None:
    module = search(slot="w9", candidates=1)  # the one before, which the copier finds likeliest
    fit(module, 4, rows(3, 9), max_steps=4)
    assert PLANTED not in module.tokens


def test_the_reward_rises() -> None:
    """From a prompt that a toy's reward gives nothing for."""
    module = search(reward=Toy(), slot="w9", start="w5 w6", candidates=VOCABULARY)
    rewards = [step["train/reward"] for step in fit(module, 4, rows(3, 9, count=64), max_steps=4).steps]
    assert rewards[-1] > rewards[0] + 0.3


@pytest.mark.parametrize(
    "test",
    mostly_slow(
        [
            contract.test_the_seed_decides,
            contract.test_what_is_logged_in_training_is_documented,
            contract.test_validation_does_not_change_training,
            contract.test_judges_are_measured_and_not_trained_on,
            contract.test_predictions,
        ],
        contract.test_what_is_logged_in_training_is_documented,
    ),
    ids=lambda test: test.__name__,
)
def test_what_every_method_owes(test: Callable[[type[PromptSearch]], None]) -> None:
    test(PromptSearch)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation(stage: Any) -> None:
    contract.test_evaluation(PromptSearch, stage)


@pytest.mark.slow
def test_a_resumed_search_is_the_search(tmp_path: Path) -> None:
    def module(seed: int = 0) -> Any:
        return make(PromptSearch, start="w2 w3 w4", candidates=VOCABULARY, seed=seed)

    whole = module()
    fit(whole, 4, max_epochs=2)
    half, first = module(), trainer()
    first.fit(half, batches(4))
    first.save_checkpoint(tmp_path / "half.ckpt")
    assert set(torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]) == {"prompt"}
    resumed = module(seed=9)
    seed_everything(0, verbose=False)
    trainer(max_epochs=2).fit(resumed, batches(4), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.tokens == whole.tokens != half.tokens


def test_what_is_exported(tmp_path: Path) -> None:
    module = search(slot="w9")
    module.configure_model()
    module.save_pretrained(str(tmp_path / "export"))
    assert (tmp_path / "export" / "prompt.txt").read_text() == "w5 w6 w7"
    assert json.loads((tmp_path / "export" / "prompt.json").read_text()) == {
        "text": "w5 w6 w7",
        "tokens": [5, 6, 7],
        "slot": "w9",
        "model": "GPT2LMHeadModel",
    }


def test_the_card_says_where_the_prompt_goes() -> None:
    module = search(slot="w9")
    module.configure_model()
    assert module.usage().endswith("in the place of `w9` of the base model:\n\n```\nw5 w6 w7\n```")


def test_wrong_uses() -> None:
    with pytest.raises(InputError, match="PromptSearch trains a prompt and no weights"):
        PromptSearch(Policy(lora=LoRA(r=2)))
    with pytest.raises(InputError, match=r"PromptSearch\.start: no token"):
        search(start="").configure_model()
    with pytest.raises(InputError, match="probe_every_n_steps = 1: PromptSearch has no gradient to probe; set 0"):
        trainer(callbacks=[GradientVariance(probe_every_n_steps=1)], max_steps=1).fit(search(), rows(3, 4))
    with pytest.raises(InputError, match="PromptSearch has no gradient of weights"):
        search().draw_loss({})


def test_the_watch_over_gradients_says_nothing() -> None:
    watch = GradientVariance(probe_every_n_steps=0)
    trainer(callbacks=[watch], max_steps=2, log_every_n_steps=1).fit(search(), rows(3, 4))
    assert watch.metrics == {}
