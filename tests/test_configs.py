"""The recipes and the commands of the documentation are understood. Nothing is loaded."""

import re
import shlex
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

import grade_lightning.bundled
import grade_lightning.methods
from grade_lightning.data import BundledReviews
from grade_lightning.modules import AlignmentModule
from grade_lightning.rewards import ClassifierReward, FunctionReward
from tests.conftest import mostly_slow

ROOT = Path(__file__).parents[1]
ALIGNMENT = [
    name
    for name, value in vars(grade_lightning.methods).items()
    if isinstance(value, type) and issubclass(value, AlignmentModule)
]
WEIGHTS = [name for name in ALIGNMENT if name != "PromptSearch"]
"""Of these some weights are trained, so there is an optimizer to choose."""
RECIPES = {
    "bundled": ALIGNMENT,
    "calculator_sft": ["SupervisedFineTuning"],
    "calculator_turns": ["GRPO", "TurnPPO"],
    "imdb_gpt2": WEIGHTS,
    "imdb_local": [*ALIGNMENT, "RewardModel", "SupervisedFineTuning"],
    "imdb_qwen3_4b_lora": WEIGHTS,
    "imdb_reward_gpt2": ["RewardModel"],
    "paper_estimator": ["GradeSTE"],
    "small_gpt2": ["GradeSTE"],
    "smollm2_gsm8k_grpo": ["GRPO"],
    "smollm2_reviews": ["GradeSTE", "RLOO"],
    "smollm2_reward": ["RewardModel"],
    "smollm2_sft": ["SupervisedFineTuning"],
}
PLANS = ["compare_bundled", "paper_compat", "paper_corrected"]
"""Not for one run, but for grade-compare."""
LARGE_PLANS = ["compare_sums"]
"""Of many methods, which takes a while to read."""


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "0")  # to be restored afterwards


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Let a command read its arguments and print what it understood."""

    def printed(command: str, *args: str) -> dict[str, Any]:
        (entry,) = entry_points(group="console_scripts", name=command)
        monkeypatch.setattr(sys, "argv", [command, *args, "--print_config"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            entry.load()()
        captured = capsys.readouterr()
        assert not exit.value.code, captured.err
        config: dict[str, Any] = yaml.safe_load(captured.out)
        return config

    return printed


def stated(recipe: object, config: Any, place: str = "") -> Iterator[str]:
    """Where a configuration is not what a recipe says."""
    if isinstance(recipe, dict):
        if isinstance(config, dict) and "init_args" in config and not {"class_path", "init_args"} & set(recipe):
            config = config["init_args"]
        for key, value in recipe.items():
            yield from stated(value, config.get(key), f"{place}.{key}")
    elif isinstance(recipe, list):
        assert len(recipe) == len(config)
        for i, (one, two) in enumerate(zip(recipe, config, strict=True)):
            yield from stated(one, two, f"{place}.{i}")
    elif place.endswith("class_path"):
        if str(config).rpartition(".")[2] != str(recipe).rpartition(".")[2]:
            yield f"{place}: {config}"
    elif isinstance(config, dict) and "class_path" in config:  # named by its path alone
        yield from stated(recipe, config["class_path"], f"{place}.class_path")
    elif recipe != config:
        yield f"{place}: {config}"


def test_every_recipe_is_here() -> None:
    names = {*RECIPES, *PLANS, *LARGE_PLANS}
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} == names


@pytest.mark.parametrize("name", mostly_slow([*PLANS, *LARGE_PLANS], "compare_bundled"))
def test_every_run_of_a_plan_is_understood(name: str, printed: Any, tmp_path: Path) -> None:
    written = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    plan = import_module("grade_lightning_cli.compare.plan").plan(**written)
    comparison = import_module("grade_lightning_cli.compare.comparison").Comparison(tmp_path, plan)
    assert len(comparison.runs()) >= len(plan.methods)
    for run in comparison.runs():
        config = printed("grade-fit", *comparison.arguments(run))
        own = plan.methods[run.method].get("model", run.method)
        assert config["model"]["class_path"].endswith(f".{own.rpartition('.')[2]}")


@pytest.mark.parametrize("name", mostly_slow(sorted(RECIPES), "bundled"))
def test_a_recipe_does_what_it_says(name: str, printed: Any) -> None:
    recipe = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    for method in RECIPES[name]:
        config = printed("grade-fit", "--model", method, "--config", f"configs/{name}.yaml")
        assert config["model"]["class_path"] == f"grade_lightning.{method}"
        assert list(stated(recipe, config)) == []


def test_a_recipe_states_only_what_differs(printed: Any) -> None:
    """Only the bundled one spells out the defaults."""
    defaults = printed("grade-fit", "--model", "GradeSTE")
    for name in sorted(set(RECIPES) - {"bundled"}):
        recipe = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
        same = [
            f"{name}: {part}.{key}"
            for part in ("trainer", "data")
            for key, value in recipe.get(part, {}).items()
            if defaults[part].get(key) == value
        ]
        assert same == []


def commands(names: str = "fit|validate|test|predict") -> list[str]:
    """Every such command of ours in the documentation and in the recipes, in one line each."""
    found = []
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").glob("*.yaml")]:
        text = path.read_text().replace("\\\n# ", "\\\n").replace("\\\n", " ")
        found += re.findall(rf"^ *(?:# +|srun )?(?:[^`\n]*: )?(grade-(?:{names}) .*)$", text, re.MULTILINE)
    return sorted(set(found))


def test_commands_are_found() -> None:
    assert len(commands()) >= 70
    assert len(commands("report")) >= 4


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_documentation_are_understood(
    command: str, printed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = SimpleNamespace(brevity=lambda completions, **_: completions, beats=lambda others, **_: others)
    monkeypatch.setitem(sys.modules, "my_rewards", functions)
    as_it_is = {name: lambda row: row for name in ("short", "opening", "messages")}
    monkeypatch.setitem(sys.modules, "my_data", SimpleNamespace(**as_it_is))
    name, *args = shlex.split(command, comments=True)
    if any("help" in arg for arg in args):
        pytest.skip("prints help")
    printed(name, *[arg for arg in args if arg != "--print_config"])


@pytest.mark.parametrize("command", commands("compare"))
def test_comparisons_of_the_documentation_are_understood(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, *args = shlex.split(command.partition(">")[0], comments=True)
    args[args.index("--out") + 1] = str(tmp_path / "out")
    import_module("grade_lightning_cli.compare").compare(["--list", *(arg for arg in args if arg != "--list")])
    assert "--run" in capsys.readouterr().out


def test_reports_of_the_documentation_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    report = import_module("grade_lightning_cli.report.main")
    read: list[Any] = []
    monkeypatch.setattr(report, "report", lambda folders, *_: read.append(folders))
    for command in commands("report"):
        report.main(shlex.split(command, comments=True)[1:])
    assert all(read)
    assert len(read) == len(commands("report"))


def test_bundled_spells_out_the_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(grade_lightning.bundled, "prepare", lambda: tmp_path)
    build = import_module("grade_lightning_cli.config").build
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]
    said = []
    for extra in ([], ["--config", "configs/bundled.yaml"]):
        cli = build(["--model", "GradeSTE", *extra, *quiet])
        model, data = cli.model, cli.datamodule
        assert type(data.source) is BundledReviews
        assert type(model.reward) is ClassifierReward
        assert all(type(judge) is FunctionReward for judge in model.judges)
        said.append(
            {
                "policy": (model.policy.path, model.policy.lora, model.policy.dtype),
                "reward": (model.reward.path, model.reward.output),
                "judges": [judge.function for judge in model.judges],
                "source": vars(data.source),
                "beta": model.beta,
                "steps": cli.trainer.max_steps,
            }
        )
    assert said[0] == said[1]
    assert said[0]["policy"][0] == said[0]["reward"][0] == "bundled"
    assert len(said[0]["judges"]) == 2
