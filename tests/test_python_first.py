"""What one types in Python: names, functions and lists are accepted where an object is meant."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from lightning.pytorch import Trainer, seed_everything

from grade_lightning import (
    DPO,
    RLOO,
    ClassifierReward,
    FunctionReward,
    GradeSTE,
    Policy,
    SequenceClassifierReward,
    SupervisedFineTuning,
    TextDataModule,
    WeightedSum,
)
from grade_lightning.data.accepting import as_source
from grade_lightning.errors import InputError
from grade_lightning.policies import as_policy
from grade_lightning.rewards import as_reward
from grade_lightning.rewards.classifier import HEAD_CONFIG
from tests.conftest import make_model, make_tokenizer
from tests.methods.toy_task import trainer

pytestmark = pytest.mark.usefixtures("own_random_state")


def brevity(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [-float(len(text)) for text in completions]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def prompts(count: int = 16) -> list[str]:
    return [f"w{2 + i % 17} w{2 + i // 4} w{3 + i % 5}" for i in range(count)]


def test_a_run_in_a_few_lines(folder: str, tmp_path: Path) -> None:
    """With Lightning's own Trainer and none of the command line's settings; then from its checkpoint."""
    data = TextDataModule(prompts=prompts(), batch_size=4, val_size=2, test_size=2)
    module = RLOO(policy=folder, reward=brevity, num_generations=2)
    run = Trainer(max_steps=2, default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False)
    run.fit(module, datamodule=data)
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    again = RLOO.load_from_checkpoint(checkpoint, policy=folder, reward=brevity, num_generations=2)
    state = module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    asked = ["w2 w3", "w4"]
    texts = []
    for found in (module, again):
        seed_everything(1)
        texts.append(found.generate(asked))
    assert texts[0] == texts[1]
    assert len(texts[0]) == 2
    (rows,) = trainer().predict(again, datamodule=data) or []
    assert len(rows) == 2
    assert {"prompt", "completion", "reward"} <= rows[0].keys()


def test_completions_are_the_samplers(folder: str) -> None:
    """As the DataModule writes prompts: a longer one beside it changes nothing."""
    module = GradeSTE(policy=folder, reward=ClassifierReward())
    module.sampler.distribution = type(module.sampler.distribution)(max_new_tokens=4, top_k=1)
    alone = module.generate("w2 w3")
    assert alone == module.generate(["w2 w3", "w4 w5 w6 w7"])[:1]
    assert 0 < len(alone[0].split()) <= 4


def test_what_is_a_policy(folder: str) -> None:
    policy, model = Policy("gpt2"), make_model()
    assert as_policy(policy) is policy
    assert as_policy(None).path == "bundled"
    assert as_policy(Path(folder)).path == folder
    assert as_policy(model).base is model
    assert SupervisedFineTuning(policy="gpt2").policy.path == "gpt2"
    assert DPO(policy="gpt2").policy.path == "gpt2"
    with pytest.raises(InputError, match="policy: int is none; give a Policy, a model"):
        as_policy(3)  # type: ignore[arg-type]


def test_what_is_a_reward(tmp_path: Path) -> None:
    own = ClassifierReward()
    assert as_reward(own) is own
    assert isinstance(as_reward("bundled"), ClassifierReward)
    assert isinstance(as_reward("name/on-the-hub"), SequenceClassifierReward)
    (tmp_path / HEAD_CONFIG).write_text("{}")
    assert isinstance(as_reward(tmp_path), ClassifierReward)
    both = as_reward([brevity, own])
    assert isinstance(both, WeightedSum)
    assert [part.name for part in both.parts] == ["brevity", own.name]
    module = RLOO(reward=brevity, judges=[brevity, "bundled"])
    assert isinstance(module.reward, FunctionReward)
    assert [type(judge) for judge in module.judges] == [FunctionReward, ClassifierReward]
    with pytest.raises(InputError, match="reward: int is none; give a Reward, a function"):
        as_reward(3)  # type: ignore[arg-type]


def test_what_is_a_source(tmp_path: Path) -> None:
    rows = [{"prompt": "one"}, {"prompt": "two"}]
    (tmp_path / "rows.txt").write_text("one\ntwo\n")
    table = Dataset.from_list(rows)
    conversation = [{"role": "user", "content": "one"}]
    for given in (rows, table, DatasetDict(train=table, test=table), tmp_path / "rows.txt"):
        assert len(as_source(given).load()["train"]) == 2
    assert set(as_source(DatasetDict(train=table, test=table)).load()) == {"train", "test"}
    assert as_source(None, [conversation]).load()["train"][0]["prompt"] == conversation
    for wrong, message in ((3, "int is none"), (DatasetDict(valid=table), "without 'train' .it has valid.")):
        with pytest.raises(InputError, match=message):
            as_source(wrong)
    with pytest.raises(InputError, match="both source and prompts"):
        TextDataModule(source=rows, prompts=["one"])
    with pytest.raises(InputError, match="put it into a list"):
        TextDataModule(prompts="one")  # type: ignore[arg-type]
