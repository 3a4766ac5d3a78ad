"""Variants by row and by thread, and with weights, on toys."""

import asyncio
import copy
import pickle
import threading

import pytest
import torch
from core.edits import recipe
from core.shared_toys import FactorOperation, Offset, OffsetOperation
from core.toys import Net, Shift, example, session
from torch import nn
from torch.utils.checkpoint import checkpoint

from surgery_core import BASE, ContractError, OptionsError, RecipeError, VariantError
from surgery_core.testing import InjectedError, assert_unchanged, failing_at, snapshot

X = example(rows=6)


def offset(value, select="layers.0.up"):
    return {"operation": "offset", "select": select, "options": {"value": value}}


def factor(value, select="head"):
    return {"operation": "factor", "select": select, "options": {"value": value}}


ADAPTERS = {
    "low": offset(0.5),
    "high": offset(-2.0, "layers.{0..1}.up"),
    "both": {"rules": [offset(0.75, "layers.*.up"), factor(0.25)]},
    "shift": {"operation": "shift", "select": "layers.2.down"},
}


def edited(model=None, *, active="low", on_write=None, **changes):
    known = session(OffsetOperation(), FactorOperation(), Shift())
    made = recipe(rules=None, adapters=ADAPTERS, active=active, **changes)
    model = Net().eval() if model is None else model
    return known.plan_recipe(model, made).apply(on_write=on_write)


def reference(model, x, choice):
    """Compute in float64 what a choice gives, without any adapter's code."""
    weights = {} if choice == BASE else {choice: 1.0} if isinstance(choice, str) else choice
    values = {"low": ([0.5, 0, 0], 0), "high": ([-2, -2, 0], 0), "both": ([0.75] * 3, 0.25)}
    offsets = [sum(w * values[n][0][i] for n, w in weights.items()) for i in range(3)]
    scale = 1 + sum(w * values[n][1] for n, w in weights.items())
    plain = copy.deepcopy(model).double()
    x = plain.stem(x.double())
    for i, block in enumerate(plain.layers):
        x = x + block.down(torch.relu(block.norm(block.up(x) + offsets[i])))
    return plain.head(x) * scale


ROWS = ["both", BASE, {"low": 0.5, "high": -1.5}, "low", {"both": -2.0}, "both"]


def test_each_row_gets_its_own_whatever_is_active():
    plain = Net().eval()
    found = edited(copy.deepcopy(plain), active="high")
    alone = {}
    for name in ("low", "high", "both"):
        found.set_active(name)
        alone[name] = found.model(X)
    found.set_active("high")
    with found.activated(ROWS):
        rows = found.model(X)

    for row, choice in enumerate(ROWS):
        expected = reference(plain, X, choice)[row]
        torch.testing.assert_close(rows[row].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows[3], alone["low"][3], rtol=1e-6, atol=1e-6)
    assert torch.equal(rows[1], plain(X)[1])
    assert torch.equal(alone["high"], found.model(X))


def test_one_choice_is_for_a_whole_batch_and_a_row_for_several_in_succession():
    plain = Net().eval()
    found = edited(copy.deepcopy(plain))
    for choice in ("both", BASE, {"low": 2.0, "both": 0.5}):
        with found.activated(choice):
            expected = reference(plain, X, choice)
            torch.testing.assert_close(found.model(X).double(), expected, rtol=1e-5, atol=1e-5)
    with found.activated([BASE, "high"]):
        mixed = found.model(X).double()
    expected = [reference(plain, X, choice) for choice in (BASE, "high")]
    torch.testing.assert_close(mixed[:3], expected[0][:3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[3:], expected[1][3:], rtol=1e-5, atol=1e-5)
    with (
        found.activated(["low", "high", "low", BASE]),
        pytest.raises(OptionsError, match=r"Batch has 6 rows: expected 4"),
    ):
        found.model(X)


def test_nothing_stays_in_the_model_and_contexts_nest():
    model = Net().eval()
    found = edited(model)
    before = snapshot(model)
    with found.activated("high"):
        assert isinstance(model.layers[1].up, Offset)
        inner = found.model(X)
        with found.activated(BASE):
            base = found.model(X)
        assert torch.equal(inner, found.model(X))
        with pytest.raises(VariantError, match="'high' is in use by a thread"):
            found.revert()
    assert_unchanged(before, model, subject="A context")
    assert type(model.layers[1].up) is nn.Linear

    with found.disabled():
        assert torch.equal(base, found.model(X))
        with found.activated("high"):
            assert torch.equal(base, found.model(X))
    found.revert()
    assert torch.equal(base, model(X))
    with pytest.raises(VariantError, match="reverted already"), found.activated("low"):
        pass


def test_the_active_one_may_change_meanwhile_for_others_only():
    found = edited()
    with found.activated("high"):
        expected = found.model(X)
        for choice in ("both", {"low": 0.5, "both": 0.5}, "low"):
            found.set_active(choice)
            assert torch.equal(expected, found.model(X))
    active = found.model(X)
    assert not torch.equal(expected, active)
    with found.activated("low"):
        assert torch.equal(active, found.model(X))


def test_threads_and_tasks_do_not_mix():
    found = edited(active="low")
    expected = {}
    for name in ("low", "high", "both"):
        found.set_active(name)
        expected[name] = found.model(X)
    barrier, wrong = threading.Barrier(3, timeout=30), []

    def use(name):
        with found.activated(name):
            for _ in range(20):
                barrier.wait()
                if not torch.equal(expected[name], found.model(X)):
                    wrong.append(name)

    threads = [threading.Thread(target=use, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    async def task(name):
        with found.activated(name):
            await asyncio.sleep(0)
            return torch.equal(expected[name], found.model(X))

    async def tasks():
        return await asyncio.gather(*map(task, expected))

    assert not wrong
    assert all(asyncio.run(tasks()))
    assert not found.sharing.is_in_force


def test_adapters_that_cannot_be_shared_are_refused_and_nothing_changes():
    model = Net().eval()
    found = edited(model)
    before = snapshot(model)
    with (
        pytest.raises(
            ContractError, match=r"'shift' cannot be used beside others: .* got Shifted, made"
        ),
        found.activated(["low", "shift"]),
    ):
        pass
    with pytest.raises(OptionsError, match="Selection has no rows"), found.activated([]):
        pass
    with pytest.raises(OptionsError, match="finite"), found.activated({"low": float("nan")}):
        pass
    with (
        pytest.raises(VariantError, match="'lo', 'x' does not exist"),
        found.activated(["x", "lo"]),
    ):
        pass
    with (
        found.activated("high"),
        pytest.raises(ContractError, match="'shift' cannot be active while"),
    ):
        found.set_active("shift")
    assert_unchanged(before, model, subject="A refused context")

    found.set_active("shift")
    before = snapshot(model)
    with (
        pytest.raises(ContractError, match=r"'shift' cannot be active while .* got Shifted at"),
        found.activated("low"),
    ):
        pass
    assert_unchanged(before, model, subject="A refused context")


def test_two_operations_at_one_place_are_refused():
    known = session(OffsetOperation(), FactorOperation())
    adapters = {"o": offset(1.0, "head"), "f": factor(1.0)}
    model = Net().eval()
    found = known.plan_recipe(model, recipe(rules=None, adapters=adapters, active="o")).apply()

    with (
        pytest.raises(
            ContractError, match="expected modules of 'factor' at 'head', got one of 'off"
        ),
        found.activated(["o", "f", BASE]),
    ):
        pass
    with found.activated("f"):
        assert torch.equal(found.model(X), 2 * model.head.overlay_base(_hidden(model)))


def _hidden(model):
    x = model.stem(X)
    for layer in model.layers:
        x = layer(x)
    return x


def test_a_write_that_fails_leaves_the_model_as_it_was():
    model = Net().eval()
    found = edited(model)
    before = snapshot(model)
    found.swap_state.on_write = failing_at(1)
    with pytest.raises(InjectedError), found.activated("both"):
        pass
    assert not found.sharing.is_in_force
    assert_unchanged(before, model, subject="A failed context")
    found.swap_state.on_write = None
    with found.activated("both"):
        assert found.sharing.is_in_force


def test_copies_and_pickles_made_inside_are_nobodys():
    model = Net().eval()
    found = edited(model)
    with found.activated("high"):
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        expected = found.model(X)
    assert copied.layers[0].up.sharing is None
    assert pickled.layers[0].up.sharing is None
    # They have the active adapter, and listeners that nobody asks.
    assert torch.equal(found.model(X), copied(X))
    assert torch.equal(found.model(X), pickled(X))
    assert not torch.equal(expected, copied(X))


def test_a_checkpointed_forward_is_computed_again_with_its_own_adapters():
    found = edited(freeze=True)
    layers = found.model.layers

    def run(x):
        for layer in layers:
            x = layer(x)
        return x

    def gradients(choices, *, again):
        with found.activated(choices):
            context_fn = found.recompute_contexts if again else None
            y = (
                checkpoint(run, X, use_reentrant=False, context_fn=context_fn) if again else run(X)
            ).sum()
        found.set_active("low" if again else "both")
        for parameter in found.added_parameters():
            parameter.grad = None
        y.backward()
        return [p.grad for p in found.added_parameters() if p.grad is not None]

    expected = gradients(ROWS, again=False)
    actual = gradients(ROWS, again=True)
    assert len(expected) == len(actual) == 6
    assert all(map(torch.equal, expected, actual))


def test_adapters_of_several_rules_are_active_together_with_weights():
    plain = Net().eval()
    model = copy.deepcopy(plain)
    found = edited(model, active={"both": 2.0, "high": -0.5})
    expected = reference(plain, X, {"both": 2.0, "high": -0.5})
    torch.testing.assert_close(found.model(X).double(), expected, rtol=1e-5, atol=1e-5)

    # What is trained while they are active is the adapters' own.
    for parameter in found.added_parameters(["both"]):
        parameter.data.add_(1.0)
    trained = found.model(X)
    found.set_active("both")
    assert 1.75 == model.layers[2].up.offset[0].item()
    assert 1.25 == model.head.factor[0].item()
    found.set_active({"both": 2.0, "high": -0.5})
    assert torch.equal(trained, found.model(X))
    with pytest.raises(
        ContractError, match="Operation 'shift' cannot have 'shift' active together"
    ):
        found.set_active({"shift": 1.0, "both": 1.0})
    assert torch.equal(trained, found.model(X))
    found.revert()
    assert torch.equal(plain(X), model(X))


def test_no_adapter_can_have_the_name_of_the_base():
    with pytest.raises((RecipeError, ValueError), match="stands for the model without an adapter"):
        recipe(adapters={BASE: offset(1.0)}, active=None)
