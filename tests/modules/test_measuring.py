"""When the reference is read, and what is said without it."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from grade_lightning import EntropyBonus, Term
from grade_lightning.errors import InputError
from grade_lightning.kl import KL
from grade_lightning.methods import GRPO, RLOO
from grade_lightning.modules import measuring
from grade_lightning.modules.measuring import measure
from grade_lightning.records import TokenStats
from tests.modules.toys import Watch, build, distance, loader, own_weights, plain, prompts

pytestmark = pytest.mark.usefixtures("own_random_state")


class Lines(CSVLogger):
    """What is logged, by step."""

    def __init__(self, folder: Any) -> None:
        super().__init__(folder)
        self.lines: dict[int, set[str]] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # type: ignore[override]
        assert step is not None
        self.lines.setdefault(step, set()).update(name for name, value in metrics.items() if value == value)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the reference was read."""
    found: list[int] = []
    read = measuring.reference_vocabulary

    def watched(*args: Any) -> Any:
        found.append(1)
        return read(*args)

    monkeypatch.setattr(measuring, "reference_vocabulary", watched)
    return found


def trained(module: Any, folder: Any, steps: int = 6, visits: int = 1) -> tuple[Watch, Lines]:
    lines, watch = Lines(folder), Watch()
    module.check_first_batch = lambda rollout: None
    windows = (prompts(4, 4, seed) for seed in range(steps // visits))
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=lines, callbacks=[watch], log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, loader(*windows, visits=visits))
    return watch, lines


def test_the_reference_is_read_in_every_so_many_steps_alone(reads: list[int], tmp_path: Any) -> None:
    """Everything else is as it was: weights, gradients, other figures."""
    often, seldom = (build(RLOO, **plain(RLOO, kl=KL(every=every))) for every in (1, 3))
    whole, every_line = trained(often, tmp_path)
    assert len(reads) == 6
    del reads[:]
    watch, lines = trained(seldom, tmp_path)
    assert len(reads) == 2
    assert distance(own_weights(seldom), own_weights(often)) == 0
    of_it = {"train/kl", "train/kl_per_token", "train/kl_k1", "train/kl_k2", "train/kl_k3"}
    for step, names in every_line.lines.items():
        assert of_it <= names
        assert names - of_it <= lines.lines[step]
        assert of_it & lines.lines[step] == (of_it if step in (2, 5) else set())
    for line, expected in zip(watch.logged, whole.logged, strict=True):
        assert line["train/objective"] == expected["train/objective"]


def test_a_window_keeps_what_its_first_step_found(reads: list[int], tmp_path: Any) -> None:
    """Windows of two steps begin at steps 0, 2 and 4; that of 2 is due."""
    module = build(GRPO, **plain(GRPO, epochs=2, kl=KL(every=3)))
    lines = trained(module, tmp_path, visits=2)[1].lines
    assert len(reads) == 1
    assert {step for step, names in lines.items() if "train/kl" in names} == {2, 3}


def test_what_is_not_known_is_nan_also_from_a_checkpoint() -> None:
    module = build(RLOO, **plain(RLOO, kl=KL(every=2)))
    rollout = module.collect(prompts(2)).rollout
    found = measure(module.policy, module.sampler.distribution, rollout, referenced=False)
    whole = measure(module.policy, module.sampler.distribution, rollout)
    again = TokenStats.join([TokenStats(**found.detach().pack())], rollout.completion_ids.shape[1])
    for name in ("kl", "log_ratio", "ref_logps"):
        values = getattr(again, name)
        assert values[rollout.sampled].isnan().all()
        assert getattr(whole, name)[rollout.sampled].isfinite().all()
    assert not again.referenced
    assert whole.referenced
    assert torch.equal(again.logps, whole.logps)
    assert torch.equal(again.entropy, whole.entropy)


def test_a_reference_that_is_trained_on_is_read_in_every_step() -> None:
    with pytest.raises(InputError, match=r"kl.every = 2: with a kl.beta"):
        KL(0.1, every=2)
    with pytest.raises(InputError, match="every"):
        KL(every=0)

    class Own(Term):
        graphs = "log_ratio"

        def __call__(self, *args: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(InputError, match=r"kl.every = 2: Own trains on the reference"):
        RLOO(kl=KL(every=2), terms=[Own()])
    RLOO(kl=KL(every=2), terms=[EntropyBonus(0.1)])
