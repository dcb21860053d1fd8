"""Nothing that comes from outside is run, and no secret of the environment is written down."""

import ast
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grade_lightning.data import HubDataset, LocalFiles
from grade_lightning.errors import InputError
from grade_lightning.policies import Policy
from grade_lightning.rewards import ClassifierReward
from tests.cli.conftest import Run, Shelf
from tests.cli.conftest import run as run  # fixtures
from tests.cli.conftest import shelf as shelf
from tests.cli.conftest import shell as shell
from tests.conftest import VOCABULARY, make_model, make_tokenizer

ROOT = Path(__file__).parents[1]


class Payload:
    """Would leave a file, were it unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


@pytest.fixture(autouse=True)
def _nothing_is_executed(tmp_path: Path, shell: pytest.MonkeyPatch) -> Any:
    yield
    assert not (tmp_path / "executed").exists()


def test_the_payload_works(tmp_path: Path) -> None:
    """The other tests would see it."""
    torch.save(Payload(), tmp_path / "evil.pt")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    (tmp_path / "executed").unlink()


def one_line(error: pytest.ExceptionInfo[InputError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert [part for part in parts if part not in text] == []


# ---- checkpoints ----------------------------------------------------------------------------------------------


def whole(content: dict[str, Any], path: Path) -> None:
    torch.save(content, path)


def bare(content: dict[str, Any], path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("write", [whole, bare])
def test_a_checkpoint_with_code_in_it(
    command: str,
    write: Callable[[dict[str, Any], Path], None],
    run: Run,
    shelf: Shelf,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It has all that a checkpoint of ours has, and something more."""
    content = {
        "state_dict": {},
        "pytorch-lightning_version": "2.6.6",
        "grade_lightning": {"method": "GradeSTE"},
        "callbacks": Payload(),
    }
    write(content, Path("evil.ckpt"))
    with pytest.raises(SystemExit) as exit:
        run(command, *shelf.all, "--ckpt_path=evil.ckpt")
    assert exit.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"grade-{command}: error: evil.ckpt: cannot be read as a checkpoint of weights")


# ---- models ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pickled(shelf: Shelf, tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a model's folder with its weights as a pickle that does something."""

    def pickled(folder: Path) -> Path:
        copy = tmp_path / "pickled"
        shutil.copytree(folder, copy)
        (copy / "model.safetensors").unlink()
        torch.save({"weight": Payload()}, copy / "pytorch_model.bin")
        return copy

    return pickled


def test_a_policy_that_is_a_pickle(shelf: Shelf, pickled: Callable[[Path], Path]) -> None:
    with pytest.raises(InputError) as error:
        Policy(str(pickled(shelf.policy))).load()
    one_line(error, "pickled", "safetensors")


@pytest.mark.parametrize("head", [True, False], ids=["backbone", "head"])
def test_a_reward_that_is_a_pickle(head: bool, shelf: Shelf, pickled: Callable[[Path], Path], tmp_path: Path) -> None:
    if head:
        folder = pickled(shelf.reward)
    else:
        folder = tmp_path / "pickled"
        shutil.copytree(shelf.reward, folder)
        torch.save({"0.weight": Payload()}, folder / "reward_head.safetensors")
    with pytest.raises(InputError) as error:
        ClassifierReward(str(folder)).load(make_tokenizer(), VOCABULARY)
    one_line(error, "pickled")


EVIL = """
from pathlib import Path
Path("executed").touch()
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
class EvilConfig(GPT2Config): model_type = "evil"
class Evil(GPT2LMHeadModel): config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast): pass
"""


def custom(folder: Path, config: dict[str, Any], tokenizer: dict[str, Any]) -> Policy:
    """A model with code beside it, and settings that ask for it."""
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "evil.py").write_text(EVIL)
    for name, changes in {"config.json": config, "tokenizer_config.json": tokenizer}.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
    return Policy(str(folder))


AUTO = {"auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}}


def test_a_model_that_needs_its_own_code(tmp_path: Path) -> None:
    policy = custom(tmp_path / "custom", AUTO | {"model_type": "evil"}, {})
    with pytest.raises(InputError) as error:
        policy.load()
    one_line(error, "custom", "code of its author")


def test_code_beside_a_model_that_transformers_knows(tmp_path: Path) -> None:
    """The model is loaded, by the code of transformers."""
    tokenizer = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]}}
    policy = custom(tmp_path / "custom", AUTO, tokenizer)
    policy.load()
    assert type(policy.model).__name__ == "GPT2LMHeadModel"
    assert type(policy.tokenizer).__module__.startswith("transformers.")


# ---- data -----------------------------------------------------------------------------------------------------


SCRIPT = """
from pathlib import Path
Path("executed").touch()
import datasets
class Evil(datasets.GeneratorBasedBuilder): pass
"""


@pytest.mark.parametrize("content", ["script", "pickle", "both"])
@pytest.mark.parametrize("source", [HubDataset, LocalFiles])
def test_a_dataset_with_code(source: type[HubDataset] | type[LocalFiles], content: str, tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    if content != "pickle":
        (folder / "evil.py").write_text(SCRIPT)
    if content != "script":
        (folder / "train.pkl").write_bytes(pickle.dumps(Payload()))
        (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: train.pkl\n---\n")
    with pytest.raises(InputError) as error:
        source(str(folder)).load()
    one_line(error, "evil")


def test_the_reader_of_pickles_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "train.pkl").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(InputError) as error:
        HubDataset("pandas", test_split=None).load()
    one_line(error, "pandas")


# ---- our own sources ------------------------------------------------------------------------------------------


def test_nothing_here_asks_for_more() -> None:
    """No pickle, no remote code, no code from text; torch.load says what it may read."""
    forbidden = re.compile(r"(c?pickle|dill|marshal|joblib)\b")
    for path in [*(ROOT / "grade_lightning").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(forbidden.match(name) for name in names), path
            if isinstance(node, ast.Call):
                called, given = ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}
                assert called not in ("eval", "exec", "compile", "__import__"), path
                assert given.get("trust_remote_code", "False") == "False", path
                if called in ("torch.load", "load_from_checkpoint") or called.endswith("trainer.fit"):
                    assert given.get("weights_only") == "True" or "ckpt_path" not in given | {"torch.load": 0}, path


# ---- secrets --------------------------------------------------------------------------------------------------


def test_no_secret_is_written_down(
    run: Run, shelf: Shelf, shell: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not in the configuration, the event files, the checkpoint or the model, and not on the screen."""
    secrets = {"HF_TOKEN": "hf_4f1c55", "WANDB_API_KEY": "8d1e77", "AWS_SECRET_ACCESS_KEY": "c02b91"}
    for name, value in secrets.items():
        shell.setenv(name, value)
    run("fit", *shelf.all)
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {".ckpt", ".yaml", ".safetensors"} <= {path.suffix for path in files}
    assert any("tfevents" in path.name for path in files)
    written = {path: path.read_bytes() for path in files} | {"screen": "".join(capfd.readouterr()).encode()}
    assert [(place, name) for place, text in written.items() for name, v in secrets.items() if v.encode() in text] == []
