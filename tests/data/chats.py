"""Chat templates and tokenizers in the fashions that are about, small enough to be made in a test."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

WORDS = ["Good film.", "2+2?", "The answer is", "It is four", "It rained; nobody came.", "né à Zürich", "Hi", "no", "!"]
TEMPLATES: dict[str, str | None] = {
    "none": None,
    "chatml": (
        "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "smollm2": (  # ChatML with a system prompt of its own
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are SmolLM<|im_end|>\n{% endif %}"
        "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
        "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "zephyr": (  # plain text, and an EOS that is no text
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "plain": (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]:{% endif %}"
    ),
}
TURNS = {
    "none": None,
    "chatml": "<|im_end|>",
    "smollm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "mistral": "EOS",
    "gemma": "<end_of_turn>",
    "zephyr": "EOS",
    "plain": None,
}
"""What ends a turn in each; `EOS` for the tokenizer's own."""
OWN = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "smollm2": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
}
"""Special tokens of each, beside BOS and EOS."""
KINDS = ["bytes", "metaspace", "prepend"]
"""Byte-level BPE; SentencePiece with a space in front of a text, as transformers writes it now and wrote it before."""


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """Add a chat template, and the special tokens that it writes."""
    if template in OWN:
        tokenizer.add_special_tokens({"additional_special_tokens": OWN[template]})
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


@cache
def _trained(kind: str) -> str:
    inner = Tokenizer(models.BPE(unk_token=None if kind == "bytes" else "<unk>", byte_fallback=kind != "bytes"))
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else [f"<0x{i:02X}>" for i in range(256)]
    if kind == "bytes":
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
    else:
        if kind == "metaspace":
            inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    special = ["<s>", "</s>", "<pad>", "<unk>"] + ([] if kind == "bytes" else alphabet)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=alphabet if kind == "bytes" else [],
        show_progress=False,
    )
    inner.train_from_iterator([*WORDS, *(f"{a} {b}\n" for a in WORDS for b in WORDS)] * 3, trainer)
    return inner.to_str()


def make_tokenizer(
    kind: str, template: str, bos: bool = True, eos: bool = False, one: bool = False
) -> PreTrainedTokenizerBase:
    """A tokenizer with a chat template.

    Args:
        kind: one of `KINDS`.
        template: one of `TEMPLATES`.
        bos: whether it puts a BOS in front of a text.
        eos: whether it puts an EOS behind a text.
        one: whether its BOS also is its EOS.
    """
    inner = Tokenizer.from_str(_trained(kind))
    front, back = "<s> " * bos, (" <s>" if one else " </s>") * eos
    inner.post_processor = processors.TemplateProcessing(
        single=f"{front}$A{back}", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="<s>" if one else "</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    return with_template(tokenizer, template)
