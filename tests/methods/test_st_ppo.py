"""ST-PPO divides Turn-PPO's gradient (tests/modules/test_clip_normalized.py); of tokens it divides PPO's."""

import pytest
import torch

from grade_lightning.methods import STPPO, TurnPPO
from tests.modules.toys import build, plain, prompts, run

pytestmark = pytest.mark.usefixtures("own_random_state")


def test_of_tokens_it_is_s_ppo() -> None:
    """Before anything is clipped the gradient is that of Turn-PPO with a turn for each token."""
    settings = plain(STPPO, epochs=2, num_generations=1)
    one = run(build(STPPO, **settings, ratio="token"), prompts(8, size=1))
    two = run(build(TurnPPO, **settings, separator=""), prompts(8, size=1))
    assert all(torch.equal(one.gradients[0][name], two.gradients[0][name]) for name in two.gradients[0])
    assert one.logged[1]["train/clip_bias"] >= 0
