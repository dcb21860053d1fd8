"""Credit of each kind: unbiased by enumeration, what it learns from, and that runs with it resume."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from grade_lightning.corrections import EngineCorrection
from grade_lightning.credit import COLUMN, CriticCredit, PathwiseCredit, PrefixCredit, RegressionCredit
from grade_lightning.distributed import Reduce
from grade_lightning.errors import InputError
from grade_lightning.functional.control_variates import deviation
from grade_lightning.methods import CISPO, GRPO, PPO, RLOO, DrGRPO, Reinforce
from grade_lightning.records import Experience, Prompts, Rollout, Scores, TokenStats
from grade_lightning.rollouts import Sampler
from grade_lightning.terms import Graphs
from tests.functional.problems import Problem
from tests.methods import enumeration
from tests.methods.toy_task import Toy, assert_same, trainer, weights
from tests.modules.toys import Prescribed, build, distance, gradient, loader, plain, prompts, run

pytestmark = pytest.mark.usefixtures("own_random_state")

LINES = [
    enumeration.Line("RLOO"),
    enumeration.Line("RLOO", kl=True),
    enumeration.Line("DrGRPO"),
    enumeration.Line("Reinforce"),
]


def known_credit(
    problem: Problem, seed: int = 3, slope: float = 1.7, kind: type[PathwiseCredit] = PathwiseCredit
) -> PathwiseCredit:
    """With directions from nowhere, as from earlier batches."""
    credit, width = kind(), 4
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(int(problem.tokens.max()) + 1, width, dtype=torch.float64, generator=generator)
    features = 1 if kind is PathwiseCredit else 2 + 2 * width
    along = torch.randn(features, width, dtype=torch.float64, generator=generator)
    credit._tables, credit._sums = [table], [torch.eye(features, dtype=torch.float64), along]
    credit._fit = torch.tensor([slope, 1.0, 4.0], dtype=torch.float64)
    return credit


def with_credit(line: enumeration.Line, problem: Problem, credit: PathwiseCredit) -> Any:
    """The method of the table, whose pass measures the expected score of each position, too."""
    module = enumeration.make(line, problem)
    credit.attach(module.advantage, module.terms[0].aggregate, line.method)
    module.credit = credit
    module.terms.append(credit)
    plain_measure = module.measure

    def measure(rollout: Rollout, known: TokenStats | None = None, graphs: Graphs = "log_ratio") -> TokenStats:
        found: TokenStats = plain_measure(rollout, known, graphs)
        scores = credit.scores(rollout)
        assert scores is not None
        rows = rollout.take(problem.rows[rollout.columns["outcome"]])
        found_deviation = deviation(module.table.log_softmax(-1)[rows], rollout.tokens, scores(slice(None)))
        return replace(found, columns=found.columns | {COLUMN: rollout.put(found_deviation)})

    module.measure = measure
    return module


def moments(
    line: enumeration.Line, problem: Problem, module: Any, values: Tensor | None = None
) -> tuple[Tensor, float]:
    """Mean of the update and its variance, over all batches; `values` are of each completion before each token."""
    mean, square = torch.zeros_like(problem.logits), 0.0
    for outcomes, probability in enumeration.batches(line, problem, 1.0):
        seen = enumeration.experience(line, problem, module, outcomes)
        seen.scores.prefixes = None if values is None else values[outcomes]
        update = enumeration.update(module, seen, None)
        mean += probability * update
        square += probability * float(update.square().sum())
    return mean, square - float(mean.square().sum())


@pytest.mark.parametrize("kind", [PathwiseCredit, CriticCredit])
@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.method}{' with KL' if line.kl else ''}")
def test_the_mean_is_that_of_the_method(line: enumeration.Line, kind: Any) -> None:
    """Over all batches, whatever the directions and the slope."""
    problem = enumeration.make_problem()
    truth, _ = moments(line, problem, enumeration.make(line, problem))
    for seed in (3, 4):
        credit = known_credit(problem, seed, kind=kind)
        found, _ = moments(line, problem, with_credit(line, problem, credit))
        assert (found - truth).norm() < 1e-10 * truth.norm()
        without = with_credit(line, problem, credit)
        without.terms.remove(credit)
        assert (moments(line, problem, without)[0] - truth).norm() > 0.1 * truth.norm()


def test_a_method_that_divides_by_the_spread_keeps_most_of_its_mean() -> None:
    """Where all rewards of a group are about the same, what is taken off is not divided by next to nothing."""
    line, problem = enumeration.Line("GRPO"), enumeration.make_problem()
    truth, _ = moments(line, problem, enumeration.make(line, problem))
    for seed in (3, 4, 5):
        found, _ = moments(line, problem, with_credit(line, problem, known_credit(problem, seed)))
        assert (found - truth).norm() < 0.3 * truth.norm()


def with_prefixes(line: enumeration.Line, problem: Problem, credit: PrefixCredit, slope: float) -> Any:
    """The method of the table, of which the reward says something of each beginning."""
    module = enumeration.make(line, problem)
    credit.attach(module.advantage, module.terms[0].aggregate, line.method)
    credit._fit = torch.tensor([slope, 1.0, 4.0], dtype=torch.float64)
    module.credit = credit
    module.terms.append(credit)
    return module


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.method}{' with KL' if line.kl else ''}")
def test_whatever_is_said_of_beginnings_the_mean_is_that_of_the_method(line: enumeration.Line) -> None:
    problem = enumeration.make_problem()
    truth, _ = moments(line, problem, enumeration.make(line, problem))
    said = torch.randn(len(problem.logits), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    module = with_prefixes(line, problem, PrefixCredit(), slope=1.7)
    found, _ = moments(line, problem, module, said[problem.rows])
    assert (found - truth).norm() < 1e-10 * truth.norm()
    own = problem.rewards.unsqueeze(1) * torch.arange(2)  # knows the token, as no beginning does
    wrong, _ = moments(line, problem, module, own)
    assert (wrong - truth).norm() > 0.02 * truth.norm()


def test_rewards_that_are_nearly_equal_make_no_noise_of_beginnings() -> None:
    """GRPO divides them by their spread, which is a thousandth of what beginnings differ by."""
    line, problem = enumeration.Line("GRPO"), enumeration.make_problem()
    said = torch.randn(len(problem.logits), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    problem.rewards = 0.5 + 0.001 * problem.rewards
    _, noise = moments(line, problem, enumeration.make(line, problem))
    _, found = moments(line, problem, with_prefixes(line, problem, PrefixCredit(), slope=1.7), said[problem.rows])
    assert found < 2 * noise


def test_expected_rewards_of_beginnings_take_noise_away() -> None:
    """λ = 0 with them takes more, and is right too: they are the true values."""
    line, problem = enumeration.Line("RLOO"), enumeration.make_problem()
    truth, noise = moments(line, problem, enumeration.make(line, problem))
    values = enumeration.expected_rewards(problem)
    found = [moments(line, problem, with_prefixes(line, problem, PrefixCredit(lam), 1.0), values) for lam in (1.0, 0.0)]
    assert all((mean - truth).norm() < 1e-10 * truth.norm() for mean, _ in found)
    assert found[1][1] < found[0][1] < noise


def test_its_own_gradient_would_be_a_bias() -> None:
    """The tempting mistake: scores that know the completion. Here they are its reward times its own tokens."""
    line, problem = enumeration.Line("RLOO"), enumeration.make_problem()
    truth, _ = moments(line, problem, enumeration.make(line, problem))
    credit = known_credit(problem)
    credit._tables = [torch.eye(int(problem.tokens.max()) + 1, dtype=torch.float64)]
    module, found = with_credit(line, problem, credit), torch.zeros_like(truth)
    for outcomes, probability in enumeration.batches(line, problem, 1.0):
        own = torch.zeros(len(credit._tables[0]), dtype=torch.float64)
        for outcome in outcomes:
            tokens = problem.tokens[outcome][problem.mask[outcome]]
            own.index_add_(0, tokens, problem.rewards[outcome].expand(len(tokens)))
        credit._sums, credit._scores = [torch.ones(1, 1), (own / len(outcomes)).unsqueeze(0)], None
        found += probability * enumeration.update(module, enumeration.experience(line, problem, module, outcomes), None)
    assert (found - truth).norm() > 0.05 * truth.norm()


def test_a_good_direction_takes_noise_away() -> None:
    """Of rewards that tokens add to, with the slope that is fitted."""
    line, problem = enumeration.Line("RLOO"), enumeration.make_problem()
    worth = torch.tensor([0.1, -0.6, 1.0], dtype=torch.float64)
    problem.rewards = (worth[problem.tokens] * problem.mask).sum(-1)
    _, noise = moments(line, problem, enumeration.make(line, problem))
    credit = known_credit(problem, slope=1.0)
    credit._tables, credit._sums = [torch.eye(3, dtype=torch.float64)], [torch.ones(1, 1), worth.unsqueeze(0)]
    _, found = moments(line, problem, with_credit(line, problem, credit))
    assert found < 0.25 * noise


def test_an_engine_with_old_weights_is_corrected_with_it() -> None:
    line, problem = enumeration.Line("RLOO"), enumeration.make_problem()
    truth, _ = moments(line, problem, enumeration.make(line, problem))
    old = enumeration.make_problem()
    old.logits = problem.logits + 3 * (problem.ref_logits - problem.logits)
    stale = problem.measure(old.logits).logps
    module, found = with_credit(line, problem, known_credit(problem)), torch.zeros_like(truth)
    module.correction = EngineCorrection(math.inf, "sequence")
    for outcomes, probability in enumeration.batches(line, old, 1.0):
        seen = enumeration.experience(line, problem, module, outcomes)
        seen = replace(seen, rollout=replace(seen.rollout, engine_logps=stale[outcomes]))
        found += probability * enumeration.update(module, seen, None)
    assert (found - truth).norm() < 1e-10


# ---- in a run -------------------------------------------------------------------------------------------------------


class ToyByToken(Toy):
    """Also scores what stands before each token."""

    reads_prefixes = True

    def with_prefixes(self, rollout: Rollout) -> Scores:
        scores, place = self.score(rollout), torch.arange(rollout.completion_ids.shape[1])
        shorter = (replace(rollout, completion_mask=rollout.completion_mask & (place < t)) for t in place)
        return replace(scores, prefixes=torch.stack([self(part) for part in shorter], 1))


def make(method: Any = RLOO, **kwargs: Any) -> Any:
    settings = plain(method, num_generations=4, sampler=Sampler(12, engine=Prescribed()), reward=ToyByToken())
    return build(method, **settings | {"credit": PathwiseCredit()} | kwargs)


def test_without_an_earlier_batch_it_is_the_method() -> None:
    one, two = (gradient(make(credit=credit), prompts(4)) for credit in (None, PathwiseCredit()))
    assert distance(two, one) == 0


@pytest.mark.parametrize("epochs", [1, 2])
def test_what_is_learned_is_of_earlier_batches(epochs: int) -> None:
    """The direction is the mean gradient at the sampled tokens; a run with it is another one, and logs its fit."""
    module = make(epochs=epochs)
    watch = run(module, *(prompts(4, 4, seed) for seed in range(3)))
    rollout = Prescribed().generate(module.policy, module.sampler.distribution, prompts_of(2))
    (adjoint,) = Toy().pathwise(rollout).adjoints
    assert module.credit.directions()[0].shape == adjoint.gradient.shape[-1:]
    assert watch.logged[0]["train/credit_r2"] == 0
    assert 0 < watch.logged[-1]["train/credit_r2"] <= 1
    plain_run = make(credit=None, epochs=epochs)
    run(plain_run, *(prompts(4, 4, seed) for seed in range(3)))
    assert any(not torch.equal(x, weights(plain_run)[name]) for name, x in weights(module).items())


def prompts_of(seed: int) -> Prompts:
    return Prompts.of(prompts(4, 4, seed)).repeat(torch.full((4,), 4))


def test_the_critic_reads_what_stands_before_a_token() -> None:
    """By a plain loop: 1, the place, the embedding before, and the mean of all before, of the prompt's too."""
    rollout = Prescribed().generate(make().policy, Sampler(12).distribution, prompts_of(2))
    table, found, expected = torch.randn(int(rollout.ids.max()) + 1, 3), CriticCredit(), []
    for row, mask, sampled in zip(rollout.ids, rollout.mask, rollout.sampled, strict=True):
        for t in sampled.nonzero().flatten().tolist():
            end = len(row) - len(sampled) + t
            before = table[row[:end][mask[:end].bool()]]
            expected.append(torch.cat([torch.tensor([1.0, t / 32]), before[-1], before.mean(0)]))
    torch.testing.assert_close(found.features(rollout, [table]), torch.stack(expected))


def test_the_critic_is_the_ridge_regression_of_gradients() -> None:
    """As least squares with a row more for each penalty, the rows' features less their mean."""
    module = make()
    rollout = Prescribed().generate(module.policy, module.sampler.distribution, prompts_of(2))
    credit, scores = CriticCredit(ridge=0.7), Toy().pathwise(rollout)
    (adjoint,) = scores.adjoints
    noise = torch.randn_like(adjoint.gradient)
    noisy = replace(scores, adjoints=[adjoint._replace(gradient=adjoint.gradient + noise)])
    credit.look(noisy, rollout, adjoint.table)
    credit.learn(Experience(rollout, scores, 0.0), Reduce())
    features = credit.features(rollout, [adjoint.table]).double()
    penalties = (0.7 * len(features) * features.var(0, correction=0)).sqrt().diag()
    rows = torch.cat([features, penalties])
    gradients = rollout.take(noisy.adjoints[0].gradient).double()
    best = torch.linalg.pinv(rows) @ torch.cat([gradients, torch.zeros(len(penalties), gradients.shape[-1])])
    (solution,) = credit.solutions()
    torch.testing.assert_close(features @ solution.double(), features @ best, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [PathwiseCredit, CriticCredit, RegressionCredit, PrefixCredit])
def test_a_resumed_run_is_the_run(kind: Any, tmp_path: Path) -> None:
    given = [prompts(4, 4, seed) for seed in range(4)]
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, resumed = make(credit=kind()), make(credit=kind())
    trainer(max_steps=4, callbacks=[save], enable_checkpointing=True).fit(whole, loader(*given))
    rest = loader(*given[2:], *given[:2])  # a plain loader begins anew
    trainer(max_steps=4).fit(resumed, rest, ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    assert_same(weights(resumed), weights(whole))


def test_a_regression_finds_what_tokens_are_worth() -> None:
    """Without any gradient of the reward: tokens above 9 score higher than the others, after a few batches."""
    module = make(credit=RegressionCredit(ridge=0.1), lr=0.0, reward=above_nine)
    watch = run(module, *(prompts(8, 4, seed) for seed in range(12)))
    found = module.credit.scores(Prescribed().generate(module.policy, module.sampler.distribution, prompts_of(0)))
    assert found is not None
    scores = found(slice(None))
    assert scores[10:].mean() > scores[2:10].mean()
    assert watch.logged[-1]["train/credit_r2"] > 0.1


def above_nine(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    words = [[int(word[1:]) for word in text.split()] for text in completions]
    return [sum(word > 9 for word in text) / max(1, len(text)) for text in words]


@pytest.mark.parametrize("kind", [PathwiseCredit, CriticCredit, RegressionCredit, PrefixCredit])
def test_a_window_that_is_resumed_in_the_middle_has_its_scores(kind: Any, tmp_path: Path) -> None:
    """It ends as it would have; what it would have said for later ones is lost."""
    given = [prompts(4, 4, seed) for seed in range(2)]
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, resumed = make(credit=kind(), epochs=2), make(credit=kind(), epochs=2)
    trainer(max_steps=4, callbacks=[save], enable_checkpointing=True).fit(whole, loader(*given, visits=2))
    trainer(max_steps=4).fit(resumed, loader(*given, visits=2), ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
    assert_same(weights(resumed), weights(whole))


@pytest.mark.parametrize("method", [DrGRPO, GRPO, Reinforce, CISPO])
@pytest.mark.parametrize("kind", [PathwiseCredit, CriticCredit, PrefixCredit])
def test_methods_that_take_it(method: Any, kind: Any) -> None:
    settings = {"num_generations": 1} if method is Reinforce else {}
    module = make(method, credit=kind(), **settings)
    watch = run(module, *(prompts(4, module.num_generations, seed) for seed in range(3)))
    assert math.isfinite(watch.logged[-1]["train/credit_slope"])
    assert watch.logged[-1]["train/credit_r2"] > 0


@pytest.mark.parametrize("kind", [PathwiseCredit, CriticCredit, RegressionCredit, PrefixCredit])
def test_further_estimates_of_the_gradient_have_it_and_teach_nothing(kind: Any) -> None:
    """As those of a variance probe."""
    module = make(credit=kind())
    run(module, *(prompts(4, 4, seed) for seed in range(2)))
    before = module.credit.slope
    assert module.draw_loss(prompts(4, 4, 5)).isfinite()
    assert module.credit.slope == before
    assert not getattr(module.credit, "_new", None)


def test_the_slope_of_beginnings_is_that_of_least_squares() -> None:
    """Of rewards and values less those of the others that have the position, by a plain loop."""
    module = make(credit=PrefixCredit(), lr=0.0)
    run(module, prompts(4, 4))
    rollout = Prescribed().generate(module.policy, module.sampler.distribution, prompts_of(0))
    scores, along, size = ToyByToken().with_prefixes(rollout), 0.0, 0.0
    assert scores.prefixes is not None
    for row, own in enumerate(rollout.sampled):
        others = [i for i in range(4 * (row // 4), 4 * (row // 4) + 4) if i != row]
        for t in own.nonzero().flatten():
            there = [i for i in others if rollout.sampled[i, t]]
            if there:
                gaps = scores.prefixes[:, t] - scores.prefixes[:, 0]
                d = gaps[row] - gaps[there].mean()
                along += float(d * (scores.total[row] - scores.total[there].mean()))
                size += float(d.square())
    assert module.credit.slope == pytest.approx(along / size, rel=1e-6)


def test_what_cannot_work_is_named() -> None:
    with pytest.raises(InputError, match=r"credit: how far the advantage of PPO follows a reward is not known"):
        PPO(credit=PathwiseCredit())
    with pytest.raises(InputError, match="does not score the beginnings"):
        make(credit=PrefixCredit(), reward=Toy())
    with pytest.raises(InputError, match="not differentiable"):
        RLOO(credit=PathwiseCredit(), reward=lambda prompts, completions, **_: [0.0] * len(completions))
