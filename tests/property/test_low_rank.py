"""Low-rank terms are exact at first, near the formula later, and merged exactly back, whatever the values."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from surgery_low_rank import LowRankLinear, merge_, plugin
from torch import nn

from surgery_core import ModelRecipe, Rule, Session
from surgery_core.testing import assert_unchanged, snapshot

DTYPES = ("float64", "float32", "float16", "bfloat16")
sizes = st.integers(1, 6)
seeds = st.integers(0, 2**16)


def session():
    return Session([plugin], discover=False)


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


options = st.fixed_dictionaries(
    {
        "r": st.integers(1, 7),
        "lora_alpha": st.one_of(st.integers(1, 32), st.floats(-8, 8)),
        "use_rslora": st.booleans(),
    }
)


def train_(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (model[0].lora_A, model[0].lora_B):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


@given(layers(), options, st.sampled_from((None, *DTYPES)))
def test_an_untrained_layer_gives_equal_outputs(layer, options, own):
    base, x = layer
    model = nn.Sequential(base)
    before, expected = snapshot(model), base(x)
    rule = Rule(operation="low_rank", options={**options, "dtype": own})

    surgery = session().plan(model, [rule]).apply()

    assert isinstance(model[0], LowRankLinear)
    assert torch.equal(expected, model(x))
    assert expected.dtype is model(x).dtype
    surgery.revert()
    assert_unchanged(before, model, subject="Apply and revert")


@given(layers(), options, seeds)
def test_a_trained_layer_is_near_the_formula_in_float64(layer, options, seed):
    """The error is a few roundings of the largest sum there can be."""
    base, x = layer
    model = nn.Sequential(base)
    session().plan(model, [Rule(operation="low_rank", options=options)]).apply()
    train_(model, seed)
    weight, wide = base.weight.double(), x.double()
    own = base.bias.double() if base.bias is not None else torch.zeros(())
    a, b = model[0].lora_A.double(), model[0].lora_B.double()
    r = options["r"]
    scaling = options["lora_alpha"] / (r**0.5 if options["use_rslora"] else r)

    expected = wide @ weight.T + own + scaling * (wide @ a.T @ b.T)
    size = wide.abs() @ weight.T.abs() + own.abs()
    size = size + abs(scaling) * (wide.abs() @ a.T.abs() @ b.T.abs())

    info = torch.finfo(x.dtype)
    bound = 16 * info.eps * size + 16 * info.smallest_normal
    assert bool(((model(x).double() - expected).abs() <= bound).all())


@given(
    layers(),
    options,
    st.dictionaries(st.sampled_from(("a", "b", "c.1")), st.floats(-2, 2), min_size=1),
)
def test_untrained_variants_together_change_nothing(layer, options, weights):
    base, x = layer
    model = nn.Sequential(base)
    expected = base(x)
    variant = {"operation": "low_rank", "options": options}
    recipe = {"adapters": dict.fromkeys(weights, variant), "active": weights}

    session().plan_recipe(model, ModelRecipe.model_validate(recipe)).apply()

    assert torch.equal(expected, model(x))


@given(layers(), options, seeds)
def test_a_merge_is_near_the_sum_and_taken_back_exactly(layer, options, seed):
    """The weight is the sum in float64 up to two roundings in its dtype."""
    base, x = layer
    model = nn.Sequential(base)
    session().plan(model, [Rule(operation="low_rank", options=options)]).apply()
    train_(model, seed)
    before, output = snapshot(model), model(x)
    a, b = model[0].lora_A.double(), model[0].lora_B.double()
    delta, size = b @ a, b.abs() @ a.abs()
    r = options["r"]
    scaling = options["lora_alpha"] / (r**0.5 if options["use_rslora"] else r)
    weight = base.weight.double()

    with merge_({"0": model[0]}):
        info = torch.finfo(x.dtype)
        bound = 16 * info.eps * (weight.abs() + abs(scaling) * size) + 16 * info.smallest_normal
        error = (model[0].weight.double() - (weight + scaling * delta)).abs()
        assert bool((error <= bound).all())

    assert_unchanged(before, model, subject="Merge and unmerge")
    assert torch.equal(output, model(x))
