"""What commands do with each model: load, plan, apply, verify and save it, with progress shown."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery_core.cli_inputs import Target
from surgery_core.cli_output import progress
from surgery_core.editing import EditedModel, ModelPlan
from surgery_core.environment import hidden
from surgery_core.model_document import ModelDocument
from surgery_core.session import Session
from surgery_core.slots import Slot
from surgery_core.verify import DEFAULT_TIERS, Tier, Verification
from surgery_core.verify import verify as verify_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What `surgery apply` tells of one model, without holding on to it."""

    folder: Path | None
    document: ModelDocument
    trainable: int
    outcome: Verification | None

    def to_mapping(self) -> dict[str, Any]:
        """Return plain mappings, lists and scalars."""
        return {
            "record": None if self.folder is None else str(self.folder),
            "trainable": self.trainable,
            "plan": self.document.to_mapping(),
            "verification": None if self.outcome is None else self.outcome.to_mapping(),
        }


def plan_all(session: Session, target: Target) -> tuple[dict[str, str], dict[str, ModelDocument]]:
    """Return titles and plans of the models of a recipe, by their names."""
    names = list(target.recipe.models)
    plans = {name: _plan(session, target, name, weights=False).document for name in names}
    return {name: f"{name} ({target.shown(name)})" for name in names}, plans


def _plan(session: Session, target: Target, name: str, *, weights: bool) -> ModelPlan:
    with progress(f"Loading {name}"):
        model = target.load(session, name, weights=weights)
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


def edited_model(session: Session, target: Target, name: str) -> EditedModel:
    """Load a model, and apply its part of a recipe, or its record."""
    if name not in target.records:
        return _apply(name, _plan(session, target, name, weights=True))
    with progress(f"Loading {name}"):
        model = target.load(session, name, weights=True)
        return session.load(model, target.records[name].folder)


def verify_edited(session: Session, edited: EditedModel, tiers: tuple[Tier, ...]) -> Verification:
    """Verify a model with inputs that a plugin knows."""
    used = edited.plan.recipe.model_dump(exclude_defaults=True)
    with progress("Verifying"), hidden(used):
        return verify_model(edited, session.plugins.probe_inputs(edited.model), tiers=tiers)


def apply_and_save(
    session: Session, target: Target, name: str, folder: Path, *, check: bool
) -> Applied:
    """Apply a model's part of a recipe, and save it unless it fails to be verified."""
    edited = _apply(name, _plan(session, target, name, weights=True))
    outcome = verify_edited(session, edited, DEFAULT_TIERS) if check else None
    is_saved = outcome is None or outcome.is_ok
    if is_saved:
        with progress(f"Saving {name}"):
            session.save(edited, folder)
    return Applied(
        folder=folder if is_saved else None,
        document=edited.plan.document,
        trainable=sum(parameter.numel() for parameter in edited.added_parameters()),
        outcome=outcome,
    )
