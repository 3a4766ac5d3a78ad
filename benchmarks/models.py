"""The models that are compared: shapes, sides, and one set of them at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import peft
import torch
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

Side = Literal["base", "peft", "ours"]

LENGTH = 10
GATE = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a Llama; the defaults are SmolLM2-135M's."""

    num_layers: int = 30
    hidden: int = 576
    intermediate: int = 1536
    num_heads: int = 9
    num_kv_heads: int = 3
    vocabulary: int = 49152
    is_tied: bool = True

    def config(self) -> LlamaConfig:
        """Return the configuration for transformers."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            tie_word_embeddings=self.is_tied,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One set of models: shape, dtype and device, and how many of the layers are adapted."""

    shape: Shape = Shape()
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    adapter_layers: int = 30
    sides: Sequence[Side] = ("base", "peft", "ours")


def our_config(layers: int) -> AdaptionPromptConfig:
    """Return our configuration of an adapter."""
    return AdaptionPromptConfig(adapter_len=LENGTH, adapter_layers=layers)


def peft_config(layers: int) -> peft.AdaptionPromptConfig:
    """Return PEFT's configuration of the same adapter."""
    return peft.AdaptionPromptConfig(
        adapter_len=LENGTH, adapter_layers=layers, task_type="CAUSAL_LM"
    )


def config_of(side: Side, layers: int) -> AdaptionPromptConfig | peft.AdaptionPromptConfig:
    """Return the configuration a side takes."""
    return our_config(layers) if side == "ours" else peft_config(layers)


def build(side: Side, setting: Setting) -> nn.Module:
    """Return what one side calls: a model with open gates, in evaluation mode."""
    torch.manual_seed(0)
    with torch.device(setting.device):
        model: nn.Module = LlamaForCausalLM(setting.shape.config()).to(setting.dtype).eval()
    if side == "peft":
        model = peft.get_peft_model(model, peft_config(setting.adapter_layers)).eval()
    elif side == "ours":
        configs = {"default": our_config(setting.adapter_layers)}
        model = AdaptionPromptModel(model, configs, "default")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adaption_gate"):
                parameter.fill_(GATE)
    return model


@dataclass(slots=True)
class Models:
    """Keeps the models of the latest setting, so that rows of one setting share them."""

    _latest: Setting | None = None
    _models: dict[Side, nn.Module] = field(default_factory=dict)

    def of(self, setting: Setting) -> dict[Side, nn.Module]:
        """Return the models of a setting by side, building them if the latest was another."""
        if setting != self._latest:
            self.forget()
            self._models = {side: build(side, setting) for side in setting.sides}
            self._latest = setting
        return dict(self._models)

    def forget(self) -> None:
        """Drop the models, because they were changed or the memory is needed."""
        self._latest = None
        self._models = {}
