"""Reward models as the Hub has them."""

from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grade_lightning.errors import InputError, check_range
from grade_lightning.numerics import widened
from grade_lightning.records import Rollout

from .conversations import around
from .framing import frame
from .network import NetworkReward
from .retokenize import Pieces, retokenize
from .sequence_classifier import SequenceClassifier


class SequenceClassifierReward(NetworkReward):
    """The score of any model that transformers' `AutoModelForSequenceClassification` reads.

    Differentiable if it shares the policy's vocabulary. Else the text is decoded and read in the classifier's own
    tokens, which gives the exact score and no gradient. A prompt that is a conversation is written with its completion
    by the classifier's own chat template, if it has one; other texts are read as they are.

    Args:
        path: a folder, or a name on the Hub.
        label: which label's score is meant, by name or number; needed where there are several.
        output: the `logit`, its `sigmoid`, or the label's part of the `softmax` over all labels.
        scale: what the output is multiplied by.
        shift: what is added then.
        dtype: of the weights, such as bfloat16.
        load_in_8bit: the weights of linear layers in 8 bits; needs bitsandbytes.
    """

    def __init__(
        self,
        path: str,
        label: int | str | None = None,
        output: Literal["logit", "sigmoid", "softmax"] = "logit",
        scale: float = 1.0,
        shift: float = 0.0,
        dtype: str = "float32",
        load_in_8bit: bool = False,
    ) -> None:
        super().__init__(path, dtype)
        check_range("(-inf, inf)", "SequenceClassifierReward", scale=scale, shift=shift)
        self.label = label
        self.output = output
        self.scale, self.shift = scale, shift
        self.load_in_8bit = load_in_8bit
        self.classifier: SequenceClassifier | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None

    def read(self, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read the classifier; find the label, and try the chat template.

        Raises:
            InputError: it is no classifier, there are several labels and none is chosen, or the template fails.
        """
        classifier = SequenceClassifier.from_pretrained(path, self.dtype, self.load_in_8bit)
        self._column = _find(self.label, classifier.labels, self.path)
        if self.output == "softmax" and len(classifier.labels) == 1:
            raise InputError(f"reward {self.path}: the softmax over one label is always 1; use logit or sigmoid")
        if tokenizer.chat_template:
            around(tokenizer, [{"role": "user", "content": "Hello there"}])
        self.classifier, self.tokenizer = classifier, tokenizer

    @property
    def network(self) -> PreTrainedModel | None:
        """The classifier."""
        return None if self.classifier is None else self.classifier.model

    @property
    def room(self) -> int | None:
        """The longest text: the context, or what the tokenizer says."""
        assert self.tokenizer is not None
        rooms = [super().room, self.tokenizer.model_max_length]
        return min((room for room in rooms if room is not None and room < 10**9), default=None)

    def translate(self, rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> Pieces:
        """The same text, or the conversation as the classifier's template writes it."""
        assert self.classifier is not None
        pieces = retokenize(rollout, tokenizer, self.room, chat=True)
        return pieces._replace(mask=self.classifier.readable(pieces.ids, pieces.mask))

    def place(self, rollout: Rollout, completion: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of the framed text, padded on the right."""
        assert self.classifier is not None
        assert self.tokenizer is not None
        framed = frame(rollout, self.tokenizer, self.room)
        mask = self.classifier.readable(framed.ids, framed.mask)
        return framed.place(self.table(), completion), mask

    def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """The chosen output, (B,), in float32 or better; padded on the right."""
        assert self.classifier is not None
        return self._output(self.classifier(embeddings, mask))

    def along(self, embeddings: Tensor, mask: Tensor) -> Tensor | None:
        """The chosen output of the text up to each position, (B, L); None if the model pools elsewhere."""
        assert self.classifier is not None
        logits = self.classifier.along(embeddings, mask)
        return None if logits is None else self._output(logits)

    def places(self, rollout: Rollout) -> Tensor:
        """Where in the framed text each token of the completion is, (B, T)."""
        assert self.tokenizer is not None
        return frame(rollout, self.tokenizer, self.room).places

    def _output(self, logits: Tensor) -> Tensor:
        logits = widened(logits)
        if self.output == "softmax":
            logits = logits.softmax(-1)
        chosen = logits[..., self._column]
        return self.scale * (chosen.sigmoid() if self.output == "sigmoid" else chosen) + self.shift


def _find(label: int | str | None, labels: list[str], path: str) -> int:
    """The number of a label.

    Example:
        >>> _find("bad", ["good", "bad"], "my/model"), _find(None, ["score"], "my/model")
        (1, 0)
    """
    named = {name: i for i, name in enumerate(labels)}
    if label is None and len(labels) == 1:
        return 0
    listed = ", ".join(f"{i} ({name})" for i, name in enumerate(labels[:20])) + " …" * (len(labels) > 20)
    if label is None:
        raise InputError(f"reward {path}: has {len(labels)} labels, {listed}; choose one by --model.reward.label")
    if str(label) in named:
        return named[str(label)]
    if str(label).isdigit() and int(label) < len(labels):
        return int(label)
    raise InputError(f"reward {path}: has no label {label!r}; its labels are {listed}")
