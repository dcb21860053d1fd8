"""Sampling by vLLM in the process that trains."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.distributed.tensor import DTensor

from grade_lightning.errors import InputError, check_range
from grade_lightning.policies import Policy
from grade_lightning.policies.lora import merged_state
from grade_lightning.records import Prompts, Rollout

from .assembling import Answer, assembled, bare
from .distribution import Distribution
from .engine import Engine


def handed_over(policy: Policy) -> dict[str, Tensor]:
    """The policy's weights as a checkpoint names them, adapters added to the weights that they adapt.

    Raises:
        InputError: they are spread over processes.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = policy.base.state_dict() if policy.lora is None else merged_state(policy.base)
    if any(isinstance(tensor, DTensor) for tensor in state.values()):
        raise InputError("VLLMEngine: weights that are spread over processes cannot be handed over; leave fsdp2 out")
    return {name: tensor.detach() for name, tensor in revert_weight_conversion(policy.base, state).items()}


class VLLMEngine(Engine):
    """Sampling by vLLM in the same process, with weights that are handed over before each rollout.

    vLLM keeps a copy of the weights beside the policy's. LoRA adapters are added to the copy. Each rank samples its
    own prompts with an engine of its own. The first rollout builds the engine; a process has room for one. Needs the
    extra `vllm`.

    Args:
        kv_cache_gb: memory for keys and values, in GiB.
        max_length: longest prompt with its completion; by default what the model takes, or what fits into the memory.
        dtype: of its copy of the weights; by default that of the policy. Under `--trainer.precision bf16-mixed` take
            bfloat16.
        enforce_eager: no compiled graphs: a quick start, and slower tokens on a GPU.

    References:
        Efficient Memory Management for Large Language Model Serving with PagedAttention (Kwon et al., 2023),
        https://arxiv.org/abs/2309.06180
    """

    def __init__(
        self,
        kv_cache_gb: float = 1.0,
        max_length: int | None = None,
        dtype: str | None = None,
        enforce_eager: bool = True,
    ) -> None:
        check_range("(0, inf)", "engine", kv_cache_gb=kv_cache_gb)
        check_range("[2, inf)", "engine", max_length=max_length)
        if find_spec("vllm") is None:
            raise InputError("VLLMEngine needs vLLM: pip install 'grade-lightning[vllm]'")
        self.kv_cache_gb = kv_cache_gb
        self.max_length = max_length
        self.dtype = dtype
        self.enforce_eager = enforce_eager
        self._engine: Any = None

    def sync(self, policy: Policy, step: int) -> None:
        """Hand over the weights, and forget the keys and values of the old ones.

        Raises:
            InputError: vLLM cannot be built for the policy, or does not take its weights.
        """
        if self._engine is None:
            with _told("cannot be built"), _as_it_was():
                self._engine = self._build(policy)
        with _told("does not take the policy's weights"), torch.no_grad(), _as_it_was():
            weights = iter(handed_over(policy).items())
            self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self._engine.reset_prefix_cache()

    def generate(self, policy: Policy, distribution: Distribution, prompts: Prompts) -> Rollout:
        """Sample one completion for each prompt, each with a seed from the global random state.

        Raises:
            InputError: a prompt is too long, vLLM fails, or it answers something else than it was asked for.
        """
        assert self._engine is not None, "sync() hands over the weights first"
        asked, limit = bare(prompts), self._engine.model_config.max_model_len
        longest = max(map(len, asked)) + distribution.max_new_tokens
        if longest > limit:
            raise InputError(
                f"VLLMEngine: the longest prompt with sampler.max_new_tokens = {distribution.max_new_tokens} has "
                f"{longest} tokens, but there is room for {limit}; raise --model.sampler.engine.max_length, or "
                "lower --data.max_prompt_tokens"
            )
        seeds = torch.randint(2**62, (len(prompts),)).tolist()
        with _told("failed in the middle of a rollout"), _as_it_was():
            from vllm import SamplingParams

            settings = sampling_settings(distribution, policy.eos_ids)
            outputs = self._engine.generate(
                [{"prompt_token_ids": ids} for ids in asked],
                [SamplingParams(seed=seed, **settings) for seed in seeds],
                use_tqdm=False,
            )
            answers = [_answer(output.outputs[0]) for output in outputs]
        return assembled(type(self).__name__, policy, distribution, prompts, answers)

    def _build(self, policy: Policy) -> Any:
        """An engine with weights of the right shapes, which are handed over later."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # tensors are handed over as they are
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the cores are the trainer's, too
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        many = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        with TemporaryDirectory() as folder:
            policy.base.config.save_pretrained(folder)
            policy.tokenizer.save_pretrained(folder)
            return LLM(
                folder,
                load_format="dummy",
                generation_config="vllm",  # none of the model's own
                dtype=self.dtype or str(policy.dtype).removeprefix("torch."),
                max_model_len=self.max_length or policy.context_length or -1,
                kv_cache_memory_bytes=int(self.kv_cache_gb * 2**30),
                enforce_eager=self.enforce_eager,
                logprobs_mode="processed_logprobs",
                distributed_executor_backend="external_launcher" if many else None,
            )


def sampling_settings(distribution: Distribution, eos_ids: list[int]) -> dict[str, Any]:
    """The distribution in vLLM's words; stop strings are left to the sampler.

    Example:
        >>> sampling_settings(Distribution(max_new_tokens=5, top_k=3), [0])["top_k"]
        3

    Raises:
        InputError: vLLM would sample from another one.
    """
    if distribution.temperature < 0.01:
        raise InputError(f"sampler.temperature = {distribution.temperature}: vLLM takes 0.01 or more; raise it")
    return {
        "max_tokens": distribution.max_new_tokens,
        "min_tokens": distribution.min_new_tokens,
        "temperature": distribution.temperature,
        "top_k": distribution.top_k or 0,
        "top_p": distribution.top_p,
        "stop_token_ids": eos_ids,
        "ignore_eos": True,  # the model's own; ours are among the line above
        "logprobs": 0,  # of the sampled token alone
        "detokenize": False,
    }


def _answer(completion: Any) -> Answer:
    logps = completion.logprobs or []
    tokens = list(completion.token_ids)
    return Answer(tokens, [found[token].logprob for token, found in zip(tokens, logps, strict=False)])


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Errors of vLLM as one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of vLLM, in which anything may fail
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "memory" in reason.lower()
        remedy = "lower --model.sampler.engine.kv_cache_gb or max_length" if memory else "its own messages are above"
        raise InputError(f"VLLMEngine {what} ({reason}); {remedy}; the run resumes with --ckpt_path") from error


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Random states and settings of torch that vLLM changes for the whole process come back.

    Weights that are made while Lightning validates, in inference mode, could not be written to in training.
    """
    threads, limit = torch.get_num_threads(), torch.set_num_threads
    with isolate_rng(), torch.inference_mode(False):
        try:
            yield
        finally:
            torch.set_num_threads = limit
            torch.set_num_threads(threads)
