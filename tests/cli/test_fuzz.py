"""Configurations with mistakes in them: each is understood, or refused in one line with status 2."""

import copy
import io
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import strategies as st

import grade_lightning.bundled
import grade_lightning.methods
from tests.cli.conftest import Shelf
from tests.cli.test_errors import PROGRESS
from tests.fuzz import cases, check_all

config, guard = (import_module(f"grade_lightning_cli.{name}") for name in ("config", "guard"))
METHODS = sorted(name for name, value in vars(grade_lightning.methods).items() if isinstance(value, type))
RULE = "grade_lightning.data.reviews.grammar_valid"
TREE: dict[str, Any] = {
    "seed_everything": 3,
    "ckpt_path": None,
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 2,
        "max_epochs": None,
        "precision": "32-true",
        "gradient_clip_val": 1.0,
        "accumulate_grad_batches": 1,
        "devices": 1,
        "limit_val_batches": 1.0,
        "val_check_interval": 10,
        "max_time": "00:01:00:00",
        "callbacks": [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}],
    },
    "model": {
        "class_path": "GRPO",
        "init_args": {
            "policy": {"path": "policy", "dtype": "float32", "lora": {"r": 2, "target_modules": ["c_attn"]}},
            "reward": {
                "class_path": "WeightedSum",
                "init_args": {
                    "rewards": [{"class_path": "FunctionReward", "init_args": {"function": RULE, "timeout": 5.0}}],
                    "weights": [1.0],
                },
            },
            "judges": [{"class_path": "FunctionReward", "init_args": {"function": RULE}}],
            "sampler": {"max_new_tokens": 4, "min_new_tokens": 0, "top_k": 5, "top_p": 0.9, "temperature": 1.0},
            "kl": {"beta": 0.1, "estimator": "k3", "placement": "loss", "target": 3.0},
            "epsilon": 0.2,
            "epochs": 2,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}},
            "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.ConstantLR", "init_args": {"factor": 1.0}},
        },
    },
    "data": {
        "source": {"class_path": "LocalFiles", "init_args": {"train": "reviews.csv", "test": None}},
        "batch_size": 4,
        "test_size": None,
        "seed": 1,
    },
    "checkpoint": {"every_n_train_steps": 5, "save_top_k": 1, "save_last": True, "train_time_interval": None},
    "completions": {"rows": 2},
    "gradient_variance": {"sketch": None, "window": 5},
    "export": {"enabled": False},
}

words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=6) | st.sampled_from(
    ["", "x", "-1", "1e400", "null", "{", "[", "a: b: c", "&a [*a]", "!!python/object:os.system x", "true", "0x1F", "/"]
)
paths = st.sampled_from(
    ["Nothing", "no.where", "GradeSTE", "NoReward", "KL", "torch.nn.Linear", "torch.optim.SGD", "os.path", "print", "3"]
)
scalars = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 2, 10**30, -(10**9)])
    | st.sampled_from([0.5, -1e-3, 1e300, float("nan"), float("inf")])
    | words
    | paths
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(words, inner, max_size=2)
        | st.fixed_dictionaries({"class_path": paths | inner}, optional={"init_args": inner})
        | st.fixed_dictionaries({"init_args": inner})
    ),
    max_leaves=4,
)


def places(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each value."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*place, key)
        yield from places(value, (*place, key))


@st.composite
def misspelt(draw: st.DrawFn, word: str) -> str:
    at = draw(st.integers(0, max(0, len(word) - 1)))
    slips = [word[:at] + word[at + 1 :], word[:at] + word[at : at + 1] + word[at:], word.upper()]
    return draw(st.sampled_from(slips) | words)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """The configuration above with one to three mistakes."""
    tree = copy.deepcopy(TREE)
    tree["model"]["class_path"] = draw(st.just("GRPO") | st.sampled_from(METHODS))
    for _ in range(draw(st.integers(1, 3))):
        *place, key = draw(st.sampled_from(list(places(tree))))
        parent: Any = tree
        for step in place:
            parent = parent[step]
        value = parent.pop(key)
        kind = draw(st.sampled_from(["value", "value", "value", "gone", "listed", "misspelt"]))
        if isinstance(parent, list):
            parent.insert(key, draw(values) if kind != "listed" else [value])
        elif kind == "misspelt":
            parent[draw(misspelt(key))] = value
        elif kind != "gone":
            parent[key] = draw(values) if kind == "value" else [value]
    return tree


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Its YAML; sometimes with a slip of the pen, a line twice, an anchor, or not all of it."""
    text: str = yaml.safe_dump(draw(trees()) if draw(st.booleans()) else TREE, allow_unicode=True, sort_keys=False)
    lines = text.splitlines(keepends=True)
    line, at = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(text)))
    return draw(
        st.sampled_from(
            [
                text,
                text[:at],
                "".join([*lines[: line + 1], *lines[line:]]),
                "".join([*lines[:line], *lines[line + 1 :]]),
                f"anchor: &anchor {{a: 1}}\n{text}",
                text.replace("reward:", "reward: &r", 1).replace("judges:", "judges:\n    - *r", 1),
                text.replace("  ", "\t", 1),
            ]
        )
        | st.sampled_from("{}[]:,&*#?|-<>=!%@`'\"\n\t é🙂").map(lambda slip: text[:at] + slip + text[at:])
    )


@pytest.fixture
def refused(shelf: Shelf, shell: pytest.MonkeyPatch) -> Any:
    """What is said of a configuration, or None if it is understood. No model is loaded."""
    shell.setattr(sys, "argv", ["grade-fit"])
    shell.setattr(grade_lightning.bundled, "prepare", lambda: None)
    Path("policy").symlink_to(shelf.policy)
    Path("reviews.csv").symlink_to(shelf.reviews)

    def refused(*args: str) -> str | None:
        err, status = io.StringIO(), None
        with redirect_stderr(err), redirect_stdout(io.StringIO()):
            try:
                with guard.user_errors("grade-fit"):
                    config.build(list(args))
            except SystemExit as left:
                status = left.code
        if status is None:
            return None
        assert status == 2
        said = [line for line in err.getvalue().splitlines() if line.strip() and not PROGRESS.match(line)]
        (line,) = [text for text in said if text != "Seed set to 3"]
        assert line.startswith("grade-fit: error: ")
        assert len(line) > len("grade-fit: error: ") + 8
        return line

    return refused


@cases(15, 250)
def test_files(count: int, refused: Any) -> None:
    def check(text: str) -> None:
        Path("drawn.yaml").write_text(text, encoding="utf-8")
        refused("--config=drawn.yaml")

    for text, says in (("", "--config drawn.yaml"), ("null", "--config drawn.yaml"), (yaml.safe_dump(TREE), "")):
        Path("drawn.yaml").write_text(text)
        assert says in (refused("--model=GRPO", "--config=drawn.yaml") or "")
    check_all(count, check, texts())


@st.composite
def options(draw: st.DrawFn) -> str:
    """One option of the configuration above, perhaps misspelt, and a value for it."""
    place = draw(st.sampled_from(list(places(TREE))))
    key = ".".join(str(part) for part in place if part not in ("init_args", 0))
    key = draw(st.just(key) | st.just(key) | misspelt(key))
    value = draw(values)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"--{key}{draw(st.sampled_from(['', '', '', '+']))}={text}"


@cases(15, 400)
def test_arguments(count: int, refused: Any) -> None:
    whole = "--config=whole.yaml"
    Path("whole.yaml").write_text(yaml.safe_dump(TREE))

    def check(before: list[str], after: list[str]) -> None:
        refused(*before, whole, *after)

    check_all(count, check, st.lists(options(), max_size=1), st.lists(options(), min_size=1, max_size=3))
