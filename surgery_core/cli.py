"""The command line: plan, apply, verify and show what recipes and records say of models."""

import functools
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery_core.cli_inputs import (
    Target,
    absolute,
    aligned,
    is_recipe,
    load_model,
    options_of,
    read_target,
    record_folders,
)
from surgery_core.cli_output import errors_reported, print_json, print_shown, print_table, progress
from surgery_core.compare import differences
from surgery_core.editing import EditedModel, ModelPlan
from surgery_core.errors import OptionsError, RecordError, listed
from surgery_core.hookspecs import COMMANDS_GROUP, Command
from surgery_core.model_document import ModelDocument
from surgery_core.operation import Rule
from surgery_core.plugins import Plugins
from surgery_core.recipe import parse_recipe
from surgery_core.recipe_schema import recipe_schema
from surgery_core.record import RECORD_FILE, read_record, show_record
from surgery_core.session import Session
from surgery_core.shown import Shown
from surgery_core.slots import Slot
from surgery_core.verify import ALL_TIERS, DEFAULT_TIERS, Tier, Verification
from surgery_core.verify import verify as verify_model

HELP = "Plan, apply and verify changes to the modules of PyTorch models."

app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=True)

VERIFIED_COLUMNS = ("model", "check", "of", "outcome", "detail")

EXIT_CHANGES = 2
"""Exit status of `surgery plan` and `surgery diff` when there is something to change."""


def _operations(incomplete: str) -> list[str]:
    return [name for name in Session().plugins.operations if name.startswith(incomplete)]


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
    as_json: Json = False,
) -> None:
    """Show what would change; no weights are loaded. Exit status: 0 nothing, 2 changes, 1 error."""
    with errors_reported():
        session = Session()
        if operation is not None:
            if var or model:
                msg = "Neither --var nor --model has a meaning with --operation. Leave them out."
                raise OptionsError(msg)
            rule = Rule(operation=operation, select=select, options=options_of(option or []))
            document = session.plan(load_model(session, source, weights=False), [rule]).document
            typer.echo(document.to_json() if as_json else document.render())
            raise typer.Exit(EXIT_CHANGES if document.edits else 0)
        if select is not None or option:
            msg = "Neither --select nor --option has a meaning without --operation. Name one."
            raise OptionsError(msg)
        if not is_recipe(source):
            msg = f"Source {source!r} is no recipe: expected one, or --operation. Pass either."
            raise OptionsError(msg)
        target = read_target(source, variables=var or [], models=model or [])
        documents = {
            name: _plan(session, target, name, weights=False).document
            for name in target.recipe.models
        }
    if as_json:
        print_json({"models": {name: found.to_mapping() for name, found in documents.items()}})
    else:
        for name, found in documents.items():
            typer.echo(f"{name} ({target.source(name)})\n{found.render()}\n")
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
    as_json: Json = False,
) -> None:
    """Apply a recipe, verify it, and keep a record for each model. Exit status: 0, or 1."""
    done: dict[str, _Applied] = {}
    try:
        with errors_reported():
            session = Session()
            target = read_target(recipe, variables=var or [], models=model or [])
            for name in target.recipe.models:
                done[name] = _applied(session, target, name, out / name, check=check)
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
    as_json: Json = False,
) -> None:
    """Apply a recipe or a record, and check that it holds. Exit status: 0, or 1."""
    tiers: Any = tuple(tier or DEFAULT_TIERS)
    outcomes: dict[str, Verification] = {}
    with errors_reported():
        # Before a model is loaded for nothing.
        unknown = sorted(set(tiers) - set(ALL_TIERS))
        if unknown:
            msg = f"Tiers {listed(unknown)} are unknown: expected some of {listed(ALL_TIERS, most=6)}."
            raise OptionsError(msg)
        session = Session()
        target = read_target(source, variables=var or [], models=model or [])
        for name in target.recipe.models:
            outcomes[name] = _verified(session, _edited(session, target, name), tiers)
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
    with errors_reported():
        folders = record_folders(source)
        if (Path(source) / RECORD_FILE).is_file():
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
    with errors_reported():
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
    operations = Session().plugins.operations
    print_json(recipe_schema({name: found.options_schema() for name, found in operations.items()}))


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
    with errors_reported():
        session = Session()
        adapter = {
            "operation": operation,
            "options": options_of(option or []),
            "source": absolute(source),
        }
        part = {"source": absolute(model), "adapters": {name: adapter}}
        recipe = parse_recipe({"models": {"model": part}})
        with progress("Loading the model"):
            loaded = load_model(session, absolute(model), weights=True)
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
) -> None:
    """Write an adapter of a record in its operation's format. Exit status: 0, or 1 on an error."""
    with errors_reported():
        session = Session()
        target = read_target(record, models=model or [])
        if len(target.records) != 1:
            msg = f"Source {record!r} is no record: expected a folder with {RECORD_FILE!r}."
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
        edited = _edited(session, target, name)
        session.export(edited, chosen, out)
    typer.echo(f"Adapter {chosen!r} is written to {str(out)!r}.")


_UsageError: Any = typer.BadParameter.__base__
"""Root of typer's errors about wrong usage, which typer does not export by its own name."""


def with_commands(plugins: Plugins) -> typer.Typer:
    """Return the command line with the commands of plugins, which have a panel of their own."""
    found = typer.Typer(help=HELP, no_args_is_help=True, add_completion=True)
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
    # Last, so that nothing there hides what is installed.
    sys.path.append(str(Path.cwd()))
    try:
        status = with_commands(Plugins(group=COMMANDS_GROUP))(standalone_mode=False)
    except _UsageError as err:
        err.show()
        status = 1
    sys.exit(status)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Applied:
    """What `surgery apply` tells of one model, without holding on to it."""

    folder: Path | None
    document: ModelDocument
    trainable: int
    outcome: Verification | None

    def to_mapping(self) -> dict[str, Any]:
        return {
            "record": None if self.folder is None else str(self.folder),
            "trainable": self.trainable,
            "plan": self.document.to_mapping(),
            "verification": None if self.outcome is None else self.outcome.to_mapping(),
        }


def _plan(session: Session, target: Target, name: str, *, weights: bool) -> ModelPlan:
    with progress(f"Loading {name}"):
        model = load_model(session, target.source(name), weights=weights)
    with progress(f"Planning {name}"):
        return session.plan_recipe(model, target.recipe, name)


def _apply(name: str, planned: ModelPlan) -> EditedModel:
    document = planned.document
    active = [document.active] if isinstance(document.active, str) else document.active or ()
    edits = list(document.rules.edits) if document.rules is not None else []
    # Adapters that are active together share their places.
    edits += {edit.fqn: edit for each in active for edit in document.adapters[each].edits}.values()
    total = sum(1 + len(edit.aliases) for edit in edits)
    with progress(f"Applying {name}", total=total) as advance:

        def on_write(_: int, target: object) -> None:
            if isinstance(target, Slot):
                advance()

        return planned.apply(on_write=on_write)


def _edited(session: Session, target: Target, name: str) -> EditedModel:
    if name not in target.records:
        return _apply(name, _plan(session, target, name, weights=True))
    with progress(f"Loading {name}"):
        model = load_model(session, target.source(name), weights=True)
        return session.load(model, target.records[name].folder)


def _verified(session: Session, edited: EditedModel, tiers: tuple[Tier, ...]) -> Verification:
    with progress("Verifying"):
        return verify_model(edited, session.plugins.probe_inputs(edited.model), tiers=tiers)


def _applied(session: Session, target: Target, name: str, folder: Path, *, check: bool) -> _Applied:
    """Apply a model's part of a recipe, and save it unless it fails to be verified."""
    edited = _apply(name, _plan(session, target, name, weights=True))
    outcome = _verified(session, edited, DEFAULT_TIERS) if check else None
    is_saved = outcome is None or outcome.is_ok
    if is_saved:
        with progress(f"Saving {name}"):
            session.save(edited, folder)
    return _Applied(
        folder=folder if is_saved else None,
        document=edited.plan.document,
        trainable=sum(parameter.numel() for parameter in edited.added_parameters()),
        outcome=outcome,
    )


def _print_applied(recipe: str, done: Mapping[str, _Applied], *, as_json: bool) -> None:
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
