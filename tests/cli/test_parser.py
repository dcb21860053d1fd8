"""What becomes of jsonargparse's messages: one line, in the user's words."""

from importlib import import_module
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

import grade_lightning.methods  # so that they are known
from grade_lightning.data import Source
from grade_lightning.rewards import Reward
from grade_lightning.schedules import Schedule

parser = import_module("grade_lightning_cli.parser")  # its name once it is installed
choices, explain = parser.choices, parser.explain

UNKNOWN = """Parser key "{key}":

  - Expected a path but {value} either not accessible or invalid
  - Does not validate against any of the Union subtypes
  Subtypes: [<class '{base}'>, <class 'NoneType'>]
  Errors:
    - Expected a dot import path string: {value}
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: {value}"""


@pytest.mark.parametrize(
    ("key", "value", "base", "expected"),
    [
        (
            "model",
            "GradeSTF",
            "lightning.pytorch.core.module.LightningModule",
            "--model GradeSTF: no such class, did you mean 'GradeSTE'?; ours are ",
        ),
        ("model", "Xyz", "lightning.pytorch.core.module.LightningModule", "--model Xyz: no such class; ours are "),
        (
            "data.source",
            "LocalFile",
            "grade_lightning.data.sources.Source",
            "--data.source LocalFile: no such class, did you mean 'LocalFiles'?; ours are BundledProducts, ",
        ),
    ],
)
def test_an_unknown_class_is_answered_with_the_known_ones(key: str, value: str, base: str, expected: str) -> None:
    line = explain(UNKNOWN.format(key=key, value=value, base=base))
    assert line.startswith(expected)
    assert line.endswith(", or give a dotted path")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "Parser key \"trainer.max_steps\":\n  Expected a <class 'int'>. Got value: x",
            "--trainer.max_steps: Expected a <class 'int'>. Got value: x",
        ),
        ("Option 'betta' is not accepted", "Option 'betta' is not accepted"),
        ("unrecognized arguments: --modle=1", "unrecognized arguments: --modle=1"),
        ("the following arguments are required: model", "the following arguments are required: model"),
        (
            "Parser key \"config\": File does not exist: '/here/no.yaml'",
            "--config: File does not exist: '/here/no.yaml'",
        ),
    ],
)
def test_short_messages_stay(message: str, expected: str) -> None:
    assert explain(message) == expected


UNION = """Parser key "hops":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'int'>, typing.Literal['exact']]
  Errors:
    - Expected a <class 'int'>
    - Expected a typing.Literal['exact']
  Given value type: <class 'str'>
  Given value: some"""

IMPORT = """Parser key "model":

  - Expected a path but nowhere.Found either not accessible or invalid
  - Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'nowhere.Found':
        No module named 'nowhere'
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: nowhere.Found"""


@pytest.mark.parametrize(
    ("message", "parts"),
    [
        (UNION, ("<class 'int'>", "typing.Literal['exact']", "some")),
        (IMPORT, ("--model", "nowhere.Found", "No module named 'nowhere'")),
    ],
)
def test_long_messages_are_one_line_with_what_matters(message: str, parts: tuple[str, ...]) -> None:
    line = explain(message)
    assert "\n" not in line
    assert [part for part in parts if part not in line] == []
    assert "Subtypes" not in line
    assert "Errors" not in line
    assert "NoneType" not in line


def test_nothing_is_said_twice() -> None:
    assert explain('Parser key "a":\n  - Wrong.\n  - Wrong.') == "--a: Wrong."
    assert explain('Parser key "a": No \'x\'\n  - Parser key "a": No "x"') == "--a: No 'x'"


def test_what_is_no_file_is_said_where_nothing_else_is() -> None:
    assert explain('Parser key "a":\n  Expected a path but x\n  Expected a number') == "--a: Expected a number"
    assert explain('Parser key "a":\n  Expected a path but x') == "--a: Expected a path but x"


def test_choices_are_ours_and_can_be_made() -> None:
    class Foreign(Schedule):
        def value(self, progress: float) -> float:
            return progress

    assert choices(Schedule) == ["Constant", "Cosine", "Exponential", "Linear"]
    assert choices(Source) == [
        *("BundledProducts", "BundledReviews", "BundledSums", "HubDataset", "InMemory", "LocalFiles")
    ]
    assert choices(Reward) == [
        *("ClassifierReward", "Constrained", "ExactMatch", "FormatReward", "FunctionReward"),
        *("GroupNormalizedSum", "ImprovementReward", "JSONSchema", "JudgeReward", "MathAnswer", "NoReward"),
        *("NumericMatch", "RemoteJudge", "SequenceClassifierReward", "SimilarityReward"),
        *("TranslatedReward", "TurnRewards", "WeightedSum"),
    ]
    methods = [name for name, value in vars(grade_lightning.methods).items() if isinstance(value, type)]
    assert choices(parser.BASES["model"]) == sorted(methods)


@pytest.mark.parametrize(
    ("message", "given", "expected"),
    [
        ("Option 'lr' is not accepted", "--model.lr=1", "--model.optimizer.lr"),
        ("unrecognized arguments: --data.lr 2", "--data.lr", "--model.optimizer.lr"),
        ("unrecognized arguments: --lorra.r=2", "--model.policy.lorra.r", "--model.policy.lora.r"),
        ("Option 'batch_size' is not accepted", "--model.batch_size", "--data.batch_size"),
    ],
)
def test_an_option_that_is_elsewhere(message: str, given: str, expected: str) -> None:
    option = given.partition("=")[0]
    assert explain(message, [given]) == f"{option}: no such option, did you mean {expected}?"


@pytest.mark.parametrize("text", ["###", "####\\s*(\\S+)", "\n#"])
def test_a_text_that_begins_like_a_comment_is_a_text(text: str, tmp_path: Path) -> None:
    """Such as a pattern for GSM8K's answers, or a stop string: it was read as null."""
    ours = parser.Parser(parser_mode="yaml")
    ours.add_argument("-c", "--config", action="config")
    ours.add_argument("--stop", type=str | list[str] | None)
    assert ours.parse_args(["--stop", text]).stop == text
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"stop": text}))
    assert ours.parse_args(["-c", str(tmp_path / "config.yaml")]).stop == text
    assert ours.parse_args(["--stop", "null"]).stop is None
