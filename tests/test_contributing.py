"""The examples of CONTRIBUTING.md, each as one new file of somebody, by the command line."""

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from grade_lightning.methods import RLOO
from tests.conftest import make_model, make_tokenizer

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
EXAMPLES: dict[str, str] = dict(re.findall(r"<!-- example: (\S+) -->\n```python\n(.*?)```", TEXT, re.DOTALL))
FLAGS = {
    "median.py": ["--model=median.MedianBaseline"],
    "brevity.py": ["--model=RLOO", "--model.reward=brevity.Brevity", "--model.reward.longest=20"],
    "one_by_one.py": ["--model=RLOO", "--model.sampler.engine=one_by_one.OneByOne"],
    "extremes.py": ["--model=RLOO", "--model.selection=extremes.Extremes"],
}


def ones(completions: list[str], **_: Any) -> list[float | None]:
    return [float(len(text)) for text in completions]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the examples lie, with a small policy and prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    make_model().save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    prompts = [f"w{2 + i % 17} w{2 + i // 17}" for i in range(40)]
    (tmp_path / "prompts.csv").write_text("\n".join(["prompt", *prompts]) + "\n")
    for name, text in EXAMPLES.items():
        (tmp_path / name).write_text(text)
    with torch.random.fork_rng(devices=[]):
        yield tmp_path
    for name in EXAMPLES:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_there_is_one_of_each_kind() -> None:
    assert set(EXAMPLES) == set(FLAGS)


@pytest.mark.parametrize("name", FLAGS)
def test_an_example_is_one_file_and_trains(name: str, folder: Path) -> None:
    config = import_module("grade_lightning_cli.config")
    run = import_module("grade_lightning_cli.run")
    quiet = ("logger=false", "accelerator=cpu", "enable_progress_bar=false", "enable_checkpointing=false")
    sizes = {"prompt_size": 16, "val_size": 4, "test_size": 4, "batch_size": 8, "max_prompt_tokens": 4}
    reward = ["--model.reward=FunctionReward", "--model.reward.function=tests.test_contributing.ones"]
    cli = config.build(
        [
            *FLAGS[name],
            *(reward if name != "brevity.py" else []),
            f"--model.policy.path={folder / 'policy'}",
            "--model.sampler.max_new_tokens=5",
            "--data.source=LocalFiles",
            f"--data.source.train={folder / 'prompts.csv'}",
            *(f"--data.{key}={value}" for key, value in sizes.items()),
            *(f"--trainer.{setting}" for setting in quiet),
            "--trainer.max_steps=2",
            "--trainer.limit_val_batches=1",
        ]
    )
    run.train(cli)
    assert cli.trainer.global_step == 2
    rows = len(cli.model.last_rollout[0].ids)
    assert rows == (4 if name == "extremes.py" else 8)
    used = [cli.model, cli.model.reward, cli.model.sampler.engine, cli.model.selection]
    assert f"{name.removesuffix('.py')}" in [type(part).__module__ for part in used]


def test_the_example_of_an_engine_says_what_it_samples(folder: Path) -> None:
    """Its own check is that of the first batch; here, in every position and with ends."""
    from grade_lightning import Policy, Prompts, Sampler
    from tests.conftest import make_prompts

    engine = import_module("one_by_one").OneByOne()
    policy = Policy.from_model(make_model(), make_tokenizer())
    module = RLOO(policy=policy, sampler=Sampler(8, min_new_tokens=2, temperature=0.7, engine=engine))
    rollout = module.draw(Prompts.of(make_prompts()))
    assert rollout.engine_logps is not None
    with torch.no_grad():
        found = module.measure(rollout).logps
    torch.testing.assert_close(found, rollout.engine_logps, rtol=1e-4, atol=1e-4)
