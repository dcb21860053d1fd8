"""What fit, validate, test and predict leave behind, entered as a shell enters them."""

import json
import os
import re
import shutil
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.cli.conftest import (
    OFTEN,
    Finished,
    Run,
    Shelf,
    assert_same,
    checkpoint,
    events,
    full_and_lora,
    scalar,
    version,
    weights,
)
from tests.rewards.sequences import words, write_classifier

DOCS = Path(__file__).parents[2] / "docs"


# ---- fit ------------------------------------------------------------------------------------------------------


def test_fit_leaves_a_log_a_config_a_checkpoint_and_a_model(finished: Finished) -> None:
    kinds = {path.name.split(".")[0] for path in finished.folder.iterdir()}
    assert kinds - {"hparams", "test"} == {"events", "config", "checkpoints", "export"}
    assert yaml.safe_load((finished.folder / "config.yaml").read_text())["model"]["class_path"].endswith(".GradeSTE")
    assert torch.load(finished.checkpoint, weights_only=True)["global_step"] == 4


def test_the_export_is_the_trained_model(finished: Finished) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished.folder / "export")
    tokenizer = AutoTokenizer.from_pretrained(finished.folder / "export")
    assert tokenizer("w3 w4")["input_ids"] == [3, 4]
    state = {f"policy.model.{name}": value for name, value in model.state_dict().items()}
    saved = weights(finished.checkpoint)
    assert_same({name: state[name] for name in saved}, saved)


def test_the_checkpoint_holds_neither_reference_nor_reward(finished: Finished, shelf: Shelf) -> None:
    saved = weights(finished.checkpoint)
    assert {name.partition(".model.")[0] for name in saved} == {"policy"}
    start = AutoModelForCausalLM.from_pretrained(shelf.policy).state_dict()
    assert any(not torch.equal(value, start[name.removeprefix("policy.model.")]) for name, value in saved.items())


def test_the_table_at_the_end(finished: Finished) -> None:
    for text in ("before (step 0)", "after (step 4)", "The same prompts", "time: ", "tensorboard --logdir runs"):
        assert text in finished.out
    rows = {line.split("│")[1].strip() for line in finished.out.splitlines() if line.count("│") == 4}
    assert {"reward", "kl", "entropy", "response_length"} <= rows
    assert "model: runs/GradeSTE/version_0/export" in finished.out


def documented(kind: str) -> set[str]:
    """Names in the table of docs/metrics.md, without the test stage."""
    names = set()
    for line in (DOCS / "metrics.md").read_text().splitlines():
        logged_by = line.rstrip("| ").rpartition("|")[2]  # with those of the method and of the callback
        if line.startswith("| `") and (line.count("|") == 4 or re.search("GradeSTE|GradientVariance", logged_by)):
            first, unit = line.split("|")[1:3]
            if {"text": "text", "histogram": "histogram"}.get(unit.strip(), "scalar") == kind:
                names.update(re.findall(r"`([^`]+)`", first))
    stages = {"{stage}": ("train", "val", "test"), "{val,test}": ("val", "test")}
    expanded = set()
    for name in names:
        for stage in next((stages[key] for key in stages if key in name), ("",)):
            plain = re.sub(r"\{(stage|val,test)\}", stage, name)
            expanded.add(plain.replace("{name}", "classifier"))
    assert expanded
    return expanded


def test_everything_in_the_docs_is_logged_and_everything_logged_is_in_the_docs(
    run: Run, finished: Finished, shelf: Shelf
) -> None:
    run("test", *shelf.all, f"--ckpt_path={finished.checkpoint}")
    tags = [events(folder).Tags() for folder in (finished.folder, version())]
    run("fit", *shelf.all, *OFTEN, "--model.hops=2")
    tags.append(events(version(1)).Tags())
    assert {name for tag in tags for name in tag["scalars"]} - {"epoch"} == documented("scalar")
    assert {name for tag in tags for name in tag["histograms"]} == documented("histogram")
    texts = {f"{name}/text_summary" for name in documented("text")}
    assert {name for tag in tags for name in tag["tensors"]} == texts


def test_completions_are_a_table_with_rewards(finished: Finished) -> None:
    (first, *_) = events(finished.folder).Tensors("val/completions/text_summary")
    head, rule, *rows = first.tensor_proto.string_val[0].decode().splitlines()
    assert head == "| prompt | completion | reward | KL (nats) |"
    assert len(rows) == 6
    assert all(row.count("|") == 5 for row in (head, rule, *rows))


def test_curves_have_a_point_for_each_step_and_each_validation(finished: Finished) -> None:
    assert len(scalar(finished.folder, "train/reward")) == 4
    found = [event.step for event in events(finished.folder).Scalars("val/reward")]
    assert len(found) == 3
    assert found == sorted(set(found))
    assert scalar(finished.folder, "val/kl")[0] == pytest.approx(0, abs=1e-5)
    assert scalar(finished.folder, "val/kl")[-1] > 1e-5


def test_the_objective_is_reward_minus_beta_kl(finished: Finished) -> None:
    reward, kl, objective = (scalar(finished.folder, f"train/{name}") for name in ("reward", "kl", "objective"))
    assert objective == pytest.approx([r - 0.002 * k for r, k in zip(reward, kl, strict=True)], abs=1e-6)


def test_the_same_command_twice(run: Run, finished: Finished, shelf: Shelf) -> None:
    for _ in range(2):
        run("fit", *shelf.all, *OFTEN)
    for number in range(2):  # the second does not overwrite the first
        assert_same(weights(checkpoint(version(number))), weights(finished.checkpoint))


@pytest.mark.slow
def test_another_seed(run: Run, finished: Finished, shelf: Shelf) -> None:
    run("fit", *shelf.all, *OFTEN, "--seed_everything=7")
    one, two = weights(checkpoint(version())), weights(finished.checkpoint)
    assert any(not torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.slow
def test_the_last_step_has_a_checkpoint(run: Run, shelf: Shelf) -> None:
    """Also where the run ends between two validations."""
    run("fit", *shelf.all, "--trainer.max_steps=3", "--trainer.val_check_interval=2")
    assert torch.load(checkpoint(version()), weights_only=True)["global_step"] == 3


def test_without_validation(run: Run, shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    run("fit", *shelf.all, "--trainer.limit_val_batches=0")
    out = capsys.readouterr().out
    assert "before" not in out
    assert "model: runs/GradeSTE/version_0/export" in out


def test_fast_dev_run_writes_nothing(run: Run, shelf: Shelf) -> None:
    run("fit", *shelf.all, "--trainer.fast_dev_run=1")
    assert not list(Path().rglob("export"))
    assert not list(Path().rglob("*.ckpt"))


# ---- resuming -------------------------------------------------------------------------------------------------


@full_and_lora
def test_resuming_is_never_having_stopped(lora: list[str], run: Run, shelf: Shelf) -> None:
    """Six steps, and three more from what lay on the disk after three: within an epoch, and over its end."""
    keep = [
        "--trainer.callbacks=ModelCheckpoint",
        "--trainer.callbacks.save_top_k=-1",
        "--trainer.callbacks.every_n_train_steps=3",
        "--trainer.max_steps=6",
    ]
    run("fit", *shelf.all, *lora, *keep)
    (half,) = version(0).glob("checkpoints/*step=3.ckpt")
    (whole,) = version(0).glob("checkpoints/*step=6.ckpt")
    run("fit", *shelf.all, *lora, *keep, f"--ckpt_path={half}")
    (resumed,) = version(1).glob("checkpoints/*step=6.ckpt")
    assert_same(weights(resumed), weights(whole))
    one, two = (torch.load(path, weights_only=True)["optimizer_states"][0]["state"] for path in (resumed, whole))
    assert one.keys() == two.keys()
    for key in one:
        assert_same(one[key], two[key])


@pytest.mark.slow
def test_a_checkpoint_from_a_shorter_run(run: Run, shelf: Shelf) -> None:
    """With a constant learning rate; the default falls over the length of the run, which differs."""
    constant = ("--model.lr_scheduler=torch.optim.lr_scheduler.ConstantLR", "--model.lr_scheduler.factor=1")
    run("fit", *shelf.all, *OFTEN, *constant)
    run("fit", *shelf.all, *OFTEN, *constant, "--trainer.max_steps=2")
    run("fit", *shelf.all, *OFTEN, *constant, f"--ckpt_path={checkpoint(version(1))}")
    assert_same(weights(checkpoint(version(2))), weights(checkpoint(version(0))))
    assert scalar(version(2), "train/reward") == scalar(version(0), "train/reward")[2:]


def test_a_checkpoint_does_not_override_flags(run: Run, finished: Finished, shelf: Shelf, tmp_path: Path) -> None:
    """Even one that carries its own settings, which stock Lightning would let win."""
    content = torch.load(finished.checkpoint, weights_only=False)
    path = tmp_path / "with_settings.ckpt"
    settings = {"beta": 7.0, "_class_path": "grade_lightning.methods.SupervisedFineTuning"}
    torch.save(content | {"hyper_parameters": settings}, path)
    run("fit", *shelf.all, *OFTEN, "--trainer.max_steps=6", "--model.beta=3", f"--ckpt_path={path}")
    reward, kl, objective = (scalar(version(), f"train/{name}") for name in ("reward", "kl", "objective"))
    assert len(reward) == 2
    assert objective == pytest.approx([r - 3 * k for r, k in zip(reward, kl, strict=True)], abs=1e-5)
    assert min(kl) > 1e-4


# ---- validate, test, predict ----------------------------------------------------------------------------------


def test_validate_repeats_the_last_validation_of_the_run(run: Run, finished: Finished, shelf: Shelf) -> None:
    run("validate", *shelf.all, f"--ckpt_path={finished.checkpoint}")
    for name in ("val/reward", "val/kl", "val/entropy", "val/perplexity"):
        assert scalar(version(), name) == [pytest.approx(scalar(finished.folder, name)[-1], rel=1e-5)]


def test_test_twice_gives_the_same_numbers(run: Run, finished: Finished, shelf: Shelf) -> None:
    for _ in range(2):
        run("test", *shelf.all, f"--ckpt_path={finished.checkpoint}")
    names = events(version()).Tags()["scalars"]
    assert "test/reward" in names
    for name in names:
        assert scalar(version(0), name) == scalar(version(1), name), name


def test_test_leaves_what_it_found_with_the_run(
    run: Run, finished: Finished, shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(finished.folder, tmp_path / "own", ignore=shutil.ignore_patterns("test*"))
    shutil.copy(checkpoint(own), "alone.ckpt")
    run("test", *shelf.all, "--ckpt_path=alone.ckpt")  # of no run
    assert not Path("test.json").exists()
    run("test", *shelf.all, f"--ckpt_path={own}", "--output=mine.jsonl")
    assert f"written: {own / 'test.json'}" in capsys.readouterr().out
    metrics = json.loads((own / "test.json").read_text())
    assert metrics["reward"] == pytest.approx(scalar(version(1), "test/reward")[0])
    assert Path("mine.jsonl").read_bytes() == (own / "test.jsonl").read_bytes()
    rewards = [row["reward"] for row in rows(own / "test.jsonl")]
    assert metrics["reward"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-5)
    before = (own / "test.json").stat().st_mtime_ns
    run("test", *shelf.all, f"--ckpt_path={own}")
    assert "exists and is kept" in capsys.readouterr().err
    assert (own / "test.json").stat().st_mtime_ns == before
    pytest.importorskip("scipy")  # what grade-report reads needs its extra
    (single,) = import_module("grade_lightning_cli.report.reading").read([own]).runs
    assert len(single.rows.prompts) == len(rewards)


def test_a_test_of_an_earlier_checkpoint_is_not_that_of_the_run(
    run: Run, finished: Finished, shelf: Shelf, tmp_path: Path
) -> None:
    own = shutil.copytree(finished.folder, tmp_path / "own", ignore=shutil.ignore_patterns("test*"))
    earlier = shutil.copy(checkpoint(own), own / "checkpoints" / "earlier.ckpt")
    os.utime(earlier, (0, 0))
    run("test", *shelf.all, f"--ckpt_path={earlier}")
    assert not list(own.glob("test*"))


def test_test_without_a_checkpoint_measures_the_start(
    run: Run, shelf: Shelf, capsys: pytest.CaptureFixture[str]
) -> None:
    run("test", *shelf.all)
    assert scalar(version(), "test/kl") == [pytest.approx(0, abs=1e-5)]
    assert "test/reward" in capsys.readouterr().out


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_predict_writes_a_line_for_each_prompt(
    run: Run, finished: Finished, shelf: Shelf, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = ["--model.judges+=FunctionReward", f"--model.judges.function={own}.at_most_two"]
    where = ["--output=here/predictions.jsonl", f"--ckpt_path={finished.checkpoint}"]
    run("predict", *shelf.all, *judge, *where)
    assert "written: here/predictions.jsonl" in capsys.readouterr().out
    assert [path.name for path in Path("here").iterdir()] == ["predictions.jsonl"]
    found = rows(Path("here/predictions.jsonl"))
    assert len(found) == 8
    for row in found:
        assert set(row) == {"prompt", "completion", "reward", "kl", "rewards", "length", "ended", "ref_nll"}
        assert len(row["prompt"].split()) == 8
        assert 0 < row["reward"] < 1
        assert row["kl"] > 0
        long = len(row["completion"].split()) > 2
        assert row["rewards"] == {"classifier": row["reward"], "at_most_two": None if long else 1.0}
    assert {row["rewards"]["at_most_two"] for row in found} == {None, 1.0}


def test_predict_twice_gives_the_same_lines(run: Run, finished: Finished, shelf: Shelf) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        run("predict", *shelf.all, f"--output={name}", f"--ckpt_path={finished.checkpoint}")
    assert Path("a.jsonl").read_bytes() == Path("b.jsonl").read_bytes()


def test_predict_names_its_own_file(run: Run, shelf: Shelf, capsys: pytest.CaptureFixture[str]) -> None:
    run("predict", *shelf.all)
    (written,) = re.findall(r"written: (.+)", capsys.readouterr().out)
    assert len(rows(Path(written))) == 8
    assert Path(written).is_relative_to("runs/GradeSTE")
    run("predict", *shelf.all)  # without a run of its own; nothing is written over
    assert {path.name for path in Path("runs/GradeSTE").iterdir()} == {"predictions.jsonl", "predictions-2.jsonl"}


def test_predictions_lie_in_the_run_whose_checkpoint_is_given(run: Run, finished: Finished, shelf: Shelf) -> None:
    before = {path.name for path in finished.folder.iterdir()}
    run("predict", *shelf.all, f"--ckpt_path={finished.checkpoint}")
    assert {path.name for path in finished.folder.iterdir()} - before == {"predictions.jsonl"}
    assert not Path("runs").exists()
    (finished.folder / "predictions.jsonl").unlink()


@pytest.mark.slow
def test_lora(run: Run, shelf: Shelf) -> None:
    lora = ["--model.policy.lora.r=2"]
    run("fit", *shelf.all, *lora, *OFTEN)
    saved = weights(checkpoint(version()))
    assert saved
    assert all(".lora_" in name for name in saved)
    exported = AutoModelForCausalLM.from_pretrained(version() / "export").state_dict()
    start = AutoModelForCausalLM.from_pretrained(shelf.policy).state_dict()
    assert exported.keys() == start.keys()
    assert any(not torch.equal(value, start[name]) for name, value in exported.items())
    run("test", *shelf.all, *lora, f"--ckpt_path={checkpoint(version())}")
    assert scalar(version(1), "test/kl")[0] > 0


# ---- the stages -----------------------------------------------------------------------------------------------


def stage(shelf: Shelf, name: str, *args: str) -> list[str]:
    quiet = [arg for arg in shelf.grade if arg.startswith(("--trainer", "--data"))]
    return [f"--model={name}", *quiet, *OFTEN, *args]


def test_a_reward_model_is_trained_and_used(run: Run, shelf: Shelf) -> None:
    run("fit", *stage(shelf, "RewardModel", f"--model.backbone={shelf.policy}", "--export.folder=reward"))
    tags = events(version(method="RewardModel")).Tags()["scalars"]
    logged = {f"val/{name}" for name in ("loss", "accuracy", "auroc", "calibration_error")}
    assert {"train/loss"} | logged <= set(tags)
    run("fit", *shelf.grade, "--model.reward=ClassifierReward", "--model.reward.path=reward")
    assert 0 < scalar(version(), "val/reward")[-1] < 1
    trained = checkpoint(version(method="RewardModel"))
    run("test", *stage(shelf, "RewardModel", f"--model.backbone={shelf.policy}", f"--ckpt_path={trained}"))


PAIRS = [
    {
        "prompt": f"w{2 + i % 17} w{2 + i // 17}",
        "chosen": f" w3 w{4 + i % 9}",
        "rejected": f" w{5 + i % 11}",
        "margin": i / 60,
    }
    for i in range(60)
]


@pytest.mark.slow
def test_a_reward_model_of_preferences_is_trained_and_used(run: Run, shelf: Shelf) -> None:
    """By the folder that transformers reads; as many rows as for labels, none of which a policy is trained on."""
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    rows = ["--data.source=LocalFiles", "--data.source.train=pairs.jsonl", "--data.test_size=4"]
    options = [f"--model.backbone={shelf.policy}", "--model.learns_from=pairs", "--export.folder=reward"]
    run("fit", *stage(shelf, "RewardModel", *options, *rows))
    tags = events(version(method="RewardModel")).Tags()["scalars"]
    found = {f"{stage}/{name}" for stage in ("train", "val") for name in ("loss", "accuracy", "margin")}
    assert found | {"val/calibration_error"} <= set(tags)
    assert "SequenceClassifierReward" in Path("reward/README.md").read_text()
    AutoModelForSequenceClassification.from_pretrained("reward")
    run("fit", *shelf.grade, "--model.reward=SequenceClassifierReward", "--model.reward.path=reward")
    assert len(scalar(version(), "val/reward")) > 0


@pytest.mark.slow
def test_verifiers_that_are_normalised_by_group(run: Run, shelf: Shelf) -> None:
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"prompt": row["prompt"], "answer": "w3"}) + "\n" for row in PAIRS)
    )
    match = {"class_path": "ExactMatch", "init_args": {"pattern": r"w\d+"}}
    form = {"class_path": "FormatReward", "init_args": {"pattern": "w3"}}
    parts = [
        f"--model.reward.rewards={json.dumps([match, form])}",
        "--model.reward.weights=[1,0.5]",
        "--model.num_generations=4",
    ]
    rows = ["--data.source=LocalFiles", "--data.source.train=rows.jsonl", "--data.test_size=4"]
    run(
        "fit",
        *stage(
            shelf, "GRPO", f"--model.policy.path={shelf.policy}", *rows, "--model.reward=GroupNormalizedSum", *parts
        ),
    )
    assert len(scalar(version(method="GRPO"), "val/rewards/FormatReward")) > 0
    assert abs(scalar(version(method="GRPO"), "train/reward")[-1]) < 1e-3


@pytest.mark.parametrize("method", ["GradeSTE", "RLOO"])
def test_a_reward_model_as_the_hub_has_them(method: str, run: Run, shelf: Shelf, tmp_path: Path) -> None:
    own = write_classifier(tmp_path / "own", "llama", words(), num_labels=2)
    options = [f"--model.reward.path={own}", "--model.reward.label=1", "--model.reward.scale=0.5"]
    run("fit", *shelf.grade, f"--model={method}", "--model.reward=SequenceClassifierReward", *options)
    assert len(scalar(version(method=method), "val/rewards/classifier")) > 0


def test_supervised_fine_tuning_makes_a_policy(run: Run, shelf: Shelf) -> None:
    sft = stage(shelf, "SupervisedFineTuning", f"--model.policy.path={shelf.policy}")
    run("fit", *sft)
    folder = version(method="SupervisedFineTuning")
    assert {"train/loss", "val/loss", "val/perplexity"} <= set(events(folder).Tags()["scalars"])
    losses = scalar(folder, "val/loss")
    assert losses[-1] < losses[0]
    run("fit", *shelf.all, f"--model.policy.path={folder / 'export'}")
    assert scalar(version(), "val/kl")[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("accelerator", "kept"), [(CPUAccelerator(), True), (CUDAAccelerator(), False)])
@pytest.mark.parametrize("command", ["train", "measure"])
def test_freed_memory_is_kept_on_a_processor(
    command: str, accelerator: Any, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything else is done."""
    run, asked = import_module("grade_lightning_cli.run"), list[bool]()
    monkeypatch.setattr(run, "keep_freed_memory", lambda: asked.append(True))
    trainer = SimpleNamespace(accelerator=accelerator)  # of which the rest of the command asks more
    with pytest.raises(AttributeError):
        getattr(run, command)(SimpleNamespace(trainer=trainer, model=None, datamodule=None, command="test"))
    assert bool(asked) == kept
