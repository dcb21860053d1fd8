"""How noisy the gradient is, for any LightningModule with automatic optimization."""

import math
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from grade_lightning.callbacks.loggers import log_figure
from grade_lightning.callbacks.noise_figure import draw_noise
from grade_lightning.callbacks.opposing import Opposing, opposing, write
from grade_lightning.callbacks.probe import loss_scale, probe, trained
from grade_lightning.errors import InputError, check_range
from grade_lightning.functional.intervals import Interval, pseudo_values, ratio_interval
from grade_lightning.functional.moments import moments_from_norms, variance_components
from grade_lightning.modules.trainable import TrainableModule, batching_of
from grade_lightning.records import batch_rows


class GradientVariance(Callback):
    """Measure the scatter of the gradient that the optimizer gets.

    *Passive*, always, without any further backward pass: from the micro-batches of gradient accumulation and from the
    processes before they are averaged, of the last `window` steps. With one micro-batch on one process there is
    nothing to compare, and only `grad/norm` and `grad/across_tensor_std` are logged.

    *Probe*, every N steps: at frozen parameters, for the prompts of the batch that comes next, several independent
    gradients each, by the module's own `training_step` (or `draw_loss(batch)` where it has one). The noise of sampling
    is told from that of the choice of prompts. A probe costs as much as `draws` training steps, and leaves training
    bit for bit as it is (:func:`~grade_lightning.callbacks.frozen.frozen`).

    All figures are of the gradient of one optimizer step, before clipping: its variance is the trace of its covariance.
    `docs/gradient_variance.md` lists them. Intervals are of 95 %; NaN says that the signal is not resolved.

    Args:
        window: optimizer steps over which the passive figures are averaged.
        probe_every_n_steps: how often to probe, in optimizer steps; 0: never.
        prompts: blocks of rows, at most as many as the batch has rows, that a batch is divided into for the probe.
        draws: gradients of each block.
        sketch: numbers that are kept of the gradient of each layer; their inner products are right on average, with
            a relative error of about √(2 / sketch). None: whole gradients, in the memory of the device.

    References:
        | An Empirical Model of Large-Batch Training (McCandlish et al., 2018), https://arxiv.org/abs/1812.06162

    Example:
        >>> trainer = Trainer(callbacks=[GradientVariance(probe_every_n_steps=100)], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        window: int = 50,
        probe_every_n_steps: int = 0,
        prompts: int = 8,
        draws: int = 4,
        sketch: int | None = 4096,
    ) -> None:
        check_range("[2, inf)", "gradient_variance", window=window, prompts=prompts, draws=draws)
        check_range("[0, inf)", "gradient_variance", probe_every_n_steps=probe_every_n_steps)
        check_range("[1, inf)", "gradient_variance", sketch=sketch)
        self.window, self.probe_every_n_steps = window, probe_every_n_steps
        self.prompts, self.draws, self.sketch = prompts, draws, sketch
        self.metrics: dict[str, float] = {}
        """The latest figures."""
        self.history: list[tuple[int, float, float, float]] = []
        """Step, relative standard deviation and its interval, of each probe."""
        self.opposing: Opposing | None = None
        """What the latest probe says of prompts whose gradients oppose each other."""
        self._steps: deque[tuple[Tensor, Tensor, int]] = deque(maxlen=window)
        self._handles: list[RemovableHandle] = []
        self._watched: list[int] = []
        self._norms: dict[int, Tensor] = {}
        self._micro: list[Tensor] = []
        self._probing = False
        self._probed = -1
        self._rows = 0.0

    # ---- passive ------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there are gradients to see.

        Raises:
            InputError: the module optimizes by hand, or no process has whole gradients to probe.
        """
        self._micro.clear()  # of a run that was broken off
        self._norms.clear()
        if not pl_module.automatic_optimization:
            raise InputError(
                f"GradientVariance: {type(pl_module).__name__} sets automatic_optimization = False, so it is "
                "unknown when a gradient is complete; leave the callback out"
            )
        if self.probe_every_n_steps and not _has_gradient(pl_module):
            raise InputError(
                f"gradient_variance.probe_every_n_steps = {self.probe_every_n_steps}: {type(pl_module).__name__} has "
                "no gradient to probe; set 0"
            )
        if self.probe_every_n_steps and isinstance(
            trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)
        ):
            raise InputError(
                f"gradient_variance.probe_every_n_steps = {self.probe_every_n_steps}: the probe needs whole gradients, "
                f"which {type(trainer.strategy).__name__} spreads over the processes; set 0, or use ddp"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch what is trained; probe when it is time."""
        if not _has_gradient(pl_module):
            return
        if not self._micro:
            self._watch(trained(pl_module, trainer.optimizers[0]))
        due = self.probe_every_n_steps > 0 and trainer.global_step // self.probe_every_n_steps > self._probed
        self._rows = self._rows_of_step(trainer, pl_module, batch)
        begins = batch_idx % math.lcm(trainer.accumulate_grad_batches, batching_of(pl_module).steps_per_batch) == 0
        if due and begins:
            self._probed = trainer.global_step // self.probe_every_n_steps
            self._probe(trainer, pl_module, batch, batch_idx)

    def _rows_of_step(self, trainer: Trainer, module: LightningModule, batch: Any) -> float:
        """Rows of the data in an optimizer step of all processes; ours may be given a batch several times."""
        try:
            rows = batch_rows(batch) * trainer.world_size
            return batching_of(module).rows_per_optimizer_step(rows, trainer.accumulate_grad_batches)
        except ValueError:  # a batch of texts, say
            return math.nan

    def _watch(self, named: dict[str, Parameter]) -> None:
        """A hook on a parameter sees the gradient of one micro-batch on one process, before it is added to others."""
        parameters = list(named.values())
        if [id(p) for p in parameters] != self._watched:
            self._unwatch()
            self._watched = [id(p) for p in parameters]
            self._handles = [p.register_hook(lambda g, i=i: self._see(i, g)) for i, p in enumerate(parameters)]

    def _unwatch(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._watched = [], []

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the parameters alone."""
        self._unwatch()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the parameters alone."""
        self._unwatch()

    def _see(self, index: int, gradient: Tensor) -> None:
        if not self._probing:
            squared = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32).square()
            # a second time in one backward pass (reentrant checkpointing) it is a part of the gradient: no figure
            self._norms[index] = squared if index not in self._norms else torch.full_like(squared, torch.nan)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The gradient of a micro-batch is complete."""
        if self._norms:
            self._micro.append(torch.stack(list(self._norms.values())).sum() / loss_scale(trainer) ** 2)
            self._norms.clear()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The gradient of a step is complete, averaged and not yet clipped."""
        if not _has_gradient(pl_module):
            return
        gradients = [p.grad for p in trained(pl_module, optimizer).values() if p.grad is not None]
        micro, self._micro = self._micro, []
        if not gradients:
            return
        norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients])
        if getattr(optimizer, "_step_supports_amp_scaling", False):  # it takes the scale of 16-bit off by itself
            norms = norms / loss_scale(trainer)
        if micro:
            # Lightning divides each loss by the number of micro-batches, also where an epoch ends before all are there
            parts, asked = len(micro), trainer.accumulate_grad_batches
            small = trainer.strategy.reduce(torch.stack(micro).mean(), reduce_op="mean") * asked**2
            big = norms.square().sum() * (asked / parts) ** 2
            if parts * trainer.world_size > 1:
                self._steps.append((small, big, parts * trainer.world_size))
        else:
            rank_zero_warn(
                f"GradientVariance: under {type(trainer.strategy).__name__} no gradient of a single micro-batch is "
                "seen, only their mean; the passive figures are left out"
            )
        if trainer._logger_connector.should_update_logs:
            norm, spread = float(norms.square().sum().sqrt()), float(norms.std(unbiased=False))
            self._log(trainer, {"grad/norm": norm, "grad/across_tensor_std": spread} | self._passive(trainer))

    def _passive(self, trainer: Trainer) -> dict[str, float]:
        """The figures of the latest steps together; none where nothing was averaged."""
        groups = [parts for _, _, parts in self._steps]
        if not groups:
            return {}
        device = trainer.strategy.root_device  # where those of a checkpoint are not
        norms = torch.stack([torch.stack([small.to(device), big.to(device)]) for small, big, _ in self._steps])
        pairs = zip(*norms.cpu().double().unbind(1), groups, strict=True)
        found = [(moments_from_norms(small, big, parts), parts) for small, big, parts in pairs]
        variance = torch.stack([one.trace / parts for one, parts in found])
        signal = torch.stack([one.squared_norm for one, _ in found])
        finite = variance.isfinite() & signal.isfinite()  # an overflow in 16 bits
        noise = ratio_interval(variance[finite], signal[finite])
        return {"grad/variance": float(variance[finite].mean())} | _named("grad", _ratios(noise, self._rows))

    def _log(self, trainer: Trainer, figures: dict[str, float]) -> None:
        self.metrics |= figures
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def state_dict(self) -> dict[str, Any]:
        """What the passive figures are averages of, and the probes so far."""
        steps = [(float(small), float(big), groups) for small, big, groups in self._steps]
        return {"steps": steps, "history": list(self.history), "probed": self._probed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self._steps.clear()
        self._steps.extend((torch.tensor(small), torch.tensor(big), n) for small, big, n in state_dict["steps"])
        self.history = list(state_dict["history"])
        self._probed = state_dict["probed"]

    # ---- probe --------------------------------------------------------------------------------------------------

    def _probe(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._probing = True
        try:
            spare = batching_of(module).spare
            found = probe(trainer, module, batch, batch_idx, self.prompts, self.draws, self.sketch, spare)
        finally:
            self._probing = False
        blocks_in_step = self._rows / found.size
        figures: dict[str, float] = {}
        shares: dict[str, tuple[float, float]] = {}
        for name, layers in (("probe", found.products), ("probe_adam", found.preconditioned)):
            if layers:
                whole = torch.stack(list(layers.values())).sum(0)
                figures |= _named(name, self._analysed(whole, found.blocks, blocks_in_step))
        whole = torch.stack(list(found.products.values())).sum(0)
        self.opposing = opposing(trainer, module, batch, found, whole, spare)
        if self.opposing is not None:
            figures |= self.opposing.figures
            write(trainer, self.opposing)
        for layer, products in found.products.items():
            own = self._analysed(products, found.blocks, blocks_in_step)
            shares[layer] = own["sampling_variance"], own["prompt_variance"]
            figures |= {f"probe/{name}/{layer}": own[name] for name in ("variance", "relative_std")}
        middle, low, high = (figures[f"probe/relative_std{end}"] for end in ("", "_low", "_high"))
        self.history.append((trainer.global_step, middle, low, high))
        self._log(trainer, figures)
        self._draw(trainer, shares)

    def _analysed(self, products: Tensor, blocks: int, in_step: float) -> dict[str, float]:
        """Figures of a step's gradient, of so many blocks, from the Gram matrix of draws of single blocks."""
        draws = len(products) // blocks

        def components(some: Tensor) -> Tensor:
            rows = (some.unsqueeze(1) * draws + torch.arange(draws)).flatten()
            found = variance_components(products[rows][:, rows], len(some))
            between = found.between if len(some) > 1 else torch.zeros_like(found.within)
            return torch.stack([found.squared_norm, found.within / in_step, between / in_step])

        signal, within, between = components(torch.arange(blocks))
        # leaving one of two out would leave nothing to compare
        values = (
            pseudo_values(components, blocks) if blocks > 2 else torch.stack([signal, within, between]).unsqueeze(0)
        )
        figures = {
            "squared_norm": float(signal),
            "variance": float(within + between),
            "sampling_variance": float(within),
            "prompt_variance": float(between) if blocks > 1 else math.nan,
        }
        sampling = ratio_interval(values[:, 1], values[:, 0])
        figures |= {f"sampling_{name}": x for name, x in _ratios(sampling, self._rows).items() if "std" in name}
        return figures | _ratios(ratio_interval(values[:, 1] + values[:, 2], values[:, 0]), self._rows)

    def _draw(self, trainer: Trainer, shares: dict[str, tuple[float, float]]) -> None:
        if not trainer.loggers or not trainer.is_global_zero:
            return
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return  # of the extra `report`
        figure = Figure(figsize=(10, 0.25 * len(shares) + 3), layout="constrained")
        draw_noise(figure, self.history, shares)
        log_figure(trainer, "probe/noise", figure, trainer.global_step)


def _has_gradient(module: LightningModule) -> bool:
    """Whether its steps are made of a gradient; those of a search are not."""
    return not isinstance(module, TrainableModule) or module.has_gradient


def _ratios(noise: Interval, rows: float) -> dict[str, float]:
    """All figures that are functions of variance / |G|² alone."""
    estimate, low, high = (float(x.clamp(min=0)) for x in noise)  # by rounding it may be less
    return {
        "relative_std": math.sqrt(estimate),
        "relative_std_low": math.sqrt(low),
        "relative_std_high": math.sqrt(high),
        "snr": 1 / estimate if estimate > 0 else math.nan,
        "cosine": 1 / (1 + estimate),
        "noise_scale": estimate * rows,
    }


def _named(group: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{group}/{name}": value for name, value in figures.items()}
