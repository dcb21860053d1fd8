"""Completions of a few prompts, outside of any run."""

from collections.abc import Sequence

import torch

from grade_lightning.policies import Policy
from grade_lightning.policies.chat import Prompt
from grade_lightning.policies.encoding import encode_all
from grade_lightning.policies.padding import pad
from grade_lightning.records import Prompts
from grade_lightning.rollouts import Sampler


class Generating:
    """Writes completions as the method samples them."""

    policy: Policy
    sampler: Sampler
    device: torch.device
    global_step: int

    @torch.no_grad()
    def generate(self, prompts: str | Sequence[Prompt]) -> list[str]:
        """A completion of each prompt, by the sampler, with the global random state.

        Args:
            prompts: texts, or conversations as lists of messages; one text is a list of one.

        Raises:
            InputError: a conversation, and the tokenizer has no chat template.
        """
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        self.policy.load()
        tokenizer = self.policy.tokenizer
        ids, mask = pad(encode_all(tokenizer, asked), tokenizer, left=True)
        given = Prompts(ids.to(self.device), mask.to(self.device), {"prompt": asked})
        return self.sampler(self.policy, given, step=self.global_step).completions
