"""A tiny random model of every class that transformers maps to causal language models.

One table of small sizes is laid over whatever a configuration has, its parts included; where that does not fit a type,
`EXCEPTIONS` says what does, and why. A type that a later transformers brings usually needs nothing.
"""

import re
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, CONTEXT = 64, 64
END, PADDING, ORDINARY, PLACEHOLDERS = 0, 1, range(2, 60), range(60, 64)
"""Tokens: the first two are special; the last four stand for images and sounds where a model knows any."""

SIZES: list[tuple[str, int]] = [
    (r"\w*vocab_size\w*|vocab_offset|codebook_size|encoder_hash_byte_group_vocab", VOCABULARY),
    (r"\w*max_position_embeddings|\w*_positions|n_ctx|max_seq_len|model_max_length|context_length", CONTEXT),
    (r"(num_)?(key_value|kv)_heads|kv_n_heads|\w*num_key_value_heads|linear_num_key_heads", 2),
    (r"mamba_(n|num)_heads|n_mamba_heads", 8),
    (r"(num|n)_(\w+_)?heads?|\w*(num_attention|attention)_heads|num_query_groups", 4),
    (r"(\w+_)?head_?dim|rotary_dim|dim_head|d_head|\w+_d_head|attention_head_size|d_kv|kv_channels", 8),
    (r"query_pre_attn_scalar", 8),
    (r"(\w+_)?(num_layers|hidden_layers|n_layers?|layers|depth|num_blocks)", 2),
    (r"num_experts_per_tok(en)?|moe_(top_?)?k|top_k_experts", 2),
    (r"(moe_|expert_)\w*(intermediate|hidden)_size|\w*shared_\w*intermediate_size", 16),
    (r"\w+_shared_experts|topk_group|mamba_n_?groups|n_groups", 1),
    (r"(\w+_)?experts|zero_expert_num", 4),
    (r"(n|num_expert)_group", 2),
    (r"\w*layer_period", 2),
    (r"\w*layer_offset|first_k_dense_replace|num_dense_layers|moe_layer_start_index|max_window_layers", 1),
    (r"\w*intermediate_size\w*|\w*ffn\w*_(dim|size)|n_inner|d_inner|dim_ff|d_?ff|mlp_dim|feed_forward_size", 48),
    (r"\w*(sliding_window(_size)?|window_size|attention_chunk_size|window_len|local_attention)|index_topk\w*", 4),
    (r"\w*(block_size|chunk_size|chunk_length)|block_multiple_of|ffn_round_up_to_multiple_of|rel_extent|patch_size", 8),
    (r"\w*(rank|state_size|d_state)|num_kv_shared_layers", 8),
    (r"image_size|crop_size", 16),
    (r"\w*(hidden_size\w*|embed_dim|embedding_size|emb_dim|embedding_dim|_output_dim|_input_dim|channels?)", 32),
    (r"d_model|n_embd|lru_width|adapter_(in|out)_dim|adapter_input_size", 32),
]
"""Upper bounds by the name of an attribute, the first that matches; what is smaller by default stays."""

IF_NONE = {"head_dim": 8, "num_key_value_heads": 2}
"""What some models need although their configurations do not say."""

DERIVED = {"qk_head_dim", "transformers_version", "id2label", "label2id", "architectures"}
"""What a configuration makes of the rest."""

LAYERS = r"num_hidden_layers|n_layers?|num_layers|decoder_layers|num_decoder_layers|num_blocks"

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SWA = ["num_attention_heads", "num_key_value_heads"], ["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"]
_DOTS = dict.fromkeys([f"swa_{each}" for each in _SWA[0]], 4) | dict.fromkeys([f"swa_{each}" for each in _SWA[1]], 8)
_DOTS |= {"swa_head_dim": 16, "swa_qk_rope_head_dim": 8}
_QWEN4 = {
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8},
    **{"indexer_compress_ratio": 2, "ple_layer_ids": [1], "ple_embed_dim": 32, "ngram_vocab_size_base": 50},
    **{"split_ngram_parts": 1, "make_ngram_vocab_size_divisible_by": 8, "eos_token_id": END},
}
_ZAMBA = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
_ZAMBA |= {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4}

_REFORMER = dict.fromkeys(["lsh_attn_chunk_length", "local_attn_chunk_length"], 4)  # training wants multiples of it

EXCEPTIONS: dict[str, dict[str, Any]] = {
    # sizes that must fit each other
    "dory": {
        **{"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
        **{"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 8},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},  # as many as its cycles go through the layer
    "mamba2": {"num_heads": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "hash_seed": 1} | _REFORMER,
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA | {"hybrid_layer_ids": [1, 3]},
    # sizes that are no attributes of the finished configuration
    "dots3_note": {"text_config": _DOTS},
    "dots3_note_text": _DOTS,
    "gemma4": {"text_config": {"global_head_dim": 16}},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified": {"text_config": {"global_head_dim": 16}},
    "gemma4_unified_text": {"global_head_dim": 16},
    # the defaults make no model that runs, or leave out a kind of layer that released models have
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"use_cache": False},  # with its cache transformers 5.24 looks for a number of layers that it does not have
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
        **{"layer_types": ["full_attention", "sliding_attention"]},
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "lfm2": {"full_attn_idxs": [1], "layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "xmod": {"default_language": "en_XX"},
    # logits that are scaled for large widths would be all alike, or far apart
    **{each: {"logit_scale": 1.0} for each in ("cohere", "cohere2", "cohere2_moe")},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "minicpm3": {"dim_model_base": 32},
}

NOT_TINY: dict[str, str] = {
    "gemma3n": "its image tower is a model of timm; its language model is gemma3n_text",
    "gemma4_assistant": "drafts for another model and reads that one's keys: it has no forward pass of its own",
    "gemma4_unified_assistant": "drafts for another model and reads that one's keys: it has no forward pass of its own",
    "musicgen": "its configuration is of three models, and AutoModelForCausalLM does not take the decoder's",
    "musicgen_melody": "its configuration is of three models, and AutoModelForCausalLM does not take the decoder's",
}
"""Types of which no tiny model can be made here, and why."""

VARIANTS: dict[str, dict[str, Any]] = {
    "opt": {"word_embed_proj_dim": 16},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
}
"""Settings of a type that make another network of it; encoders get `is_decoder` without being named here."""


def causal_types() -> list[str]:
    """Every model type that `AutoModelForCausalLM` knows."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name to type and overrides: every type that can be tiny as it is by default, and its variant if it has one."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for model_type in causal_types():  # from the classes alone: a new type that does not fit fails in its own test
        if model_type in NOT_TINY:
            continue
        found[model_type] = (model_type, {})
        kind = CONFIG_MAPPING[model_type]
        encoder = getattr(kind, "is_decoder", None) is False and not getattr(kind, "is_encoder_decoder", False)
        known = EXCEPTIONS.get(model_type, {})
        variant = {"is_decoder": True} if encoder and "is_decoder" not in known else VARIANTS.get(model_type, {})
        if variant:
            name = ",".join(f"{key}={value}" for key, value in variant.items())
            found[f"{model_type}[{name}]"] = (model_type, variant)
    return found


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """The default configuration of a type, everything small, without dropout; a few layers, each kind among them."""
    return _small(CONFIG_MAPPING[model_type], EXCEPTIONS.get(model_type, {}) | overrides)


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model in evaluation mode, the same for the same seed.

    Noise is added to every parameter, so that no bias is 0, no gate is shut, and tokens matter to each other.
    """
    config = tiny_config(model_type, **overrides)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    if dtype is torch.float64:
        model.set_experts_implementation("eager")  # the kernel of the default does not know it
    small: PreTrainedModel = model.to(dtype).eval()
    return small


def _small(kind: type[PretrainedConfig], overrides: dict[str, Any]) -> PretrainedConfig:
    default = kind()
    count, kept = _layers(default)
    small: dict[str, Any] = {}
    for name, value in vars(default).items():
        if name.startswith("_") or name in DERIVED:
            continue
        if isinstance(value, PretrainedConfig):
            small[name] = _small(type(value), overrides.get(name, {}))
        elif re.fullmatch(LAYERS, name) and count:
            small[name] = len(kept)
        elif _are_indices(name, value):
            small[name] = [new for new, old in enumerate(kept) if old in value]
        elif isinstance(value, (list, tuple)) and len(value) == count:
            small[name] = [_bounded(name, value[index]) for index in kept]
        elif (new := _bounded(name, value)) != value:
            small[name] = new
    if "kv_lora_rank" in vars(default):  # latent attention knows no groups
        small["num_key_value_heads"] = 4
    return kind(**small | {name: value for name, value in overrides.items() if not _is_part(small.get(name))})


def _is_part(value: Any) -> bool:
    return isinstance(value, PretrainedConfig)


def _bounded(name: str, value: Any) -> Any:
    """A value no larger than the table says; dropout 0; special tokens inside the vocabulary."""
    if value is None or isinstance(value, bool):
        return IF_NONE.get(name) if value is None else value
    if re.search(r"dropout|pdrop|drop_path|layerdrop|jitter", name):
        return type(value)(0) if isinstance(value, (int, float)) else value
    if re.fullmatch(r"\w*(_token_id|_token_index|pad_index|bos_index|eos_index|mask_index)", name):
        if re.match(r"bos|eos|decoder_start|forced", name):
            return END
        return PADDING if name.startswith("pad") else PLACEHOLDERS[value % len(PLACEHOLDERS)]
    if isinstance(value, int):
        return next((min(value, bound) for pattern, bound in SIZES if re.fullmatch(pattern, name)), value)
    return value


def _layers(config: PretrainedConfig) -> tuple[int | None, list[int]]:
    """How many layers a configuration has, and the few to keep: one of each kind, and two at least."""
    values = vars(config)
    count = next((v for name, v in values.items() if re.fullmatch(LAYERS, name) and isinstance(v, int)), None)
    kinds: list[list[Any]] = [[] for _ in range(count or 0)]
    for name, value in values.items():
        for index, kind in enumerate(kinds):
            if _are_indices(name, value):
                kind.append(index in value)
            elif isinstance(value, (list, tuple)) and len(value) == count:
                kind.append(value[index])
    first = [index for index, kind in enumerate(kinds) if kinds.index(kind) == index]
    more = [index for index in range(len(kinds)) if index not in first][: max(2 - len(first), 0)]
    return count, sorted(first + more)


def _are_indices(name: str, value: Any) -> bool:
    """Whether a value names some of the layers by their numbers."""
    if not isinstance(value, (list, tuple)) or not re.fullmatch(r"\w*(layers|_idxs|_layer_ids|indices|indexes)", name):
        return False
    return all(isinstance(each, int) for each in value) and list(value) == sorted(set(value))
