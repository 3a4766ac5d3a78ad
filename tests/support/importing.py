"""Checkpoints of LLaMA-Adapter and litgpt on disk, and reading them."""

import warnings
from dataclasses import replace

import torch
from surgery_adaption_prompt import AdaptionPromptModel, load_state_
from surgery_adaption_prompt.importers import read_litgpt, read_llama_adapter

from support.foreign import LitGPT, OriginalLlama, Sizes
from surgery_core import SurgeryWarning

SIZES = Sizes()
GROUPED = Sizes(heads=6, kv_heads=2, head_dim=4, hidden=18)
"""Shared keys; and heads * head_dim is not the hidden size."""
WTE, GATE = "transformer.h.3.attn.adapter_wte.weight", "transformer.h.3.attn.gating_factor"
QUERY = "adapter_query.weight"


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def imported_logits(model, config, state, ids):
    """Return logits of a model with an imported adapter."""
    # A copy in the base's float64, so that nothing is lost on the way.
    adapted = AdaptionPromptModel(model, {"imported": replace(config, dtype="float64")}, "imported")
    load_state_(adapted.adapter_modules("imported"), state)
    return adapted(ids).logits


def read_original(path, model, *, adapter_len=SIZES.adapter_len, gate_activation="tanh"):
    return read_llama_adapter(path, model, adapter_len=adapter_len, gate_activation=gate_activation)


def read_quietly(path, model):
    """Read litgpt's format without its warning, which a test of its own looks at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurgeryWarning)
        return read_litgpt(path, model)


def original(tmp_path, change=lambda _: None, sizes=SIZES, **options):
    """Save an adapter of LLaMA-Adapter's after a change to it; return the path and its model."""
    llama = OriginalLlama(sizes)
    state = llama.adapter(**options)
    change(state)
    path = tmp_path / "adapter.pth"
    torch.save(state, path)
    return path, llama.to_transformers()


def litgpt(tmp_path, change=lambda _: None, sizes=SIZES, **options):
    llama = LitGPT(sizes, "grouped")
    state = llama.adapter(**options)
    change(state)
    path = tmp_path / "lit_model.pth.adapter"
    torch.save({"model": state}, path)
    return path, llama.to_transformers()
