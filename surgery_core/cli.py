"""The command line: plan, apply, verify and show what recipes and records say of models."""

import functools
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from surgery_core.cli_inputs import (
    absolute,
    aligned,
    is_recipe,
    options_of,
    read_target,
    record_folders,
)
from surgery_core.cli_output import (
    errors_reported,
    leave_stdout,
    print_json,
    print_shown,
    print_table,
    progress,
    stdout_kept,
    working,
)
from surgery_core.cli_steps import Applied, apply_and_save, edited_model, plan_all, verify_edited
from surgery_core.compare import differences
from surgery_core.environment import as_written
from surgery_core.errors import OptionsError, RecordError, listed
from surgery_core.hookspecs import COMMANDS_GROUP, Command
from surgery_core.operation import Rule
from surgery_core.plugins import Plugins
from surgery_core.recipe import parse_recipe
from surgery_core.recipe_schema import recipe_schema
from surgery_core.record import TENSORS_FILE, is_record, read_record, show_record
from surgery_core.session import Session
from surgery_core.shown import Shown
from surgery_core.sources import load_source
from surgery_core.verify import ALL_TIERS, DEFAULT_TIERS, Verification

HELP = "Plan, apply and verify changes to the modules of PyTorch models."

OPTIONS: Mapping[str, Any] = {
    "help": HELP,
    "no_args_is_help": True,
    "add_completion": True,
    # They may be anybody's, and secret.
    "pretty_exceptions_show_locals": False,
}

app = typer.Typer(**OPTIONS)

VERIFIED_COLUMNS = ("model", "check", "of", "outcome", "detail")

EXIT_CHANGES = 2
"""Exit status of `surgery plan` and `surgery diff` when there is something to change."""

INTERRUPTED = 130
"""Exit status after an interrupt, as shells have it."""


def _operations(incomplete: str) -> list[str]:
    with stdout_kept():
        names = Session().plugins.operations
    return [name for name in names if name.startswith(incomplete)]


def _tiers(incomplete: str) -> list[str]:
    return [tier for tier in ALL_TIERS if tier.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Variables = Annotated[
    list[str] | None, typer.Option("--var", help="name=value, for a variable of the recipe.")
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="name=source, or a source where there is one model."),
]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code", help="Import and call package.module:factory if a file names it."),
]
RecipeFile = Annotated[str, typer.Argument(help="A recipe: YAML, TOML or JSON.")]
OperationName = Annotated[
    str, typer.Option(help="Name of the operation.", autocompletion=_operations)
]
GivenOptions = Annotated[
    list[str] | None, typer.Option("--option", "-o", help="key=value, read as JSON if it is.")
]


@app.callback()
def main() -> None:
    """Plan, apply and verify changes to the modules of PyTorch models."""


@app.command()
def plugins(*, as_json: Json = False) -> None:
    """List the plugins found, broken ones included, and the operations each offers."""
    with working():
        found = Session().plugins
    if as_json:
        print_json([asdict(info) for info in found.infos])
        return
    if not found.infos:
        typer.echo("No plugins are installed.")
        return
    rows = [
        (
            *(info.name, info.distribution or "-", ", ".join(info.operations) or "-"),
            *(", ".join(info.hooks) or "-", info.error or "ok"),
        )
        for info in found.infos
    ]
    print_table("Plugins", ("plugin", "distribution", "operations", "hooks", "state"), rows)


@app.command()
def plan(
    source: Annotated[
        str,
        typer.Argument(
            help="A recipe; or, with --operation, a model: a folder, a GGUF file, an identifier, "
            "or package.module:factory."
        ),
    ],
    operation: Annotated[
        str | None, typer.Option(help="Name of the operation.", autocompletion=_operations)
    ] = None,
    select: Annotated[
        str | None, typer.Option(help="Selector; the operation's own if absent.")
    ] = None,
    option: GivenOptions = None,
    var: Variables = None,
    model: Models = None,
    *,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Show what would change; no weights are loaded. Exit status: 0 nothing, 2 changes, 1 error."""
    with working():
        session = Session(allow_code=allow_code)
        if operation is not None:
            if var or model:
                msg = "Neither --var nor --model has a meaning with --operation. Leave them out."
                raise OptionsError(msg)
            rule = Rule(operation=operation, select=select, options=options_of(option or []))
            built = load_source(session.plugins, source, weights=False)
            single = session.plan(built, [rule]).document
        else:
            if select is not None or option:
                msg = "Neither --select nor --option has a meaning without --operation. Name one."
                raise OptionsError(msg)
            if not is_recipe(source):
                msg = f"Source {source!r} is no recipe: expected one, or --operation. Pass either."
                raise OptionsError(msg)
            target = read_target(source, variables=var or [], models=model or [])
            single, titles, documents = None, *plan_all(session, target)
    if single is not None:
        typer.echo(single.to_json() if as_json else single.render())
        raise typer.Exit(EXIT_CHANGES if single.edits else 0)
    if as_json:
        print_json({"models": {name: found.to_mapping() for name, found in documents.items()}})
    else:
        for name, found in documents.items():
            typer.echo(f"{titles[name]}\n{found.render()}\n")
    raise typer.Exit(EXIT_CHANGES if any(found.num_edits for found in documents.values()) else 0)


@app.command()
def apply(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option(help="Folder for a record of each model.")],
    var: Variables = None,
    model: Models = None,
    *,
    check: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Verify a model before it is saved.")
    ] = True,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Apply a recipe, verify it, and keep a record for each model. Exit status: 0, or 1."""
    done: dict[str, Applied] = {}
    try:
        with working():
            session = Session(allow_code=allow_code)
            target = read_target(recipe, variables=var or [], models=model or [])
            for name in target.recipe.models:
                done[name] = apply_and_save(session, target, name, out / name, check=check)
    finally:
        # An error with one model does not take back the records of those before it.
        _print_applied(recipe, done, as_json=as_json)
    raise typer.Exit(1 if any(found.folder is None for found in done.values()) else 0)


@app.command()
def verify(
    source: Annotated[str, typer.Argument(help="A recipe, a record, or a folder of records.")],
    tier: Annotated[
        list[str] | None,
        typer.Option(help="Which checks; all but compile and export.", autocompletion=_tiers),
    ] = None,
    var: Variables = None,
    model: Models = None,
    *,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Apply a recipe or a record, and check that it holds. Exit status: 0, or 1."""
    tiers: Any = tuple(tier or DEFAULT_TIERS)
    outcomes: dict[str, Verification] = {}
    with working():
        # Before a model is loaded for nothing.
        unknown = sorted(set(tiers) - set(ALL_TIERS))
        if unknown:
            msg = f"Tiers {listed(unknown)} are unknown: expected some of {listed(ALL_TIERS, most=6)}."
            raise OptionsError(msg)
        session = Session(allow_code=allow_code)
        target = read_target(source, variables=var or [], models=model or [])
        for name in target.recipe.models:
            outcomes[name] = verify_edited(session, edited_model(session, target, name), tiers)
    if as_json:
        print_json({"models": {name: found.to_mapping() for name, found in outcomes.items()}})
    else:
        rows = [(name, *row) for name, found in outcomes.items() for row in found.rows()]
        print_table(f"Verified {source!r}", VERIFIED_COLUMNS, rows)
    raise typer.Exit(0 if all(found.is_ok for found in outcomes.values()) else 1)


@app.command()
def show(
    source: Annotated[
        str, typer.Argument(help="A record, or what a plugin saved, such as a folder of adapters.")
    ],
    *,
    as_json: Json = False,
) -> None:
    """Show what is saved, without a model. Exit status: 0, or 1 on an error."""
    with working():
        folders = record_folders(source)
        if is_record(source):
            found = [show_record(read_record(source))]
        elif folders:
            found = [show_record(read_record(folder)) for folder in folders.values()]
        else:
            found = [_shown_by_plugin(source)]
    if not as_json:
        for shown in found:
            print_shown(shown)
    elif folders:
        print_json({"models": dict(zip(folders, (shown.data for shown in found), strict=True))})
    else:
        print_json(found[0].data)


@app.command()
def diff(
    before: Annotated[str, typer.Argument(help="A recipe or a record.")],
    after: Annotated[str, typer.Argument(help="Another.")],
    var: Variables = None,
    *,
    as_json: Json = False,
) -> None:
    """Show how two recipes or records differ. Exit status: 0 not at all, 2 they do, 1 error."""
    with working():
        old, new = read_target(before, variables=var or []), read_target(after, variables=var or [])
        old, new = aligned(old, new), aligned(new, old)
        found = differences(old.recipe, new.recipe, old.records, new.records)
    if as_json:
        print_json([asdict(item) for item in found])
    elif found:
        rows = [(item.sign, item.place, item.before, item.after) for item in found]
        print_table(f"{before} -> {after}", ("", "what", "before", "after"), rows)
    else:
        typer.echo("No differences.")
    raise typer.Exit(EXIT_CHANGES if found else 0)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, with the options of every operation installed."""
    with working():
        operations = Session().plugins.operations
        found = recipe_schema({name: each.options_schema() for name, each in operations.items()})
    print_json(found)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="A saved adapter, in a format of the operation's.")],
    operation: OperationName,
    model: Annotated[str, typer.Option(help="The model it is for.")],
    out: Annotated[Path, typer.Option(help="Folder for the record.")],
    name: Annotated[str, typer.Option(help="Name of the adapter.")] = "default",
    option: GivenOptions = None,
) -> None:
    """Make a record of an adapter that something else saved. Exit status: 0, or 1 on an error."""
    with working():
        session = Session()
        adapter = {
            "operation": operation,
            "options": options_of(option or []),
            "source": as_written(absolute(source)),
        }
        part = {"source": as_written(absolute(model)), "adapters": {name: adapter}}
        recipe = parse_recipe({"models": {"model": part}})
        with progress("Loading the model"):
            loaded = load_source(session.plugins, absolute(model), weights=True)
        edited = session.plan_recipe(loaded, recipe).apply()
        session.save(edited, out)
    typer.echo(f"Adapter {name!r} is recorded in {str(out)!r}.")


@app.command()
def export(
    record: Annotated[str, typer.Argument(help="A record.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    adapter: Annotated[
        str | None, typer.Option(help="Name of the adapter; may be left out if there is one.")
    ] = None,
    model: Models = None,
    *,
    allow_code: AllowCode = False,
) -> None:
    """Write an adapter of a record in its operation's format. Exit status: 0, or 1 on an error."""
    with working():
        session = Session(allow_code=allow_code)
        target = read_target(record, models=model or [])
        if len(target.records) != 1:
            msg = f"Source {record!r} is no record: expected a folder with {TENSORS_FILE!r}."
            raise RecordError(msg)
        (name,) = target.records
        adapters = list(target.recipe.models[name].adapters)
        if (adapter not in adapters) if adapter is not None else len(adapters) != 1:
            msg = (
                f"Record {record!r} has the adapters {listed(adapters)}: expected the name of one, "
                f"got {adapter!r}. Pass --adapter."
            )
            raise OptionsError(msg)
        chosen = adapters[0] if adapter is None else adapter
        edited = edited_model(session, target, name)
        session.export(edited, chosen, out)
    typer.echo(f"Adapter {chosen!r} is written to {str(out)!r}.")


_UsageError: Any = typer.BadParameter.__base__
"""Root of typer's errors about wrong usage, which typer does not export by its own name."""


def with_commands(plugins: Plugins) -> typer.Typer:
    """Return the command line with the commands of plugins, which have a panel of their own."""
    found = typer.Typer(**OPTIONS)
    found.callback()(main)
    found.registered_commands += app.registered_commands
    for info in plugins.infos:
        for name in info.commands:
            panel = f"Commands of {info.distribution or info.name}"
            found.command(name, rich_help_panel=panel)(_reported(plugins.commands[name]))
    for error in plugins.broken.values():
        typer.echo(f"warning: {error}", err=True)
    return found


def _reported(command: Command) -> Command:
    @functools.wraps(command)
    def run_command(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401 (passed through)
        with errors_reported():
            command(*args, **kwargs)

    return run_command


def run() -> None:
    """Run the command line; wrong usage exits with 1, since 2 means that there are changes."""
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        with working():
            found = with_commands(Plugins(group=COMMANDS_GROUP))
        status = found(standalone_mode=False)
    except _UsageError as err:
        err.show()
        status = 1
    except typer.Exit as err:
        status = err.exit_code
    except KeyboardInterrupt:
        status = INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, before)
    leave_stdout()
    sys.exit(status)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # A second one ends the process, whatever it was that swallowed the first.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.default_int_handler(number, frame)


def _print_applied(recipe: str, done: Mapping[str, Applied], *, as_json: bool) -> None:
    if not done:
        return
    if as_json:
        print_json({"models": {name: found.to_mapping() for name, found in done.items()}})
        return
    columns = ("model", "adapters", "modules", "trainable", "verified", "record")
    rows = [
        (
            *(name, ", ".join(found.document.adapters) or "-", str(found.document.num_edits)),
            f"{found.trainable:,}",
            "no" if found.outcome is None else "ok" if found.outcome.is_ok else "failed",
            str(found.folder or "-"),
        )
        for name, found in done.items()
    ]
    print_table(f"Applied {recipe!r}", columns, rows)
    failures = [
        (name, *row)
        for name, found in done.items()
        if found.outcome is not None and not found.outcome.is_ok
        for row in found.outcome.rows()
    ]
    if failures:
        print_table("Not recorded", VERIFIED_COLUMNS, failures)


def _shown_by_plugin(source: str) -> Shown:
    shown: object = Session().plugins.show(source)
    if not isinstance(shown, Shown):
        msg = (
            f"Source {source!r} cannot be shown: expected something that an installed plugin "
            f"saved, got {shown!r} from the plugins. See `surgery plugins`."
        )
        raise OptionsError(msg)
    return shown
