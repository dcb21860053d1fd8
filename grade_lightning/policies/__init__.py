"""A causal language model with adapters, and its frozen reference."""

from .accepting import PolicyLike as PolicyLike
from .accepting import as_policy as as_policy
from .chunked import ChunkedPass as ChunkedPass
from .loading import bundled_folder as bundled_folder
from .loading import resolve_model as resolve_model
from .lora import LoRA as LoRA
from .network import Network as Network
from .packed import PackedPass as PackedPass
from .passes import Pass as Pass
from .passes import SharedPrefixPass as SharedPrefixPass
from .passes import WholePass as WholePass
from .policy import Policy as Policy
from .sampled_linear import RowSampling as RowSampling
from .value_head import ValueHead as ValueHead
