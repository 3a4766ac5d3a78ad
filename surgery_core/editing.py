"""One model of a recipe: planned with all its adapters, applied as a whole, switched, taken back."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any, Self

import torch
from torch import nn

from surgery_core.adapter_plan import AdapterPlan
from surgery_core.choices import require_names, weights_of
from surgery_core.composing import compose_all
from surgery_core.conditions import require_changeable, require_in_place
from surgery_core.environment import hidden
from surgery_core.errors import OptionsError, VariantError, listed
from surgery_core.model_document import RULES, Choice, ModelDocument, names_in
from surgery_core.operation import BASE, BoundRule, Operation
from surgery_core.optimizers import OptimizerGroup
from surgery_core.recipe import ModelRecipe
from surgery_core.selection import Selection, select
from surgery_core.sharded import reshard_
from surgery_core.sharing import Contexts, Sharing
from surgery_core.slots import Slot
from surgery_core.snapshots import Snapshot, snapshot
from surgery_core.surgery import Plan, Surgery
from surgery_core.swap import SwapState
from surgery_core.tensors import load_tensors_, owned_tensors
from surgery_core.transaction import OnWrite, Transaction, parameter_places

_COMPOSITIONS = ("composition/1", "composition/2")
"""Variants made of adapters: one may be taken while the next is made. Adapters' names have no `/`."""


class ModelPlan:
    """A model's part of a recipe, planned: nothing has been changed yet.

    Made by `Session.plan_recipe`. Adapters may be for the same modules, since one at a time is in the
    model. Rules may be for modules inside those of adapters, but not for the very same.

    Args:
        model: The model planned for.
        recipe: What was asked for, with the options that sources gave.
        rules: Plan of the rules; None where there are none.
        adapters: Plans of the adapters by name.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: ModelRecipe,
        rules: tuple[tuple[BoundRule, ...], Plan] | None,
        adapters: Mapping[str, AdapterPlan],
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.rules = rules
        self.adapters = dict(adapters)

    @property
    def document(self) -> ModelDocument:
        """The plan as data."""
        return ModelDocument(
            rules=self.rules[1].document if self.rules is not None else None,
            adapters={name: found.plan.document for name, found in self.adapters.items()},
            active=self.recipe.selected,
        )

    def apply(self, *, on_write: OnWrite | None = None) -> "EditedModel":
        """Apply the rules, add every adapter and activate what is to be active, or change nothing.

        Args:
            on_write: Told of every write before it happens; an error it raises takes all back.

        Raises:
            DriftError: The model changed since the plan was made.
            ContractError: A replacement does not keep what its operation declared, or adapters
                cannot be active together.
            StateError: What was saved of an adapter does not fit.
        """
        numbers = count()

        def on_any_write(_: int, target: Slot | nn.Parameter) -> None:
            # Several transactions, each of which counts from 0.
            if on_write is not None:
                on_write(next(numbers), target)

        edited = EditedModel(self)
        try:
            with hidden(self.recipe.model_dump(exclude_defaults=True)):
                edited.enter(on_any_write)
        except BaseException:
            edited.take_back()
            raise
        return edited


class EditedModel:
    """A model with a recipe applied: its adapters can be switched, and all of it taken back.

    Invariant: after `revert` the model has the very objects it had before, and its parameters the
    flags they had. Of a copy or pickle no thread, optimizer or plugin knows.

    Args:
        plan: What to do.

    Attributes:
        before: What the model was before; None in a copy, whose model was never without the recipe.
        loaded: Adapters, and `rules`, whose values are not their first.
    """

    def __init__(self, plan: ModelPlan) -> None:
        self.plan = plan
        self.surgery: Surgery | None = None
        self.swap_state = SwapState(plan.model)
        self.sharing = Sharing(self.swap_state)
        self.is_applied = False
        self.before: Snapshot | None = None
        self.loaded: set[str] = set()
        self._freezing = Transaction()
        self._compositions: dict[str, dict[str, float]] = {}
        self._groups: list[OptimizerGroup] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "sharing": None, "before": None, "_groups": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.sharing = Sharing(self.swap_state)
        # What a context put there, which is not open here.
        self.swap_state.underlay({})
        for name in self.swap_state.names:
            self.sharing.attach(self.swap_state.variant(name).values())

    @property
    def model(self) -> nn.Module:
        """The model, or what rules have put in its place."""
        return self.plan.model if self.surgery is None else self.surgery.model

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters, sorted."""
        return tuple(sorted(self.plan.adapters))

    @property
    def active(self) -> Choice | None:
        """The selected adapter, or several with their weights; None without adapters."""
        selected = self.swap_state.selected
        weights = self._compositions.get(selected or "")
        return selected if weights is None else dict(weights)

    def enter(self, on_write: OnWrite) -> None:
        """Do what the plan says; `ModelPlan.apply` calls it, and takes all back if it fails.

        Args:
            on_write: Told of every write before it happens.
        """
        plan = self.plan
        self.before = snapshot(plan.model, values=False)
        own, places = list(plan.model.parameters()), parameter_places(plan.model)
        if plan.rules is not None:
            # With adapters, the model they are for must stay where it is.
            self.surgery = plan.rules[1].apply(on_write=on_write, in_place=bool(plan.adapters))
        for name, adapter in plan.adapters.items():
            is_first = self.surgery is None
            self.swap_state.add(name, adapter.plan if is_first else adapter.again(name, plan.model))
            self._share(name)
            if adapter.saved is not None:
                self.load_(name, adapter.saved.state)
        self._freezing = Transaction(on_write=on_write)
        if plan.recipe.freeze:
            for p in own:
                self._freezing.set_requires_grad(p, value=False, places=places[id(p)])
        self.is_applied = True
        self.swap_state.on_write = on_write
        if plan.recipe.selected is not None:
            self.set_active(plan.recipe.selected)
        self.swap_state.on_write = None

    def set_active(self, choice: Choice) -> None:
        """Make an adapter the active one, or several with weights.

        Raises:
            VariantError: There is no such adapter.
            OptionsError: The choice is neither a name nor names with weights.
            ContractError: They cannot be active together.
            DriftError: A place holds something else than was put there.
        """
        with self.sharing.lock:
            self._set_active(choice)

    def _set_active(self, choice: Choice) -> None:
        self.check_in_place()
        if isinstance(choice, str):
            self._require(choice)
            if self.sharing.is_in_use:
                self.sharing.require_shareable(choice)
            self.swap_state.set(choice)
            self._drop_compositions()
            return
        weights = weights_of(choice)
        if not weights:
            msg = "No adapter is named: got no weights. Name one, or use disabled() for the base."
            raise OptionsError(msg)
        require_names(weights, self.plan.adapters)
        # One may be left of a call that was interrupted.
        self._drop_compositions(but=self.swap_state.selected)
        rules, loans = compose_all(weights, {name: self._made(name) for name in weights})
        name = next(name for name in _COMPOSITIONS if name not in self.swap_state.names)
        plan = Plan.draft(self.plan.model, rules, originals=self.swap_state.originals())
        self._compositions = {**self._compositions, name: weights}
        self.swap_state.add(name, plan, loans=loans)
        try:
            self._share(name)
            self.swap_state.set(name)
        except BaseException:
            if self.swap_state.selected != name:
                self.swap_state.delete(name)
            raise
        self._drop_compositions(but=name)

    @contextmanager
    def activated(self, choice: Choice | Sequence[Choice]) -> Iterator[Self]:
        """Use adapters in this thread or asyncio task only.

        Disabling wins: while the adapters are disabled, by whatever thread, the base computes here
        too. No other thread inherits the block, as those of executors, `DataParallel` or
        `generate_batch`: while it is open they are refused, until they enter one themselves. The main
        thread goes on with the active adapter, and so does other code of this thread.

        Args:
            choice: An adapter's name, several with weights, or `"__base__"` for none; or a list with
                one of them for each row of the batch. A batch of n times as many rows gives each to
                n rows in succession, as beam search lays them out.

        Raises:
            VariantError: There is no such adapter; or, in the pass of another thread, that thread has
                not entered `activated`.
            OptionsError: There are no rows, or a weight is not finite.
            ContractError: An adapter, or the active one, cannot be used beside others.
        """
        is_one = isinstance(choice, str | Mapping) or not isinstance(choice, Sequence)
        with self.sharing.using(lambda: self._select([choice] if is_one else choice)):  # type: ignore[arg-type,list-item]  # looked at there
            yield self

    def recompute_contexts(self) -> Contexts:
        """Return contexts for a checkpointed forward, and for doing it again with the same adapters.

        What `torch.utils.checkpoint` takes as `context_fn`.
        """
        return self.sharing.recompute_contexts(self._choice, self.activated)

    def _choice(self) -> Choice:
        """Return what is in the model now."""
        return (self.active if self.swap_state.is_enabled else None) or BASE

    def _select(self, choices: Sequence[Choice]) -> Selection:
        self.check_in_place()
        weights = [weights_of(choice) for choice in choices]
        names = {name for found in weights for name in found}
        require_names(names, self.plan.adapters)
        return select(weights, {name: self._made(name) for name in names})

    def _made(self, name: str) -> dict[str, tuple[Operation[Any], nn.Module]]:
        """Return the modules of an adapter by FQN, each with the operation that made it."""
        operations = {c.site.fqn: c.operation for c in self.plan.adapters[name].plan.claims}
        modules = self.swap_state.caught_up(name)
        return {fqn: (operations[fqn], module) for fqn, module in modules.items()}

    def _share(self, name: str) -> None:
        """Let the modules of a variant be asked for what threads use, if they can be."""
        if self.sharing.is_in_use:
            self.sharing.require_shareable(name)
        self.sharing.attach(self.swap_state.variant(name).values())

    def _drop_compositions(self, *, but: str | None = None) -> None:
        for name in _COMPOSITIONS:
            if name != but and name in self.swap_state.names:
                self.swap_state.delete(name)

    @contextmanager
    def disabled(self) -> Iterator[Self]:
        """Take the active adapter out for a while; rules stay applied.

        This is for the whole model, as in PEFT, and wins over `activated`: rows and other threads get
        the base too, until the last such block ends. A pass that another thread has begun may be
        computed in part without its adapter.

        Raises:
            ContractError: What is active is merged into the base's weights; or, at the end, some code
                uses others by then, beside which the active one cannot be, and it stays out.
        """
        self._require_unmerged("Adapters cannot be disabled")
        with self.sharing.disabled(self._enable):
            yield self

    def _enable(self) -> None:
        if self.sharing.is_in_use:
            self.sharing.require_shareable(self.swap_state.selected)
        self.sharing.enable()

    @contextmanager
    def paused(self, *, for_all: bool = True) -> Iterator[nn.Module]:
        """Have the model as it was before the recipe for a while; then the same objects again.

        Args:
            for_all: Have the base compute inside `activated` too, as `disabled` does.

        Raises:
            DriftError: Somebody replaced a module that was put in place.
            VariantError: It has been reverted already.
            ContractError: Something is merged into the base's weights.
        """
        self._require_applied()
        self._require_unmerged("Model cannot be had as it was before")
        paused = nullcontext() if self.surgery is None else self.surgery.paused()
        with self.sharing.disabled(self._enable, for_all=for_all), paused:
            reshard_(self.plan.model)
            self._freezing.undo(subject="Model", fix="")
            try:
                yield self.plan.model
            finally:
                self._freezing.redo()

    def variant(self, name: str) -> dict[str, nn.Module]:
        """Return the modules of an adapter by FQN, wherever they are now.

        Raises:
            VariantError: There is no such adapter.
        """
        self._require(name)
        with self.sharing.lock:
            return self.swap_state.variant(name)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors that an adapter brought, or, for `rules`, the rules did.

        Args:
            name: Of an adapter, or `rules`.

        Returns:
            By `fqn.name`, not copied; nothing that the base has too. What `fully_shard` sharded is
            so here; `whole_tensors` gathers it.

        Raises:
            VariantError: There is no such adapter.
        """
        reshard_(self.model)
        if name != RULES or self.surgery is None:
            self._require(name)
        return {
            f"{fqn}.{key}" if fqn else key: tensor
            for fqn, (before, after) in self._pairs(name).items()
            for key, tensor in owned_tensors(before, after).items()
        }

    def load_(self, name: str, state: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors into those of an adapter, or of the rules, all or none of them.

        Args:
            name: Of an adapter, or `rules`.
            state: By `fqn.name`, exactly those of `tensors(name)`, whole; dtype, device and sharding
                of those stay.

        Raises:
            VariantError: There is no such adapter.
            StateError: Keys are missing or unexpected, a shape differs, or a value is not finite.
            ContractError: It is merged into the weights of layers, which would stay as they are.
        """
        with self.sharing.lock:
            tensors = self.tensors(name)
            self._require_unmerged(f"Tensors of {name!r} cannot be loaded", name)
            load_tensors_(
                tensors,
                state,
                subject=f"Tensors do not fit {name!r}",
                fix="Use the options and the model that they were saved with.",
                beside=self.model.parameters(),
            )
            self.loaded.add(name)

    def _require_unmerged(self, what: str, *names: str) -> None:
        """Refuse what cannot be done while the adapters named are merged; if none, what is placed."""
        selected = self.swap_state.selected
        if not names or not {*names}.isdisjoint({RULES, *names_in(self.active)}):
            names = (*names, RULES, *([] if selected is None else [selected]))
        for name in names:
            require_changeable({f: after for f, (_, after) in self._pairs(name).items()}, what=what)

    def _pairs(self, name: str) -> dict[str, tuple[nn.Module, nn.Module]]:
        """Return what was there before, and what is there with an adapter or the rules, by FQN."""
        if name == RULES:
            placed = self.surgery.replacements if self.surgery is not None else ()
            return {item.site.fqn: (item.site.module, item.module) for item in placed}
        sites = self.swap_state.sites
        with self.sharing.lock:
            variant = self.swap_state.variant(name)
        return {fqn: (sites[fqn].module, module) for fqn, module in variant.items()}

    def added_parameters(self, names: Sequence[str] | None = None) -> list[nn.Parameter]:
        """Return the parameters to train: those that were brought, and get gradients.

        Args:
            names: Adapters, or `rules`; None means all there is.

        Raises:
            VariantError: There is no such adapter.
        """
        names = [names] if isinstance(names, str) else names
        if names is None:
            names = [*([RULES] if self.surgery is not None else []), *self.plan.adapters]
        found = {
            id(tensor): tensor
            for name in names
            for tensor in self.tensors(name).values()
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad
        }
        return list(found.values())

    def add_to_optimizer(
        self,
        optimizer: torch.optim.Optimizer,
        names: Sequence[str] | None = None,
        **options: Any,  # noqa: ANN401 (of the optimizer's groups)
    ) -> None:
        """Give what is trained to an optimizer as a group, until `revert`.

        Args:
            optimizer: Has other parameters already, perhaps.
            names: See `added_parameters`.
            **options: Of the group, such as `lr`.

        Raises:
            OptionsError: The optimizer has some of them, there are none, or a scheduler was made
                for it, which knows the groups there were.
        """
        self._groups.append(OptimizerGroup.add(optimizer, self.added_parameters(names), options))

    def revert(self) -> nn.Module:
        """Take all of it back, optimizer groups included, or change nothing and raise.

        Returns:
            The model as it was planned for.

        Raises:
            DriftError: Somebody replaced a module that was put in place.
            VariantError: It has been reverted already, or a thread uses an adapter.
        """
        with self.sharing.lock:
            self._require_applied()
            self.sharing.require_unused(self.adapters)
            was_active = self.swap_state.active is not None
            self.swap_state.disable()
            # Reverted already if an earlier call was interrupted.
            if self.surgery is not None and self.surgery.is_applied:
                try:
                    self.surgery.revert()
                except BaseException:
                    if was_active:
                        self.swap_state.enable()
                    raise
            self.take_back()
        return self.plan.model

    def take_back(self) -> None:
        """Take back what there is; for `revert`, and after a failed `enter`."""
        self.swap_state.on_write = None
        self.swap_state.disable()
        # What a context could not take out when it ended.
        self.swap_state.underlay({})
        self._drop_compositions()
        for name in self.swap_state.names:
            self.swap_state.delete(name)
        if self.surgery is not None and self.surgery.is_applied:
            self.surgery.revert()
        reshard_(self.plan.model)
        self._freezing.rollback()
        while self._groups:
            self._groups.pop().remove()
        self.is_applied = False

    def check_in_place(self) -> None:
        """Refuse a model that is reverted, or in which a module was exchanged.

        Raises:
            VariantError: It is reverted.
            DriftError: A module that was put in place is not there; all places are named.
        """
        self._require_applied()
        require_in_place(self.swap_state, () if self.surgery is None else self.surgery.replacements)

    def _require(self, name: str) -> None:
        if not isinstance(name, str) or name not in self.plan.adapters:
            msg = f"Adapter {name!r} does not exist: expected one of {listed(self.adapters)}."
            raise VariantError(msg)

    def _require_applied(self) -> None:
        if not self.is_applied:
            msg = "Recipe is reverted already: expected an applied one. Apply a plan again."
            raise VariantError(msg)
