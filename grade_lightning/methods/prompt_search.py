"""GReaTer by replay: the tokens of a prompt are what is trained."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grade_lightning.distributed import is_first_process
from grade_lightning.errors import InputError, check_range
from grade_lightning.estimators import StraightThrough, TokenEstimator
from grade_lightning.functional.exchanges import best_exchanges, likely_tokens
from grade_lightning.modules import AlignmentModule
from grade_lightning.modules.measuring import measure
from grade_lightning.modules.prompt_gradients import is_text, place_logps, prompt_gains, prompt_logp, readable_tokens
from grade_lightning.modules.slots import columns_of, exchanged, fill, without
from grade_lightning.policies import PolicyLike
from grade_lightning.records import Experience, Prompts, Rollout, StepOutput
from grade_lightning.rewards import RewardLike
from grade_lightning.rollouts import Sampler


class PromptSearch(AlignmentModule):
    """Search the tokens of a prompt with which a frozen model earns the most reward.

    Each step draws completions, and takes the reward's gradient through them back to the prompt. That tells for every
    token at every place of the prompt what it would gain there, to first order, in one pass. The best of those that
    the model itself finds likely are tried: new completions of the same prompts with the same noise, and their true
    reward. The best prompt, the old one among them, is kept. The rewards do not read the prompt that is searched.

    Args:
        policy: the language model; none of its weights is trained.
        reward: a differentiable reward of the policy's vocabulary; of another through :class:`.TranslatedReward`.
        judges: further rewards that are logged and never trained on.
        sampler: how completions are drawn.
        start: the prompt at first, as text; its number of tokens stays as it is.
        slot: a text in each prompt of the data that is replaced by the searched one; None: it comes first.
        candidates: at each place, how many of the likeliest tokens are candidates.
        tries: how many prompts are tried in each step.
        fluency: weight of the prompt's log-probability, in reward per nat and token.
        hops: how often the gradient is carried to earlier tokens of a completion; `exact`: all the way.
        estimator: how a sampled token passes its gradient on.

    References:
        | GReaTer: Gradients over Reasoning Makes Smaller Language Models Strong Prompt Optimizers (Das et al., 2024),
          https://arxiv.org/abs/2412.09722. Departures: all places are scored at once, from one pass, and the best
          exchanges of all places are tried; the gradient also goes through the sampled tokens (0 hops holds them
          fixed, as the paper does); any differentiable reward instead of known answers; the candidates are those of
          the mean log-probability over the batch instead of intersections.
    """

    backpropagates_reward = True
    has_gradient = False

    def __init__(
        self,
        policy: PolicyLike | None = None,
        reward: RewardLike | None = None,
        judges: list[RewardLike] | None = None,
        sampler: Sampler | None = None,
        start: str = " Please write as well as you can.",
        slot: str | None = None,
        candidates: int = 64,
        tries: int = 3,
        fluency: float = 0.0,
        hops: int | Literal["exact"] = 2,
        estimator: TokenEstimator | None = None,
    ) -> None:
        # the step below exchanges tokens; the optimizer only counts
        super().__init__(policy, reward, judges, sampler, 0.0, lambda parameters: torch.optim.SGD(parameters, lr=0.0))
        check_range("[1, inf)", candidates=candidates, tries=tries)
        check_range("[0, inf)", fluency=fluency, hops=None if hops == "exact" else hops)
        if self.policy.lora is not None:
            raise InputError("PromptSearch trains a prompt and no weights; leave policy.lora out")
        self.start, self.slot = start, slot
        self.candidates, self.tries, self.fluency, self.hops = candidates, tries, fluency, hops
        self.estimator = estimator or StraightThrough()

    @property
    def tokens(self) -> list[int]:
        """The prompt."""
        return [round(token) for token in self.prompt.tolist()]

    @property
    def text(self) -> str:
        """The prompt as text."""
        return str(self.tokenizer.decode(self.tokens, clean_up_tokenization_spaces=False))

    def prompts(self, batch: dict[str, Any]) -> Prompts:
        """With the prompt in its place."""
        return fill(Prompts.of(batch), self.tokens, self.tokenizer, self.slot)

    def judged(self, rollout: Rollout) -> Rollout:
        """Without it."""
        return without(rollout, len(self.prompt))

    def collect(self, batch: dict[str, Any]) -> Experience:
        """Draw completions with noise that can be drawn again, and score them."""
        self._noise = int(torch.randint(2**62, ()))
        torch.manual_seed(self._noise)
        return super().collect(batch)

    def loss(self, experience: Experience) -> StepOutput:
        """Try the exchanges that promise most, and keep the best prompt."""
        rollout, scores, before = experience.rollout, experience.scores, self.tokens
        policy, distribution = self.policy, self.sampler.distribution
        tokens = torch.tensor(before, device=rollout.ids.device)
        logps = self.reduce.mean(place_logps(policy, rollout, len(tokens)))
        fluency = self.fluency * (logps - logps.gather(1, tokens.unsqueeze(1))) / len(tokens)
        wanted = self.promise(experience, tokens) + fluency
        wanted = wanted.masked_fill(~likely_tokens(logps, self._readable.to(logps.device), self.candidates), -torch.inf)
        tried = best_exchanges(wanted, tokens, self.tries, lambda prompt: is_text(prompt, self.tokenizer))
        values = [self.value(rollout, scores.total), *(self.tried(rollout, prompt) for prompt in tried)]
        best = int(torch.stack(values).nan_to_num(nan=-torch.inf).argmax())  # of equal ones the first
        with torch.no_grad():
            self.prompt.copy_(torch.tensor([before, *tried][best]))
            stats = measure(policy, distribution, rollout)
        logp = logps.gather(1, tokens.unsqueeze(1)).mean()
        metrics = {"exchanged": logp.new_tensor(best > 0), "gain": values[best] - values[0], "prompt_logp": logp}
        return StepOutput(0 * self.prompt.sum() - values[0], stats, metrics)

    def promise(self, experience: Experience, tokens: Tensor) -> Tensor:
        """What each token would gain in each place, to first order; over all processes, (n, V)."""
        rollout, scores, distribution = experience.rollout, experience.scores, self.sampler.distribution
        gains = prompt_gains(self.policy, distribution, rollout, scores, tokens, self.hops, self.estimator)
        return self.reduce.mean(gains)

    @torch.no_grad()
    def tried(self, rollout: Rollout, prompt: list[int]) -> Tensor:
        """The value of another prompt, by new completions with the same noise."""
        torch.manual_seed(self._noise)
        other = self.draw(exchanged(rollout, prompt))
        self.meter.count(other)
        return self.value(other, self.reward.score(self.judged(other)).total)

    @torch.no_grad()
    def value(self, rollout: Rollout, rewards: Tensor) -> Tensor:
        """Mean reward over all processes, with the prompt's fluency."""
        sums = self.reduce.mean(torch.stack([rewards.nansum(), (~rewards.isnan()).sum().to(rewards)]))
        found = sums[0] / sums[1]
        if self.fluency:
            tokens = rollout.prompt_ids[0, columns_of(rollout, len(self.prompt))[0]]
            found = found + self.fluency * self.reduce.mean(prompt_logp(self.policy, rollout, tokens))
        return found

    def draw_loss(self, batch: dict[str, Any]) -> Tensor:
        """Nothing to measure.

        Raises:
            InputError: always.
        """
        raise InputError("PromptSearch has no gradient of weights; leave callbacks that measure one out")

    def _load(self) -> None:
        """Read the model, of which nothing is trained, and the prompt at first."""
        self.policy.load(reference=False)
        if self._parameters.get("prompt") is None:
            self.policy.requires_grad_(False)
            self.policy.reference = self.policy.model
            tokens = self.tokenizer(self.start, add_special_tokens=False)["input_ids"]
            if not tokens:
                raise InputError("PromptSearch.start: no token; write a text of as many words as the prompt is to have")
            self.prompt = nn.Parameter(torch.tensor(tokens, dtype=torch.float32))
            self._readable = readable_tokens(self.tokenizer, self.policy.anatomy.size)
        super()._load()

    def prompt_room(self, text: int) -> int | None:
        """What prompt and completion leave of the context."""
        self._load()
        room = super().prompt_room(text)
        return None if room is None else room - len(self.prompt)

    def frozen_modules(self) -> list[nn.Module]:
        """All but the prompt."""
        return [self.policy, self.reward, self.judges]

    def usage(self) -> str:
        """Where the prompt goes."""
        where = f"in the place of `{self.slot}`" if self.slot else "before each prompt"
        return f"The folder holds no weights. `prompt.txt` goes {where} of the base model:\n\n```\n{self.text}\n```"

    def save_pretrained(self, folder: str, merge: bool = True) -> None:
        """Write the prompt: `prompt.txt`, and its tokens and slot in `prompt.json`."""
        if is_first_process():
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / "prompt.txt").write_text(self.text, encoding="utf-8")
            content = {"text": self.text, "tokens": self.tokens, "slot": self.slot, "model": self.policy.path}
            (Path(folder) / "prompt.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
