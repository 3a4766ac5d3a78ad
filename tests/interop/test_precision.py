"""In each dtype, under autocast and with very large gates, the term is what the formula says."""

import pytest
import torch
from support.adapted import (
    FAMILIES,
    FLOAT32,
    adapt,
    build,
    flip_gates_,
    reference_logits,
    relative_error,
)
from support.families import Shape, tokens
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from surgery_adaption_prompt.functional import gated_prompt_attention

SHAPE = Shape()
TOLERANCES = {torch.bfloat16: 0.05, torch.float16: 0.006}
"""Relative to the largest logit: a rounding to 8, or 11, bits in each of some twenty steps."""

GRADIENTS = {
    torch.bfloat16: 2 * TOLERANCES[torch.bfloat16],
    torch.float16: 4 * TOLERANCES[torch.float16],
}
"""Forward and backward: twice the steps. In float16, over twelve seeds of Gemma 3, one gate in fifty is
off by 0.02, at a median of 0.004; the base's own rounding is most of it."""

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 0.01, torch.float16: 0.001}
"""Relative to the largest value of one term: the same for one product or two."""


def logits(model, ids):
    return model(ids, use_cache=False).logits


def under_autocast(dtype):
    return torch.autocast("cpu", dtype=dtype)


# -- dtypes of base and adapter -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_dtype", "adapter_dtype", "expected_dtype"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.bfloat16, "bfloat16", torch.bfloat16),
        (torch.float16, "float16", torch.float16),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float64", torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_pair_of_dtypes_stays_near_the_formula(
    family, base_dtype, adapter_dtype, expected_dtype
):
    """The reference has the base's and the adapter's rounded values, so that only sums differ."""
    ids = tokens(2, 9)
    model = build(family, dtype=base_dtype)
    with torch.no_grad():
        unadapted = logits(model, ids)
        adapted = adapt(model, dtype=adapter_dtype)
        opened = logits(adapted, ids)
        with adapted.disable_adapter():
            disabled = logits(adapted, ids)
    base = build(family, dtype=base_dtype).double()
    expected = reference_logits(adapted, base, ids, family=family)
    parameters = [
        parameter
        for module in adapted.adapter_modules("default").values()
        for parameter in (module.adaption_prompt, module.adaption_gate)
    ]

    assert {expected_dtype} == {parameter.dtype for parameter in parameters}
    assert base_dtype is opened.dtype
    # A base in float32 multiplies the adapter's values in float32, whatever they are kept in.
    assert relative_error(opened, expected) < TOLERANCES.get(base_dtype, FLOAT32)
    assert torch.equal(unadapted, disabled)
    with torch.no_grad():
        flip_gates_(adapted)
        assert relative_error(logits(adapted, ids), expected) > 0.05


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_adapter_leaves_half_precision_bit_for_bit(family, dtype):
    ids = tokens(2, 9)
    model = build(family, dtype=dtype)
    with torch.no_grad():
        expected = logits(model, ids)
        config = AdaptionPromptConfig(adapter_len=4, adapter_layers=3, gate="head")
        adapted = AdaptionPromptModel(model, {"default": config}, "default")

        assert torch.equal(expected, logits(adapted, ids))


# -- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_under_autocast_stay_near_the_formula(family, dtype):
    ids = tokens(2, 9)
    model = build(family)
    adapted = adapt(model)
    expected = reference_logits(adapted, build(family, dtype=torch.float64), ids, family=family)

    with torch.no_grad(), under_autocast(dtype):
        actual = logits(adapted, ids)
        with adapted.disable_adapter():
            disabled = logits(adapted, ids)
        adapted.unload()
        base = logits(model.requires_grad_(False), ids)
        config = AdaptionPromptConfig(adapter_len=4, adapter_layers=3, gate="head")
        untrained = logits(AdaptionPromptModel(model, {"a": config}, "a"), ids)

    assert dtype is actual.dtype
    assert relative_error(actual, expected) < TOLERANCES[dtype]
    assert torch.equal(base, disabled)
    assert torch.equal(base, untrained)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_under_autocast_are_float32_and_near_those_without(family, dtype):
    ids = tokens(2, 9)

    def gradients(*, autocast):
        torch.manual_seed(0)
        adapted = adapt(build(family))
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            loss = adapted(ids, labels=ids, use_cache=False).loss
        loss.backward()
        modules = adapted.adapter_modules("default").values()
        return [p.grad for m in modules for p in (m.adaption_prompt, m.adaption_gate)]

    exact = gradients(autocast=False)
    actual = gradients(autocast=True)

    assert 4 == len(actual)
    for found, expected in zip(actual, exact, strict=True):
        assert torch.float32 is found.dtype
        assert expected.any()
        difference = (found - expected).norm() / expected.norm()
        assert difference < GRADIENTS[dtype]


@pytest.mark.parametrize("gate", [0.5, 1e5])
def test_autocast_does_not_narrow_the_terms_products(gate):
    """Logits and gated weights beyond float16's range stay in float32, as without autocast."""
    generator = torch.Generator().manual_seed(0)
    query, key = (
        (torch.randn(size, generator=generator) * 200).half() for size in [(2, 4, 5, 8), (2, 6, 8)]
    )
    value = torch.randn(2, 6, 8, generator=generator).half() * 0.1
    gates = gate * torch.tensor([1.0, -0.5, 0.7, -0.3])
    assert (query[:, :2] @ key[0].T).isinf().any()

    expected = gated_prompt_attention(query, key, value, gates, scaling=0.3)
    with under_autocast(torch.float16):
        actual = gated_prompt_attention(query, key, value, gates, scaling=0.3)

    assert torch.isfinite(expected).all()
    assert torch.equal(expected, actual)


# -- large gates ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e4),
        (torch.float32, 1e30),
        (torch.bfloat16, 1e4),
        (torch.bfloat16, 1e30),
        (torch.float16, 1e4),
        (torch.float16, torch.finfo(torch.float16).max),
        # Kept in float32, a gate may exceed what the base's float16 can hold.
        (torch.float16, 1e5),
        (torch.float16, 1e6),
    ],
    ids=str,
)
@pytest.mark.parametrize("value_size", [0.1, 1.0])
def test_large_gates_overflow_only_where_the_formula_does(dtype, size, value_size):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in [(2, 4, 5, 8), (2, 6, 8), (2, 6, 8)]
    )
    value *= value_size
    gates = size * torch.tensor([1.0, -1.0, 0.5, -0.25])

    exact = gated_prompt_attention(
        query.double(), key.double(), value.double(), gates.double(), scaling=0.3
    )
    actual = gated_prompt_attention(query, key, value, gates, scaling=0.3).double()

    assert torch.isfinite(exact).all()
    assert not actual.isnan().any()
    # What the dtype rounds to infinity, and its sign.
    rounded = exact.to(dtype).double()
    assert torch.equal(rounded.isinf(), actual.isinf())
    assert torch.equal(rounded[rounded.isinf()], actual[actual.isinf()])
    held = rounded.isfinite()
    error = (actual - exact)[held].abs().max() / exact[held].abs().max()
    assert error < ROUNDING[dtype]


def test_the_largest_gates_of_those_tests_do_overflow_float16():
    """A term of 1e6 times values around one is beyond 65504; the test above has both kinds."""
    value = torch.ones(1, 2, 4, dtype=torch.float16)
    query = torch.ones(1, 2, 3, 4, dtype=torch.float16)

    term = gated_prompt_attention(query, value, value, torch.tensor([1e6, -1e4]), scaling=1.0)

    assert (term[:, :, 0] == torch.inf).all()
    assert (term[:, :, 1] == -1e4).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "size", "tolerance"),
    [
        (torch.float32, 1e4, FLOAT32),
        # As in the tests above; the residual stream holds sums of some dozen terms.
        (torch.bfloat16, 1e4, TOLERANCES[torch.bfloat16]),
        (torch.float16, 1e3, TOLERANCES[torch.float16]),
    ],
    ids=str,
)
def test_models_with_large_gates_agree_with_the_formula(family, dtype, size, tolerance):
    ids = tokens(2, 9)
    adapted = adapt(build(family, dtype=dtype), size=size)
    base = build(family, dtype=dtype).double()

    expected = reference_logits(adapted, base, ids, family=family)
    with torch.no_grad():
        actual = logits(adapted, ids)

    assert relative_error(actual, expected) < tolerance


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 1e30), (torch.bfloat16, 1e30), (torch.float16, 1e4)],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_with_the_largest_gates_agrees_with_the_formula(family, dtype, size, trains):
    """What leaves the adapted module is exact; the norms after it square such values, 1e60.

    RMS norms then divide by infinity, which gives zero. A layer norm gives NaN, as it does on
    hidden states of that size without any adapter.
    """
    ids = tokens(2, 9)
    adapted = adapt(build(family, dtype=dtype), size=size)
    base = build(family, dtype=dtype).double()
    first, module = next(iter(adapted.adapter_modules("default").items()))
    outputs = []
    for attention in (module, base.get_submodule(first)):
        attention.register_forward_hook(lambda _, __, output: outputs.append(output[0].detach()))

    with torch.set_grad_enabled(trains):
        actual_logits = logits(adapted, ids)
    reference_logits(adapted, base, ids, family=family)
    actual, expected = outputs

    assert expected.abs().max() > size / 10
    assert relative_error(actual, expected) < TOLERANCES.get(dtype, FLOAT32)
    if family != "gpt_neox":
        assert torch.isfinite(actual_logits).all()
    elif size == 1e30:
        assert torch.nn.functional.layer_norm(actual, actual.shape[-1:]).isnan().any()


@pytest.mark.parametrize("family", FAMILIES)
def test_tanh_bounds_the_largest_gates(family):
    """Under tanh, a gate of 1e30 is one, and the whole model is near the formula."""
    ids = tokens(2, 9)
    adapted = adapt(build(family), size=1e30, gate_activation="tanh")
    saturated = adapt(build(family), size=1e30)
    with torch.no_grad():
        for fqn, module in saturated.adapter_modules("default").items():
            twin = adapted.adapter_modules("default")[fqn]
            module.adaption_prompt.copy_(twin.adaption_prompt)
            module.adaption_gate.copy_(twin.adaption_gate.sign())
        actual = logits(adapted, ids)
    base = build(family, dtype=torch.float64)

    expected = reference_logits(saturated, base, ids, family=family)

    assert relative_error(actual, expected) < FLOAT32
