"""Whatever is done to variants, in whatever order: model and store agree with a plain dictionary."""

import copy

import torch
from core.toys import Gated, Net, Twice, example
from core.trees import plan
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from surgery_core import SwapState
from surgery_core.testing import InjectedError, failing_at, snapshot

SITES = {
    "ends": ("first.stem", "first.head"),
    "ups": ("first.layers.0.up", "first.layers.1.up", "first.head"),
    "block": ("first.layers.0",),
    "all": ("first",),
}
"""They overlap: in one module, and in modules that are inside others. All have an alias."""

names = st.sampled_from(["a", "b", "c", "d", "e", "f"])


class Variants(RuleBasedStateMachine):
    """Compares a `SwapState` with a dictionary of names to sites and gate."""

    known = Bundle("known")

    @initialize(target=known)
    def start(self):
        self.model = Twice(Net(3, blocks=2)).eval()
        self.swap = SwapState(self.model)
        self.base = snapshot(self.model)
        self.expected = {}
        self.selected = None
        self.enabled = True
        self.training = False
        self.dtype = torch.float32
        self.count = 0
        for name, sites in zip("abc", ["ends", "ups", "block"], strict=True):
            self.put(name, sites)
        return multiple(*"abc")

    def put(self, name, sites):
        self.count += 1
        value = float(self.count)
        drawn = plan(self.model, SITES[sites], beneath=self.swap, value=value)
        self.swap.add(name, drawn)
        self.expected[name] = dict.fromkeys(SITES[sites], value)

    @rule(target=known, name=names, sites=st.sampled_from(sorted(SITES)))
    def add(self, name, sites):
        if name in self.expected:
            return multiple()
        self.put(name, sites)
        return name

    @rule(name=known)
    def set(self, name):
        self.swap.set(name)
        self.selected = name

    @rule()
    def enable(self):
        self.swap.enable()
        self.enabled = True

    @rule()
    def disable(self):
        self.swap.disable()
        self.enabled = False

    @rule()
    def disable_for_a_while(self):
        with self.swap.disabled():
            assert self.gates() == {}

    @rule(name=consumes(known))
    def delete(self, name):
        self.swap.delete(name)
        del self.expected[name]
        if self.selected == name:
            self.selected = None

    @rule(name=consumes(known), then=known)
    def delete_then(self, name, then):
        self.swap.delete(name, then=then)
        del self.expected[name]
        if self.selected == name:
            self.selected = then

    @rule(target=known, name=consumes(known), new=names)
    def rename(self, name, new):
        if new in self.expected:
            return name
        self.swap.rename(name, new)
        self.expected[new] = self.expected.pop(name)
        if self.selected == name:
            self.selected = new
        return new

    @rule(name=known, number=st.integers(0, 8))
    def set_with_a_fault(self, name, number):
        before = snapshot(self.model)
        self.swap.on_write = failing_at(number)
        try:
            self.swap.set(name)
        except InjectedError:
            assert before.differences(snapshot(self.model)) == []
        else:
            self.selected = name
        self.swap.on_write = None

    @rule(number=st.integers(0, 8))
    def toggle_with_a_fault(self, number):
        before = snapshot(self.model)
        self.swap.on_write = failing_at(number)
        try:
            (self.swap.disable if self.enabled else self.swap.enable)()
        except InjectedError:
            assert before.differences(snapshot(self.model)) == []
        else:
            self.enabled = not self.enabled
        self.swap.on_write = None

    @rule(mode=st.booleans())
    def train(self, mode):
        self.model.train(mode)
        self.training = mode

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]), together=st.booleans())
    def move(self, dtype, together):
        self.model.to(dtype)
        if together:
            self.swap.to(dtype)
        self.dtype = dtype

    @precondition(lambda self: self.count < 20)
    @rule()
    def go_on_with_a_copy(self):
        self.model, self.swap = copy.deepcopy((self.model, self.swap))
        self.base = None

    def gates(self):
        found = self.model.named_modules()
        return {fqn: module.gate.item() for fqn, module in found if isinstance(module, Gated)}

    @invariant()
    def the_active_variant_is_not_in_the_store(self):
        active = self.selected if self.enabled else None
        assert self.swap.active == active
        assert self.swap.selected == self.selected
        assert self.swap.is_enabled is self.enabled
        assert set(self.swap.stored) == set(self.expected) - {active}
        assert self.swap.names == tuple(sorted(self.expected))

    @invariant()
    def the_model_holds_the_active_variant_and_nothing_else(self):
        expected = self.expected.get(self.swap.active, {})
        assert self.gates() == expected
        for fqn in expected:
            alias = fqn.replace("first", "second", 1)
            assert self.model.get_submodule(alias) is self.model.get_submodule(fqn)
        if self.base is not None and not expected:
            assert snapshot(self.model).modules == self.base.modules

    @invariant()
    def mode_and_dtype_are_those_of_the_model(self):
        assert {module.training for module in self.model.modules()} == {self.training}
        assert {parameter.dtype for parameter in self.model.parameters()} == {self.dtype}

    def teardown(self):
        if hasattr(self, "swap"):
            self.model.eval()
            self.swap.disable()
            assert self.gates() == {}
            assert self.model(example(size=3, dtype=self.dtype)).dtype is self.dtype


TestVariants = Variants.TestCase
