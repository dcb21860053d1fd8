"""From prompts to completions."""

from .branching import Branching as Branching
from .continuous import ContinuousBatchingEngine as ContinuousBatchingEngine
from .distribution import Distribution as Distribution
from .engine import Engine as Engine
from .relaxed import RelaxedEngine as RelaxedEngine
from .sampler import Sampler as Sampler
from .tools import Calculator as Calculator
from .tools import Search as Search
from .transformers import TransformersEngine as TransformersEngine
from .turns import Environment as Environment
from .turns import Turns as Turns
from .vllm import VLLMEngine as VLLMEngine
from .vllm_server import VLLMServer as VLLMServer
