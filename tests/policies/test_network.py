"""The two halves of a network against transformers itself, for every architecture."""

import torch

from tests.conftest import VOCABULARY, make_model, make_prompts
from tests.policies.making import every_architecture, logits, make_policy, reference_logits, with_and_without_lora


@every_architecture
@with_and_without_lora
def test_logits_are_those_of_transformers_without_padding(name: str, lora: bool) -> None:
    """Embeddings in, left padding and positions from the mask: what the plain model says of each row by itself."""
    policy, plain, prompts = make_policy(name, lora), make_model(name).eval(), make_prompts()
    found, reference = logits(policy), reference_logits(policy)
    for row, (ids, mask) in enumerate(zip(prompts["input_ids"], prompts["attention_mask"], strict=True)):
        with torch.no_grad():
            truth = plain(input_ids=ids[mask.bool()].unsqueeze(0)).logits[0, -3:]
        torch.testing.assert_close(found[row], truth, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(reference[row], truth, rtol=1e-4, atol=1e-4)


@every_architecture
@with_and_without_lora
def test_table_is_the_embedding_of_every_id(name: str, lora: bool) -> None:
    policy = make_policy(name, lora)
    weight = policy.base.get_input_embeddings().get_parameter("weight").detach()
    scale = policy.base.config.hidden_size**0.5 if name == "gemma3" else 1.0
    for table in (policy.table(), policy.frozen.table()):
        assert table.shape[0] == VOCABULARY
        assert not table.requires_grad
        torch.testing.assert_close(table, weight * scale)
    assert torch.equal(policy.table(), policy.embed(torch.arange(VOCABULARY)))
    ids = torch.tensor([[3, 0, 18]])
    assert torch.equal(policy.frozen.embed(ids), policy.frozen.table()[ids])
