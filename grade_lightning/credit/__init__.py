"""Credit: control variates for policy gradients, by what is known of tokens or of what stands before them."""

from .base import Credit as Credit
from .base import TokenScores as TokenScores
from .prefix import PrefixCredit as PrefixCredit
from .tokens import COLUMN as COLUMN
from .tokens import CriticCredit as CriticCredit
from .tokens import PathwiseCredit as PathwiseCredit
from .tokens import RegressionCredit as RegressionCredit
from .tokens import TokenCredit as TokenCredit
