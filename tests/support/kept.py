"""A model with two adapters, and what the formula says of it, in passes with and without caches."""

import torch
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel

from support.adapted import relative_error
from support.caches import cache_of, with_cache
from support.families import build, open_gates_, tokens
from support.reference import reference_model

A = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, gate="head")
IDS = tokens()
LAYER = "model.layers.2.self_attn"
KEYS, VALUES = f"{LAYER}.k_proj.weight", f"{LAYER}.v_proj.weight"
TOLERANCE = 2e-5
"""Relative to the largest logit: three layers of float32 rounding."""


def make(base=None, active="a"):
    model = AdaptionPromptModel(base or build(seed=1), {"a": A, "b": A}, active).eval()
    for seed, name in enumerate("ab"):
        open_gates_(model.adapter_modules(name), seed=seed)
    return model


def top(model):
    return model.get_base_model().get_submodule(LAYER)


def logits(model, ids=IDS, **arguments):
    with torch.no_grad():
        return model(ids, **arguments).logits


def reference_adapters(base, model, name="a"):
    """Return an adapter's tensors as `reference_model` takes them, in float64, for a base."""
    return {
        base.get_submodule(fqn): (
            module.adaption_prompt.detach().double()[0],
            module.adaption_gate.detach().double(),
        )
        for fqn, module in model.adapter_modules(name).items()
    }


def expected_logits(model, name="a", changed=()):
    """Return what the float64 formula gives with the tensors that are there now.

    Args:
        model: Has the tensors.
        name: Adapter that is used.
        changed: Names of weights that act as if they were doubled.
    """
    raw = {
        key.replace("base_layer.", ""): t for key, t in model.get_base_model().state_dict().items()
    }
    base = build(seed=0, dtype=torch.float64)
    base.load_state_dict(
        {key: raw[key].double() * (2 if key in changed else 1) for key in base.state_dict()}
    )
    adapters = reference_adapters(base, model, name)
    with torch.no_grad(), reference_model(base, adapters, scaling=8**-0.5):
        return base(IDS, use_cache=False).logits


def all_ways(model):
    """Yield the logits of passes without a cache, and of passes over caches that begin empty."""
    yield logits(model, use_cache=False)
    for at in (1, 4):
        with torch.no_grad():
            out = model(IDS[:, :at])
            parts = [out.logits]
            for place in range(at, IDS.shape[1]):
                out = model(IDS[:, place : place + 1], **with_cache(cache_of(out)))
                parts.append(out.logits)
        yield torch.cat(parts, dim=1)


def check(model, name="a", changed=()):
    expected = expected_logits(model, name, changed)
    for actual in all_ways(model):
        assert relative_error(actual.double(), expected) < TOLERANCE
    return expected
