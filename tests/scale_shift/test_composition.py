"""Several scale-and-shift variants at once: the weighted sum of what each changes."""

import math

import pytest
import torch
from surgery_scale_shift import ScaledLinear, plugin
from torch import nn

from surgery_core import ContractError, ModelRecipe, OptionsError, Session
from surgery_core.testing import assert_unchanged, snapshot

X = torch.linspace(-2, 2, 12).unflatten(0, (3, 4))
WEIGHTS = {"b.1": -0.4, "a": 0.7, "c": 1.3}
every_form = pytest.mark.parametrize("form", ["paper", "chat65b"])


def variant(form, select="0", operation="scale_shift"):
    options = {"form": form} if operation == "scale_shift" else {}
    return {"operation": operation, "select": select, "options": options}


def edit(adapters, active, model=None):
    """Return a model of a layer and a norm with adapters of different values."""
    if model is None:
        model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5))
    recipe = ModelRecipe.model_validate({"adapters": adapters, "active": active})
    return Session([plugin], discover=False).plan_recipe(model, recipe).apply()


def train_(edited):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in edited.adapters:
            for tensor in edited.tensors(name).values():
                tensor.add_(torch.randn(tensor.shape, generator=generator))


@every_form
def test_a_composition_is_the_weighted_sum_of_changes(form):
    """Each is found by running it alone, in float64; what stays is the layer's output."""
    edited = edit({name: variant(form) for name in WEIGHTS}, "a", nn.Sequential(nn.Linear(4, 5)))
    edited.model.double()
    train_(edited)
    x = X.double()
    with edited.disabled():
        base = edited.model(x)
    expected = base.clone()
    for name, weight in WEIGHTS.items():
        edited.set_active(name)
        expected += weight * (edited.model(x) - base)

    edited.set_active(WEIGHTS)

    torch.testing.assert_close(edited.model(x), expected, rtol=1e-12, atol=1e-12)
    assert 0.1 < (expected - base).abs().max()


@every_form
def test_untrained_variants_change_nothing_together(form):
    edited = edit({name: variant(form) for name in WEIGHTS}, WEIGHTS)

    with edited.disabled():
        expected = edited.model(X)

    assert torch.equal(expected, edited.model(X))


@every_form
def test_one_variant_with_weight_one_is_itself(form):
    edited = edit({"a": variant(form)}, "a")
    train_(edited)
    expected = edited.model(X)

    edited.set_active({"a": 1.0})

    assert torch.equal(expected, edited.model(X))


@every_form
def test_the_order_does_not_matter(form):
    edited = edit({name: variant(form) for name in WEIGHTS}, WEIGHTS)
    train_(edited)
    expected = edited.model(X)

    edited.set_active(dict(reversed(WEIGHTS.items())))

    assert torch.equal(expected, edited.model(X))


def test_variants_may_be_for_other_layers():
    """Forms too may differ where no layer is in both."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    adapters = {"a": variant("paper", "0"), "b": variant("chat65b", "1")}
    edited = edit(adapters, {"a": 1.0, "b": 1.0}, model)
    train_(edited)
    x = X.double()

    a, b = edited.variant("a")["0"], edited.variant("b")["1"]

    middle = a.adapter_scale * (nn.functional.linear(x, a.weight, a.bias) + a.adapter_bias)
    expected = nn.functional.linear(b.adapter_scale * middle, b.weight, b.bias) + b.adapter_bias
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_gradients_reach_every_variant():
    edited = edit({name: variant("paper") for name in WEIGHTS}, WEIGHTS)
    train_(edited)

    edited.model(X).square().sum().backward()

    for name in WEIGHTS:
        edited.set_active(name)
        for tensor in edited.tensors(name).values():
            assert tensor.grad.abs().sum() > 0


def test_reverting_restores_the_base():
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5))
    before = snapshot(model)
    edited = edit({name: variant("paper") for name in WEIGHTS}, WEIGHTS, model)
    assert isinstance(model[0], ScaledLinear)
    assert {"weight", "bias", "adapter_scale_b%2E1"} < set(dict(model[0].named_parameters()))

    edited.revert()

    assert_unchanged(before, model, subject="Apply, compose and revert")


def test_both_forms_at_one_layer_are_refused():
    with pytest.raises(ContractError) as caught:
        edit({"a": variant("paper"), "b": variant("chat65b")}, {"a": 1.0, "b": 1.0})

    assert str(caught.value) == (
        "Variants 'a', 'b' cannot be active together at '0': expected one form, got 'paper' and "
        "'chat65b'. Make one of them the active one."
    )


def test_weights_must_be_finite():
    edited = edit({"a": variant("paper"), "b": variant("paper")}, "a")

    with pytest.raises(OptionsError, match="finite numbers, got 'b': nan"):
        edited.set_active({"a": 1.0, "b": math.nan})


def test_norms_cannot_be_composed():
    adapters = {name: variant("paper", "1", "tuned_norm") for name in "ab"}

    with pytest.raises(ContractError, match="'tuned_norm' cannot have 'a', 'b' active together"):
        edit(adapters, {"a": 1.0, "b": 1.0})
