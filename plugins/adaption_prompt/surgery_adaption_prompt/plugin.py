"""Hook implementations, and nothing else."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from surgery_adaption_prompt.architectures import load_skeleton
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
    """Read a folder with a transformers `config.json`."""
    return load_skeleton(source)


@hookimpl
def surgery_show(source: str) -> Shown | None:
    """Describe a folder with adapters in PEFT's format."""
    return show_folder(source)
