"""Chat models on conversations, as a user starts them: from files as they come, with two steps."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.cli.conftest import QUIET, Run
from tests.data.chats import make_tokenizer

SIZES = ["--data.batch_size=4", "--data.eval_batch_size=4", "--data.val_size=4", "--data.test_size=4"]
SIZES += ["--data.prompt_size=16", "--data.max_text_tokens=64"]


@pytest.fixture
def chat(tmp_path: Path) -> list[str]:
    """A tiny random Llama with a chat template."""
    tokenizer = make_tokenizer("bytes", "chatml")
    size: dict[str, Any] = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 24,
    }
    config = LlamaConfig(vocab_size=len(tokenizer), **size, bos_token_id=0, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    return [f"--model.policy.path={tmp_path / 'chat'}", *SIZES, *QUIET]


def rows_of(path: Path, method: str) -> list[str]:
    """A file of the method's, and its arguments."""
    rows = []
    for i in range(30):
        ask = {"role": "user", "content": f"{i}+{i}?"}
        yes, no = ({"role": "assistant", "content": text} for text in (f"It is {2 * i}", "no"))
        rows.append(
            {
                "GRPO": {"question": f"{i}+{i}?", "answer": f"#### {2 * i}"},
                "SupervisedFineTuning": {"messages": [ask, yes, ask, no]},
                "DPO": {"chosen": [ask, yes], "rejected": [ask, no]},
            }[method]
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--data.source=LocalFiles", f"--data.source.train={path}"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["GRPO", "SupervisedFineTuning", "DPO"])
def test_two_steps(method: str, chat: list[str], run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {
        "GRPO": [
            *("--model.reward=NumericMatch", "--model.reward.column=answer", "--data.columns.prompt=question"),
            *("--data.system_prompt=Count.", "--model.sampler.stop=!", "--model.sampler.max_new_tokens=6"),
            "--model.num_generations=4",
        ],
        "DPO": ["--model.pairs=data", "--model.sampler.max_new_tokens=6"],
    }.get(method, [])
    run("fit", f"--model={method}", *chat, *rows_of(tmp_path / "rows.jsonl", method), *more)
    (folder,) = (tmp_path / "runs" / method).iterdir()
    assert list((folder / "checkpoints").glob("*.ckpt"))
