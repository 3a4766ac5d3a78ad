"""On each of transformers' attention backends, open gates agree with the float64 reference."""

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
from transformers.utils import is_flash_attn_2_available

BACKENDS = ("eager", "sdpa", "flex_attention")
SHAPE = Shape(head_dim=16)
"""Flex attention takes no smaller heads."""

BFLOAT16 = 0.04
"""Relative to the largest logit: a rounding to 8 bits in each of some twenty steps."""

pytestmark = [
    # transformers asks for a mask in a way that torch gives up; torch tells that it did not compile.
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),
]


@pytest.fixture
def _eager_flex():
    """Run flex attention's definition, which costs seconds to compile for each shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


def padded(side):
    """Return ids and a mask, the second row padded on a side."""
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    if side != "none":
        mask[1, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    return ids * mask, mask


def logits(model, ids, mask, *, trains=False):
    with torch.set_grad_enabled(trains):
        return model(ids, attention_mask=mask, use_cache=False).logits.detach()


@pytest.mark.usefixtures("_eager_flex")
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_agree_with_the_formula(family, backend, side):
    ids, mask = padded(side)
    adapted = adapt(build(family, SHAPE, backend=backend))
    base = build(family, SHAPE, dtype=torch.float64)

    expected = reference_logits(adapted, base, ids, mask, family=family, shape=SHAPE)
    # Keys and values are computed once where nothing trains, and each time where something does;
    # flex attention on the CPU trains nothing.
    for trains in [False] if backend == "flex_attention" else [False, True]:
        actual = logits(adapted, ids, mask, trains=trains)
        assert relative_error(actual, expected, mask) < FLOAT32

    assert backend == adapted.config._attn_implementation
    flip_gates_(adapted)
    assert relative_error(logits(adapted, ids, mask), expected, mask) > 50 * FLOAT32


@pytest.mark.usefixtures("_eager_flex")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_and_disabled_are_the_base_bit_for_bit(family, backend):
    ids, mask = padded("left")
    model = build(family, SHAPE, backend=backend)
    expected = logits(model, ids, mask)

    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=3, gate="head")
    adapted = AdaptionPromptModel(model, {"untrained": config}, "untrained")
    untrained = logits(adapted, ids, mask)
    adapted.unload()
    trained = adapt(model, adapter_layers=3)
    opened = logits(trained, ids, mask)
    with trained.disable_adapter():
        disabled = logits(trained, ids, mask)

    kept = mask.bool()
    # At padding, a backend may give NaN, which equals nothing.
    assert torch.equal(expected[kept], untrained[kept])
    assert torch.equal(expected[kept], disabled[kept])
    assert not torch.equal(expected[kept], opened[kept])
    assert torch.equal(opened[kept], logits(trained, ids, mask)[kept])


@pytest.mark.usefixtures("_eager_flex")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_backend_chosen_later_holds_for_adapted_layers(family):
    """The base's attention function is looked up at each call, as the base itself does."""
    ids, mask = padded("none")
    adapted = adapt(build(family, SHAPE, backend="eager"))
    base = build(family, SHAPE, dtype=torch.float64)
    expected = reference_logits(adapted, base, ids, mask, family=family, shape=SHAPE)

    for backend in (*BACKENDS, "eager"):
        adapted.model.set_attn_implementation(backend)
        alike = adapt(build(family, SHAPE, backend=backend))
        for fqn, module in alike.adapter_modules("default").items():
            module.load_state_dict(adapted.adapter_modules("default")[fqn].state_dict())
        actual = logits(adapted, ids, mask)
        assert relative_error(actual, expected, mask) < FLOAT32
        # The same bits as a model built with that backend, which another would not give.
        assert torch.equal(logits(alike, ids, mask), actual)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_weights_are_the_bases_own(family):
    """`output_attentions` shows how the base attends to the text; the prompt is not in it."""
    ids, mask = padded("right")
    model = build(family, backend="eager")
    arguments = {"attention_mask": mask, "use_cache": False, "output_attentions": True}
    with torch.no_grad():
        expected = model(ids, **arguments).attentions
        adapted = adapt(model, adapter_layers=2)
        seen = {}
        for fqn, module in adapted.adapter_modules("default").items():
            module.register_forward_pre_hook(
                lambda _, args, kwargs, fqn=fqn: seen.update({fqn: (args, kwargs)}),
                with_kwargs=True,
            )
        actual = adapted(ids, **arguments).attentions
        # What each base attention makes of the input that its wrapper got.
        own = [
            adapted.adapter_modules("default")[fqn].base_attention(*args, **kwargs)[1]
            for fqn, (args, kwargs) in seen.items()
        ]

    assert [weights.shape for weights in expected] == [weights.shape for weights in actual]
    # The layer below the adapted ones, and the first of them, have the base's input.
    assert torch.equal(expected[0], actual[0])
    assert torch.equal(expected[1], actual[1])
    assert not torch.equal(expected[2], actual[2])
    assert 2 == len(own)
    assert torch.equal(own[0], actual[1])
    assert torch.equal(own[1], actual[2])
    torch.testing.assert_close(actual[2].sum(-1), torch.ones(2, 4, 9))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
@pytest.mark.parametrize("family", ["llama"])
def test_compiled_flex_attention_agrees_with_the_formula(family):
    """The kernel that transformers compiles is used as it is; the term is added outside of it."""
    ids, mask = padded("left")
    adapted = adapt(build(family, SHAPE, backend="flex_attention"))
    base = build(family, SHAPE, dtype=torch.float64)

    expected = reference_logits(adapted, base, ids, mask, family=family, shape=SHAPE)
    opened = logits(adapted, ids, mask)
    with adapted.disable_adapter():
        disabled = logits(adapted, ids, mask)
    unadapted = logits(build(family, SHAPE, backend="flex_attention"), ids, mask)

    assert relative_error(opened, expected, mask) < FLOAT32
    assert torch.equal(unadapted[mask.bool()], disabled[mask.bool()])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("backend", [*BACKENDS, "flash_attention_2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_backends_on_a_gpu_agree_with_the_formula(family, backend, side):
    """Flash attention exists in half precision only; the others are held to the same there."""
    if backend == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("needs the package flash-attn")
    ids, mask = padded(side)
    model = build(family, SHAPE, dtype=torch.bfloat16)
    adapted = adapt(model)
    base = build(family, SHAPE, dtype=torch.bfloat16).double()
    expected = reference_logits(adapted, base, ids, mask, family=family, shape=SHAPE)
    adapted.cuda()
    # Not sooner: flash attention is refused for a model on the CPU.
    model.set_attn_implementation(backend)

    actual = logits(adapted, ids.cuda(), mask.cuda()).cpu()
    with adapted.disable_adapter():
        disabled = logits(adapted, ids.cuda(), mask.cuda()).cpu()
    unadapted = logits(adapted.unload(), ids.cuda(), mask.cuda()).cpu()

    assert relative_error(actual, expected, mask) < BFLOAT16
    assert torch.equal(unadapted[mask.bool()], disabled[mask.bool()])
