"""The first batch: each part that can be wrong is named."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.methods import DPO, RLOO
from grade_lightning.modules.first_batch import check_first_batch
from grade_lightning.policies import LoRA, Policy
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rollouts import Sampler
from tests.conftest import make_model, make_prompts, make_tokenizer
from tests.methods.toy_task import batches, make, trainer


def make_policy(lora: LoRA | None = None) -> Policy:
    return Policy.from_model(make_model("gpt2", scale=4.0), make_tokenizer(), lora)


def drawn(policy: Policy, sampler: Sampler) -> Rollout:
    torch.manual_seed(0)
    return sampler(policy, Prompts.of(make_prompts()))


def change(rollout: Rollout, value: Tensor | float) -> Rollout:
    assert rollout.engine_logps is not None
    return replace(rollout, engine_logps=rollout.engine_logps + value)


def check(policy: Policy, sampler: Sampler, rollout: Rollout, started: bool = True) -> None:
    check_first_batch(policy, sampler, rollout, started, reduced=False)


def move(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)


def test_an_honest_rollout_passes() -> None:
    policy, sampler = make_policy(), Sampler(6, temperature=0.7, top_k=7)
    check(policy, sampler, drawn(policy, sampler))


def test_an_engine_with_other_weights_is_named() -> None:
    policy, sampler = make_policy(), Sampler(6)
    rollout = drawn(policy, sampler)
    move(policy)
    with pytest.raises(InputError, match=r"TransformersEngine has other weights, other settings"):
        check(policy, sampler, rollout, started=False)


def test_an_engine_that_reports_bare_log_probabilities_is_named() -> None:
    """As vLLM does unless it is told otherwise."""
    policy, sampler = make_policy(), Sampler(6, temperature=0.5)
    rollout = drawn(policy, sampler)
    bare = policy.logits(policy.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], rollout.completion_ids.shape[1])
    logps = bare.log_softmax(-1).gather(-1, rollout.completion_ids.unsqueeze(-1)).squeeze(-1)
    with pytest.raises(InputError, match="reports log-probabilities before temperature, top-k and top-p"):
        check(policy, sampler, replace(rollout, engine_logps=logps.detach()))


def test_a_model_whose_training_pass_is_wrong_is_named() -> None:
    policy, sampler = make_policy(), Sampler(6)
    rollout = drawn(policy, sampler)
    hidden = policy.hidden
    policy.hidden = lambda *args: hidden(*args) * 0.5  # type: ignore[method-assign]
    with pytest.raises(InputError, match="the training pass of GPT2LMHeadModel is wrong"):
        check(policy, sampler, rollout, started=False)


def test_a_reference_that_is_another_model_is_named() -> None:
    policy, sampler = make_policy(), Sampler(6)
    move(policy)
    rollout = drawn(policy, sampler)
    with pytest.raises(InputError, match="the reference is not the model that the policy started as"):
        check(policy, sampler, rollout)
    check(policy, sampler, rollout, started=False)


@pytest.mark.parametrize("started", [True, False])
def test_what_is_not_a_number_does_not_pass(started: bool) -> None:
    policy, sampler = make_policy(), Sampler(6)
    rollout = drawn(policy, sampler)
    with pytest.raises(InputError, match="by nan nats"):
        check(policy, sampler, change(rollout, torch.nan), started)
    with torch.no_grad():
        cast(Any, policy.reference).lm_head.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="KL to the reference at step 0 is nan"):
        check(policy, sampler, replace(rollout, engine_logps=None))


def test_dropout_is_no_alarm_and_hides_nothing() -> None:
    """It is measured without it: adapters that have moved, with dropout, after a resume."""
    policy, sampler = make_policy(LoRA(r=4, dropout=0.5)), Sampler(6)
    move(policy)
    policy.train()
    rollout = drawn(policy, sampler)
    state = torch.random.get_rng_state()
    check(policy, sampler, rollout, started=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert policy.training
    with pytest.raises(InputError, match="not sampled from the policy"):
        check(policy, sampler, change(rollout, 0.01), started=False)


@pytest.mark.parametrize("method", [RLOO, DPO])
def test_a_resumed_run_is_checked_too(method: Any, tmp_path: Any) -> None:
    """Its policy is not its reference any more, and its engine must still be honest."""
    module, run = make(method), trainer(limit_val_batches=0, max_steps=2)
    run.fit(module, batches(4))
    run.save_checkpoint(tmp_path / "two.ckpt")

    class Liar(Sampler):
        def __call__(self, *args: Any, **kwargs: Any) -> Rollout:
            return change(super().__call__(*args, **kwargs), 0.3)

    for sampler in (Sampler(6), Liar(6)):
        again = make(method, sampler=sampler)
        resumed = trainer(limit_val_batches=0, max_steps=4, max_epochs=2)
        if isinstance(sampler, Liar):
            with pytest.raises(InputError, match="not sampled from the policy"):
                resumed.fit(again, batches(4), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
        else:
            resumed.fit(again, batches(4), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
            assert resumed.global_step == 4
