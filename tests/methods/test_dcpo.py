"""DCPO: its base without a memory, what it remembers of a prompt, and its clip."""

import pytest
import torch

from grade_lightning.functional.smoothing import smoothed
from grade_lightning.kl import KL
from grade_lightning.methods import DCPO, GRPO
from tests.methods.toy_task import assert_same
from tests.modules.toys import build, distance, plain, prompts, run, states

pytestmark = pytest.mark.usefixtures("own_random_state")


def test_without_a_memory_it_is_grpo_on_fresh_completions() -> None:
    """Bit for bit over two windows of one step; with a memory the first window, in which each prompt is new."""
    windows = prompts(3), prompts(3, seed=1)
    base = run(build(GRPO, **plain(GRPO, kl=KL())), *windows)
    alone = run(build(DCPO, **plain(DCPO, memory=0)), *windows)
    found = run(build(DCPO, **plain(DCPO)), *windows)
    for ours, truth in zip(alone.gradients, base.gradients, strict=True):
        assert_same(ours, truth)
    assert_same(found.gradients[0], base.gradients[0])
    assert distance(found.gradients[1], base.gradients[1]) > 1e-2


def test_the_second_visit_leans_on_the_first() -> None:
    module = build(DCPO, **plain(DCPO, epochs=2, num_generations=4))
    run(module, prompts(3))
    first, then = (module.collect(prompts(3, seed=seed)) for seed in (0, 1))
    table = first.rewards.double().view(3, 4)
    keys = first.rollout.group_keys
    content = states(module)["advantage"]
    known = dict(zip(content["keys"].tolist(), content["values"], strict=True))
    visits, mean, variance = torch.stack([known[key] for key in keys]).unbind(-1)
    assert visits.tolist() == [1, 1, 1]
    torch.testing.assert_close(mean, table.mean(-1))
    torch.testing.assert_close(variance, table.var(-1))
    expected = smoothed(then.rewards.double().view(3, 4), visits, mean, variance).flatten()
    torch.testing.assert_close(then.advantages[:, 0].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_prompt_that_is_twice_in_a_window_has_two_visits() -> None:
    module = build(DCPO, **plain(DCPO))
    run(module, prompts(6))
    assert states(module)["advantage"]["values"][:, 0].tolist() == [2, 2, 2]


def test_rare_tokens_have_more_room() -> None:
    """In the second epoch, tokens beyond 1.2 keep their ratio where they were improbable."""
    module = build(DCPO, lr=1.0, **plain(DCPO, epochs=2))
    run(module, prompts(4))
    seen = module.collect(prompts(4, seed=1))
    gate = module.terms[0].gate  # type: ignore[attr-defined]
    ratio = torch.full_like(seen.advantages, 1.5)
    kept = gate(ratio, seen) > 0
    up = seen.mask & (seen.advantages > 0)
    old = seen.old.logps.exp()
    bound = 0.5 + 0.5 * (1 + 0.8 / old).sqrt()
    assert torch.equal(kept[up], (bound >= 1.5)[up])
    assert int(kept[up].sum()) > 0
