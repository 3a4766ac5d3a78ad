"""The commands `train`, `generate` and `eval`; what needs transformers is imported when they run."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from surgery_core import OptionsError, Session
from surgery_core.cli_inputs import is_recipe
from surgery_core.cli_output import Advance, print_json, print_table, progress, stdout_kept
from surgery_training.folder import CURVES_FILE, RUN_FILE, RunFolder
from surgery_training.settings import Template, load_training_settings

if TYPE_CHECKING:
    from surgery_core import EditedModel
    from surgery_training.examples import Encoder

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Variables = Annotated[
    list[str] | None, typer.Option("--var", help="name=value, for a variable of the recipe.")
]
ModelName = Annotated[
    str | None,
    typer.Option(help="Name of the model, name=source, or a source where there is one model."),
]
AdapterName = Annotated[
    str | None, typer.Option(help="Name of the adapter; the active one if absent.")
]
Source = Annotated[str, typer.Argument(help="What `surgery train` wrote, a record, or a recipe.")]
TemplateName = Annotated[
    str | None,
    typer.Option(help="chat or plain; what it was trained with, or chat if that is not known."),
]
TokenizerName = Annotated[
    str | None, typer.Option(help="Folder of the tokenizer, if it is not the model's.")
]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code", help="Import and call package.module:factory if a file names it."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="How many at a time.")]


class _Lines:
    """Prints a line for each measurement and at every tenth of the way, and shows how far it is.

    Args:
        stack: Closes what is shown.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._advance: Advance | None = None
        self._shown = 0
        self._losses: list[float] = []

    def on_step(self, step: int, total: int, loss: float) -> None:
        if self._advance is None:
            self._advance = self._stack.enter_context(progress("Training", total=total))
        # More than once where a training was resumed.
        for _ in range(self._shown, step):
            self._advance()
        self._shown = step
        self._losses.append(loss)
        every = max(1, total // 10)
        if step % every == 0 or step == total:
            typer.echo(f"step {step}/{total}  loss {sum(self._losses) / len(self._losses):.4f}")
            self._losses.clear()

    def on_evaluate(self, step: int, total: int, loss: float) -> None:
        typer.echo(f"step {step}/{total}  validation loss {loss:.4f}")


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe: YAML, TOML or JSON.")],
    training: Annotated[str, typer.Argument(help="How to train: YAML, TOML or JSON.")],
    out: Annotated[Path, typer.Option(help="Folder for the record, curves and checkpoints.")],
    model: ModelName = None,
    adapter: AdapterName = None,
    var: Variables = None,
    *,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")
    ] = False,
    allow_code: AllowCode = False,
) -> None:
    """Train an adapter of a recipe, and keep a record of it. Exit status: 0, or 1 on an error."""
    if not is_recipe(recipe):
        msg = f"Source {recipe!r} is no recipe: expected a file, of which something is trained. Pass one."
        raise OptionsError(msg)
    settings = load_training_settings(training)
    if resume and RunFolder(out).is_finished:
        typer.echo(f"Training in {str(out)!r} is finished already.")
        return
    # After what may be wrong with the files.
    from surgery_training.loading import read_one  # noqa: PLC0415 (takes seconds)
    from surgery_training.run import train as run  # noqa: PLC0415 (same)

    target, name = read_one(recipe, variables=var or [], model=model)
    with stdout_kept():
        session = Session(allow_code=allow_code or name in target.typed)
    with ExitStack() as stack:
        outcome = run(
            target.recipe,
            settings,
            out,
            session=session,
            model=name,
            adapter=adapter,
            resume=resume,
            observer=_Lines(stack),
        )
    if not outcome.is_first_process:
        return
    if outcome.num_truncated:
        typer.echo(
            f"warning: {outcome.num_truncated} examples were cut off at max_length", err=True
        )
    best = (
        "" if outcome.history.best is None else f", validation loss {outcome.history.best[1]:.4f}"
    )
    typer.echo(
        f"Trained {outcome.num_parameters:,} values of {', '.join(outcome.trained)} in "
        f"{outcome.steps} steps; kept those of step {outcome.kept}{best}.\n"
        f"Recorded in {str(out)!r}, beside {RUN_FILE} and {CURVES_FILE}."
    )


def generate(
    source: Source,
    prompt: Annotated[list[str], typer.Option(help="What to answer; may be given several times.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 128,
    model: ModelName = None,
    adapter: AdapterName = None,
    var: Variables = None,
    template: TemplateName = None,
    tokenizer: TokenizerName = None,
    *,
    base: Annotated[
        bool, typer.Option("--base", help="Answer with the model as it is without the recipe.")
    ] = False,
    allow_code: AllowCode = False,
) -> None:
    """Print the answer to each prompt, a line or more for each. Exit status: 0, or 1 on an error."""
    from surgery_training.inference import answers  # noqa: PLC0415 (takes seconds)

    named = _Named(source, var, model, adapter, template, tokenizer)
    with stdout_kept(), _opened(named, allow_code=allow_code) as (edited, encoder):
        prompts = [encoder.prompt([{"role": "user", "content": text}]) for text in prompt]
        if base:
            with edited.paused() as before:
                found = answers(before, encoder, prompts, max_new_tokens=max_new_tokens)
        else:
            found = answers(edited.model, encoder, prompts, max_new_tokens=max_new_tokens)
    for text in found:
        typer.echo(text)


def evaluate(
    source: Source,
    data: Annotated[str, typer.Option(help="Examples, one a line of JSON, as for training.")],
    batch_size: BatchSize = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many.")] = None,
    model: ModelName = None,
    adapter: AdapterName = None,
    var: Variables = None,
    template: TemplateName = None,
    tokenizer: TokenizerName = None,
    *,
    allow_code: AllowCode = False,
    as_json: Json = False,
) -> None:
    """Measure base and adapted model on examples: loss, exact match. Exit status: 0, or 1 on an error."""
    from surgery_training.examples import encode_all, read_dialogues  # noqa: PLC0415 (with the next)
    from surgery_training.inference import score  # noqa: PLC0415 (takes seconds)

    dialogues = read_dialogues(data)[:limit]
    named = _Named(source, var, model, adapter, template, tokenizer)
    with stdout_kept(), _opened(named, allow_code=allow_code) as (edited, encoder):
        # As long as they are: nothing is kept for a backward.
        examples = encode_all(encoder, dialogues, max_length=2**31, too_long="refuse")
        with progress("Measuring the base"), edited.paused() as before:
            scores = {"base": score(before, encoder, dialogues, examples, batch_size=batch_size)}
        with progress("Measuring the adapted model"):
            scores["adapted"] = score(
                edited.model, encoder, dialogues, examples, batch_size=batch_size
            )
    if as_json:
        print_json({name: found.to_mapping() for name, found in scores.items()})
        return
    rows = [
        (
            *(name, f"{found.loss:.4f}", f"{found.exact}/{found.total}"),
            f"{100 * found.exact / found.total:.1f} %",
        )
        for name, found in scores.items()
    ]
    print_table(f"Measured on {data!r}", ("model", "loss", "exact match", "share"), rows)


class _Named(NamedTuple):
    """What `generate` and `eval` work with, as it was given."""

    source: str
    variables: list[str] | None
    model: str | None
    adapter: str | None
    template: str | None
    tokenizer: str | None


@contextmanager
def _opened(named: _Named, *, allow_code: bool) -> Iterator[tuple["EditedModel", "Encoder"]]:
    """Have a recipe or a record applied to its model for a while, and what makes tokens for it."""
    from surgery_training.examples import Encoder  # noqa: PLC0415 (with the next)
    from surgery_training.loading import (  # noqa: PLC0415 (takes seconds)
        read_one,
        tokenizer_of,
        with_active,
    )

    target, name = read_one(named.source, variables=named.variables or [], model=named.model)
    session, adapter = Session(allow_code=allow_code), named.adapter
    target.check_allowed(session, name)
    trained = (None if is_recipe(named.source) else RunFolder(Path(named.source)).read()) or {}
    settings: dict[str, Any] = trained.get("settings", {})
    encoder = Encoder(
        tokenizer_of(target, name, named.tokenizer or settings.get("tokenizer")),
        _template(named.template or settings.get("template", "chat")),
    )
    with progress("Loading the model"):
        loaded = target.load(session, name, weights=True)
        if name in target.records:
            edited = session.load(loaded, target.records[name].folder)
            if adapter is not None:
                edited.set_active(adapter)
        else:
            recipe = target.recipe
            if adapter is not None:
                recipe, _ = with_active(recipe, name, adapter)
            edited = session.plan_recipe(loaded, recipe, name).apply()
    loaded.eval()
    yield edited, encoder


def _template(name: str) -> Template:
    if name == "chat":
        return "chat"
    if name == "plain":
        return "plain"
    msg = f"Template {name!r} is unknown: expected 'chat' or 'plain'. Fix --template."
    raise OptionsError(msg)
