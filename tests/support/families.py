"""Tiny models of every family that the property tests draw from, with weights that hide nothing."""

from dataclasses import dataclass

import torch
import transformers
from torch import nn

CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM"),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM"),
    "granite": ("GraniteConfig", "GraniteForCausalLM"),
}
WITH_ATTENTION_BIAS = {"llama", "qwen3", "gemma3", "olmo2", "granite"}
VOCAB = 40


@dataclass(frozen=True)
class Shape:
    """The sizes that matter to attention."""

    hidden: int = 24
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    layers: int = 3
    attention_bias: bool = False


def build(family="llama", shape=None, *, backend="sdpa", dtype=torch.float32, seed=0):
    """Return a model in eval mode, every parameter random, biases and norms included."""
    shape = shape or Shape()
    config_name, model_name = CLASSES[family]
    extra = {"attention_bias": shape.attention_bias} if family in WITH_ATTENTION_BIAS else {}
    if family == "gemma3":
        # A scale that is not the head's, and sliding layers that slide within the tests' lengths.
        extra |= {"query_pre_attn_scalar": 5, "sliding_window": 4}
    if family == "granite":
        extra |= {"attention_multiplier": 0.4}
    if family == "mistral":
        extra |= {"sliding_window": 5}
    config = getattr(transformers, config_name)(
        vocab_size=VOCAB,
        hidden_size=shape.hidden,
        intermediate_size=16,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation=backend,
        **extra,
    )
    model = getattr(transformers, model_name)(config).eval()
    randomize_(model, seed)
    return model.to(dtype)


def gpt2(**fields):
    """Return a GPT-2 with three layers of four heads, hidden size 24, every parameter random."""
    sizes = {"vocab_size": VOCAB, "n_embd": 24, "n_head": 4, "n_layer": 3, "n_positions": 64}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ids, **fields)).eval()
    randomize_(model, 1)
    return model


def scaling(family, shape):
    """Return the factor on the logits, from the family's definition and not from its code."""
    return {"gemma3": 5**-0.5, "granite": 0.4}.get(family, shape.head_dim**-0.5)


def randomize_(module: nn.Module, seed: int) -> None:
    """Give every parameter random values of a size that keeps activations around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.3 * noise)


def tokens(batch=2, length=7, seed=0):
    """Return random token ids without special ones, `(batch, length)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def open_gates_(modules, seed=0, size=0.8):
    """Give an adapter gates that are not zero and differ from head to head and layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in modules.values():
            gate = module.adaption_gate
            values = torch.rand(gate.shape, generator=generator) + 0.25
            signs = torch.where(torch.rand(gate.shape, generator=generator) < 0.5, -1.0, 1.0)
            gate.copy_(size * values * signs)
