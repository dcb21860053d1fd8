"""Restored Gumbel noise: the right law, the right argmax, no NaN; and what a soft token is embedded as."""

import pytest
import torch
from scipy.stats import gumbel_r, ks_2samp, kstest
from torch import Tensor

from grade_lightning.functional.estimators import reinmax, straight_through, straight_through_gumbel
from grade_lightning.functional.gumbel import exponential_noise, posterior_scores, relaxed_tokens, soft_embeddings
from tests.conftest import VOCABULARY

PROBS = torch.tensor([0.55, 0.25, 0.14, 0.05, 0.01], dtype=torch.float64)


def sample(logps: Tensor) -> Tensor:
    flat = logps.float().exp().flatten(0, -2)
    return torch.multinomial(flat, 1).view(logps.shape[:-1])


def restored(logps: Tensor, tokens: Tensor) -> Tensor:
    return posterior_scores(logps, tokens, exponential_noise(logps))


def assert_strict_maximum(scores: Tensor, tokens: Tensor) -> None:
    index = tokens.unsqueeze(-1)
    others = scores.scatter(-1, index, -torch.inf).amax(-1)
    assert (scores.gather(-1, index).squeeze(-1) > others).all()


@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 100.0, 1e4])
def test_the_sampled_token_has_strictly_the_largest_score(scale: float) -> None:
    """In float32, with half of the vocabulary masked, from uniform to extreme logits."""
    torch.manual_seed(0)
    logits = scale * torch.randn(20_000, 12)
    masked = torch.rand(20_000, 12) < 0.5
    masked[:, 0] = False
    logps = logits.masked_fill(masked, -torch.inf).log_softmax(-1)
    tokens = sample(logps)
    scores = restored(logps, tokens)
    assert_strict_maximum(scores, tokens)
    assert not scores.isnan().any()
    assert (scores[logps.isinf()] == -torch.inf).all()
    assert scores[~logps.isinf()].isfinite().all()


def test_a_token_of_probability_1e_30_wins_when_it_was_sampled() -> None:
    torch.manual_seed(0)
    logps = torch.tensor([1e-30, 1.0, 1e-12]).log().expand(10_000, 3)
    tokens = torch.zeros(10_000, dtype=torch.int64)
    scores = restored(logps, tokens)
    assert scores.isfinite().all()
    assert_strict_maximum(scores, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tie_by_rounding_is_broken(dtype: torch.dtype) -> None:
    """With E_y = 30 and E_v = 1e-30, logaddexp(log E_v − ℓ_v, log E_y) rounds to log E_y: v would tie with y."""
    logps = torch.full((1, 4), 0.25, dtype=dtype).log()
    noise = torch.full((1, 4), 1e-30, dtype=dtype)
    noise[0, 2] = 30.0
    assert torch.logaddexp(noise[0, 0].log() - logps[0, 0], noise[0, 2].log()) == noise[0, 2].log()
    scores = posterior_scores(logps, torch.tensor([2]), noise)
    assert_strict_maximum(scores, torch.tensor([2]))
    assert scores[0, 2] == -noise[0, 2].log()


def test_noise_of_exactly_zero_makes_no_infinity() -> None:
    scores = posterior_scores(PROBS.float().log(), torch.tensor(1), torch.zeros(5))
    assert scores.isfinite().all()
    assert scores.argmax() == 1


def test_pooled_over_sampled_tokens_the_noise_is_gumbel() -> None:
    """Sampling y, then s given y: the joint law is that of fresh noise, so s − ℓ is Gumbel(0, 1), independent."""
    torch.manual_seed(0)
    logps = PROBS.log().expand(5_000, 5)
    noise = restored(logps, sample(logps)) - logps
    for entry in range(5):
        assert kstest(noise[:, entry].numpy(), gumbel_r.cdf).pvalue > 0.01
    assert kstest(noise.flatten().numpy(), gumbel_r.cdf).pvalue > 0.01
    correlation = torch.corrcoef(noise.T) - torch.eye(5, dtype=torch.float64)
    assert correlation.abs().max() < 4 / 5_000**0.5


def test_given_the_token_the_law_is_that_of_rejection_sampling() -> None:
    """Fresh Gumbel scores whose argmax happens to be y, against scores restored for y."""
    torch.manual_seed(1)
    logps = PROBS.log().expand(40_000, 5)
    fresh = logps - exponential_noise(logps).log()
    winners = fresh.argmax(-1)
    for token in range(4):
        kept = fresh[winners == token]
        ours = restored(logps[: len(kept)], torch.full((len(kept),), token))
        for entry in range(5):
            assert ks_2samp(kept[:, entry].numpy(), ours[:, entry].numpy()).pvalue > 0.01 / 20


@pytest.mark.parametrize("token", range(5))
def test_the_largest_score_does_not_depend_on_the_token(token: int) -> None:
    """max_v (ℓ_v + g_v) is Gumbel(0, 1) whatever the argmax: its location is log Σ p = 0."""
    torch.manual_seed(token)
    logps = PROBS.log().expand(5_000, 5)
    largest = restored(logps, torch.full((5_000,), token)).amax(-1)
    assert kstest(largest.numpy(), gumbel_r.cdf).pvalue > 0.01


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_nan_from_noise_to_cotangent(dtype: torch.dtype, tau: float) -> None:
    torch.manual_seed(0)
    logits = 30 * torch.randn(2_000, 9)
    logits[:, 5:] = -torch.inf
    logps = logits.log_softmax(-1)
    tokens = sample(logps)
    logps = logps.to(dtype)
    relaxed = relaxed_tokens(restored(logps, tokens), tau)
    torch.testing.assert_close(relaxed.sum(-1), torch.ones(2_000))
    assert (relaxed[:, 5:] == 0).all()
    adjoint = torch.randn(2_000, 9)
    for cotangent in (
        straight_through_gumbel(relaxed.unsqueeze(0), adjoint, tau),
        straight_through(logps, adjoint.to(dtype), tau),
        reinmax(logps, tokens, adjoint.to(dtype), tau),
    ):
        assert cotangent.isfinite().all()


def test_noise_is_drawn_in_float32_or_better_and_by_the_given_generator() -> None:
    zeros = torch.zeros(4, 3)
    assert exponential_noise(zeros.double()).dtype == torch.float64
    first, again = (exponential_noise(zeros, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, exponential_noise(zeros, torch.Generator().manual_seed(6)))


@pytest.mark.parametrize("k", [5, VOCABULARY])
@pytest.mark.parametrize("rows", [VOCABULARY, VOCABULARY + 3])
def test_soft_embeddings_are_weighted_means(k: int, rows: int) -> None:
    """Value and both gradients against the dense product; tables may have rows that no token uses."""
    torch.manual_seed(0)
    weights = torch.rand(2, 3, k, dtype=torch.float64, requires_grad=True)
    indices = torch.arange(k).expand(2, 3, k) if k == VOCABULARY else torch.rand(2, 3, VOCABULARY).topk(k).indices
    table = torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
    found = soft_embeddings(weights, indices, table)
    truth = torch.zeros(2, 3, rows, dtype=torch.float64).scatter(-1, indices, weights) @ table
    torch.testing.assert_close(found, truth)
    cotangent = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, (weights, table), cotangent), torch.autograd.grad(truth, (weights, table), cotangent)
    )


@pytest.mark.parametrize("k", [5, VOCABULARY])
def test_soft_embeddings_under_autocast_keep_their_precision(k: int) -> None:
    weights = torch.full((1, k), 1 / k)
    table = torch.eye(VOCABULARY) + 1e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = soft_embeddings(weights, torch.arange(k).unsqueeze(0), table)
    torch.testing.assert_close(found, weights @ table[:k])
