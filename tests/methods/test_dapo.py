"""DAPO: which groups are sampled again, what becomes of those that stay, and the penalty for overlong completions."""

from typing import Any

import pytest
import torch
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.methods import DAPO
from grade_lightning.records import Prompts, Rollout, slice_rows
from grade_lightning.rewards import Reward
from grade_lightning.rollouts import Sampler
from tests.methods.toy_task import trainer
from tests.modules.toys import Numbered, Prescribed, Watch, build, data, distance, prompts, run

FLAT, TOLD, HALF, MUTE = "flat", "told", "half", "mute"


pytestmark = pytest.mark.usefixtures("own_random_state")


class Kinds(Reward):
    """By kind of prompt: the same for all completions, different, the same where there is any, or none at all.

    What is the same is a tenth, whose mean over eight is not a tenth in floating point.
    """

    def forward(self, rollout: Rollout) -> Tensor:
        first = rollout.completion_ids[:, 0].float()
        kinds = rollout.columns["kind"]
        values = [
            {FLAT: 0.1, TOLD: float(x), HALF: 0.1 if i % 3 else torch.nan, MUTE: torch.nan}[kind]
            for i, (kind, x) in enumerate(zip(kinds, first, strict=True))
        ]
        return torch.tensor(values)


def window(kinds: str, size: int = 8) -> dict[str, Any]:
    """Prompts of these kinds (first letters), in which the completions of each prompt begin with different tokens."""
    names = {name[0]: name for name in (FLAT, TOLD, HALF, MUTE)}
    batch = prompts(len(kinds), size)
    batch["columns"]["completions"] = [
        [[2 + (p + j) % 17, *row] for j, row in enumerate(rows)]
        for p, rows in enumerate(batch["columns"]["completions"])
    ]
    batch["columns"] |= {"kind": [names[kind] for kind in kinds], "number": list(range(len(kinds)))}
    return batch


def make_dapo(max_retries: int, **kwargs: Any) -> tuple[DAPO, Prescribed]:
    engine = Prescribed()
    settings: dict[str, Any] = {"minibatches": 1, "overlong_buffer": 0, "num_generations": 8, "reward": Kinds()}
    module = build(DAPO, sampler=Sampler(20, engine=engine), max_retries=max_retries, **settings | kwargs)
    assert isinstance(module, DAPO)
    return module, engine


@pytest.mark.parametrize(
    ("kinds", "retries", "calls", "chosen"),
    [
        ("tttt" + "tttt" + "tttt", 2, 1, [0, 1, 2, 3]),
        ("ftff" + "tft" + "t" + "tttt", 2, 3, [1, 4, 6, 7]),  # three are missing, then one
        ("ftff" + "tft" + "f" + "tttt", 2, 3, [1, 4, 6, 0]),  # and it is no better, in the last round
        ("ftff" + "fff" + "fft" + "tt", 2, 3, [1, 9, 0, 2]),
        ("ffff" + "ffff" + "ffff", 2, 3, [0, 1, 2, 3]),
        ("ftft" + "tt", 0, 1, [1, 3, 4, 5, 0, 2]),
        ("ftft" + "ttff", 1, 2, [1, 3, 4, 5]),
        ("htmt" + "tfff", 1, 2, [1, 3, 4, 0]),  # who abstains differs from nobody
    ],
)
def test_groups_that_say_nothing_are_replaced_while_the_prompts_last(
    kinds: str, retries: int, calls: int, chosen: list[int]
) -> None:
    """Those with different rewards first, then those that are left, in the order of the prompts."""
    module, engine = make_dapo(retries)
    batch = window(kinds)
    drawn = module.sample(Prompts.of(batch))
    rollout, scores = drawn.rollout, drawn.scores
    assert engine.calls == calls
    assert rollout.columns["number"] == [number for number in chosen for _ in range(8)]
    for row, number in enumerate(rollout.columns["number"]):
        length = int(rollout.lengths[row])
        assert rollout.completion_ids[row, :length].tolist() == batch["columns"]["completions"][number][row % 8]
        assert torch.equal(rollout.prompt_ids[row], batch["input_ids"][number])
        assert torch.equal(rollout.prompt_mask[row], batch["attention_mask"][number])
    torch.testing.assert_close(scores.total, Kinds()(rollout), equal_nan=True)
    with torch.no_grad():
        measured = module.measure(rollout).logps.float()
    mask = rollout.completion_mask
    assert rollout.engine_logps is not None
    torch.testing.assert_close(measured[mask], rollout.engine_logps[mask].float())


def test_what_is_left_over_has_no_advantage_and_no_gradient() -> None:
    """Two groups of four say something: the gradient is that of these two, over the tokens of all four."""
    batch = window("ttff" + "ffff")
    module, _ = make_dapo(1, epochs=2)
    experience = module.collect(batch)
    mask = experience.rollout.completion_mask
    assert experience.rollout.columns["kind"] == [TOLD] * 16 + [FLAT] * 16
    assert experience.advantages is not None
    assert experience.advantages[:16][mask[:16]].abs().min() > 0.01
    assert experience.advantages[16:].abs().max() < 1e-3  # that of what a mean is off by

    whole = run(module, batch).gradients[0]
    alone = run(make_dapo(0, epochs=2)[0], slice_rows(batch, 0, 2)).gradients[0]
    share = float(mask[:16].sum() / mask.sum())
    assert 0.1 < share < 0.9
    assert distance(whole, {name: share * gradient for name, gradient in alone.items()}) < 1e-3


def test_without_retries_nothing_is_sampled_twice() -> None:
    module, engine = make_dapo(0)
    run(module, window("ffft"), window("tfft"))
    assert engine.calls == 2
    assert module.batching.rows(32) == 4
    assert make_dapo(2)[0].batching.rows(32) == 12


def test_a_trainer_hands_out_the_prompts_to_fall_back_on() -> None:
    """A reward that says nothing at all: three rounds for each window, and every round has prompts of its own."""

    class Same(Reward):
        def forward(self, rollout: Rollout) -> Tensor:
            seen.append(rollout.prompts)
            return torch.full((len(rollout.ids),), 0.1)

    seen: list[list[str]] = []
    engine = Numbered()
    module = build(
        DAPO, torch.float32, reward=Same(), sampler=Sampler(3, engine=engine), num_generations=2, minibatches=2
    )
    fitted = trainer(max_steps=4, callbacks=[watch := Watch()], limit_val_batches=0)
    fitted.fit(module, datamodule=data(batch_size=8))
    assert engine.calls == 2 * 3
    sampled = [prompt for part in seen for prompt in part]
    assert len(sampled) == 2 * 3 * 16
    assert len(set(sampled)) == len(sampled) // 2  # two completions of each
    assert {len(rows) for rows in watch.rows} == {8}


@pytest.mark.parametrize("buffer", [None, 10])
def test_overlong_completions_are_penalised_and_the_penalty_is_logged(buffer: int | None) -> None:
    """Nothing up to max_new_tokens - buffer, then a straight line to -1; a fifth is the default buffer."""
    module, _ = make_dapo(0, overlong_buffer=buffer)
    batch = window("tttm")
    drawn = module.sample(Prompts.of(batch))
    rollout, scores = drawn.rollout, drawn.scores
    width = buffer or 4
    assert module.sampler.max_new_tokens == 20
    expected = [-min(max((length - (20 - width)) / width, 0), 1) for length in rollout.lengths.tolist()]
    assert scores.parts["overlong"].tolist() == pytest.approx(expected)
    assert (min(expected) < 0) is (buffer == 10)
    plain = Kinds()(rollout)
    torch.testing.assert_close(scores.total, plain + torch.tensor(expected), equal_nan=True)
    torch.testing.assert_close(scores.parts["Kinds"], plain, equal_nan=True)
    assert scores.total[24:].isnan().all()
    watch = run(module, batch)
    assert watch.logged[0]["rewards/overlong"] == pytest.approx(sum(expected) / len(expected))
    answered = scores.total[:24]
    assert watch.logged[0]["train/reward"] == pytest.approx(float(answered.mean()))


@pytest.mark.parametrize(("kinds", "share"), [("tttt", 0), ("tftf", 0.5), ("fhmt", 0.75), ("ffff", 1)])
def test_the_share_of_groups_that_say_nothing_is_logged(kinds: str, share: float) -> None:
    """Of those that are trained on, at each visit of the window."""
    module, _ = make_dapo(0, epochs=2)
    assert [line["train/uniform_groups"] for line in run(module, window(kinds)).logged] == [share] * 2


def test_no_buffer_no_penalty() -> None:
    module, _ = make_dapo(0, overlong_buffer=0)
    drawn = module.sample(Prompts.of(window("tt")))
    _, scores = drawn.rollout, drawn.scores
    assert set(scores.parts) == {"Kinds"}


def test_the_length_alone_does_not_make_a_group_informative() -> None:
    """The rule of the paper: accuracy that is the same for all; the penalty comes after it."""
    module, engine = make_dapo(1, overlong_buffer=18)
    drawn = module.sample(Prompts.of(window("ffff" + "tttt")))
    rollout, scores = drawn.rollout, drawn.scores
    assert engine.calls == 2
    assert rollout.columns["kind"] == [TOLD] * 32
    assert scores.parts["overlong"].unique().numel() > 2


@pytest.mark.parametrize("name", ["max_retries", "overlong_buffer"])
def test_negative_numbers_are_named(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} = -1"):
        build(DAPO, torch.float64, 0.1, **{name: -1})


def test_fewer_prompts_than_rounds_make_one_group() -> None:
    assert len(build(DAPO, num_generations=4, minibatches=1).sample(Prompts.of(prompts(1))).rollout.ids) == 4
