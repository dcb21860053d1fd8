"""What was trained, as a Hugging Face folder with a model card; pushed to the Hub when asked."""

import os
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from grade_lightning.errors import InputError
from grade_lightning.modules import AlignmentModule, TrainableModule
from grade_lightning.policies import Policy
from grade_lightning.policies.loading import BUNDLED
from grade_lightning.records import unique_name
from grade_lightning.rewards import Reward, SequenceClassifier, WeightedSum

from .summary import Summary

LIBRARIES = ("grade-lightning", "torch", "lightning", "transformers", "datasets", "peft")


class Export(Callback):
    """Write a Hugging Face folder at the end of training: what the next stage takes by path.

    It holds weights, tokenizer, the settings of generation that were trained with, and a model card. It gets its name
    when it is whole, and is never written over another.

    Args:
        folder: where; `export` in the run's own folder by default. It must be empty or absent.
        enabled: whether to write at all.
        merge: add LoRA's adapters to the weights; else write the adapters alone, as peft does.
        push_to_hub: a repository of the Hub, `user/name`, to push the folder to; it is private when it is new.
    """

    def __init__(
        self, folder: str | None = None, enabled: bool = True, merge: bool = True, push_to_hub: str | None = None
    ) -> None:
        self.folder = folder
        self.enabled = enabled
        self.merge = merge
        self.push_to_hub = push_to_hub
        self._trained = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what would fail at the end of the run.

        Raises:
            InputError: the folder holds something, there are no adapters, or nothing to push or nowhere to push it.
        """
        if stage != "fit":
            return
        self._trained = False
        if self.folder is not None:
            self._refuse_what_exists(trainer)
        if not self.merge and getattr(_policy(pl_module), "lora", None) is None:
            raise InputError(
                "export.merge is false, but there are no adapters; give --model.policy.lora.r, or leave it"
            )
        if self.push_to_hub is not None:
            try:
                validate_repo_id(self.push_to_hub)
            except HFValidationError as error:
                raise InputError(f"export.push_to_hub: {error}; give user/name") from error
            if self.path(trainer) is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                raise InputError("export.push_to_hub: nothing is exported; give --export.folder and leave it enabled")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to train a run further that has been exported.

        Raises:
            InputError: it has been.
        """
        self._refuse_what_exists(trainer)
        self._trained = True

    def _refuse_what_exists(self, trainer: Trainer) -> None:
        folder = self.path(trainer)
        if folder is None:
            return
        if not _is_free(folder):
            raise InputError(f"{folder}: exists and is not empty; give --export.folder another name")
        there = next(path for path in folder.absolute().parents if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise InputError(f"{folder}: cannot be written; give --export.folder another name")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it, and push it. All processes gather what is spread, and the first one writes."""
        folder = self.path(trainer)
        if folder is None or not isinstance(pl_module, TrainableModule):
            return
        free = trainer.strategy.broadcast(_is_free(folder))
        if not free and not self._trained:
            return  # the run was complete before
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".export-", dir=folder.parent) as work:
            made = Path(work) / folder.name
            pl_module.save_pretrained(str(made), self.merge)
            if not trainer.is_global_zero:
                return
            self._card(trainer, pl_module, self.push_to_hub or folder.name).save(made / "README.md")
            if not free:
                filled = [path.name for path in folder.parent.iterdir()]
                rank_zero_warn(f"{folder}: was filled during the run; the model is written beside it")
                folder = folder.with_name(unique_name(folder.name, filled))
            if folder.is_dir():
                folder.rmdir()
            os.rename(made, folder)
        if self.push_to_hub is not None:
            self._push(folder, self.push_to_hub)

    def path(self, trainer: Trainer) -> Path | None:
        """Where the folder is written, None if it is not."""
        if not self.enabled or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        if self.folder is not None:
            return Path(self.folder)
        return Path(trainer.log_dir) / "export" if trainer.log_dir and trainer.logger else None

    def _push(self, folder: Path, name: str) -> None:
        try:
            api = HfApi()
            url = api.create_repo(name, private=True, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder)
        except Exception as error:  # of the network, of the Hub, of the account: the run is over and must end well
            reason = " ".join(str(error).split())[:200]
            rank_zero_warn(
                f"export.push_to_hub: {name} was not pushed ({type(error).__name__}: {reason}); the model is in "
                f"{folder}, and `hf upload {name} {folder}` pushes it"
            )
        else:
            rank_zero_info(f"Pushed to {url}")

    def _card(self, trainer: Trainer, module: TrainableModule, name: str) -> ModelCard:
        policy, data = _policy(module), getattr(trainer, "datamodule", None)
        path = policy.path if policy is not None else ""
        base, source = _public(path), getattr(data, "source", None)
        dataset = getattr(source, "name", None)
        adapters, labelled = not self.merge, module.batching.view in ("labelled", "preferences")
        about = ModelCardData(
            library_name="peft" if adapters else "transformers",
            pipeline_tag="text-classification" if labelled else "text-generation",
            base_model=base if base == path and base != BUNDLED else None,  # a link to the Hub
            datasets=[dataset] if isinstance(dataset, str) and dataset == _public(dataset) else None,
            tags=["grade_lightning", type(module).__name__],
        )
        facts = {
            "method": type(module).__name__,
            "base model": base,
            "data": " ".join([type(source).__name__, *_files(source)]) if source is not None else "",
            "adapters": str(lora) if (lora := getattr(policy, "lora", None)) else "",
            "steps": str(trainer.global_step),
            "batch size": str(getattr(data, "batch_size", "")),
            "precision": str(trainer.precision),
            "seeds": f"{os.environ.get('PL_GLOBAL_SEED', 'none')} (run), {getattr(data, 'seed', 'none')} (data)",
        }
        if isinstance(module, AlignmentModule):
            facts |= {
                "reward": ", ".join(_rewards(module.reward)),
                "judges, not trained on": ", ".join(name for judge in module.judges for name in _rewards(judge)),
                "β of the KL": f"{module.beta:g}",
                "KL": str(getattr(module, "kl", "")),
                "generation": _sampling(module),
            }
        facts["versions"] = ", ".join([f"Python {platform.python_version()}", *_versions(adapters)])
        classifier = getattr(module, "classifier", None) if labelled else None
        lines = [
            f"# {name.rpartition('/')[2]}",
            f"{base} after {trainer.global_step} steps of {type(module).__name__} in grade_lightning.",
            _table(("", ""), [fact for fact in facts.items() if fact[1]]),
            *_figures(trainer),
            "## Loading",
            module.usage() or _loading(name, base, classifier, adapters, _is_chat(module.tokenizer, data)),
        ]
        return ModelCard(f"---\n{about}\n---\n\n" + "\n\n".join(lines) + "\n")


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _policy(module: LightningModule) -> Policy | None:
    return next((child for child in module.modules() if isinstance(child, Policy)), None)


def _public(path: str) -> str:
    """A name on the Hub as it is; of what lies on a disk the last part alone."""
    local = Path(path).exists() or path.count("/") > 1 or path.startswith((".", "~", "/")) or "\\" in path
    return PureWindowsPath(Path(path).expanduser().resolve()).name if local else path  # that knows / and \\


def _files(source: Any) -> Iterator[str]:
    for field in ("name", "train", "test"):
        if isinstance(value := getattr(source, field, None), str):
            yield f"{field}={_public(value)}"


def _rewards(reward: Any) -> Iterator[str]:
    if isinstance(reward, WeightedSum):
        for weight, part in zip(reward.weights, reward.parts, strict=True):
            yield from (f"{weight:g} × {name}" for name in _rewards(part))
    elif isinstance(reward, Reward):
        path = getattr(reward, "path", None)
        yield f"{reward.name} ({type(reward).__name__}{f' {_public(path)}' if isinstance(path, str) else ''})"


def _sampling(module: AlignmentModule) -> str:
    own = module.sampler.distribution
    names = ("temperature", "top_k", "top_p", "min_new_tokens", "max_new_tokens")
    return ", ".join(f"{name} {getattr(own, name)}" for name in names if getattr(own, name) is not None)


def _versions(adapters: bool) -> Iterator[str]:
    yield from (f"{name} {version(name)}" for name in LIBRARIES if name != "peft" or adapters)


def _figures(trainer: Trainer) -> Iterator[str]:
    """The first validation beside the last."""
    summary = next((callback for callback in trainer.callbacks if isinstance(callback, Summary)), None)  # type: ignore[attr-defined]
    if summary is None or not summary.measurements:
        return
    first, last = summary.measurements[0], summary.measurements[-1]
    yield "## Validation"
    rows = [
        (name, f"{first.metrics.get(name, float('nan')):.4g}", f"{value:.4g}") for name, value in last.metrics.items()
    ]
    yield _table(("", f"step {first.step}", f"step {last.step}"), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _is_chat(tokenizer: Any, data: Any) -> bool:
    """Whether what was trained on are conversations."""
    rows = [split[0] for split in getattr(data, "splits", {}).values() if len(split)]
    spoken = any(isinstance(row.get(name), list) for row in rows for name in ("prompt", "messages", "chosen"))
    return spoken and bool(getattr(tokenizer, "chat_template", None))


def _loading(name: str, base: str, classifier: Any, adapters: bool, chat: bool) -> str:
    if classifier is not None:
        standard = isinstance(classifier, SequenceClassifier)
        kind = "SequenceClassifierReward" if standard else "ClassifierReward"
        what = (
            "`AutoModelForSequenceClassification.from_pretrained` reads it, and the logit is the score"
            if standard
            else "The backbone is a transformers model, and `reward_head.safetensors` its head"
        )
        return (
            f"{what}. As a reward:\n\n"
            f"```bash\ngrade-fit --model GradeSTE --model.policy.path {base} --model.reward {kind} \\\n"
            f"          --model.reward.path {name}\n```"
        )
    load = [f'model = AutoModelForCausalLM.from_pretrained("{base if adapters else name}")']
    if adapters:
        load += [f'model = PeftModel.from_pretrained(model, "{name}")']
        load += [f'model.generation_config = GenerationConfig.from_pretrained("{name}")']
    classes = ["AutoModelForCausalLM", "AutoTokenizer", *(["GenerationConfig"] if adapters else [])]
    return "\n".join(
        [
            "```python",
            *(["from peft import PeftModel"] if adapters else []),
            f"from transformers import {', '.join(classes)}",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            *load,
            *(_CHAT if chat else ['inputs = tokenizer("The film was", return_tensors="pt")']),
            "print(tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True))",
            "```",
        ]
    )


_CHAT = (
    'messages = [{"role": "user", "content": "How was the film?"}]',
    "inputs = tokenizer.apply_chat_template(",
    '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
    ")",
)
