"""A language model as a judge: how much likelier it says yes than no to a question about the completion."""

from contextlib import nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from grade_lightning.errors import InputError
from grade_lightning.functional.judgement import log_odds
from grade_lightning.numerics import widened
from grade_lightning.policies.anatomy import examine
from grade_lightning.policies.loading import check_vocabulary, config_without_dropout, load_pretrained
from grade_lightning.policies.modes import evaluating
from grade_lightning.policies.network import Frozen
from grade_lightning.records import Rollout

from .framing import Framed, before, following, tokens
from .network import NetworkReward
from .rubric import RUBRIC, Rubric, answer_ids


class JudgeReward(NetworkReward):
    """P(yes) against P(no), by which a causal language model answers a question about prompt and completion.

    Differentiable if it shares the policy's vocabulary: the question is put around the completion's own tokens. Else
    the whole question is read in the judge's own tokens, which gives the exact score and no gradient. A judge with a
    chat template is asked as by a user. The completion's EOS is left out: the judge does not see whether it ended.

    Args:
        path: a folder, or a name on the Hub.
        rubric: the question, with `{completion}` and perhaps `{prompt}` before it.
        yes: the word that approves; with a capital and with a space before it, too.
        no: the word that does not.
        output: `probability` of yes, relative to no, or its unbounded `logit`.
        dtype: of the weights.
    """

    def __init__(
        self,
        path: str,
        rubric: str = RUBRIC,
        yes: str = "yes",
        no: str = "no",
        output: Literal["probability", "logit"] = "probability",
        dtype: str = "float32",
    ) -> None:
        super().__init__(path, dtype)
        self.rubric = Rubric(rubric)
        self.yes, self.no = yes, no
        self.output = output
        self.model: Any = None
        self.tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def name(self) -> str:
        """`judge`."""
        return "judge"

    def read(self, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read the model, find the tokens of its answers, and try the chat template.

        Raises:
            InputError: it is no language model, no token says yes or no, or the template fails.
        """
        yes, no = answer_ids(tokenizer, self.yes), answer_ids(tokenizer, self.no)
        if set(yes) & set(no):
            raise InputError(f"reward {self.path}: yes and no are the same token; choose other words")
        self.rubric.around("Hello there", tokenizer)
        config = config_without_dropout(path)
        model, found = load_pretrained(
            AutoModelForCausalLM,
            path,
            config=config,
            dtype=self.dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
        if found["missing_keys"]:
            kind = (getattr(config, "architectures", None) or ["a model"])[0]
            raise InputError(
                f"reward {self.path}: holds {kind} and no language model ({min(found['missing_keys'])} is missing); "
                "give one, or read a classifier by SequenceClassifierReward"
            )
        check_vocabulary(self.path, model, tokenizer)
        with evaluating(model):
            anatomy = examine(model, self.path)
        self._asked = Frozen(model, anatomy, nullcontext)
        self._yes, self._no = yes, no
        self.model, self.tokenizer = model, tokenizer

    @property
    def network(self) -> PreTrainedModel | None:
        """The language model."""
        model: PreTrainedModel | None = self.model
        return model

    @property
    def context_length(self) -> int | None:
        """What the question leaves of the network's context."""
        room = super().context_length
        return None if room is None else room - sum(map(len, self._around("")))

    def own_tokens(self, rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
        """Ids and mask of the whole question in the judge's own tokens, (B, L), padded on the left."""
        rows = []
        for prompt, completion in zip(rollout.prompts, rollout.completions, strict=True):
            begin, end = self.rubric.around(prompt, tokenizer)
            rows.append([*self._start(), *tokens(tokenizer, begin + completion + end)])
        ids, mask, _ = self._packed(rows, [[] for _ in rows], rollout.completion_ids)
        return ids, mask

    def place(self, rollout: Rollout, completion: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of the question around the completion's own tokens, padded on the left."""
        framed = self.framed(rollout)
        return framed.place(self.table(), completion), framed.mask

    def framed(self, rollout: Rollout) -> Framed:
        """The questions, and where in them the completions' tokens are; an EOS is nowhere."""
        known: dict[str, tuple[list[int], list[int]]] = {}
        rows, numbers = [], []
        lengths = (rollout.lengths - rollout.has_eos.long()).tolist()
        for prompt, ids, length in zip(rollout.prompts, rollout.completion_ids.tolist(), lengths, strict=True):
            if prompt not in known:
                known[prompt] = self._around(prompt)
            front, back = known[prompt]
            rows.append([*front, *ids[:length], *back])
            numbers.append([len(front) + i for i in range(length)])
        return self._packed(rows, numbers, rollout.completion_ids)

    def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """P(yes) or its logit, (B,), in float32 or better; padded on the left, so that all questions end together."""
        logits = widened(self._asked.logits(embeddings, mask, 1)[:, 0])
        odds = log_odds(logits, self._yes, self._no)
        return odds.sigmoid() if self.output == "probability" else odds

    def _around(self, prompt: str) -> tuple[list[int], list[int]]:
        assert self.tokenizer is not None
        begin, end = self.rubric.around(prompt, self.tokenizer)
        return [*self._start(), *tokens(self.tokenizer, begin)], following(self.tokenizer, end)

    def _start(self) -> list[int]:
        """What the tokenizer puts before a text; a chat template writes it itself."""
        assert self.tokenizer is not None
        return [] if self.tokenizer.chat_template else before(self.tokenizer)

    def _packed(self, rows: list[list[int]], numbers: list[list[int]], like: Tensor) -> Framed:
        """Rows of tokens, and the places of some of them, padded on the left to the longest."""
        room = self.room
        if room is not None and (cut := sum(len(row) > room for row in rows)):
            rank_zero_warn(
                f"reward {self.path}: {cut} of {len(rows)} questions are longer than its context of {room} tokens, and "
                "are cut at their beginning; lower --model.sampler.max_new_tokens or --data.max_prompt_tokens"
            )
        longest = min(max(map(len, rows)), room or max(map(len, rows)))
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        places = torch.full(like.shape, -1)
        for i, (row, where) in enumerate(zip(rows, numbers, strict=True)):
            kept = row[-longest:]
            ids[i, longest - len(kept) :], mask[i, longest - len(kept) :] = torch.tensor(kept), 1
            if where:
                places[i, : len(where)] = (torch.tensor(where) + longest - len(row)).clamp(min=-1)
        return Framed(ids.to(like.device), mask.to(like.device), places.to(like.device))
