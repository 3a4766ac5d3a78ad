"""The way in: a session knows its plugins, and plans for a model what rules or a recipe ask for."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import nn

from surgery_core.adapter_plan import AdapterPlan
from surgery_core.conditions import require_kind
from surgery_core.editing import EditedModel, ModelPlan
from surgery_core.environment import as_written, hidden, put_in
from surgery_core.errors import ContractError, OptionsError, SurgeryError, listed
from surgery_core.operation import BoundRule, Rule, Saved
from surgery_core.plan import check_beneath, check_covered
from surgery_core.plugins import Plugins
from surgery_core.preflight import check_preflight
from surgery_core.recipe import AdapterRecipe, ModelRecipe, Recipe
from surgery_core.record import BaseCheck, read_record, rematch, replay, save_record
from surgery_core.sharded import reshard_
from surgery_core.sources import load_source
from surgery_core.surgery import Plan, Surgery
from surgery_core.swap import SwapState

OnOtherModel = Literal["error", "rematch"]
"""What to do with a record of a model with other modules or dtypes."""


class Session:
    """Plan and apply surgeries with the operations of some plugins.

    Sessions share nothing: each has its own plugin manager.

    Args:
        plugins: Modules or objects with hook implementations.
        discover: Also load installed plugins, from the entry-point group `surgery_core`.
        allow_code: Models may be made by code that recipes and records name, as a source
            `package.module:factory`; otherwise that is an error.

    Raises:
        PluginError: A plugin passed breaks the contract. A broken one that was discovered does
            not raise; see `plugins.broken`.

    Example:
        >>> Session(discover=False).plugins.infos
        ()
    """

    def __init__(
        self,
        plugins: Iterable[object] = (),
        *,
        discover: bool = True,
        allow_code: bool = False,
    ) -> None:
        if not isinstance(plugins, Iterable) or isinstance(plugins, str):
            kind = type(plugins).__name__
            msg = f"Plugins must be a list of modules or objects, got {kind}. Put it in a list."
            raise OptionsError(msg)
        self.plugins = Plugins(plugins, discover=discover)
        self.allow_code = allow_code

    def load_model(
        self, recipe: Recipe, name: str | None = None, *, weights: bool = True
    ) -> nn.Module:
        """Load the model that a recipe is for.

        Args:
            recipe: Says where the model is.
            name: Which model; may be left out where there is one.
            weights: With them; otherwise the model may be on the meta device.

        Raises:
            OptionsError: The recipe names no source, or one that nobody knows; or a factory, and the
                session does not allow code.
        """
        (_, name) = _place(recipe, name)
        source = recipe.source(name)
        asked_by = None if self.allow_code else recipe.where("models", name, "source")
        with hidden(source):
            found = recipe.resolved(source)
            return load_source(self.plugins, found, weights=weights, asked_by=asked_by)

    def plan(
        self, model: nn.Module, rules: Sequence[Rule], *, beneath: SwapState | None = None
    ) -> Plan:
        """Work out what the rules would change; the model is not touched.

        Args:
            model: The model to plan for.
            rules: In order; at least one.
            beneath: Plan as if the active variant of this swap state were not in the model.

        Raises:
            UnknownOperationError: A rule names an operation no plugin offers.
            OptionsError: There are no rules, or an operation refuses its options.
            NoMatchError: A rule, or an exclusion, matches nothing.
            ConflictError: Two claims overlap.
            ContractError: A module does not suit its operation.
            PreflightError: The model is wrapped in something that keeps it from being worked on.
        """
        _require_model(model)
        require_kind(rules, (list, tuple), what="Rules", fix="Give a list of Rule.")
        for rule in rules:
            require_kind(rule, Rule, what="Each rule", fix="Make it with Rule(operation=...).")
        if not rules:
            msg = "Rules are empty: expected at least one rule. Name an operation."
            raise OptionsError(msg)
        check_preflight(self.plugins.preflight(model))
        originals = beneath.originals() if beneath is not None else None
        return self._draft(model, self._bound(rules), originals=originals)

    def plan_recipe(
        self, model: nn.Module, recipe: Recipe | ModelRecipe, name: str | None = None
    ) -> ModelPlan:
        """Work out what a model's part of a recipe would change; the model is not touched.

        Args:
            model: The model to plan for.
            recipe: The recipe, or the part of it.
            name: Which part; may be left out where there is one.

        Raises:
            SurgeryError: See `plan`; a note on the error says where in the recipe it comes from.
            ConflictError: An adapter is for a module that a rule changes too, or for one inside.
            OptionsError: The recipe has several models, or none of that name.
        """
        _require_model(model)
        fix = "Use ModelRecipe.model_validate for a mapping."
        require_kind(recipe, (Recipe, ModelRecipe), what="Recipe", fix=fix)
        whole = recipe if isinstance(recipe, Recipe) else Recipe(models={"model": recipe})
        place = _place(whole, name)
        part = whole.models[place[-1]]
        with hidden(part.model_dump(exclude_defaults=True)):
            return self._planned(model, whole, part, place)

    def _planned(
        self, model: nn.Module, whole: Recipe, part: ModelRecipe, place: tuple[str, str]
    ) -> ModelPlan:
        check_preflight(self.plugins.preflight(model))
        bound: list[BoundRule] = []
        for number, rule in enumerate(part.rules):
            with _noted(whole.where(*place, "rules", number)):
                bound += self._bound([rule.rule()])
        with _noted(whole.where(*place, "rules")):
            rules = (tuple(bound), self._draft(model, bound)) if bound else None
        adapters, complete = {}, {}
        for adapter_name, adapter in part.adapters.items():
            with _noted(whole.where(*place, "adapters", adapter_name)):
                saved = self._saved(adapter, whole, model)
                given = dict(saved.options) if saved is not None else {}
                own = tuple(self._bound([r.rule(defaults=given) for r in adapter.all_rules]))
                plan = self._draft(model, own)
                if saved is not None:
                    subject = f"Tensors do not fit {adapter_name!r}"
                    check_covered(plan.claims, saved.state, subject=subject)
                if rules is not None:
                    # An adapter may contain what a rule changes, but not be part of it.
                    check_beneath(rules[1].claims, plan.claims)
            adapters[adapter_name] = AdapterPlan(rules=own, plan=plan, saved=saved)
            options = {**as_written(given), **adapter.options}
            complete[adapter_name] = adapter.model_copy(update={"options": options})
        source = whole.recorded(part.source) if part.source is not None else None
        complete_part = part.model_copy(update={"adapters": complete, "source": source})
        return ModelPlan(model, complete_part, rules, adapters)

    def save(self, edited: EditedModel, folder: str | os.PathLike[str]) -> None:
        """Write a record of an applied recipe; see `save_record`."""
        _require_edited(edited)
        names = self.plugins.operations
        save_record(edited, folder, operations={name: self.plugins.owner(name) for name in names})

    def load(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str],
        *,
        base_check: BaseCheck = "warn",
        on_other_model: OnOtherModel = "error",
    ) -> EditedModel:
        """Do what a record says, with its tensors.

        Args:
            model: As the recorded one was before.
            folder: That `save` wrote.
            base_check: What to do if the model's values are others.
            on_other_model: `"rematch"` for a model with other modules or dtypes.

        Raises:
            RecordError: The record is damaged, or of another model.
            SurgeryError: See `replay` and `rematch`; the model is unchanged.
        """
        _require_model(model)
        record = read_record(folder)
        if on_other_model == "rematch":
            return rematch(model, record, self.plan_recipe)
        return replay(model, record, self.plan_recipe, base_check=base_check)

    @contextmanager
    def applied(self, model: nn.Module, rules: Sequence[Rule]) -> Iterator[Surgery]:
        """Apply the rules for a while, and revert at the end, also after an error.

        Raises:
            SurgeryError: See `plan`, `Plan.apply` and `Surgery.revert`.
        """
        surgery = self.plan(model, rules).apply()
        try:
            yield surgery
        finally:
            if surgery.is_applied:
                surgery.revert()

    def _draft(
        self,
        model: nn.Module,
        bound: Sequence[BoundRule],
        *,
        originals: Mapping[int, nn.Module] | None = None,
    ) -> Plan:
        return Plan.draft(
            model,
            bound,
            originals=originals,
            on_applied=self.plugins.notify_applied,
            on_reverted=self.plugins.notify_reverted,
        )

    def _bound(self, rules: Sequence[Rule]) -> list[BoundRule]:
        return [
            BoundRule(rule=rule, operation=self.plugins.operation(rule.operation)) for rule in rules
        ]

    def export(self, edited: EditedModel, name: str, folder: str | os.PathLike[str]) -> None:
        """Write an adapter in the format of its operation, for other programs.

        Args:
            edited: The model, with the recipe applied.
            name: Of the adapter.
            folder: Made if it is not there.

        Raises:
            VariantError: There is no such adapter.
            DriftError: A module that was put in place is not there.
            ContractError: The operation has no format of its own, or the adapter has several rules.
            SurgeryError: The adapter cannot be said in that format; nothing was written.
        """
        _require_edited(edited)
        edited.check_in_place()
        reshard_(edited.model)
        modules = edited.variant(name)
        (rule, *others) = edited.plan.adapters[name].rules
        if others:
            msg = (
                f"Adapter {name!r} has several rules: expected one to be exported. Keep the record."
            )
            raise ContractError(msg, fqn="", expected=1, actual=1 + len(others))
        with hidden(edited.plan.recipe.adapters[name].options):
            rule.operation.write_saved(os.fspath(folder), rule.rule.options, modules)

    def _saved(self, adapter: AdapterRecipe, recipe: Recipe, model: nn.Module) -> Saved | None:
        """Read what was saved of an adapter, if it has a source."""
        if adapter.source is None or adapter.operation is None:
            return None
        source = recipe.resolved(adapter.source)
        operation = self.plugins.operation(adapter.operation)
        saved = operation.read_saved(source, model, put_in(adapter.options))
        if saved is None:
            msg = (
                f"Operation {adapter.operation!r} cannot read {source!r}: expected a saved adapter "
                "in a format it knows. Fix the path."
            )
            raise OptionsError(msg)
        return saved


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base_check: BaseCheck = "warn",
    on_other_model: OnOtherModel = "error",
) -> EditedModel:
    """Do what a record says, with the plugins that are installed; see `Session.load`.

    Args:
        model: As the recorded one was before.
        folder: That `Session.save` wrote.
        base_check: What to do if the model's values are others.
        on_other_model: `"rematch"` for a model with other modules or dtypes.

    Raises:
        SurgeryError: See `Session.load`; the model is unchanged.
    """
    session = Session()
    return session.load(model, folder, base_check=base_check, on_other_model=on_other_model)


def _require_model(model: object) -> None:
    require_kind(model, nn.Module, what="Model", fix="Give the model itself.")


def _require_edited(edited: object) -> None:
    fix = "Give what ModelPlan.apply or Session.load returned."
    require_kind(edited, EditedModel, what="Edited model", fix=fix)


def _place(recipe: Recipe, name: str | None) -> tuple[str, str]:
    """Return where a model's part of a recipe stands."""
    if name is None and len(recipe.models) == 1:
        return "models", next(iter(recipe.models))
    if name not in recipe.models:
        msg = (
            f"Recipe has no model {name!r}: expected one of {listed(recipe.models)}. Name the one "
            "that is meant."
        )
        raise OptionsError(msg)
    return "models", name


@contextmanager
def _noted(where: str) -> Iterator[None]:
    """Say with an error where in the recipe it comes from."""
    try:
        yield
    except SurgeryError as err:
        err.add_note(where)
        raise
