"""Whether the files of an adapter are those that were there before."""

import os

from surgery_adaption_prompt.checkpoints import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE

Stamp = tuple[tuple[int, int, int] | None, ...]
"""Inode, time of the last change and size of each file of an adapter; None for a missing file."""


def folder_stamp(folder: str) -> Stamp:
    """Return what changes when an adapter is saved anew; no file is opened."""
    return tuple(
        _file_stamp(f"{folder}{os.sep}{name}") for name in (WEIGHTS_FILE, PICKLE_FILE, CONFIG_FILE)
    )


def _file_stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 (a store asks with each request)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
