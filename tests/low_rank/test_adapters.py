"""Several low-rank adapters on one model: switched, summed with weights, trained, recorded."""

import math

import pytest
import torch
from surgery_low_rank import LowRankLinear, merge_, plugin
from torch import nn

from surgery_core import ModelRecipe, OptionsError, Session, verify
from surgery_core.testing import assert_unchanged, snapshot

X = torch.linspace(-2, 2, 12).unflatten(0, (3, 4))
WEIGHTS = {"b.1": -0.4, "a": 0.7, "c": 1.3}
OPTIONS = {
    "a": {"r": 2, "lora_alpha": 3},
    "b.1": {"r": 1, "lora_alpha": 0.7},
    "c": {"r": 5, "lora_alpha": 2, "use_rslora": True},
}


def session():
    return Session([plugin], discover=False)


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False))


def variant(name, select="0"):
    return {"operation": "low_rank", "select": select, "options": OPTIONS[name]}


def edit(active, model=None, adapters=None):
    """Return a model with adapters of different ranks, factors and values."""
    adapters = adapters or {name: variant(name) for name in WEIGHTS}
    recipe = ModelRecipe.model_validate({"adapters": adapters, "active": active})
    return session().plan_recipe(model or net(), recipe).apply()


def train_(edited):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in edited.adapters:
            for tensor in edited.tensors(name).values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))


def delta(edited, name):
    """Return what an adapter adds to the weight, in float64."""
    module = edited.variant(name)["0"]
    options = OPTIONS[name]
    root = math.sqrt(options["r"]) if options.get("use_rslora") else options["r"]
    return options["lora_alpha"] / root * module.lora_B.double() @ module.lora_A.double()


def test_a_composition_is_the_weighted_sum_of_terms():
    """Against a layer whose weight has all of them, in float64."""
    edited = edit("a", nn.Sequential(nn.Linear(4, 5)).double())
    train_(edited)
    base = edited.plan.model[0]
    x = X.double()
    change = sum(weight * delta(edited, name) for name, weight in WEIGHTS.items())
    expected = nn.functional.linear(x, base.weight + change, base.bias)

    edited.set_active(WEIGHTS)

    torch.testing.assert_close(edited.model(x), expected, rtol=1e-12, atol=1e-12)
    with edited.disabled():
        assert 0.1 < (expected - edited.model(x)).abs().max()


def test_each_alone_and_none_are_as_without_the_others():
    model = net()
    expected = {"": model(X)}
    edited = edit("a", model)
    train_(edited)
    for name in WEIGHTS:
        module = edited.variant(name)["0"]
        alone = net()
        alone.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" not in k})
        recipe = {"rules": [variant(name)]}
        other = session().plan_recipe(alone, ModelRecipe.model_validate(recipe)).apply()
        other.load_("rules", {f"0.{n}": getattr(module, n) for n in ("lora_A", "lora_B")})
        expected[name] = alone(X)

    for name in ("c", "a", "b.1", "a"):
        edited.set_active(name)
        assert torch.equal(expected[name], model(X))
    with edited.disabled():
        assert torch.equal(expected[""], model(X))
    assert 4 == len({tuple(out.flatten().tolist()) for out in expected.values()})


def test_untrained_variants_change_nothing_together():
    edited = edit(WEIGHTS)

    with edited.disabled():
        expected = edited.model(X)

    assert torch.equal(expected, edited.model(X))


def test_one_variant_with_weight_one_is_itself():
    edited = edit("a")
    train_(edited)
    expected = edited.model(X)

    edited.set_active({"a": 1.0})

    assert torch.equal(expected, edited.model(X))


def test_the_order_does_not_matter():
    edited = edit(WEIGHTS)
    train_(edited)
    expected = edited.model(X)

    edited.set_active(dict(reversed(WEIGHTS.items())))

    assert torch.equal(expected, edited.model(X))


def test_a_composition_has_the_very_parameters_of_its_variants():
    """What is trained in it is trained in them."""
    edited = edit("a")
    train_(edited)
    own = {name: dict(edited.tensors(name)) for name in WEIGHTS}

    edited.set_active(WEIGHTS)
    edited.model(X).square().sum().backward()

    layer = edited.model[0]
    assert layer.get_parameter("lora_A_b%2E1") is own["b.1"]["0.lora_A"]
    for tensors in own.values():
        assert all(0 < tensor.grad.abs().sum() for tensor in tensors.values())
    edited.set_active("c")
    assert edited.model[0].lora_A is own["c"]["0.lora_A"]


def test_variants_may_be_for_other_layers():
    adapters = {"a": variant("a", "0"), "c": variant("c", "2")}
    edited = edit({"a": 2.0, "c": -1.0}, net().double(), adapters)
    train_(edited)
    a, c = edited.variant("a")["0"], edited.variant("c")["2"]

    x = X.double()
    middle = torch.tanh(a.overlay_base(x) + 2 * 1.5 * x @ a.lora_A.T @ a.lora_B.T)
    term = middle @ c.lora_A.T @ c.lora_B.T
    expected = c.overlay_base(middle) - 2 / math.sqrt(5) * term

    torch.testing.assert_close(edited.model(x), expected, rtol=1e-12, atol=1e-12)


def test_dropout_is_each_variants_own():
    dropped = {**variant("a"), "options": {**OPTIONS["a"], "lora_dropout": 0.5}}
    edited = edit({"a": 1.0, "c": 1.0}, None, {"a": dropped, "c": variant("c")})

    parts = edited.model[0].low_rank_parts

    assert [0.5, 0.0] == [part.dropout for part in parts]


def test_reverting_restores_the_base():
    model = net()
    before = snapshot(model)
    edited = edit(WEIGHTS, model)
    assert isinstance(model[0], LowRankLinear)

    edited.revert()

    assert_unchanged(before, model, subject="Apply, compose and revert")


def test_weights_must_be_finite():
    edited = edit("a")

    with pytest.raises(OptionsError, match="finite numbers, got 'c': nan"):
        edited.set_active({"a": 1.0, "c": math.nan})


@pytest.mark.parametrize("active", ["c", WEIGHTS], ids=["one", "several"])
def test_the_checks_of_the_core_pass(active):
    edited = edit(active)

    outcome = verify(edited, (X,), tiers=("structure", "identity", "revert", "gradients", "export"))

    assert outcome.is_ok, outcome.render()
    assert {"ok"} == {check.status for check in outcome.checks}


@pytest.mark.parametrize("active", ["b.1", WEIGHTS], ids=["one", "several"])
def test_a_record_computes_the_same(tmp_path, active):
    model = net()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    edited = edit(active, model)
    train_(edited)
    expected = model(X)

    session().save(edited, tmp_path)
    again = net()
    again.load_state_dict(state)
    loaded = session().load(again, tmp_path, base_check="error")

    assert torch.equal(expected, again(X))
    edited.set_active("c")
    loaded.set_active("c")
    assert torch.equal(model(X), again(X))


def test_each_has_a_group_of_an_optimizer_until_revert():
    edited = edit("a")
    train_(edited)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    for name, lr in (("a", 0.1), ("c", 0.01)):
        edited.add_to_optimizer(optimizer, [name], lr=lr)
    kept = {n: [t.detach().clone() for t in edited.tensors(n).values()] for n in WEIGHTS}

    edited.model(X).square().sum().backward()
    optimizer.step()

    changed = {
        name: not all(map(torch.equal, kept[name], edited.tensors(name).values()))
        for name in WEIGHTS
    }
    assert {"a": True, "b.1": False, "c": False} == changed
    assert [1.0, 0.1, 0.01] == [group["lr"] for group in optimizer.param_groups]
    edited.revert()
    assert 1 == len(optimizer.param_groups)


def test_stored_adapters_get_what_was_put_in_the_base_meanwhile():
    """`load_state_dict(assign=True)` puts other parameters there, and knows the active adapter's."""
    edited = edit("a", nn.Sequential(nn.Linear(4, 5)))
    train_(edited)
    fresh = nn.Linear(4, 5)
    state = {**edited.model.state_dict(), "0.weight": fresh.weight, "0.bias": fresh.bias}
    edited.model.load_state_dict(state, assign=True)

    for choice in ("b.1", {"b.1": 0.5, "c": 2.0}, "a"):
        edited.set_active(choice)
        weights = {choice: 1.0} if isinstance(choice, str) else choice
        change = sum(weight * delta(edited, name) for name, weight in weights.items())
        expected = nn.functional.linear(X.double(), fresh.weight + change, fresh.bias.double())
        torch.testing.assert_close(edited.model(X).double(), expected, rtol=1e-5, atol=1e-5)
    before = edited.model[0].weight
    edited.set_active("b.1")
    with merge_(edited):
        edited.set_active("c")
        assert edited.model[0].weight is before
        change = delta(edited, "c")
        expected = nn.functional.linear(X.double(), fresh.weight + change, fresh.bias.double())
        torch.testing.assert_close(edited.model(X).double(), expected, rtol=1e-5, atol=1e-5)
        edited.set_active("b.1")
