"""Files and folders that are complete or not there, whenever a write fails or the process dies."""

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file whole: what was there before stays until all of it is on the disk.

    Args:
        path: The file; its folder must be there.
        data: Its contents.
        durable: Wait until the disk has it, so that it also outlasts a loss of power.

    Raises:
        OSError: It could not be written, and is as it was; the error names it.
    """
    staged = _beside(path, "tmp")
    try:
        _write(staged, data, path, durable=durable)
        with naming(path):
            staged.replace(path)
            if durable:
                sync_folder(path.parent)
    finally:
        _discard(staged)


def write_files(
    folder: str | os.PathLike[str], files: Mapping[str, bytes], *, durable: bool = True
) -> None:
    """Write several files of a folder: after an error all of them are as they were.

    Each is complete or not there whenever the process dies. If it dies while they are put in their
    places, which is after all of them were written, those of before may stand beside new ones.

    Args:
        folder: Made if it is not there, and taken away again after an error.
        files: What they hold, by name; put in their places in this order.
        durable: Wait until the disk has them.

    Raises:
        OSError: One could not be written; the error names it.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_files(f"{folder}/a", {"config.json": b"{}", "weights": b"123"})
        ...     sorted(os.listdir(f"{folder}/a"))
        ['config.json', 'weights']
    """
    root = Path(folder)
    staged = {name: _beside(root / name, "tmp") for name in files}
    kept = {name: _beside(root / name, "old") for name in files}
    with made_folder(root):
        try:
            for name, data in files.items():
                _write(staged[name], data, root / name, durable=durable)
            for name in files:
                with naming(root / name):
                    _keep(root / name, kept[name])
            _put_in_place(root, staged, kept)
            if durable:
                with naming(root):
                    sync_folder(root)
        finally:
            for path in (*staged.values(), *kept.values()):
                _discard(path)


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder, and take away after an error what was made of it and its parents."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            # Somebody may have put something in it.
            with suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have errors say which file was to be written: a full disk does not, nor do hidden names."""
    try:
        yield
    except OSError as err:
        code = err.errno if err.errno is not None else errno.EIO
        raise type(err)(code, err.strerror or str(err), os.fspath(path)) from err


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system knows how."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        # Windows opens no folders.
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(path: Path, suffix: str) -> Path:
    """Return a hidden name of this thread's own."""
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.{suffix}")


def _write(staged: Path, data: bytes, path: Path, *, durable: bool) -> None:
    with naming(path), staged.open("wb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def _keep(path: Path, kept: Path) -> None:
    """Have what a file holds under another name too."""
    if not path.exists():
        return
    try:
        kept.hardlink_to(path)
    except OSError:
        # Not every file system knows of links.
        shutil.copy2(path, kept)


def _put_in_place(root: Path, staged: Mapping[str, Path], kept: Mapping[str, Path]) -> None:
    done: list[str] = []
    try:
        for name, path in staged.items():
            with naming(root / name):
                path.replace(root / name)
            done.append(name)
    except BaseException:
        for name in done:
            if kept[name].exists():
                kept[name].replace(root / name)
            else:
                (root / name).unlink()
        raise


def _discard(path: Path) -> None:
    # The error that led here is the one to hear of.
    with suppress(OSError):
        path.unlink(missing_ok=True)
