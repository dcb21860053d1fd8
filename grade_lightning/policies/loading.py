"""Where models come from: the Hub, a folder, or the bundled ones."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from grade_lightning.errors import InputError

BUNDLED = "bundled"
"""The path that stands for the tiny models which are trained at first use."""


def bundled_folder() -> Path:
    """Folder of the bundled models: `$GRADE_LIGHTNING_CACHE`, else `~/.cache/grade_lightning`.

    Its name carries the version of the recipe, so that a new recipe never meets an old folder.
    """
    cache = os.environ.get("GRADE_LIGHTNING_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "grade_lightning"
    )
    return Path(cache).expanduser() / "bundled-v1"


def resolve_model(path: str, kind: str) -> str:
    """Turn a model argument into what `from_pretrained` takes.

    Args:
        path: `"bundled"`, a local folder, or a name on the Hub.
        kind: `"policy"` or `"reward"`: which of the bundled models is meant.

    Raises:
        InputError: the bundled models are not built, or a local folder holds no model.
    """
    if path == BUNDLED:
        folder = bundled_folder() / kind
        if not folder.is_dir():
            raise InputError(
                f"the bundled {kind} model is not built: run any grade-fit command once, "
                "or call grade_lightning.bundled.prepare()"
            )
        return str(folder)
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise InputError(f"{path}: holds no config.json, so it is not a model folder; name a folder that has one")
    if not Path(path).exists() and (path.count("/") > 1 or path.startswith((".", "~", "/"))):
        raise InputError(f"{path}: no such folder; give a model folder, a name on the Hub, or '{BUNDLED}'")
    return path


def load_pretrained(loader: Any, path: str, **kwargs: Any) -> Any:
    """Call `loader.from_pretrained` and turn its failures into one line.

    Weights are read from safetensors alone and no code of the model's author is run.

    Raises:
        InputError: nothing at `path` can be loaded.
    """
    try:
        return loader.from_pretrained(path, trust_remote_code=False, **kwargs)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{path}: needs code of its author, which is never run; give a model of transformers' own"
            ) from error
        hint = "; HF_HUB_OFFLINE=1 is set" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        if not Path(path).exists():  # it was taken for a name on the Hub
            hint += f"; there is no folder {path} here"
        raise InputError(f"{path}: cannot be loaded by {loader.__name__} ({reason}){hint}") from error
    except Exception as error:  # safetensors raises its own class for a truncated file
        if not type(error).__module__.startswith("safetensors"):
            raise
        raise InputError(f"{path}: the weights cannot be read ({error}); the file is damaged") from error


def check_vocabulary(path: str, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a model embeds all tokens of its tokenizer; it may embed more.

    Raises:
        InputError: it does not, as when a token was added to the tokenizer alone.
    """
    last, rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().weight.shape[0]
    if last >= rows:
        raise InputError(
            f"{path}: the tokenizer's last token is {last} ({tokenizer.convert_ids_to_tokens(last)!r}), but the model "
            f"embeds {rows} tokens; call its resize_token_embeddings and save it again, or use its own tokenizer"
        )


def embedding_table(model: Any, rows: int | None = None) -> Tensor:
    """What the embedding module of a transformers model returns for the ids 0 to `rows` (all by default), no graph.

    Some models scale their embeddings in that module; the table is what the tokens become, whatever it does.
    """
    embedding = model.get_input_embeddings()
    weight: Tensor = embedding.weight
    if type(embedding) is nn.Embedding and embedding.max_norm is None:
        return weight.detach()[:rows]  # no copy of what may be the largest tensor of all
    with torch.no_grad():
        table: Tensor = embedding(torch.arange(weight.shape[0] if rows is None else rows, device=weight.device))
    return table


def config_without_dropout(path: str) -> PretrainedConfig:
    """Configuration of the model at `path` with every dropout probability set to zero."""
    config = load_pretrained(AutoConfig, path)
    assert isinstance(config, PretrainedConfig)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if (name.endswith("pdrop") or "dropout" in name) and isinstance(value, (int, float)):
                setattr(part, name, type(value)(0))
    return config


def torch_dtype(name: str) -> torch.dtype:
    """Parse the name of a floating-point type.

    Example:
        >>> torch_dtype("bfloat16")
        torch.bfloat16
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype '{name}': not a floating-point type of torch; try float32 or bfloat16")
    return dtype
