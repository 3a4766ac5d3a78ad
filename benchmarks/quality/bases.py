"""The base model and its tokens: SmolLM2-135M-Instruct, or a tiny one that needs no download."""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from training import Encode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

DEMO = Path(__file__).parents[2] / "demo"
NUM_LAYERS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A model, and how its tokens come from text."""

    model: PreTrainedModel
    encode: Encode


def load(*, is_quick: bool) -> Base:
    """Return a model of nobody else's, float32, in evaluation mode."""
    return _tiny() if is_quick else _smollm2()


def name(*, is_quick: bool) -> str:
    """Return what the results call it."""
    return "tiny Llama, random weights" if is_quick else "SmolLM2-135M-Instruct, from Q4_1, float32"


def _smollm2() -> Base:
    # The demo downloads and converts it once; its scripts are no package.
    if str(DEMO) not in sys.path:
        sys.path.append(str(DEMO))
    model, tokenizer = importlib.import_module("smollm2").load()
    return Base(
        model=model, encode=lambda text: list(tokenizer(text, add_special_tokens=False).input_ids)
    )


def _tiny() -> Base:
    """Return a model as deep as the other, in which every method fits, for bytes as tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=3,
        num_key_value_heads=1,
    )
    return Base(
        model=LlamaForCausalLM(config).eval(), encode=lambda text: list(text.encode("ascii"))
    )
