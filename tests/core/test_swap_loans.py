"""Variants that borrow parameters of others, and what is put where the active one has no module."""

import copy

import pytest
import torch
from core.toys import ToyOperation, example
from core.variants import gate_values, gates, plan, state_of, three_variants
from torch import nn

from surgery_core import (
    BoundRule,
    DriftError,
    Effects,
    Plan,
    Rule,
    TensorSpec,
    VariantError,
    Where,
)
from surgery_core.testing import InjectedError, assert_unchanged, failing_at, snapshot

LOANS = {"a": {"gate_a": "gate"}, "b": {"gate_b": "gate"}}


class Borrower(nn.Module):
    """Multiplies by one plus each gate it has; shares the table of children of its base."""

    def __init__(self, base, own):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        for name, parameter in own.items():
            self.register_parameter(name, parameter)

    def forward(self, x):
        out = nn.functional.linear(x, self.weight, self.bias)
        for name, parameter in self._parameters.items():
            if name.startswith("gate"):
                out = out * (1 + parameter)
        return out


class Borrow(ToyOperation):
    """Put modules with the gates of other variants where those have some."""

    name = "borrow"

    def __init__(self, swap):
        self.swap = swap

    def targets(self, _tree, _options):
        fqns = {fqn for lender in LOANS for fqn in self.swap.variant(lender)}
        return Where(lambda fqn, _: fqn in fqns, "gates")

    def own(self, site):
        found = {lender: self.swap.variant(lender).get(site.fqn) for lender in LOANS}
        return {f"gate_{k}": module.gate for k, module in found.items() if module is not None}

    def describe(self, site, _options):
        return Effects(
            added=tuple(TensorSpec(name=n, shape=(1,), dtype="float32") for n in self.own(site))
        )

    def build(self, site, _options):
        return Borrower(site.module, self.own(site))


def with_borrower():
    """Return a model with variants `a` and `b`, and `sum`, which borrows from both."""
    model, swap = three_variants()
    rules = [BoundRule(rule=Rule(operation="borrow"), operation=Borrow(swap))]
    swap.add("sum", Plan.draft(model, rules, originals=swap.originals()), loans=LOANS)
    return model, swap


def outputs(model):
    with torch.no_grad():
        return model(example())


def test_lenders_are_lent_while_the_borrower_is_active():
    model, swap = with_borrower()
    gate = swap.variant("a")["head"].gate

    swap.set("sum")

    assert ("a", "b") == swap.lent
    assert ("c",) == swap.stored
    assert ("a", "b", "c", "sum") == swap.names
    assert model.head.gate_a is gate
    assert {"head.gate_a", "head.gate_b", "stem.gate_b", "layers.0.up.gate_a"} == {
        name for name, _ in model.named_parameters() if "gate" in name
    }
    swap.set("c")
    assert () == swap.lent
    assert {"a", "b", "sum"} == set(swap.stored)


@pytest.mark.parametrize("first", [None, "a", "c"])
def test_a_lender_may_be_active_before_and_after(first):
    model, swap = with_borrower()
    if first:
        swap.set(first)
    swap.set("sum")
    both = outputs(model)
    swap.set("a")
    only = outputs(model)
    assert ("b", "sum") == tuple(sorted({*swap.stored} - {"c"}))

    swap.set("sum")
    assert torch.equal(both, outputs(model))
    assert not torch.equal(both, only)
    swap.disable()
    assert {"a", "b", "c", "sum"} == set(swap.stored)
    swap.enable()
    assert torch.equal(both, outputs(model))


def test_parameters_replaced_in_the_borrower_are_the_lenders():
    model, swap = with_borrower()
    swap.set("sum")
    model.load_state_dict(
        {name: tensor + 0.5 for name, tensor in model.state_dict().items()}, assign=True
    )

    assert swap.variant("a")["head"].gate is model.head.gate_a
    swap.set("a")
    assert 1.5 == model.head.gate.item()
    assert 1.5 == model.layers[0].up.gate.item()


def test_parameters_replaced_in_a_lender_are_the_borrowers_when_it_enters():
    model, swap = with_borrower()
    swap.variant("a")["head"].gate = nn.Parameter(torch.full((1,), 7.0))

    swap.set("sum")

    assert 7.0 == model.head.gate_a.item()


@pytest.mark.parametrize("mover", ["model", "both"])
def test_all_follow_a_move(mover):
    model, swap = with_borrower()
    swap.set("sum")
    model.double()
    if mover == "both":
        swap.double()
    assert torch.float64 is swap.variant("a")["head"].gate.dtype
    swap.set("b")
    assert torch.float64 is model.head.gate.dtype
    model.float()
    swap.set("sum")
    assert torch.float32 is model.head.gate_a.dtype


def test_a_failed_write_lends_nothing():
    model, swap = with_borrower()
    swap.set("a")
    before, state = snapshot(model), state_of(swap)
    for write in range(3):
        swap.on_write = failing_at(write)
        with pytest.raises(InjectedError):
            swap.set("sum")
        assert_unchanged(before, model, subject="set")
        assert (state, ()) == (state_of(swap), swap.lent)
    swap.on_write = None
    swap.set("sum")
    assert ("a", "b") == swap.lent


def test_lenders_are_neither_deleted_nor_renamed():
    _, swap = with_borrower()
    message = "Variant 'a' lends parameters to 'sum': expected one that lends to none. Delete what"
    for call in (lambda: swap.delete("a"), lambda: swap.rename("a", "z")):
        with pytest.raises(VariantError, match=message):
            call()

    swap.set("sum")
    swap.rename("sum", "all")
    assert ("a", "b") == swap.lent
    swap.delete("all", then="c")
    swap.delete("a")
    assert ("b", "c") == swap.names


def test_a_lender_must_exist_and_a_lent_name_is_taken():
    model, swap = with_borrower()
    with pytest.raises(VariantError, match="Variant 'x' does not exist"):
        swap.add("more", plan(swap, model, gates("stem")), loans={"x": {}})
    swap.set("sum")
    with pytest.raises(VariantError, match="Variant name 'a' is taken"):
        swap.add("a", plan(swap, model, gates("stem")))


def test_caught_up_variants_can_be_used_where_they_are():
    model, swap = with_borrower()
    model.double()

    assert torch.float64 is swap.caught_up("a")["head"].gate.dtype
    assert torch.float32 is swap.variant("b")["head"].gate.dtype


# -- underlays ---------------------------------------------------------------------------------------


class Shadow(nn.Linear):
    """A linear layer that gives ten times as much."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return 10 * super().forward(x)


def shadows(swap, *fqns):
    return {fqn: Shadow(swap.sites[fqn].module) for fqn in fqns}


def test_an_underlay_is_where_the_active_variant_is_not():
    model, swap = three_variants()
    base = snapshot(model)
    under = shadows(swap, "stem", "head")
    swap.underlay(under)
    assert (model.stem, model.head) == (under["stem"], under["head"])

    swap.set("a")
    assert {"layers.0.up": 1.0, "head": 1.0} == gate_values(model)
    assert model.stem is under["stem"]
    swap.set("b")
    assert {"stem": 2.0, "head": 2.0} == gate_values(model)
    swap.disable()
    assert (model.stem, model.head) == (under["stem"], under["head"])

    swap.underlay({})
    assert_unchanged(base, model, subject="underlay")


def test_planning_looks_through_an_underlay():
    model, swap = three_variants()
    original = model.stem
    swap.underlay(shadows(swap, "stem"))
    swap.add("d", plan(swap, model, gates("stem", 5.0)))
    swap.set("d")

    assert {"stem": 5.0} == gate_values(model)
    assert model.stem.inner is original


def test_an_underlay_takes_the_mode_of_what_it_replaces():
    model, swap = three_variants()
    model.train()
    under = shadows(swap, "stem")
    under["stem"].eval()

    swap.underlay(under)

    assert under["stem"].training


def test_an_underlay_that_fails_changes_nothing():
    model, swap = three_variants()
    swap.set("a")
    before = snapshot(model)
    with pytest.raises(VariantError, match=r"Underlay has modules for 'layers\.1'"):
        swap.underlay({"layers.1": nn.Identity()})
    swap.on_write = failing_at(1)
    with pytest.raises(InjectedError):
        swap.underlay(shadows(swap, "stem", "layers.0.up"))
    swap.on_write = None
    assert_unchanged(before, model, subject="underlay")

    mine = model.stem
    model.stem = nn.Identity()
    with pytest.raises(DriftError, match="Model under variants drifted at 'stem'"):
        swap.underlay(shadows(swap, "stem"))
    model.stem = mine
    assert_unchanged(before, model, subject="underlay")


def test_a_copy_has_an_underlay_of_its_own():
    holder = nn.ModuleDict()
    model, swap = three_variants()
    swap.underlay(shadows(swap, "stem"))
    holder.update({"model": model, "swap": swap})
    twin = copy.deepcopy(holder)

    twin["swap"].underlay({})

    assert type(twin["model"].stem) is nn.Linear
    assert type(model.stem) is Shadow
