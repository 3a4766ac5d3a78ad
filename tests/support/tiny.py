"""Tiny random models of every type in transformers' mapping of causal language models."""

import re

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB = 64
NUM_LAYERS = 4
MOST_PARAMETERS = 5_000_000

_HIDDEN = (
    "hidden_size d_model n_embd embedding_size emb_dim dim word_embed_proj_dim intermediate_size "
    "ffn_dim d_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim shared_intermediate_size "
    "hidden_size_global feed_forward_size expert_ffn_hidden_size "
    "adapter_in_dim adapter_input_size adapter_out_dim"
)
_LAYERS = "num_hidden_layers n_layer n_layers num_layers"
_HEADS = (
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"
)
_EIGHT = (
    "head_dim attention_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim sliding_window "
    "mamba_d_state mamba_chunk_size state_size ssm_state_size linear_key_head_dim "
    "linear_value_head_dim hidden_size_per_layer_input global_head_dim image_size"
)
_SIXTEEN = (
    "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank qk_head_dim "
    "mamba_d_head"
)
_FOUR = (
    "num_experts n_routed_experts num_local_experts moe_num_experts mamba_n_heads "
    "linear_num_value_heads rotary_dim zero_expert_num sliding_window sliding_window_size"
)
_TWO = (
    "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_k linear_num_key_heads "
    "decoder_layers encoder_layers mamba_expand attn_layer_period num_blocks"
)
_ONE = (
    "n_shared_experts n_group topk_group first_k_dense_replace mamba_n_groups attn_layer_offset "
    "num_codebooks"
)
_SIZES = {
    **dict.fromkeys(_HIDDEN.split(), 32),
    **dict.fromkeys(_LAYERS.split(), NUM_LAYERS),
    **dict.fromkeys(_HEADS.split(), 4),
    **dict.fromkeys(_EIGHT.split(), 8),
    **dict.fromkeys(_SIXTEEN.split(), 16),
    **dict.fromkeys(_FOUR.split(), 4),
    **dict.fromkeys(_TWO.split(), 2),
    **dict.fromkeys(_ONE.split(), 1),
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
}
_EVEN_IF_NONE = {"head_dim", "num_key_value_heads"}
_OVERRIDES = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 16,
        "encoder_hash_byte_group_size": [3],
        "use_cache": False,
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "got_ocr2_vision": {"image_size": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "phi4_multimodal_audio": {"nemo_conv_channels": 8, "ext_pw_out_channel": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 2,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"axial_pos_embds": False},
    "roc_bert": {
        "pronunciation_vocab_size": 8,
        "pronunciation_embed_dim": 8,
        "shape_vocab_size": 8,
        "shape_embed_dim": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a type or a part of one needs besides small sizes."""
_PARTS = {"musicgen": "musicgen_decoder", "musicgen_melody": "musicgen_melody_decoder"}
"""Types whose causal language model is built from the configuration of a part."""


def tiny_config(model_type):
    """Return a configuration of the type with small sizes, everything else as it is by default."""
    cls = CONFIG_MAPPING[model_type]
    return cls(**_tiny_values(model_type, cls().to_dict()))


def tiny_model(model_type, dtype=torch.float32):
    """Return a model of the type, on the CPU, in eval mode, in the dtypes `from_pretrained` gives.

    Raises:
        Exception: It cannot be made tiny here, for whatever reason.
    """
    with torch.device("meta"):
        skeleton = _build(model_type, dtype)
    size = sum(parameter.numel() for parameter in skeleton.parameters())
    if size > MOST_PARAMETERS:
        msg = f"{size:,} parameters"
        raise ValueError(msg)
    model = _build(model_type, dtype).eval()
    kept = "|".join(model._keep_in_fp32_modules_strict)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if kept and re.search(rf"\b({kept})\b", name):
            tensor.data = tensor.data.float()
    # The fused kernels for experts know no float64.
    model.set_experts_implementation("eager")
    return model


def _build(model_type, dtype):
    config = tiny_config(_PARTS.get(model_type, model_type))
    if model_type not in _PARTS:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    return cls._from_config(config, dtype=dtype)


def _tiny_values(model_type, default):
    values = _shrink(default)
    for name, part in default.items():
        if isinstance(part, dict) and "model_type" in part:
            part_type = part["model_type"]
            values[name] = {**_tiny_values(part_type, part), "model_type": part_type}
    for name, value in _OVERRIDES.get(model_type, {}).items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return values


def _shrink(default):
    values = {
        name: size
        for name, size in _SIZES.items()
        if name in default and (default[name] is not None or name in _EVEN_IF_NONE)
    }
    count = next((default[name] for name in _LAYERS.split() if name in default), None)
    for name, value in default.items():
        if isinstance(value, list) and len(value) == count and name not in values:
            # Lists with an entry a layer: every kind of entry, in turn.
            kinds = list(dict.fromkeys(map(str, value)))
            by_name = {str(entry): entry for entry in value}
            values[name] = [by_name[kinds[i % len(kinds)]] for i in range(NUM_LAYERS)]
    return values
