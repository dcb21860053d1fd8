"""FSDP2 on two processes: the gradient of one, checkpoints and models that one process reads, evaluation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from grade_lightning.errors import InputError
from grade_lightning.policies import Policy
from grade_lightning.records import Rollout, Scores
from grade_lightning.rollouts import Sampler
from grade_lightning.strategies import FSDP2
from tests.cli.conftest import Run, Shelf, Together, assert_same, checkpoint, scalar, version
from tests.cli.ranks import DDP_ALONE, Keep, batches, every_case, full, launch, make, trainer, two_steps
from tests.conftest import make_prompts
from tests.methods.toy_task import Toy
from tests.modules.toys import Numbered, distance, loader, prompts

CHECKPOINTED = "PPO with LoRA", "PPO"


def sharded(folder: Path, backbone: Path, rank: int | None) -> dict[str, Any]:
    """Four steps at once; two, a checkpoint, and two more; what was saved by DDP; and evaluations."""
    found: dict[str, Any] = {}
    for case in CHECKPOINTED:
        paths = {strategy: folder / f"{case} {strategy}.ckpt" for strategy in ("ddp", "fsdp2")}
        for strategy, path in paths.items():
            module, fitted = adam(case, backbone), trainer(rank, strategy, max_steps=-1, max_epochs=1)
            fitted.fit(module, loader(*batches(case, rank)))
            fitted.save_checkpoint(path)
        module.save_pretrained(str(folder / f"{case} saved"))
        found[case] = {"whole": goes_on(case, backbone, rank)}
        found[case] |= {name: goes_on(case, backbone, rank, ckpt_path=path) for name, path in paths.items()}
    found["redrawn"] = redrawn(backbone, rank)
    for strategy in ("ddp", "fsdp2"):
        module = make("GradeSTE", backbone, sampler=Sampler(max_new_tokens=6))
        evaluated: Trainer = trainer(rank, strategy)
        first = evaluated.validate(module, evaluation(rank), verbose=False)
        evaluated.fit(module, evaluation(rank), evaluation(rank))
        found[strategy] = [*first, *trainer(rank, strategy).validate(module, evaluation(rank), verbose=False)]
    return found


class Mute(Toy):
    """Toy's reward; on the first process always the same."""

    def score(self, rollout: Rollout) -> Scores:
        found = super().score(rollout)
        return found if torch.distributed.get_rank() else replace(found, total=torch.zeros_like(found.total))


def redrawn(backbone: Path, rank: int | None) -> dict[str, Any]:
    """Two steps of DAPO, sampled in blocks: the first process finds no group that says anything, and draws again."""
    engine = Numbered(block=4)
    module, keep = make("DAPO", backbone, max_retries=2, reward=Mute(), sampler=Sampler(12, engine=engine)), Keep()
    trainer(rank, "fsdp2", callbacks=[keep]).fit(module, loader(*[prompts(6, 4, seed) for seed in range(2)]))
    return {"gradients": keep.gradients, "draws": engine.calls}


def adam(case: str, backbone: Path) -> Any:
    return make(case, backbone, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3, eps=1e-3))


def goes_on(case: str, backbone: Path, rank: int | None, **kwargs: Any) -> dict[str, Tensor]:
    """The weights after four steps."""
    module = adam(case, backbone)
    trainer(rank, "fsdp2", max_steps=-1, max_epochs=2).fit(
        module, loader(*batches(case, rank)), **kwargs, weights_only=True
    )
    return {name: full(value) for name, value in module.state_dict().items()}


def evaluation(rank: int | None) -> DataLoader[Any]:
    batch = {name: value.repeat(3, 1)[int(rank == 1) :][:8] for name, value in make_prompts().items()}
    return DataLoader([batch | {"columns": {}}] * 2, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.slow
@every_case
def test_every_method_has_the_gradient_of_one_process(case: str, together: Together, backbone: Path) -> None:
    """In both of two steps, the second from gathered weights that were stepped on while they were spread."""
    if case in DDP_ALONE:
        pytest.skip("refused: test_a_second_gradient_of_a_pass_is_refused")
    alone = two_steps(case, backbone)["gradients"]
    assert len(alone) == 2
    for rank in together[1]:
        for ours, truth in zip(rank["fsdp2"][case]["gradients"], alone, strict=True):
            assert distance(ours, truth) < 1e-6
    shares = [rank["fsdp2"][case]["share"] for rank in together[1]]
    assert sum(shares) == pytest.approx(1)
    assert max(shares) < 0.6  # of the weights
    assert [rank["ddp"][case]["share"] for rank in together[1]] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("case", CHECKPOINTED)
def test_a_resumed_run_is_the_run(case: str, together: Together, backbone: Path) -> None:
    """To the bit from a checkpoint of its own; from one of DDP, and on one process, but for rounding."""
    folder, ranks = together
    for found in (rank["sharded"][case] for rank in ranks):
        assert_same(found["fsdp2"], found["whole"])
        assert distance(found["ddp"], found["whole"]) < 1e-6
    alone = goes_on(case, backbone, None, ckpt_path=folder / f"{case} fsdp2.ckpt")
    assert distance(alone, ranks[0]["sharded"][case]["whole"]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("case", CHECKPOINTED)
def test_a_checkpoint_is_that_of_ddp(case: str, together: Together) -> None:
    one, two = (torch.load(together[0] / f"{case} {strategy}.ckpt", weights_only=True) for strategy in ("fsdp2", "ddp"))
    assert one.keys() == two.keys()
    assert shapes(one["state_dict"]) == shapes(two["state_dict"])
    assert distance(one["state_dict"], two["state_dict"]) < 1e-6
    states = [
        {str(number): x["exp_avg"] for number, x in run["optimizer_states"][0]["state"].items()} for run in (one, two)
    ]
    assert distance(*states) < 1e-5
    assert one["optimizer_states"][0]["param_groups"] == two["optimizer_states"][0]["param_groups"]


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CHECKPOINTED)
def test_the_saved_model_is_that_of_the_checkpoint(case: str, together: Together, backbone: Path) -> None:
    """Adapters merged, in a folder that one process wrote."""
    folder, _ = together
    module: Any = make(case, backbone)
    module.configure_model()
    state = torch.load(folder / f"{case} fsdp2.ckpt", weights_only=True)["state_dict"]
    module.load_state_dict(state, strict=False)
    saved = Policy(str(folder / f"{case} saved"))
    saved.load(reference=False)
    ids, mask = make_prompts().values()
    one, two = (policy.eval()(policy.embed(ids), mask, 2) for policy in (module.policy, saved))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_evaluation_is_that_of_ddp(together: Together) -> None:
    """Before and after training, with completions of different lengths and as many prompts on each process."""
    for rank in together[1]:
        ours, truth = rank["sharded"]["fsdp2"], rank["sharded"]["ddp"]
        assert len(ours) == 2
        assert ours[0] != ours[1]
        for one, two in zip(ours, truth, strict=True):
            assert one == pytest.approx(two, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_no_process_waits_for_one_that_draws_again(together: Together) -> None:
    """Nor for one whose completions are longer: the weights are gathered once a step, and sampling asks nobody."""
    one, two = (rank["sharded"]["redrawn"] for rank in together[1])
    assert one["draws"] == 6
    assert 2 <= two["draws"] < 6
    assert len(one["gradients"]) == 2
    for ours, theirs in zip(one["gradients"], two["gradients"], strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_strategies_that_cannot_work_are_refused(strategy: Any, backbone: Path) -> None:
    module = make("GradeSTE", backbone)
    module.trainer = Trainer(accelerator="cpu", logger=False)
    module.trainer.strategy.__class__ = strategy
    with pytest.raises(InputError, match=rf"under {strategy.__name__}.*use fsdp2, or ddp"):
        module.setup("fit")


def test_a_second_gradient_of_a_pass_is_refused(backbone: Path) -> None:
    module = make("STPPO", backbone)
    module.trainer = Trainer(accelerator="cpu", logger=False)
    module.trainer.strategy.__class__ = FSDP2
    with pytest.raises(InputError, match=r"STPPO takes a second gradient of the same pass"):
        module.setup("fit")


@pytest.mark.slow
def test_the_commands(shelf: Shelf, run: Run, tmp_path: Path) -> None:
    """Training and more of it on two processes, testing on one."""
    parallel = ["--trainer.devices=2", "--trainer.strategy=fsdp2", "--trainer.val_check_interval=2"]
    done = launch("-m", "grade_lightning_cli", *shelf.all, *parallel, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    saved = checkpoint(version())
    more = ["--trainer.max_steps=4", f"--ckpt_path={saved}"]
    done = launch("-m", "grade_lightning_cli", *shelf.all, *parallel, *more, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.load(checkpoint(version(1)), weights_only=True)["global_step"] == 4
    run("test", *shelf.all, f"--ckpt_path={checkpoint(version(1))}")
    assert 0 < scalar(version(2), "test/reward")[-1] < 1
    assert (version(1) / "export" / "model.safetensors").is_file()
