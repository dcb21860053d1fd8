"""The methods: one LightningModule in each file, none of which imports another."""

from .grade_ste import GradeSTE as GradeSTE
from .reward_model import RewardModel as RewardModel
from .supervised import SupervisedFineTuning as SupervisedFineTuning
