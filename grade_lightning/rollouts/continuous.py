"""Sampling by the continuous batching of transformers."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from grade_lightning.errors import DivergenceError, InputError, check_range
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout

from .assembling import Answer, assembled, bare
from .caches import keys_and_values
from .distribution import Distribution
from .engine import Engine

try:
    from transformers import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.cb_logits_processors import (
        ContinuousBatchingLogitsProcessor,
        ContinuousBatchingLogitsProcessorList,
    )
    from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState
except ImportError:  # pragma: no cover; an older or a later transformers
    _MISSING, ContinuousBatchingLogitsProcessor = True, object  # type: ignore[assignment]
else:
    _MISSING = False


class ContinuousBatchingEngine(Engine):
    """Sampling without padding: an ended completion makes room at once, and keys and values live in pages.

    It uses the policy's own network, so there are no weights to hand over, and it reads a prompt once for all its
    completions in a row. It computes in the precision of the weights, also where the training pass is autocast. The
    pages are made for each rollout and freed after it. Made for a GPU with flash attention: with other attention each
    token is compared with the keys of all sequences of the batch, and most of that is masked.

    Its scheduler is driven from here, in this thread, through parts of transformers that are not documented: 5.16 to
    5.24 have them.

    Args:
        page_size: tokens of a page of keys and values; by default 256, as flash attention wants, or 32 with another.
        max_batch_tokens: most tokens that go through the network at once.
        max_memory: share of the free memory that the pages may take.

    References:
        Efficient Memory Management for Large Language Model Serving with PagedAttention (Kwon et al., 2023),
        https://arxiv.org/abs/2309.06180
    """

    def __init__(self, page_size: int | None = None, max_batch_tokens: int = 8192, max_memory: float = 0.6) -> None:
        check_range("[4, inf)", "engine", page_size=page_size)
        check_range("[1, inf)", "engine", max_batch_tokens=max_batch_tokens)
        check_range("(0, 1]", "engine", max_memory=max_memory)
        self.page_size = page_size
        self.max_batch_tokens = max_batch_tokens
        self.max_memory = max_memory

    @torch.no_grad()
    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        """Sample one completion for each prompt, with the global random state.

        Raises:
            DivergenceError: the policy's distribution is not a number.
            InputError: the model cannot be sampled in this way, or there is no memory for its pages.
        """
        name = f"{policy.path}: {type(policy.base).__name__}"
        if _MISSING:
            raise InputError(f"{type(self).__name__} does not know transformers {transformers.__version__}; {_OTHER}")
        if keys_and_values(policy) is None:
            raise InputError(f"{name} keeps more than keys and values, which cannot be paged; {_OTHER}")
        asked = bare(prompts)
        with policy.evaluating(), torch.autocast(prompts.ids.device.type, enabled=False):
            gc.freeze()  # transformers collects all garbage after each use, which takes longer than a small rollout
            try:
                answers = self._answers(policy, distribution, asked)
            except InputError:
                raise
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise InputError(f"{type(self).__name__}: no memory ({_line(error)}); lower {_LOWER}") from error
            except Exception as error:  # the model's own code and transformers', in which anything may fail
                raise InputError(
                    f"{name} cannot be sampled by continuous batching: {_line(error)}; {_OTHER}"
                ) from error
            finally:
                gc.unfreeze()
        return assembled(type(self).__name__, policy, distribution, prompts, answers)

    def _answers(self, policy: Policy, distribution: Distribution, asked: list[list[int]]) -> list[Answer]:
        """One for each prompt, in their order."""
        model: Any = policy.base
        with _running(
            model, self._config(model, distribution, asked), _Processed(distribution, policy.eos_ids)
        ) as processor:
            for request in _requests(asked, distribution.max_new_tokens, policy.eos_ids):
                processor.scheduler.add_waiting_request(request)
            while processor.has_pending_requests() and processor.prepare_next_batch():
                processor._generation_step(model)
                processor.update_batch()
            queue = processor.output_router.output_queue
            found = [queue.get_nowait() for _ in range(queue.qsize())]
        failed = next((output.error for output in found if output.error is not None), None)
        if failed is not None:
            raise RuntimeError(failed)
        found.sort(key=lambda output: _row(output.request_id))
        return [Answer(output.generated_tokens, output.logprobs) for output in found]

    def _config(self, model: Any, distribution: Distribution, asked: list[list[int]]) -> "ContinuousBatchingConfig":
        """As many pages as all completions need together."""
        size = self.page_size or (256 if "flash" in model.config._attn_implementation else 32)
        return ContinuousBatchingConfig(
            page_size=size,
            num_blocks=1 + sum(-(-(len(ids) + distribution.max_new_tokens) // size) for ids in asked),
            max_batch_tokens=min(self.max_batch_tokens, sum(map(len, asked))),
            max_memory_percent=self.max_memory,
            max_requests_per_batch=len(asked),
            allow_block_sharing=False,  # completions of a prompt are copies of a request that has been read once
            safety_margin=0.0,
            use_async_batching=False,
            use_cuda_graph=False,
            return_logprobs=True,
            auto_switch_to_flash=False,
            seed=int(torch.randint(2**31, ())),
        )


_OTHER = "take the TransformersEngine"
_LOWER = "--model.sampler.at_once, --data.batch_size or --model.sampler.engine.max_batch_tokens"


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextmanager
def _running(model: Any, config: "ContinuousBatchingConfig", processed: "_Processed") -> Iterator[Any]:
    """The processor of batches; the model's attention and settings come back afterwards."""
    attention, own = model.config._attn_implementation, model.generation_config
    model.generation_config = GenerationConfig()  # its own penalties would be merged into ours
    try:
        manager = model.init_continuous_batching(GenerationConfig(do_sample=True, eos_token_id=-1), config)
        manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([processed]))
        manager.logit_processor.tensors_required = 1
        yield manager._create_batch_processor()
    finally:
        model.generation_config = own
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)


def _requests(asked: list[list[int]], longest: int, eos_ids: list[int]) -> Iterator["RequestState"]:
    """A request for each prompt; those that are the same and stand in a row are children of the first."""
    row = 0
    for ids, same in groupby(asked):
        count = len(list(same))
        begun = 1 if len(ids) > 1 else count  # a copy is made before the last token is read
        for first in range(row, row + begun):
            yield RequestState(
                str(first), ids, max_new_tokens=longest, eos_token_id=eos_ids, num_children=count - begun
            )
        row += count


def _row(request_id: str) -> int:
    """Which row a request is.

    Example:
        >>> _row("4"), _row("4__child#1")
        (4, 6)
    """
    parent, child, number = request_id.partition("__child#")
    return int(parent) + (1 + int(number) if child else 0)


class _Processed(ContinuousBatchingLogitsProcessor):
    """Makes the sampled distribution of logits; knows for each how many tokens its completion has."""

    supported_kwargs: ClassVar[dict[str, type]] = {}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, distribution: Distribution, eos_ids: list[int]) -> None:
        self.distribution, self.eos_ids, self.began = distribution, eos_ids, False

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Rows that are padding have no position."""
        int32_tensor.fill_(0)

    def prepare_tensor_args(self, requests_with_new_token: "list[FutureRequestState]") -> Tensor:
        """Position of each new token; a request that lost its pages has its first tokens in the prompt."""
        states = [request.state for request in requests_with_new_token]
        return torch.tensor(
            [
                len(state.generated_tokens)
                + (len(state.initial_tokens) - state._true_initial_tokens if state._true_initial_tokens else 0)
                for state in states
            ],
            dtype=torch.int32,
        )

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Logits of the distribution, (n, V)."""
        logits = self.distribution.logits(scores, self.eos_ids, positions=tensor_arg[: len(scores)])
        if not self.began and bool(logits.isnan().any()):  # looked at once, for that waits for a GPU
            raise DivergenceError("the policy gives no probabilities: it has diverged; lower --model.optimizer.lr")
        self.began = True
        return logits
