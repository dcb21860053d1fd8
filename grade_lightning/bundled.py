"""The bundled models: a tiny policy and a tiny reward, trained on the bundled reviews at first use."""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.utilities import rank_zero_info
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from grade_lightning.data import BundledReviews, TextDataModule
from grade_lightning.methods import RewardModel, SupervisedFineTuning
from grade_lightning.policies import Policy, bundled_folder

CONTEXT = 128
POLICY_STEPS, REWARD_STEPS = 800, 300


def prepare() -> Path:
    """Train the bundled models unless they are there; about a minute on two cores.

    They are built under a lock, in a temporary folder that is renamed at the end, so that an interruption leaves
    nothing half-made and processes that start together build them once.

    Returns:
        The folder, with `policy` and `reward` in it.
    """
    folder = bundled_folder()
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            rank_zero_info(f"First use: training the bundled policy and reward model into {folder} (once)")
            work = Path(tempfile.mkdtemp(prefix="building-", dir=folder.parent))
            try:
                _build(work)
                os.replace(work, folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return folder


def _build(folder: Path) -> None:
    source = BundledReviews()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = _tokenizer(source)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=CONTEXT,
                n_embd=128,
                n_layer=2,
                n_head=4,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                resid_pdrop=0.0,
            )
        )
        policy = SupervisedFineTuning(
            Policy.from_model(model, tokenizer, reference=False), torch.optim.AdamW, _one_cycle(5e-3, POLICY_STEPS)
        )
        _train(policy, source, POLICY_STEPS)
        policy.save_pretrained(str(folder / "policy"))
        reward = RewardModel(str(folder / "policy"), lr_scheduler=_one_cycle(5e-4, REWARD_STEPS))
        _train(reward, source, REWARD_STEPS)
        reward.save_pretrained(str(folder / "reward"))


def _tokenizer(source: BundledReviews) -> PreTrainedTokenizerFast:
    """One token for each word, so that a tiny model need not learn to spell."""
    end, pad, unknown = "<|endoftext|>", "<|pad|>", "<|unknown|>"
    inner = Tokenizer(models.WordLevel(unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    words = trainers.WordLevelTrainer(special_tokens=[end, pad, unknown], show_progress=False)
    inner.train_from_iterator(source.load()["train"]["text"], words)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=end, eos_token=end, pad_token=pad, unk_token=unknown, padding_side="left"
    )


def _one_cycle(lr: float, steps: int) -> LRSchedulerCallable:
    return lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)


def _train(module: LightningModule, source: BundledReviews, steps: int) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        plugins=[LightningEnvironment()],
        max_steps=steps,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=TextDataModule(source))
