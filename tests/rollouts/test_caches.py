"""How a model is cached while it is sampled: the fastest way that is right is found by trying."""

from functools import wraps
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from grade_lightning.errors import DivergenceError, InputError
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts
from grade_lightning.rollouts import Distribution, Sampler, TransformersEngine
from grade_lightning.rollouts.caches import ROOM, RoomyLayer, keys_and_values
from grade_lightning.rollouts.relaxed import RelaxedEngine
from tests.conftest import make_prompts, make_tokenizer
from tests.policies.tiny import tiny_model


def make(kind: str) -> Policy:
    return Policy.from_model(tiny_model(kind), make_tokenizer(), reference=False)


def draw(policy: Policy, engine: TransformersEngine) -> Any:
    prompts = make_prompts()
    repeated = {name: value.repeat_interleave(2, 0) for name, value in prompts.items()}
    return Sampler(6, engine=engine)(policy, Prompts.of(repeated))


@pytest.mark.parametrize(
    ("kind", "way"), [("llama", "shared"), ("gemma3_text", "shared"), ("lfm2", "own"), ("mamba", "own")]
)
def test_each_kind_has_its_way(kind: str, way: str) -> None:
    """Prompts that repeat, of different lengths; log-probabilities are those of the training pass."""
    policy, engine = make(kind), TransformersEngine(block=2)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    engine._choose(policy)
    assert torch.equal(torch.random.get_rng_state(), state)
    rollout = draw(policy, engine)
    assert engine._caching == (id(policy.base), way)
    with policy.evaluating(), torch.no_grad():
        length = rollout.completion_ids.shape[1]
        logits = policy.logits(policy.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], length)
    logps = logits.log_softmax(-1).gather(-1, rollout.completion_ids.unsqueeze(-1)).squeeze(-1)
    assert (logps - rollout.engine_logps)[rollout.sampled].abs().max() < 1e-3


def test_a_cache_that_is_wrong_is_not_used(recwarn: pytest.WarningsRecorder) -> None:
    """With a cache this model forgets what it has read."""
    policy, engine = make("llama"), TransformersEngine()
    plain = policy.base.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits + output.logits.flip(-1) * bool(kwargs.get("use_cache"))
        return output

    policy.base.forward = forward
    rollout = draw(policy, engine)
    assert engine._caching == (id(policy.base), "none")
    assert any("only without a cache" in str(warning.message) for warning in recwarn.list)
    assert rollout.engine_logps.isfinite().all()
    with pytest.raises(InputError, match=r"cannot be sampled as it is trained: with every cache its log-probabilities"):
        draw(policy, TransformersEngine(static_cache=True))


def test_a_policy_that_has_diverged_is_said_to_have() -> None:
    policy = make("llama")
    with torch.no_grad():
        policy.base.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(DivergenceError):
        draw(policy, TransformersEngine())


def test_so_is_one_that_gives_numbers_at_first() -> None:
    policy, engine, calls = make("llama"), TransformersEngine(), []
    draw(policy, engine)
    plain = policy.base.forward

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        output = plain(*args, **kwargs)
        output.logits = output.logits * (torch.nan if len(calls) > 3 else 1)  # the prompt, two tokens, then this
        return output

    policy.base.forward = forward
    with pytest.raises(DivergenceError):
        draw(policy, engine)
    assert len(calls) > 3


def test_soft_tokens_need_keys_and_values() -> None:
    policy = make("lfm2")
    assert keys_and_values(policy) is None
    with pytest.raises(InputError, match="relaxed sampling needs keys and values"):
        RelaxedEngine().generate(policy, Distribution(4), Prompts.of(make_prompts()), tau=1.0)


def test_a_cache_with_room_holds_what_one_without_does() -> None:
    """Tokens are added by one and by several, rows leave, and the room is used up."""
    torch.manual_seed(0)
    roomy, plain = RoomyLayer(), DynamicLayer()
    memory: set[int] = set()
    rows = torch.arange(5)
    for step in range(2 * ROOM):
        new = torch.randn(2, len(rows), 2, 1 + step % 3, 4)
        found, truth = roomy.update(*new), plain.update(*new)
        assert all(map(torch.equal, found, truth))
        memory.add(found[0].data_ptr())
        if step in (10, 11, 50):
            rows = rows[:-1] if step > 10 else rows
            chosen = torch.arange(len(rows))
            roomy.batch_select_indices(chosen)
            plain.batch_select_indices(chosen)
    assert len(memory) < 12
    earlier, _ = roomy.update(*torch.randn(2, len(rows), 2, 1, 4))
    kept = earlier.clone()
    roomy.update(*torch.randn(2, len(rows), 2, 1, 4))
    assert torch.equal(earlier, kept)


def test_rows_that_are_others_are_not_written_into_the_old_ones() -> None:
    """The same number of rows, in another order."""
    layer = RoomyLayer()
    first = layer.update(*torch.randn(2, 2, 1, 3, 4))[0].clone()
    layer.batch_select_indices(torch.tensor([1, 0]))
    new = torch.randn(2, 2, 1, 1, 4)
    assert torch.equal(layer.update(*new)[0], torch.cat([first[[1, 0]], new[0]], dim=-2))
