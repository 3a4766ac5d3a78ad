"""Tiny random models of every type in transformers' mapping of causal language models."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB = 64
NUM_LAYERS = 4
MOST_PARAMETERS = 5_000_000

_HIDDEN = (
    "hidden_size d_model n_embd embedding_size emb_dim dim word_embed_proj_dim intermediate_size "
    "ffn_dim d_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim shared_intermediate_size"
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
    "linear_num_value_heads rotary_dim"
)
_TWO = (
    "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_k linear_num_key_heads "
    "decoder_layers encoder_layers mamba_expand attn_layer_period"
)
_ONE = "n_shared_experts n_group topk_group first_k_dense_replace mamba_n_groups attn_layer_offset"
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
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "roc_bert": {
        "pronunciation_vocab_size": 8,
        "pronunciation_embed_dim": 8,
        "shape_vocab_size": 8,
        "shape_embed_dim": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type):
    """Return a configuration of the type with small sizes, everything else as it is by default."""
    cls = CONFIG_MAPPING[model_type]
    default = cls().to_dict()
    values = _shrink(default)
    for name in ("text_config", "vision_config", "audio_config"):
        if isinstance(default.get(name), dict):
            inner = default[name]
            values[name] = {**_shrink(inner), "model_type": inner.get("model_type")}
    return cls(**{**values, **_OVERRIDES.get(model_type, {})})


def tiny_model(model_type):
    """Return a model of the type, on the CPU, in eval mode.

    Raises:
        Exception: It cannot be made tiny here, for whatever reason.
    """
    config = tiny_config(model_type)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    size = sum(parameter.numel() for parameter in skeleton.parameters())
    if size > MOST_PARAMETERS:
        msg = f"{size:,} parameters"
        raise ValueError(msg)
    model = AutoModelForCausalLM.from_config(config).eval()
    # The fused kernels for experts know no float64.
    model.set_experts_implementation("eager")
    return model


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
