"""Turns: the policy and an environment speak by turns; what the environment says is attended to, not trained on."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from grade_lightning.errors import InputError, check_range
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout

from .distribution import Distribution
from .engine import Engine
from .environment import Environment, Message
from .episode import Episode, joined, padded
from .stopping import cut
from .transformers import TransformersEngine

T = TypeVar("T")


class Turns(Engine):
    """Several turns of the policy, with the answers of an environment between them.

    A completion is the opening, all turns and all answers together, of `max_new_tokens` at most; an answer that would
    leave no room for another turn is left out, and ends it. What the environment says is appended as plain text. A
    column `returns` has the sum of each completion's rewards, for a reward function that names it, and `turn_rewards`
    has the list of them, for :class:`.TurnRewards`. Where an environment raises an exception, that completion ends with
    the turn, with None as its return; where all do, the run ends.

    Args:
        environment: makes an environment for each completion.
        max_turns: turns of the policy at most.
        turn_tokens: most tokens of a turn; None: all that are left.
        engine: draws the policy's turns; `generate` of transformers by default.
        workers: environments that begin or answer at the same time, in threads: for those that wait for something.
            The results are the same, unless environments share something that they change.
    """

    def __init__(
        self,
        environment: Callable[[], Environment],
        max_turns: int = 4,
        turn_tokens: int | None = None,
        engine: Engine | None = None,
        workers: int = 1,
    ) -> None:
        check_range("[1, inf)", "engine", max_turns=max_turns, turn_tokens=turn_tokens, workers=workers)
        self.environment = environment
        self.max_turns = max_turns
        self.turn_tokens = turn_tokens
        self.engine = engine or TransformersEngine()
        self.workers = workers

    def sync(self, policy: Policy, step: int) -> None:
        """Hand over the policy's weights."""
        self.engine.sync(policy, step)

    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        """One conversation for each prompt, with the global random state.

        Raises:
            InputError: all environments raise an exception, or the opening of one leaves the policy no room.
        """
        episodes = self.begin(policy, distribution, prompts, range(len(prompts)))
        while not all(episode.done for episode in episodes.values()):
            self.speak(policy, distribution, prompts, episodes)
        return joined([episodes[row] for row in range(len(prompts))], prompts, policy, distribution)

    def begin(
        self, policy: Policy, distribution: Distribution, prompts: Prompts, rows: Iterable[int]
    ) -> dict[int, Episode]:
        """Conversations up to the policy's first turn, by the rows of their prompts."""
        episodes = {
            row: Episode(self.environment(), prompts.ids[row][prompts.mask[row].bool()].tolist()) for row in rows
        }

        def reset(row: int) -> list[Message]:
            episode = episodes[row]
            try:
                return episode.environment.reset({name: values[row] for name, values in prompts.columns.items()})
            except Exception as error:
                episode.error = _error_of(episode.environment, error)
                return []

        for episode, messages in zip(episodes.values(), self._at_once(reset, list(episodes)), strict=True):
            opening = _encoded(policy.tokenizer, messages)
            _check_opening(episode.environment, len(opening), distribution.max_new_tokens)
            episode.add(opening, turn=0, sampled=False)
        return episodes

    def speak(self, policy: Policy, distribution: Distribution, prompts: Prompts, episodes: dict[int, Episode]) -> None:
        """One turn of the policy in each conversation that goes on, and what it is answered.

        Args:
            policy: the policy.
            distribution: of the tokens, and how many of them a completion has at most.
            prompts: of all conversations.
            episodes: those that have begun, by the row of their prompt.
        """
        tokenizer, rows = policy.tokenizer, [row for row, episode in episodes.items() if not episode.done]
        live = [episodes[row] for row in rows]
        room = [distribution.max_new_tokens - len(episode.tokens) for episode in live]
        assert min(room) >= 1
        room = [min(tokens, self.turn_tokens or tokens) for tokens in room]
        ids, mask = padded([e.prompt + e.tokens for e in live], tokenizer.pad_token_id, left=True)
        columns = {name: [values[row] for row in rows] for name, values in prompts.columns.items()}
        begun = Prompts(ids.to(prompts.ids), mask.to(prompts.mask), columns)
        said = cut(
            self.engine.generate(policy, replace(distribution, max_new_tokens=max(room)), begun), distribution.stop
        )
        spoken = []
        for i, (row, episode) in enumerate(zip(rows, live, strict=True)):
            length = min(int(said.lengths[i]), room[i])
            tokens = said.completion_ids[i, :length].tolist()
            logps = None if said.engine_logps is None else said.engine_logps[i, :length].tolist()
            self.drawn(row, episodes, logps)
            episode.known = episode.known and logps is not None
            episode.add(tokens, episode.turn, sampled=True, logps=logps)
            spoken.append((episode, tokenizer.batch_decode([tokens], skip_special_tokens=True)[0]))
        for episode, answered in zip(live, self._at_once(_answered, spoken), strict=True):
            if isinstance(answered, InputError):
                _fail(episode, answered)
                continue
            messages, reward, done = answered
            episode.rewards.append(reward or 0.0)
            answer = _encoded(tokenizer, messages)
            full = len(episode.tokens) + len(answer) >= distribution.max_new_tokens
            episode.done = done or full or episode.turn + 1 == self.max_turns
            if not episode.done:
                episode.add(answer, episode.turn, sampled=False)
                episode.turn += 1
        over = [episode for episode in live if episode.done]
        for episode, more in zip(over, self._at_once(_closed, over), strict=True):
            if episode.error is not None:
                continue
            if isinstance(more, InputError):
                _fail(episode, more)
            else:
                episode.rewards[-1] += more or 0.0

    def _at_once(self, function: Callable[[Any], T], given: Sequence[Any]) -> list[T]:
        """What a function of an environment returns for each, in their order."""
        if self.workers == 1:
            return [function(one) for one in given]
        with ThreadPoolExecutor(self.workers, "environment") as pool:
            return list(pool.map(function, given))

    def drawn(self, row: int, episodes: dict[int, Episode], logps: list[float] | None) -> None:
        """A turn was drawn and not yet added; nothing happens here.

        Args:
            row: whose turn it is.
            episodes: those that have begun; more may be added.
            logps: of the turn's tokens.
        """
        return None


def _answered(spoken: tuple[Episode, str]) -> tuple[list[Message], float | None, bool] | InputError:
    """An environment's answer to a turn, or what it failed with, be it at the beginning."""
    episode, text = spoken
    if episode.error is not None:
        return episode.error
    try:
        return episode.environment.step(text)
    except Exception as error:
        return _error_of(episode.environment, error)


def _closed(episode: Episode) -> float | InputError | None:
    """The last reward of an environment that is let go, or what it failed with."""
    try:
        return episode.environment.close()
    except Exception as error:
        return _error_of(episode.environment, error)


def _fail(episode: Episode, error: InputError) -> None:
    """End a completion, and say why."""
    episode.error, episode.done = error, True
    rank_zero_warn(f"{error}; the completion ends here, without a return")


def _error_of(environment: Environment, error: Exception) -> InputError:
    """An exception of the user's code is an error that says whose it is."""
    reason, name = " ".join(str(error).split()), type(environment).__name__
    found = InputError(f"environment {name}: it raised {type(error).__name__}: {reason}")
    found.__cause__ = error
    return found


def _check_opening(environment: Environment, opening: int, most: int) -> None:
    if opening >= most:
        raise InputError(
            f"environment {type(environment).__name__}: its opening has {opening} tokens, but a completion with it has "
            f"{most} at most, and the policy needs some of them; shorten it, or raise --model.sampler.max_new_tokens"
        )


def _encoded(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    text = "".join(message["content"] for message in messages)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False) if text else []
    return ids
