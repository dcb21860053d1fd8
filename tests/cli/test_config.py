"""Configurations, and parts of one's own that they name."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM

from grade_lightning.policies import passes, sharing
from tests.cli.conftest import OFTEN, Finished, Run, Shelf, assert_same, checkpoint, events, scalar, version, weights

# ---- configurations -------------------------------------------------------------------------------------------


def test_the_printed_configuration_is_the_run(
    run: Run, printed_config: Any, finished: Finished, shelf: Shelf, tmp_path: Path
) -> None:
    path = tmp_path / "printed.yaml"
    path.write_text(yaml.safe_dump(printed_config(*shelf.all, *OFTEN)))
    run("fit", f"--config={path}")
    assert_same(weights(checkpoint(version())), weights(finished.checkpoint))


def test_the_saved_configuration_is_the_run(run: Run, finished: Finished) -> None:
    run("fit", f"--config={finished.folder / 'config.yaml'}")
    assert_same(weights(checkpoint(version())), weights(finished.checkpoint))


@pytest.mark.slow
def test_all_commands_read_the_same_configuration(run: Run, finished: Finished) -> None:
    for command in ("validate", "test", "predict"):
        run(command, f"--config={finished.folder / 'config.yaml'}", f"--ckpt_path={finished.checkpoint}")


CONFIG = "model: {init_args: {beta: 0.5, hops: 4}}\ntrainer: {max_steps: 17}\n"


@pytest.mark.parametrize("model", [["--model", "GradeSTE"], ["--model=GradeSTE"]], ids=["two words", "one"])
@pytest.mark.parametrize("config", [["--config", "c.yaml"], ["-c=c.yaml"]], ids=["--config", "-c"])
def test_order_of_model_and_config(model: list[str], config: list[str], printed_config: Any) -> None:
    Path("c.yaml").write_text(CONFIG)
    for args in itertools.permutations([model, config]):
        found = printed_config(*itertools.chain(*args))
        assert found["model"]["class_path"] == "grade_lightning.GradeSTE"
        assert found["model"]["init_args"]["beta"] == 0.5
        assert found["model"]["init_args"]["hops"] == 4
        assert found["trainer"]["max_steps"] == 17
    for order in ([*model, *config, "--model.beta=0.25"], [*config, *model, "--model.beta=0.25"]):
        assert printed_config(*order)["model"]["init_args"]["beta"] == 0.25


def test_later_configurations_win(printed_config: Any) -> None:
    Path("c.yaml").write_text(CONFIG)
    Path("d.yaml").write_text("trainer: {max_steps: 5}\n")
    found = printed_config("--config=c.yaml", "--model=GradeSTE", "--config=d.yaml")
    assert found["trainer"]["max_steps"] == 5
    assert found["model"]["init_args"]["beta"] == 0.5


def test_a_configuration_of_another_method_keeps_what_fits(printed_config: Any) -> None:
    """A recipe without a method is for all of them."""
    Path("c.yaml").write_text("model: {init_args: {policy: {path: some/model}}}\n")
    for method in ("GradeSTE", "SupervisedFineTuning"):
        found = printed_config("--config=c.yaml", f"--model={method}")["model"]
        assert found["class_path"].endswith(f".{method}")
        assert found["init_args"]["policy"]["init_args"]["path"] == "some/model"


# ---- parts of one's own ---------------------------------------------------------------------------------------


def test_model_reward_and_source_of_ones_own(run: Run, own: str, shelf: Shelf) -> None:
    sizes = [arg for arg in shelf.data if not arg.startswith("--data.source")]
    args = [arg for arg in shelf.grade if not arg.startswith(("--data.source", "--model=", "--model.reward"))]
    mine = [
        f"--model={own}.Mine",
        "--model.extra=2.5",
        f"--model.reward={own}.Late",
        "--model.reward.above=12",
        f"--data.source={own}.Words",
        "--data.source.rows=80",
    ]
    run("fit", *mine, *args, *sizes, *OFTEN)
    assert scalar(version(method="Mine"), "train/extra") == [2.5] * 4
    assert 0 < scalar(version(method="Mine"), "val/rewards/Late")[0] < 1
    run("test", *mine, *args, *sizes, f"--ckpt_path={checkpoint(version(method='Mine'))}")


@pytest.mark.slow
def test_judges_in_a_file(run: Run, own: str, shelf: Shelf) -> None:
    Path("judges.yaml").write_text(
        "model: {init_args: {judges: ["
        f"{{class_path: FunctionReward, init_args: {{function: {own}.words}}}}, "
        f"{{class_path: FunctionReward, init_args: "
        f"{{function: {{class_path: {own}.Brevity, init_args: {{most: 3}}}}, timeout: 60}}}}, "
        f"{{class_path: {own}.Late, init_args: {{above: 9}}}}]}}}}\n"
    )
    run("fit", "--config=judges.yaml", *shelf.all, *OFTEN)
    assert 0 < scalar(version(), "val/rewards/words")[0] <= 6
    assert 0 <= scalar(version(), "val/rewards/Brevity")[0] <= 1
    assert 0 < scalar(version(), "val/rewards/Late")[0] < 1
    assert scalar(version(), "val/rewards/classifier") == scalar(version(), "val/reward")


def test_optimizer_and_scheduler_by_class_path(run: Run, shelf: Shelf) -> None:
    chosen = [
        "--model.optimizer=torch.optim.SGD",
        "--model.optimizer.lr=0.5",
        "--model.optimizer.momentum=0.25",
        "--model.lr_scheduler=torch.optim.lr_scheduler.ExponentialLR",
        "--model.lr_scheduler.gamma=0.5",
    ]
    run("fit", *shelf.all, *OFTEN, *chosen)
    (state,) = torch.load(checkpoint(version()), weights_only=True)["optimizer_states"]
    (group,) = state["param_groups"]
    assert (group["lr"], group["momentum"]) == (0.5**5, 0.25)
    trained = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(shelf.policy).parameters())
    assert sum(s["momentum_buffer"].numel() for s in state["state"].values()) == trained


def test_callbacks_of_ones_own_are_beside_ours(run: Run, shelf: Shelf) -> None:
    run("fit", *shelf.all, "--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.filename=mine", *OFTEN)
    assert checkpoint(version()).name == "mine.ckpt"
    assert (version() / "export").is_dir()
    assert scalar(version(), "val/reward")


@pytest.mark.slow
def test_nested_parts_of_ours(run: Run, shelf: Shelf) -> None:
    parts = [
        "--model.estimator=Gumbel",
        "--model.estimator.draws=2",
        "--model.tau=Linear",
        "--model.tau.start=2.0",
        "--model.tau.end=1.0",
        "--model.hops=exact",
        "--model.kl_prefix=full",
        "--model.sampler.top_k=5",
        "--model.reward.output=logit",
    ]
    run("fit", *shelf.all, *OFTEN, *parts)
    assert scalar(version(), "train/tau") == pytest.approx([2.0, 1.75, 1.5, 1.25])
    assert max(scalar(version(), "train/hop_residual")) == pytest.approx(0, abs=1e-6)


AGGREGATION = "grade_lightning.functional.aggregation.sequence_mean"
CRITIC = {"class_path": "Critic", "init_args": {"aggregate": AGGREGATION, "coefficient": 0.5}}
PARTS: dict[str, tuple[list[str], Any, str]] = {
    "selection": (
        ["--model.selection=DynamicSampling", "--model.selection.max_retries=1"],
        {"class_path": "DynamicSampling", "init_args": {"max_retries": 1}},
        "train/reward_calls",
    ),
    "length_penalty": (
        ["--model.length_penalty=OverlongPenalty", "--model.length_penalty.buffer=5"],
        {"class_path": "OverlongPenalty", "init_args": {"buffer": 5}},
        "rewards/overlong",
    ),
    "critic": (
        ["--model.critic=Critic", f"--model.critic.aggregate={AGGREGATION}", "--model.critic.coefficient=0.5"],
        CRITIC,
        "value/loss",
    ),
    "terms": (
        ["--model.terms+=tests.modules.seams.Imitation", "--model.terms.weight=0.5"],
        [{"class_path": "tests.modules.seams.Imitation", "init_args": {"weight": 0.5}}],
        "train/imitation",
    ),
}


@pytest.mark.parametrize(
    "part", [part if part == "critic" else pytest.param(part, marks=pytest.mark.slow) for part in PARTS]
)
def test_a_part_of_a_policy_gradient_by_flag_and_by_file(part: str, run: Run, own: str, shelf: Shelf) -> None:
    """Both train alike, and otherwise than without it; here the groups are uniform, so the selection draws again."""
    flags, written, figure = PARTS[part]
    Path("c.yaml").write_text(yaml.safe_dump({"model": {"init_args": {part: written}}}))
    reward = "at_most_two" if part == "selection" else "words"
    args = [*(arg for arg in shelf.grade if arg != "--model=GradeSTE"), "--model=GRPO", "--model.num_generations=4"]
    args += ["--model.reward=FunctionReward", f"--model.reward.function={own}.{reward}"]
    args += ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.log_every_n_steps=1"]
    runs = [version(number, "GRPO") for number in range(3)]
    for given in (flags, ["--config=c.yaml"], []):
        run("fit", *args, *given)
    by_flag, by_file, without = (weights(checkpoint(folder)) for folder in runs)
    assert_same(by_flag, by_file)
    found = [scalar(folder, figure) if figure in events(folder).Tags()["scalars"] else [0.0] for folder in runs]
    assert found[0] == found[1] != found[2]
    if part == "critic":
        assert by_flag.keys() > without.keys()


@pytest.mark.slow
def test_a_critic_needs_no_arguments(run: Run, own: str, shelf: Shelf) -> None:
    """Its tokens weigh the same, as in PPO; the configuration that is saved makes the same run."""
    args = [*(arg for arg in shelf.grade if arg != "--model=GradeSTE"), "--model=RLOO", "--model.critic=Critic"]
    args += ["--model.reward=FunctionReward", f"--model.reward.function={own}.words"]
    run("fit", *args, "--trainer.max_steps=1", "--trainer.log_every_n_steps=1")
    run("fit", f"--config={version(method='RLOO') / 'config.yaml'}")
    one, two = (version(number, "RLOO") for number in range(2))
    assert_same(weights(checkpoint(one)), weights(checkpoint(two)))
    assert scalar(one, "value/loss") == scalar(two, "value/loss")


@pytest.mark.slow
def test_an_environment_by_flag(run: Run, own: str, shelf: Shelf) -> None:
    """Its answer, of three tokens, is in no length."""
    args = [*(arg for arg in shelf.grade if arg != "--model=GradeSTE"), "--model=RLOO"]
    args += ["--model.reward=FunctionReward", f"--model.reward.function={own}.words"]
    args += ["--model.sampler.engine=Turns", "--model.sampler.engine.environment=tests.modules.seams.Tool"]
    args += ["--model.sampler.engine.turn_tokens=1", "--trainer.max_steps=1", "--trainer.log_every_n_steps=1"]
    run("fit", *args)
    assert scalar(version(method="RLOO"), "train/response_length") == [2]


def test_prompts_are_shared_by_a_flag(run: Run, own: str, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the policy, its reference and the first batch's check of both."""
    shapes: list[torch.Size] = []

    def watched(network: Any, ids: torch.Tensor, packing: Any) -> torch.Tensor:
        shapes.append(packing.source.shape)
        return sharing.packed_hidden(network, ids, packing)

    monkeypatch.setattr(passes, "packed_hidden", watched)
    args = [*(arg for arg in shelf.grade if arg != "--model=GradeSTE"), "--model=RLOO", "--model.num_generations=4"]
    args += ["--model.reward=FunctionReward", f"--model.reward.function={own}.words"]
    args += ["--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    run("fit", *args, "--model.policy.training_pass=SharedPrefixPass")
    assert len(shapes) == 4
