"""What the methods share, one idea a file."""

from .alignment import AlignmentModule as AlignmentModule
from .clip_normalized import ClipNormalizedModule as ClipNormalizedModule
from .extragradient import ExtragradientModule as ExtragradientModule
from .pairwise import PairwiseModule as PairwiseModule
from .policy_gradient import PolicyGradientModule as PolicyGradientModule
from .preference import PreferenceModule as PreferenceModule
from .traced import TracedModule as TracedModule
from .trainable import TrainableModule as TrainableModule
from .unpaired import UnpairedModule as UnpairedModule
