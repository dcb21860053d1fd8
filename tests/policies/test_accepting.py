"""What is taken for a policy."""

from pathlib import Path

import pytest

from grade_lightning.errors import InputError
from grade_lightning.methods import DPO, SupervisedFineTuning
from grade_lightning.policies import Policy, as_policy
from tests.conftest import make_model


def test_what_is_a_policy(tmp_path: Path) -> None:
    policy, model = Policy("gpt2"), make_model()
    assert as_policy(policy) is policy
    assert as_policy(None).path == "bundled"
    assert as_policy(tmp_path).path == str(tmp_path)
    assert as_policy(model).base is model
    assert SupervisedFineTuning(policy="gpt2").policy.path == "gpt2"
    assert DPO(policy="gpt2").policy.path == "gpt2"
    with pytest.raises(InputError, match="policy: int is not a policy; give a Policy, a model"):
        as_policy(3)  # type: ignore[arg-type]
