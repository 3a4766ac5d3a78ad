"""Adapted tiny models with open gates, and the float64 reference that says what they compute."""

from contextlib import contextmanager

import torch
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from support import families
from support.families import VOCAB, Shape, open_gates_, randomize_
from support.reference import reference_model

FLOAT32 = 2e-5
"""Relative to the largest logit: three layers of float32 rounding."""

FAMILIES = ("llama", "qwen3", "gemma3", "mistral", "gpt_neox")
"""A plain one, one with query norms, two with sliding windows, one with a fused projection."""

CONFIG = {"adapter_len": 4, "adapter_layers": 2, "gate": "head"}


def build(family="llama", shape=None, *, backend="sdpa", dtype=torch.float32, seed=1):
    """Return an unadapted model of one of `FAMILIES`."""
    if family != "gpt_neox":
        return families.build(family, shape, backend=backend, dtype=dtype, seed=seed)
    shape = shape or Shape()
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=shape.heads * shape.head_dim,
        intermediate_size=16,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation=backend,
    )
    model = GPTNeoXForCausalLM(config).eval()
    randomize_(model, seed)
    return model.to(dtype)


def adapt(model, *, size=0.8, **options):
    """Return the model with an adapter whose gates are open and differ from head to head."""
    config = AdaptionPromptConfig(**{**CONFIG, **options})
    adapted = AdaptionPromptModel(model, {"default": config}, "default")
    open_gates_(adapted.adapter_modules("default"), size=size)
    return adapted


@contextmanager
def reference(adapted, base, family="llama", shape=None):
    """Run an unadapted float64 model as the formula says, with the tensors of an adapter.

    Args:
        adapted: Has the tensors.
        base: The same base in float64, not adapted, with sdpa attention.
        family: Says the scaling.
        shape: Same.
    """
    shape = shape or Shape()
    tensors = {
        base.get_submodule(fqn): (
            module.adaption_prompt.detach().double()[0],
            module.adaption_gate.detach().double().expand(shape.heads),
        )
        for fqn, module in adapted.adapter_modules("default").items()
    }
    scaling = families.scaling(family, shape)
    with torch.no_grad(), reference_model(base, tensors, scaling=scaling) as model:
        yield model


def reference_logits(adapted, base, ids, mask=None, *, family="llama", shape=None, **arguments):
    """Return the reference's logits of whole sequences.

    Further arguments are the model's.
    """
    arguments["attention_mask"] = torch.ones_like(ids) if mask is None else mask
    with reference(adapted, base, family, shape) as model:
        return model(ids, use_cache=False, **arguments).logits


def relative_error(actual, expected, mask=None):
    """Return the largest difference at positions that are not padding, over the largest value."""
    kept = torch.ones(expected.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    # What is not finite must not hide in a maximum.
    assert torch.isfinite(actual[kept]).all()
    return ((actual.double() - expected)[kept].abs().max() / expected[kept].abs().max()).item()


def flip_gates_(adapted):
    """Exchange the gates of the heads, which every test with a reference has to notice."""
    with torch.no_grad():
        for module in adapted.adapter_modules("default").values():
            module.adaption_gate.copy_(module.adaption_gate.flip(0))
