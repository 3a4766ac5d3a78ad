"""A model's part of a recipe is applied whole, switched, paused and taken back exactly."""

import re
import threading

import pytest
import torch
from core.edits import GATE, RECIPE, edited, planned, recipe
from core.toys import Block, Gate, Gated, Net, Shift, Shifted, ToyPlugin, example, session
from torch import nn

from surgery_core import (
    Composed,
    ConflictError,
    ContractError,
    DriftError,
    Effects,
    OfClass,
    OptionsError,
    Recipe,
    Rule,
    Saved,
    Session,
    StateError,
    TensorSpec,
    VariantError,
    verify,
)
from surgery_core.operation import BoundRule
from surgery_core.testing import InjectedError, assert_unchanged, failing_at, snapshot

GATE_0 = {**GATE, "select": "layers.0.up"}


def numbers_of_writes(model):
    """Return how many writes applying the recipe takes."""
    seen = []
    planned(model).apply(on_write=lambda number, _: seen.append(number)).revert()
    return len(seen)


def test_planning_changes_nothing_and_says_what_each_adapter_does():
    model = Net().eval()
    before = snapshot(model)

    plan = planned(model)

    assert_unchanged(before, model, subject="Planning")
    assert ["rules", "wide", "narrow", "shift"] == list(plan.document.documents)
    assert 1 + 3 + 1 + 2 == plan.document.num_edits
    assert "wide" == plan.document.active


def test_a_plan_is_rendered_with_modules_that_change_alike_on_one_line():
    lines = planned().document.render().splitlines()

    assert "wide *" == lines[3][:6]
    assert "layers.{0..2}.up (3)" in lines[3]
    assert "layers.0.up " in lines[4]
    assert "* is active" == lines[-2]
    assert lines[-1].startswith("Plan: 7 modules replaced, ")
    assert lines[-1].endswith(" of them in the model at once.")


def test_applying_puts_rules_and_the_active_adapter_in_the_model():
    model = Net().eval()
    found = edited(model)

    assert isinstance(model.head, Shifted)
    assert all(isinstance(block.up, Gated) for block in model.layers)
    assert ("narrow", "shift", "wide") == found.adapters
    assert "wide" == found.active
    assert not any(p.requires_grad for p in model.stem.parameters())


@pytest.mark.parametrize("freeze", [True, False])
def test_reverting_gives_back_the_same_objects_and_flags(freeze):
    model = Net().eval()
    model.stem.bias.requires_grad_(False)
    before, expected = snapshot(model), model(example())

    found = edited(model, freeze=freeze)
    found.set_active("shift")

    assert found.revert() is model
    assert_unchanged(before, model, subject="Reverting")
    assert torch.equal(expected, model(example()))
    with pytest.raises(VariantError, match="Recipe is reverted already"):
        found.revert()


def test_a_fault_at_any_write_changes_nothing():
    model = Net().eval()
    before = snapshot(model)
    total = numbers_of_writes(model)
    assert total > 10

    for number in range(total):
        with pytest.raises(InjectedError):
            planned(model).apply(on_write=failing_at(number))
        assert_unchanged(before, model, subject=f"A fault at write {number}")


def test_adapters_take_turns():
    model = Net().eval()
    found = edited(model)
    for name, modules in (("narrow", {"layers.0.up"}), ("shift", {"layers.1.down"})):
        found.set_active(name)
        changed = {fqn for fqn, m in model.named_modules() if isinstance(m, (Gated, Shifted))}
        assert modules <= changed
        assert name == found.active

    with found.disabled():
        assert not any(isinstance(module, Gated) for module in model.modules())
        assert isinstance(model.head, Shifted)


def test_a_paused_model_is_as_it_was_and_comes_back_as_it_is():
    model = Net().eval()
    before = snapshot(model)
    found = edited(model)
    during = snapshot(model)

    with found.paused() as base:
        assert base is model
        assert_unchanged(before, model, subject="Applying and pausing")
    assert_unchanged(during, model, subject="Pausing")


def test_the_root_may_be_replaced_where_there_are_no_adapters():
    model = nn.Linear(4, 2)
    found = edited(
        model,
        rules=[{"operation": "gate", "options": {"anything": True}}],
        adapters=None,
        active=None,
    )

    assert isinstance(found.model, Gated)
    assert ["gate"] == list(found.tensors("rules"))
    assert found.revert() is model


def test_a_rule_that_replaces_the_root_of_adapters_is_refused():
    around = {"anything": True}
    with pytest.raises(ConflictError, match="Operations conflict"):
        planned(rules=[{"operation": "gate", "select": "regex:", "options": around}])


def test_a_rule_and_an_adapter_for_one_module_conflict():
    with pytest.raises(ConflictError, match="Operations conflict") as caught:
        planned(rules=[{"operation": "shift", "select": "layers.1.up"}])

    assert ["models.model.adapters.wide"] == caught.value.__notes__


class Beside(nn.Module):
    """A wrapper that has the very children of the original, so that their FQNs stay."""

    def __init__(self, base):
        super().__init__()
        self.base, self._modules = (base,), base._modules
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.base[0](x) * (1 + self.gate)


class Around(Gate):
    name = "around"

    def targets(self, _tree, _options):
        return OfClass(Block)

    def describe(self, _site, _options):
        return Effects(added=(TensorSpec(name="gate", shape=(1,), dtype="float32"),))

    def build(self, site, _options):
        return Beside(site.module)


def test_a_rule_may_work_inside_what_an_adapter_wraps():
    """The rule is applied first and reverted last, whatever adapters do in between."""
    model = Net().eval()
    before, expected = snapshot(model), model(example())
    part = recipe(
        rules=[{"operation": "shift", "select": "layers.1.up"}],
        adapters={"around": {"operation": "around", "expect": 3}, "narrow": GATE_0},
        active="around",
    )
    known = Session(plugins=[ToyPlugin(Around(), Shift(), Gate())], discover=False)
    found = known.plan_recipe(model, part).apply()

    assert isinstance(model.layers[1], Beside)
    assert isinstance(model.layers[1].up, Shifted)
    assert torch.equal(expected, model(example()))
    with torch.no_grad():
        model.layers[1].up.shift.add_(1.0)
    shifted = model(example())
    assert not torch.equal(expected, shifted)
    found.set_active("narrow")
    assert torch.equal(shifted, model(example()))
    outcome = verify(found, (example(),), tiers=["structure", "revert", "gradients"])
    assert outcome.is_ok, outcome.render()
    found.revert()
    assert_unchanged(before, model, subject="Reverting")


def test_an_adapter_inside_what_a_rule_replaces_is_refused():
    rules = [{"operation": "gate", "select": "layers.0", "options": {"anything": True}}]
    with pytest.raises(ConflictError, match=r"claims 'layers.0' and 'gate' \(rule 0\) claims"):
        planned(rules=rules)


def test_errors_say_where_in_the_recipe_they_come_from():
    wrong = {**GATE, "options": {"valeu": 1}}
    with pytest.raises(OptionsError) as caught:
        planned(adapters={"wide": wrong}, active=None)

    assert ["models.model.adapters.wide"] == caught.value.__notes__
    with pytest.raises(OptionsError) as caught:
        planned(rules=[{"operation": "gate", "options": {"x": 1}}])
    assert ["models.model.rules"] == caught.value.__notes__


def test_one_operation_may_have_several_rules():
    """Each counts, with options of its own."""
    rules = [
        {"operation": "gate", "select": "head"},
        {"operation": "gate", "select": "layers.0.down", "options": {"value": 0.5}},
    ]
    model = Net().eval()
    found = edited(model, rules=rules)

    assert [0, 1] == [edit.rule for edit in found.plan.document.rules.edits]
    assert 0.0 == model.head.gate.item()
    assert 0.5 == model.layers[0].down.gate.item()


def test_a_recipe_with_several_models_is_planned_by_name():
    whole = Recipe(models={"a": recipe(), "b": recipe(rules=None)})

    assert session().plan_recipe(Net(), whole, "b").rules is None
    for name in (None, "c"):
        message = re.escape(f"Recipe has no model {name!r}: expected one of 'a', 'b'.")
        with pytest.raises(OptionsError, match=message):
            session().plan_recipe(Net(), whole, name)


def test_tensors_are_those_that_were_brought():
    found = edited()

    assert ["head.shift"] == list(found.tensors("rules"))
    assert [f"layers.{i}.up.gate" for i in range(3)] == list(found.tensors("wide"))
    assert 1 + 3 + 1 + 2 == len(found.added_parameters())
    assert 2 == len(found.added_parameters(["rules", "narrow"]))
    with pytest.raises(VariantError, match="Adapter 'wode' does not exist"):
        found.tensors("wode")


def test_parameters_are_given_to_an_optimizer_until_the_revert():
    found = edited()
    own = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(own.parameters(), lr=0.1)
    found.add_to_optimizer(optimizer, ["wide"], lr=0.5)
    before = [p.detach().clone() for p in found.added_parameters(["wide"])]
    found.model(example()).sum().backward()
    optimizer.step()

    assert [0.1, 0.5] == [group["lr"] for group in optimizer.param_groups]
    assert not all(map(torch.equal, before, found.added_parameters(["wide"])))
    found.revert()
    assert [0.1] == [group["lr"] for group in optimizer.param_groups]
    assert not optimizer.state


class SavedGate(Gate):
    """Reads gates from a source that is their value; composes by adding up."""

    def read_saved(self, source, _model, options):
        if source == "nothing":
            return None
        state = {"layers.0.up.gate": torch.tensor([float(source)])}
        return Saved(options={"value": 0.0, **options}, state=state)

    def write_saved(self, folder, options, modules):
        self.written = folder, dict(options), list(modules)

    def compose(self, variants):
        total = sum(v.weight * m.gate.item() for v in variants for m in v.modules.values())
        return Composed(
            rule=BoundRule(
                rule=Rule(operation="gate", select="layers.0.up", options={"value": total}),
                operation=self,
            ),
            loans={},
        )


def saved_gates(**adapters):
    return {
        name: {"operation": "gate", "select": "layers.0.up", "source": source}
        for name, source in adapters.items()
    }


def with_saved(model, **changes):
    known = Session(plugins=[ToyPlugin(SavedGate())], discover=False)
    values = {"adapters": saved_gates(one="0.5", two="-2"), "active": "one", **changes}
    return known, known.plan_recipe(model, recipe(rules=None, **values))


def test_adapters_start_from_what_was_saved():
    model = Net().eval()
    known, plan = with_saved(model)
    found = plan.apply()

    assert 0.5 == model.layers[0].up.gate.item()
    assert {"value": 0.0} == plan.recipe.adapters["one"].options
    known.export(found, "two", "folder")
    operation = known.plugins.operation("gate")
    assert ("folder", {"value": 0.0}, ["layers.0.up"]) == operation.written
    with pytest.raises(OptionsError, match="cannot read 'nothing'"):
        with_saved(Net(), adapters=saved_gates(one="nothing"))
    with pytest.raises(StateError, match=r"Tensors do not fit 'one': .*not finite"):
        with_saved(Net(), adapters=saved_gates(one="nan", two="1"))[1].apply()


def test_several_are_active_with_weights_and_one_again():
    model = Net().eval()
    found = with_saved(model, active={"one": 2.0, "two": 0.25})[1].apply()
    assert 0.5 == model.layers[0].up.gate.item()
    assert {"one": 2.0, "two": 0.25} == found.active

    found.set_active({"two": 1.0, "one": 1.0})
    assert -1.5 == model.layers[0].up.gate.item()
    found.set_active("two")
    assert -2.0 == model.layers[0].up.gate.item()
    assert ("one", "two") == found.swap_state.names
    found.revert()
    assert isinstance(model.layers[0].up, nn.Linear)


def test_what_cannot_be_active_together_is_refused_and_changes_nothing():
    model = Net().eval()
    found = edited(model)
    before = snapshot(model)

    with pytest.raises(ContractError, match="Operation 'gate' cannot have 'wide', 'narrow' active"):
        found.set_active({"wide": 1.0, "narrow": 1.0})
    with pytest.raises(ContractError, match="Operation 'gate' cannot have 'wide' active together"):
        found.set_active({"wide": 1.0, "shift": 1.0})
    with pytest.raises(VariantError, match="Adapter 'wode' does not exist"):
        found.set_active({"wode": 1.0})
    assert_unchanged(before, model, subject="A refused composition")
    assert "wide" == found.active


def test_reverting_a_model_that_somebody_changed_is_refused_and_changes_nothing():
    model = Net().eval()
    found = edited(model)
    mine = model.head = nn.Linear(4, 2)
    with pytest.raises(DriftError, match="'head'"):
        found.revert()

    assert model.head is mine
    assert isinstance(model.layers[0].up, Gated)
    assert found.is_applied


class Nosy(Gate):
    """Adds as many tensors as the model has gates, so that rules change what it does."""

    name = "nosy"

    def describe(self, site, options):
        effects = super().describe(site, options)
        self.count = getattr(self, "count", 0) + 1
        if self.count <= 1:
            return effects
        return Effects(
            added=(*effects.added, TensorSpec(name="more", shape=(1,), dtype="float32")),
            removed=effects.removed,
        )


def test_an_adapter_that_rules_would_change_is_refused_and_nothing_stays():
    model = Net().eval()
    before = snapshot(model)
    known = Session(plugins=[ToyPlugin(Nosy(), Gate())], discover=False)
    nosy = {"operation": "nosy", "select": "layers.0.up"}
    rules = [{"operation": "gate", "select": "head"}]
    plan = known.plan_recipe(model, recipe(rules=rules, adapters={"nosy": nosy}, active=None))

    with pytest.raises(DriftError, match="Adapter 'nosy' would be another after the rules"):
        plan.apply()
    assert_unchanged(before, model, subject="A refused adapter")


def test_an_adapter_is_looked_up_between_switches_not_during_one():
    found = edited()
    thread = threading.Thread(target=found.variant, args=("wide",))
    with found.sharing.lock:
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
    thread.join(10)
    assert not thread.is_alive()


def test_an_adapter_may_have_several_rules():
    model = Net().eval()
    both = {"rules": [GATE, {"operation": "shift", "select": "stem"}]}
    found = edited(model, rules=None, adapters={"both": both}, active=None)

    assert isinstance(model.stem, Shifted)
    assert isinstance(model.layers[1].up, Gated)
    with pytest.raises(ContractError, match="Operation 'gate' cannot have 'both' active together"):
        found.set_active({"both": 1.0})
    with pytest.raises(ContractError, match="Adapter 'both' has several rules"):
        session().export(found, "both", "folder")
    found.revert()
    assert RECIPE["active"] == "wide"


class Keeping(Around):
    keeps_children = True


class Lying(Around):
    keeps_children = True

    def build(self, site, _options):
        return Gated(site.module)


def test_one_adapter_may_wrap_a_module_and_change_what_is_inside():
    model = Net().eval()
    before, expected = snapshot(model), model(example())
    both = {"rules": [{"operation": "around"}, {"operation": "shift", "select": "layers.*.up"}]}
    known = Session(plugins=[ToyPlugin(Keeping(), Shift(), Gate())], discover=False)
    part = recipe(rules=None, adapters={"both": both, "narrow": GATE_0}, active="both")
    found = known.plan_recipe(model, part).apply()

    assert all(isinstance(block, Beside) for block in model.layers)
    assert all(isinstance(block.up, Shifted) for block in model.layers)
    assert torch.equal(expected, model(example()))
    with torch.no_grad():
        model.layers[2].up.shift.add_(1.0)
    changed = model(example())
    found.set_active("narrow")
    assert torch.equal(expected, model(example()))
    found.set_active("both")
    assert not torch.equal(expected, changed)
    assert torch.equal(changed, model(example()))
    outcome = verify(found, (example(),), tiers=["structure", "revert", "gradients"])
    assert outcome.is_ok, outcome.render()
    found.revert()
    assert_unchanged(before, model, subject="Reverting")


def test_a_fault_at_any_write_of_nested_edits_changes_nothing():
    model = Net().eval()
    before = snapshot(model)
    rules = [Rule(operation="around"), Rule(operation="shift", select="layers.*.up")]
    known = Session(plugins=[ToyPlugin(Keeping(), Shift())], discover=False)
    for number in range(6):
        with pytest.raises(InjectedError):
            known.plan(model, rules).apply(on_write=failing_at(number))
        assert_unchanged(before, model, subject=f"A fault at write {number}")
    surgery = known.plan(model, rules).apply(on_write=failing_at(6))
    for number in range(6):
        with pytest.raises(InjectedError):
            surgery.revert(on_write=failing_at(number))
    surgery.revert()
    assert_unchanged(before, model, subject="Reverting")


def test_an_operation_that_says_it_keeps_children_must():
    known = Session(plugins=[ToyPlugin(Lying())], discover=False)
    with pytest.raises(ContractError, match="expected a module with the very table of children"):
        known.plan(Net().eval(), [Rule(operation="around")]).apply()
