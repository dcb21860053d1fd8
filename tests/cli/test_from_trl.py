"""Settings of TRL by our names."""

import dataclasses
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from grade_lightning.errors import InputError

module = import_module("grade_lightning_cli.from_trl")
METHODS = [(trainer, loss) for trainer, losses in module.METHODS.items() for loss in losses] + [("GRPO", "gspo")]
SAMPLES: dict[str, Any] = {
    "model_name_or_path": "somewhere",
    "dtype": "bfloat16",
    "attn_implementation": "eager",
    "gradient_checkpointing": True,
    "load_in_4bit": True,
    "use_peft": True,
    "adam_epsilon": 1e-7,
    "adam_beta2": 0.95,
    "per_device_eval_batch_size": 4,
    "dataloader_num_workers": 1,
    "chat_template_kwargs": {"enable_thinking": False},
    "max_steps": 7,
    "logging_steps": 3,
    "seed": 5,
    "top_p": 0.9,
    "top_k": 20,
    "epsilon_high": 1.4,
    "scale_rewards": "batch",
    "sapo_temperature_pos": 0.9,
    "sapo_temperature_neg": 1.1,
    "label_smoothing": 0.1,
    "desirable_weight": 2.0,
    "undesirable_weight": 3.0,
    "center_rewards_coefficient": 0.02,
    "num_generations": 4,
}


def config_of(trainer: str, loss: str) -> dict[str, Any]:
    if loss == "gspo":
        return {"importance_sampling_level": "sequence"}
    return {"loss_type": loss} if loss else {}


def of_trl(trainer: str) -> Any:
    return getattr(pytest.importorskip("trl"), f"{trainer}Config")


@pytest.mark.parametrize(("trainer", "loss"), METHODS)
def test_every_option_is_there(trainer: str, loss: str, tmp_path: Path) -> None:
    """All that is converted is parsed and given to policy, sampler, method, data and Trainer."""
    found = module.from_trl(trainer, SAMPLES | config_of(trainer, loss) | {"output_dir": str(tmp_path)})
    names = module.NAMES[trainer] | module.OWN.get(found.options["model"], {})
    assert set(names.values()) - set(found.options) == {"trainer.max_epochs"}  # max_steps was given
    flags = [*found.flags, "--trainer.accelerator=cpu", "--trainer.logger=false"]
    reward = ["--model.reward=NumericMatch"] if trainer in ("GRPO", "RLOO") else []  # nothing bundled
    cli = import_module("grade_lightning_cli.config").build([*flags, *reward])
    assert type(cli.model).__name__ == found.options["model"]
    assert cli.trainer.max_steps == 7
    assert cli.datamodule.batch_size == found.options["data.batch_size"]
    if trainer == "GRPO":
        assert (cli.model.minibatches, cli.model.num_generations, cli.model.kl.beta) == (1, 4, 0.0)


@pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL")
@pytest.mark.parametrize("trainer", module.NAMES)
def test_names_and_defaults_are_those_of_trl(trainer: str) -> None:
    fields = {field.name: field for field in dataclasses.fields(of_trl(trainer))}
    model = {field.name for field in dataclasses.fields(import_module("trl").ModelConfig)}
    own = [name for method in module.METHODS[trainer].values() for name in module.OWN.get(method, {})]
    assert {*module.NAMES[trainer], *own, *module.DEFAULTS[trainer]} - model <= set(fields)
    assert {name: fields[name].default for name in module.DEFAULTS[trainer]} == module.DEFAULTS[trainer]


@pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL")
def test_a_config_of_trl_is_what_its_values_are(tmp_path: Path) -> None:
    config = of_trl("GRPO")(
        output_dir=str(tmp_path), loss_type="grpo", learning_rate=3e-6, report_to="none", bf16=False
    )
    found = module.from_trl("GRPO", config)
    bare = module.from_trl("GRPO", {"loss_type": "grpo", "learning_rate": 3e-6})
    assert bare.options.items() <= found.options.items()


def test_what_is_counted_otherwise_is_changed() -> None:
    options = module.from_trl("DPO", {"per_device_train_batch_size": 4}).options
    assert options["data.batch_size"] == 8  # pairs there, sequences here
    options = module.from_trl("GRPO", {"steps_per_generation": 8, "gradient_accumulation_steps": 2}).options
    assert options["model.minibatches"] == 4
    assert (options["model"], options["model.max_retries"], options["model.epsilon_high"]) == ("DAPO", 0, 0.2)
    assert "model.kl.placement" not in options
    options = module.from_trl("GRPO", {"loss_type": "dr_grpo", "beta": 0.1}).options
    assert (options["model.kl.estimator"], options["model.kl.placement"]) == ("k3", "loss")
    assert (
        module.from_trl("GRPO", {"loss_type": "grpo", "scale_rewards": False}).options["model.scale_rewards"] == "none"
    )
    assert module.from_trl("SFT", {"use_peft": True, "lora_r": 8}).options["model.policy.lora.alpha"] == 32
    assert "model.policy.lora.r" not in module.from_trl("SFT", {"lora_r": 8}).options
    assert module.from_trl("Reward", {}).options["model.centring"] == 0.0
    assert module.from_trl("KTO", {"num_train_epochs": 2.0}).options["trainer.max_epochs"] == 2


def test_nothing_is_dropped_in_silence() -> None:
    given = {"loss_type": "grpo", "epsilon_high": 0.3, "warmup_steps": 10, "made_up": 1, "use_vllm": False}
    found = module.from_trl("GRPO", given)
    assert set(found.left) == {"epsilon_high", "warmup_steps", "made_up"}
    assert "lr_scheduler" in found.left["warmup_steps"]
    assert str(found).count("# not converted: ") == 3


@pytest.mark.parametrize(
    ("trainer", "config", "said"),
    [
        ("PPO", {}, "no trainer"),
        ("DPO", {"loss_type": "hinge"}, "hinge"),
        ("DPO", {"loss_type": ["ipo", "sft"]}, "sft"),
    ],
)
def test_what_is_not_here_is_refused(trainer: str, config: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        module.from_trl(trainer, config)


def test_the_command_prints_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rloo.yaml"
    path.write_text("num_generations: 4\nmodel_name_or_path: my model\nwarmup_ratio: 0.1\n")
    module.main(["RLOO", str(path)])
    out = capsys.readouterr().out
    assert out.startswith("grade-fit \\\n    --model=RLOO")
    assert "'--model.policy.path=my model'" in out
    assert out.splitlines()[-1].startswith("# not converted: warmup_ratio: ")
    path.write_text("- 1\n")
    for wrong in (path, tmp_path / "none.yaml"):
        with pytest.raises(SystemExit, match="2"):
            module.main(["RLOO", str(wrong)])
        assert len(capsys.readouterr().err.splitlines()) == 1
