"""From prompts to completions."""

from .branching import Branching as Branching
from .continuous import ContinuousBatchingEngine as ContinuousBatchingEngine
from .distribution import Distribution as Distribution
from .engine import Engine as Engine
from .environment import Environment as Environment
from .environment import Message as Message
from .gymnasium import GymnasiumEnvironment as GymnasiumEnvironment
from .relaxed import RelaxedEngine as RelaxedEngine
from .sampler import Sampler as Sampler
from .tools import Calculator as Calculator
from .tools import Search as Search
from .transformers import TransformersEngine as TransformersEngine
from .turns import Turns as Turns
from .verifiers import VerifiersEnvironment as VerifiersEnvironment
from .vllm import VLLMEngine as VLLMEngine
from .vllm_server import VLLMServer as VLLMServer
