"""Parts that remember something: what they are shown, and that a resumed run remembers the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from grade_lightning.data.loading import ResumableLoader
from grade_lightning.kl import KL
from grade_lightning.methods import GRPO, RLOO, Reinforce
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.records import Experience, Prompts, Rollout
from grade_lightning.rewards import FunctionReward, Reward
from grade_lightning.rollouts import Sampler
from tests.conftest import make_prompts, mostly_slow
from tests.methods.toy_task import Toy, assert_same, trainer, weights
from tests.modules.seams import (
    Counted,
    Imitation,
    Playback,
    Seams,
    TwoThirds,
    make_turns,
    two_turns,
)
from tests.modules.toys import (
    Keep,
    build,
    move,
    plain,
    prompts,
    run,
    states,
)

pytestmark = pytest.mark.usefixtures("own_random_state")


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


@pytest.mark.parametrize("engine", mostly_slow(["playback", "turns"], "turns"))
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
