"""The seams of a step: a part from outside in each, in a real Trainer, by the gradient that it has."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from grade_lightning.advantages import whitened_returns
from grade_lightning.data.loading import ResumableLoader
from grade_lightning.distributed import Reduce
from grade_lightning.errors import InputError
from grade_lightning.functional import advantages
from grade_lightning.functional.aggregation import sequence_sum, token_mean
from grade_lightning.functional.gates import importance, reinforce
from grade_lightning.gates import by_advantage
from grade_lightning.kl import KL
from grade_lightning.levels import token_level, turn_level
from grade_lightning.methods import DAPO, GRPO, PPO, RLOO, GradeSTE, Reinforce, ReinforcePlusPlus
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.policies import Policy
from grade_lightning.records import Experience, Prompts, Rollout
from grade_lightning.rewards import FunctionReward, Reward
from grade_lightning.rollouts import Sampler, TransformersEngine, Turns
from grade_lightning.selection import Selection
from tests.conftest import make_model, make_prompts, make_tokenizer
from tests.methods.toy_task import Toy, assert_same, trainer, weights
from tests.modules.seams import (
    Counted,
    Imitation,
    LikelyTokens,
    PerToken,
    Picked,
    Playback,
    Ragged,
    Seams,
    Tilt,
    Tool,
    TwoThirds,
    Wide,
)
from tests.modules.toys import (
    Keep,
    Numbered,
    build,
    constant,
    distance,
    flat,
    loader,
    move,
    plain,
    prompts,
    run,
    states,
)

pytestmark = pytest.mark.usefixtures("own_random_state")


def gradient(module: PolicyGradientModule, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Of one draw, without a Trainer."""
    module.zero_grad()
    module.draw_loss(batch).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def rows_of(batch: dict[str, Any], counts: list[list[int]]) -> dict[str, Any]:
    """Each prompt with some of its completions; a prompt without any is left out."""
    kept = [i for i, numbers in enumerate(counts) if numbers]
    given = batch["columns"]["completions"]
    completions = [[given[i][j] for j in counts[i]] for i in kept]
    return {name: batch[name][kept] for name in ("input_ids", "attention_mask")} | {
        "columns": {"completions": completions}
    }


# ---- an engine from outside -----------------------------------------------------------------------------------------


def test_an_engine_is_told_of_the_weights_before_each_rollout() -> None:
    """Of two windows with four optimizer steps each: as they are after none and after four."""
    engine = Playback()
    module = build(GRPO, sampler=Sampler(12, engine=engine), num_generations=4, epochs=4)
    run(module, prompts(3), prompts(3, seed=1))
    assert engine.synced == [0, 4]
    assert engine.calls == 2


def test_an_engine_that_samples_from_old_weights_is_noticed() -> None:
    class Stale(TransformersEngine):
        """Keeps the weights that it saw first."""

        own: Policy | None = None

        def generate(self, policy: Policy, distribution: Any, prompts: Prompts) -> Rollout:
            if self.own is None:
                self.own = copy.deepcopy(policy)
                with torch.no_grad():
                    for parameter in self.own.model.parameters():
                        parameter.mul_(1.5)
            return super().generate(self.own, distribution, prompts)

    module = build(RLOO, torch.float32, sampler=Sampler(6, engine=Stale()))
    with pytest.raises(RuntimeError, match="not sampled from the policy that is trained"):
        trainer().fit(module, loader(make_prompts((4, 4)) | {"columns": {}}))


def test_completions_that_nobody_sampled_need_no_log_probabilities() -> None:
    class Silent(Playback):
        def generate(self, policy: Policy, distribution: Any, prompts: Prompts) -> Rollout:
            rollout = super().generate(policy, distribution, prompts)
            rollout.engine_logps = None
            return rollout

    loud, silent = (
        run(build(GRPO, sampler=Sampler(12, engine=engine), **plain(GRPO)), prompts(4)).gradients[0]
        for engine in (Playback(), Silent())
    )
    assert distance(silent, loud) == 0


def test_an_engine_may_pad_to_a_width_of_its_own() -> None:
    """Rewards of tokens are cut as the completions are; the gradient is that without the padding."""
    settings: dict[str, Any] = {"reward": PerToken(), "num_generations": 4, "kl": KL()}
    found = [
        gradient(build(ReinforcePlusPlus, sampler=Sampler(15, engine=engine), **settings), prompts(4))
        for engine in (Wide(), Playback())
    ]
    assert distance(*found) == 0


# ---- turns ----------------------------------------------------------------------------------------------------------


def two_turns(tool: type[Tool] = Tool, **kwargs: Any) -> Sampler:
    return Sampler(12, engine=Turns(tool, turn_tokens=4, **kwargs))


def make_turns(method: type[Any] = RLOO, **kwargs: Any) -> Any:
    policy = Policy.from_model(make_model("gpt2", torch.float64, scale=4.0), make_tokenizer())
    reward = kwargs.pop("reward", Toy())
    module = method(policy=policy, reward=reward, sampler=two_turns(), lr_scheduler=constant, **kwargs)
    module.configure_model()
    return module


def test_two_turns_of_an_environment_are_one_completion() -> None:
    """Turn, answer, turn: what the policy heard is what was written, and its log-probabilities are its own."""
    module = make_turns()
    rollout = module.draw(Prompts.of(make_prompts()))
    tokenizer, answer = make_tokenizer(), [7, 8, 9]
    for row in range(len(rollout.ids)):
        kept = rollout.completion_mask[row]
        ids, sampled = rollout.completion_ids[row][kept], rollout.sampled[row][kept]
        assert ids[~sampled].tolist() == answer
        assert rollout.turns[row][kept].diff().sum() == 1
        first = ids[: int((~sampled).long().argmax())]
        assert 1 <= len(first) <= 4
        assert tokenizer.decode(first, skip_special_tokens=True) in rollout.completions[row]
    with torch.no_grad():
        stats = module.measure(rollout)
    torch.testing.assert_close(stats.logps.float(), rollout.engine_logps, rtol=1e-4, atol=1e-4)
    assert not stats.logps[~rollout.sampled].any()
    assert rollout.columns["returns"] == [1.0] * len(rollout.ids)


def logps_by_hand(module: PolicyGradientModule, rollout: Rollout) -> list[Tensor]:
    """Of the sampled tokens, row by row, by the plain model on the whole text."""
    found = []
    for row in range(len(rollout.ids)):
        ids = rollout.ids[row][rollout.mask[row].bool()].unsqueeze(0)
        length = int(rollout.lengths[row])
        logits = module.policy.base(input_ids=ids).logits[0, -length - 1 : -1]
        every = logits.log_softmax(-1).gather(-1, ids[0, -length:, None]).squeeze(-1)
        found.append(every[rollout.sampled[row][rollout.completion_mask[row]]])
    return found


@pytest.mark.parametrize("credit", ["token", "sequence"])
def test_what_a_tool_says_is_attended_to_and_not_trained_on(credit: Any) -> None:
    """The gradient is that of the policy's own tokens, given all that was said before them."""
    module = make_turns(RLOO, num_generations=2, kl=KL(0.0, credit=credit))
    move(module)
    seen = module.collect(make_prompts((5, 3)) | {"columns": {}})
    module.loss(seen).loss.backward()
    ours = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    rewards = seen.scores.total.double()
    surplus = torch.stack([rewards[i] - rewards[i ^ 1] for i in range(4)])
    rows = logps_by_hand(module, seen.rollout)
    (-sum((a * row.sum() for a, row in zip(surplus, rows, strict=True)), torch.zeros(())) / 4).backward()
    truth = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert distance(ours, truth) < 1e-6


def test_another_answer_of_a_tool_is_another_context() -> None:
    class Other(Tool):
        answer = "w3 w3 w3"

    one, two = make_turns(), make_turns()
    two.sampler = two_turns(Other)
    drawn = []
    for module in (one, two):
        torch.manual_seed(0)
        drawn.append(module.draw(Prompts.of(make_prompts())))
    first = [rollout.completion_ids[:, 0].tolist() for rollout in drawn]
    assert first[0] == first[1]
    assert drawn[0].completion_ids.tolist() != drawn[1].completion_ids.tolist()


@pytest.mark.parametrize("method", [PPO, GRPO, ReinforcePlusPlus, DAPO, GradeSTE])
def test_every_kind_of_method_takes_turns(method: type[Any]) -> None:
    kwargs: dict[str, Any] = {"num_generations": 2, "minibatches": 1} if method is not GradeSTE else {"hops": "exact"}
    if method is DAPO:
        kwargs |= {"max_retries": 0, "overlong_buffer": 0}
    module = make_turns(method, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **kwargs)
    before = weights(module)
    fitted = trainer(log_every_n_steps=1)
    fitted.fit(module, loader(make_prompts((4, 3, 5)) | {"columns": {}}, visits=module.batching.steps_per_batch))
    assert fitted.callback_metrics["train/loss"].isfinite()
    assert not torch.equal(flat(weights(module)), flat(before))
    rollout = module.last_rollout[0]
    assert fitted.callback_metrics["train/response_length"] == pytest.approx(
        float(rollout.sampled.sum()) / len(rollout.ids)
    )


def test_a_ratio_may_be_taken_over_turns() -> None:
    """The geometric mean over each turn's own tokens; the tool's are in none."""
    module = make_turns(GRPO, num_generations=2)
    seen = module.sample(Prompts.of(make_prompts((5, 3))))
    values = torch.randn(seen.rollout.sampled.shape)
    found = turn_level(values, seen)
    for row in range(len(values)):
        for turn in (0, 1):
            own = (seen.rollout.turns[row] == turn) & seen.rollout.sampled[row]
            torch.testing.assert_close(found[row][own], values[row][own].mean().expand(int(own.sum())))


# ---- groups, rows and tokens ----------------------------------------------------------------------------------------


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


# ---- terms and rewards ----------------------------------------------------------------------------------------------


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


# ---- a memory of prompts, and everything over a resume --------------------------------------------------------------


def test_a_memory_of_prompts_is_kept_up_and_is_bounded() -> None:
    selection = TwoThirds()
    module = build(RLOO, **plain(RLOO, selection=selection, kl=KL()))
    run(module, prompts(3), prompts(3, seed=1))
    keys = Prompts.of(prompts(3)).keys
    assert sorted(keys) == sorted(selection.memory.state_dict()["keys"].tolist())
    assert all(selection.memory.get(key) is not None for key in keys)
    selection.memory.capacity = 2
    selection.memory.update([1], torch.ones(1, 2), lambda known, new: new)
    assert len(selection.memory) == 2
    assert selection.memory.get(1) is not None


def make_seams(folder: Path, save: bool, **kwargs: Any) -> tuple[PolicyGradientModule, Any]:
    module = build(Seams, torch.float32, num_generations=3, epochs=2, minibatches=2, kl=KL(0.1, target=1.0), **kwargs)
    callbacks = [ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)] if save else []
    return module, trainer(callbacks=callbacks, enable_checkpointing=save, log_every_n_steps=1)


@pytest.mark.parametrize("engine", ["playback", "turns"])
def test_a_run_of_such_parts_resumes_exactly(engine: str, tmp_path: Path) -> None:
    """In mid-window and between windows: weights, memory, adaptive β and what is sampled."""

    def sampler() -> Sampler:
        return two_turns() if engine == "turns" else Sampler(12, engine=Playback())

    windows: Any = [prompts(4, size=3, seed=seed) for seed in range(2)]
    whole, fitted = make_seams(tmp_path, save=True, sampler=sampler())
    fitted.fit(whole, ResumableLoader(windows, repeats=4, batch_size=None))
    assert fitted.global_step == 8
    for step in (2, 3, 4, 5):
        module, again = make_seams(tmp_path, save=False, sampler=sampler())
        torch.manual_seed(99)
        again.fit(
            module,
            ResumableLoader(windows, repeats=4, batch_size=None),
            ckpt_path=tmp_path / f"step={step}.ckpt",
            weights_only=True,
        )
        assert_same(weights(module), weights(whole))
        one, two = (states(m)["selection"] for m in (module, whole))
        assert_same(one, two)
        assert module.beta == whole.beta
    assert whole.beta != 0.1


def saved(folder: Path, steps: int, **kwargs: Any) -> tuple[PolicyGradientModule, Any]:
    """A run of so many windows of two steps each, whose prompts have a label, a checkpoint after each step."""
    module = build(GRPO, torch.float32, num_generations=4, epochs=2, **kwargs)
    windows: Any = [prompts(4, seed=seed) for seed in range(steps)]
    for window in windows:
        window["columns"] |= {"label": [1, "two", None, {"four": [4.0, True]}], "odd": [torch.tensor(1)] * 4}
    save = [ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)] if steps == 2 else []
    run = trainer(callbacks=save, enable_checkpointing=bool(save), log_every_n_steps=1)
    return module, lambda **where: run.fit(module, ResumableLoader(windows, repeats=2, batch_size=None), **where)


def test_a_part_that_a_checkpoint_lacks_begins_anew(tmp_path: Path) -> None:
    _, fit = saved(tmp_path, 2)
    fit()
    selection = TwoThirds()
    _, resume = saved(tmp_path, 3, selection=selection)
    resume(ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    assert len(selection.memory) == len(set(Prompts.of(prompts(4)).keys))


def test_what_a_term_remembers_does_not_depend_on_the_other_terms(tmp_path: Path) -> None:
    """Resumed without the KL in the loss, and with two of its kind."""
    _, fit = saved(tmp_path, 2, terms=[Counted()], kl=KL(0.1, "k3", "loss"))
    fit()
    terms = [Imitation(), Counted(), Counted()]
    _, resume = saved(tmp_path, 3, terms=terms, kl=KL())
    resume(ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    assert [term.batches for term in terms if isinstance(term, Counted)] == [3, 2]


def test_what_is_observed_after_a_resume_has_its_plain_columns(tmp_path: Path) -> None:
    counted = [Counted(), Counted()]
    _, fit = saved(tmp_path, 2, terms=counted[:1])
    fit()
    _, resume = saved(tmp_path, 1, terms=counted[1:])
    resume(ckpt_path=tmp_path / "step=1.ckpt", weights_only=True)
    label = [label for label in (1, "two", None, {"four": [4.0, True]}) for _ in range(4)]
    assert counted[0].labels == counted[1].labels == label


def test_a_batch_with_an_infinite_reward_is_not_observed() -> None:
    class Infinite(Reward):
        def forward(self, rollout: Rollout) -> Tensor:
            return Toy().score(rollout).total.index_fill(0, torch.tensor([2]), torch.inf)

    counted = Counted()
    module = build(RLOO, **plain(RLOO, reward=Infinite(), terms=[counted], kl=KL(0.5, target=1e-3, horizon=1)))
    run(module, prompts(4))
    assert (counted.batches, module.beta) == (0, 0.5)
    module.reward = Toy()
    run(module, prompts(4))
    assert counted.batches == 1
    assert module.beta != 0.5


def test_what_is_logged_is_the_objective_that_was_trained_on() -> None:
    """With the β of the window, in all of its steps; the adaptive one has moved on after the last."""
    module = build(Reinforce, **plain(Reinforce, epochs=2, kl=KL(0.5, target=1e-3, horizon=1)))
    move(module)
    watch = run(module, prompts(4), prompts(4, seed=1))
    for line, beta in zip(watch.logged, (0.5, 0.5, 0.6, 0.6), strict=True):
        assert line["train/beta"] == pytest.approx(beta)
        assert line["train/objective"] == pytest.approx(line["train/reward"] - beta * line["train/kl"], rel=1e-5)
    assert module.beta == pytest.approx(0.72)


def test_a_window_in_a_checkpoint_keeps_turns_and_groups(tmp_path: Path) -> None:
    """What is trained on after a resume is what would have been trained on, field by field."""
    module = make_turns(GRPO, num_generations=2, epochs=2, reward=FunctionReward(returns))
    watch = run(module, make_prompts((5, 3)) | {"columns": {}}, callbacks=[keep := Keep()])
    assert len(watch.rows) == 2
    again = Experience.unpack(keep.window.pack(), module.tokenizer)
    for name in ("completion_ids", "completion_mask", "sampled", "groups", "turns", "engine_logps"):
        assert torch.equal(getattr(again.rollout, name), getattr(keep.window.rollout, name))
    for name in ("rewards", "penalties", "advantages"):
        assert torch.equal(getattr(again, name), getattr(keep.window, name))
    assert again.beta == keep.window.beta
    assert again.metrics.keys() == keep.window.metrics.keys()


def returns(returns: list[float], **_: Any) -> list[float | None]:
    return list(returns)


def test_a_plain_line_needs_no_more_than_its_parts() -> None:
    """REINFORCE from its parts, without a class of its own."""
    policy = Policy.from_model(make_model("gpt2", torch.float64, scale=4.0), make_tokenizer())
    module = PolicyGradientModule(
        advantage=lambda seen, reduce: seen.rewards.unsqueeze(1).expand(seen.rollout.sampled.shape),
        level=token_level,
        gate=by_advantage(reinforce),
        aggregate=sequence_sum,
        clips=False,
        policy=policy,
        reward=Toy(),
        sampler=Sampler(12, engine=Playback()),
    )
    module.configure_model()
    found = gradient(module, prompts(4))
    seen = module.collect(prompts(4))
    module.zero_grad()
    now = module.measure(seen.rollout)
    (-(seen.scores.total.unsqueeze(1) * now.logps)[seen.rollout.sampled].sum() / len(seen.rollout.ids)).backward()
    truth = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert distance(found, truth) < 1e-9
