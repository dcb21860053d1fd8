"""Anatomy: where a network is cut into body and head. Found by trying on a few tokens, and compared with the whole."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grade_lightning.errors import InputError
from grade_lightning.functional.sequences import position_ids

from .context import context_length
from .head import head_of

TOKENS = 6
"""Tokens of the longer one of the two rows that are tried; the other has two less."""


@dataclass(frozen=True)
class Anatomy:
    """How the parts of a model are used.

    Args:
        body: name of the module that makes the hidden states. None: the model is used whole; its logits stand for the
            hidden states, and there is no head.
        head: names of the parameters between the hidden states and the logits.
        width: of the hidden states.
        size: number of logits of a position.
        unused: names of trainable parameters that the model's own forward pass does not use.
        obstacle: why completions cannot share their prompt in a pass, "" if they can; None where nobody asked.
        continues: whether a completion can go through behind the keys and values of its prompt.
    """

    body: str | None
    head: tuple[str, ...]
    width: int
    size: int
    unused: tuple[str, ...] = ()
    obstacle: str | None = None
    continues: bool = False


def examine(model: Any, path: str) -> Anatomy:
    """Find how a model is cut, and check that what is computed with its parts is what it computes itself.

    A few tokens are enough: logits from embeddings, through body and head, must be those of its own forward pass; each
    parameter that this one uses must get a gradient; no position may see a later one; and padding must change nothing.
    Where no cut passes, the model is used whole.

    Args:
        model: with its adapters, in evaluation mode.
        path: what messages call it.

    Raises:
        InputError: one of these does not hold; the message says which.
    """
    name = f"{path}: {type(model).__name__}"
    ids = some_tokens(model, 2, TOKENS)
    if ids.is_meta:  # shapes alone, as for counting parameters: there is nothing to try
        weight = model.get_output_embeddings().weight
        return Anatomy(_candidates(model)[0], (), weight.shape[1], weight.shape[0])
    try:
        with _all_trained(model):
            own = model(input_ids=ids, use_cache=False).logits
            used = _reached(model, own)
    except Exception as error:  # the model's own code, in which anything may fail
        raise InputError(f"{name} does not run on tokens alone ({_line(error)}); use a text model") from error
    found, differs = None, ""
    for body in (*_candidates(model), None):
        try:
            with _all_trained(model):
                tried, ours = _try(model, body, ids)
                lost = used - _reached(model, ours)
        except Exception as error:
            differs = _line(error)
            continue
        gap = distance(ours, own)
        if gap <= tolerance(ours) and not lost:
            found = tried
            break
        differs = f"{min(lost)} gets no gradient" if lost else f"logits differ by {gap:.2g} of their spread"
    if found is None:
        raise InputError(f"{name} does not make of embeddings what it makes of tokens ({differs}); use another model")
    cut: Anatomy = found
    _check_rows(lambda x, mask: _logits(model, cut, x, mask), ids, name, "logits", causal=True)
    trained = {parameter for parameter, value in model.named_parameters() if value.requires_grad}
    return replace(cut, unused=tuple(sorted(trained - used)))


def examine_backbone(model: Any, path: str) -> int:
    """The width of a backbone's hidden states, after the same checks, but that a position may see later ones.

    Raises:
        InputError: embeddings do not give what tokens give, or padding changes it.
    """
    name, ids = f"{path}: {type(model).__name__}", some_tokens(model, 2, TOKENS)
    try:
        with torch.no_grad():
            own = model(input_ids=ids, use_cache=False).last_hidden_state
            ours = _states(model, ids, torch.ones_like(ids))
    except Exception as error:
        raise InputError(f"{name} does not run on embeddings alone ({_line(error)}); use a text model") from error
    if not (gap := distance(ours, own)) <= tolerance(own):
        raise InputError(
            f"{name} does not make of embeddings what it makes of tokens (hidden states differ by {gap:.2g} of their "
            "spread); use another model"
        )
    _check_rows(lambda x, mask: _states(model, x, mask), ids, name, "hidden states", causal=False)
    width: int = own.shape[-1]
    return width


def run(body: Callable[..., Any], inputs: Tensor, attention_mask: Tensor | None, positions: Tensor) -> Any:
    """The output of a model, or of its body, for embeddings."""
    return body(inputs_embeds=inputs, attention_mask=attention_mask, position_ids=positions, use_cache=False)


def distance(found: Tensor, right: Tensor) -> float:
    """Root of the mean squared difference, as a share of the spread of the right values; infinite ones are left out.

    Example:
        >>> distance(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]))
        1.0
    """
    if found.shape != right.shape:
        return float("inf")
    finite = right.isfinite()
    found, right = (x.detach()[finite].double() for x in (found, right))
    return float((found - right).square().mean().sqrt() / right.std())


def difference(trial: Callable[[], tuple[float, float]]) -> str:
    """What a trial of a model says against another way through it; nothing if it says nothing.

    Args:
        trial: finds how far hidden states are apart, and how far they may be.

    Example:
        >>> difference(lambda: (0.25, 0.1)), difference(lambda: (0.0, 0.1)), difference(lambda: (1 / 0, 0.1))
        ('its hidden states differ by 0.25 of their spread', '', 'ZeroDivisionError: division by zero')
    """
    try:
        gap, allowed = trial()
    except Exception as error:  # the model's own code, in which anything may fail
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "" if gap <= allowed else f"its hidden states differ by {gap:.2g} of their spread"


def tolerance(values: Tensor) -> float:
    """The largest :func:`distance` that rounding explains."""
    return 1e-3 if values.dtype in (torch.float32, torch.float64) else 0.1


def some_tokens(model: Any, rows: int, length: int) -> Tensor:
    """Tokens to try a model on, always the same ones; none that its configuration knows by name.

    (rows, length), or as many as the model takes.
    """
    length = min(length, context_length(model.config) or length)
    named = _token_ids(model.config.to_dict())
    every = torch.arange(model.get_input_embeddings().weight.shape[0], device="cpu")
    ordinary = every[~torch.isin(every, torch.tensor(named, dtype=torch.long, device="cpu"))]
    chosen = torch.randint(len(ordinary), (rows, length), generator=torch.Generator().manual_seed(0), device="cpu")
    return ordinary[chosen].to(model.device)


def _token_ids(config: Any) -> list[int]:
    """What a configuration and its parts call the id or the index of a token."""
    found: list[int] = []
    for name, value in config.items():
        if isinstance(value, dict):
            found += _token_ids(value)
        elif isinstance(name, str) and re.search(r"token_(id|index)$", name):
            found += [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, int)]
    return found


def _candidates(model: Any) -> list[str]:
    """Names of what may be the body: the base model, the decoder, and whole models within this one."""
    names = {module: name for name, module in model.named_modules()}
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    found = (model.base_model, model.get_decoder(), model.base_model.get_decoder(), *parts)
    return list(dict.fromkeys(names[module] for module in found if module is not model and module in names))


def _try(model: Any, body: str | None, ids: Tensor) -> tuple[Anatomy, Tensor]:
    """One cut, and the logits that it makes of whole rows."""
    mask = torch.ones_like(ids)
    inputs = model.get_input_embeddings()(ids)
    before = inputs.detach().clone()
    output = run(model if body is None else model.get_submodule(body), inputs, mask, position_ids(mask))
    if not torch.equal(inputs, before):  # their gradient would be that of something else
        raise ValueError("embeddings that are given are changed in place")
    if body is None:
        logits = output.logits
        return Anatomy(None, (), logits.shape[-1], logits.shape[-1]), logits
    hidden = output.last_hidden_state
    head, _ = head_of(model, body, ())
    parameters = _reached(model, head(hidden.detach().flatten(0, 1)), outside=body)
    logits = head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
    return Anatomy(body, tuple(sorted(parameters)), hidden.shape[-1], logits.shape[-1]), logits


@torch.no_grad()
def _logits(model: Any, cut: Anatomy, ids: Tensor, mask: Tensor) -> Tensor:
    inputs, positions = model.get_input_embeddings()(ids), position_ids(mask)
    if cut.body is None:
        logits: Tensor = run(model, inputs, mask, positions).logits
        return logits
    hidden = run(model.get_submodule(cut.body), inputs, mask, positions).last_hidden_state
    head, parameters = head_of(model, cut.body, cut.head)
    whole: Tensor = head(hidden.flatten(0, 1), *parameters).unflatten(0, hidden.shape[:2])
    return whole


@torch.no_grad()
def _states(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    states: Tensor = run(model, model.get_input_embeddings()(ids), mask, position_ids(mask)).last_hidden_state
    return states


def _check_rows(compute: Callable[[Tensor, Tensor], Tensor], ids: Tensor, name: str, what: str, causal: bool) -> None:
    """Check that a row's values depend on no later token, and neither on padding nor on its neighbours."""
    ones = torch.ones_like(ids)
    long, short = compute(ids[:1], ones[:1]), compute(ids[1:, 2:], ones[1:, 2:])
    if causal:
        changed = torch.cat([ids[:1, :-1], ids[1:, -1:]], dim=1)
        gap = distance(compute(changed, ones[:1])[:, :-1], long[:, :-1])
        if not gap <= tolerance(long):
            raise InputError(
                f"{name} is not a causal model: a later token changes its {what} (by {gap:.2g} of their spread)"
            )
    mask = ones.clone()
    mask[1, :2] = 0
    both = compute(ids, mask)
    for gap in (distance(both[:1], long), distance(both[1:, 2:], short)):
        if not gap <= tolerance(long):
            raise InputError(
                f"{name}: its {what} of a row change with the padding of its batch (by {gap:.2g} of their spread), so "
                "prompts of different length could not be trained on together; use another model"
            )


@contextmanager
def _all_trained(model: Any) -> Iterator[None]:
    """With graphs through all parameters, also through those that are frozen."""
    before = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, trained in before:
            parameter.requires_grad_(trained)


def _reached(model: Any, result: Tensor, outside: str | None = None) -> set[str]:
    """Names of the parameters in a result's graph; of one with several names a name outside of that module."""
    found: set[Any] = set()
    nodes, seen = [result.grad_fn], set[Any]()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        nodes += [parent for parent, _ in node.next_functions]
    names: dict[Any, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in found and (
            parameter not in names or (outside is not None and not name.startswith(f"{outside}."))
        ):
            names[parameter] = name
    return set(names.values())


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
