"""Statistics that a part asks for: measured with the others, of the policy that sampled, kept over a window."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from grade_lightning.columns import Columns
from grade_lightning.functional.scores import score_norm
from grade_lightning.kl import KL
from grade_lightning.methods import RLOO
from grade_lightning.records import Experience
from grade_lightning.selection import Selection
from tests.modules.toys import build, plain, prompts
from tests.test_terms import Sums

pytestmark = pytest.mark.usefixtures("own_random_state")


class Norms(Selection, Columns):
    names = ("size", "likeliest")

    def columns(self, logps: Tensor, tokens: Tensor, hidden: Tensor) -> Iterable[Tensor]:
        yield hidden.square().sum(-1)
        yield logps.amax(-1)


@pytest.mark.parametrize("epochs", [1, 2])
def test_columns_are_what_the_policy_says_of_each_token(epochs: int) -> None:
    module = build(RLOO, **plain(RLOO, selection=Norms(), kl=KL(), epochs=epochs))
    seen = module.collect(prompts(4))
    if epochs == 1:
        seen, _ = module.measured(seen)
    assert set(seen.old.columns) == {"size", "likeliest"}
    rollout = seen.rollout
    with torch.no_grad():
        hidden = module.policy.training_pass.hidden(module.policy, rollout)
        length = rollout.completion_ids.shape[1]
        logits = module.policy(module.policy.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], length)
    mask = rollout.sampled
    torch.testing.assert_close(seen.old.columns["size"], hidden.square().sum(-1) * mask)
    torch.testing.assert_close(seen.old.columns["likeliest"], logits.double().log_softmax(-1).amax(-1) * mask)
    part = seen.select(torch.tensor([5, 2]))
    width = part.rollout.completion_ids.shape[1]
    assert torch.equal(part.old.columns["size"], seen.old.columns["size"][[5, 2], :width])
    again = Experience.unpack(seen.pack(), rollout.tokenizer)
    assert torch.equal(again.old.columns["likeliest"], seen.old.columns["likeliest"])


def test_without_such_a_part_nothing_more_is_measured() -> None:
    assert build(RLOO, **plain(RLOO, terms=[Sums()], epochs=2)).collect(prompts(4)).old.columns == {}


def test_the_token_baseline_is_given_its_norms() -> None:
    settings: dict[str, Any] = plain(RLOO, kl=KL(), epochs=2)
    seen = build(RLOO, **settings, baseline="token").collect(prompts(4))
    rollout = seen.rollout
    module = build(RLOO, **settings)
    with torch.no_grad():
        length = rollout.completion_ids.shape[1]
        logits = module.policy(module.policy.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], length)
    truth = score_norm(logits.double().log_softmax(-1), rollout.completion_ids) * rollout.sampled
    torch.testing.assert_close(seen.old.columns["score_norm"], truth)
    first = seen.scores.total.unflatten(0, (-1, 4))[0]
    weights = truth[:4].cumsum(-1) + 1e-8
    baseline = (weights[1:] * first[1:].unsqueeze(1)).sum(0) / weights[1:].sum(0)
    expected = (first[0] - baseline) * rollout.sampled[0]
    torch.testing.assert_close(seen.advantages[0], expected.to(seen.advantages))
    assert not torch.allclose(seen.advantages, module.collect(prompts(4)).advantages, atol=1e-3)
