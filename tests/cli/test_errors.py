"""What a user can get wrong: one line that names it and says what to do, status 2, and nothing half-made."""

import pickle
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from tests.cli.conftest import WORDS, Run, Shelf, checkpoint, enter, new_shell, version
from tests.conftest import make_model, make_tokenizer

PROGRESS = re.compile(r"INFO: |WARNING: |\[rank: 0\] |(Generating|Filter|Map|Loading|Writing)\b.*")
Refuse = Callable[..., str]


@pytest.fixture
def refuse(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refuse:
    """Run a command that must be refused; give what it says. It may leave nothing, save the folder of its run."""

    def refuse(command: str, *args: str) -> str:
        before = files(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run(command, *args)
        assert exit.value.code == 2
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err + captured.out
        *others, line = [part for part in re.split(r"[\r\n]+", captured.err) if part.strip()]
        assert [text for text in others if not PROGRESS.match(text)] == []
        assert line.startswith(f"grade-{command}: error: ")
        assert captured.out == ""
        assert files(tmp_path) == before
        return line

    return refuse


def files(folder: Path) -> dict[Path, int]:
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and not {"runs", "__pycache__"} & set(path.parts)
    }


def says(line: str, *parts: str) -> None:
    missing = [part for part in parts if part not in line]
    assert not missing, line


@pytest.fixture(scope="session")
def saved(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of GradeSTE, one with LoRA, and one of supervised training."""
    root = tmp_path_factory.mktemp("saved")
    often = "--trainer.val_check_interval=2"
    sft = [arg for arg in shelf.grade if arg.startswith(("--trainer", "--data", "--model.policy"))]
    with new_shell(root, tmp_path_factory.getbasetemp() / "datasets") as patch:
        enter(patch, "fit", *shelf.all, often)
        enter(patch, "fit", *shelf.all, often, "--model.policy.lora.r=2")
        enter(patch, "fit", "--model=SupervisedFineTuning", *sft, often)
    methods = {"grade": version(), "lora": version(1), "sft": version(method="SupervisedFineTuning")}
    return {name: checkpoint(root / folder) for name, folder in methods.items()}


def table(name: str, *lines: str) -> list[str]:
    """Arguments for a file of one's own."""
    Path(name).write_text("".join(f"{line}\n" for line in lines))
    return [f"--data.source.train={name}"]


def without(args: list[str], *keys: str) -> list[str]:
    return [arg for arg in args if not arg.startswith(keys)]


# ---- arguments ------------------------------------------------------------------------------------------------


def test_unknown_model(refuse: Refuse) -> None:
    line = refuse("fit", "--model", "GradeSTF")
    says(line, "--model GradeSTF", "did you mean 'GradeSTE'?", "SupervisedFineTuning", "RewardModel", "dotted path")
    line = refuse("fit", "--model", "Nothing")
    says(line, "--model Nothing", "GradeSTE")
    assert "did you mean" not in line


def test_unknown_dotted_model(refuse: Refuse) -> None:
    says(refuse("fit", "--model=nowhere.to.be.Found"), "nowhere.to.be.Found")


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_no_model(command: str, refuse: Refuse) -> None:
    says(refuse(command), "model")


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("--model.reward", "ClasifierReward", "ClassifierReward"),
        ("--model.estimator", "Gumble", "Gumbel"),
        ("--model.tau", "Liner", "Linear"),
        ("--data.source", "LocalFile", "LocalFiles"),
    ],
)
def test_unknown_parts(key: str, wrong: str, right: str, refuse: Refuse) -> None:
    says(refuse("fit", "--model=GradeSTE", f"{key}={wrong}"), key, wrong, f"did you mean '{right}'?")


@pytest.mark.parametrize(
    "key", ["--model.betta", "--trainer.max_stpes", "--data.batchsize", "--modle.beta", "--model.sampler.max_tokens"]
)
def test_misspelt_key(key: str, refuse: Refuse, shelf: Shelf) -> None:
    says(refuse("fit", *shelf.all, f"{key}=1"), key.rpartition(".")[2].lstrip("-"))


def test_misspelt_key_in_a_file(refuse: Refuse, shelf: Shelf) -> None:
    Path("c.yaml").write_text("trainer: {max_step: 3}\n")
    says(refuse("fit", *shelf.all, "--config=c.yaml"), "max_step")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("--trainer.max_steps", "many"),
        ("--model.beta", "small"),
        ("--model.hops", "some"),
        ("--model.kl_prefix", "half"),
        ("--data.batch_size", "1.5"),
        ("--model.policy.gradient_checkpointing", "perhaps"),
        ("--model.sampler.top_k", "x"),
        ("--model.reward.output", "odds"),
        ("--seed_everything", "luck"),
        ("--model.beta", "null"),
        ("--model.kl_prefix", "null"),
        ("--model.sampler.top_p", "null"),
        ("--data.batch_size", "null"),
        ("--model.optimizer", "null"),
    ],
)
def test_wrong_type(key: str, value: str, refuse: Refuse, shelf: Shelf) -> None:
    says(refuse("fit", *shelf.all, f"{key}={value}"), key.rpartition(".")[2], "None" if value == "null" else value)


@pytest.mark.parametrize("value", ["null", "[]", "[1, 2]", "3"])
def test_options_by_name_that_are_something_else(value: str, refuse: Refuse, shelf: Shelf) -> None:
    model = ["--model=RLOO", *without(shelf.grade, "--model=")]
    says(refuse("fit", *model, "--model.reward=NoReward", f"--model.kl={value}"), "--model.kl: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("--model.sampler.temperature", "0"),
        ("--model.sampler.top_p", "1.5"),
        ("--model.sampler.top_k", "0"),
        ("--model.sampler.min_new_tokens", "7"),
        ("--model.hops", "-1"),
        ("--model.policy.dtype", "int8"),
        ("--data.batch_size", "0"),
        ("--completions.rows", "0"),
        ("--seed_everything", "-1"),
        ("--trainer.max_steps", "-5"),
        ("--trainer.accelerator", "abacus"),
        ("--trainer.num_nodes", "0"),
        ("--trainer.limit_val_batches", "1.5"),
        ("--model.optimizer.lr", "-1"),
    ],
)
def test_impossible_value(key: str, value: str, refuse: Refuse, shelf: Shelf) -> None:
    says(refuse("fit", *shelf.all, f"{key}={value}"), key.lstrip("-").rpartition(".")[2], value)


def test_missing_config_file(refuse: Refuse) -> None:
    says(refuse("fit", "--model=GradeSTE", "--config=nowhere.yaml"), "nowhere.yaml")


@pytest.mark.parametrize("text", ["", "null\n", "[1, 2]\n", "only words\n"])
def test_config_file_without_options(text: str, refuse: Refuse) -> None:
    Path("c.yaml").write_text(text)
    says(refuse("fit", "--model=GradeSTE", "--config=c.yaml"), "--config c.yaml: no options by name in it")


def test_damaged_config_file(refuse: Refuse) -> None:
    Path("c.yaml").write_text("trainer: {max_steps: 3\n")
    says(refuse("fit", "--model=GradeSTE", "--config=c.yaml"), "c.yaml")


# ---- data -----------------------------------------------------------------------------------------------------


def test_missing_data_file(refuse: Refuse, shelf: Shelf) -> None:
    line = refuse("fit", *shelf.all, "--data.source.train=nowhere.csv")
    says(line, "data.source.train: nowhere.csv", "check the path")
    says(refuse("fit", *shelf.all, "--data.source.test=nowhere.csv"), "data.source.test: nowhere.csv")


def test_missing_column(refuse: Refuse, shelf: Shelf) -> None:
    line = refuse("fit", *shelf.all, *table("body.csv", "id,body", "1,w3 w4", "2,w5 w6"))
    says(line, "body.csv", "no column 'text' or 'prompt'", "rename", "id, body")


def test_missing_label_column(refuse: Refuse, shelf: Shelf) -> None:
    reward = ["--model=RewardModel", f"--model.backbone={shelf.policy}", *without(shelf.grade, "--model")]
    rows = [" ".join([WORDS[i % 17], WORDS[(i + 1) % 17], WORDS[i // 17]]) for i in range(80)]
    says(refuse("fit", *reward, *table("plain.csv", "text", *rows)), "label")


@pytest.mark.parametrize("size", ["prompt_size", "val_size"])
def test_empty_split(size: str, refuse: Refuse, shelf: Shelf) -> None:
    says(refuse("fit", *shelf.all, f"--data.{size}=0"), f"data.{size}", "raise it")


def test_empty_test_split(refuse: Refuse, shelf: Shelf) -> None:
    says(refuse("test", *shelf.all, "--data.test_size=0"), "data.test_size", "raise it")


def test_too_few_rows(refuse: Refuse, shelf: Shelf) -> None:
    says(refuse("fit", *shelf.all, "--data.prompt_size=1000"), "data.prompt_size (1000)", "lower")


def test_empty_file(refuse: Refuse, shelf: Shelf) -> None:
    says(refuse("fit", *shelf.all, *table("empty.csv")), "empty.csv", "is empty")
    says(refuse("fit", *shelf.all, *table("head.csv", "text,label")), "head.csv", "no rows")


def test_unknown_label(refuse: Refuse, shelf: Shelf) -> None:
    line = refuse("fit", *shelf.all, *table("odd.csv", "text,label", "w3,positive", "w4,mixed"))
    says(line, "odd.csv: row 1", "'label' is 'mixed'", "negative or positive")


def test_empty_text(refuse: Refuse, shelf: Shelf) -> None:
    says(refuse("fit", *shelf.all, *table("gap.csv", "text,label", "w3,1", ",0")), "gap.csv: row 1", "'text'")


def test_unknown_suffix(refuse: Refuse, shelf: Shelf) -> None:
    says(refuse("fit", *shelf.all, *table("reviews.xls", "text", "w3")), "reviews.xls", "'.xls'", ".parquet")


def test_prompt_and_completion_longer_than_the_context(refuse: Refuse, shelf: Shelf) -> None:
    line = refuse("fit", *shelf.all, "--model.sampler.max_new_tokens=53")
    says(line, "context is 64", "12 (--data.max_prompt_tokens)", "53 (--model.sampler.max_new_tokens)", "lower one")


def test_prompt_and_completion_that_just_fit(run: Run, shelf: Shelf) -> None:
    run("fit", *shelf.all, "--model.sampler.max_new_tokens=52", "--trainer.max_steps=1")


def test_prompt_column_longer_than_allowed(refuse: Refuse, shelf: Shelf) -> None:
    rows = [f"w{2 + i % 17} w{2 + i // 17}" for i in range(60)]
    rows[50] += " w3" * 11
    args = table("prompts.csv", "prompt", *rows)
    line = refuse("fit", *shelf.all, *args, "--data.prompt_size=44")
    says(line, "column 'prompt', row 50", "14 tokens", "--data.max_prompt_tokens (now 12)", "drop the row")


def test_no_tokens_left_to_generate(refuse: Refuse, shelf: Shelf) -> None:
    line = refuse("fit", *shelf.all, "--model.sampler.max_new_tokens=0")
    says(line, "max_new_tokens = 0", "must be 1 or more")


# ---- tokenizer and models -------------------------------------------------------------------------------------


def copied(shelf: Shelf, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Policy and reward with another tokenizer."""
    for name, folder in (("policy", shelf.policy), ("reward", shelf.reward)):
        shutil.copytree(folder, name)
        tokenizer.save_pretrained(name)
    return ["--model.policy.path=policy", "--model.reward.path=reward"]


def test_tokenizer_with_neither_padding_nor_end(refuse: Refuse, shelf: Shelf) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer)
    line = refuse("fit", *shelf.all, *copied(shelf, bare))
    says(line, "policy: the tokenizer has neither a padding nor an end-of-sequence token", "set one")


@pytest.mark.parametrize("pad", [None, "<eos>"], ids=["no pad", "pad is eos"])
def test_padding_with_the_end_token_works(pad: str | None, run: Run, shelf: Shelf) -> None:
    """It is a frequent source of confusion, not an error: masks come from lengths."""
    inner = make_tokenizer().backend_tokenizer
    other = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", bos_token="<eos>", pad_token=pad)
    run("fit", *shelf.all, *copied(shelf, other))


def test_a_reward_without_gradient(refuse: Refuse, shelf: Shelf, own: str) -> None:
    line = refuse("fit", *shelf.grade, "--model.reward=FunctionReward", f"--model.reward.function={own}.words")
    says(line, "reward words: not differentiable", "ClassifierReward", "RewardModel")


def test_a_reward_of_another_vocabulary(refuse: Refuse, shelf: Shelf) -> None:
    shutil.copytree(shelf.reward, "other")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["w99"])
    tokenizer.save_pretrained("other")
    line = refuse("fit", *shelf.all, "--model.reward.path=other")
    says(line, "reward other", "vocabulary (20 tokens) is not the policy's (19)", "grade-fit --model RewardModel")
    says(line, f"--model.backbone {shelf.policy}")


def test_a_method_without_its_gradient_takes_a_reward_of_another_vocabulary(run: Run, shelf: Shelf) -> None:
    shutil.copytree(shelf.reward, "other")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["w99"])
    tokenizer.save_pretrained("other")
    run("fit", *shelf.all, "--model=RLOO", "--model.reward.path=other")


def test_grade_takes_it_translated(run: Run, shelf: Shelf) -> None:
    shutil.copytree(shelf.reward, "other")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["w99"])
    tokenizer.save_pretrained("other")
    run("fit", *shelf.all, "--model.reward=TranslatedReward", "--model.reward.reward=ClassifierReward",
        "--model.reward.reward.path=other")  # fmt: skip


@pytest.mark.parametrize("method", ["GradeSTE", "RLOO"])
def test_no_reward_for_a_model_of_ones_own(method: str, refuse: Refuse, shelf: Shelf, tmp_path: Path) -> None:
    """The bundled one, which has another vocabulary: nobody chose it."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["w99"])
    folder = tmp_path / "cache" / "bundled-v1" / "reward"
    shutil.copytree(shelf.reward, folder)
    tokenizer.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADE_LIGHTNING_CACHE", str(tmp_path / "cache"))
        patch.setattr("grade_lightning.bundled.prepare", lambda: None)
        line = refuse("fit", *shelf.grade, f"--model={method}")
    says(line, "--model.reward: you gave none, and the bundled one has another vocabulary than", str(shelf.policy))


@pytest.mark.parametrize(("model", "path"), [("SupervisedFineTuning", "policy.path"), ("RewardModel", "backbone")])
def test_texts_longer_than_the_context(model: str, path: str, refuse: Refuse, shelf: Shelf) -> None:
    rest = [arg for arg in shelf.grade if not arg.startswith("--model")]
    line = refuse("fit", f"--model={model}", f"--model.{path}={shelf.policy}", *rest, "--data.max_text_tokens=65")
    says(line, "the model's context is 64 tokens, but texts may have 65 (--data.max_text_tokens); lower it")


def test_a_reward_with_a_shorter_context(refuse: Refuse, shelf: Shelf) -> None:
    shutil.copytree(shelf.reward, "short")
    config = Path("short/config.json")
    config.write_text(config.read_text().replace('"n_positions": 64', '"n_positions": 16'))
    model = AutoModel.from_config(AutoConfig.from_pretrained("short"))
    model.save_pretrained("short")
    line = refuse("fit", *shelf.all, "--model.reward.path=short")
    says(line, "reward classifier's context is 16 tokens, but prompts may have 12", "completions 6")


def test_a_reward_that_is_a_plain_model(refuse: Refuse, shelf: Shelf) -> None:
    line = refuse("fit", *shelf.all, f"--model.reward.path={shelf.policy}")
    says(line, str(shelf.policy), "reward_head.json", "grade-fit --model RewardModel")


def test_a_reward_with_a_damaged_head(refuse: Refuse, shelf: Shelf) -> None:
    shutil.copytree(shelf.reward, "damaged")
    truncate(Path("damaged/reward_head.safetensors"))
    says(refuse("fit", *shelf.all, "--model.reward.path=damaged"), "damaged", "reward head cannot be read", "again")


@pytest.mark.skipif(find_spec("vllm") is not None, reason="it is installed")
def test_an_engine_that_is_not_installed(refuse: Refuse, shelf: Shelf) -> None:
    line = refuse("fit", *shelf.all, "--model.sampler.engine=VLLMEngine", "--preflight")
    says(line, "VLLMEngine needs vLLM: pip install 'grade-lightning[vllm]'")


@pytest.mark.parametrize("key", ["policy", "reward"])
def test_missing_folder(key: str, refuse: Refuse, shelf: Shelf) -> None:
    says(refuse("fit", *shelf.all, f"--model.{key}.path=./nowhere"), "./nowhere: no such folder")


def test_a_name_that_is_neither_here_nor_on_the_hub(refuse: Refuse, shelf: Shelf) -> None:
    says(refuse("fit", *shelf.all, "--model.policy.path=no-such-model-here"), "no-such-model-here", "HF_HUB_OFFLINE=1")


@pytest.mark.parametrize("key", ["policy", "reward"])
def test_a_folder_without_a_model(key: str, refuse: Refuse, shelf: Shelf) -> None:
    Path("hollow").mkdir()
    says(refuse("fit", *shelf.all, f"--model.{key}.path=hollow"), "hollow: holds no config.json")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("key", ["policy", "reward"])
def test_truncated_weights(key: str, refuse: Refuse, shelf: Shelf) -> None:
    shutil.copytree(getattr(shelf, key), "broken")
    truncate(Path("broken/model.safetensors"))
    says(refuse("fit", *shelf.all, f"--model.{key}.path=broken"), "broken", "damaged")


def test_weights_that_are_pickles(refuse: Refuse, shelf: Shelf) -> None:
    shutil.copytree(shelf.policy, "pickled")
    Path("pickled/model.safetensors").unlink()
    torch.save(make_model().state_dict(), "pickled/pytorch_model.bin")
    says(refuse("fit", *shelf.all, "--model.policy.path=pickled"), "pickled", "safetensors")


def test_lora_on_layers_that_are_not_there(refuse: Refuse, shelf: Shelf) -> None:
    line = refuse("fit", *shelf.all, '--model.policy.lora={"r": 2, "target_modules": ["nothing"]}')
    says(line, "LoRA", "nothing", "--model.policy.lora.target_modules")


# ---- checkpoints ----------------------------------------------------------------------------------------------

commands = pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])


@commands
def test_missing_checkpoint(command: str, refuse: Refuse, shelf: Shelf) -> None:
    line = refuse(command, *shelf.all, "--ckpt_path=nowhere.ckpt")
    says(line, "nowhere.ckpt: no such checkpoint", "--ckpt_path")


@commands
def test_truncated_checkpoint(command: str, refuse: Refuse, shelf: Shelf, saved: dict[str, Path]) -> None:
    shutil.copy(saved["grade"], "half.ckpt")
    truncate(Path("half.ckpt"))
    says(refuse(command, *shelf.all, "--ckpt_path=half.ckpt"), "half.ckpt", "damaged")


class Payload:
    """Would leave a file, were it unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], Payload()], ids=["dict", "list", "code"])
@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_foreign_checkpoint(content: object, writer: str, refuse: Refuse, shelf: Shelf) -> None:
    """No code in it is run."""
    path = Path("foreign.ckpt")
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    says(refuse("test", *shelf.all, f"--ckpt_path={path}"), "checkpoint")
    assert not Path("executed").exists()


def test_a_checkpoint_that_is_text(refuse: Refuse, shelf: Shelf) -> None:
    Path("notes.ckpt").write_text("these are not the weights")
    says(refuse("fit", *shelf.all, "--ckpt_path=notes.ckpt"), "notes.ckpt", "cannot be read as a checkpoint")


@commands
def test_a_checkpoint_of_another_method(command: str, refuse: Refuse, shelf: Shelf, saved: dict[str, Path]) -> None:
    line = refuse(command, *shelf.all, f"--ckpt_path={saved['sft']}")
    says(line, "checkpoint", "of SupervisedFineTuning, but --model is GradeSTE", "name the model")


@commands
@pytest.mark.parametrize(("kind", "lora"), [("lora", []), ("grade", ["--model.policy.lora.r=2"])])
def test_a_checkpoint_with_other_lora_settings(
    command: str, kind: str, lora: list[str], refuse: Refuse, shelf: Shelf, saved: dict[str, Path]
) -> None:
    line = refuse(command, *shelf.all, *lora, f"--ckpt_path={saved[kind]}")
    says(line, "checkpoint: its weights do not fit", "LoRA settings")


def test_a_checkpoint_with_another_rank(refuse: Refuse, shelf: Shelf, saved: dict[str, Path]) -> None:
    line = refuse("test", *shelf.all, "--model.policy.lora.r=4", f"--ckpt_path={saved['lora']}")
    says(line, "checkpoint", "LoRA")


def test_a_checkpoint_of_another_size(refuse: Refuse, shelf: Shelf, saved: dict[str, Path]) -> None:
    """The names fit, the shapes do not."""
    config = make_model().config
    config.n_embd = 8
    type(make_model())(config).save_pretrained("narrow")
    make_tokenizer().save_pretrained("narrow")
    says(refuse("test", *shelf.all, "--model.policy.path=narrow", f"--ckpt_path={saved['grade']}"), "checkpoint")


# ---- what exists already --------------------------------------------------------------------------------------


def test_export_folder_that_is_not_empty(refuse: Refuse, shelf: Shelf) -> None:
    Path("export").mkdir()
    Path("export/thesis.tex").write_text("the only copy")
    line = refuse("fit", *shelf.all, "--export.folder=export")
    says(line, "export: exists and is not empty", "--export.folder")
    says(refuse("fit", *shelf.all, "--export.folder=export/thesis.tex"), "thesis.tex")


@pytest.mark.parametrize("option", ["export.folder", "trainer.default_root_dir", "checkpoint.dirpath"])
def test_a_folder_that_cannot_be(option: str, refuse: Refuse, shelf: Shelf) -> None:
    Path("file").touch()
    assert "file" in refuse("fit", *shelf.all, f"--{option}=file/folder")


def test_predictions_that_exist(refuse: Refuse, shelf: Shelf) -> None:
    Path("a.jsonl").write_text("the only copy\n")
    says(refuse("predict", *shelf.all, "--output=a.jsonl"), "a.jsonl: exists already", "--output")


@pytest.mark.parametrize(
    "wrong",
    [
        "--data.source.train=nowhere.csv",
        "--data.prompt_size=1000",
        "--model.policy.path=./nowhere",
        "--model.reward.path=./nowhere",
        "--model.sampler.max_new_tokens=53",
        "--export.folder=.",
    ],
)
def test_a_run_that_never_began_leaves_nothing(wrong: str, refuse: Refuse, shelf: Shelf) -> None:
    """No folder that looks like a run, no empty log."""
    Path("mine.txt").write_text("the only copy")
    refuse("fit", *shelf.all, wrong)
    assert [path.name for path in Path().rglob("*") if path.is_file()] == ["mine.txt"]


@commands
def test_nor_does_a_checkpoint_of_another_method(
    command: str, refuse: Refuse, shelf: Shelf, saved: dict[str, Path]
) -> None:
    refuse(command, *shelf.all, f"--ckpt_path={saved['sft']}")
    assert [path for path in Path().rglob("*") if path.is_file()] == []


# ---- reward functions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        ("short", ("reward short", "1 values for 6 completions")),
        ("texts", ("reward texts", "must return a list of numbers or None")),
        ("raises", ("reward raises", "KeyError", "no such column")),
        ("hangs", ("reward hangs: no answer within 0.1 s for 6 completions", "raise its timeout")),
    ],
)
def test_a_judge_that_fails(function: str, parts: tuple[str, ...], refuse: Refuse, shelf: Shelf, own: str) -> None:
    judge = ["--model.judges+=FunctionReward", f"--model.judges.function={own}.{function}"]
    judge += ["--model.judges.timeout=0.1"] if function == "hangs" else []
    says(refuse("predict", *shelf.all, *judge, "--output=a.jsonl"), *parts)


def test_a_function_that_is_not_there(refuse: Refuse, shelf: Shelf, own: str) -> None:
    judge = ["--model.judges+=FunctionReward", f"--model.judges.function={own}.nothing"]
    says(refuse("fit", *shelf.all, *judge), "function", f"{own}.nothing")
