"""A plain model of many adapters over one base, and what fresh models compute with them."""

import copy
from dataclasses import dataclass, field

import torch
from surgery_adaption_prompt import AdaptionPromptModel, Composition, adapter_state, load_state_

from surgery_core import VariantError

BASE = "__base__"
LIMITS = {torch.float32: 1e-6, torch.float64: 1e-13}
"""Relative to the largest value, where the same is summed in another order."""


def weights_of(choice):
    """Return the weights of the adapters a choice stands for."""
    if choice is None or choice == BASE:
        return {}
    return {choice: 1.0} if isinstance(choice, str) else dict(choice.weights)


def names_of(choices):
    """Return the names of adapters in choices, sorted."""
    return sorted({name for choice in choices for name in weights_of(choice)})


@dataclass(frozen=True, eq=False)
class Tensors:
    """What an adapter is; replaced, never changed."""

    config: object
    state: dict

    @property
    def dtype(self):
        return next(iter(self.state.values())).dtype

    @property
    def fqns(self):
        return {key.rpartition(".")[0] for key in self.state}

    @classmethod
    def of(cls, config, modules):
        return cls(config, {key: tensor.clone() for key, tensor in adapter_state(modules).items()})

    def cast(self, dtype):
        return Tensors(self.config, {key: tensor.to(dtype) for key, tensor in self.state.items()})

    def multiplied(self, key, factor):
        """Return it with one tensor multiplied."""
        return Tensors(self.config, {**self.state, key: self.state[key] * factor})


@dataclass
class Adapter:
    """Where an adapter should be: its tensors, and the base's dtype when it last followed it."""

    tensors: Tensors
    base_dtype: torch.dtype
    is_trainable: bool = True
    modules: dict | None = None

    def cast(self, dtype):
        if self.tensors.dtype is not dtype:
            self.tensors = self.tensors.cast(dtype)
        self.base_dtype = dtype


@dataclass(frozen=True)
class View:
    """What some code should get: one choice for the whole batch, or one for each row.

    Args:
        choices: One for each row, or a single one.
        tensors: Of the adapters in them, by name.
        is_exact: Nothing is computed in another order than by a model that knows nothing else.
        dtype: The narrowest in which anything of it was ever computed.
    """

    choices: tuple
    tensors: dict
    is_exact: bool
    dtype: torch.dtype


class FreshModels:
    """Models that have only ever had the adapters in question.

    Args:
        pristine: The base by dtype.
        ids: Their input.
    """

    def __init__(self, pristine, ids):
        self._pristine = pristine
        self._ids = ids
        self._known = {}
        with torch.no_grad():
            self.base = {dtype: model(ids).logits for dtype, model in pristine.items()}

    def build(self, dtype, tensors, choice):
        """Return a model with adapters and one of them, or a composition, active."""
        configs = {name: found.config for name, found in tensors.items()}
        model = AdaptionPromptModel(
            copy.deepcopy(self._pristine[dtype]), configs, next(iter(configs))
        )
        for name, found in tensors.items():
            modules = model.adapter_modules(name)
            for module in modules.values():
                module.adaption_prompt.data = module.adaption_prompt.data.to(found.dtype)
                module.adaption_gate.data = module.adaption_gate.data.to(found.dtype)
            load_state_(modules, found.state)
        if choice is not None and choice != BASE:
            model.set_adapter(choice)
        return model

    def logits(self, dtype, tensors, choice):
        """Return what a fresh model computes with a choice."""
        names = list(weights_of(choice))
        if not names:
            return self.base[dtype]
        key = (dtype, choice, *(tensors[name] for name in names))
        if key not in self._known:
            if len(self._known) > 500:
                self._known.clear()
            model = self.build(dtype, {name: tensors[name] for name in names}, choice)
            with torch.no_grad():
                self._known[key] = model(self._ids).logits
        return self._known[key]

    def check(self, view, dtype, actual):
        """Check logits of a batch: to the bit where that can be, and base rows always."""
        limit = LIMITS[view.dtype]
        for row in range(len(self._ids)):
            choice = view.choices[row % len(view.choices)]
            expected = self.logits(dtype, view.tensors, choice)
            if view.is_exact or not weights_of(choice):
                assert torch.equal(expected[row], actual[row]), choice
            else:
                error = (expected[row] - actual[row]).abs().max() / expected.abs().max()
                assert error <= limit, (choice, error)


@dataclass
class OpenRows:
    """Buffers for rows that are open: what was active before, and what there is room for."""

    before: object
    fqns: set
    length: int
    max_rows: int
    names: tuple = ()
    is_in_force: bool = True


@dataclass
class PlainAdapters:
    """Which adapters there are, what is active, and what each thread uses.

    Args:
        store: A `PlainStore`.
        on_disk: Tensors of the adapters in its folder, by name.
        stacks: For each thread the choices of its contexts, the innermost last.
    """

    store: object
    on_disk: dict
    stacks: list
    dtype: torch.dtype = torch.float32
    known: dict = field(default_factory=dict)
    selected: object = None
    kind: str = "plain"
    is_enabled: bool = True
    rows: OpenRows | None = None

    @property
    def variant(self):
        """The name of the one adapter that is selected as it is, or None."""
        return self.selected if self.kind == "plain" and isinstance(self.selected, str) else None

    @property
    def active(self):
        """Names of adapters whose parameters are in the model."""
        return weights_of(self.selected) if self.is_enabled and self.kind == "plain" else {}

    @property
    def used(self):
        """Names of adapters that a thread uses."""
        return set(names_of(choice for stack in self.stacks for top in stack for choice in top))

    @property
    def assigned(self):
        """Names of adapters that rows were assigned."""
        in_force = self.rows is not None and self.rows.is_in_force
        return set(names_of(self.rows.names)) if in_force else set()

    @property
    def in_use(self):
        return self.used | self.assigned | set(weights_of(self.selected))

    @property
    def is_shared(self):
        return any(self.stacks)

    def tensors(self, names):
        return {name: self.known[name].tensors for name in names}

    # -- what happens -----------------------------------------------------------------------------

    def add(self, name, adapter):
        self.known[name] = adapter
        if self.selected is None and self.kind == "plain":
            self.selected = name

    def ask(self, names):
        """Have the store load what is missing; return the error to expect."""
        names = sorted(set(names))
        if any(name not in self.known and name not in self.on_disk for name in names):
            return VariantError
        before = list(self.store.order)
        error = self.store.ask(names, present=set(self.known), staying=self.in_use)
        for name in before:
            if name not in self.store.order:
                del self.known[name]
        for name in names:
            if name in self.store.order and name not in before:
                tensors = self.on_disk[name].cast(self.dtype)
                self.known[name] = Adapter(tensors, self.dtype, is_trainable=False)
        return error

    def follow(self, names):
        """Note that adapters are put in the model, or used: they go where the base went."""
        for name in names:
            if self.known[name].base_dtype is not self.dtype:
                self.known[name].cast(self.dtype)

    def try_to_select(self, choice):
        """See `try_to_enable`."""
        is_same = self.kind == "plain" and choice == self.selected
        if not is_same and (self.is_enabled or not isinstance(choice, str)):
            self.follow(weights_of(choice))

    def select(self, choice):
        """Make an adapter or a composition the selected one."""
        self.try_to_select(choice)
        if self.rows is not None and self.kind == "rows":
            self.rows.is_in_force = False
        self.selected, self.kind = choice, "plain"

    def enable(self):
        self.try_to_enable()
        self.is_enabled = True

    def try_to_enable(self):
        """Note what happens before the write that may fail: adapters follow the base."""
        if not self.is_enabled and self.kind == "plain":
            self.follow(weights_of(self.selected))

    def merge(self):
        self.kind = "merged"

    def open_rows(self, max_rows, adapter_len):
        longest = max(adapter.tensors.config.adapter_len for adapter in self.known.values())
        fqns = set().union(*(adapter.tensors.fqns for adapter in self.known.values()))
        self.rows = OpenRows(self.selected, fqns, adapter_len or longest, max_rows)
        self.kind = "rows"

    def assign(self, names):
        self.rows.names = tuple(names)

    def try_to_delete(self, name):
        """See `try_to_enable`: the next adapter takes the place of the active one."""
        then = next((other for other in self.known if other != name), None)
        if name == self.variant and self.is_enabled and then is not None:
            self.follow([then])

    def delete(self, name):
        self.try_to_delete(name)
        del self.known[name]
        self.store.forget([name])
        if name == self.variant:
            self.selected = next(iter(self.known), None)

    def rename(self, name, new_name):
        self.known = {new_name if key == name else key: at for key, at in self.known.items()}
        self.store.forget([name])
        self.selected = new_name if name == self.variant else self.selected

    def move(self, dtype, *, is_base_alone):
        self.dtype = dtype
        for name in self.active if is_base_alone else self.known:
            self.known[name].cast(dtype)

    def is_in_context(self, place):
        return place is not None and bool(self.stacks[place])

    # -- what is computed -------------------------------------------------------------------------

    def may_work_for_another(self, place):
        """Tell whether a thread is in no context, and another is; the first place is the main one."""
        return bool(place) and self.is_enabled and not self.stacks[place] and self.is_shared

    def choices(self, place):
        """Return what a thread uses now, by names: one choice, or one for each row."""
        if self.is_in_context(place):
            return self.stacks[place][-1] if self.is_enabled else (BASE,)
        return (self.selected if self.is_enabled and self.kind == "plain" else BASE,)

    def view(self, place):
        """Return what a thread computes with, or, for None, one that uses what is active."""
        if not self.is_in_context(place) and self.is_enabled:
            if self.kind == "merged":
                return self._view((self.selected,), is_exact=False)
            if self.kind == "rows":
                return self._view(self.rows.names or (BASE,), is_exact=False)
        choices = self.choices(place)
        is_single = len(choices) == 1 and not isinstance(choices[0], Composition)
        return self._view(choices, is_exact=is_single)

    def _view(self, choices, *, is_exact):
        tensors = self.tensors(names_of(choices))
        view = View(tuple(choices), tensors, is_exact, self.dtype)
        for found in tensors.values():
            view = _narrowed(view, found.dtype)
        return view


def _narrowed(view, dtype):
    narrow = min(view.dtype, dtype, key=lambda found: found.itemsize)
    return View(view.choices, view.tensors, view.is_exact, narrow)
