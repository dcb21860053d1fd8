"""Relaxed sampling: soft tokens near the hard ones, their distribution, their ends, and what of them is in memory."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grade_lightning.errors import InputError
from grade_lightning.policies import LoRA, Policy
from grade_lightning.records import Prompts, RelaxedRollout, Rollout
from grade_lightning.rewards import DifferentiableReward, FunctionReward, WeightedSum
from grade_lightning.rollouts import Distribution, RelaxedEngine, relaxed
from tests.conftest import CONFIGS, VOCABULARY, make_model, make_prompts, make_tokenizer

HARD = 1e-6  # a temperature at which soft tokens are hard ones, to the bit
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 4},
    "top-p": {"top_p": 0.8},
    "minimum": {"min_new_tokens": 4},
    "all": {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_new_tokens": 3},
}


def make_policy(name: str = "gpt2", lora: LoRA | None = None) -> Policy:
    return Policy.from_model(make_model(name, torch.float64), make_tokenizer(), lora)


def roll(
    policy: Policy, seed: int = 0, repeat: int = 4, block: int = 3, tau: float = 1.0, **settings: Any
) -> RelaxedRollout:
    torch.manual_seed(seed)
    prompts = {name: value.repeat(repeat, 1) for name, value in make_prompts().items()}
    distribution = Distribution(**{"max_new_tokens": 8} | settings)
    return RelaxedEngine(block).generate(policy, distribution, Prompts.of(prompts), tau)


def logps_of(rollout: Rollout) -> Tensor:
    assert rollout.engine_logps is not None
    return rollout.engine_logps


def teacher_forced(policy: Policy, rollout: Rollout) -> Tensor:
    with torch.no_grad():
        logits: Tensor = policy(
            policy.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], rollout.completion_ids.shape[1]
        )
    return logits


def assert_mixed(rollout: Rollout) -> None:
    assert rollout.ended.any()
    assert not rollout.ended.all()
    assert not rollout.prompt_mask.all()


# ---- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 3, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_with_hard_tokens_it_is_ordinary_sampling(name: str, block: int) -> None:
    """Left padding, early ends, windows shorter than the sequence: the logits of a pass over the hard tokens."""
    policy = make_policy(name)
    rollout = roll(policy, block=block, tau=HARD)
    assert_mixed(rollout)
    keep, truth = rollout.completion_mask, teacher_forced(policy, rollout)
    assert (rollout.weights.amax(-1)[keep] == 1).all()
    # transformers computes RMSNorm and rotary embeddings in float32 even in a float64 model
    tolerance = 1e-12 if name == "gpt2" else 1e-4
    torch.testing.assert_close(rollout.logits[keep], truth[keep], rtol=tolerance, atol=tolerance)
    logps = truth.log_softmax(-1).gather(-1, rollout.completion_ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logps_of(rollout)[keep], logps[keep], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_tokens_and_weights_are_of_the_sampled_distribution(settings: dict[str, Any]) -> None:
    """Of soft tokens, too: log-probabilities are the sampler's, weights lie in its support and sum to 1."""
    distribution = Distribution(max_new_tokens=8, **settings)
    rollout = roll(make_policy(), tau=2.0, **settings)
    tokens, keep = rollout.completion_ids, rollout.completion_mask
    dense = torch.zeros_like(rollout.logits).scatter(-1, rollout.indices, rollout.weights)
    truth = distribution.logits(rollout.logits, rollout.eos_ids).log_softmax(-1)
    torch.testing.assert_close(dense.sum(-1), torch.ones_like(logps_of(rollout)))
    assert ((dense > 0) <= (truth > -torch.inf)).all()
    assert torch.equal(dense.argmax(-1)[keep], tokens[keep])
    torch.testing.assert_close(logps_of(rollout)[keep], truth.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)[keep])
    assert rollout.weights.shape[-1] == (distribution.top_k or VOCABULARY)
    assert not logps_of(rollout).requires_grad
    assert rollout.weights.requires_grad
    assert rollout.logits.requires_grad


def test_noise_of_zero_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaxed, "exponential_noise", torch.zeros_like)
    rollout = roll(make_policy(), top_k=5)
    rollout.weights.square().sum().backward()
    assert rollout.weights.isfinite().all()


@pytest.mark.parametrize("tau", [0.3, 5.0])
def test_the_token_does_not_depend_on_tau(tau: float) -> None:
    """τ softens the token, not the choice: at the first position, where the context is the same."""
    one, two = (roll(make_policy(), tau=value) for value in (1.0, tau))
    assert torch.equal(one.completion_ids[:, 0], two.completion_ids[:, 0])
    assert (one.weights[:, 0].amax(-1).mean() > two.weights[:, 0].amax(-1).mean()) == (tau > 1)


@pytest.mark.slow
def test_tokens_follow_the_distribution() -> None:
    """Frequencies of the first two tokens over 12,000 samples, by a χ² of all pairs that are expected often enough."""
    policy, size = make_policy(), 4_000
    settings: dict[str, Any] = {"max_new_tokens": 2, "temperature": 1.3, "top_k": 6}
    distribution, prompts = Distribution(**settings), make_prompts()
    with torch.no_grad():
        rollout = roll(policy, repeat=size, tau=HARD, **settings)
        for row in range(3):
            ids, mask = (value[row : row + 1].expand(VOCABULARY, -1) for value in prompts.values())
            first = distribution.logits(policy(policy.embed(ids), mask, 1), [0])[0, 0].softmax(-1)
            ids = torch.cat([ids, torch.arange(VOCABULARY).unsqueeze(1)], dim=1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            second = distribution.logits(policy(policy.embed(ids), mask, 1), [0])[:, 0].softmax(-1)
            second[0] = torch.nn.functional.one_hot(torch.tensor(1), VOCABULARY).to(second)  # padding after the end
            expected = (first.unsqueeze(1) * second).flatten() * size
            pairs = rollout.completion_ids[row::3] @ torch.tensor([VOCABULARY, 1])
            counts = torch.bincount(pairs, minlength=VOCABULARY**2)
            assert (counts[expected == 0] == 0).all()
            often = expected > 10
            chi2 = float(((counts - expected).square() / expected)[often].sum())
            freedom = int(often.sum())
            assert chi2 < freedom + 4.5 * (2 * freedom) ** 0.5


# ---- ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 3, 8])
def test_ends_and_padding(block: int) -> None:
    rollout = roll(make_policy(), block=block)
    assert_mixed(rollout)
    for ids, mask, ended in zip(rollout.completion_ids, rollout.completion_mask, rollout.ended, strict=True):
        length = int(mask.sum())
        assert bool(ended) == (0 in ids.tolist())
        assert length == (ids.tolist().index(0) + 1 if ended else len(ids))
        assert (ids[length:] == 1).all()
    assert (logps_of(rollout)[~rollout.completion_mask] == 0).all()
    assert (rollout.lengths == rollout.completion_mask.sum(-1)).all()


@pytest.mark.parametrize("block", [1, 3, 8])
def test_it_stops_when_all_have_ended(block: int) -> None:
    policy = make_policy()
    policy.base.generation_config.eos_token_id = list(range(10))
    calls: list[Any] = []
    policy.base.register_forward_hook(lambda *_: calls.append(1))
    rollout = roll(policy, repeat=1, block=block)
    assert len(calls) == min(8, -(-int(rollout.lengths.max()) // block) * block)  # whole blocks
    assert rollout.ended.all()
    assert rollout.lengths.max() == rollout.completion_ids.shape[1] == rollout.weights.shape[1] < 8
    assert rollout.logits.shape[1] == logps_of(rollout).shape[1] == rollout.indices.shape[1] == rollout.lengths.max()


def test_no_gradient_through_positions_after_the_end() -> None:
    policy = make_policy()
    rollout = roll(policy)
    (gradient,) = torch.autograd.grad(Toy().relaxed(rollout).total.sum(), rollout.weights)
    assert (gradient[~rollout.completion_mask] == 0).all()
    assert (gradient[rollout.completion_mask] != 0).any(-1).all()


@pytest.mark.parametrize("seed", range(3))
def test_no_end_before_min_new_tokens(seed: int) -> None:
    bound = roll(make_policy(), seed, min_new_tokens=6)
    assert roll(make_policy(), seed).lengths.min() < 6
    assert bound.lengths.min() >= 6
    assert (bound.weights[:, :5, 0] == 0).all()  # not a little of an end, either
    assert (bound.weights[:, 5:, 0] > 0).any()


def test_a_model_without_end_runs_to_the_limit() -> None:
    policy = make_policy()
    policy.eos_ids = []
    rollout = roll(policy)
    assert rollout.completion_mask.all()
    assert rollout.completion_ids.shape[1] == 8


# ---- modes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [False, True])
def test_training_mode_with_checkpointing_and_dropout_changes_nothing(dropout: bool) -> None:
    """Transformers would drop the cache, and with it the context; LoRA would drop other units at every step."""
    policy = make_policy("llama", LoRA(r=2, dropout=0.5 if dropout else 0.0))
    plain = roll(policy.eval())
    policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rollout = roll(policy.train())
    assert torch.equal(rollout.logits, plain.logits)
    assert policy.model.training
    assert policy.base.is_gradient_checkpointing
    modes = {name: module.training for name, module in policy.named_modules()}
    rollout.weights.square().sum().backward()  # which runs the blocks again
    assert {name: module.training for name, module in policy.named_modules()} == modes


def test_the_seed_decides_and_blocks_do_not() -> None:
    policy = make_policy()
    one = roll(policy, seed=1, block=1)
    for block in (3, 8, 100):
        torch.testing.assert_close(roll(policy, seed=1, block=block).weights, one.weights, rtol=1e-12, atol=1e-12)
    assert not torch.equal(roll(policy, seed=2).completion_ids, one.completion_ids)


def test_gradients_do_not_disturb_the_random_state() -> None:
    """Blocks are computed again with their own noise, and what is drawn afterwards is what it was."""
    rollout = roll(make_policy(), block=1)
    state = torch.get_rng_state()
    rollout.weights.square().sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_without_gradients_there_is_no_graph() -> None:
    with torch.no_grad():
        rollout = roll(make_policy())
    assert not rollout.weights.requires_grad
    assert not rollout.logits.requires_grad


def test_selected_and_discrete_rollouts() -> None:
    policy = make_policy()
    torch.manual_seed(0)
    prompts = Prompts.of(make_prompts() | {"columns": {"n": [1, 2, 3]}})
    rollout = RelaxedEngine(block=2).generate(policy, Distribution(max_new_tokens=4, top_k=5), prompts, tau=1.0)
    rows = torch.tensor([2, 0])
    some = rollout.select(rows)
    for name in ("completion_ids", "completion_mask", "engine_logps", "weights", "indices", "logits"):
        assert torch.equal(getattr(some, name), getattr(rollout, name)[rows])
    assert some.columns == {"n": [3, 1]}
    hard = rollout.discrete()
    assert type(hard) is Rollout
    assert torch.equal(hard.ids, rollout.ids)
    assert hard.columns == rollout.columns
    assert not any(value.requires_grad for value in vars(hard).values() if isinstance(value, Tensor))


def test_what_cannot_work_is_named() -> None:
    with pytest.raises(InputError, match="block = 0"):
        RelaxedEngine(block=0)
    policy = make_policy()
    policy.base._is_stateful = True
    with pytest.raises(InputError, match=r"recurrent.*GradeSTE"):
        roll(policy)


# ---- rewards ------------------------------------------------------------------------------------------------------


class Toy(DifferentiableReward):
    """Not linear in the tokens."""

    def table(self) -> Tensor:
        return torch.arange(2.0 * VOCABULARY, dtype=torch.float64).sin().view(VOCABULARY, 2)

    def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        return ((embeddings.prod(-1) + embeddings.sum(-1)) * mask).sum(-1).div(9).tanh()


def test_relaxed_scores_of_hard_tokens_are_the_scores() -> None:
    rollout, reward = roll(make_policy(), tau=HARD), Toy()
    scores = reward.relaxed(rollout)
    torch.testing.assert_close(scores.total, reward.score(rollout).total)
    assert torch.equal(scores.parts["Toy"], scores.total)
    soft = roll(make_policy(), tau=1.0)
    assert (reward.relaxed(soft).total - reward.score(soft).total).abs().min() > 1e-3


def test_a_sum_of_relaxed_scores() -> None:
    rollout = roll(make_policy())
    scores = WeightedSum([Toy(), Toy()], [2.0, -0.5]).relaxed(rollout)
    single = Toy().relaxed(rollout).total
    torch.testing.assert_close(scores.total, 1.5 * single)
    assert set(scores.parts) == {"Toy", "Toy-2"}
    (found,) = torch.autograd.grad(scores.total.sum(), rollout.weights)
    (truth,) = torch.autograd.grad(1.5 * single.sum(), rollout.weights)
    torch.testing.assert_close(found, truth)


def test_a_reward_of_text_is_named() -> None:
    def shortness(completions: list[str], **_: Any) -> list[float | None]:
        return [0.0 for _ in completions]

    rollout = roll(make_policy())
    for reward in (FunctionReward(shortness), WeightedSum([Toy(), FunctionReward(shortness)])):
        with pytest.raises(InputError, match=r"shortness: not differentiable.*ClassifierReward"):
            reward.relaxed(rollout)


# ---- memory -------------------------------------------------------------------------------------------------------


class Memory(TorchDispatchMode):
    """Bytes of all tensors that were made inside and are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given | self.known:
                    self.known.add(storage._cdata)
                    self.alive += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def measure(block: int, length: int) -> tuple[int, int]:
    """Bytes alive after the forward pass, and at the peak of forward and backward together."""
    policy = make_policy(lora=LoRA(r=2, dropout=0.0))
    policy.eos_ids = []
    gc.collect()
    with Memory() as memory:
        rollout = roll(policy, block=block, max_new_tokens=length)
        alive = memory.alive
        rollout.weights.square().sum().backward()
    return alive, memory.peak


@pytest.mark.slow
def test_blocks_bound_the_memory() -> None:
    alive, peak = zip(*(measure(block, 24) for block in (2, 6, 24)), strict=True)
    assert list(peak) == sorted(peak)
    assert peak[0] < 0.4 * peak[-1]
    assert alive[0] < 0.15 * alive[-1]
    assert alive[1] < 2.1 * measure(6, 12)[0]  # what blocks leave grows with the length alone
