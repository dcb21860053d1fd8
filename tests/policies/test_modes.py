"""Evaluation mode for a while."""

from torch import nn

from grade_lightning.policies.modes import evaluating


def test_each_part_has_its_own_mode_again() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    with evaluating(model) as same:
        assert same is model
        assert not any(part.training for part in model.modules())
    assert [part.training for part in model.modules()] == [True, True, False, False]
