"""Hook implementations, and nothing else."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from surgery_adaption_prompt import sources
from surgery_adaption_prompt.operation import AdaptionPromptOperation
from surgery_adaption_prompt.show import show_folder
from surgery_adaption_prompt.trainable_copy import TrainableCopyOperation
from surgery_core import Operation, Shown, hookimpl


@hookimpl
def surgery_operations() -> Iterable[Operation[Any]]:
    """Offer `adaption_prompt` and `trainable_copy`."""
    return [AdaptionPromptOperation(), TrainableCopyOperation()]


@hookimpl
def surgery_load_skeleton(source: str) -> nn.Module | None:
    """Read a transformers configuration from a folder, a GGUF file or the hub."""
    return sources.load_skeleton(source)


@hookimpl
def surgery_load_model(source: str) -> nn.Module | None:
    """Load a causal language model of transformers."""
    return sources.load_model(source)


@hookimpl
def surgery_probe_inputs(model: nn.Module) -> Mapping[str, Any] | None:
    """Return a small batch for a model of transformers."""
    return sources.probe_inputs(model)


@hookimpl
def surgery_show(source: str) -> Shown | None:
    """Describe a folder with adapters in PEFT's format."""
    return show_folder(source)
