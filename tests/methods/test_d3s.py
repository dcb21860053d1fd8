"""D3S: its base with all completions and tokens, what is kept otherwise, and its schedules."""

import pytest
import torch

from grade_lightning.errors import InputError
from grade_lightning.methods import D3S, DAPO
from grade_lightning.schedules import Constant, Linear
from tests.methods.toy_task import assert_same
from tests.modules.toys import Choosy, Keep, begun, build, distance, gradient, plain, prompts, run

pytestmark = pytest.mark.usefixtures("own_random_state")


def test_with_everything_it_is_token_mean_grpo() -> None:
    """Bit for bit, over two windows of four steps."""
    windows = prompts(4), prompts(4, seed=1)
    steps = {"epochs": 2, "minibatches": 2}
    base = run(build(DAPO, **plain(DAPO, overlong_buffer=0, epsilon_high=0.2, **steps)), *windows)
    found = run(build(D3S, **plain(D3S, row_share=Constant(1.0), token_share=Constant(1.0), **steps)), *windows)
    assert len(found.gradients) == 8
    for ours, truth in zip(found.gradients, base.gradients, strict=True):
        assert_same(ours, truth)


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_gradient_is_that_of_the_tokens_that_are_kept(epochs: int) -> None:
    """Of the completions with the most different advantages, as they were before; the mean is over kept tokens."""
    batch = prompts(4, shortest=3)
    settings = {"row_share": Constant(0.5), "token_share": Constant(0.3)}
    module = build(D3S, **plain(D3S, epochs=epochs, **settings))
    every = build(DAPO, **plain(DAPO, epochs=2, overlong_buffer=0))
    seen = every.collect(batch)
    now = every.measured(seen)[1]
    ranked = seen.advantages[:, 0]
    best, rows = -1.0, torch.empty(0)
    for low in range(9):
        order = ranked.argsort()
        some = torch.cat([order[:low], order[len(order) - (8 - low) :]])
        if float(ranked[some].var()) > best:
            best, rows = float(ranked[some].var()), some
    mask = torch.zeros_like(seen.mask).index_fill(0, rows, True) & seen.mask
    scores = (seen.advantages.abs() * seen.old.entropy).masked_fill(~mask, -1).flatten()
    count = -int(-3 * int(mask.sum()) // 10)
    chosen = scores.topk(count).indices
    kept = torch.zeros_like(scores, dtype=torch.bool).index_fill(0, chosen, True).view_as(mask)
    assert 0 < count < int(mask.sum()) < int(seen.mask.sum())
    every.zero_grad()
    (-(seen.advantages * now.logps)[kept].sum() / count).backward()
    truth = {name: p.grad for name, p in every.named_parameters() if p.grad is not None}
    assert distance(gradient(module, batch), truth) < 1e-6


def test_completions_without_a_reward_are_not_chosen() -> None:
    module = build(D3S, **plain(D3S, epochs=2, row_share=Constant(0.9), reward=Choosy()))
    seen = module.collect(begun(prompts(6)))
    rows = seen.sampled.any(-1)
    assert int(rows.sum()) > 0
    assert not (rows & seen.scores.total.isnan()).any()


def test_the_shares_follow_their_schedules_over_the_run() -> None:
    """Four windows of one step each: the first and the last of them."""
    found = []
    module = build(D3S, **plain(D3S, row_share=Linear(0.25, 1.0), token_share=Constant(1.0), epochs=2))

    class Rows(Keep):
        def on_train_batch_end(self, *_: object) -> None:
            found.append(int(self.window.sampled.any(-1).sum()))

    run(module, *(prompts(4, seed=seed) for seed in range(3)), callbacks=[Rows()])
    assert found[::2] == [4, 8, 12]  # of sixteen, after 0, 2 and 4 of 6 steps


@pytest.mark.parametrize("name", ["row_share", "token_share"])
def test_a_share_above_one_is_named(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name}\.end = 1\.5: must be above 0 and at most 1"):
        build(D3S, **plain(D3S) | {name: Linear(0.5, 1.5)})
