"""Tensors and the texts that belong to them in one safetensors file, so that one rename saves both."""

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from surgery_core.errors import StateError, listed
from surgery_core.regular import open_regular, read_text

_SIZE_LEN = 8
"""A file begins with the size of its header in so many bytes, which the header follows, and values."""

_MAX_HEADER = 100_000_000
"""Bytes that safetensors reads of a header."""

_MAX_DIMENSIONS = 64
"""With more, torch can hold a tensor and not compute with it."""

_TEXT = ".json"
"""How the names of texts end, which tells them from what other programs put in the metadata."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFile:
    """A safetensors file that was read, all of it of one save.

    Args:
        path: The file.
        tensors: By key, on the CPU.
        texts: Those in its header, by name.
        stamp: Of the file; see `file_stamp`.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    texts: Mapping[str, str]
    stamp: object

    def text(self, name: str) -> str:
        """Return a text that was saved with the tensors.

        A file of another program has none in its header: then it is the file of that name next to it.

        Raises:
            OSError: There is none, or it cannot be read, or may be of another save.
            ValueError: It is not text.
        """
        if self.texts:
            if name not in self.texts:
                raise FileNotFoundError(errno.ENOENT, f"No {name} in its header", str(self.path))
            return self.texts[name]
        found = read_text(self.path.with_name(name))
        # A save replaces the tensors first.
        if file_stamp(self.path) != self.stamp:
            raise OSError(
                errno.EAGAIN, "Saved anew while it was read; read it again", str(self.path)
            )
        return found


def file_stamp(path: str | os.PathLike[str]) -> tuple[int, int, int] | None:
    """Return what changes when a file is saved anew: its inode, time and size; None if it is not there.

    Example:
        >>> file_stamp("nowhere") is None
        True
    """
    try:
        return _stamp_of(os.stat(path))  # noqa: PTH116 (asked for thousands of files)
    except OSError:
        return None


def _stamp_of(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_mtime_ns, found.st_size


def tensor_files(
    name: str, tensors: Mapping[str, Tensor], texts: Mapping[str, str]
) -> dict[str, bytes]:
    """Return what to write for tensors with texts: a file that has all of it, and a file for each text.

    The first one is what `read_tensor_file` reads. The others are for people and other programs.

    Args:
        name: Of the file with the tensors.
        tensors: Whole, by key, on any device; those that share memory are written for each key.
        texts: By file name, which ends in `.json`.

    Returns:
        By file name, in the order in which they have to be put in their places.

    Raises:
        StateError: The texts are larger than what a header can be.
    """
    beside = {key: text.encode() for key, text in texts.items()}
    return {name: pack_tensors(tensors, texts), **beside}


def pack_tensors(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> bytes:
    """Return a safetensors file with texts in its header, the same bytes for the same values.

    Args:
        tensors: As for `tensor_files`.
        texts: Same.

    Raises:
        StateError: See `tensor_files`.

    Example:
        >>> import torch
        >>> data = pack_tensors({"a": torch.ones(2)}, {"about.json": "{}"})
        >>> load(data)
        {'a': tensor([1., 1.])}
    """
    plain = save(_separate(tensors))
    end = _header_end(plain)
    # By hand, since safetensors writes metadata in an order that changes.
    metadata = {"__metadata__": {"format": "pt", **texts}}
    header = json.dumps({**metadata, **json.loads(plain[_SIZE_LEN:end])}).encode()
    # Values begin where eight divides.
    header += b" " * (-len(header) % _SIZE_LEN)
    if len(header) > _MAX_HEADER:
        msg = (
            f"What belongs to the tensors takes {len(header):,} bytes, and a safetensors file can "
            f"have {_MAX_HEADER:,} in its header. Save fewer modules at a time."
        )
        raise StateError(msg)
    size = len(header).to_bytes(_SIZE_LEN, "little")
    return b"".join((size, header, values_of(plain)))


def values_of(data: bytes) -> memoryview:
    """Return what follows the header of a safetensors file."""
    return memoryview(data)[_header_end(data) :]


def read_tensor_file(path: str | os.PathLike[str]) -> TensorFile:
    """Read a safetensors file, with the texts in its header.

    Raises:
        OSError: It is not there, or not a regular file, or cannot be read.
        ValueError: It is damaged.
    """
    with open_regular(path) as file:
        data, stamp = file.read(), _stamp_of(os.fstat(file.fileno()))
    tensors, texts = unpack_tensors(data)
    return TensorFile(path=Path(path), tensors=tensors, texts=texts, stamp=stamp)


def unpack_tensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and texts in what `pack_tensors` made, or another safetensors file.

    Raises:
        ValueError: It is damaged.
    """
    try:
        tensors = dict(sorted(load(data).items()))
        header = json.loads(data[_SIZE_LEN : _header_end(data)])
    # Whatever safetensors and torch make of damaged files, sizes that overflow among them; they
    # document no set of errors.
    except Exception as err:
        raise ValueError(_damaged(err)) from err
    many = [key for key, tensor in tensors.items() if tensor.ndim > _MAX_DIMENSIONS]
    if many:
        msg = f"tensors of more than {_MAX_DIMENSIONS} dimensions: {listed(many)}"
        raise ValueError(msg)
    return tensors, _texts(header.get("__metadata__"))


def read_tensor_header(
    path: str | os.PathLike[str],
) -> tuple[TensorFile, dict[str, tuple[str, tuple[int, ...]]]]:
    """Do as `read_tensor_file`, but read no values.

    Returns:
        The file without tensors, and safetensors' name of the dtype, and the shape, by key.

    Raises:
        OSError: See `read_tensor_file`.
        ValueError: Same.
    """
    with open_regular(path) as file:
        stamp = _stamp_of(os.fstat(file.fileno()))
    try:
        with safe_open(path, framework="pt") as opened:
            parts = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 (no mapping)
            found = {key: (str(p.get_dtype()), tuple(p.get_shape())) for key, p in parts.items()}
            texts = _texts(opened.metadata())
    except SafetensorError as err:
        raise ValueError(_damaged(err)) from err
    return TensorFile(path=Path(path), tensors={}, texts=texts, stamp=stamp), found


def _texts(metadata: Mapping[str, str] | None) -> dict[str, str]:
    return {key: text for key, text in (metadata or {}).items() if key.endswith(_TEXT)}


def _damaged(err: Exception) -> str:
    said = str(err).partition("\n")[0]
    return f"not a safetensors file: {type(err).__name__}: {said:.200}"


def _header_end(data: bytes) -> int:
    return _SIZE_LEN + int.from_bytes(data[:_SIZE_LEN], "little")


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of which none shares memory with another: safetensors refuses those."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        found[key] = plain.clone() if storage in seen else plain
        seen.add(storage)
    return found
