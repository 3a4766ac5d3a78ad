"""Files that `torch.save` wrote, read as tensors and nothing else, within the size of the file."""

import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from typing import IO

import torch
from torch import Tensor

from surgery_core.errors import SurgeryError, listed
from surgery_core.regular import open_regular

_NEEDED = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor_v2|parameter)"
    r"|torch\.(\w+Storage|storage\.\w+Storage)"
)
"""What tensors by name are made of; torch allows more, such as a `bytearray` of any size."""

_ARCHIVE = b"PK\x03\x04"
"""How an archive begins, as torch writes it since 1.6."""

_NUM_LEGACY = 5
"""Pickles at the beginning of a file of torch before 1.6: three of its header, data, storages."""


def load_pickled(path: str | os.PathLike[str], *, subject: str) -> dict[str, Tensor]:
    """Read tensors by name, on the CPU, nested under `model` or not; no code in the file is run.

    Args:
        path: The file.
        subject: How errors begin, for example `Checkpoint 'a.pth'`.

    Returns:
        Dense tensors, of which none is larger than the file.

    Raises:
        SurgeryError: The file is missing or damaged, or holds something else, or would take more
            memory than its own size.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = f"{folder}/a.pth"
        ...     torch.save({"model": {"gate": torch.ones(2)}}, path)
        ...     load_pickled(path, subject="Checkpoint")
        {'gate': tensor([1., 1.])}
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            _check(file, size)
            file.seek(0)
            found = torch.load(file, map_location="cpu", weights_only=True)
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
    large = sorted(
        name for name, tensor in found.items() if tensor.numel() * tensor.itemsize > size
    )
    if large:
        # One value may stand for any number of them.
        msg = (
            f"{subject} is no adapter: expected tensors no larger than the file, {size:,} bytes, got "
            f"others under {listed(large)}. Save them whole, with `contiguous`."
        )
        raise SurgeryError(msg)
    return {name: tensor.detach() for name, tensor in found.items()}


def _check(file: IO[bytes], size: int) -> None:
    """Refuse what torch would read and tensors do not need.

    Raises:
        UnpicklingError: The file unpacks to more than itself, or makes other things than tensors.
    """
    # As torch tells them apart, so that both look at the same.
    if file.read(len(_ARCHIVE)) != _ARCHIVE:
        file.seek(0)
        for _ in range(_NUM_LEGACY):
            _check_globals(file)
        return
    with zipfile.ZipFile(file) as archive:
        if sum(info.file_size for info in archive.infolist()) > size:
            msg = "an archive that unpacks to more than its size"
            raise pickle.UnpicklingError(msg)
        for info in archive.infolist():
            if info.filename.endswith("data.pkl"):
                with archive.open(info) as part:
                    _check_globals(part)


def _check_globals(file: IO[bytes]) -> None:
    strange = sorted({name for name in _globals(file) if not _NEEDED.fullmatch(name)})
    if strange:
        msg = f"something that needs {listed(strange)}"
        raise pickle.UnpicklingError(msg)


def _globals(file: IO[bytes]) -> Iterator[str]:
    """Yield what a pickle imports; torch reads no other opcodes that do."""
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            yield str(argument).replace(" ", ".")
        elif opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            yield opcode.name
