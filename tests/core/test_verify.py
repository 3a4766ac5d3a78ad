"""What holds is found to hold, and each promise that is broken is found to be."""

from contextlib import contextmanager
from contextvars import ContextVar

import pytest
import torch
from core.edits import GATE, edited, planned, recipe
from core.toys import Fresh, Gate, Gated, Net, Shift, ToyPlugin, example, session
from torch import nn

from surgery_core import Effects, OptionsError, Saved, Session, TensorSpec, verify
from surgery_core.testing import assert_unchanged, snapshot
from surgery_core.verify import ALL_TIERS, Check, Verification

INPUTS = (example(),)


def failed(outcome):
    return [(check.tier, check.subject) for check in outcome.checks if check.status == "failed"]


def test_an_applied_recipe_holds_in_every_tier_and_is_left_as_it_was():
    model = Net().eval()
    found = edited(model)
    before = snapshot(model)

    outcome = verify(found, INPUTS, tiers=[*ALL_TIERS[:4], "export"])

    assert outcome.is_ok, outcome.render()
    assert {"ok"} == {check.status for check in outcome.checks}
    assert_unchanged(before, model, subject="Verifying")
    assert "wide" == found.active
    assert {"structure", "identity", "revert", "gradients", "export"} == {
        check.tier for check in outcome.checks
    }


# The compiler has warnings of its own.
@pytest.mark.filterwarnings("default")
@pytest.mark.slow
def test_compiled_code_computes_the_same():
    outcome = verify(edited(adapters={"one": GATE}, active=None), INPUTS, tiers=["compile"])

    assert [("compile", "one", "ok")] == [
        (check.tier, check.subject, check.status) for check in outcome.checks
    ], outcome.render()


class Counted(Gated):
    def __init__(self, inner):
        super().__init__(inner)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Count(Gate):
    name = "count"

    def describe(self, site, options):
        found = super().describe(site, options)
        calls = TensorSpec(name="calls", shape=(1,), dtype="float32", trainable=False)
        return Effects(added=(*found.added, calls), removed=found.removed)

    def build(self, site, _options):
        return Counted(site.module)


def test_what_an_operation_counts_is_as_it_was():
    known = Session(plugins=[ToyPlugin(Count())], discover=False)
    part = recipe(
        rules=[{"operation": "count", "select": "stem"}],
        adapters={"one": {"operation": "count", "select": "head"}},
        active=None,
    )
    found = known.plan_recipe(Net().eval(), part).apply()
    found.model(example())

    assert verify(found, INPUTS).is_ok
    assert 1.0 == found.tensors("rules")["stem.calls"].item()
    assert 1.0 == found.tensors("one")["head.calls"].item()


HANDED = ContextVar("handed", default=0)


class Asked(Gated):
    def forward(self, x):
        if HANDED.get() != self.needs:
            msg = f"expected {self.needs}, got {HANDED.get()}"
            raise LookupError(msg)
        return super().forward(x)


class Ask(Gate):
    """Its modules need what `probing` hands over, which the model's inputs do not have."""

    name = "ask"
    known = frozenset({"needs"})

    def build(self, site, options):
        module = Asked(site.module)
        module.needs = options["needs"]
        return module

    @contextmanager
    def probing(self, options):
        before = HANDED.set(options["needs"])
        yield
        HANDED.reset(before)


def test_operations_are_given_what_they_need_beside_the_inputs():
    known = Session(plugins=[ToyPlugin(Ask(), Shift())], discover=False)
    ask = {"operation": "ask", "select": "head"}
    adapters = {
        "one": {**ask, "options": {"needs": 1}},
        "two": {**ask, "options": {"needs": 2}},
        "none": {"operation": "shift", "select": "head"},
    }
    found = known.plan_recipe(Net().eval(), recipe(rules=[], adapters=adapters, active="two"))

    outcome = verify(found.apply(), INPUTS, tiers=[*ALL_TIERS[:4], "export"])

    assert outcome.is_ok, outcome.render()
    assert {"ok"} == {check.status for check in outcome.checks}
    assert 0 == HANDED.get()


def test_rules_are_given_what_they_need_whatever_is_active():
    known = Session(plugins=[ToyPlugin(Ask(), Shift())], discover=False)
    rules = [{"operation": "ask", "select": "stem", "options": {"needs": 3}}]
    adapters = {"one": {"operation": "shift", "select": "head"}}
    found = known.plan_recipe(Net().eval(), recipe(rules=rules, adapters=adapters, active=None))

    outcome = verify(found.apply(), INPUTS)

    assert outcome.is_ok, outcome.render()
    assert {"ok"} == {check.status for check in outcome.checks}


def test_a_disabled_model_is_left_disabled():
    found = edited()
    found.swap_state.disable()

    verify(found, INPUTS)

    assert not found.swap_state.is_enabled


def test_checks_that_run_the_model_are_skipped_without_inputs():
    outcome = verify(edited())

    assert outcome.is_ok
    assert {"identity", "gradients"} == {
        check.tier for check in outcome.checks if check.status == "skipped"
    }


def test_inputs_may_be_given_by_name():
    assert verify(edited(), {"x": example()}).is_ok


def test_unknown_tiers_are_refused():
    with pytest.raises(OptionsError, match="Tiers 'speed' are unknown: expected some of"):
        verify(edited(), INPUTS, tiers=["speed"])


def test_outcomes_are_a_table_and_json():
    outcome = Verification(
        checks=(
            Check(tier="revert", subject="model", status="ok", detail="fine"),
            Check(tier="identity", subject="fr", status="failed", detail="output 0 differs"),
        )
    )

    assert not outcome.is_ok
    assert [
        "check     of     outcome  detail",
        "--------  -----  -------  ----------------",
        "revert    model  ok       fine",
        "identity  fr     failed   output 0 differs",
    ] == outcome.render().splitlines()
    assert {
        "tier": "identity",
        "subject": "fr",
        "status": "failed",
        "detail": "output 0 differs",
    } in (outcome.to_mapping()["checks"])


def test_an_adapter_that_changes_something_at_first_fails_identity():
    opened = {**GATE, "options": {"value": 0.25}}
    outcome = verify(edited(adapters={"wide": opened, "narrow": GATE}, active="wide"), INPUTS)

    assert [("identity", "wide")] == failed(outcome)
    (check,) = [check for check in outcome.checks if check.status == "failed"]
    assert check.detail.startswith("'output 0 differs by ")


def test_rules_that_change_something_fail_identity():
    fresh = [{"operation": "fresh", "select": "head"}]
    outcome = verify(edited(rules=fresh, adapters={"wide": GATE}, active=None), INPUTS)

    assert [("identity", "rules")] == failed(outcome)


class SavedGate(Gate):
    def read_saved(self, _source, _model, options):
        return Saved(options=options, state={"head.gate": torch.tensor([0.5])})


def test_identity_is_not_expected_of_values_that_were_saved():
    known = Session(plugins=[ToyPlugin(SavedGate())], discover=False)
    adapter = {"operation": "gate", "select": "head", "source": "there"}
    part = recipe(rules=None, adapters={"one": adapter}, active=None)

    outcome = verify(known.plan_recipe(Net().eval(), part).apply(), INPUTS)

    assert outcome.is_ok
    (check,) = [check for check in outcome.checks if check.status == "skipped"]
    assert ("identity", "one") == (check.tier, check.subject)
    assert check.detail.startswith("values were loaded: 'output 0 differs by ")


def test_a_module_put_somewhere_else_fails_structure():
    model = Net().eval()
    found = edited(model)
    gated = found.variant("narrow")["layers.0.up"]
    gated.extra = nn.Linear(1, 1)

    outcome = verify(found, INPUTS, tiers=["structure"])

    assert [("structure", "narrow")] == failed(outcome)
    assert "layers.0.up.extra.weight" in outcome.render()


class Residue(Gate):
    """Leaves an attribute on the original."""

    def build(self, site, options):
        site.module.touched = True
        return super().build(site, options)


def test_residue_on_the_base_fails_revert():
    known = Session(plugins=[ToyPlugin(Residue(), Shift(), Fresh())], discover=False)

    outcome = verify(known.plan_recipe(Net().eval(), recipe()).apply(), INPUTS, tiers=["revert"])

    assert ("revert", "model") in failed(outcome)
    assert "attributes: layers.0.up:touched is new" in outcome.render()


def test_values_of_the_base_that_were_written_to_fail_revert():
    model = Net().eval()
    found = edited(model)
    with torch.no_grad():
        model.stem.bias.add_(1.0)

    outcome = verify(found, INPUTS, tiers=["revert"])

    assert [("revert", "model")] == failed(outcome)
    assert "state: stem.bias differs" in outcome.render()


class Dead(Gate):
    """Promises a trained gate that nothing uses."""

    name = "dead"

    def build(self, site, options):
        found = super().build(site, options)
        found.forward = site.module.forward
        return found


def test_a_promised_parameter_without_a_gradient_fails():
    known = Session(plugins=[ToyPlugin(Dead())], discover=False)
    adapter = {"operation": "dead", "select": "head"}
    part = recipe(rules=None, adapters={"one": adapter}, active=None)

    outcome = verify(known.plan_recipe(Net().eval(), part).apply(), INPUTS, tiers=["gradients"])

    assert [("gradients", "one")] == failed(outcome)
    assert "head.gate gets none" in outcome.render()


def test_a_promised_parameter_that_is_not_in_the_model_fails():
    """Somebody put another in its place, so an optimizer would train what nothing uses."""
    found = edited(adapters={"wide": GATE}, active=None)
    kept = found.tensors

    def tensors(name):
        old = {"old": nn.Parameter(torch.zeros(1))} if name == "wide" else {}
        return {**kept(name), **old}

    found.tensors = tensors
    outcome = verify(found, INPUTS, tiers=["gradients"])

    assert [("gradients", "wide")] == failed(outcome)
    assert "1 parameters are not in the model" in outcome.render()


def test_a_gradient_that_nobody_promised_fails():
    found = edited(adapters={"wide": GATE}, active=None)
    found.model.stem.bias.requires_grad_(True)

    outcome = verify(found, INPUTS, tiers=["gradients"])

    assert [("gradients", "wide")] == failed(outcome)
    assert "stem.bias is not to be trained" in outcome.render()


class Infinite(Gated):
    def forward(self, x):
        return self.inner(x) + torch.sqrt(self.gate * self.gate)


class Steep(Gate):
    """Its gate has no finite slope at zero."""

    name = "steep"

    def build(self, site, _options):
        return Infinite(site.module)


def test_a_gradient_that_is_not_finite_fails():
    known = Session(plugins=[ToyPlugin(Steep())], discover=False)
    adapter = {"operation": "steep", "select": "head"}
    part = recipe(rules=None, adapters={"one": adapter}, active=None)

    outcome = verify(known.plan_recipe(Net().eval(), part).apply(), INPUTS)

    assert [("gradients", "one")] == failed(outcome)
    assert "head.gate is not finite" in outcome.render()


def test_gradients_that_were_there_are_there_afterwards():
    found = edited()
    (parameter,) = found.added_parameters(["rules"])
    parameter.grad = torch.ones_like(parameter)

    verify(found, INPUTS)

    assert torch.equal(torch.ones_like(parameter), parameter.grad)


class Branching(Gated):
    def forward(self, x):
        return self.inner(x) * (1 + self.gate) if x.sum() > 0 else self.inner(x)


class Branch(Gate):
    """Looks at values, which neither compiles nor exports."""

    name = "branch"

    def build(self, site, _options):
        return Branching(site.module)


def test_what_cannot_be_exported_fails_with_the_reason():
    known = Session(plugins=[ToyPlugin(Branch())], discover=False)
    adapter = {"operation": "branch", "select": "head"}
    part = recipe(rules=None, adapters={"one": adapter}, active=None)

    outcome = verify(known.plan_recipe(Net().eval(), part).apply(), INPUTS, tiers=["export"])

    assert [("export", "one")] == failed(outcome)


def test_rules_alone_are_verified():
    found = edited(adapters=None, active=None)

    outcome = verify(found, INPUTS, tiers=[*ALL_TIERS[:4], "export"])

    assert outcome.is_ok, outcome.render()
    assert {"rules", "model"} == {check.subject for check in outcome.checks}


def test_a_plan_can_be_verified_in_training_mode_with_dropout():
    class Dropping(Net):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), training=self.training)

    model = Dropping().train()
    state = torch.random.get_rng_state()

    outcome = verify(planned(model).apply(), INPUTS)

    assert outcome.is_ok, outcome.render()
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert session().plugins.probe_inputs(model) is None
