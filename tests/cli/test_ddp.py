"""Two processes: the same weights, other prompts, other noise, and together the gradient of one."""

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from grade_lightning.blends import Debiased
from grade_lightning.constraints import Constrained, Constraint
from grade_lightning.credit import CriticCredit, RegressionCredit
from grade_lightning.distributed import Reduce
from grade_lightning.kl import KL
from grade_lightning.methods import (
    AEPO,
    COPO,
    DAPO,
    DCPO,
    EGPO,
    GRPO,
    PPO,
    RLOO,
    STPPO,
    AgenticAEPO,
    GradeSTE,
    KnapsackRL,
    Reinforce,
    ReinforcePlusPlus,
)
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.policies import SharedPrefixPass
from grade_lightning.records import Rollout, slice_rows
from grade_lightning.rewards import Reward
from grade_lightning.rollouts import Sampler, Turns
from tests.cli.conftest import WORDS, Run, Shelf, Together, assert_same, checkpoint, scalar, version, weights
from tests.cli.ranks import DDP_ALONE, EVERY, every_case, launch, two_steps
from tests.cli.test_fsdp import sharded
from tests.conftest import mostly_slow
from tests.methods.toy_task import Toy
from tests.modules.seams import Greedy, Longer, Ragged, Seams, Tool
from tests.modules.toys import Watch, build, distance, loader, own_weights, prompts, states

WATCHED = '''
import hashlib, json, os
import torch
from grade_lightning.methods import GradeSTE

class Watched(GradeSTE):
    """Writes down what each process saw."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        rollout = self.last_rollout[0]
        seen = self.__dict__.setdefault("seen", [])
        seen.append({"prompts": rollout.prompts, "seed": torch.initial_seed()})
        return loss

    def on_train_end(self):
        digest = hashlib.sha256()
        for _, value in sorted(self.state_dict().items()):
            digest.update(value.numpy().tobytes())
        found = {"weights": digest.hexdigest(), "steps": self.seen, "world": self.trainer.world_size}
        with open(f"rank{self.global_rank}.json", "w") as file:
            json.dump(found, file)
'''


@pytest.fixture(scope="module")
def ranks(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "watched.py").write_text(WATCHED)
    parallel = [
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.val_check_interval=2",
        "--trainer.log_every_n_steps=1",
    ]
    args = [arg for arg in shelf.all if not arg.startswith("--model=")]
    done = launch("-m", "grade_lightning_cli", "--model=watched.Watched", *args, *parallel, folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("before (step 0)") == 1  # one process speaks
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_both_processes_end_with_the_same_weights(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (one, two) = ranks
    assert one["world"] == two["world"] == 2
    assert len(one["steps"]) == len(two["steps"]) == 2
    assert one["weights"] == two["weights"]


@pytest.mark.slow
def test_each_process_has_prompts_of_its_own(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """Together they see each of the sixteen prompts of the epoch once."""
    _, found = ranks
    prompts = [prompt for rank in found for step in rank["steps"] for prompt in step["prompts"]]
    assert len(set(prompts)) == len(prompts) == 16


@pytest.mark.slow
def test_no_two_rollouts_share_their_noise(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    _, found = ranks
    assert len({step["seed"] for rank in found for step in rank["steps"]}) == 4


@pytest.mark.slow
def test_there_is_one_log_one_checkpoint_and_one_model(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = ranks
    run = folder / version(method="Watched")
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    assert checkpoint(run).is_file()
    assert (run / "export" / "model.safetensors").is_file()
    assert len(scalar(run, "train/reward")) == 2
    assert 0 < scalar(run, "val/reward")[-1] < 1


# ---- policy gradients -----------------------------------------------------------------------------------------------


class Short(Reward):
    """Toy's reward of short completions; of long ones it says nothing."""

    def forward(self, rollout: Rollout) -> Tensor:
        return Toy().score(rollout).total.masked_fill(rollout.lengths > 6, torch.nan)


class Bounded(RLOO):
    """Toy's reward, within a bound on how short the completions are."""

    def __init__(self, **kwargs: Any) -> None:
        bound = Constraint(Brevity(), at_most=0.2, rate=2.0, initial=0.1)
        super().__init__(**kwargs | {"reward": Constrained(Toy(), [bound])})


class Criticised(RLOO):
    """Toy's reward, with a critic of its derivatives."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, credit=CriticCredit())


class Regressed(RLOO):
    """Toy's reward, regressed on the tokens."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, credit=RegressionCredit())


class Unbiased(GradeSTE):
    """With the bias of earlier batches taken off."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, blend=Debiased())


class Brevity(Reward):
    """How much shorter than twelve tokens, in twelfths."""

    def forward(self, rollout: Rollout) -> Tensor:
        return 1 - rollout.lengths / 12


CASES: dict[str, tuple[type[Any], dict[str, Any], int]] = {
    "token mean": (DAPO, {"max_retries": 0}, 1),
    "token mean, accumulated": (DAPO, {"max_retries": 0}, 2),
    "scaled by the batch": (GRPO, {"scale_rewards": "batch"}, 1),
    "whitened": (ReinforcePlusPlus, {"epochs": 2}, 1),
    "one process without rewards": (Reinforce, {"reward": Short(), "num_generations": 1}, 1),
    "values": (PPO, {"epochs": 2, "kl": KL(0.1, target=0.1, horizon=32)}, 1),
    "prompt memory": (DCPO, {"epochs": 2}, 1),
    "success rates": (KnapsackRL, {"min_rollouts": 4, "max_rollouts": 4}, 1),
    "success rates, in two epochs": (KnapsackRL, {"min_rollouts": 4, "max_rollouts": 4, "epochs": 2}, 1),
    "seams": (Seams, {"num_generations": 3, "epochs": 2}, 2),
    "ragged": (RLOO, {"selection": Ragged(), "whole_groups": True, "epochs": 2}, 2),
    "rows of its own": (RLOO, {"selection": Longer(), "kl": KL(0.1, target=0.1, horizon=32)}, 1),
    "prompts of all processes": (COPO, {"epochs": 2}, 1),
    "another temperature": (AEPO, {"mode": "reweight", "epochs": 2}, 1),
    "entropies of all processes": (AgenticAEPO, {"epochs": 2}, 1),
    "what is cut off": (STPPO, {"epochs": 2, "num_generations": 1}, 2),
    "prompts shared": (RLOO, {"training_pass": SharedPrefixPass(), "kl": KL(0.1), "epochs": 2}, 2),
    "bounds": (Bounded, {"epochs": 2}, 1),
    "credit": (Criticised, {}, 2),
    "credit without a gradient": (Regressed, {}, 1),
    "a blend": (Unbiased, {}, 2),
    "turns": (Reinforce, {"sampler": Sampler(12, engine=Turns(Tool, turn_tokens=4, engine=Greedy()))}, 1),
    "a trial before each step": (EGPO, {}, 2),
}


ORDINARY = "token mean", "one process without rewards", "values", "prompt memory", "seams"
"""Those of the ordinary set; others run where a test of them does."""
STATEFUL = (
    "another temperature",
    "what is cut off",
    "values",
    "one process without rewards",
    "prompt memory",
    "success rates",
    "success rates, in two epochs",
    "seams",
    "rows of its own",
    "bounds",
    "credit",
    "credit without a gradient",
    "a blend",
    "turns",
)
RESUMED = (
    "prompt memory",
    "success rates, in two epochs",
    "values",
    "bounds",
    "credit",
    "a blend",
    "a trial before each step",
)
PARALLEL = ["--trainer.devices=2", "--trainer.strategy=ddp"]
FIGURES = """train/loss train/reward train/reward_std train/objective train/kl train/kl_per_token train/kl_k2
train/entropy train/response_length train/eos_rate"""


def fit_case(name: str, rank: int | None, folder: Path, **kwargs: Any) -> tuple[Any, Watch, Trainer]:
    """Four steps on completions of 1 to 12 tokens: the first process has the short ones, or one process has all."""
    method, settings, accumulate = CASES[name]
    steps = {"minibatches": 1, "epochs": 1} if issubclass(method, PolicyGradientModule) else {}
    module: Any = build(method, **{"num_generations": 4} | steps | settings)
    epochs = module.batching.epochs
    alike = method in (
        EGPO,
        Criticised,
        Unbiased,
    )  # they read a batch when they go on, and the loader begins anew
    windows = [prompts(8, module.num_generations, 0 if alike else seed) for seed in range(4 // epochs)]
    if rank is not None:
        windows = [slice_rows(window, 4 * rank, 4) for window in windows]
    parallel: dict[str, Any] = {"devices": 1} if rank is None else {"devices": 2, "strategy": "ddp"}
    watch = Watch()
    save = ModelCheckpoint(folder / name, "{step}", every_n_train_steps=1, save_top_k=-1)
    fitted = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=1,
        max_steps=4,
        callbacks=[watch] if kwargs else [watch, save],
        enable_checkpointing=not kwargs,
        **parallel,
    )
    fitted.fit(module, loader(*windows, visits=epochs * accumulate), **kwargs)
    return module, watch, fitted


def work(folder: Path, backbone: Path, cases: list[str]) -> None:
    """What each of two processes does: by DDP, for these cases of methods, and by FSDP2 if that is among them."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    found: dict[str, Any] = {}
    for name in [name for name in CASES if name in {*ORDINARY, *cases}]:
        module, watch, _ = fit_case(name, rank, folder)
        found[name] = {"weights": own_weights(module), "parts": states(module), "gradients": watch.gradients}
        found[name]["logged"] = watch.logged
    found["resumed"] = {}
    for name in RESUMED:
        if name not in found:
            continue
        middle = folder / name / "step=3.ckpt"
        module, _, trainer = fit_case(name, rank, folder, ckpt_path=middle, weights_only=True)
        found["resumed"][name] = {"weights": own_weights(module), "parts": states(module)}
    for strategy in ("ddp", "fsdp2") if "fsdp2" in cases else ("ddp",):
        able = [case for case in cases if case in EVERY and (strategy == "ddp" or case not in DDP_ALONE)]
        found[strategy] = {case: two_steps(case, backbone, rank, strategy) for case in able}
    if "fsdp2" in cases:
        found["sharded"] = sharded(folder, backbone, rank)
    found["reduced"] = reduced(Reduce(trainer), rank)
    torch.save(found, folder / f"{rank}.pt")


def reduced(reduce: Reduce, rank: int) -> dict[str, list[float]]:
    """Sums and means, and what the tensors that went into them are afterwards."""
    sums, means, counts = torch.tensor([1.0, rank]), torch.tensor([1.0, rank]), torch.tensor([rank, 2])
    found = {"sum": reduce.sum(sums), "mean": reduce.mean(means), "mean of counts": reduce.mean(counts)}
    return {name: x.tolist() for name, x in (found | {"summed": sums, "averaged": means, "counted": counts}).items()}


def flattened(state: Any, name: str = "") -> dict[str, float]:
    """Every number in it, by where it is."""
    if isinstance(state, Tensor):
        state = state.tolist()
    if isinstance(state, list):
        state = dict(enumerate(state))
    if not isinstance(state, dict):
        return {} if state is None else {name: float(state)}
    found: dict[str, float] = {}
    for key, value in state.items():
        found |= flattened(value, f"{name}/{key}")
    return found


@pytest.mark.parametrize("case", mostly_slow(CASES, *ORDINARY))
def test_two_processes_have_the_gradient_of_one(case: str, together: Together, tmp_path: Path) -> None:
    """One has all the short completions: denominators, whitening, baseline and adaptive β are those of all of them."""
    one, two = (found[case] for found in together[1])
    alone, watch, _ = fit_case(case, None, tmp_path)
    assert len(one["gradients"]) == len(watch.gradients) == 4
    for ours, truth in zip(one["gradients"], watch.gradients, strict=True):
        assert distance(ours, truth) < 1e-6
    remembered = flattened(states(alone))
    assert flattened(one["parts"]) == flattened(two["parts"]) == pytest.approx(remembered, rel=1e-5, abs=1e-6)
    assert bool(remembered) is (case in STATEFUL)
    assert_same(one["weights"], two["weights"])


@pytest.mark.parametrize("name", ["token mean", "one process without rewards"])
def test_what_is_logged_is_what_one_process_would_log(name: str, together: Together, tmp_path: Path) -> None:
    """Over all completions, or all tokens, or all that have a reward: not the mean of what each process finds."""
    _, watch, _ = fit_case(name, None, tmp_path)
    for one, two, truth in zip(*(found[name]["logged"] for found in together[1]), watch.logged, strict=True):
        expected = {figure: pytest.approx(truth[figure], rel=1e-5, abs=1e-6) for figure in FIGURES.split()}
        assert {figure: one[figure] for figure in expected} == {figure: two[figure] for figure in expected} == expected


def test_what_is_reduced_is_left_as_it_was(together: Together) -> None:
    for rank, found in enumerate(together[1]):
        assert found["reduced"] == {
            "sum": [2, 1],
            "mean": [1, 0.5],
            "mean of counts": [0.5, 2],
            "summed": [1, rank],
            "averaged": [1, rank],
            "counted": [rank, 2],
        }


@every_case
def test_every_method_has_the_gradient_of_one_process(case: str, together: Together, backbone: Path) -> None:
    """In both of two steps, the second from weights that a clipped gradient has moved, without unused parameters."""
    one, two = together[1]
    alone = two_steps(case, backbone)["gradients"]
    assert len(alone) == 2
    for rank in (one, two):
        for ours, truth in zip(rank["ddp"][case]["gradients"], alone, strict=True):
            assert distance(ours, truth) < 1e-6


def test_a_checkpoint_in_the_middle_of_a_window_holds_the_windows_of_both(together: Together, tmp_path: Path) -> None:
    """Each goes on with its own; a single process begins a new one."""
    folder, _ = together
    path = folder / "values" / "step=3.ckpt"
    windows = torch.load(path, weights_only=True)["grade_lightning"]["windows"]
    every = prompts(8, 4, seed=1)["columns"]["completions"]
    for window, groups in zip(windows, (every[:4], every[4:]), strict=True):
        ids, mask = (
            window["experience"]["rollout"]["completion_ids"],
            window["experience"]["rollout"]["completion_mask"],
        )
        found = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
        assert found == [completion for group in groups for completion in group]
    _, _, fitted = fit_case("values", None, tmp_path, ckpt_path=path, weights_only=True)
    assert fitted.global_step == 4


@pytest.mark.parametrize("case", mostly_slow(RESUMED, *ORDINARY))
def test_two_processes_that_resume_end_as_if_they_had_not_stopped(case: str, together: Together) -> None:
    """Their weights, and what they remember of prompts and of statistics: the same on both."""
    one, two = together[1]
    for rank in (one, two):
        assert_same(rank["resumed"][case]["weights"], one[case]["weights"])
        assert flattened(rank["resumed"][case]["parts"]) == flattened(one[case]["parts"])


# ---- by the command line --------------------------------------------------------------------------------------------


RAISES = """
import os
from pathlib import Path

def reward(prompts, completions, **columns):
    raises = os.environ["LOCAL_RANK"] == os.environ["RAISES"] if "LOCAL_RANK" in os.environ else False
    if raises:
        Path("raised").touch()
        raise KeyError("no such column")
    return [1.0 for _ in completions]
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "rank"), [("lightning", 1), ("lightning", 0), ("torchrun", 1), ("torchrun", 0)], ids=str
)
def test_one_process_that_fails_ends_all(launcher: str, rank: int, shelf: Shelf, tmp_path: Path) -> None:
    """Within a minute, while the other waits for it: with its message, and without success."""
    (tmp_path / "users_own.py").write_text(RAISES)
    reward = ["--model.reward=FunctionReward", "--model.reward.function=users_own.reward"]
    args = ["--model=Reinforce", *(arg for arg in shelf.grade if arg != "--model=GradeSTE"), *reward, *PARALLEL]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2"] if launcher == "torchrun" else []
    done = launch(*torchrun, "-m", "grade_lightning_cli", *args, folder=tmp_path, RAISES=str(rank))
    assert time.time() - (tmp_path / "raised").stat().st_mtime < 60
    assert done.returncode != 0
    assert "error: reward reward: the function raised KeyError: 'no such column'" in done.stderr
    if launcher == "lightning":
        assert "Traceback" not in done.stderr  # of the one that waited


SEARCHING = """
from pathlib import Path
from grade_lightning.methods import PromptSearch

class Searching(PromptSearch):
    def on_train_end(self):
        Path(f"rank{self.global_rank}.txt").write_text(f"{self.tokens} {self.policy.eos_ids}")
"""


@pytest.mark.slow
def test_two_processes_search_one_prompt(shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "searching.py").write_text(SEARCHING)
    args = [arg for arg in shelf.all if not arg.startswith("--model=")]
    args += [
        "--model.start=w3 w4 w5 w6",
        "--trainer.max_steps=4",
        "--model.candidates=19",
        "--model.fluency=1",
        *PARALLEL,
    ]
    done = launch("-m", "grade_lightning_cli", "--model=searching.Searching", *args, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = ((tmp_path / f"rank{rank}.txt").read_text() for rank in range(2))
    assert one == two
    assert not one.startswith("[3, 4, 5, 6]")
    (exported,) = tmp_path.rglob("prompt.json")
    assert one.startswith(str(json.loads(exported.read_text())["tokens"]))


STAGES: dict[str, tuple[list[str], int]] = {
    "SupervisedFineTuning": (["--model.policy.path={policy}"], 4),
    "RewardModel": (["--model.backbone={policy}"], 4),
    "DPO": (["--model.policy.path={policy}", "--model.pairs=data"], 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", STAGES)
def test_the_same_rows_in_a_step_are_the_same_steps(method: str, shelf: Shelf, run: Run, tmp_path: Path) -> None:
    """However they are divided among processes and micro-batches; texts and completions have different lengths."""
    settings, size = STAGES[method]
    train = tmp_path / "rows.jsonl"
    rng = random.Random(0)
    words = [[" ".join(rng.choices(WORDS, k=rng.randint(2, 9))) for _ in range(3)] for _ in range(60)]
    rows = [
        {"text": a, "prompt": b[:5], "chosen": a, "rejected": c, "label": i % 2} for i, (a, b, c) in enumerate(words)
    ]
    keys = ("prompt", "chosen", "rejected") if method == "DPO" else ("text", "label")
    train.write_text("".join(json.dumps({key: row[key] for key in keys}) + "\n" for row in rows))
    args = [f"--model={method}", *(part.format(policy=shelf.policy) for part in settings)]
    args += [arg for arg in shelf.grade if arg.startswith(("--data", "--trainer")) and "source.train" not in arg]
    args += [f"--data.source.train={train}", "--model.optimizer=SGD", "--model.optimizer.lr=0.1"]
    args += ["--trainer.limit_val_batches=0", f"--data.reward_size={0 if method == 'DPO' else 8}"]
    found: list[dict[str, Tensor]] = []
    for processes, accumulate in ((1, 1), (1, 2), (2, 1), (2, 2)):
        divided = [
            f"--data.batch_size={size // processes // accumulate}",
            f"--trainer.accumulate_grad_batches={accumulate}",
        ]
        if processes == 1:
            run("fit", *args, *divided)
        else:
            done = launch("-m", "grade_lightning_cli", *args, *divided, *PARALLEL, folder=tmp_path)
            assert done.returncode == 0, done.stderr
        found.append(weights(checkpoint(version(len(found), method))))
    for other in found[1:]:
        assert distance(other, found[0]) < 1e-6


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
