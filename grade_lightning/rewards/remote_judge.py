"""A language model behind a server as a judge."""

import math
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grade_lightning.errors import InputError, check_range
from grade_lightning.records import Rollout
from grade_lightning.waiting import wait_for

from .background import BackgroundReward, begun
from .chat_api import ChatAPI
from .rubric import RUBRIC, Rubric

_NUMBER = re.compile(r"-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


class RemoteJudge(BackgroundReward):
    """What a model behind an OpenAI-compatible server answers to a question about prompt and completion.

    The server is tried once before training. The same question is asked once, as far as the cache goes; each process of
    a run has its own.

    Args:
        model: its name on the server.
        base_url: of the server, up to `/v1`.
        rubric: the question, with `{completion}` and perhaps `{prompt}` before it.
        output: `probability`: of yes relative to no, from the log-probabilities of the first token; `answer`: 1 for yes
            and 0 for no; `number`: the first number of the answer. An answer that says none of these abstains.
        yes: the word that approves, in small or large letters.
        no: the word that does not.
        key_variable: the environment variable with the key, if the server wants one.
        concurrency: requests at a time, of each process.
        timeout: seconds that a request may take.
        retries: how often it is tried again, after 429, 5xx, a timeout, a lost connection or garbage.
        backoff: seconds before the second try; twice as many before each further one.
        cache: answers that are remembered.
        request: further fields of the request; null leaves one out that is sent otherwise.
    """

    def __init__(
        self,
        model: str,
        base_url: str = "http://localhost:8000/v1",
        rubric: str = RUBRIC,
        output: Literal["probability", "answer", "number"] = "probability",
        yes: str = "yes",
        no: str = "no",
        key_variable: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 1.0,
        cache: int = 100_000,
        request: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_range("[0, inf)", "RemoteJudge", cache=cache)
        self.api = ChatAPI(base_url, key_variable, concurrency, timeout, retries, backoff, "RemoteJudge")
        self.rubric = Rubric(rubric)
        self.output = output
        self.yes, self.no = yes.strip().lower(), no.strip().lower()
        if self.yes == self.no:
            raise InputError(f"RemoteJudge: yes and no are both {yes!r}; choose two words")
        for word in (self.yes, self.no):
            if not re.fullmatch(r"\w+", word):
                raise InputError(f"RemoteJudge: {word!r} is not a single word, as an answer must be; choose another")
        asked = {"temperature": 0.0, "max_tokens": 8 if output == "number" else 1}
        if output == "probability":
            asked |= {"logprobs": True, "top_logprobs": 20}
        self.request = {"model": model} | {k: v for k, v in (asked | (request or {})).items() if v is not None}
        self.cache = cache
        self._known: OrderedDict[str, float] = OrderedDict()
        self._tried = False

    @property
    def name(self) -> str:
        """`judge`."""
        return "judge"

    def load(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        """Ask a first question, once.

        Raises:
            InputError: the server is down, or does not answer as it should.
        """
        if not self._tried:
            self.scores_of([self.rubric.ask("Hello there", "Fine thanks")], retries=0)
            self._tried = True

    def ask(self, rollout: Rollout) -> Callable[[], Tensor]:
        """Send the questions. The scores are NaN where an answer says nothing.

        Raises:
            InputError: the server fails for good; from what is returned.
        """
        pairs = zip(rollout.prompts, rollout.completions, strict=True)
        questions = [self.rubric.ask(*pair) for pair in pairs]
        answers = begun(lambda: self.scores_of(questions))

        def finish() -> Tensor:
            found = torch.tensor(answers.result())
            if dumb := int(found.isnan().sum()):
                rank_zero_warn(
                    f"reward {self.name}: {dumb} of {len(found)} answers say neither {self.yes!r} nor {self.no!r}, nor "
                    "a number where one is wanted; they count as no reward"
                )
            return found.to(rollout.completion_ids.device)

        return finish

    def scores_of(self, questions: list[str], retries: int | None = None) -> list[float]:
        """The score of each question; what is known already is not asked."""
        new = [question for question in dict.fromkeys(questions) if question not in self._known]
        bodies = [self.request | {"messages": [{"role": "user", "content": question}]} for question in new]
        answers = wait_for(self.api.ask(bodies, retries)) if bodies else []
        found = dict(zip(new, map(self._score, answers), strict=True))
        scores = [found[question] if question in found else self._known[question] for question in questions]
        self._known.update(found)
        while len(self._known) > self.cache:
            self._known.popitem(last=False)
        return scores

    def _score(self, answer: Any) -> float:
        """The score of a server's answer.

        Raises:
            InputError: it is none of the chat API.
        """
        try:
            choice = answer["choices"][0]
            if self.output == "probability":
                likely = ((choice["logprobs"] or {}).get("content") or [{}])[0].get("top_logprobs")
                if likely is None:
                    raise InputError(
                        f"reward {self.api.owner}: {self.api.url}: answers without log-probabilities; use a server or "
                        "model that has them, or set output to answer"
                    )
                return self._probability([(each["token"], float(each["logprob"])) for each in likely])
            text = str(choice["message"]["content"])
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"reward {self.api.owner}: {self.api.url}: answers {self.api.quoted(str(answer))}, which is not "
                "a chat completion; check base_url"
            ) from error
        if self.output == "number":
            number = _NUMBER.search(text)
            return float(number[0].replace(",", "")) if number else math.nan
        words = re.findall(r"\w+", text.lower())[:1]
        return {self.yes: 1.0, self.no: 0.0}.get(words[0], math.nan) if words else math.nan

    def _probability(self, likely: list[tuple[str, float]]) -> float:
        """P(yes) / (P(yes) + P(no)) of likely tokens; NaN if neither is among them."""
        mass = dict.fromkeys((self.yes, self.no), 0.0)
        for token, logp in likely:
            word = token.strip().lower()
            if word in mass:
                mass[word] += math.exp(logp)
        total = sum(mass.values())
        return mass[self.yes] / total if total else math.nan
