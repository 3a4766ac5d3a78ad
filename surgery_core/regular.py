"""Open files for reading, and refuse pipes, sockets and devices, which could block or never end."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO


@contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes.

    Args:
        path: The file; links are followed.

    Raises:
        OSError: It cannot be opened, or is not a regular file; nothing is waited for.
    """
    # Opening a pipe would wait for a writer, without the flag.
    with open(path, "rb", opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))
        yield file


def _open_at_once(path: str, flags: int) -> int:
    # Windows has no such flag.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_text(path: str | os.PathLike[str], *, encoding: str = "utf-8") -> str:
    """Read a file of text.

    Args:
        path: The file; it must be a regular one.
        encoding: Of the text.

    Raises:
        OSError: See `open_regular`.
        ValueError: It is not text in that encoding.
    """
    with open_regular(path) as file:
        # As in text mode: ends of lines of other systems become "\n".
        return file.read().decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
