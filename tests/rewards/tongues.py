"""Two tokenizers that cut the same texts differently, and rollouts of texts."""

from itertools import zip_longest
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from grade_lightning.records import Rollout

CORPUS = ["the cat sat on the mat and played", "the dog plays with a ball", "playing in the rain is a rainy play"] * 2
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def byte_tokenizer(size: int = 290) -> PreTrainedTokenizerFast:
    """Bytes and the commonest pairs of them, as GPT-2's: the policy's."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<eos>", "<pad>"], initial_alphabet=ALPHABET, show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def word_pieces(*extra: str) -> PreTrainedTokenizerFast:
    """Words of small letters and what may follow in them, as BERT's: the reward's."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz.!", "the", "cat", "play", "日", "hello"]
    words += [f"##{end}" for end in (*"abcdefghijklmnopqrstuvwxyz", "ed", "ing")]
    inner = Tokenizer(models.WordPiece({w: i for i, w in enumerate([*words, *extra])}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(word, inner.token_to_id(word)) for word in ("[CLS]", "[SEP]")]
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def rollout_of(
    tokenizer: PreTrainedTokenizerFast, *texts: tuple[str, list[int] | str], ended: bool = False, **columns: list[Any]
) -> Rollout:
    """Prompts and completions, the latter as texts or as tokens, padded as a sampler does."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    prompts = [tokenizer.encode(prompt, add_special_tokens=False) for prompt, _ in texts]
    answers = [tokenizer.encode(x, add_special_tokens=False) if isinstance(x, str) else x for _, x in texts]
    answers = [[*x, eos] if ended else x for x in answers]
    left = torch.tensor(list(zip_longest(*[ids[::-1] for ids in prompts], fillvalue=pad))).T.flip(-1)
    right = torch.tensor(list(zip_longest(*answers, fillvalue=pad))).T
    lengths = torch.tensor([[len(ids)] for ids in prompts]), torch.tensor([[len(ids)] for ids in answers])
    width = left.shape[1]
    return Rollout(
        prompt_ids=left,
        prompt_mask=(torch.arange(width) >= width - lengths[0]).long(),
        completion_ids=right,
        completion_mask=torch.arange(right.shape[1]) < lengths[1],
        engine_logps=torch.zeros(right.shape),
        tokenizer=tokenizer,
        columns=columns,
        eos_ids=[eos],
    )
