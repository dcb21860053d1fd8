"""The SLURM script as a cluster runs it, on a cluster of shell scripts; and the limits of the simulation of scaling."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Shelf
from tests.cli.conftest import shelf as shelf  # the fixture

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs" / "slurm.sbatch"

# ---- SLURM ----------------------------------------------------------------------------------------------------

SBATCH = """#!{python}
import os, subprocess, sys
given = [arg for arg in sys.argv[1:] if arg.startswith("--") and sys.argv.index(arg) < sys.argv.index("{script}")]
lines = [line.split()[1] for line in open("{script}") if line.startswith("#SBATCH ")]
options = dict(option[2:].partition("=")[::2] for option in [*lines, *given])
job = {{
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": options["job-name"],
    "SLURM_NNODES": options["nodes"],
    "SLURM_NTASKS_PER_NODE": options["ntasks-per-node"],
    "SLURM_NTASKS": str(int(options["nodes"]) * int(options["ntasks-per-node"])),
    "SLURM_NODELIST": "localhost",
    "SLURM_CPUS_PER_TASK": "1",
}}
assert "requeue" in options and options["signal"] == "SIGUSR1@90"
rest = sys.argv[sys.argv.index("{script}") + 1 :]
sys.exit(subprocess.run(["bash", "{script}", *rest], env=os.environ | job).returncode)
"""
SRUN = """#!{python}
import os, subprocess, sys
command = sys.argv[sys.argv.index("grade-fit") :]
tasks = [
    subprocess.Popen(command, env=os.environ | {{"SLURM_PROCID": i, "SLURM_LOCALID": i, "SLURM_NODEID": "0"}})
    for i in map(str, range(int(os.environ["SLURM_NTASKS"])))
]
sys.exit(max(task.wait() for task in tasks))
"""
GRADE_FIT = """#!/bin/bash
exec {python} -m grade_lightning_cli "$@"
"""
TOLD = '''
import json
from grade_lightning.methods import GradeSTE

class Told(GradeSTE):
    """Writes down what each process knew of the cluster."""

    def on_train_end(self):
        environment = type(self.trainer.strategy.cluster_environment).__name__
        found = {"environment": environment, "world": self.trainer.world_size, "steps": self.global_step}
        with open(f"rank{self.global_rank}.json", "w") as file:
            json.dump(found, file)
'''


def test_the_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.fixture
def start(shelf: Shelf, tmp_path: Path) -> Callable[..., None]:
    """Start a command on the cluster, for two steps on two processes."""

    def start(*command: str) -> None:
        tools = tmp_path / "bin"
        tools.mkdir()
        for name, text in {"sbatch": SBATCH, "srun": SRUN, "grade-fit": GRADE_FIT}.items():
            (tools / name).write_text(text.format(python=sys.executable, script=SCRIPT))
            (tools / name).chmod(0o755)
        (tmp_path / "told.py").write_text(TOLD)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment = {
            "PATH": os.pathsep.join([str(tools), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "MASTER_PORT": str(port),
            "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
        }
        done = subprocess.run(
            [*command, "--model=told.Told", *shelf.all[1:]],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("before (step 0)") == 1  # one process speaks

    return start


def told(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_the_script_trains_on_all_tasks(start: Callable[..., None], tmp_path: Path) -> None:
    start("sbatch", "--nodes=1", "--ntasks-per-node=2", str(SCRIPT))
    assert told(tmp_path) == 2 * [{"environment": "SLURMEnvironment", "world": 2, "steps": 2}]
    assert list((tmp_path / "runs" / "Told").glob("*/checkpoints/*.ckpt"))


@pytest.mark.slow
def test_torchrun_trains_on_all_processes(start: Callable[..., None], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "grade_lightning_cli"]
    start(*torchrun, "--trainer.devices=2")
    assert told(tmp_path) == 2 * [{"environment": "TorchElasticEnvironment", "world": 2, "steps": 2}]


# ---- the simulation -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Any:
    spec = importlib.util.spec_from_file_location("cluster", ROOT / "benchmarks" / "cluster.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STRATEGIES = pytest.mark.parametrize("strategy", ["DDP", "FSDP2"])


@pytest.fixture(scope="module")
def job(cluster: Any) -> Any:
    return cluster.Job("GPT-2 small", 124_439_808, 124_439_808, 12, 4)


def options(cluster: Any, **kwargs: float) -> Namespace:
    found: Namespace = cluster.options([f"--{name.replace('_', '-')}={value}" for name, value in kwargs.items()])
    return found


def test_parameters_are_those_of_the_models(cluster: Any) -> None:
    found = {job.name: (job.parameters, job.trained) for job in cluster.jobs()}
    assert found["GPT-2 small, all weights"] == (124_439_808, 124_439_808)
    assert found["Qwen3-4B, all weights"] == (4_022_468_096, 4_022_468_096)
    every, trained = found["Qwen3-4B, LoRA"]
    # rank 16 at q (2560 → 4096), k, v (→ 1024) and o (4096 → 2560) of 36 layers
    assert trained == 36 * 16 * (2560 + 4096 + 2 * (2560 + 1024) + 4096 + 2560) == every - 4_022_468_096


@STRATEGIES
def test_one_gpu_is_one(cluster: Any, job: Any, strategy: str) -> None:
    assert cluster.efficiency(job, 1, strategy, options(cluster)) == 1
    assert cluster.exchanged(job, 1, strategy) == 0


@STRATEGIES
def test_nothing_is_lost_where_nothing_is_waited_for(cluster: Any, job: Any, strategy: str) -> None:
    """Infinite bandwidth, no latency, completions of equal length; and with unequal ones something is."""
    free: dict[str, float] = {"nvlink": float("inf"), "network": float("inf"), "latency": 0}
    assert cluster.efficiency(job, 64, strategy, options(cluster, end=0, **free)) == pytest.approx(1)
    assert cluster.efficiency(job, 64, strategy, options(cluster, **free)) < 0.99


@STRATEGIES
def test_efficiency_is_monotone(cluster: Any, job: Any, strategy: str) -> None:
    def found(gpus: int, **kwargs: float) -> float:
        value: float = cluster.efficiency(job, gpus, strategy, options(cluster, **kwargs))
        return value

    by_bandwidth = [found(64, network=bandwidth) for bandwidth in (1e9, 1e10, 1e11, 1e12)]
    assert by_bandwidth == sorted(by_bandwidth)
    assert by_bandwidth[0] < by_bandwidth[-1] - 0.05
    by_gpus = [found(gpus) for gpus in (1, 2, 4, 8, 16, 32, 64)]
    assert by_gpus == sorted(by_gpus, reverse=True)


def test_what_is_exchanged_and_kept(cluster: Any, job: Any) -> None:
    """All weights in float32: both send twice the weights' bytes; FSDP2 spreads gradients, Adam's state and weights."""
    size = 4 * job.parameters
    assert cluster.exchanged(job, 2, "DDP") == cluster.exchanged(job, 2, "FSDP2") == size
    assert cluster.memory(job, 64, "DDP") == 6 * size  # policy, reference, reward, gradient, two moments
    assert cluster.memory(job, 64, "FSDP2") == pytest.approx((3 + 4 / 64) * size)
