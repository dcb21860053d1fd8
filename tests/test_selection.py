"""Selections: which completions and tokens are trained on, by the gradient that they have."""

from typing import Any

import pytest
import torch
from torch import Tensor

from grade_lightning.distributed import Reduce
from grade_lightning.errors import InputError
from grade_lightning.functional import advantages
from grade_lightning.functional.aggregation import token_mean
from grade_lightning.functional.gates import importance
from grade_lightning.gates import by_advantage
from grade_lightning.kl import KL
from grade_lightning.methods import DAPO, GRPO, PPO, RLOO
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.records import Experience, Prompts
from grade_lightning.rollouts import Sampler
from grade_lightning.selection import Selection
from tests.conftest import make_prompts
from tests.methods.toy_task import Toy
from tests.modules.seams import (
    LikelyTokens,
    Picked,
    Ragged,
    TwoThirds,
)
from tests.modules.toys import (
    Numbered,
    build,
    distance,
    flat,
    gradient,
    plain,
    prompts,
    run,
)

pytestmark = pytest.mark.usefixtures("own_random_state")


def rows_of(batch: dict[str, Any], counts: list[list[int]]) -> dict[str, Any]:
    """Each prompt with some of its completions; a prompt without any is left out."""
    kept = [i for i, numbers in enumerate(counts) if numbers]
    given = batch["columns"]["completions"]
    completions = [[given[i][j] for j in counts[i]] for i in kept]
    return {name: batch[name][kept] for name in ("input_ids", "attention_mask")} | {
        "columns": {"completions": completions}
    }


@pytest.mark.parametrize("method", [GRPO, RLOO])
def test_groups_of_one_three_and_four(method: type[PolicyGradientModule]) -> None:
    """Each group has the advantages that it would have alone; one completion alone has none."""
    module = build(method, **plain(method, num_generations=4, selection=Ragged(), kl=KL(), epochs=2))
    seen = module.collect(prompts(3))
    assert seen.rollout.groups.tolist() == [0, 1, 1, 1, 2, 2, 2, 2]
    rewards = Toy().score(seen.rollout).total
    function = advantages.leave_one_out if method is RLOO else advantages.group_standardised
    alone = torch.cat([function(part.unsqueeze(0)).squeeze(0) for part in rewards.split([1, 3, 4])])
    torch.testing.assert_close(seen.advantages[:, 0].float(), alone)
    assert seen.advantages[0].abs().max() == 0
    assert seen.advantages[1:, 0].abs().min() > 0


def test_two_thirds_of_the_rows_have_the_gradient_of_these_alone() -> None:
    """Nine completions, of which six are trained on, as if there were no others."""
    batch = prompts(3, size=3)
    module = build(RLOO, **plain(RLOO, num_generations=3, selection=TwoThirds(), kl=KL(), epochs=2))
    seen = module.collect(batch)
    assert len(seen.rollout.ids) == 6
    every = Toy().score(build(RLOO, **plain(RLOO, num_generations=3)).collect(batch).rollout).total.view(3, 3)
    assert sorted(seen.scores.total.tolist()) == sorted(every.sort(-1).values[:, 1:].flatten().tolist())
    found = gradient(module, batch)

    class Alone(Ragged):
        def allocate(self, prompts: Prompts, budget: int) -> Tensor:
            return torch.tensor([len(rows) for rows in prompts.columns["completions"]])

    chosen: list[list[int]] = [[], [], []]
    given = batch["columns"]["completions"]
    for row, group in enumerate(seen.rollout.groups.tolist()):
        ids = seen.rollout.completion_ids[row][seen.rollout.completion_mask[row]].tolist()
        chosen[group].append(given[group].index(ids))
    alone = build(RLOO, **plain(RLOO, num_generations=3, selection=Alone(), kl=KL(), epochs=2))
    assert distance(found, gradient(alone, rows_of(batch, chosen))) < 1e-9


def test_rows_that_cannot_be_shared_out_are_an_error() -> None:
    module = build(RLOO, **plain(RLOO, selection=TwoThirds(), minibatches=4))
    with pytest.raises(InputError, match="9 completions cannot be divided evenly into 4 parts"):
        run(module, prompts(3))


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("others", [False, True], ids=["here", "elsewhere"])
def test_a_selection_that_keeps_nothing_is_named(epochs: int, others: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a process that does keep something, too: else it would wait for the other."""
    if others:
        monkeypatch.setattr(Reduce, "sum", lambda self, values: values + 1)
    module = build(GRPO, **plain(GRPO, selection=Picked([3, 5] if others else []), epochs=epochs))
    with pytest.raises(InputError, match=r"selection Picked: it keeps no completion.*every process"):
        run(module, prompts(4))


def test_rows_may_be_kept_by_a_mask() -> None:
    """With their own columns."""
    masks = [[row in (2, 3, 7) for row in range(16)], [2, 3, 7]]
    settings = plain(RLOO, kl=KL())
    one, two = (build(RLOO, **settings, selection=Picked(rows)).collect(prompts(4)).rollout for rows in masks)
    assert torch.equal(one.completion_ids, two.completion_ids)
    assert one.columns == two.columns == {"completions": [prompts(4)["columns"]["completions"][i] for i in (0, 0, 1)]}


def test_means_are_over_what_all_processes_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another process kept ten tokens in three rows."""
    module = build(RLOO, **plain(RLOO, selection=Picked([0, 15])))
    monkeypatch.setattr(Reduce, "mean", lambda self, values: (values + torch.tensor([10, 3])) / 2)
    seen = module.collect(prompts(4))
    assert seen.normalizers == ((1 + 12 + 10) / 2, (2 + 3) / 2)


def test_no_more_prompts_are_drawn_than_there_are() -> None:
    class Insatiable(Selection):
        spare = 2

        def resample(self, seen: Experience, wanted: int) -> int:
            return 5

    module = build(GRPO, **plain(GRPO, selection=Insatiable()))
    assert len(module.collect(prompts(3)).rollout.ids) == 12


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("method", [PPO, DAPO, GRPO])
def test_a_step_without_a_token_to_train_on_has_no_gradient(method: type[PolicyGradientModule], epochs: int) -> None:
    """The line, the KL in the loss and the critic: 0 and not NaN, and the step is not left out."""
    module = build(method, **plain(method, epochs=epochs, kl=KL(0.1, "k3", "loss")))
    module.selection = Picked(tokens=False)
    watch = run(module, prompts(4))
    assert [line["train/loss"] for line in watch.logged] == [0] * epochs
    assert [line["train/clip_fraction"] for line in watch.logged] == [0] * epochs
    assert not any(flat(gradients).any() for gradients in watch.gradients)
    assert watch.logged[-1]["train/skipped_steps"] == 0


@pytest.mark.parametrize("epochs", [1, 2])
def test_tokens_that_are_not_kept_have_no_gradient_and_are_not_counted(epochs: int) -> None:
    """The mean is over the tokens that are kept, whether the training pass measures them or an earlier one."""
    batch = prompts(3, shortest=4)
    parts: dict[str, Any] = {"gate": by_advantage(importance), "aggregate": token_mean}
    modules = []
    for selection in (LikelyTokens(), Selection()):
        module = build(RLOO, **plain(RLOO, selection=selection, kl=KL(), epochs=epochs))
        line: Any = module.terms[0]
        line.gate, line.aggregate = parts["gate"], parts["aggregate"]
        modules.append(module)
    few, every = modules
    found = gradient(few, batch)
    seen, now = every.measured(every.collect(batch))
    kept = LikelyTokens().tokens(seen) & seen.mask
    assert 0 < kept.sum() < seen.mask.sum()
    every.zero_grad()
    (-(seen.advantages * now.logps)[kept].sum() / kept.sum()).backward()
    truth = {name: p.grad for name, p in every.named_parameters() if p.grad is not None}
    assert distance(found, truth) < 1e-6


def test_groups_stay_whole_where_a_method_asks_for_it() -> None:
    """Four prompts of three completions in two optimizer steps: shuffled prompts, whole groups, each epoch once."""
    settings: dict[str, Any] = {"num_generations": 3, "epochs": 3, "minibatches": 2}
    for whole in (True, False):
        engine = Numbered()
        module = build(RLOO, torch.float32, sampler=Sampler(4, engine=engine), whole_groups=whole, **settings)
        watch = run(module, make_prompts((4, 4, 4, 4)) | {"columns": {}})
        assert [len(rows) for rows in watch.rows] == [6] * 6
        for one, two in zip(watch.rows[::2], watch.rows[1::2], strict=True):
            assert sorted(one + two) == list(range(12))
        torn = [
            rows for rows in watch.rows if any(len([r for r in rows if r // 3 == g]) not in (0, 3) for g in range(4))
        ]
        assert bool(torn) is not whole
        assert len({tuple(rows) for rows in watch.rows}) > 2


def test_ragged_groups_stay_whole_and_the_mean_is_over_what_there_is() -> None:
    """Groups of 1, 3, 4 and 4 in two micro-batches: the gradient of one batch of twelve."""
    whole = prompts(4)
    settings = plain(RLOO, selection=Ragged(), kl=KL(), epochs=2, whole_groups=True)
    many = run(build(RLOO, **settings), whole, accumulate_grad_batches=2)
    one = run(build(RLOO, **settings), whole)
    assert distance(many.gradients[0], one.gradients[0]) < 1e-9
