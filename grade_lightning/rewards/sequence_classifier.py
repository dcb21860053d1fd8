"""Sequence classifiers of transformers as differentiable networks: whole texts to the logits of their labels."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from grade_lightning.distributed import gather_full_state, is_first_process
from grade_lightning.errors import InputError
from grade_lightning.policies.anatomy import distance, some_tokens, tolerance
from grade_lightning.policies.loading import config_without_dropout, load_pretrained
from grade_lightning.policies.low_bit import is_low_bit, low_bit
from grade_lightning.policies.modes import evaluating


class SequenceClassifier(nn.Module):
    """A model of `AutoModelForSequenceClassification` that reads embeddings, padded on the right.

    transformers pools at the last token of ids and, of embeddings, at the last position whatever it is. Here it is the
    last token that is no padding, as of ids. Models that pool at the first token, as BERT, do as they are.

    Args:
        model: the classifier.

    Raises:
        InputError: embeddings do not give what tokens give.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        config.use_cache = False
        text = config.get_text_config()
        self.padding: int | None = text.pad_token_id
        """A token that is never pooled at, as in transformers."""
        if text.pad_token_id is None:
            text.pad_token_id = 0  # only so that batches are taken; of embeddings it is not looked at
        with evaluating(model):
            self.pools_last = _examine(model, self.padding)

    @property
    def labels(self) -> list[str]:
        """Names of the labels."""
        names: Any = self.model.config.id2label
        return [str(names[i]) for i in sorted(names)]

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings, (…) → (…, width)."""
        embeddings: Tensor = self.model.get_input_embeddings()(ids)
        return embeddings

    def readable(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The mask without padding tokens at the end of a text, (B, L): transformers pools before them.

        Args:
            ids: (B, L), padded on the right.
            mask: (B, L), 0 for padding.
        """
        if not self.pools_last or self.padding is None:
            return mask
        told = (mask.bool() & (ids != self.padding)).flip(-1).cumsum(-1).flip(-1) > 0
        told[:, 0] = True  # of a text of nothing else
        return mask * told.to(mask.dtype)

    def forward(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Logits of the labels.

        Args:
            embeddings: (B, L, width), padded on the right.
            mask: (B, L), 0 for padding.

        Returns:
            (B, labels)
        """
        return _logits(self.model, embeddings, mask, self.pools_last)

    def along(self, embeddings: Tensor, mask: Tensor) -> Tensor | None:
        """Logits of the labels for the text up to each position, (B, L, labels); None if it pools elsewhere.

        Args:
            embeddings: (B, L, width), padded on the right.
            mask: (B, L), 0 for padding.
        """
        head = getattr(self.model, "score", None)
        if not self.pools_last or head is None:
            return None
        logits: Tensor = head(self.model.base_model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state)
        return logits

    def score(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The logit of the first label, (B,), of ids and mask (B, L)."""
        logits: Tensor = self(self.embed(ids), self.readable(ids, mask))
        return logits[:, 0]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `AutoModelForSequenceClassification` reads; by all processes, as a policy's."""
        weights = gather_full_state(self.model.state_dict())
        if is_first_process():
            self.model.config.get_text_config().pad_token_id = self.padding
            self.model.save_pretrained(folder, state_dict=weights)

    @classmethod
    def from_backbone(cls, path: str, padding: int | None, dtype: torch.dtype = torch.float32) -> "SequenceClassifier":
        """A new head of one label on the body of the model at `path`; dropout is off.

        Args:
            path: of a language model.
            padding: the tokenizer's padding token, written to the configuration.
            dtype: of all weights.
        """
        config = config_without_dropout(path)
        config.num_labels = 1
        config.get_text_config().pad_token_id = padding
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # it warns that the head is new
        try:
            model = load_pretrained(
                AutoModelForSequenceClassification, path, config=config, dtype=dtype, use_safetensors=True
            )
        finally:
            logging.set_verbosity(level)
        return cls(model)

    @classmethod
    def from_pretrained(
        cls, path: str, dtype: torch.dtype = torch.float32, load_in_8bit: bool = False
    ) -> "SequenceClassifier":
        """Read a classifier; dropout is off.

        Args:
            path: a folder, or a name on the Hub.
            dtype: of the weights.
            load_in_8bit: those of linear layers in 8 bits instead.

        Raises:
            InputError: there is none, or a model without a classifier's head, or nothing that reads 8 bits.
        """
        config = config_without_dropout(path)
        model, found = load_pretrained(
            AutoModelForSequenceClassification,
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **(low_bit(path, 8, dtype) if load_in_8bit else {}),
        )
        if found["missing_keys"]:
            kind = (getattr(config, "architectures", None) or ["a model"])[0]
            raise InputError(
                f"{path}: holds {kind} and no classifier ({min(found['missing_keys'])} is missing); give a model that "
                "was trained to classify or to score texts (grade-fit --model RewardModel trains one)"
            )
        return cls(model)


def _logits(model: Any, embeddings: Tensor, mask: Tensor, last: bool) -> Tensor:
    with _at_the_end(model, mask) if last else nullcontext():
        logits: Tensor = model(inputs_embeds=embeddings, attention_mask=mask).logits
    return logits


@contextmanager
def _at_the_end(model: Any, mask: Tensor) -> Iterator[None]:
    """While it lasts, the head is given the last state of each text alone."""
    ends = mask.long().sum(-1) - 1

    def pick(module: Any, args: Any, output: Any) -> Any:
        states = output.last_hidden_state
        output.last_hidden_state = states[torch.arange(len(states)), ends].unsqueeze(1)
        return output

    handle = model.base_model.register_forward_hook(pick)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _examine(model: Any, padding: int | None) -> bool:
    """Whether a model pools at the last token; found by trying, of rows by themselves and together."""
    name = f"{model.config.name_or_path or 'reward'}: {type(model).__name__}"
    ids = some_tokens(model, 3, 8)
    mask = torch.ones_like(ids)
    mask[1, 6:] = mask[2, 3:] = 0
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of the padding that we take care of
    try:
        own = torch.cat(
            [model(input_ids=row[keep.bool()].unsqueeze(0)).logits for row, keep in zip(ids, mask, strict=True)]
        )
        # products of 8 bits are in float16
        allowed = 0.1 if any(is_low_bit(module) for module in model.modules()) else tolerance(own)
        gaps = []
        for last in (False, True):
            found = _logits(model, model.get_input_embeddings()(ids), mask, last)
            gaps.append(distance(found, own))
            if gaps[-1] <= allowed or torch.equal(found, own):
                return last
    except Exception as error:  # the model's own code, in which anything may fail
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"{name} does not run on embeddings alone ({reason}); use another classifier") from error
    finally:
        logging.set_verbosity(level)
    raise InputError(
        f"{name} does not make of padded embeddings what it makes of tokens (logits differ by {min(gaps):.2g} of their "
        "spread); use another classifier"
    )
