"""The interface of an inference engine."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout

from .distribution import Distribution


class Engine(ABC):
    """Draws completions. Whatever the method, it needs token ids and the log-probabilities by which they were drawn.

    An engine's noise comes from torch's global random state, which the module seeds before each rollout; an engine
    with random numbers of its own takes its seed from there (`int(torch.randint(2**62, ()))`). So a resumed run draws
    what it would have drawn.
    """

    def sync(self, policy: Policy, step: int) -> None:
        """Hand over the policy's weights; called before each rollout. By default the engine uses the policy itself.

        Args:
            policy: the policy.
            step: optimizer steps that its weights have behind them.
        """
        return None

    @abstractmethod
    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        """Draw one completion for each prompt.

        Args:
            policy: the policy; sampled in evaluation mode whatever mode it is in.
            distribution: of the tokens, and how many at most. Its stop strings may be left to the sampler, which cuts
                completions after them.
            prompts: B prompts, the same one in a row for each of its completions.

        Returns:
            B completions in the order of the prompts, with their columns and with `engine_logps`.
        """

    def start(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Callable[[], Rollout]:
        """Begin to draw, with the weights that were handed over and the random numbers of now.

        Returns:
            Waits for the completions. An engine that samples elsewhere returns before they are drawn; by default they
            are drawn here.
        """
        rollout = self.generate(policy, distribution, prompts)
        return lambda: rollout
