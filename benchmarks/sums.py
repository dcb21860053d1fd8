"""What do the policy gradients do with a reward that can only be checked, where the policy is seldom right?

Trains the policy that `configs/compare_sums.yaml` starts from: a GPT-2 of two layers that reads digit by digit, on the
workings of someone who forgets three carries of four (`BundledSums`). Then says how often it is right, and how many of
the groups teach something.

python benchmarks/sums.py --out sums
grade-compare --config configs/compare_sums.yaml --out sums_comparison --jobs 2 --threads 1 -- --model.policy.path sums
"""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from grade_lightning.data import BundledSums, TextDataModule
from grade_lightning.methods import SupervisedFineTuning
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts
from grade_lightning.rewards import NumericMatch
from grade_lightning.rollouts import Sampler


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character."""
    end, pad = "<|endoftext|>", "<|pad|>"
    words = {word: i for i, word in enumerate([end, pad, *"0123456789+=\n"])}
    inner = Tokenizer(models.WordLevel(words, unk_token=pad))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=end, eos_token=end, pad_token=pad, unk_token=pad, padding_side="left"
    )


def base(source: BundledSums, steps: int, rows: int = 10_000, validation: int = 1_000) -> Policy:
    """A GPT-2 of random weights, trained on the workings."""
    words = tokenizer()
    seed_everything(0)
    config = GPT2Config(
        vocab_size=len(words),
        n_positions=32,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    )
    policy = Policy.from_model(GPT2LMHeadModel(config), words, reference=False)
    module = SupervisedFineTuning(
        policy,
        torch.optim.AdamW,
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps, pct_start=0.1),
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    data = TextDataModule(source, batch_size=128, prompt_size=rows, val_size=validation, max_text_tokens=32)
    trainer.fit(module, datamodule=data)
    return policy


def main() -> None:
    """Train, save, and say how often it is right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("sums"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--generations", type=int, default=8)
    o = parser.parse_args()
    source = BundledSums()
    policy = base(source, o.steps)
    policy.save_pretrained(str(o.out))
    rows = source.load()["test"].select(range(o.prompts))
    words = policy.tokenizer
    read = words([words.bos_token + prompt for prompt in rows["prompt"]], padding=True, return_tensors="pt")
    answers = [answer for answer in rows["answer"] for _ in range(o.generations)]
    prompts = Prompts(
        read["input_ids"].repeat_interleave(o.generations, 0),
        read["attention_mask"].repeat_interleave(o.generations, 0).bool(),
        {"answer": answers},
    )
    right = NumericMatch()(Sampler(max_new_tokens=9)(policy, prompts)).view(o.prompts, o.generations)
    print(f"right: {right.mean():.3f}")
    for terms in range(2, 5):
        of = torch.tensor([prompt.count("+0") == 4 - terms for prompt in rows["prompt"]])
        print(f"  of {terms} terms: {right[of].mean():.3f}")
    share = right.mean(1)
    print(f"groups of {o.generations}: all wrong {(share == 0).float().mean():.3f}, ", end="")
    print(f"all right {(share == 1).float().mean():.3f}, mixed {((share > 0) & (share < 1)).float().mean():.3f}")


if __name__ == "__main__":
    main()
