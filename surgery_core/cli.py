"""The command line: which plugins there are, what an operation would change, what is saved."""

import importlib
import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from torch import nn

from surgery_core.errors import OptionsError, SurgeryError
from surgery_core.plan import Rule
from surgery_core.session import Session
from surgery_core.shown import Shown

app = typer.Typer(
    help="Plan changes to the modules of a PyTorch model.",
    no_args_is_help=True,
    add_completion=True,
)

EXIT_CHANGES = 2
"""Exit status of `surgery plan` when there is something to change."""

UNFOLDED = 10_000
"""Columns a pipe or a file is given, so that no line of a table is folded there."""


@app.callback()
def main() -> None:
    """Plan changes to the modules of a PyTorch model."""


@app.command()
def plugins(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the plugins found, broken ones included, and the operations each offers."""
    found = Session().plugins
    if as_json:
        typer.echo(json.dumps([asdict(info) for info in found.infos], indent=2))
        return
    table = Table("plugin", "distribution", "operations", "hooks", "state")
    for info in found.infos:
        table.add_row(
            info.name,
            info.distribution or "-",
            ", ".join(info.operations) or "-",
            ", ".join(info.hooks) or "-",
            info.error or "ok",
        )
    Console().print(table if found.infos else "No plugins are installed.")


@app.command()
def plan(
    source: Annotated[
        str, typer.Argument(help="A model folder, or package.module:factory returning a module.")
    ],
    operation: Annotated[str, typer.Option(help="Name of the operation.")],
    select: Annotated[
        str | None, typer.Option(help="Selector; the operation's own if absent.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="key=value, read as JSON if it is.")
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what an operation would change. Exit status: 0 nothing, 2 changes, 1 error."""
    try:
        session = Session()
        model = _load(session, source)
        rule = Rule(operation=operation, select=select, options=_options(option or []))
        document = session.plan(model, [rule]).document
    except SurgeryError as err:
        typer.echo(f"error: {err}", err=True)
        raise typer.Exit(1) from None
    typer.echo(document.to_json() if as_json else document.render())
    raise typer.Exit(EXIT_CHANGES if document.edits else 0)


@app.command()
def show(
    source: Annotated[
        str, typer.Argument(help="What a plugin saved, for example a folder with adapters.")
    ],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a plugin saved, without a model. Exit status: 0, or 1 on an error."""
    try:
        shown = Session().plugins.show(source)
        if not isinstance(shown, Shown):
            msg = (
                f"Source {source!r} cannot be shown: expected something that an installed plugin "
                f"saved, got {shown!r} from the plugins. See `surgery plugins`."
            )
            raise OptionsError(msg)
    except SurgeryError as err:
        typer.echo(f"error: {err}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(shown.data, indent=2))
        return
    _print(shown)


_UsageError: Any = typer.BadParameter.__base__
"""Root of typer's errors about wrong usage, which typer does not export by its own name."""


def run() -> None:
    """Run the command line; wrong usage exits with 1, since 2 means that there are changes."""
    try:
        status = app(standalone_mode=False)
    except _UsageError as err:
        err.show()
        status = 1
    sys.exit(status)


def _print(shown: Shown) -> None:
    """Print a table, or a block of lines for each row where the terminal is too narrow for it."""
    # Names come from files: square brackets in them are no markup.
    console = Console(markup=False, emoji=False, highlight=False)
    table = Table(*shown.columns)
    for row in shown.rows:
        table.add_row(*row)
    wanted = console.measure(table, options=console.options.update(width=UNFOLDED)).maximum
    if not console.is_terminal:
        console.width = UNFOLDED
    elif wanted > console.width:
        table = Table(Column(overflow="fold"), Column(overflow="fold"), show_header=False)
        for row in shown.rows:
            for cells in zip(shown.columns, row, strict=True):
                table.add_row(*cells)
            table.add_section()
    console.print(shown.title, table, *shown.notes, sep="\n")


def _load(session: Session, source: str) -> nn.Module:
    if ":" in source:
        module_name, _, name = source.partition(":")
        try:
            model = getattr(importlib.import_module(module_name), name)()
        except (ImportError, AttributeError, TypeError, ValueError) as err:
            msg = f"Source {source!r} cannot be imported: {err}. Write package.module:factory."
            raise OptionsError(msg) from err
    else:
        model = session.plugins.load_skeleton(source)
    if not isinstance(model, nn.Module):
        msg = (
            f"Source {source!r} gives no model: expected package.module:factory, or a folder that "
            f"an installed plugin can read, got {model!r}. See `surgery plugins`."
        )
        raise OptionsError(msg)
    return model


def _options(pairs: list[str]) -> dict[str, Any]:
    options = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign:
            msg = f"Option {pair!r} is malformed: expected key=value."
            raise OptionsError(msg)
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options
