"""Terms of a loss and rewards of tokens, by the gradient that they have."""

import pytest
import torch

from grade_lightning.advantages import whitened_returns
from grade_lightning.distributed import Reduce
from grade_lightning.functional import advantages
from grade_lightning.kl import KL
from grade_lightning.methods import RLOO, ReinforcePlusPlus
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
