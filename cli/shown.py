"""What `--print_config` shows where nothing was given: the parts that a method makes for itself, the trainer's values.

A configuration that is printed, and given again, is the same run. What stays null is not set: no judge, no limit, or
what only the data or the machine can say.
"""

from typing import Any

from jsonargparse import ArgumentParser, Namespace

import grade_lightning
from grade_lightning.data import reviews
from grade_lightning.policies import WholePass

PARTS: dict[str, str | None] = {
    "policy": "Policy",
    "reward": "ClassifierReward",
    "RewardPreference.reward": None,
    "sampler": "Sampler",
    "engine": "TransformersEngine",
    "estimator": "StraightThrough",
    "tau": "Constant",
    "Grade.tau": "Linear",
    "selection": "Selection",
    "NGRPO.selection": "DropSolved",
    "pairwise_judge": "RewardPreference",
    "source": "BundledReviews",
    "training_pass": "WholePass",
}
"""Class of an argument that is None, of one class or of all; a test compares it with what is made."""
TRAINER: dict[str, Any] = {f"limit_{stage}_batches": 1.0 for stage in ("train", "val", "test", "predict")}
TRAINER |= {f"enable_{what}": True for what in ("checkpointing", "progress_bar", "model_summary")}


def filled(config: Namespace) -> Namespace:
    """A copy of a configuration with the values that are in force instead of null."""
    shown = config.clone()
    for name, value in TRAINER.items():
        if "trainer" in shown and shown.trainer[name] is None:
            shown.trainer[name] = value
    model = shown.get("model")
    if not isinstance(model, Namespace):
        return shown
    if shown.trainer.logger in (None, True):
        name = model.class_path.rpartition(".")[2]
        shown.trainer.logger = tensorboard(str(shown.trainer.default_root_dir or "runs"), name)
    if shown.data.source is None:
        if "judges" in model.init_args:
            model.init_args["judges"] = model.init_args["judges"] or grammar_judges()
        shown.data["source"] = _part("data", "source")
    _fill(model)
    return shown


def grammar_judges() -> list[Namespace]:
    """The bundled reviews come with the truth about themselves: show it beside the reward."""
    functions = (reviews.grammar_positive, reviews.grammar_valid)
    return [
        Namespace(
            class_path="grade_lightning.rewards.FunctionReward",
            init_args=Namespace(function=function, timeout=None, background=False),
        )
        for function in functions
    ]


def tensorboard(folder: str, name: str) -> Namespace:
    """The logger of a run that was given none."""
    return Namespace(
        class_path="lightning.pytorch.loggers.TensorBoardLogger",
        init_args=Namespace(save_dir=folder, name=name, version=None, default_hp_metric=False),
    )


def _fill(part: Any) -> None:
    if not isinstance(part, Namespace):
        return
    inner = part.get("init_args")
    for name, value in list(vars(inner if isinstance(inner, Namespace) else part).items()):
        if value is not None:
            _fill(value)
        elif isinstance(inner, Namespace) and (made := _part(part.class_path.rpartition(".")[2], name, inner)):
            inner[name] = made


def _part(owner: str, name: str, given: Namespace | None = None) -> Namespace | None:
    """The part that an owner makes for itself; None if it makes none."""
    given = given or Namespace()
    from_data = "data" in (given.get("pairs"), given.get("labels")) or given.get("pairwise_judge") is not None
    if name == "reward" and from_data:
        return None
    class_name = PARTS.get(f"{owner}.{name}", PARTS.get(name))
    if class_name is None:
        return None
    cls = WholePass if class_name == "WholePass" else getattr(grade_lightning, class_name)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "part")
    part = Namespace(class_path=f"{cls.__module__}.{cls.__name__}")
    arguments = parser.get_defaults().get("part")
    if arguments is not None:
        part["init_args"] = arguments.clone()
        if class_name == "DropSolved":  # of the method's own best
            part["init_args"]["best"] = given["best"]
    _fill(part)
    return part
