"""What a preflight says of a run."""

import re
from importlib import import_module

import pytest

from grade_lightning.modules import AlignmentModule
from tests.cli.conftest import Run, Shelf, checkpoint, version
from tests.cli.preflight.conftest import METHODS, Look, arguments, cell
from tests.conftest import mostly_slow

inventory = import_module("grade_lightning_cli.preflight.inventory")
tables = import_module("grade_lightning_cli.preflight.tables")


@pytest.mark.parametrize("method", mostly_slow(METHODS, "GradeSTE", "PPO"))
def test_every_method(method: str, look: Look, shelf: Shelf) -> None:
    out, memory = look(*arguments(shelf, method))
    assert cell(out, "method") == method
    assert cell(out, "device") == "cpu"
    assert cell(out, "precision") == "32-true; weights in float32"
    assert cell(out, "pad token") == "'<pad>' (1)"
    assert int(cell(out, "largest data.batch_size")) > 8
    sampled = issubclass(METHODS[method], AlignmentModule)
    assert len(re.findall(r"^│ w\d+ .* │$", out, re.MULTILINE)) == (2 if method in ("CPL", "DPO", "IPO") else 4)
    assert ("a completion ends with │ '<eos>' (0)" in out) == sampled
    assert cell(out, "end of turn") == "none"
    beginning = cell(out, f"a {'prompt' if sampled else 'text'} begins with")
    assert re.fullmatch(r"'<eos>' \(0\)(, 'w(\d+)' \(\2\))+", beginning)
    assert set(memory.phases) >= ({"sampling", "reward", "reference"} if sampled else {"loss", "backward"})
    assert memory.unit == {"DPO": 4, "IPO": 4, "KTO": 2, "EGPO": 4, "GRPO": 8}.get(method, memory.unit)
    weights = {"policy", "reference", "reward"} if sampled else {"classifier" if method == "RewardModel" else "policy"}
    weights |= {"critic"} if method in ("PPO", "TurnPPO", "STPPO") else set()
    assert set(memory.parts) == weights | {"gradients", "optimizer state"}


@pytest.mark.parametrize("installed", [False, True])
def test_the_engine_and_a_faster_one(
    installed: bool, look: Look, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "find_spec", lambda name: name if installed else None)
    out, _ = look(*shelf.all)
    assert cell(out, "engine").startswith("TransformersEngine")
    assert ("--model.sampler.engine VLLMEngine" in " ".join(out.split())) == installed


def test_completions_are_really_sampled_and_scored(look: Look, shelf: Shelf, own: str) -> None:
    args = [arg for arg in arguments(shelf, "RLOO") if "reward" not in arg]
    out, _ = look(
        *args, "--model.reward=FunctionReward", f"--model.reward.function={own}.words", "--data.reward_size=0"
    )
    rows = re.findall(r"^│ (w[w\d ]+?) +│ ([w\d ]*?) +│ (\d)(, cut off)? +│ (\S+) +│$", out, re.MULTILINE)
    assert len(rows) == 4
    assert len({completion for _, completion, *_ in rows}) > 1
    for _, completion, tokens, cut, reward in rows:
        assert float(reward) == len(completion.split())
        assert (int(tokens) == 6) or not cut


@pytest.mark.slow
def test_the_trained_policy_of_a_checkpoint(look: Look, run: Run, shelf: Shelf) -> None:
    constant = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=5"]
    run("fit", *shelf.all, *constant, "--trainer.val_check_interval=2")
    start, _ = look(*shelf.all, "--trainer.max_steps=4")
    then, _ = look(*shelf.all, *constant, "--trainer.max_steps=4", f"--ckpt_path={checkpoint(version())}")
    assert start.partition("A batch")[2] != then.partition("A batch")[2]


@pytest.mark.slow
def test_memory_that_is_not_known(look: Look, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "room", lambda *_: None)
    out, _ = look(*shelf.all)
    assert cell(out, "there are") == "unknown"
    assert "largest" not in out.partition("in all")[2].partition("phases")[2]
