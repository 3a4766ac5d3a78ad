"""Scales and biases, and copies of norms, are exact whatever the sizes, dtypes and values."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from surgery_scale_shift import ScaledLinear, plugin
from torch import nn

from surgery_core import ModelRecipe, Rule, Session
from surgery_core.testing import assert_unchanged, snapshot

DTYPES = ("float64", "float32", "float16", "bfloat16")
FORMS = ("paper", "chat65b")
sizes = st.integers(1, 6)
seeds = st.integers(0, 2**16)


def session():
    return Session([plugin], discover=False)


def same_bits(a, b):
    """Tell whether two tensors are the same, signs of zeros included."""
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype is b.dtype and torch.equal(a.view(ints), b.view(ints))


def values(shape, generator, dtype):
    """Return values of all sizes, down to subnormal ones, with zeros of both signs."""
    exponents = torch.randint(-24, 5, shape, generator=generator)
    found = torch.randn(shape, generator=generator) * torch.exp2(exponents.float())
    found[torch.rand(shape, generator=generator) < 0.2] = 0.0
    found[torch.rand(shape, generator=generator) < 0.1] = -0.0
    return found.to(dtype)


@st.composite
def layers(draw):
    """Draw a linear layer and an input for it."""
    dtype = getattr(torch, draw(st.sampled_from(DTYPES)))
    generator = torch.Generator().manual_seed(draw(seeds))
    base = nn.Linear(draw(sizes), draw(sizes), bias=draw(st.booleans())).to(dtype)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(values(parameter.shape, generator, dtype))
    shape = (*draw(st.lists(st.integers(0, 3), max_size=2)), base.in_features)
    return base, values(shape, generator, dtype)


@given(layers(), st.sampled_from(FORMS), st.sampled_from((None, *DTYPES)))
def test_an_untrained_layer_gives_the_very_bits(layer, form, own):
    base, x = layer
    model = nn.Sequential(base)
    before, expected = snapshot(model), base(x)
    rule = Rule(operation="scale_shift", options={"form": form, "dtype": own})

    surgery = session().plan(model, [rule]).apply()

    assert isinstance(model[0], ScaledLinear)
    assert same_bits(expected, model(x))
    surgery.revert()
    assert_unchanged(before, model, subject="Apply and revert")


@given(layers(), st.sampled_from(FORMS), seeds)
def test_a_trained_layer_is_near_the_formula_in_float64(layer, form, seed):
    """The error is a few roundings of the largest sum there can be."""
    base, x = layer
    model = nn.Sequential(base)
    session().plan(model, [Rule(operation="scale_shift", options={"form": form})]).apply()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (model[0].adapter_scale, model[0].adapter_bias):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    weight, wide = base.weight.double(), x.double()
    own = base.bias.double() if base.bias is not None else 0.0
    scale, bias = model[0].adapter_scale.double(), model[0].adapter_bias.double()

    if form == "paper":
        expected = scale * (wide @ weight.T + own + bias)
        size = scale.abs() * (wide.abs() @ weight.T.abs() + abs(own) + bias.abs())
    else:
        expected = (scale * wide) @ weight.T + own + bias
        size = (scale * wide).abs() @ weight.T.abs() + abs(own) + bias.abs()

    info = torch.finfo(x.dtype)
    bound = 12 * info.eps * size + 12 * info.smallest_normal
    assert bool(((model(x).double() - expected).abs() <= bound).all())


@given(
    layers(),
    st.sampled_from(FORMS),
    st.dictionaries(st.sampled_from(("a", "b", "c.1")), st.floats(-2, 2), min_size=1),
)
def test_untrained_variants_together_change_nothing(layer, form, weights):
    base, x = layer
    model = nn.Sequential(base)
    expected = base(x)
    variant = {"operation": "scale_shift", "options": {"form": form}}
    recipe = {"adapters": dict.fromkeys(weights, variant), "active": weights}

    session().plan_recipe(model, ModelRecipe.model_validate(recipe)).apply()

    assert torch.equal(expected, model(x))


@given(
    st.sampled_from((nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d)),
    st.integers(1, 6),
    st.sampled_from(DTYPES),
    st.sampled_from((None, "float64")),
    st.booleans(),
    seeds,
)
def test_an_untrained_norm_gives_the_very_bits(cls, size, dtype, own, is_training, seed):
    dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(cls(size, eps=1e-3)).to(dtype).train(is_training)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(values(parameter.shape, generator, dtype))
    x = values((4, size), generator, dtype)
    before = snapshot(model)

    surgery = session().plan(model, [Rule(operation="tuned_norm", options={"dtype": own})]).apply()
    actual = model(x)

    surgery.revert()
    assert_unchanged(before, model, subject="Apply, run and revert")
    assert same_bits(model(x), actual)
