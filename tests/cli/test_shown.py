"""What `--print_config` shows is what is made, and gives the same run again."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser, Namespace

import grade_lightning.methods
from grade_lightning.data import TextDataModule
from grade_lightning.modules import AlignmentModule, TrainableModule
from grade_lightning.policies import Policy
from grade_lightning.rollouts import Sampler

filled = import_module("grade_lightning_cli.shown").filled
METHODS = {
    name: value
    for name, value in vars(grade_lightning.methods).items()
    if isinstance(value, type) and issubclass(value, TrainableModule)
}


def defaults(cls: type) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "it")
    return parser.get_defaults().it


def shown(method: type, **given: Any) -> Any:
    model = Namespace(class_path=f"{method.__module__}.{method.__name__}", init_args=defaults(method))
    for name, value in given.items():
        model.init_args[name] = value
    trainer = Namespace(logger=None, default_root_dir=None)
    for kind in ("train", "val", "test", "predict"):
        trainer[f"limit_{kind}_batches"] = 0.5 if kind == "val" else None
    for kind in ("checkpointing", "progress_bar", "model_summary"):
        trainer[f"enable_{kind}"] = None
    return filled(Namespace(trainer=trainer, model=model, data=defaults(TextDataModule)))


def differences(part: Any, made: object, place: str) -> list[str]:
    """Where a part is shown as something else than it is."""
    if not isinstance(part, Namespace) or "class_path" not in part:
        return []
    name = part.class_path.rpartition(".")[2]
    if type(made).__name__ != name:
        return [f"{place}: {name}, made is {type(made).__name__}"]
    found = []
    for key, value in vars(part.get("init_args") or Namespace()).items():
        if not hasattr(made, key):
            continue
        own = getattr(made, key)
        found += differences(value, own, f"{place}.{key}")
        if isinstance(value, int | float) and isinstance(own, int | float) and own != value:
            found.append(f"{place}.{key}: {value}, made is {own}")
    return found


@pytest.mark.parametrize("name", METHODS)
def test_the_parts_of_a_method_are_shown_as_they_are_made(name: str) -> None:
    config = shown(METHODS[name])
    method: Any = METHODS[name]
    made = method()
    parts = {key: value for key, value in vars(config.model.init_args).items() if key not in ("optimizer", "judges")}
    assert [line for key, part in parts.items() for line in differences(part, getattr(made, key, None), key)] == []
    none = {key for key, value in parts.items() if value is None}
    assert not none & {"policy", "reward", "sampler", "estimator", "tau", "selection", "pairwise_judge"}


def test_nested_parts_and_the_data_are_shown_as_they_are_made() -> None:
    config = shown(METHODS["RLOO"])
    init = config.model.init_args
    assert differences(init.policy.init_args.training_pass, Policy().training_pass, "pass") == []
    assert differences(init.sampler.init_args.engine, Sampler().engine, "engine") == []
    assert differences(config.data.source, TextDataModule().source, "source") == []
    assert init.sampler.init_args.engine.init_args.block == 16


def test_what_an_argument_decides() -> None:
    assert shown(METHODS["NGRPO"], best=2.5).model.init_args.selection.init_args.best == 2.5
    assert shown(METHODS["DPO"], pairs="data").model.init_args.reward is None
    assert shown(METHODS["KTO"], labels="data").model.init_args.reward is None


def test_what_is_given_stays() -> None:
    config = shown(METHODS["GradeSTE"], tau=Namespace(class_path="Exponential", init_args=Namespace(start=3.0)))
    assert config.model.init_args.tau.init_args.start == 3.0
    assert config.trainer.limit_val_batches == 0.5
    assert config.trainer.limit_test_batches == 1.0


def plain(node: Any) -> Any:
    """With bare names of classes, which are written in one way or another."""
    if isinstance(node, dict):
        found = {key: plain(value) for key, value in node.items()}
        if "class_path" in found:
            found = {"init_args": {}} | found | {"class_path": found["class_path"].rpartition(".")[2]}
        return found
    return [plain(value) for value in node] if isinstance(node, list) else node


def test_no_part_of_a_method_is_null_and_the_print_gives_the_same_again(printed_config: Any, tmp_path: Path) -> None:
    once = printed_config("--model=GradeSTE", "--model.hops=4")
    assert once["model"]["init_args"]["policy"]["init_args"]["path"] == "bundled"
    assert [judge["class_path"].rpartition(".")[2] for judge in once["model"]["init_args"]["judges"]] == 2 * [
        "FunctionReward"
    ]
    logger = once["trainer"]["logger"]["init_args"]
    assert (logger["save_dir"], logger["name"]) == ("runs", "GradeSTE")
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(once))
    again = printed_config(f"--config={path}")
    assert [key for key in once if plain(again[key]) != plain(once[key]) and key != "trainer"] == []
    assert {**again["trainer"], "logger": None} == {**once["trainer"], "logger": None}
    assert again["trainer"]["logger"]["init_args"].items() >= logger.items()


def test_all_methods_that_align_are_among_them() -> None:
    assert sum(issubclass(method, AlignmentModule) for method in METHODS.values()) > 20
