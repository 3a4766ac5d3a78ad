"""How the command line prints: tables, JSON, progress, and errors with where they come from."""

import atexit
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from surgery_core.errors import RecipeError, SurgeryError, SurgeryWarning
from surgery_core.shown import Shown

UNFOLDED = 10_000
"""Columns a pipe or a file is given, so that no line of a table is folded there."""

Advance = Callable[[], None]
"""Called when a step of a job is done."""


@contextmanager
def errors_reported() -> Iterator[None]:
    """Print an error of this package as such, with its notes, and exit with 1; and its warnings.

    So are errors of files that cannot be read or written, and attempts of code that is called, as a
    plugin's, to end the process. An interrupt is passed on, behind what it interrupted.
    """
    with warnings.catch_warnings():
        before = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, SurgeryWarning):
                typer.echo(f"warning: {message}", err=True)
            else:
                before(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        try:
            yield
        except (SurgeryError, OSError) as err:
            problems = err.problems if isinstance(err, RecipeError) else [str(err)]
            for problem in problems:
                typer.echo(f"error: {problem}", err=True)
            for note in getattr(err, "__notes__", ()):
                typer.echo(f"  in {note}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as err:
            typer.echo("\n".join(["Interrupted.", *getattr(err, "__notes__", ())]), err=True)
            raise
        except BaseException as err:
            if isinstance(err, Exception):
                raise
            typer.echo(f"error: {_ended(err)}", err=True)
            raise typer.Exit(1) from None


def _ended(err: BaseException) -> str:
    frame = traceback.extract_tb(err.__traceback__)[-1]
    return (
        f"Command was not finished: {frame.name!r} at {frame.filename}:{frame.lineno} ended it with "
        f"{err!r}. Commands of plugins end with typer.Exit; all else of a plugin, and what makes a "
        "model, must raise an error instead."
    )


@contextmanager
def working() -> Iterator[None]:
    """Report errors, and keep stdout for the result: for everything but printing that."""
    with errors_reported(), stdout_kept():
        yield


@contextmanager
def stdout_kept() -> Iterator[None]:
    """Send to stderr what is printed while this holds, by Python, by C or by other processes."""
    with ExitStack() as stack:
        _flush()
        try:
            saved = os.dup(_STDOUT)
        except OSError:
            # There is none, so nothing can get into it.
            saved = None
        if saved is not None:
            stack.callback(os.close, saved)
            stack.callback(os.dup2, saved, _STDOUT)
            _to_stderr()
        stack.callback(_flush)
        stack.enter_context(redirect_stdout(sys.stderr))
        yield


def leave_stdout() -> None:
    """Send to stderr what is printed when the process ends, as by functions of `atexit`."""

    def leave() -> None:
        _flush()
        _to_stderr()

    # The last that is registered is called first.
    atexit.register(leave)


_STDOUT, _STDERR = 1, 2
"""File descriptors."""


def _to_stderr() -> None:
    with suppress(OSError):
        os.dup2(_STDERR, _STDOUT)


def _flush() -> None:
    for stream in (sys.stdout, sys.__stdout__):
        # It may be closed, or nobody may read it any more.
        with suppress(AttributeError, OSError, ValueError):
            stream.flush()  # type: ignore[union-attr]  # None is an AttributeError


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Advance]:
    """Show on a terminal that something goes on, and how far it is if that is known.

    Args:
        what: What is done.
        total: How many steps it has; None if nobody knows.

    Yields:
        What to call after each step.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *([MofNCompleteColumn()] if total is not None else []),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def print_json(data: Any) -> None:  # noqa: ANN401 (plain data)
    """Print plain data as JSON."""
    typer.echo(json.dumps(data, indent=2))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table under a title; see `print_shown`."""
    print_shown(Shown(title=title, columns=tuple(columns), rows=tuple(map(tuple, rows)), data={}))


def print_shown(shown: Shown) -> None:
    """Print a table, or a block of lines for each row where the terminal is too narrow for it."""
    # Names come from files: square brackets in them are no markup.
    console = Console(markup=False, emoji=False, highlight=False)
    table = Table(*shown.columns)
    rows = [tuple(map(_printable, row)) for row in shown.rows]
    for row in rows:
        table.add_row(*row)
    wanted = console.measure(table, options=console.options.update(width=UNFOLDED)).maximum
    if not console.is_terminal:
        console.width = UNFOLDED
    elif wanted > console.width:
        table = Table(Column(overflow="fold"), Column(overflow="fold"), show_header=False)
        for row in rows:
            for cells in zip(shown.columns, row, strict=True):
                table.add_row(*cells)
            table.add_section()
    console.print(_printable(shown.title), table, *map(_printable, shown.notes), sep="\n")


def _printable(text: str) -> str:
    """Write what is not printable as escapes: a terminal would obey names that a file made up."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
