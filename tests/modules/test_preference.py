"""DPO and IPO: which pairs are made of rollouts, pairs of the data through the DataModule, and the loss by hand."""

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.functional import logsigmoid

from grade_lightning.data import LocalFiles, TextDataModule
from grade_lightning.errors import InputError
from grade_lightning.methods import DPO, IPO
from grade_lightning.modules import PreferenceModule
from grade_lightning.modules.preference import pairs_rollout
from grade_lightning.policies import Policy
from grade_lightning.records import Rollout
from grade_lightning.rewards import NoReward, Reward
from grade_lightning.rollouts import Sampler
from tests.conftest import VOCABULARY, make_model, make_prompts, make_tokenizer, mostly_slow
from tests.methods.toy_task import Toy, trainer
from tests.modules.toys import Prescribed, Watch, constant, distance, flat, loader, prompts

both_methods = pytest.mark.parametrize("method", [DPO, IPO])


pytestmark = pytest.mark.usefixtures("own_random_state")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make(method: type[PreferenceModule], lr: float = 0.02, **kwargs: Any) -> PreferenceModule:
    settings: dict[str, Any] = {
        "reward": Toy(),
        "sampler": Sampler(12, engine=None if kwargs.get("pairs") == "data" else Prescribed()),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=lr),
        "lr_scheduler": constant,
    }
    policy = Policy.from_model(make_model("gpt2", torch.float64, scale=4.0), make_tokenizer())
    module = method(policy=policy, **settings | kwargs)
    module.configure_model()
    return module


def run(module: PreferenceModule, *windows: dict[str, Any], **kwargs: Any) -> Watch:
    watch = Watch()
    trainer(callbacks=[watch], log_every_n_steps=1, **kwargs).fit(module, loader(*windows))
    return watch


# ---- by hand --------------------------------------------------------------------------------------------------------


def log_ratios(
    state: dict[str, Tensor], pairs: list[tuple[list[int], list[int]]], temperature: float
) -> tuple[torch.nn.Module, list[Tensor]]:
    """Of each completion log π − log π_ref of its tokens after the prompt, row by row, by plain transformers."""
    model: Any = make_model("gpt2", torch.float64)
    own = {name.removeprefix("policy.model."): x for name, x in state.items() if name.startswith("policy.model.")}
    model.load_state_dict(own, strict=False)  # the head is the table
    reference: Any = make_model("gpt2", torch.float64, scale=4.0)
    found = []
    for prompt, completion in pairs:
        ids = torch.tensor([prompt + completion])
        logps = [
            (network.eval()(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
            for network in (model, reference)
        ]
        index = torch.tensor(completion).unsqueeze(1)
        found.append((logps[0].gather(1, index) - logps[1].detach().gather(1, index)).squeeze(1))
    return model, found


def loss_by_hand(method: type[PreferenceModule], ratios: list[Tensor], beta: float, smoothing: float = 0.0) -> Tensor:
    """Of the preferred completions, then the others; as the papers (and, for IPO's mean over tokens, TRL) write it."""
    half = len(ratios) // 2
    losses = []
    for chosen, rejected in zip(ratios[:half], ratios[half:], strict=True):
        if method is IPO:
            losses.append((chosen.mean() - rejected.mean() - 1 / (2 * beta)) ** 2)
        else:
            margin = beta * (chosen.sum() - rejected.sum())
            losses.append(-(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin))
    return torch.stack(losses).mean()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {f"policy.model.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


# ---- pairs from rollouts --------------------------------------------------------------------------------------------


class Given(Reward):
    """The values in the column `rewards`, one for each of a prompt's completions; None abstains."""

    def forward(self, rollout: Rollout) -> Tensor:
        values = [row[i % len(row)] for i, row in enumerate(rollout.columns["rewards"])]
        return torch.tensor([torch.nan if value is None else float(value) for value in values])


TABLE: list[list[float | None]] = [
    [0.3, 0.9, 0.1, 0.5],
    [None, 0.2, 0.4, None],
    [0.7, 0.7, 0.7, 0.7],
    [None, None, 0.5, None],
    [None, None, None, None],
    [-1.0, -2.0, -3.0, 0.0],
]
BEST, WORST, DECIDED = [1, 2, 0, 2, 0, 3], [2, 1, 0, 2, 0, 2], [0, 1, 5]


def rewarded(rewards: list[list[float | None]] = TABLE, seed: int = 0) -> dict[str, Any]:
    batch = prompts(len(rewards), len(rewards[0]), seed)
    return batch | {"columns": batch["columns"] | {"rewards": rewards}}


def pairs_of(batch: dict[str, Any], rows: list[int]) -> list[tuple[list[int], list[int]]]:
    """Prompts and completions, as lists of tokens: the best ones, then the worst."""
    found = []
    for picks in (BEST, WORST):
        for row in rows:
            prompt = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
            found.append((prompt, batch["columns"]["completions"][row][picks[row]]))
    return found


@both_methods
def test_the_best_and_the_worst_completion_of_each_prompt_are_a_pair(method: type[PreferenceModule]) -> None:
    batch = rewarded()
    experience = make(method, reward=Given()).collect(batch)
    rollout = experience.rollout
    for row, (prompt, completion) in enumerate(pairs_of(batch, list(range(6)))):
        mask = rollout.completion_mask[row]
        assert rollout.prompt_ids[row][rollout.prompt_mask[row].bool()].tolist() == prompt
        if row % 6 in DECIDED:
            assert rollout.completion_ids[row][mask].tolist() == completion
    better, worse = experience.scores.total.chunk(2)
    assert (better > worse).tolist() == [row in DECIDED for row in range(6)]
    assert better[DECIDED].tolist() == pytest.approx([0.9, 0.4, 0.0])
    assert worse[DECIDED].tolist() == pytest.approx([0.1, 0.2, -3.0])


@both_methods
def test_prompts_without_a_better_completion_are_left_out(method: type[PreferenceModule]) -> None:
    """Ties, one reward alone, none at all: they add nothing to a mean over all pairs, before and after a step."""
    module, batch = make(method, reward=Given(), beta=0.2), rewarded()
    watch = run(module, batch, batch)
    for step in range(2):
        model, ratios = log_ratios(watch.before[step], pairs_of(batch, DECIDED), temperature=1.0)
        loss = loss_by_hand(method, ratios, beta=0.2) * len(DECIDED) / 6
        loss.backward()
        logged = watch.logged[step]
        assert logged["train/loss"] == pytest.approx(float(loss), rel=1e-5)
        assert distance(watch.gradients[step], gradients(model)) < 1e-5
        assert logged["train/undecided"] == 0.5
        margins = [float(c.sum() - r.sum()) for c, r in zip(ratios[:3], ratios[3:], strict=True)]
        assert logged["train/margin"] == pytest.approx(sum(margins) / 3, rel=1e-4, abs=1e-6)
        if step == 1:  # at first all margins are 0
            assert logged["train/accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 3)
            assert abs(logged["train/margin"]) > 0.01


@both_methods
def test_nothing_to_choose_between_is_no_loss(method: type[PreferenceModule]) -> None:
    nothing: list[list[float | None]] = [[0.5] * 4, [None] * 4, [None, 0.1, None, None]]
    watch = run(make(method, reward=Given()), rewarded(nothing))
    assert watch.logged[0]["train/loss"] == 0
    assert watch.logged[0]["train/undecided"] == 1
    assert watch.logged[0]["train/accuracy"] == watch.logged[0]["train/margin"] == 0
    assert not flat(watch.gradients[0]).any()


def test_as_many_prompts_as_make_the_batch() -> None:
    assert make(DPO).batching.rows(32) == 8
    assert make(DPO, pairs="data").batching.rows(32) == 16
    with pytest.raises(InputError, match=r"data.batch_size = 30: must be a multiple of 4"):
        make(DPO).batching.rows(30)
    with pytest.raises(InputError, match=r"multiple of 2"):
        make(IPO, pairs="data").batching.rows(3)


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"beta": -1.0}, {"num_generations": 1}], ids=str)
def test_what_cannot_work_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        make(DPO, **wrong)


# ---- pairs from data ------------------------------------------------------------------------------------------------


def preferences(count: int) -> list[dict[str, str]]:
    """Prompts of one to three words; the preferred completions have high words, the others low ones."""
    generator = torch.Generator().manual_seed(3)

    def words(low: int, high: int, length: int) -> str:
        return " ".join(f"w{int(i)}" for i in torch.randint(low, high, (length,), generator=generator))

    rows = []
    for i in range(count):
        prompt = f"w{2 + i % 17}" + f" w{2 + i // 17}" + " w3" * (i % 2)
        rows.append(
            {"prompt": prompt, "chosen": " " + words(11, 19, 1 + i % 5), "rejected": " " + words(2, 9, 4 - i % 4)}
        )
    return rows


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def data(path: Path, **kwargs: Any) -> TextDataModule:
    sizes: dict[str, Any] = {
        "batch_size": 8,
        "prompt_size": 20,
        "val_size": 4,
        "max_prompt_tokens": 5,
        "max_text_tokens": 12,
    }
    return TextDataModule(LocalFiles(str(path)), **sizes | kwargs)


class Batches(Callback):
    """The prompts of each training batch."""

    def __init__(self) -> None:
        self.prompts: list[list[str]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.prompts.append(batch["columns"]["prompt"])
        assert set(batch["columns"]) == {"prompt"}


@pytest.mark.parametrize("suffix", mostly_slow([".jsonl", ".parquet"], ".jsonl"))
@pytest.mark.parametrize(
    ("method", "settings"),
    [(DPO, {}), (DPO, {"label_smoothing": 0.2}), (IPO, {}), (DPO, {"sampler": Sampler(8, temperature=0.6, top_k=3)})],
    ids=["DPO", "smoothed", "IPO", "temperature"],
)
def test_pairs_of_the_data_against_plain_transformers(
    method: type[PreferenceModule], settings: dict[str, Any], suffix: str, tmp_path: Path
) -> None:
    """Loss, gradient, accuracy and margin of each step from the rows' own texts; nothing here was sampled."""
    rows = preferences(40)
    module = make(method, lr=0.01, beta=0.3, pairs="data", **settings)
    watch, seen = Watch(), Batches()
    fitted = trainer(max_steps=3, max_epochs=1, callbacks=[watch, seen], log_every_n_steps=1)
    fitted.fit(module, datamodule=data(write(tmp_path / f"pairs{suffix}", rows)))
    assert fitted.global_step == 3

    tokenizer, texts = make_tokenizer(), {row["prompt"]: row for row in rows}
    used = [prompt for batch in seen.prompts for prompt in batch]
    assert len(used) == len(set(used)) == 12
    temperature = module.sampler.distribution.temperature
    for step, batch in enumerate(seen.prompts):
        pairs = [
            ([0, *tokenizer.encode(prompt)], [*tokenizer.encode(texts[prompt][side]), 0])
            for side in ("chosen", "rejected")
            for prompt in batch
        ]
        model, ratios = log_ratios(watch.before[step], pairs, temperature)
        loss = loss_by_hand(method, ratios, 0.3, settings.get("label_smoothing", 0.0))
        loss.backward()
        logged = watch.logged[step]
        assert logged["train/loss"] == pytest.approx(float(loss), rel=1e-5)
        assert distance(watch.gradients[step], gradients(model)) < 1e-5
        margins = [float(c.sum() - r.sum()) for c, r in zip(ratios[:4], ratios[4:], strict=True)]
        assert logged["train/margin"] == pytest.approx(sum(margins) / 4, rel=1e-4, abs=1e-6)
        assert logged["train/undecided"] == 0
        if step > 0:
            assert logged["train/accuracy"] == sum(margin > 0 for margin in margins) / 4


def test_smoothing_moves_the_loss() -> None:
    """At a margin m the loss rises by smoothing times β m: the pairs of the test above do tell the two apart."""
    ratios = [torch.tensor([1.0, 0.5]), torch.tensor([-0.5])]
    plain, smooth = (float(loss_by_hand(DPO, ratios, 0.3, smoothing)) for smoothing in (0.0, 0.2))
    assert smooth - plain == pytest.approx(0.2 * 0.3 * 2.0)


def test_the_preference_is_learnt(tmp_path: Path) -> None:
    """From even odds to every pair the right way round, in four passes over the data."""
    module = make(DPO, pairs="data", optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2))
    watch = Watch()
    fitted = trainer(max_epochs=4, callbacks=[watch], log_every_n_steps=1)
    fitted.fit(module, datamodule=data(write(tmp_path / "pairs.jsonl", preferences(40))))
    assert watch.logged[0]["train/loss"] == pytest.approx(0.6931, abs=1e-4)
    assert watch.logged[0]["train/margin"] == pytest.approx(0, abs=1e-6)
    assert watch.logged[-1]["train/accuracy"] == 1
    assert watch.logged[-1]["train/loss"] < 0.3


def test_the_first_batch_of_data_is_checked_for_what_can_be_checked(tmp_path: Path) -> None:
    """Nobody sampled it, so its log-probabilities are not compared; that the policy is its reference is."""
    path = write(tmp_path / "pairs.jsonl", preferences(40))
    honest = make(DPO, pairs="data", sampler=Sampler(8, temperature=0.5, top_p=0.9, min_new_tokens=2))
    trainer(max_steps=1).fit(honest, datamodule=data(path))
    (found,) = trainer().validate(honest, datamodule=data(path), verbose=False)  # prompts, as for every method
    assert found["val/response_length"] >= 2
    moved = make(DPO, pairs="data")
    with torch.no_grad():
        for parameter in moved.policy.model.parameters():
            parameter.add_(0.2)
    with pytest.raises(InputError, match="reference is not the model that the policy started as"):
        trainer(max_steps=1).fit(moved, datamodule=data(path))


@both_methods
def test_held_out_pairs_are_measured(method: type[PreferenceModule], tmp_path: Path) -> None:
    """Loss, accuracy and margin of the validation's pairs against plain transformers; no figure is NaN."""
    rows = preferences(40)
    module = make(method, reward=None, beta=0.3, pairs="data", optimizer=lambda p: torch.optim.Adam(p, lr=0.02))
    source = data(write(tmp_path / "pairs.jsonl", rows), eval_batch_size=3)
    fitted = trainer(max_steps=2)
    fitted.fit(module, datamodule=source)
    (found,) = trainer().validate(module, datamodule=source, verbose=False)
    assert not [name for name, value in found.items() if math.isnan(value)]
    assert "val/reward" not in found
    held_out, tokenizer = source.splits["validation"], make_tokenizer()
    pairs = [
        ([0, *tokenizer.encode(row["prompt"])], [*tokenizer.encode(row[side]), 0])
        for side in ("chosen", "rejected")
        for row in held_out
    ]
    state = {name: value.detach() for name, value in module.state_dict().items()}
    _, ratios = log_ratios(state, pairs, temperature=1.0)
    margins = [float(c.sum() - r.sum()) for c, r in zip(ratios[:4], ratios[4:], strict=True)]
    assert max(map(abs, margins)) > 0.01
    assert found["val/loss"] == pytest.approx(float(loss_by_hand(method, ratios, 0.3)), rel=1e-5)
    assert found["val/margin"] == pytest.approx(sum(margins) / 4, rel=1e-4)
    assert found["val/accuracy"] == sum(margin > 0 for margin in margins) / 4


def test_completions_of_the_data_must_fit_into_the_context(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", preferences(40))
    with pytest.raises(InputError, match=r"context is 64 tokens.*may have 5 .*completions 60 \(--data.max_text_tokens"):
        trainer(max_steps=1).fit(make(DPO, pairs="data"), datamodule=data(path, max_text_tokens=60))


def test_pairs_are_a_rollout_that_nobody_sampled() -> None:
    """The chosen ones, then the rejected ones, padded to the same width; prompts and columns twice."""
    batch = {
        "input_ids": torch.tensor([[1, 5], [6, 7]]),
        "attention_mask": torch.tensor([[0, 1], [1, 1]]),
        "chosen_ids": torch.tensor([[8, 0], [9, 0]]),
        "chosen_mask": torch.tensor([[1, 1], [1, 1]]),
        "rejected_ids": torch.tensor([[3, 4, 0], [0, 1, 1]]),
        "rejected_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
        "columns": {"prompt": ["w5", "w6 w7"]},
    }
    rollout = pairs_rollout(batch, make(DPO).policy)
    assert rollout.prompts == ["w5", "w6 w7"] * 2
    assert rollout.completions == ["w8", "w9", "w3 w4", ""]
    assert rollout.completion_ids.tolist() == [[8, 0, 1], [9, 0, 1], [3, 4, 0], [0, 1, 1]]
    assert rollout.lengths.tolist() == [2, 2, 3, 1]
    assert rollout.ended.all()
    assert rollout.columns == {"prompt": ["w5", "w6 w7"] * 2}
    assert rollout.engine_logps is None
    assert rollout.groups.tolist() == [0, 1, 0, 1]
    assert rollout.completion_ids.max() < VOCABULARY


def test_pairs_from_data_need_no_reward() -> None:
    """Training goes on, and evaluation measures all but a reward."""
    module = DPO(policy=Policy.from_model(make_model("gpt2"), make_tokenizer()), pairs="data", sampler=Sampler(4))
    assert isinstance(module.reward, NoReward)
    batch = make_prompts((2, 2))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    pairs = {"chosen_ids": ids, "chosen_mask": mask, "rejected_ids": ids.flip(1), "rejected_mask": mask}
    before = flat({name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad})
    trainer().fit(module, loader(batch | pairs | {"columns": {}}))
    assert not torch.equal(flat({n: p.detach() for n, p in module.named_parameters() if p.requires_grad}), before)
    (found,) = trainer().validate(module, loader(batch | {"columns": {}}), verbose=False)
    assert not [name for name in found if name.startswith("val/reward")]
    assert found["val/kl"] > 0
