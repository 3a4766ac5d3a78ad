"""Train what a recipe adds to a model: from files to a record, curves and a report."""

import importlib.metadata
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from surgery_core import EditedModel, OptionsError, Recipe, Session, listed
from surgery_core.cli_inputs import Target
from surgery_training.collators import Collator, PackingCollator, PaddingCollator, check_packing
from surgery_training.curves import draw_curves
from surgery_training.examples import Encoder, Tokens, encode_all, read_dialogues
from surgery_training.folder import RunFolder, digest
from surgery_training.history import History
from surgery_training.loading import cast_, tokenizer_of, with_active
from surgery_training.settings import TrainingSettings
from surgery_training.trainer import (
    AdapterTrainer,
    Observer,
    accepts_checkpointing,
    arguments,
    is_gate,
    last_checkpoint,
)

RULES = "rules"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a training came to.

    Args:
        folder: With the record, `training.json` and `curves.svg`.
        trained: Names of what was trained: adapters, and `rules`.
        num_parameters: How many values were trained.
        steps: How many steps of the optimizer were made.
        kept: The step whose values are in the record.
        history: What was measured.
        num_truncated: How many examples were cut off.
        is_first_process: Whether this is the process that wrote the files.
    """

    folder: Path
    trained: tuple[str, ...]
    num_parameters: int
    steps: int
    kept: int
    history: History
    num_truncated: int
    is_first_process: bool


class Quiet:
    """An observer that takes no note of anything."""

    def on_step(self, step: int, total: int, loss: float) -> None:
        """Take no note."""

    def on_evaluate(self, step: int, total: int, loss: float) -> None:
        """Take no note."""


def train(
    recipe: Recipe,
    settings: TrainingSettings,
    out: Path,
    *,
    session: Session | None = None,
    model: str | None = None,
    adapter: str | None = None,
    resume: bool = False,
    observer: Observer | None = None,
) -> Outcome:
    """Train an adapter of a recipe, and the recipe's rules, and keep a record of the result.

    Only what the recipe adds is trained; the base stays as it is. With the same files, settings and
    machine the result is the same, value for value, also if it was interrupted and resumed.

    Args:
        recipe: What is added to the model.
        settings: How to train.
        out: Folder for the record, `training.json`, `curves.svg` and checkpoints.
        session: Its plugins load the model and offer the operations, and it says whether a recipe
            may name code that makes the model; None means a new one, which does not allow that.
        model: Name of the recipe's model; may be left out where there is one.
        adapter: Name of the adapter; None means the active one.
        resume: Go on from the last checkpoint in `out`, or from the beginning where there is none.
        observer: Is told how it goes on.

    Raises:
        OptionsError: The settings do not suit the model or the recipe, or the folder has another run;
            or the loss is no longer finite.
        RecipeError: The examples are none; every line is named.
        SurgeryError: The recipe does not suit the model.
    """
    session = session or Session()
    folder = RunFolder(out)
    name = next(iter(recipe.models)) if model is None else model
    recipe, chosen = with_active(recipe, name, adapter)
    target = Target(recipe=recipe, records={})
    target.check_allowed(session, name)
    if not recipe.models[name].freeze:
        msg = (
            f"Model {name!r} has 'freeze: false': expected a base that is not trained, of which a "
            "record keeps nothing. Leave it out."
        )
        raise OptionsError(msg)
    encoder = Encoder(tokenizer_of(target, name, settings.tokenizer), settings.template)
    examples, validation, num_truncated = _examples(encoder, settings)
    # Sets up processes that train together, of which the first writes.
    args = arguments(settings, folder.checkpoints)
    identity = _identity(recipe, name, chosen, settings, num_processes=args.world_size)
    with args.main_process_first(local=False):
        if args.process_index == 0:
            folder.begin(identity, resume=resume)
    checkpoint = last_checkpoint(folder.checkpoints) if resume else None
    # First values of what is added.
    set_seed(settings.seed)
    base = target.load(session, name, weights=True)
    is_cast = settings.dtype is not None and cast_(base, getattr(torch, settings.dtype))
    config: Any = getattr(base, "config", None)
    use_cache = getattr(config, "use_cache", None)
    edited = session.plan_recipe(base, recipe, name).apply()
    try:
        names = (*((RULES,) if edited.surgery is not None else ()), *((chosen,) if chosen else ()))
        _check(edited, names, settings)
        collator: Collator = PaddingCollator(pad=encoder.pad)
        if settings.collator == "packing":
            check_packing(edited.model, examples[0], examples[-1])
            collator = PackingCollator()
        trainer = AdapterTrainer(
            edited,
            settings,
            args,
            collator=collator,
            examples=examples,
            validation=validation,
            names=names,
            store=lambda path: session.save(edited, path),
            observer=observer or Quiet(),
        )
        if checkpoint is None or not trainer.is_over(checkpoint):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        outcome = _kept(trainer, folder, num_truncated)
        if outcome.is_first_process:
            _save(session, edited, target, name, folder, is_cast=is_cast)
            tokenizer = settings.tokenizer or target.shown(name)
            data = _report(identity, name, settings, tokenizer, outcome)
            folder.finish(data, draw_curves(outcome.history))
    finally:
        if use_cache is not None:
            # Trainer turns it off, and generating would be slow without.
            config.use_cache = use_cache
        edited.model.eval()
        edited.revert()
    return outcome


def _examples(
    encoder: Encoder, settings: TrainingSettings
) -> tuple[list[Tokens], list[Tokens], int]:
    """Return examples to learn from and to measure with, and how many were cut off."""
    found: list[list[Tokens]] = []
    num_truncated = 0
    for path in (settings.data.train, settings.data.validation):
        dialogues = read_dialogues(path) if path is not None else []
        tokens = encode_all(
            encoder, dialogues, max_length=settings.max_length, too_long=settings.too_long
        )
        if settings.too_long == "truncate":
            whole = map(encoder.encode, dialogues)
            num_truncated += sum(a != b for a, b in zip(whole, tokens, strict=True))
        found.append(tokens)
    return found[0], found[1], num_truncated


def _identity(
    recipe: Recipe,
    name: str,
    chosen: str | None,
    settings: TrainingSettings,
    *,
    num_processes: int,
) -> dict[str, Any]:
    """Return what a run must have in common with the one it goes on with; folders may have moved."""
    part = recipe.models[name].model_dump(mode="json", exclude_defaults=True, exclude={"source"})
    paths = {"train": settings.data.train, "validation": settings.data.validation}
    return {
        **settings.model_dump(mode="json", exclude={"data", "tokenizer"}),
        "recipe": part,
        "adapter": chosen,
        "processes": num_processes,
        **{key: None if path is None else digest(path) for key, path in paths.items()},
    }


def _check(edited: EditedModel, names: tuple[str, ...], settings: TrainingSettings) -> None:
    """See that the added parameters are what gets gradients, and that settings mean something."""
    added = edited.added_parameters(names)
    if not added:
        msg = f"Nothing of {listed(names)} is trained: expected parameters that get gradients, got none."
        raise OptionsError(msg)
    own = {id(parameter) for parameter in added}
    others = [
        fqn
        for fqn, parameter in edited.model.named_parameters()
        if parameter.requires_grad and id(parameter) not in own
    ]
    if others:
        msg = (
            f"Parameters {listed(others)} would be trained, and no record keeps them: expected those "
            f"of {listed(names)} alone. Freeze them."
        )
        raise OptionsError(msg)
    gates = [
        fqn for name in names for fqn in edited.tensors(name) if is_gate(fqn, settings.gate_pattern)
    ]
    said = {"gate_learning_rate", "gate_pattern"} & settings.model_fields_set
    if said and not gates:
        known = [fqn.rpartition(".")[2] for name in names for fqn in edited.tensors(name)]
        msg = (
            f"Pattern {settings.gate_pattern!r} matches no gate: expected one among "
            f"{listed(dict.fromkeys(known))}. Fix it, or leave out {listed(sorted(said))}."
        )
        raise OptionsError(msg)
    if settings.gradient_checkpointing and not accepts_checkpointing(edited.model):
        msg = (
            f"Model {type(edited.model).__name__} cannot compute layers again: expected one of "
            "transformers that can. Leave out gradient_checkpointing."
        )
        raise OptionsError(msg)


def _kept(trainer: AdapterTrainer, folder: RunFolder, num_truncated: int) -> Outcome:
    """Put the values that are to be kept in place."""
    history = trainer.history
    kept = int(trainer.state.global_step)
    if trainer.settings.keep == "best" and trainer.best is not None and history.best is not None:
        kept = history.best[0]
        for name, tensors in trainer.best.items():
            trainer.edited.load_(name, tensors)
    return Outcome(
        folder=folder.path,
        trained=trainer.names,
        num_parameters=sum(p.numel() for p in trainer.edited.added_parameters(trainer.names)),
        steps=int(trainer.state.global_step),
        kept=kept,
        history=history,
        num_truncated=num_truncated,
        is_first_process=trainer.is_world_process_zero(),
    )


def _save(
    session: Session,
    edited: EditedModel,
    target: Target,
    name: str,
    folder: RunFolder,
    *,
    is_cast: bool,
) -> None:
    """Write the record; it is of the model as it is saved, whatever it was cast to meanwhile."""
    if not is_cast:
        session.save(edited, folder.path)
        return
    staging = folder.checkpoints / ".final"
    session.save(edited, staging)
    fresh = target.load(session, name, weights=True)
    again = session.load(fresh, staging, on_other_model="rematch")
    session.save(again, folder.path)
    shutil.rmtree(staging)


def _report(
    identity: Mapping[str, Any],
    name: str,
    settings: TrainingSettings,
    tokenizer: str,
    outcome: Outcome,
) -> Mapping[str, Any]:
    packages = ("surgery-core", "surgery-training", "torch", "transformers", "accelerate")
    return {
        "model": name,
        "adapter": identity["adapter"],
        "trained": list(outcome.trained),
        "parameters": outcome.num_parameters,
        "settings": settings.model_dump(mode="json"),
        "tokenizer": tokenizer,
        "data": {
            key: {"path": path, "sha256": digest(path)}
            for key, path in settings.data.model_dump().items()
            if path is not None
        },
        "truncated": outcome.num_truncated,
        "identity": dict(identity),
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
        "steps": outcome.steps,
        "kept_step": outcome.kept,
        **asdict(outcome.history),
    }
