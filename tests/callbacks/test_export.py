"""What an export holds, when it gets its name, and what leaves the machine."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from grade_lightning.callbacks import Export, Summary, export
from grade_lightning.errors import InputError
from grade_lightning.methods import RLOO, SupervisedFineTuning
from grade_lightning.policies import LoRA, Policy
from grade_lightning.records import Prompts
from grade_lightning.rewards import FunctionReward, NoReward, WeightedSum
from grade_lightning.rollouts import Sampler
from tests.callbacks.runs import Saves, judged_by, ones, plain, rows, trainer
from tests.conftest import make_model, make_prompts, make_tokenizer

SETTINGS: dict[str, Any] = {"temperature": 0.7, "top_k": 6, "top_p": 0.8, "min_new_tokens": 3}


@pytest.fixture(autouse=True)
def _run_seed(own_random_state: None) -> None:
    seed_everything(0, verbose=False)


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A model with penalties of its own, in a folder of the user's."""
    model = make_model("gpt2", scale=4.0)
    model.generation_config = GenerationConfig(repetition_penalty=3.0, eos_token_id=0, pad_token_id=1)
    model.save_pretrained(tmp_path / "private" / "small")
    make_tokenizer().save_pretrained(tmp_path / "private" / "small")
    return str(tmp_path / "private" / "small")


def words(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [float(len(text.split())) for text in completions]


def module(base: str, lora: bool = False, **settings: Any) -> RLOO:
    return RLOO(
        policy=Policy(base, LoRA(r=2, dropout=0.0) if lora else None),
        reward=WeightedSum([FunctionReward(words), NoReward()], [2.0, 0.5]),
        judges=[FunctionReward(words)],
        sampler=Sampler(max_new_tokens=6, **settings),
        num_generations=2,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    )


def fit(module: Any, folder: Path, *callbacks: Any, **kwargs: Any) -> Trainer:
    rows: DataLoader[Any] = DataLoader([make_prompts() | {"columns": {}}] * 2, batch_size=None)  # type: ignore[arg-type]
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = Trainer(
        accelerator="cpu",
        max_steps=2,
        val_check_interval=1,
        enable_checkpointing=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **quiet | kwargs,
    )
    run.fit(module, rows, None if isinstance(module, SupervisedFineTuning) else rows)
    return run


# ---- what it holds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "merged", "adapters"])
@pytest.mark.parametrize("settings", [{}, SETTINGS], ids=["plain", "restricted"])
def test_plain_transformers_sample_what_was_trained(
    kind: str, settings: dict[str, Any], base: str, tmp_path: Path
) -> None:
    """From the very distribution, position by position; the base's own penalty is gone."""
    trained, folder = module(base, lora=kind != "full", **settings), tmp_path / "out"
    fit(trained, tmp_path, Export(str(folder), merge=kind != "adapters"))
    if kind == "adapters":
        model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
        model.generation_config = GenerationConfig.from_pretrained(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    inputs = tokenizer(["w3 w4 w5", "w6 w7"], return_tensors="pt", padding=True, return_token_type_ids=False)
    found = model.generate(**inputs, output_scores=True, return_dict_in_generate=True)
    ids, width = found.sequences, inputs["input_ids"].shape[1]
    assert ids.shape[1] <= width + 6
    policy = trained.policy.eval()
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, ids.shape[1] - width, dtype=torch.long)], 1)
    with torch.no_grad():
        logits = policy(policy.embed(ids[:, :-1]), mask[:, :-1], len(found.scores))
    expected = trained.sampler.distribution.logits(logits, policy.eos_ids).softmax(-1)
    ended = (ids[:, width:] == 0).cumsum(1).roll(1, dims=1).bool()
    ended[:, 0] = False
    probabilities = torch.stack(found.scores, 1).softmax(-1)
    torch.testing.assert_close(probabilities[~ended], expected[~ended], rtol=1e-3, atol=1e-5)


def test_the_next_stage_is_not_disturbed(base: str, tmp_path: Path) -> None:
    """Its sampler's settings hold, not those that were exported; what ends a completion stays."""
    fit(module(base, **SETTINGS), tmp_path, Export(str(tmp_path / "out")))
    then = module(str(tmp_path / "out"))
    then.configure_model()
    assert then.policy.eos_ids == [0]
    inputs = make_prompts()
    rollout = then.sampler(then.policy, Prompts.of(inputs))
    assert rollout.engine_logps is not None
    with torch.no_grad():
        logits = then.policy.eval()(
            then.policy.embed(rollout.ids[:, :-1]), rollout.mask[:, :-1], rollout.engine_logps.shape[1]
        )
    logps = logits.log_softmax(-1).gather(-1, rollout.completion_ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(
        rollout.engine_logps, logps.masked_fill(~rollout.completion_mask, 0), rtol=1e-4, atol=1e-4
    )


def test_the_card(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    summary = Summary()
    fit(module(base, lora=True), tmp_path, Export(str(tmp_path / "out")), summary)
    card = ModelCard.load(tmp_path / "out" / "README.md", ignore_metadata_errors=False)
    assert card.data.tags == ["grade_lightning", "RLOO"]
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None  # a folder is no name on the Hub
    rows: dict[str, list[str]] = {}
    for line in card.text.splitlines():
        _, name, *cells = [cell.strip() for cell in f"|{line}".split("|")][1:] if line.startswith("|") else ("", "")
        rows.setdefault(name, cells[:-1])
    assert rows["method"] == ["RLOO"]
    assert rows["base model"] == ["small"]
    assert rows["reward"] == ["2 × words (FunctionReward), 0.5 × NoReward (NoReward)"]
    assert rows["judges, not trained on"] == ["words (FunctionReward)"]
    assert rows["seeds"] == ["0 (run), none (data)"]
    assert rows["adapters"][0].startswith("LoRA(r=2")
    assert "torch 2" in rows["versions"][0]
    first, last = summary.measurements
    assert rows["kl"] == [f"{first.metrics['kl']:.4g}", f"{last.metrics['kl']:.4g}"]
    assert float(rows["kl"][1]) > 0
    assert 'from_pretrained("out")' in card.text
    for path in (tmp_path / "out").glob("*"):
        if path.suffix in (".md", ".json"):
            assert "hf_verysecret" not in path.read_text()
            assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("gpt2", "gpt2"),
        ("/home/me/models/mine", "mine"),
        ("~/mine", "mine"),
        ("../mine/", "mine"),
        ("a/b/mine", "mine"),
        ("C:\\me\\mine", "mine"),
    ],
)
def test_of_paths_the_last_part_is_public(path: str, shown: str) -> None:
    assert export._public(path) == shown


@pytest.mark.parametrize(
    ("row", "template", "chat"),
    [
        ({"prompt": [{"role": "user", "content": "w2"}]}, "{{ messages }}", True),
        ({"messages": [{"role": "user", "content": "w2"}]}, "{{ messages }}", True),
        ({"prompt": "w2"}, "{{ messages }}", False),
        ({"prompt": [{"role": "user", "content": "w2"}]}, None, False),
    ],
)
def test_a_model_of_conversations(row: dict[str, Any], template: str | None, chat: bool) -> None:
    data = SimpleNamespace(splits={"prompt": [row], "empty": []})
    assert export._is_chat(SimpleNamespace(chat_template=template), data) is chat


@pytest.mark.parametrize("chat", [True, False])
def test_what_the_card_says_of_loading_runs(
    chat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}w2 w3 {% endfor %}"
    tokenizer.save_pretrained("out")
    make_model("gpt2").save_pretrained("out")
    code = export._loading("out", "small", None, adapters=False, chat=chat)
    assert ("apply_chat_template" in code) == chat
    exec(code.replace("```python", "").replace("```", ""), {})
    assert capsys.readouterr().out.startswith("['")


def test_adapters_name_their_base(base: str, tmp_path: Path) -> None:
    """As peft writes it, so that peft finds it; our own loader takes merged folders."""
    fit(module(base, lora=True), tmp_path, Export(str(tmp_path / "out"), merge=False))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert f'from_pretrained("{Path(base).name}")' in (tmp_path / "out" / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None  # by the base's name
    with pytest.raises(InputError, match=r"holds no config\.json"):
        Policy(str(tmp_path / "out")).load()


# ---- when it gets its name ----------------------------------------------------------------------------------------


def test_a_run_that_dies_while_it_writes_leaves_nothing(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()

    def dies(self: Any, folder: str, merge: bool = True) -> None:
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text("{}")
        assert not (tmp_path / "runs" / "out").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(RLOO, "save_pretrained", dies)
    with pytest.raises(SystemExit):  # Lightning's
        fit(module(base), tmp_path, Export(str(tmp_path / "runs" / "out")))
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_folder_that_was_filled_meanwhile_is_kept(
    base: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    class Fills(Summary):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "kept.txt").write_text("kept")

    fit(module(base), tmp_path, Fills(), Export(str(tmp_path / "out")))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept.txt"]
    assert (tmp_path / "out-2" / "model.safetensors").is_file()
    assert any("was filled during the run" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merge": False}, "there are no adapters"),
        ({"push_to_hub": "a/b/c"}, r"push_to_hub: .*a/b/c.*; give user/name"),
        ({"push_to_hub": "user/name"}, "nothing is exported"),
        ({"push_to_hub": "user/name", "folder": "out", "enabled": False}, "nothing is exported"),
    ],
)
def test_what_could_not_work_at_the_end_is_refused_at_the_start(
    settings: dict[str, Any], message: str, base: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        fit(module(base), tmp_path, Export(**settings))


# ---- what leaves the machine --------------------------------------------------------------------------------------


class Hub:
    """Instead of the real one: remembers what it is asked, and fails if it is told to."""

    def __init__(self, fails: bool = False) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.fails = fails

    def __call__(self) -> "Hub":
        return self

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.asked.append((repo_id, options))
        return f"https://hub/{repo_id}"

    def upload_folder(self, repo_id: str, folder_path: Path) -> None:
        if self.fails:
            raise ConnectionError("no\nroute")
        self.asked.append((repo_id, {name.name: name.stat().st_size for name in folder_path.iterdir()}))


def test_nothing_is_pushed_unasked(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "HfApi", hub := Hub())
    fit(module(base), tmp_path, Export(str(tmp_path / "out")))
    assert hub.asked == []


def test_the_whole_folder_is_pushed_to_a_private_repository(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "HfApi", hub := Hub())
    fit(module(base), tmp_path, Export(str(tmp_path / "out"), push_to_hub="user/name"))
    assert hub.asked[0] == ("user/name", {"private": True, "exist_ok": True})
    name, files = hub.asked[1]
    assert name == "user/name"
    assert {"README.md", "model.safetensors", "generation_config.json", "tokenizer.json"} <= set(files)
    assert 'from_pretrained("user/name")' in (tmp_path / "out" / "README.md").read_text()


def test_a_push_that_fails_loses_nothing(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(export, "HfApi", Hub(fails=True))
    run = fit(module(base), tmp_path, Export(str(tmp_path / "out"), push_to_hub="user/name"))
    assert run.state.finished
    assert (tmp_path / "out" / "model.safetensors").is_file()
    (line,) = [str(warning.message) for warning in recwarn if "push" in str(warning.message)]
    assert "\n" not in line
    assert f"was not pushed (ConnectionError: no route); the model is in {tmp_path / 'out'}" in line


# ---- where it goes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_export_refuses_what_holds_something(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    kept = target / "kept.txt" if kind == "folder" else target
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("kept")
    with pytest.raises(InputError, match=r"out: exists and is not empty; give --export\.folder another name"):
        trainer(tmp_path, Export(str(target))).fit(Saves(), plain())
    assert kept.read_text() == "kept"


def test_export_is_asked_only_to_train(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("kept")
    trainer(tmp_path, Export(str(tmp_path / "out"))).validate(judged_by(ones), rows(1), verbose=False)


def test_export_takes_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    trainer(tmp_path, Export(str(tmp_path / "out"))).fit(Saves(), plain())


@pytest.mark.parametrize(
    ("export", "logger", "expected"),
    [
        (Export(), True, "runs/export"),
        (Export(), False, None),
        (Export("there"), False, "there"),
        (Export("there", enabled=False), True, None),
    ],
)
def test_where_an_export_goes(
    export: Export, logger: bool, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = trainer(tmp_path, logger=TensorBoardLogger("runs", name="", version="") if logger else False)
    assert export.path(run) == (None if expected is None else Path(expected))


def test_no_export_of_a_fast_dev_run(tmp_path: Path) -> None:
    assert Export("there").path(trainer(tmp_path, fast_dev_run=True)) is None
