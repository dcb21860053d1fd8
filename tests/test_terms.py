"""Terms of a loss and rewards of tokens, by the gradient that they have."""

from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from grade_lightning.advantages import whitened_returns
from grade_lightning.distributed import Reduce
from grade_lightning.functional import advantages, sequences
from grade_lightning.functional.aggregation import Normalizers, token_mean
from grade_lightning.kl import KL
from grade_lightning.methods import GRPO, RLOO, ReinforcePlusPlus
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.records import Experience, TokenStats
from grade_lightning.terms import EntropyBonus, Proximal, TokenTerm, mean_entropy
from tests.modules.seams import (
    Imitation,
    PerToken,
    Tilt,
)
from tests.modules.toys import (
    build,
    distance,
    gradient,
    move,
    plain,
    prompts,
    run,
)

pytestmark = pytest.mark.usefixtures("own_random_state")


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_second_term_adds_its_gradient(epochs: int) -> None:
    batch = prompts(4)
    parts = [
        gradient(build(RLOO, **plain(RLOO, kl=KL(), epochs=epochs, terms=terms)), batch)
        for terms in ([], [Imitation(1.0)], [Imitation(3.0)])
    ]
    line, once, thrice = parts
    more = {name: once[name] - line[name] for name in line}
    assert distance({name: thrice[name] - line[name] for name in line}, {n: 3 * g for n, g in more.items()}) < 1e-9
    watch = run(build(RLOO, **plain(RLOO, terms=[Imitation()])), batch)
    assert "train/imitation" in watch.logged[0]


def test_a_term_with_parameters_is_trained_and_saved() -> None:
    """By its part of the loss, the sum of the log-probabilities."""
    module = build(RLOO, **plain(RLOO, terms=[Imitation(), Tilt()], kl=KL()))
    name = "trained_terms.Tilt.tilt"
    assert name in module.state_dict()
    watch = run(module, prompts(4))
    assert float(watch.gradients[0][name]) < -1
    assert float(module.state_dict()[name]) == pytest.approx(-0.05 * float(watch.gradients[0][name]))


def test_a_reward_may_be_spread_over_the_tokens() -> None:
    """Methods of tokens credit each with what follows it; methods of completions see the sum."""
    batch = prompts(4)
    module = build(ReinforcePlusPlus, reward=PerToken(), num_generations=4, kl=KL(), epochs=2)
    seen = module.collect(batch)
    each = (seen.rollout.completion_ids / 100).masked_fill(~seen.rollout.sampled, 0)
    rest = each.flip(-1).cumsum(-1).flip(-1)
    white = advantages.whiten(rest, seen.rollout.sampled)
    torch.testing.assert_close(seen.advantages.float(), white, rtol=1e-4, atol=1e-5)
    grouped = build(RLOO, reward=PerToken(), num_generations=4, kl=KL(), epochs=2).collect(batch)
    sums = advantages.leave_one_out(each.sum(-1).unflatten(0, (-1, 4))).flatten()
    torch.testing.assert_close(grouped.advantages[:, 0].float(), sums, rtol=1e-4, atol=1e-5)


def test_the_kl_is_charged_beside_a_reward_that_is_spread() -> None:
    module = build(ReinforcePlusPlus, reward=PerToken(), num_generations=4, kl=KL(0.5), epochs=2)
    move(module)
    seen = module.collect(prompts(4))
    spread = seen.scores.per_token
    assert spread is not None
    expected = spread - 0.5 * seen.old.log_ratio
    torch.testing.assert_close(seen.token_rewards()[seen.mask].double(), expected[seen.mask].double())
    white = whitened_returns()(seen, Reduce())
    torch.testing.assert_close(seen.advantages, white)


# ---- terms of tokens ------------------------------------------------------------------------------------------------


class Sums(TokenTerm):
    """The log-probabilities themselves."""

    name = "sums"

    def values(self, seen: Experience, now: TokenStats) -> Tensor:
        return now.logps


@pytest.mark.parametrize("method", [RLOO, GRPO])
def test_a_term_of_tokens_weighs_them_as_the_method_does(method: type[PolicyGradientModule]) -> None:
    """Unless it is told otherwise; nothing is added outside of the mask."""
    found = {}
    for name, aggregate in (("own", None), ("mean", token_mean)):
        module = build(method, **plain(method, kl=KL(), terms=[Sums(aggregate)], epochs=2))
        seen = module.collect(prompts(4))
        seen.normalizers = Normalizers(float(seen.mask.sum()), len(seen.mask))
        value, figures = module.terms[-1](seen, seen.old, Reduce())
        assert float(figures["sums"]) == float(value)
        rows = (seen.old.logps * seen.mask).sum(-1)
        whole = {
            "mean": rows.sum() / seen.mask.sum(),
            "own": rows.mean() if method is RLOO else (rows / seen.mask.sum(-1)).mean(),
        }
        torch.testing.assert_close(value.double(), whole[name].double())
        found[name] = float(value)
    assert found["own"] != pytest.approx(found["mean"], rel=1e-3)


def test_the_entropy_bonus_has_the_gradient_of_the_entropy() -> None:
    """In the first epoch and in the second, where the rest of the statistics is known."""
    for epochs in (1, 2):
        settings = plain(RLOO, kl=KL(), epochs=epochs)
        batch = prompts(4)
        one, two = (gradient(build(RLOO, **settings, terms=terms), batch) for terms in ([], [EntropyBonus(0.7)]))
        module = build(RLOO, **settings)
        rollout = module.collect(batch).rollout
        length = rollout.completion_ids.shape[1]
        logits = module.policy(module.policy.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], length)
        entropies = sequences.entropy(logits.double().log_softmax(-1)) * rollout.sampled
        module.zero_grad()
        (-0.7 * entropies.sum() / len(rollout.ids)).backward()
        truth = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        assert distance({name: two[name] - one[name] for name in one}, truth) < 1e-6


def test_the_bonus_moves_towards_its_target_and_remembers() -> None:
    term = EntropyBonus(0.01, target=2.0, step=0.004)
    module = build(RLOO, **plain(RLOO, kl=KL(), epochs=2, terms=[term]))
    seen = module.collect(prompts(4))
    mean = float((seen.old.entropy * seen.mask).sum() / seen.mask.sum())
    assert mean_entropy(seen, Reduce()) == pytest.approx(mean)
    term.target = mean + 0.1
    term.observe(seen, Reduce())
    assert term.coefficient == pytest.approx(0.014)
    assert term.below
    term.target = mean - 0.1
    for _ in range(4):
        term.observe(seen, Reduce())
    assert (term.coefficient, term.below) == (0.0, False)
    other = EntropyBonus(0.01, target=2.0)
    other.load_state_dict(term.state_dict())
    assert (other.coefficient, other.below) == (0.0, False)
    assert not other.values(seen, seen.old).any()
    fixed = EntropyBonus(0.01)
    fixed.observe(seen, Reduce())
    assert fixed.coefficient == 0.01


def test_the_proximal_term_is_nothing_in_the_first_epoch() -> None:
    """Bit for bit; in the second it pulls back."""
    found = []
    for terms in ([], [Proximal(0.5)]):
        watch = run(build(RLOO, **plain(RLOO, kl=KL(), epochs=2, terms=terms)), prompts(4))
        found.append(watch.gradients)
    bare, held = found
    assert all(torch.equal(held[0][name], bare[0][name]) for name in bare[0])
    assert distance(held[1], bare[1]) > 1e-3


def test_the_proximal_term_has_the_fixed_point_of_the_bandit() -> None:
    """All epochs on the expectation over three arms: δ + η c exp(δ) = η A, c = E_old[A − δ/η]."""
    eta, advantages = 0.8, torch.tensor([[1.0], [-0.5], [0.2]], dtype=torch.float64)
    old = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64).log()
    logits, mask = old.clone().requires_grad_(), torch.ones(3, 1, dtype=torch.bool)
    column = old.unsqueeze(1)
    before = TokenStats(column, column, column, column, column)
    term = Proximal(eta, lambda mask, _: old.exp().unsqueeze(1) * mask)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-14, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        logps = logits.log_softmax(-1).unsqueeze(1)
        stats = TokenStats(logps, logps, logps, logps, logps)
        seen = Mock(sampled=mask, normalizers=None, old=before)
        held, _ = term(seen, stats, Reduce())
        loss = held - (old.exp().unsqueeze(1) * advantages * logps).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    delta = logits.detach().log_softmax(-1) - old
    c = (old.exp() * (advantages.squeeze(1) - delta / eta)).sum()
    torch.testing.assert_close(delta + eta * c * delta.exp(), eta * advantages.squeeze(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(delta, torch.tensor([0.5114, -0.5045, -0.0111]).double(), rtol=0, atol=1e-4)
