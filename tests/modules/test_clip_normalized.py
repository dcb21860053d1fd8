"""What the clip leaves out: the identity of the lines, and the division by its size."""

from typing import Any

import pytest
import torch

from grade_lightning.functional import gates
from grade_lightning.functional.losses import policy_loss
from grade_lightning.gates import by_advantage, complement
from grade_lightning.methods import STPPO, TurnPPO
from tests.functional.batches import AGGREGATIONS, level_of, make_batch, totals_of
from tests.modules.toys import build, distance, plain, prompts, run

pytestmark = pytest.mark.usefixtures("own_random_state")


@pytest.mark.parametrize("level", ["token", "turn", "sequence"])
def test_a_line_and_its_complement_are_the_line_without_a_clip(level: str) -> None:
    batch = make_batch(0)
    weights = AGGREGATIONS["sequence_mean"](batch.mask, totals_of(batch.mask))
    seen: Any = type("Seen", (), {"advantages": batch.advantages})
    clipped = by_advantage(gates.clipped, low=0.8, high=1.2)
    rest = complement(clipped)
    found = []
    for gate in (
        lambda ratio, _: clipped(ratio, seen),
        lambda ratio, _: rest(ratio, seen),
        gates.importance,
    ):
        loss = policy_loss(
            batch.logps, batch.old_logps, batch.advantages, batch.mask, weights, gate, level_of(level, batch)
        )
        found.append(torch.autograd.grad(loss, batch.logps)[0])
    assert found[1].any()
    torch.testing.assert_close(found[0] + found[1], found[2], rtol=0, atol=1e-15)


def settings(**kwargs: Any) -> dict[str, Any]:
    return plain(STPPO, epochs=3, num_generations=1, lr=0.3, **kwargs)


def runs(normalizer: Any) -> tuple[Any, Any]:
    bare = run(build(TurnPPO, **settings()), prompts(8, size=1))
    return run(build(STPPO, **settings(normalizer=normalizer)), prompts(8, size=1)), bare


def test_where_nothing_is_clipped_the_gradient_is_turn_ppo_s_bit_for_bit() -> None:
    """In the first epoch."""
    ours, bare = runs("absolute")
    assert ours.logged[0]["train/clip_bias"] == 0
    assert all(torch.equal(ours.gradients[0][name], bare.gradients[0][name]) for name in bare.gradients[0])


@pytest.mark.parametrize("normalizer", ["relative", "absolute"])
def test_the_gradient_is_divided_where_much_is_clipped(normalizer: Any) -> None:
    ours, bare = runs(normalizer)
    assert ours.logged[1]["train/clip_bias"] > 0
    size = max(1.0, ours.logged[1]["train/clip_bias"])
    moved, whole = ({name: x.before[1][name] - x.before[2][name] for name in x.before[1]} for x in (ours, bare))
    assert size > 1.1
    assert distance(moved, {name: value / size for name, value in whole.items()}) < 1e-6
