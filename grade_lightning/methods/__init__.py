"""The methods: one LightningModule in each file, none of which imports another.

A new file is found without a line of its own here; the lines are for type checkers and readers.
"""

import importlib
import pkgutil

from grade_lightning.modules import TrainableModule as _TrainableModule

from .aepo import AEPO as AEPO
from .agentic_aepo import AgenticAEPO as AgenticAEPO
from .capo import CAPO as CAPO
from .cispo import CISPO as CISPO
from .copo import COPO as COPO
from .cpl import CPL as CPL
from .d3s import D3S as D3S
from .dapo import DAPO as DAPO
from .dcpo import DCPO as DCPO
from .dpo import DPO as DPO
from .dr_grpo import DrGRPO as DrGRPO
from .drpo import DRPO as DRPO
from .egpo import EGPO as EGPO
from .gppo import GPPO as GPPO
from .grade import Grade as Grade
from .grade_ste import GradeSTE as GradeSTE
from .grpo import GRPO as GRPO
from .gspo import GSPO as GSPO
from .ipo import IPO as IPO
from .knapsack_rl import KnapsackRL as KnapsackRL
from .kto import KTO as KTO
from .ngrpo import NGRPO as NGRPO
from .online_ipo import OnlineIPO as OnlineIPO
from .ppo import PPO as PPO
from .prompt_search import PromptSearch as PromptSearch
from .reinforce import Reinforce as Reinforce
from .reinforce_plus_plus import ReinforcePlusPlus as ReinforcePlusPlus
from .reward_model import RewardModel as RewardModel
from .rloo import RLOO as RLOO
from .sapo import SAPO as SAPO
from .st_ppo import STPPO as STPPO
from .supervised import SupervisedFineTuning as SupervisedFineTuning
from .turn_ppo import TurnPPO as TurnPPO
from .zeroth_order import ZerothOrder as ZerothOrder

for _found in pkgutil.iter_modules(__path__, f"{__name__}."):
    for _value in vars(importlib.import_module(_found.name)).values():
        if isinstance(_value, type) and issubclass(_value, _TrainableModule) and _value.__module__ == _found.name:
            globals()[_value.__name__] = _value

del _TrainableModule, _found, _value
