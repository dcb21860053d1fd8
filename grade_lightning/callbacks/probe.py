"""Independent gradients at frozen parameters, by the module's own training step."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import Optimizer

from grade_lightning.callbacks.frozen import frozen
from grade_lightning.errors import InputError
from grade_lightning.functional.moments import gram
from grade_lightning.functional.sketch import count_sketch
from grade_lightning.numerics import hash_seed, seed_generators
from grade_lightning.records import batch_rows, slice_rows


class Probed(NamedTuple):
    """What a probe found."""

    products: dict[str, Tensor]
    """Gram matrix of all gradients for each layer; those of a block in a row."""
    preconditioned: dict[str, Tensor]
    """The same in the metric of Adam, each component divided by √v; empty for other optimizers, or before a step."""
    blocks: int
    """Blocks of all processes."""
    size: int
    """Rows of a block that are trained on."""


def probe(
    trainer: Trainer,
    module: LightningModule,
    batch: Any,
    batch_idx: int,
    prompts: int = 8,
    draws: int = 4,
    sketch: int | None = 4096,
    spare: int = 0,
) -> Probed:
    """Draw gradients of the parts of a batch, and leave everything as it was.

    Args:
        trainer: whose training the module is in.
        module: any LightningModule with automatic optimization.
        batch: as `training_step` gets it.
        batch_idx: its number.
        prompts: blocks of rows that the batch is divided into, at most one for each row.
        draws: gradients of each block.
        sketch: numbers that are kept of each layer's gradient; None: all.
        spare: further rows in the batch for each that is trained on; each block has its own.

    Raises:
        InputError: the batch has no rows to divide, or the training step returns no loss.
    """
    try:
        count = torch.tensor(batch_rows(batch), device=module.device)
    except ValueError as error:
        raise InputError(f"GradientVariance: {error}; set probe_every_n_steps to 0") from error
    rows = int(trainer.strategy.reduce(count, reduce_op="min"))
    needed = max(1, rows // (1 + spare))
    blocks = min(prompts, needed)
    size = needed // blocks
    given = size * (1 + spare)
    key = (int(os.environ.get("PL_GLOBAL_SEED", "0")), "probe", trainer.global_step)
    named = trained(module, trainer.optimizers[0])
    metrics: list[Sequence[Tensor | None]] = [[None] * len(named)]
    adam = adam_scales(trainer.optimizers[0], list(named.values()))
    metrics += [adam] if adam else []
    layers: dict[str, list[int]] = {}
    for index, name in enumerate(named):
        layers.setdefault(layer_of(name), []).append(index)
    kept: list[dict[str, list[Tensor]]] = [{layer: [] for layer in layers} for _ in metrics]
    with frozen(trainer, module), trainer.precision_plugin.train_step_context():
        for block in range(blocks):
            part = slice_rows(batch, block * given, given)
            for draw in range(draws):
                seed = hash_seed(*key, trainer.global_rank, block, draw)
                seed_generators(seed)
                gradients = list(_gradients(trainer, module, part, batch_idx, list(named.values())))
                for scales, vectors in zip(metrics, kept, strict=True):
                    for layer, members in layers.items():
                        scaled = {i: _times(gradients[i], scales[i]) for i in members}
                        vectors[layer].append(_keep(scaled, sketch, hash_seed(*key)))
    products = [
        {layer: gram(_of_all_processes(trainer, torch.stack(rows))) for layer, rows in vectors.items()}
        for vectors in kept
    ]
    return Probed(products[0], products[1] if adam else {}, blocks * trainer.world_size, size)


def trained(module: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer trains, by name."""
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in module.named_parameters() if p.requires_grad and id(p) in given}


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to: its name up to the first number, else up to its own name.

    Example:
        >>> layer_of("policy.base.transformer.h.3.attn.c_attn.weight"), layer_of("net.embedding.weight")
        ('policy.base.transformer.h.3', 'net.embedding')
    """
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1] if numbered else parts[:-1]) or name


def loss_scale(trainer: Trainer) -> float:
    """What losses are multiplied by in 16-bit precision."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _gradients(
    trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, parameters: list[nn.Parameter]
) -> Iterator[Tensor]:
    """`autograd.grad` touches no `.grad` and wakes no hook of DDP."""
    scale = loss_scale(trainer)
    found = torch.autograd.grad(_loss(module, batch, batch_idx) * scale, parameters, allow_unused=True)
    for gradient, parameter in zip(found, parameters, strict=True):
        yield torch.zeros_like(parameter) if gradient is None else gradient / scale


def _loss(module: LightningModule, batch: Any, batch_idx: int) -> Tensor:
    if callable(draw := getattr(module, "draw_loss", None)):
        drawn: Tensor = draw(batch)
        return drawn
    indexed = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)  # as Lightning asks
    output = module.training_step(batch, batch_idx) if indexed else module.training_step(batch)
    loss = output["loss"] if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise InputError(f"GradientVariance: {type(module).__name__}.training_step returned no loss to differentiate")
    return loss


def adam_scales(optimizer: Optimizer, parameters: list[nn.Parameter]) -> list[Tensor | None] | None:
    """1 / (√v̂ + ε) for each parameter; None if the optimizer keeps no v, or not yet."""
    settings = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    scales: list[Tensor | None] = []
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq" not in state:
            return None
        group = settings[id(parameter)]
        corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        scales.append(1 / (corrected.sqrt() + group["eps"]))
    return scales


def _times(gradient: Tensor, scale: Tensor | None) -> Tensor:
    return gradient if scale is None else gradient * scale


def _keep(gradients: dict[int, Tensor], sketch: int | None, seed: int) -> Tensor:
    """The gradients of a layer's tensors as one vector, or its sketch."""
    if sketch is None:
        return torch.cat([gradient.flatten() for gradient in gradients.values()])
    sketches = [count_sketch(g.flatten(), sketch, hash_seed(seed, index)) for index, g in gradients.items()]
    return torch.stack(sketches).sum(0)


def _of_all_processes(trainer: Trainer, vectors: Tensor) -> Tensor:
    if trainer.world_size == 1:
        return vectors
    gathered: Tensor = trainer.strategy.all_gather(vectors)
    return gathered.flatten(0, 1)
