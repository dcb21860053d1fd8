"""Baselines, returns and whitening against loops; rewards that abstain; batches that are spread over processes."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from grade_lightning.functional.advantages import (
    batch_standardised,
    discounted_returns,
    ema,
    gae,
    group_centred,
    group_standardised,
    leave_one_out,
    whiten,
)

NAN = math.nan
GROUPS = [[0.0, 1.0, 5.0], [2.0, NAN, 4.0], [NAN, NAN, 3.0], [NAN, NAN, NAN], [7.0, 7.0, 7.0]]


def equal(found: Tensor, truth: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, truth, rtol=0, atol=atol)


def ragged(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and a mask of completions of 1 to 7 tokens; NaN outside of it."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 7, 7, dtype=torch.float64, generator=generator)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    return rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, NAN), mask


def std(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1)) if len(values) > 1 else 0.0


# ---- groups ---------------------------------------------------------------------------------------------------------


def naive(kind: str, groups: list[list[float]], eps: float = 1e-4) -> Tensor:
    """One completion after the other, over those that have a reward."""
    everyone = [r for group in groups for r in group if not math.isnan(r)]
    rows = []
    for group in groups:
        known = [r for r in group if not math.isnan(r)]
        row = []
        for i, reward in enumerate(group):
            others = [r for j, r in enumerate(group) if j != i and not math.isnan(r)]
            if math.isnan(reward):
                row.append(0.0)
            elif kind == "leave one out":
                row.append(reward - sum(others) / len(others) if others else 0.0)
            else:
                scale = {"centred": 1.0, "group": std(known) + eps, "batch": std(everyone) + eps}[kind]
                row.append((reward - sum(known) / len(known)) / scale)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("centred", group_centred),
        ("leave one out", leave_one_out),
        ("group", group_standardised),
        ("batch", batch_standardised),
    ],
)
def test_groups_against_loops(kind: str, function: Callable[[Tensor], Tensor]) -> None:
    """Whole groups, groups in which a reward abstains, with one reward, with none, and with the same for all."""
    equal(function(torch.tensor(GROUPS, dtype=torch.float64)), naive(kind, GROUPS))
    found = function(torch.tensor(GROUPS[:2]))
    assert found.dtype == torch.float32
    equal(found.double(), naive(kind, GROUPS[:2]), 1e-6)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_leave_one_out_is_the_centred_reward_times_g_over_g_minus_one(size: int) -> None:
    rewards = torch.randn(5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    equal(leave_one_out(rewards), size / (size - 1) * (rewards - rewards.mean(-1, keepdim=True)))
    others = (rewards.sum(-1, keepdim=True) - rewards) / (size - 1)
    equal(leave_one_out(rewards), rewards - others)


def test_standardised_groups_have_mean_zero_and_the_unbiased_deviation_one() -> None:
    rewards = 3 * torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 50
    found = group_standardised(rewards, eps=0.0)
    equal(found.mean(-1), torch.zeros(4, dtype=torch.float64))
    equal(found.std(-1), torch.ones(4, dtype=torch.float64))
    equal(group_standardised(2 * rewards - 7, eps=0.0), found)


def test_a_group_that_agrees_has_no_advantage() -> None:
    """Exactly 0 where all rewards of a group are the same, for every statistic; not rounding over a tiny deviation."""
    rewards = torch.tensor([[0.1, 0.1, 0.1, 0.1], [1.0, 1.0, 1.0, 1.0]])
    for function in (group_centred, leave_one_out, group_standardised, batch_standardised):
        assert torch.equal(function(rewards), torch.zeros(2, 4))


def test_the_batch_s_deviation_knows_all_processes() -> None:
    rewards = torch.tensor(GROUPS, dtype=torch.float64)
    parts = [rewards[:2], rewards[2:]]
    found = on_processes(parts, lambda part, total: batch_standardised(part, total=total))
    equal(torch.cat(found), batch_standardised(rewards))
    assert not torch.allclose(found[0], batch_standardised(parts[0]))


def test_the_moving_average() -> None:
    """It starts as the first mean it sees, weighs later ones by 1 − decay, and skips batches without a reward."""
    baseline = torch.tensor(NAN, dtype=torch.float64)
    assert ema(baseline, baseline, 0.9).isnan()
    naive_baseline = None
    for mean in (2.0, 4.0, NAN, -1.0, 0.5):
        if naive_baseline is None:
            naive_baseline = mean
        elif not math.isnan(mean):
            naive_baseline = 0.9 * naive_baseline + 0.1 * mean
        baseline = ema(baseline, torch.tensor(mean, dtype=torch.float64), decay=0.9)
        assert float(baseline) == pytest.approx(naive_baseline, rel=1e-14)


# ---- returns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99, 1.0])
def test_returns_against_a_double_loop(gamma: float) -> None:
    rewards, _, mask = ragged()
    truth = torch.zeros(7, 7, dtype=torch.float64)
    for b in range(7):
        for t in range(b + 1):
            truth[b, t] = sum(gamma ** (u - t) * rewards[b, u] for u in range(t, b + 1))
    equal(discounted_returns(rewards, mask, gamma), truth)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_gae_against_a_double_loop(gamma: float, lam: float) -> None:
    """Σ (γλ)^(u − t) of the temporal differences; the value after the last token is 0, though NaN stands there."""
    rewards, values, mask = ragged(1)
    truth = torch.zeros(7, 7, dtype=torch.float64)
    for b in range(7):
        errors = [rewards[b, t] + (gamma * values[b, t + 1] if t < b else 0.0) - values[b, t] for t in range(b + 1)]
        for t in range(b + 1):
            truth[b, t] = sum((gamma * lam) ** (u - t) * errors[u] for u in range(t, b + 1))
    equal(gae(rewards, values, mask, gamma, lam), truth)
    if lam == 1.0:  # the returns less the values
        equal(truth, discounted_returns(rewards, mask, gamma) - values.masked_fill(~mask, 0))


def with_gaps(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and a mask with gaps at the start, in between and at the end; NaN in them; no token in the last.

    The tokens of a row that are left are between none and all.
    """
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 8, 9, dtype=torch.float64, generator=generator)
    mask = torch.rand(8, 9, generator=generator) < 0.6
    mask[0], mask[-1] = True, False
    mask[1] = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1, 0])
    return rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, NAN), mask


def without_gaps(function: Callable[..., Tensor], mask: Tensor, *columns: Tensor) -> Tensor:
    """What a function makes of each row alone, of its tokens alone, put back where they were."""
    found = torch.zeros_like(columns[0])
    for row, keep in enumerate(mask):
        if keep.any():
            whole = torch.ones(1, int(keep.sum()), dtype=torch.bool)
            found[row, keep] = function(*(column[row, keep].unsqueeze(0) for column in columns), whole).squeeze(0)
    return found


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99, 1.0])
def test_returns_do_not_count_gaps_as_time(gamma: float) -> None:
    """Bit for bit those of the sequence without its gaps, whatever stands in them."""
    for seed in range(5):
        rewards, _, mask = with_gaps(seed)
        found = discounted_returns(rewards, mask, gamma)
        assert torch.equal(found, without_gaps(partial(discounted_returns, gamma=gamma), mask, rewards))
        assert torch.equal(discounted_returns(rewards.masked_fill(~mask, 7.0), mask, gamma), found)


@pytest.mark.parametrize("gamma", [0.5, 0.97])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_gae_does_not_count_gaps_as_time(gamma: float, lam: float) -> None:
    """Bit for bit, and the value that follows a token is that of the next token that is trained on."""
    for seed in range(5):
        rewards, values, mask = with_gaps(seed)
        found = gae(rewards, values, mask, gamma, lam)
        assert torch.equal(found, without_gaps(partial(gae, gamma=gamma, lam=lam), mask, rewards, values))
        other = gae(rewards.masked_fill(~mask, 7.0), values.masked_fill(~mask, 7.0), mask, gamma, lam)
        assert torch.equal(other, found)
        assert (found[~mask] == 0).all()


# ---- whitening ------------------------------------------------------------------------------------------------------


def on_processes(parts: list[Tensor], function: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]) -> list[Tensor]:
    """What each of several processes computes, if `total` adds up over all of them."""
    sent: list[Tensor] = []

    def send(values: Tensor) -> Tensor:
        sent.append(values)
        return values

    for part in parts:
        function(part, send)
    assert len(sent) == len(parts)  # one reduction each
    return [function(part, lambda _: torch.stack(sent).sum(0)) for part in parts]


def test_whitening_against_a_loop() -> None:
    values, _, mask = ragged(2)
    shown = [float(values[b, t]) for b in range(7) for t in range(b + 1)]
    mean = sum(shown) / len(shown)
    variance = std(shown) ** 2
    truth = ((values - mean) / math.sqrt(variance + 1e-8)).masked_fill(~mask, 0)
    found = whiten(values, mask)
    equal(found, truth)
    assert float(found[mask].mean()) == pytest.approx(0, abs=1e-12)
    assert float(found[mask].std()) == pytest.approx(1, abs=1e-6)


def test_whitening_in_two_processes_is_whitening_as_a_whole() -> None:
    """Halves with a different number of tokens; whitened each by itself, they would come out differently."""
    values, _, mask = ragged(3)
    values = values + torch.arange(7.0).unsqueeze(1)  # the halves differ in their mean
    whole = whiten(values, mask)
    masks = {3: mask[:3], 4: mask[3:]}
    halves = on_processes([values[:3], values[3:]], lambda x, total: whiten(x, masks[len(x)], total))
    equal(torch.cat(halves), whole)
    alone = torch.cat([whiten(values[:3], mask[:3]), whiten(values[3:], mask[3:])])
    assert (alone - whole).abs().max() > 0.1


def test_whitening_of_large_values_in_float32() -> None:
    """The statistics are float64's: a mean 10⁴ times the deviation does not swallow it."""
    noise = torch.randn(50, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(50, 20, dtype=torch.bool)
    values = (1e4 + noise).float()
    equal(whiten(values, mask).double(), whiten(values.double(), mask), 1e-3)
    assert float(whiten(values, mask).std()) == pytest.approx(1, abs=1e-3)


def test_nothing_to_whiten() -> None:
    """No token, one token, and tokens that are all the same: 0, and not NaN."""
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert torch.equal(whiten(torch.full((2, 3), NAN), mask), torch.zeros(2, 3))
    mask[0, 0] = True
    assert torch.equal(whiten(torch.full((2, 3), 5.0), mask), torch.zeros(2, 3))
    assert whiten(torch.full((2, 3), 0.1), torch.ones(2, 3, dtype=torch.bool)).abs().max() < 1e-3
