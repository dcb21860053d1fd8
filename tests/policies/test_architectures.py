"""Every class that transformers maps to causal language models: right, or refused in one line.

The table of docs/architectures.md is made by `python -m tests.policies.test_architectures`.
"""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.functional.sequences import token_logps
from grade_lightning.modules.measuring import measure
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout
from grade_lightning.rollouts import Sampler, TransformersEngine
from tests.conftest import make_tokenizer
from tests.policies.test_tiny import A_FEW, tokens
from tests.policies.tiny import NOT_TINY, PLACEHOLDERS, VOCABULARY, cases, tiny_model

CASES = cases()
DOCS = Path(__file__).parents[2] / "docs" / "architectures.md"


def examined(name: str) -> tuple[str, str]:
    """The class of the model and what is said of it, after sampling, training pass and gradient were compared."""
    model_type, overrides = CASES[name]
    if model_type in NOT_TINY:
        return "", f"not tried: {NOT_TINY[model_type]}"
    refused = ""
    for dtype in (torch.float64, torch.float32):  # not every class can be run in double precision
        model: Any = tiny_model(model_type, dtype, **overrides)
        found = type(model).__name__
        if model_type.startswith("gemma4"):
            model.register_forward_hook(without_placeholders)
        torch.manual_seed(1)
        sampler = Sampler(4)
        try:
            policy = Policy.from_model(model, make_tokenizer())
            rollout = sampler(policy, prompts())
        except InputError as error:
            line = str(error)
            assert "\n" not in line
            said = line.rpartition(f"{found} " if f"{found} " in line else f"{found}: ")[2]
            while (shorter := re.sub(r" \([^()]*\)", "", said)) != said:  # figures, and the words of other libraries
                said = shorter
            refused = f"refused: {said.partition(';')[0]}"
            continue
        check(policy, rollout, 1e-6 if dtype == torch.float64 else 1e-3)
        assert isinstance(sampler.engine, TransformersEngine)
        assert sampler.engine._caching is not None
        caching = {"shared": "prompts shared", "own": "own cache", "none": "no cache"}[sampler.engine._caching[1]]
        whole = "" if policy.anatomy.body else ", used whole"
        return found, f"works{whole}; {caching}{'' if dtype == torch.float64 else '; in single precision'}"
    return found, refused


def without_placeholders(model: Any, arguments: Any, output: Any) -> Any:
    """A model that has learnt does not write the places of images, which embeddings alone do not show to these."""
    output.logits = output.logits - 40 * torch.isin(torch.arange(VOCABULARY), torch.tensor(PLACEHOLDERS))
    return output


def prompts() -> Prompts:
    """Three prompts of which the last is the shortest, the first two the same; padded on the left."""
    ids = tokens(10).view(2, 5)[[0, 0, 1]]
    mask = torch.ones_like(ids)
    mask[-1, :2] = 0
    return Prompts(ids.masked_fill(mask == 0, 1), mask)


def check(policy: Policy, rollout: Rollout, tolerance: float) -> None:
    """The sampler's log-probabilities are the training pass's, and those of each row by itself; gradients, too."""
    policy.eval()
    found = measure(policy, Sampler(4).distribution, rollout)
    mask = rollout.sampled
    assert rollout.engine_logps is not None
    assert (found.logps - rollout.engine_logps.double())[mask].abs().max() < 1e-3
    assert found.kl.abs().max() < tolerance
    ours = gradients(policy, found.logps[mask].sum())
    alone: list[Tensor] = []
    for row in range(len(rollout.ids)):
        one = rollout.select(torch.tensor([row]))
        logits = policy.base(input_ids=one.ids, use_cache=False).logits[:, one.prompt_ids.shape[1] - 1 : -1]
        alone.append(token_logps(logits.log_softmax(-1), one.completion_ids)[0])
        assert (alone[-1] - found.logps[row, : len(alone[-1])]).abs().max() < tolerance
    truth = gradients(policy, torch.cat(alone).sum())
    assert ours.keys() == truth.keys()
    scale = max(float(gradient.abs().max()) for gradient in truth.values())
    for name, gradient in truth.items():
        assert (ours[name] - gradient).abs().max() < 10 * tolerance * scale, name
    unreached = {name for name, p in policy.base.named_parameters() if p.requires_grad and name not in ours}
    assert unreached == set(policy.anatomy.unused)


def gradients(policy: Policy, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in policy.base.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def table() -> dict[str, str]:
    """The rows of the page."""
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    return {line.split("`")[1]: line for line in lines}


def row(name: str) -> str:
    found, said = examined(name)
    return f"| `{name}` | {found} | {said} |"


def check_row(name: str) -> None:
    ours = row(name)
    if f"transformers {transformers.__version__} " in DOCS.read_text():
        assert ours == table()[name]


@pytest.mark.parametrize("name", A_FEW)
def test_a_few_architectures(name: str) -> None:
    check_row(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in A_FEW])
def test_every_architecture(name: str) -> None:
    check_row(name)


def main() -> None:
    """Write the table into the page."""
    page = DOCS.read_text()
    head, _, _ = page.partition("| type |")
    head = re.sub(r"transformers [\d.]+ ", f"transformers {transformers.__version__} ", head)
    rows = []
    for name in CASES:
        with warnings.catch_warnings(action="ignore"):
            rows.append(row(name))
        print(rows[-1], flush=True)
    DOCS.write_text(head + "\n".join(["| type | class | result |", "|---|---|---|", *rows]) + "\n")


if __name__ == "__main__":
    main()
