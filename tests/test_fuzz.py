"""Rollouts and methods on drawn prompts, lengths, ends, vocabularies' edges and samplers."""

import inspect
import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, islice
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from grade_lightning.functional import advantages, divergences, sequences
from grade_lightning.functional.vocabulary import Vocabulary
from grade_lightning.kl import KL
from grade_lightning.methods import IPO
from grade_lightning.modules import AlignmentModule, PolicyGradientModule
from grade_lightning.modules.first_batch import check_first_batch
from grade_lightning.policies import LoRA, Policy
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rollouts import Sampler, TransformersEngine
from tests.conftest import CONFIGS, VOCABULARY, make_model, make_tokenizer
from tests.fuzz import cases, check_all
from tests.methods.toy_task import METHODS, Toy

CONTEXT = 64  # of the models that have a longest one


@dataclass(frozen=True)
class Case:
    """Prompts and how they are continued."""

    model: str
    prompts: tuple[tuple[int, ...], ...]
    padding: int
    """Columns that are padding everywhere."""
    filler: int
    """What stands there."""
    eos: tuple[int, ...]
    pad: int
    settings: tuple[tuple[str, Any], ...]
    seed: int
    lora: bool = False
    double: bool = True
    """Whether a model of its own is in double precision."""

    @property
    def sampler(self) -> Sampler:
        settings = dict(self.settings)
        return Sampler(engine=TransformersEngine(block=settings.pop("block")), **settings)

    def batch(self, more: int = 0) -> dict[str, Any]:
        width = max(map(len, self.prompts)) + self.padding + more
        ids = [[self.filler] * (width - len(prompt)) + list(prompt) for prompt in self.prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in self.prompts]
        numbers = {"number": list(range(len(self.prompts)))}
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "columns": numbers}

    def policy(self) -> Policy:
        """One of its own, with a reference."""
        return self._policy(make_model(self.model, torch.float64 if self.double else torch.float32))

    def sampled(self) -> Rollout:
        torch.manual_seed(self.seed)
        return self.sampler(self._policy(model(self.model), reference=False), Prompts.of(self.batch()))

    def _policy(self, network: PreTrainedModel, reference: bool = True) -> Policy:
        tokenizer = make_tokenizer()
        tokenizer.pad_token_id = self.pad
        tokenizer.eos_token_id = self.eos[0] if self.eos else None
        policy = Policy.from_model(network, tokenizer, LoRA(r=2, dropout=0.0) if self.lora else None, reference)
        config: Any = policy.base.generation_config
        config.eos_token_id = list(self.eos) or None
        return policy


model = cache(make_model)
tokens = st.integers(0, VOCABULARY - 1)


@st.composite
def drawn_cases(draw: st.DrawFn, longest: int = 8) -> Case:
    new = draw(st.integers(1, longest))
    lengths = st.integers(1, 10) | st.just(CONTEXT - new)  # which fill the context
    prompt = lengths.flatmap(lambda n: st.tuples(*[tokens] * n))
    prompts = draw(st.lists(prompt, min_size=1, max_size=4))
    settings = {
        "max_new_tokens": new,
        "min_new_tokens": draw(st.just(0) | st.integers(0, new) | st.just(new)),
        "temperature": draw(st.just(1.0) | st.floats(-3, 2).map(math.exp)),
        "top_k": draw(st.none() | st.sampled_from([1, 2, VOCABULARY - 1, VOCABULARY, VOCABULARY + 9])),
        "top_p": draw(st.just(1.0) | st.sampled_from([1e-9, 1e-3]) | st.floats(0.05, 1.0)),
        "block": draw(st.integers(1, new + 1)),
    }
    eos = draw(st.sampled_from([(0,), (VOCABULARY - 1,), (0, VOCABULARY - 1), (5,), tuple(range(2, 12)), ()]))
    return Case(
        model=draw(st.sampled_from(sorted(CONFIGS))),
        prompts=tuple(prompts),
        padding=draw(st.sampled_from([0, 0, 1, 5])),
        filler=draw(tokens),
        eos=eos,
        pad=draw(st.sampled_from([1, 0, VOCABULARY - 1, eos[0] if eos else 1])),
        settings=tuple(settings.items()),
        seed=draw(st.integers(0, 99)),
    )


# ---- rollouts -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def alone(case: Case, rollout: Rollout, row: int) -> Tensor:
    """Log-probabilities of a completion by one plain pass, without padding and without a cache."""
    prompt, completion = case.prompts[row], rollout.completion_ids[row][rollout.completion_mask[row]]
    ids: Any = torch.cat([torch.tensor(prompt), completion]).unsqueeze(0)
    logits = model(case.model).eval()(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    logps = case.sampler.distribution.logits(logits, list(case.eos), completion).log_softmax(-1)
    return logps.gather(-1, completion.unsqueeze(-1)).squeeze(-1)


def logps_of(rollout: Rollout) -> Tensor:
    assert rollout.engine_logps is not None
    return rollout.engine_logps


def check_rollout(case: Case) -> None:
    rollout, distribution = case.sampled(), case.sampler.distribution
    length = rollout.completion_ids.shape[1]
    assert 1 <= length <= distribution.max_new_tokens
    assert int(rollout.lengths.max()) == length
    for row, ids in enumerate(rollout.completion_ids.tolist()):
        end = next((i + 1 for i, token in enumerate(ids) if token in case.eos), length)
        ended = ids[end - 1] in case.eos
        assert ended or end == distribution.max_new_tokens
        assert end > distribution.min_new_tokens or (end == distribution.max_new_tokens and not ended)
        assert rollout.completion_mask[row].tolist() == [True] * end + [False] * (length - end)
        assert ids[end:] == [case.pad] * (length - end)
        assert bool(rollout.ended[row]) == ended
        found = logps_of(rollout)[row]
        assert not found[end:].any()
        torch.testing.assert_close(found[:end], alone(case, rollout, row), rtol=1e-3, atol=1e-3)
        if distribution.top_k == 1:
            assert found.abs().max() < 1e-6


@cases(20, 400)
def test_rollouts(count: int) -> None:
    check_all(count, check_rollout, drawn_cases())


def content(rollout: Rollout) -> list[Any]:
    """What a rollout says, row by row, without its padding."""
    texts = (rollout.prompts, rollout.completions, rollout.columns["number"])
    prompts = (ids[mask.bool()].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True))
    masks = rollout.completion_mask
    completions = (ids[mask].tolist() for ids, mask in zip(rollout.completion_ids, masks, strict=True))
    logps = (values[mask].tolist() for values, mask in zip(logps_of(rollout), masks, strict=True))
    return list(zip(prompts, completions, logps, rollout.ended.tolist(), *texts, strict=True))


@cases(10, 200)
def test_rollouts_are_taken_apart_and_joined(count: int) -> None:
    def check(case: Case, data: st.DataObject) -> None:
        rollout = case.sampled()
        order = data.draw(st.permutations(range(len(case.prompts))))
        cut = data.draw(st.integers(1, len(order)))
        parts = [rollout.select(torch.tensor(part)) for part in (order[:cut], order[cut:]) if part]
        for part in parts:
            assert bool(part.prompt_mask[:, 0].any())
            assert bool(part.completion_mask[:, -1].any())
            assert part.put(part.take(logps_of(part))).equal(logps_of(part))
        joined, whole = Rollout.join(parts), content(rollout)
        assert content(joined) == [whole[row] for row in order]
        assert joined.completion_ids[~joined.completion_mask].eq(case.pad).all()

    check_all(count, check, drawn_cases(), st.data())


trained_cases = st.builds(replace, drawn_cases(longest=6), lora=st.booleans())


# ---- methods ------------------------------------------------------------------------------------------------------

kls = st.builds(
    KL,
    beta=st.sampled_from([0.0, 0.1]),
    estimator=st.sampled_from(["k1", "k2", "k3", "full"]),
    placement=st.sampled_from(["reward", "loss", "both"]),
    credit=st.sampled_from(["token", "sequence"]),
)


class Steps:
    """The steps of a window, with an update after each: losses, and what the first says of policy and sampler."""

    def __init__(self, method: type[AlignmentModule], case: Case, kl: KL, minibatches: int, rows: int) -> None:
        options = inspect.signature(method).parameters
        settings: dict[str, Any] = {"num_generations": 2} if "num_generations" in options or method is IPO else {}
        if issubclass(method, PolicyGradientModule):
            settings |= {"kl": kl, "minibatches": minibatches}
        self.case, self.module = case, method(policy=case.policy(), reward=Toy(), sampler=case.sampler, **settings)
        self.module.configure_model()
        batching = self.module.batching
        self.rows = batching.rows(max(rows * batching.generations, batching.least))

    def run(self, more: int = 0) -> list[Tensor]:
        prompts = tuple(islice(cycle(self.case.prompts), self.rows))
        batch = replace(self.case, prompts=prompts).batch(more)
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        optimizer, losses = torch.optim.SGD(parameters, lr=1e-3), []
        for visit in range(self.module.batching.steps_per_batch):
            optimizer.zero_grad()
            loss = self.module.training_step(batch, visit)
            loss.backward()
            assert loss.isfinite()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
            optimizer.step()
            losses.append(loss.detach())
        return losses


methods = st.sampled_from(METHODS)


@cases(4, 300)
def test_a_step_of_any_method_is_finite_and_knows_no_padding(count: int) -> None:
    """With more padding the losses are the same, also after updates."""

    def check(method: type[AlignmentModule], case: Case, kl: KL, minibatches: int, rows: int, more: int) -> None:
        losses = [Steps(method, case, kl, minibatches, rows).run(padding) for padding in (0, more)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)

    check_all(count, check, methods, trained_cases, kls, st.integers(1, 2), st.integers(1, 2), st.integers(1, 9))


@cases(10, 150)
def test_no_false_alarm_at_the_first_batch(count: int) -> None:
    """In single precision, and at temperatures that magnify rounding."""

    def check(method: type[AlignmentModule], case: Case, rows: int) -> None:
        steps = Steps(method, replace(case, double=False), KL(0.1), 1, rows)
        batch = replace(case, prompts=tuple(islice(cycle(case.prompts), steps.rows))).batch()
        experience = steps.module.collect(batch)
        rollout = steps.module.checked(experience)
        check_first_batch(steps.module.policy, steps.module.sampler, rollout, started=True, reduced=False)

    check_all(count, check, methods, trained_cases, st.integers(1, 2))


# ---- the mathematics ----------------------------------------------------------------------------------------------

numbers = st.floats(-1e3, 1e3, width=32)


def tables(elements: st.SearchStrategy[float], rows: int = 4, columns: int = 6) -> st.SearchStrategy[Tensor]:
    """(b, t), neither of them 0."""
    widths = st.integers(1, columns)
    rectangles = widths.flatmap(lambda n: st.lists(st.tuples(*[elements] * n), min_size=1, max_size=rows))
    return rectangles.map(lambda values: torch.tensor(values, dtype=torch.float64))


@cases(50, 500)
def test_advantages_of_groups(count: int) -> None:
    """Finite, 0 for who abstains and in sum; an equal share for all changes nothing."""
    functions = (advantages.group_centred, advantages.leave_one_out, advantages.group_standardised)

    def check(rewards: Tensor, more: float) -> None:
        for function in (*functions, advantages.batch_standardised):
            found = function(rewards)
            assert found.isfinite().all()
            assert not found[rewards.isnan()].any()
            torch.testing.assert_close(found.sum(-1), torch.zeros(len(rewards)).double(), rtol=0, atol=1e-6)
            torch.testing.assert_close(function(rewards + more), found, rtol=1e-3, atol=1e-3)

    check_all(count, check, tables(st.integers(-9, 9).map(float) | st.just(math.nan)), st.integers(-9, 9).map(float))


@cases(50, 500)
def test_advantages_of_tokens(count: int) -> None:
    """As sums over what follows; what stands outside of the mask does not matter."""

    def check(rewards: Tensor, ends: list[int], gamma: float, lam: float, value: float) -> None:
        length = rewards.shape[1]
        lengths = torch.tensor([1 + ends[i % len(ends)] % length for i in range(len(rewards))])
        mask = torch.arange(length) < lengths.unsqueeze(1)
        noisy = rewards.where(mask, math.nan)
        values = torch.full_like(rewards, value)
        found = advantages.gae(noisy, values.where(mask, math.nan), mask, gamma, lam)
        returns = advantages.discounted_returns(noisy, mask, gamma)
        for row, end in enumerate(lengths.tolist()):
            later = [value if t + 1 < end else 0.0 for t in range(end)]
            errors = [float(rewards[row, t]) + gamma * later[t] - value for t in range(end)]
            for t in range(end):
                estimate = sum((gamma * lam) ** (u - t) * errors[u] for u in range(t, end))
                discounted = sum(gamma ** (u - t) * float(rewards[row, u]) for u in range(t, end))
                torch.testing.assert_close(float(found[row, t]), estimate, rtol=1e-9, atol=1e-6)
                torch.testing.assert_close(float(returns[row, t]), discounted, rtol=1e-9, atol=1e-6)
        white = advantages.whiten(found, mask)
        for result in (found, returns, white):
            assert result.isfinite().all()
            assert not result[~mask].any()
        assert abs(float(white.sum())) < 1e-3

    shares = st.floats(0, 1)
    check_all(count, check, tables(numbers), st.lists(st.integers(0, 9), min_size=1), shares, shares, numbers)


@cases(50, 500)
def test_divergences(count: int) -> None:
    """Never below 0, and 0 of a distribution and itself; the entropy also where a token is impossible."""

    def check(logits: Tensor, impossible: int) -> None:
        one, other = logits.log_softmax(-1), logits.roll(1, 0).log_softmax(-1)
        kl = divergences.categorical_kl(one, other)
        assert kl.isfinite().all()
        assert float(kl.min()) > -1e-9
        assert not divergences.categorical_kl(one, one).any()
        assert float(divergences.k2(logits).min()) >= 0
        assert float(divergences.k3(logits.clamp(-30, 30)).min()) >= 0
        if logits.shape[1] > 1:
            logits[:, impossible % logits.shape[1]] = -math.inf
        entropy = sequences.entropy(logits.log_softmax(-1))
        assert ((entropy > -1e-9) & (entropy < math.log(logits.shape[1]) + 1e-9)).all()

    check_all(count, check, tables(numbers), st.integers(0, 9))


@cases(50, 500)
def test_truncated_logits(count: int) -> None:
    """The likeliest stays; no more than k are left (but for ties), of at least the mass p."""

    def check(logits: Tensor, top_k: int | None, top_p: float) -> None:
        found = sequences.truncate_logits(logits, top_k, top_p)
        kept = found.isfinite()
        assert found[kept].equal(logits[kept])
        best = logits.max(-1, keepdim=True)
        assert kept.gather(-1, best.indices).all()
        if top_k is not None:
            smallest = found.where(kept, math.inf).amin(-1, keepdim=True)
            assert ((logits > smallest).sum(-1) < top_k).all()
        if top_k is None:
            mass = logits.softmax(-1).where(kept, 0).sum(-1)
            assert (mass >= min(top_p, 1.0) - 1e-9).all()

    check_all(count, check, tables(numbers), st.none() | st.integers(1, 8), st.floats(1e-9, 1.0))


@cases(30, 300)
def test_chunks_of_the_vocabulary(count: int) -> None:
    """Values and gradients are those of all logits at once, however they are cut."""

    def check(hidden: Tensor, size: int, elements: int, seed: int) -> None:
        torch.manual_seed(seed)
        weight, tokens = torch.randn(size, hidden.shape[1]).double(), torch.randint(size, (len(hidden),))
        results = []
        for cut in (elements, len(hidden) * size):
            inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
            vocabulary = Vocabulary(inputs[0], torch.nn.functional.linear, inputs[1:], size, cut)

            def function(logits: Tensor, rows: slice) -> list[Tensor]:
                logps = logits.log_softmax(-1)
                return [sequences.token_logps(logps, tokens[rows]), sequences.entropy(logps)]

            columns = vocabulary.map(function)
            results.append([*columns, *torch.autograd.grad((columns[0] + columns[1] ** 2).sum(), inputs)])
        torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)

    sizes = st.integers(1, 30)
    check_all(count, check, tables(st.floats(-3, 3, width=32), rows=9), sizes, st.integers(1, 200), st.integers(0, 9))
