"""With gates open, outputs agree with a float64 reference written from the formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.drawn import batches, logits_in_one, logits_stepwise, shapes
from support.families import CLASSES, Shape, build, open_gates_, scaling, tokens
from support.reference import reference_model
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel

FLOAT64 = 1e-7
"""Relative to the largest logit: transformers computes norms in float32 in a float64 model too.
`tests/adaption_prompt/test_functional.py` compares the term alone, to 1e-12."""

FLOAT32 = 2e-5
"""Relative to the largest logit: three layers of float32 rounding."""


def reference_logits(family, shape, config, adapted, run, ids, mask):
    """Run the reference in float64 with the tensors of the adapter `default`."""
    base = build(family, shape, dtype=torch.float64, seed=1)
    adapters = {}
    for fqn, module in adapted.adapter_modules("default").items():
        gates = module.adaption_gate.detach().double().expand(shape.heads)
        adapters[base.get_submodule(fqn)] = (module.adaption_prompt.detach().double()[0], gates)
    with reference_model(
        base,
        adapters,
        scaling=scaling(family, shape),
        activation=config.gate_activation,
    ):
        return run(base, ids, mask)


def relative_error(actual, expected, mask):
    """Return the largest difference at positions that are not padding, over the largest value."""
    kept = mask.bool()
    return ((actual.double() - expected)[kept].abs().max() / expected[kept].abs().max()).item()


@pytest.mark.slow
@pytest.mark.parametrize("family", CLASSES)
@given(data=st.data())
def test_open_gates_agree_with_the_formula(family, data):
    shape = data.draw(shapes())
    # Not eager in float64: there transformers gives NaN for rows padded on the left.
    dtype, backend, tolerance = data.draw(
        st.sampled_from(
            [
                (torch.float64, "sdpa", FLOAT64),
                (torch.float32, "sdpa", FLOAT32),
                (torch.float32, "eager", FLOAT32),
            ]
        )
    )
    model = build(family, shape, backend=backend, dtype=dtype, seed=1)
    ids, mask = data.draw(batches())
    run = data.draw(st.sampled_from([logits_in_one, logits_stepwise]))
    config = AdaptionPromptConfig(
        adapter_len=data.draw(st.integers(1, 5)),
        adapter_layers=data.draw(st.integers(1, shape.layers)),
        gate=data.draw(st.sampled_from(["layer", "head"])),
        gate_activation=data.draw(st.sampled_from(["identity", "tanh"])),
    )
    adapted = AdaptionPromptModel(model, {"default": config}, "default")
    open_gates_(adapted.adapter_modules("default"), seed=data.draw(st.integers(0, 9)))

    with torch.no_grad():
        expected = reference_logits(family, shape, config, adapted, run, ids, mask)
        actual = run(adapted, ids, mask)

    assert actual.dtype is dtype
    assert relative_error(actual, expected, mask) < tolerance


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Three roundings to 8 and 11 bits a layer, on logits of size about one.
    [(torch.bfloat16, 0.06), (torch.float16, 0.006)],
)
def test_half_precision_stays_near_the_formula(family, dtype, tolerance):
    """Open gates in half precision are as near to float64 as the base alone is."""
    shape = Shape(attention_bias=True)
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    model = build(family, shape, dtype=dtype, seed=1)
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=3, gate="head")
    adapted = AdaptionPromptModel(model, {"default": config}, "default")
    open_gates_(adapted.adapter_modules("default"))

    with torch.no_grad():
        expected = reference_logits(family, shape, config, adapted, logits_in_one, ids, mask)
        actual = logits_in_one(adapted, ids, mask)

    assert actual.dtype is dtype
    assert relative_error(actual, expected, mask) < tolerance


@pytest.mark.parametrize("family", CLASSES)
def test_exchanged_heads_are_noticed(family):
    """The reference tells gates of different heads apart, so the tests above can fail."""
    shape = Shape()
    ids = tokens()
    mask = torch.ones_like(ids)
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=3, gate="head")
    adapted = AdaptionPromptModel(
        build(family, shape, dtype=torch.float64, seed=1), {"default": config}, "default"
    )
    open_gates_(adapted.adapter_modules("default"))
    with torch.no_grad():
        expected = reference_logits(family, shape, config, adapted, logits_in_one, ids, mask)
        for module in adapted.adapter_modules("default").values():
            module.adaption_gate.copy_(module.adaption_gate.flip(0))
        actual = logits_in_one(adapted, ids, mask)

    assert relative_error(actual, expected, mask) > 1e-3
