"""Does a policy that seldom asks a calculator learn to, where it cannot know the answer without?

Writes the model that `configs/calculator_sft.yaml` begins with: a Llama of two layers with random weights, whose tokens
are words and single digits. The rest are commands (docs/environments.md).

python benchmarks/calculator.py --out untrained
"""

import argparse
import re
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grade_lightning.data import generate_products

_PIECES = r"</?calc>|[A-Za-z]+|\d|\s|[^\w\s]"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word, digit, sign and white space."""
    texts = [row["prompt"] + row["completion"] for row in generate_products(1_000, seed=0, calls=0.5)]
    words = sorted({piece for text in texts for piece in re.findall(_PIECES, text)} | set("0123456789"))
    end, pad = "<|endoftext|>", "<|pad|>"
    vocabulary = {word: i for i, word in enumerate([end, pad, *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=pad))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=end, eos_token=end, pad_token=pad, unk_token=pad, padding_side="left"
    )


def untrained(words: PreTrainedTokenizerFast, width: int = 128, layers: int = 2) -> LlamaForCausalLM:
    """A Llama of random weights, always the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(words),
            max_position_embeddings=128,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
        return LlamaForCausalLM(config)


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("untrained"))
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    o = parser.parse_args()
    words = tokenizer()
    model = untrained(words, o.width, o.layers)
    model.save_pretrained(o.out)
    words.save_pretrained(o.out)
    print(f"{o.out}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(words)} tokens")


if __name__ == "__main__":
    main()
