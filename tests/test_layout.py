"""A test file here for a file there; what is tested elsewhere is listed with the place."""

import inspect
from pathlib import Path

import pytest

import grade_lightning.methods
from grade_lightning.modules import PolicyGradientModule

POLICY_GRADIENTS = [
    value
    for value in vars(grade_lightning.methods).values()
    if isinstance(value, type) and issubclass(value, PolicyGradientModule)
]
ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "grade_lightning/advantages.py": "tests/methods/test_ppo.py tests/functional/test_advantages.py",
    "grade_lightning/callbacks/checkpoint.py": "tests/cli/test_checkpoints.py",
    "grade_lightning/callbacks/gradient_variance.py": "tests/callbacks/test_gradient_variance_passive.py "
    "tests/callbacks/test_gradient_variance_probe.py",
    "grade_lightning/callbacks/noise_figure.py": "tests/callbacks/test_gradient_variance_output.py",
    "grade_lightning/callbacks/signals.py": "tests/cli/test_resume.py tests/test_cluster.py",
    "grade_lightning/credit/base.py": "tests/test_credit.py",
    "grade_lightning/credit/prefix.py": "tests/test_credit.py",
    "grade_lightning/credit/tokens.py": "tests/test_credit.py",
    "grade_lightning/curvature.py": "tests/methods/test_capo.py",
    "grade_lightning/data/batches.py": "tests/data/test_datamodule.py",
    "grade_lightning/data/loading.py": "tests/data/test_datamodule.py",
    "grade_lightning/data/views.py": "tests/data/test_datamodule.py",
    "grade_lightning/distributed.py": "tests/cli/test_ddp.py tests/cli/test_fsdp.py",
    "grade_lightning/entropy_control.py": "tests/methods/test_aepo.py",
    "grade_lightning/errors.py": "tests/test_ranges.py tests/cli/test_errors.py",
    "grade_lightning/estimators.py": "tests/functional/test_estimators.py tests/methods/test_grade_ste.py",
    "grade_lightning/gates.py": "tests/functional/test_gates.py tests/modules/test_policy_gradient.py",
    "grade_lightning/levels.py": "tests/functional/test_ratios.py tests/modules/test_seams.py",
    "grade_lightning/modules/alignment.py": "tests/methods/test_contract.py",
    "grade_lightning/modules/blending.py": "tests/test_blends.py",
    "grade_lightning/modules/evaluation.py": "tests/cli/test_run.py tests/cli/test_ddp.py",
    "grade_lightning/modules/given.py": "tests/modules/test_preference.py tests/modules/test_unpaired.py",
    "grade_lightning/modules/measuring.py": "tests/modules/test_policy_gradient.py tests/test_kl.py",
    "grade_lightning/modules/metrics.py": "tests/methods/test_contract.py tests/cli/test_ddp.py",
    "grade_lightning/modules/remembering.py": "tests/test_stateful.py tests/test_constraints.py",
    "grade_lightning/modules/selecting.py": "tests/modules/test_seams.py tests/modules/test_drawing.py",
    "grade_lightning/records/evaluation.py": "tests/cli/test_run.py",
    "grade_lightning/records/experience.py": "tests/modules/test_window.py tests/modules/test_seams.py",
    "grade_lightning/records/prompts.py": "tests/test_memory.py tests/rollouts/test_turns.py",
    "grade_lightning/records/relaxed_rollout.py": "tests/rollouts/test_relaxed.py",
    "grade_lightning/records/step_output.py": "tests/methods/test_contract.py",
    "grade_lightning/records/token_stats.py": "tests/modules/test_window.py tests/test_kl.py",
    "grade_lightning/rewards/background.py": "tests/rewards/test_functions.py tests/modules/test_drawing.py",
    "grade_lightning/rewards/conversations.py": "tests/rewards/test_sequence_reward.py",
    "grade_lightning/rewards/network.py": "tests/rewards/test_classifier.py tests/rewards/test_sequence_reward.py",
    "grade_lightning/rewards/no_reward.py": "tests/modules/test_preference.py",
    "grade_lightning/rewards/retokenize.py": "tests/rewards/test_classifier.py",
    "grade_lightning/rewards/sequence_classifier.py": "tests/rewards/test_sequence_reward.py",
    "grade_lightning/rollouts/engine.py": "tests/modules/test_seams.py",
    "grade_lightning/rollouts/environment.py": "tests/rollouts/test_turns.py tests/rollouts/test_turns_at_once.py",
    "grade_lightning/rollouts/episode.py": "tests/rollouts/test_turns.py",
    "grade_lightning/schedules.py": "tests/methods/test_grade.py tests/test_ranges.py",
    "grade_lightning/waiting.py": "tests/rewards/test_functions.py tests/rollouts/test_verifiers.py",
    "grade_lightning/strategies.py": "tests/cli/test_fsdp.py",
    "cli/compare/options.py": "tests/cli/compare/test_plan.py",
    "cli/compare/progress.py": "tests/cli/compare/test_work.py",
    "cli/report/absent.py": "tests/cli/report/test_curves.py tests/cli/report/test_estimates.py",
    "cli/report/figures.py": "tests/cli/report/test_report.py",
    "cli/report/files.py": "tests/cli/report/test_reading.py",
    "cli/report/main.py": "tests/cli/report/test_report.py",
    "cli/report/page.py": "tests/cli/report/test_report.py",
    "cli/report/runs.py": "tests/cli/report/test_reading.py",
    "cli/report/wording.py": "tests/cli/report/test_report.py",
}
FILES = [
    (path.relative_to(ROOT).as_posix(), ROOT / tests / path.parent.relative_to(ROOT / package) / f"test_{path.name}")
    for package, tests in (("grade_lightning", "tests"), ("cli", "tests/cli"))
    for path in sorted((ROOT / package).rglob("*.py"))
    if not path.name.startswith("__")
]


@pytest.mark.parametrize(("file", "test"), FILES, ids=[file for file, _ in FILES])
def test_a_file_has_its_tests_beside_it_or_where_the_list_says(file: str, test: Path) -> None:
    """All methods are in the contract test, whether they have a file of their own or not."""
    elsewhere = ELSEWHERE.get(file, "tests/methods/test_contract.py" if "/methods/" in file else "")
    assert test.exists() or elsewhere, f"{test.relative_to(ROOT)} is missing"
    assert all((ROOT / place).exists() for place in elsewhere.split())


def test_the_list_names_files_that_exist() -> None:
    assert ELSEWHERE.keys() <= {file for file, _ in FILES}


@pytest.mark.parametrize("method", POLICY_GRADIENTS, ids=lambda method: method.__name__)
def test_a_policy_gradient_is_a_short_file(method: type[PolicyGradientModule]) -> None:
    """With its docstring; what does not fit is a part or mathematics, and has a room of its own."""
    assert 15 <= len(Path(inspect.getfile(method)).read_text().splitlines()) <= 90
