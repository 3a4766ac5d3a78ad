"""Files that `torch.save` wrote, read as tensors and nothing else."""

import os
from pathlib import Path

import torch
from torch import Tensor

from surgery_core import SurgeryError, listed


def load_pickled(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read tensors by name, on the CPU, nested under `model` or not; no code in the file is run.

    Raises:
        SurgeryError: The file is missing or damaged, or holds something else.
    """
    subject = f"Checkpoint {os.fspath(path)!r}"
    try:
        found = torch.load(Path(path), map_location="cpu", weights_only=True)
    # Whatever torch's unpickler makes of a damaged file; it documents no set of errors.
    except Exception as err:
        msg = (
            f"{subject} cannot be read: expected tensors by name, as torch.save writes them, got "
            f"{type(err).__name__}: {str(err).partition(chr(10))[0]}. Save its tensors alone with "
            "torch.save in the program that wrote it; nothing in the file was run."
        )
        raise SurgeryError(msg) from err
    if isinstance(found, dict) and found.keys() == {"model"}:
        found = found["model"]
    if not isinstance(found, dict):
        msg = f"{subject} is no adapter: expected tensors by name, got {type(found).__name__}."
        raise SurgeryError(msg)
    strange = [
        name
        for name, value in found.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if strange:
        msg = (
            f"{subject} is no adapter: expected tensors by name, got something else under "
            f"{listed(sorted(strange, key=repr))}. Save its tensors alone."
        )
        raise SurgeryError(msg)
    return {name: tensor.detach() for name, tensor in found.items()}
