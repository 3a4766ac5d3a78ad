"""The command line: plan, apply, verify and show what recipes and records say of models."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from surgery_core.cli_inputs import (
    Target,
    is_recipe,
    load_model,
    options_of,
    read_target,
)
from surgery_core.cli_output import errors_reported, print_json, print_shown, print_table, progress
from surgery_core.compare import differences
from surgery_core.editing import EditedModel, ModelPlan
from surgery_core.errors import OptionsError, RecordError
from surgery_core.operation import Rule
from surgery_core.recipe import AdapterRecipe, ModelRecipe, recipe_schema
from surgery_core.record import RECORD_FILE, read_record, show_record
from surgery_core.session import Session
from surgery_core.shown import Shown
from surgery_core.verify import ALL_TIERS, DEFAULT_TIERS, Tier, Verification
from surgery_core.verify import verify as verify_model

app = typer.Typer(
    help="Plan, apply and verify changes to the modules of PyTorch models.",
    no_args_is_help=True,
    add_completion=True,
)

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
        plans = {}
        for name in target.recipe.models:
            with progress(f"Planning {name}"):
                plans[name] = _plan(session, target, name, weights=False)
    documents = {name: found.document for name, found in plans.items()}
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
        bool, typer.Option("--verify/--no-verify", help="Verify before anything is saved.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Apply a recipe, verify it, and keep a record for each model. Exit status: 0, or 1."""
    rows, data, failed = [], {}, False
    with errors_reported():
        session = Session()
        target = read_target(recipe, variables=var or [], models=model or [])
        for name in target.recipe.models:
            edited = _apply(name, _plan(session, target, name, weights=True))
            outcome = _verified(session, edited, DEFAULT_TIERS) if check else None
            document = edited.plan.document
            failed = failed or (outcome is not None and not outcome.is_ok)
            if outcome is None or outcome.is_ok:
                with progress(f"Saving {name}"):
                    session.save(edited, out / name)
            parameters = sum(p.numel() for p in edited.added_parameters())
            status = "not verified" if outcome is None else "ok" if outcome.is_ok else "failed"
            place = str(out / name) if status != "failed" else "-"
            rows.append(
                (
                    *(name, ", ".join(edited.adapters) or "-", str(document.num_edits)),
                    *(f"{parameters:,}", status, place),
                )
            )
            data[name] = {
                "record": place,
                "plan": document.to_mapping(),
                "verification": None if outcome is None else outcome.to_mapping(),
            }
    if as_json:
        print_json({"models": data})
    else:
        columns = ("model", "adapters", "modules", "trainable", "verified", "record")
        print_table(f"Applied {recipe!r}", columns, rows)
    raise typer.Exit(1 if failed else 0)


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
        session = Session()
        target = read_target(source, variables=var or [], models=model or [])
        for name in target.recipe.models:
            edited = _edited(session, target, name)
            outcomes[name] = _verified(session, edited, tiers)
            edited.revert()
    if as_json:
        print_json({"models": {name: found.to_mapping() for name, found in outcomes.items()}})
    else:
        rows = [(name, *row) for name, found in outcomes.items() for row in found.rows()]
        print_table(f"Verified {source!r}", ("model", "check", "of", "outcome", "detail"), rows)
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
        shown: object
        if (Path(source) / RECORD_FILE).is_file():
            shown = show_record(read_record(source))
        else:
            shown = Session().plugins.show(source)
        if not isinstance(shown, Shown):
            msg = (
                f"Source {source!r} cannot be shown: expected something that an installed plugin "
                f"saved, got {shown!r} from the plugins. See `surgery plugins`."
            )
            raise OptionsError(msg)
    if as_json:
        print_json(shown.data)
    else:
        print_shown(shown)


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
        adapter = AdapterRecipe(
            operation=operation,
            options=options_of(option or []),
            source=str(Path(source).resolve()),
        )
        recipe = ModelRecipe(source=model, adapters={name: adapter})
        with progress("Loading the model"):
            loaded = load_model(session, model, weights=True)
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
        edited = _edited(session, target, name)
        if adapter is None and len(edited.adapters) != 1:
            msg = f"Record has the adapters {list(edited.adapters)}: name one with --adapter."
            raise OptionsError(msg)
        chosen = adapter or edited.adapters[0]
        session.export(edited, chosen, out)
    typer.echo(f"Adapter {chosen!r} is written to {str(out)!r}.")


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


def _plan(session: Session, target: Target, name: str, *, weights: bool) -> ModelPlan:
    with progress(f"Loading {name}"):
        model = load_model(session, target.source(name), weights=weights)
    return session.plan_recipe(model, target.recipe, name)


def _apply(name: str, planned: ModelPlan) -> EditedModel:
    with progress(f"Applying {name}", total=planned.document.num_edits) as advance:
        return planned.apply(on_write=advance)


def _edited(session: Session, target: Target, name: str) -> EditedModel:
    if name not in target.records:
        return _apply(name, _plan(session, target, name, weights=True))
    with progress(f"Loading {name}"):
        model = load_model(session, target.source(name), weights=True)
        return session.load(model, target.records[name].folder)


def _verified(session: Session, edited: EditedModel, tiers: tuple[Tier, ...]) -> Verification:
    with progress("Verifying"):
        return verify_model(edited, session.plugins.probe_inputs(edited.model), tiers=tiers)
