"""An untrained or disabled adapter changes nothing: logits are equal bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.drawn import batches, logits_in_one, logits_stepwise, shapes
from support.families import CLASSES, build, open_gates_, tokens
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel, conditioned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("family", CLASSES)
@given(data=st.data())
def test_an_untrained_adapter_changes_no_bit(family, data):
    """Over drawn models, configurations, inputs and ways to run: `torch.equal`."""
    shape = data.draw(shapes())
    backend = data.draw(st.sampled_from(["sdpa", "eager"]))
    model = build(family, shape, backend=backend, dtype=data.draw(st.sampled_from(DTYPES)), seed=1)
    ids, mask = data.draw(batches())
    run = data.draw(st.sampled_from([logits_in_one, logits_stepwise]))
    config = AdaptionPromptConfig(
        adapter_len=data.draw(st.integers(1, 5)),
        adapter_layers=data.draw(st.integers(1, shape.layers)),
        gate=data.draw(st.sampled_from(["layer", "head"])),
        gate_activation=data.draw(st.sampled_from(["identity", "tanh"])),
        dtype=data.draw(st.sampled_from([None, "bfloat16", "float32"])),
    )
    with torch.no_grad():
        expected = run(model, ids, mask)

        adapted = AdaptionPromptModel(model, {"default": config}, "default")
        untrained = run(adapted, ids, mask)
        open_gates_(adapted.adapter_modules("default"))
        opened = run(adapted, ids, mask)
        with adapted.disable_adapter():
            disabled = run(adapted, ids, mask)
        reverted = run(adapted.unload(), ids, mask)

    assert torch.isfinite(expected).all()
    assert torch.equal(expected, untrained)
    # Otherwise the lines around this one would hold for an adapter that does nothing at all.
    assert not torch.equal(expected, opened)
    assert torch.equal(expected, disabled)
    assert torch.equal(expected, reverted)


@pytest.mark.slow
@pytest.mark.parametrize("family", CLASSES)
@given(data=st.data())
def test_an_untrained_conditioned_adapter_changes_no_bit(family, data):
    """Whatever the features are: their projection is no zero, the gate is."""
    shape = data.draw(shapes())
    backend = data.draw(st.sampled_from(["sdpa", "eager"]))
    model = build(family, shape, backend=backend, dtype=data.draw(st.sampled_from(DTYPES)), seed=1)
    ids, mask = data.draw(batches())
    run = data.draw(st.sampled_from([logits_in_one, logits_stepwise]))
    size = data.draw(st.integers(1, 6))
    config = AdaptionPromptConfig(
        adapter_len=data.draw(st.integers(1, 5)),
        adapter_layers=data.draw(st.integers(1, shape.layers)),
        gate=data.draw(st.sampled_from(["layer", "head"])),
        gate_activation=data.draw(st.sampled_from(["identity", "tanh"])),
        dtype=data.draw(st.sampled_from([None, "bfloat16", "float32"])),
        condition_size=size,
        condition_rank=data.draw(st.integers(1, 4)),
    )
    features = torch.randn(data.draw(st.sampled_from([1, len(ids)])), size)
    with torch.no_grad(), conditioned(features):
        expected = run(model, ids, mask)

        adapted = AdaptionPromptModel(model, {"default": config}, "default")
        untrained = run(adapted, ids, mask)
        open_gates_(adapted.adapter_modules("default"))
        opened = run(adapted, ids, mask)
        with conditioned(features + 1):
            otherwise = run(adapted, ids, mask)
        reverted = run(adapted.unload(), ids, mask)

    assert torch.isfinite(expected).all()
    assert torch.equal(expected, untrained)
    assert not torch.equal(expected, opened)
    assert not torch.equal(opened, otherwise)
    assert torch.equal(expected, reverted)


@pytest.mark.parametrize("family", CLASSES)
def test_generation_with_an_untrained_adapter_is_the_bases(family):
    """Greedy, sampled and beam search give the base's tokens."""
    model = build(family)
    ids = tokens()
    ways = [
        {"do_sample": False},
        {"do_sample": True},
        {"do_sample": False, "num_beams": 3},
    ]

    def generate(of):
        results = []
        for way in ways:
            torch.manual_seed(0)
            results.append(
                of.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, **way)
            )
        return results

    expected = generate(model)
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, gate="head")
    adapted = AdaptionPromptModel(model, {"default": config}, "default")

    for left, right in zip(expected, generate(adapted), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_training_mode_with_dropout_draws_the_same_numbers(family, backend):
    """The adapter takes no random numbers of its own and leaves attention dropout where it was."""
    model = build(family, backend=backend)
    for module in model.modules():
        if "attention_dropout" in vars(module):
            module.attention_dropout = 0.5
    model.train()
    ids = tokens()
    torch.manual_seed(3)
    expected = model(ids).logits
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=3)
    adapted = AdaptionPromptModel(model, {"default": config}, "default")

    torch.manual_seed(3)
    actual = adapted(ids).logits

    assert torch.equal(expected, actual)
    adapted.eval()
    assert not torch.equal(expected, adapted(ids).logits)
