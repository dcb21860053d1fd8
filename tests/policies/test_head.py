"""The head: the model's own, over given hidden states."""

from typing import Any

import torch

from tests.conftest import VOCABULARY, make_prompts
from tests.policies.making import change, every_architecture, make_policy, with_and_without_lora


@every_architecture
@with_and_without_lora
def test_hidden_states_are_what_the_logits_are_made_of(name: str, lora: bool) -> None:
    """After the last norm, of the same positions as the logits; the head is the model's own, a chunk at a time, too."""
    policy, prompts = make_policy(name, lora), make_prompts()
    change(policy)
    inputs, mask = policy.embed(prompts["input_ids"]), prompts["attention_mask"]
    hidden, found = policy.hidden(inputs, mask, 3), policy(inputs, mask, 3)
    assert hidden.shape == (3, 3, policy.width)
    head: Any = policy.base.get_output_embeddings()
    torch.testing.assert_close(head(hidden), found)
    torch.testing.assert_close(policy.hidden(inputs, mask, 5)[:, -3:], hidden)
    columns = policy.vocabulary(hidden.flatten(0, 1), elements=4 * VOCABULARY).map(
        lambda logits, rows: logits.unbind(-1)
    )
    torch.testing.assert_close(torch.stack(columns, -1).view_as(found), found)
    hidden.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in policy.parameters())


def test_a_forward_that_somebody_has_wrapped_stays_wrapped() -> None:
    policy, prompts = make_policy("gpt2", False), make_prompts()
    below: Any = policy.base.base_model
    plain, calls = below.forward, list[int]()

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    below.forward = wrapped
    for turn in (1, 2):
        policy(policy.embed(prompts["input_ids"]), prompts["attention_mask"], 3)
        assert len(calls) == turn
