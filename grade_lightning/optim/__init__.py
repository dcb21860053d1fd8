"""Optimizers that torch does not have, by class path: `--model.optimizer grade_lightning.optim.DCTAdamW`."""

from .dct_adamw import DCTAdamW as DCTAdamW
from .galore import GaLore as GaLore
