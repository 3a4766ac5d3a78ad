"""Files that are complete or not there, whenever a write fails or the process dies."""

import errno
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from surgery_core.errors import listed

try:
    import fcntl

    _HAS_LOCKS = True
except ImportError:  # pragma: no cover (Windows, where leftovers stay)
    _HAS_LOCKS = False

_PREFIX, _SUFFIX = ".surgery-", ".tmp"
"""How the names of hidden folders begin and end; the rest is random."""


def write_files(
    folder: str | os.PathLike[str], files: Mapping[str, bytes], *, durable: bool = True
) -> None:
    """Write files to a folder, each complete or not at all; see `write_folders`.

    Args:
        folder: Made if it is not there, and taken away again after an error.
        files: What they hold, by name; put in their places in this order.
        durable: Wait until the disk has them, so that they also outlast a loss of power.

    Raises:
        OSError: One could not be written; the error names it.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_files(f"{folder}/a", {"weights": b"123", "config.json": b"{}"})
        ...     sorted(os.listdir(f"{folder}/a"))
        ['config.json', 'weights']
    """
    write_folders([(folder, files)], durable=durable)


def write_folders(
    folders: Iterable[tuple[str | os.PathLike[str], Mapping[str, bytes]]], *, durable: bool = True
) -> None:
    """Write files to several folders: all of them are written before the first is put in its place.

    Each rename puts one file in its place, so a process that dies between two renames leaves new
    files next to old ones. What must not be mixed belongs in one file, the first of its folder.

    A hidden folder in each holds the files until then. If the process is killed it stays, until
    the next save there removes it.

    Args:
        folders: The files of each folder, as for `write_files`; taken one at a time.
        durable: Wait until the disk has them.

    Raises:
        OSError: One could not be written; the error names it. Before the first rename nothing was
            changed; after it, a note on the error says which files were put in their places.
    """
    staged: list[tuple[Path, Path]] = []
    with ExitStack() as stack:
        for folder, files in folders:
            root = Path(folder)
            stack.enter_context(_made_folder(root))
            hidden = stack.enter_context(_hidden_folder(root))
            for name, data in files.items():
                _write(hidden / name, data, root / name, durable=durable)
                staged.append((hidden / name, root / name))
        _put_in_place(staged, durable=durable)


def _put_in_place(staged: Iterable[tuple[Path, Path]], *, durable: bool) -> None:
    done: list[str] = []
    try:
        for source, path in staged:
            with naming(path):
                source.replace(path)
                done.append(os.fspath(path))
                if durable:
                    _sync_folder(path.parent)
    except BaseException as err:
        if done:
            err.add_note(f"Saved before this error: {listed(done, most=100)}.")
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have errors say which file was to be written: a full disk does not, nor do hidden names."""
    try:
        yield
    except OSError as err:
        code = err.errno if err.errno is not None else errno.EIO
        raise type(err)(code, err.strerror or str(err), os.fspath(path)) from err


def _write(staged: Path, data: bytes, path: Path, *, durable: bool) -> None:
    """Write what is to become a file under another name, which must not be there, even as a link."""
    with naming(path):
        if path.is_dir() and not path.is_symlink():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with staged.open("xb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())


@contextmanager
def _made_folder(folder: Path) -> Iterator[None]:
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
def _hidden_folder(root: Path) -> Iterator[Path]:
    """Make a hidden folder, locked for as long as it is used, and remove those of dead processes."""
    _sweep(root)
    hidden = None
    while hidden is None:
        with naming(root):
            made = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=root))
        try:
            with _locked(made, wait=True) as is_locked:
                # Another process may have swept it before it was locked; then again.
                if is_locked and made.exists():
                    hidden = made
                    yield hidden
        finally:
            _remove(made)


def _remove(hidden: Path) -> None:
    # The error that led here is the one to hear of.
    with suppress(OSError):
        for path in hidden.iterdir():
            path.unlink()
        hidden.rmdir()


def _sweep(root: Path) -> None:
    """Remove hidden folders that no living process has locked."""
    with suppress(OSError), os.scandir(root) as entries:
        for entry in entries:
            if (
                entry.name.startswith(_PREFIX)
                and entry.name.endswith(_SUFFIX)
                and entry.is_dir(follow_symlinks=False)
            ):
                with _locked(Path(entry.path), wait=False) as is_locked:
                    if is_locked:
                        _remove(Path(entry.path))


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Lock a folder, which the system undoes when the process dies.

    Args:
        folder: The folder.
        wait: Wait for the lock; and go on without where the file system knows no locks.

    Yields:
        Whether it is locked, or need not be.
    """
    if not _HAS_LOCKS:  # pragma: no cover (see the import)
        yield wait
        return
    try:
        with naming(folder.parent):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield False
        return
    try:
        is_locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            is_locked = wait
        yield is_locked
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
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
