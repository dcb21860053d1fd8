"""OnlineIPO: the loss over all pairs by hand, judges of pairs, and what is left out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.methods import OnlineIPO
from grade_lightning.modules import PairwiseModule
from grade_lightning.policies import Policy
from grade_lightning.rewards import FunctionPreference, NoReward, PairwiseJudge
from grade_lightning.rollouts import Sampler
from tests.conftest import make_model, make_tokenizer
from tests.methods.toy_task import Toy, trainer
from tests.modules.test_preference import gradients, log_ratios
from tests.modules.toys import Prescribed, Watch, constant, distance, flat, loader, prompts

pytestmark = pytest.mark.usefixtures("own_random_state")

TABLES: list[list[list[float]]] = [
    [[0.5, 1.0, 0.2], [0.0, 0.5, 0.9], [0.8, 0.1, 0.5]],  # a circle
    [[0.5, 0.5, 0.5]] * 3,
    [[0.5, torch.nan, 0.3], [torch.nan, 0.5, 0.4], [0.7, 0.6, 0.5]],
]


class Prescribes(PairwiseJudge):
    """The tables above."""

    def forward(self, one: Any, two: Any) -> Tensor:
        return torch.tensor([table[i][j] for table in TABLES for i, j in ((0, 1), (0, 2), (1, 2))])

    def table(self, seen: Any, size: int) -> Tensor:
        found = super().table(seen, size)
        torch.testing.assert_close(found, torch.tensor(TABLES), equal_nan=True)
        return found


def make(method: type[PairwiseModule] = OnlineIPO, lr: float = 0.05, **kwargs: Any) -> PairwiseModule:
    settings: dict[str, Any] = {
        "sampler": Sampler(12, engine=Prescribed()),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=lr),
        "lr_scheduler": constant,
        "num_generations": 3,
    }
    policy = Policy.from_model(make_model("gpt2", torch.float64, scale=4.0), make_tokenizer())
    module = method(policy=policy, **settings | kwargs)
    module.configure_model()
    return module


@pytest.mark.parametrize("normalize", [True, False])
def test_all_pairs_of_a_prompt_against_plain_transformers(normalize: bool) -> None:
    """Two steps; a prompt on which the judge abstains adds nothing to a mean over all prompts."""
    watch, batch = Watch(), prompts(3, 3)
    module = make(beta=0.4, pairwise_judge=Prescribes(), normalize=normalize)
    assert isinstance(module.reward, NoReward)
    trainer(callbacks=[watch], log_every_n_steps=1).fit(module, loader(batch, batch))
    given = [
        (ids[mask.bool()].tolist(), completion)
        for ids, mask, group in zip(
            batch["input_ids"], batch["attention_mask"], batch["columns"]["completions"], strict=True
        )
        for completion in group
    ]
    for step in range(2):
        model, ratios = log_ratios(watch.before[step], given, temperature=1.0)
        h = [x.mean() if normalize else x.sum() for x in ratios]
        loss: Any = 0.0
        for prompt in range(2):
            wins = [sum(row) / 3 for row in TABLES[prompt]]
            for i, j in ((0, 1), (0, 2), (1, 2)):
                gap = h[3 * prompt + i] - h[3 * prompt + j] - (wins[i] - wins[j]) / 0.4
                loss = loss + gap**2 / 3
        (loss / 3).backward()
        logged = watch.logged[step]
        assert logged["train/loss"] == pytest.approx(float(loss.detach()) / 3, rel=1e-5)
        assert distance(watch.gradients[step], gradients(model)) < 1e-5
        assert logged["train/undecided"] == pytest.approx(1 - 5 / 9)  # and two pairs of the third prompt
        sums = [float(x.detach().sum()) for x in ratios]
        pairs = [(0, 1), (2, 0), (1, 2), (8, 6), (8, 7)]
        margins = [sums[i] - sums[j] for i, j in pairs]
        assert logged["train/margin"] == pytest.approx(sum(margins) / 5, rel=1e-4, abs=1e-6)
        assert logged["train/accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 5)


def test_even_preferences_hold_the_policy_where_it_is() -> None:
    watch = Watch()
    even = FunctionPreference(lambda completions, **_: [0.5] * len(completions))
    trainer(callbacks=[watch], log_every_n_steps=1).fit(make(pairwise_judge=even), loader(prompts(3, 3)))
    assert watch.logged[0]["train/loss"] == 0
    assert watch.logged[0]["train/undecided"] == 1
    assert not flat(watch.gradients[0]).any()


def test_the_judge_is_in_no_checkpoint_and_is_not_trained() -> None:
    class Learned(Prescribes):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

    module = make(pairwise_judge=Learned())
    assert not [name for name in module.state_dict() if "judge" in name]
    assert not any(p.requires_grad for p in module.pairwise_judge.parameters())


def test_what_cannot_work_is_named() -> None:
    for wrong in ({"beta": 0.0}, {"num_generations": 1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            make(reward=Toy(), **wrong)
    with pytest.raises(InputError, match=r"data.batch_size = 4: must be a multiple of 3"):
        make(reward=Toy()).batching.rows(4)
