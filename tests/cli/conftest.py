"""The commands as a user enters them, and small models and data for them."""

import gc
import io
import logging
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml  # type: ignore[import-untyped]
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from transformers import GPT2Config, GPT2Model

from grade_lightning.rewards import Classifier
from tests.cli.ranks import launch
from tests.conftest import VOCABULARY, make_model, make_tokenizer, mostly_slow

QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.max_steps=2",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=2",
]
SIZES = [
    "--data.batch_size=4",
    "--data.eval_batch_size=6",
    "--data.reward_size=8",
    "--data.prompt_size=16",
    "--data.val_size=8",
    "--data.max_prompt_tokens=12",
    "--data.max_text_tokens=16",
]
GRADE = ["--model=GradeSTE", "--model.sampler.max_new_tokens=6"]
OFTEN = ["--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1"]


@dataclass(frozen=True)
class Shelf:
    """Where the small models and the reviews lie."""

    policy: Path
    reward: Path
    reviews: Path

    @property
    def data(self) -> list[str]:
        """The reviews, in small splits."""
        return ["--data.source=LocalFiles", f"--data.source.train={self.reviews}", *SIZES]

    @property
    def grade(self) -> list[str]:
        """GradeSTE without a reward."""
        return [*GRADE, f"--model.policy.path={self.policy}", *self.data, *QUIET]

    @property
    def all(self) -> list[str]:
        """A whole run of GradeSTE."""
        return [*self.grade, "--model.reward=ClassifierReward", f"--model.reward.path={self.reward}"]


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """A random policy and reward of 19 words, and 60 labelled reviews."""
    folder = tmp_path_factory.mktemp("shelf")
    shelf = Shelf(folder / "policy", folder / "reward", folder / "reviews.csv")
    make_model("gpt2", scale=4.0).save_pretrained(shelf.policy)
    make_tokenizer().save_pretrained(shelf.policy)
    torch.manual_seed(3)
    Classifier(GPT2Model(GPT2Config(**_SMALL)), hidden=8).save_pretrained(shelf.reward)
    make_tokenizer().save_pretrained(shelf.reward)
    write_reviews(shelf.reviews)
    return shelf


_SMALL: dict[str, Any] = {
    "n_embd": 16,
    "n_head": 2,
    "n_layer": 1,
    "n_positions": 64,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.5,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def write_reviews(path: Path, rows: int = 60) -> None:
    """Random words with a random label, as a table."""
    rng = random.Random(0)
    lines = [f"{' '.join(rng.choices(WORDS, k=8))},{i % 2}" for i in range(rows)]
    path.write_text("\n".join(["text,label", *lines]) + "\n")


WORDS = [f"w{i}" for i in range(2, VOCABULARY)]


class _Stderr(logging.Handler):
    """To the standard error of the moment; the libraries' own handlers keep the one of their import."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname}: {record.getMessage()}", file=sys.stderr)


@contextmanager
def new_shell(folder: Path, cache: Path) -> Iterator[pytest.MonkeyPatch]:
    """An empty working directory, no seed in the environment, and a random state to itself."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "TOKENIZERS_PARALLELISM"):
            patch.setenv(name, "0")  # to be restored afterwards
            patch.delenv(name)
        patch.setenv("COLUMNS", "200")
        for name in ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "datasets"):
            patch.setattr(logging.getLogger(name), "handlers", [_Stderr()])
        yield patch


@pytest.fixture(autouse=True)
def shell(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """Every test is in a shell of its own."""
    with new_shell(tmp_path, tmp_path_factory.getbasetemp() / "datasets") as patch:
        yield patch


def load(command: str) -> Callable[[], Any]:
    """What a shell runs under the name `grade-…`."""
    (entry,) = entry_points(group="console_scripts", name=f"grade-{command}")
    function: Callable[[], Any] = entry.load()
    return function


Run = Callable[..., None]


def enter(patch: pytest.MonkeyPatch, command: str, *args: str) -> None:
    """Run a command in this process."""
    patch.setattr(sys, "argv", [f"grade-{command}", *args])
    assert load(command)() is None  # an entry point exits with what it returns


@pytest.fixture
def run(shell: pytest.MonkeyPatch) -> Run:
    """Run a command in this process: `run("fit", "--model=GradeSTE", …)`."""
    return partial(enter, shell)


@pytest.fixture
def own(shell: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A module of the user's: its name."""
    (tmp_path / "users_own.py").write_text(USERS_OWN)
    shell.syspath_prepend(tmp_path)
    yield "users_own"
    sys.modules.pop("users_own", None)
    gc.collect()  # its classes are no longer subclasses


USERS_OWN = """
import threading
import torch
from datasets import Dataset, DatasetDict
from grade_lightning.data import Source
from grade_lightning.methods import GradeSTE
from grade_lightning.rewards import DifferentiableReward

class Mine(GradeSTE):
    def __init__(self, extra: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.extra = extra

    def loss(self, experience):
        step = super().loss(experience)
        step.metrics["extra"] = torch.tensor(self.extra)
        return step

class Late(DifferentiableReward):
    def __init__(self, above: int):
        super().__init__()
        self.above = above

    def table(self):
        return torch.eye(19)

    def score_embeddings(self, embeddings, mask):
        return (embeddings[..., self.above:].sum(-1) * mask).sum(-1) / mask.sum(-1)

class Words(Source):
    def __init__(self, rows: int):
        self.rows = rows

    def load(self):
        texts = [f"w{2 + i % 17} w{2 + i // 17}" for i in range(self.rows)]
        return DatasetDict(train=Dataset.from_dict({"text": texts}))

def words(prompts, completions, **columns):
    return [float(len(text.split())) for text in completions]

def at_most_two(prompts, completions, **columns):
    return [None if len(text.split()) > 2 else 1.0 for text in completions]

def short(prompts, completions, **columns):
    return [1.0]

def texts(prompts, completions, **columns):
    return ["good" for text in completions]

def hangs(prompts, completions, **columns):
    threading.Event().wait()

class Brevity:
    def __init__(self, most: int):
        self.most = most

    async def __call__(self, prompts, completions, **columns):
        return [float(len(text.split()) < self.most) for text in completions]

def raises(prompts, completions, **columns):
    raise KeyError("no such column")
"""


Together = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model."""
    folder = tmp_path_factory.mktemp("backbone")
    make_model("llama", scale=3.0).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def together(request: pytest.FixtureRequest, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Together:
    """What each of two processes found, which do all that tests of two processes want: the start takes longest."""
    folder = tmp_path_factory.mktemp("together")
    items: list[Any] = [item for item in request.session.items if item.path.name in ("test_ddp.py", "test_fsdp.py")]
    cases = sorted({item.callspec.params["case"] for item in items if "case" in item.fixturenames})
    if any(item.path.name == "test_fsdp.py" and item.get_closest_marker("slow") for item in items):
        cases.append("fsdp2")
    done = launch("-m", "tests.cli.test_ddp", str(folder), str(backbone), *cases, folder=folder, timeout=1200)
    assert done.returncode == 0, done.stderr
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


LORA = ["--model.policy.lora.r=2"]
full_and_lora = pytest.mark.parametrize("lora", mostly_slow([[], LORA], LORA), ids=["full", "lora"])


def version(number: int = 0, method: str = "GradeSTE") -> Path:
    """The folder of a run."""
    return Path("runs", method, f"version_{number}")


def checkpoint(folder: Path) -> Path:
    """The only checkpoint of a run."""
    (path,) = folder.glob("checkpoints/*.ckpt")
    return path


def weights(path: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of the model."""
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name, value in one.items() if not torch.equal(value, two[name])] == []


def events(folder: Path) -> EventAccumulator:
    """What TensorBoard shows of a run."""
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def scalar(folder: Path, name: str) -> list[float]:
    """The values of a curve."""
    return [event.value for event in events(folder).Scalars(name)]


@dataclass(frozen=True)
class Finished:
    folder: Path
    out: str

    @property
    def checkpoint(self) -> Path:
        return checkpoint(self.folder)


@pytest.fixture(scope="session")
def finished(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One run of GradeSTE, four steps, that many tests look at."""
    out, root = io.StringIO(), tmp_path_factory.mktemp("finished")
    with new_shell(root, tmp_path_factory.getbasetemp() / "datasets") as patch, redirect_stdout(out):
        enter(patch, "fit", *shelf.all, *OFTEN, "--completions.every_n_steps=2")
    return Finished(root / version(), out.getvalue())


@pytest.fixture
def printed_config(run: Run, capsys: pytest.CaptureFixture[str]) -> Any:
    def printed_config(*args: str) -> dict[str, Any]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run("fit", *args, "--print_config")
        assert not exit.value.code
        config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
        return config

    return printed_config
