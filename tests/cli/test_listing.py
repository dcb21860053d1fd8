"""The list of what there is."""

from importlib import import_module

import pytest

import grade_lightning
from grade_lightning.modules import TrainableModule

listing = import_module("grade_lightning_cli.listing")


def test_every_method_reward_and_engine_is_listed_with_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    listing.main([])
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.split()}
    methods = [
        name
        for name in grade_lightning.__all__
        if issubclass(cls if isinstance(cls := getattr(grade_lightning, name), type) else object, TrainableModule)
        and cls.__module__.startswith("grade_lightning.methods")
    ]
    assert len(methods) > 30
    for name in [*methods, "FunctionReward", "RewardPreference", "TransformersEngine", "LocalFiles"]:
        assert len(rows[name]) > 2, name


@pytest.mark.parametrize("base", [base for _, base in listing.KINDS.values()])
def test_a_line_is_a_sentence(base: type) -> None:
    assert [name for name, said in listing.lines(base) if not said or "``" in said] == []
