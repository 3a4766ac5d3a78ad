"""A random walk over edited models: whatever happens, what is shown is what is there, and all goes back."""

import tempfile
from pathlib import Path

import pytest
import torch
from core.edits import GATE, SHIFT, recipe
from core.toys import Gated, Net, Shifted, example, session
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from surgery_core import StateError, VariantError, verify
from surgery_core.testing import InjectedError, failing_at, snapshot

ADAPTERS = {
    "wide": GATE,
    "narrow": {**GATE, "select": "layers.0.up"},
    "shift": SHIFT,
    "both": {
        "rules": [{**GATE, "select": "stem"}, {"operation": "shift", "select": "layers.2.up"}]
    },
}
SITES = {
    "wide": {f"layers.{i}.up" for i in range(3)},
    "narrow": {"layers.0.up"},
    "shift": {"layers.1.down", "layers.2.down"},
    "both": {"stem", "layers.2.up"},
}
names = st.sampled_from(sorted(ADAPTERS))


class EditingMachine(RuleBasedStateMachine):
    """An edited model, against names and values in plain dictionaries."""

    @initialize(has_rules=st.booleans(), freeze=st.booleans(), active=names)
    def start(self, has_rules, freeze, active):
        self.folder = tempfile.TemporaryDirectory()
        torch.manual_seed(0)
        self.model = Net().eval()
        self.before = snapshot(self.model)
        self.expected = self.model(example())
        rules = {} if has_rules else {"rules": None}
        self.recipe = recipe(**rules, adapters=ADAPTERS, active=active, freeze=freeze)
        self.has_rules, self.is_enabled = has_rules, True
        self.apply()

    def apply(self):
        self.edited = session().plan_recipe(self.model, self.recipe).apply()
        self.active = self.recipe.selected
        self.values = {name: self.read(name) for name in self.all_names()}

    def all_names(self):
        return [*(["rules"] if self.has_rules else []), *ADAPTERS]

    def read(self, name):
        return {key: t.detach().clone() for key, t in self.edited.tensors(name).items()}

    @rule(name=names)
    def activate(self, name):
        self.edited.set_active(name)
        self.active = name

    @rule(name=names, number=st.integers(0, 6))
    def activate_with_a_fault(self, name, number):
        self.edited.swap_state.on_write = failing_at(number)
        try:
            self.edited.set_active(name)
            self.active = name
        except InjectedError:
            pass
        finally:
            self.edited.swap_state.on_write = None

    @rule()
    def take_out_or_put_back(self):
        self.is_enabled = not self.is_enabled
        (self.edited.swap_state.enable if self.is_enabled else self.edited.swap_state.disable)()

    @rule(name=names, value=st.floats(-2, 2))
    def train(self, name, value):
        with torch.no_grad():
            for tensor in self.edited.tensors(name).values():
                tensor.fill_(value)
        self.values[name] = self.read(name)

    @rule(name=names)
    def refuse(self, name):
        with pytest.raises(VariantError):
            self.edited.set_active("nobody")
        with pytest.raises(StateError):
            self.edited.load_(name, {"nothing": torch.zeros(1)})

    @rule()
    def pause(self):
        with self.edited.paused() as base:
            assert [] == self.before.differences(snapshot(base))
            assert torch.equal(self.expected, base(example()))

    @rule()
    def verify(self):
        outcome = verify(self.edited, (example(),), tiers=["structure", "revert", "gradients"])
        assert outcome.is_ok, outcome.render()

    @rule()
    def save_revert_and_load(self):
        """In the same process, which is harder: the model is the same object."""
        folder = Path(self.folder.name) / "record"
        session().save(self.edited, folder)
        self.edited.revert()
        assert [] == self.before.differences(snapshot(self.model))
        self.edited = session().load(self.model, folder, base_check="error")
        assert self.active == self.edited.active
        self.is_enabled = True

    @precondition(lambda self: self.is_enabled)
    @rule(number=st.integers(0, 40))
    def revert_and_apply_with_a_fault(self, number):
        self.edited.revert()
        plan = session().plan_recipe(self.model, self.recipe)
        try:
            plan.apply(on_write=failing_at(number)).revert()
        except InjectedError:
            assert [] == self.before.differences(snapshot(self.model))
        self.apply()

    @invariant()
    def what_is_there_is_what_was_asked_for(self):
        places = {
            fqn
            for fqn, module in self.model.named_modules()
            if isinstance(module, (Gated, Shifted))
        }
        expected = SITES[self.active] if self.is_enabled else set()
        assert expected | ({"head"} if self.has_rules else set()) == places
        assert self.active == self.edited.active
        for name in self.all_names():
            now = self.edited.tensors(name)
            assert self.values[name].keys() == now.keys()
            assert all(torch.equal(self.values[name][key], now[key]) for key in now)

    def teardown(self):
        if hasattr(self, "edited"):
            self.edited.revert()
            assert [] == self.before.differences(snapshot(self.model))
            assert torch.equal(self.expected, self.model(example()))
            self.folder.cleanup()


TestEditing = EditingMachine.TestCase
TestEditing.pytestmark = [pytest.mark.slow]
