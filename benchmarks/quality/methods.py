"""The methods: what is trained in the base model, by whose code, and how many values that are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import peft
import torch
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from torch import nn
from transformers import PreTrainedModel

Kind = Literal["base", "ours", "peft", "peft_lora"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to have a task done.

    Args:
        title: What it is called in tables.
        kind: What is put into the model.
        num_shown: How many training examples stand before each source.
        layers: L, how many layers have an adaption prompt, counted from the top.
        length: K, of each prompt.
        gate: One for each layer, or for each attention head.
        gate_std: Standard deviation of the gates before training; zero for gates of zero.
        rank: Of LoRA's matrices, which are at `LORA_TARGETS` in all layers.
        searched_as: Whose learning rate it gets; None for one of its own, or none.
    """

    title: str
    kind: Kind
    num_shown: int = 0
    layers: int = 20
    length: int = 10
    gate: Literal["layer", "head"] = "layer"
    gate_std: float = 0.0
    rank: int = 2
    searched_as: str | None = None


LORA_TARGETS = ("q_proj", "v_proj")
"""With these, rank 2 in 30 layers has as many values as 20 prompts of 10 vectors: 115,200."""

METHODS: Mapping[str, Method] = {
    "base": Method(title="base", kind="base"),
    "base-shown": Method(title="base, 4 examples before each", kind="base", num_shown=4),
    "ours": Method(title="ours", kind="ours"),
    "peft": Method(title="PEFT AdaptionPrompt", kind="peft", searched_as="ours"),
    "peft-lora": Method(title="PEFT LoRA", kind="peft_lora"),
    "head": Method(title="ours, gate per head", kind="ours", gate="head", searched_as="ours"),
    "random-1": Method(
        title="ours, gates from N(0, 1)", kind="ours", gate_std=1.0, searched_as="ours"
    ),
    "L10": Method(title="ours, L = 10", kind="ours", layers=10, searched_as="ours"),
    "L30": Method(title="ours, L = 30", kind="ours", layers=30, searched_as="ours"),
    "K5": Method(title="ours, K = 5", kind="ours", length=5, searched_as="ours"),
    "K20": Method(title="ours, K = 20", kind="ours", length=20, searched_as="ours"),
}
"""By key; "ours" is what the ablations, which come after LoRA, differ from in one thing each."""

COMPARED = ("base", "base-shown", "ours", "peft", "peft-lora")
ABLATIONS = tuple(key for key in METHODS if key not in COMPARED)
SEARCHED = tuple(
    key for key, method in METHODS.items() if method.kind != "base" and method.searched_as is None
)
"""Methods for which learning rates are tried."""


def build(method: Method, base: PreTrainedModel, seed: int) -> nn.Module:
    """Put what a method trains into a model.

    Args:
        method: The method.
        base: A model nobody else uses; it is changed, and frozen.
        seed: For what is random at first.

    Returns:
        What to call, in evaluation mode. Only what the method trains requires gradients.
    """
    torch.manual_seed(seed)
    model: nn.Module = base.requires_grad_(requires_grad=False)
    if method.kind == "ours":
        config = AdaptionPromptConfig(
            adapter_len=method.length, adapter_layers=method.layers, gate=method.gate
        )
        model = AdaptionPromptModel(base, {"default": config}, "default")
    elif method.kind == "peft":
        model = peft.get_peft_model(
            base,
            peft.AdaptionPromptConfig(
                adapter_len=method.length, adapter_layers=method.layers, task_type="CAUSAL_LM"
            ),
        )
    elif method.kind == "peft_lora":
        model = peft.get_peft_model(
            base,
            peft.LoraConfig(
                r=method.rank,
                lora_alpha=2 * method.rank,
                target_modules=[*LORA_TARGETS],
                task_type="CAUSAL_LM",
            ),
        )
    if method.gate_std:
        for name, parameter in model.named_parameters():
            if name.endswith("adaption_gate"):
                nn.init.normal_(parameter, std=method.gate_std)
    return model.eval()
