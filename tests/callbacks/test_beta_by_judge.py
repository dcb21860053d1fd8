"""β follows a judge: it grows where the KL's pull is good for it, falls where it is not, and is resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grade_lightning.callbacks import BetaByJudge
from grade_lightning.errors import InputError
from grade_lightning.functional.gradient_quality import scaled_cosine
from grade_lightning.methods import RLOO, GradeSTE
from grade_lightning.modules import AlignmentModule
from tests.methods.toy_task import Recorder, Toy, assert_same, batches, fit, make, trainer, weights

pytestmark = pytest.mark.usefixtures("own_random_state")


class Opposed(Toy):
    """Wants what the reward does not."""

    def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        return -super().score_embeddings(embeddings, mask)


class Agreed(Toy):
    """Wants what the reward wants."""


def moved(judge: Toy, method: type[AlignmentModule] = GradeSTE, **kwargs: Any) -> tuple[float, list[float]]:
    """β after some steps, and the cosines."""
    module = make(method, judges=[judge], **kwargs)
    module.beta = module.coefficient.beta = 0.01
    steps = fit_with(BetaByJudge(every_n_steps=2, rate=0.5), module, 16)
    return module.beta, [step["beta_by_judge/cosine"] for step in steps if "beta_by_judge/cosine" in step]


def fit_with(callback: BetaByJudge, module: AlignmentModule, count: int) -> list[dict[str, float]]:
    recorder = Recorder()
    trainer(callbacks=[callback, recorder], log_every_n_steps=1).fit(module, batches(count, repeat=16))
    return recorder.steps


def test_the_cosine_is_that_of_scaled_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    g, h, p = (torch.rand(7, generator=generator) for _ in range(3))
    whole = torch.cosine_similarity(g * p.sqrt(), h * p.sqrt(), dim=0)
    parts = scaled_cosine([g[:3], g[3:], None], [h[:3], h[3:], g], [p[:3], p[3:], None])
    assert float(parts) < float(whole)  # the last has no partner, and counts in one of the norms
    torch.testing.assert_close(scaled_cosine([g[:3], g[3:]], [h[:3], h[3:]], [p[:3], p[3:]]), whole)


def test_the_slope_is_that_of_one_step_differentiated() -> None:
    """dJ(θ − η (a + β b)) / dβ = −η ⟨∇J, b⟩, which has the sign of the cosine of b and the gradient of −J."""
    a, b = torch.tensor([1.0, -0.5]), torch.tensor([0.3, 0.8])
    beta = torch.tensor(0.7, requires_grad=True)
    theta = torch.tensor([0.2, 0.4]) - 0.1 * (a + beta * b)
    (slope,) = torch.autograd.grad(-((theta - 1) ** 2).sum(), beta)  # J
    loss_gradient = 2 * (theta.detach() - 1)  # of −J
    torch.testing.assert_close(slope, 0.1 * loss_gradient @ b)
    assert float(scaled_cosine([loss_gradient], [b])) * float(slope) > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", [GradeSTE, RLOO])
def test_beta_grows_for_a_judge_that_disagrees_and_falls_for_one_that_agrees(method: type[AlignmentModule]) -> None:
    up, cosines = moved(Opposed(), method)
    down, others = moved(Agreed(), method)
    assert up > 0.015
    assert down < 0.007
    assert len(cosines) == len(others)
    assert sum(cosines) / len(cosines) > 0.1
    assert sum(others) / len(others) < -0.1


@pytest.mark.slow
def test_a_move_leaves_nothing_but_beta() -> None:
    """With bounds that hold β where it is, the run is the run without it."""
    found = []
    for callback in (True, False):
        module = make(GradeSTE, judges=[Opposed()])
        beta = module.beta
        if callback:
            fit_with(BetaByJudge(every_n_steps=1, lowest=beta, highest=beta), module, 4)
        else:
            fit(module, 4, batches(4, repeat=16))
        found.append(weights(module))
    assert_same(*found)


def test_it_is_resumed(tmp_path: Path) -> None:
    module = make(GradeSTE, judges=[Opposed()])
    first = trainer(callbacks=[BetaByJudge(every_n_steps=1)])
    first.fit(module, batches(3))
    first.save_checkpoint(tmp_path / "a.ckpt")
    again, callback = make(GradeSTE, judges=[Opposed()]), BetaByJudge(every_n_steps=100)
    trainer(callbacks=[callback], max_epochs=2).fit(again, batches(3), ckpt_path=tmp_path / "a.ckpt")
    assert again.beta == module.beta != make(GradeSTE).beta


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, r"judge 0 of 0; add one to --model\.judges"),
        ({"beta": 0.0, "judges": [Opposed()]}, "GradeSTE has no β above 0"),
        ({"judges": [Toy()]}, "the judge is the reward"),
    ],
)
def test_wrong_uses(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trainer(callbacks=[BetaByJudge()], max_steps=1).fit(make(GradeSTE, **kwargs), batches(1))
