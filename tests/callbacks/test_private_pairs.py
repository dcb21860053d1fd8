"""Private steps: the plain step without noise and bound, what a pair can change, the noise, and what is refused."""

import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from grade_lightning.callbacks import PrivatePairs
from grade_lightning.errors import InputError
from grade_lightning.methods import DPO, RLOO
from tests.cli.ranks import launch
from tests.conftest import VOCABULARY
from tests.methods.toy_task import batches, make, trainer, weights

pytestmark = pytest.mark.usefixtures("own_random_state")
PAIRS = 4


def pair(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = {name: torch.randint(2, VOCABULARY, (1, 4), generator=generator) for name in ("input", "chosen", "rejected")}
    masks = {"attention_mask": torch.ones(1, 4).long(), "chosen_mask": torch.ones(1, 4).long()}
    masks["rejected_mask"] = torch.ones(1, 4).long()
    return {f"{name}_ids": value for name, value in ids.items()} | masks | {"columns": {}}


def module() -> Any:
    return make(DPO, pairs="data", optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0), beta=1.0)


def loader(*seeds: int) -> DataLoader[Any]:
    return DataLoader([pair(seed) for seed in seeds], batch_size=None)  # type: ignore[arg-type]


def step(*callbacks: Any, seeds: tuple[int, ...] = (0, 1, 2, 3)) -> Tensor:
    """What one step takes off the weights: the gradient that the optimizer was given."""
    model = module()
    before = flat(model)
    trainer(callbacks=list(callbacks), accumulate_grad_batches=PAIRS).fit(model, loader(*seeds))
    return before - flat(model)


def flat(model: Any) -> Tensor:
    return torch.cat([value.flatten().double() for value in weights(model).values()])


def test_without_noise_and_bound_it_is_the_plain_step() -> None:
    torch.testing.assert_close(step(PrivatePairs(clip=math.inf, multiplier=0.0)), step(), rtol=1e-5, atol=1e-6)


def test_a_pair_that_is_replaced_changes_the_sum_by_twice_the_bound_at_most() -> None:
    bound = 0.05
    one, two = (step(PrivatePairs(clip=bound, multiplier=0.0), seeds=(0, 1, 2, last)) for last in (3, 9))
    changed = float((one - two).norm()) * PAIRS
    assert 0.1 * bound < changed <= 2 * bound * 1.0001
    assert float(one.norm()) <= bound * 1.0001


def test_the_noise_is_that_of_one_pair() -> None:
    bound = 0.05
    plain, noisy = (step(PrivatePairs(clip=bound, multiplier=multiplier)) for multiplier in (0.0, 30.0))
    assert float((noisy - plain).std()) == pytest.approx(30.0 * bound / PAIRS, rel=0.1)


def test_losses_that_rows_share_are_refused() -> None:
    with pytest.raises(InputError, match=r"^PrivatePairs: RLOO here has losses that rows share[^\n]*leave the[^\n]*$"):
        trainer(callbacks=[PrivatePairs()]).fit(make(RLOO), batches(1))
    with pytest.raises(InputError, match=r"^PrivatePairs: DPO here has losses that rows share"):
        trainer(callbacks=[PrivatePairs()]).fit(make(DPO), batches(1))


def test_a_batch_of_several_pairs_is_refused() -> None:
    row = pair(0)
    several = {name: value.repeat(2, 1) if isinstance(value, Tensor) else value for name, value in row.items()}
    rows: DataLoader[Any] = DataLoader([several], batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^PrivatePairs: a micro-batch has 2 pairs.*--data.batch_size 2[^\n]*$"):
        trainer(callbacks=[PrivatePairs()]).fit(module(), rows)


@pytest.mark.parametrize(
    ("name", "value"), [("clip", 0.0), ("multiplier", -1.0), ("delta", 1.0), ("multiplier", math.inf)]
)
def test_what_is_out_of_range_is_one_line(name: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"^PrivatePairs.{name} = {value}: must be [^\n]+$"):
        PrivatePairs(**{name: value})
    with pytest.raises(InputError, match=r"^PrivatePairs.clip = inf: [^\n]+ multiplier 0$"):
        PrivatePairs(clip=math.inf)


def test_what_is_spent_is_the_accountants_and_is_resumed(tmp_path: Path) -> None:
    accountants = pytest.importorskip("opacus.accountants")
    callback = PrivatePairs(delta=1e-3)
    run = trainer(callbacks=[callback], accumulate_grad_batches=2, log_every_n_steps=1)
    run.fit(module(), loader(*range(8)))
    run.save_checkpoint(tmp_path / "half.ckpt")
    truth = accountants.RDPAccountant()
    for _ in range(4):
        truth.step(noise_multiplier=1.0, sample_rate=0.25)
    assert float(run.callback_metrics["privacy/epsilon"]) == pytest.approx(truth.get_epsilon(1e-3), rel=1e-5)
    resumed = PrivatePairs(delta=1e-3)
    again = trainer(callbacks=[resumed], accumulate_grad_batches=2, max_epochs=2)
    again.fit(module(), loader(*range(8)), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert resumed.steps == 8
    assert resumed.epsilon(0.25) > callback.epsilon(0.25)


# ---- two processes --------------------------------------------------------------------------------------------------


def work(folder: Path) -> None:
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    model = module()
    parallel: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    run = trainer(callbacks=[PrivatePairs(clip=0.05)], accumulate_grad_batches=PAIRS // 2, **parallel)
    run.fit(model, loader(*range(rank, PAIRS, 2)))
    torch.save(weights(model), folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    """Pairs are clipped before they are added up, and the noise comes once."""
    done = launch("-m", "tests.callbacks.test_private_pairs", str(tmp_path), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = module()
    trainer(callbacks=[PrivatePairs(clip=0.05)], accumulate_grad_batches=PAIRS).fit(alone, loader(*range(PAIRS)))
    for name, value in weights(alone).items():
        assert torch.equal(one[name], two[name])
        torch.testing.assert_close(one[name], value, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
