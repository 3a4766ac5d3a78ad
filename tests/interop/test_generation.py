"""In every way of generating, logits along the new tokens agree with the float64 reference."""

import copy
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from support.adapted import (
    FAMILIES,
    FLOAT32,
    adapt,
    build,
    flip_gates_,
    reference,
    reference_logits,
    relative_error,
)
from support.caches import cache_of, with_cache
from support.families import Shape, tokens
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    QuantizedCache,
    StaticCache,
)

CACHES = ("dynamic", "static", "none")
NEW = 6
GREEDY = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "output_logits": True,
    "output_scores": True,
    "return_dict_in_generate": True,
}
SLIDING = {"gemma3": [True, True, True], "mistral": [True, True, True]}
"""Which layers slide; of six layers of Gemma 3 the last would not."""

FP8_STEP, INT4_STEP = 1e-3, 1e-2
"""Less than what the quantisation of a cache changes, relative to the largest logit."""


def left_padded():
    ids = tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids * mask, mask


def cache_arguments(kind):
    if kind == "none":
        return {"use_cache": False}
    return {"cache_implementation": kind, "disable_compile": True}


def generated(model, ids, mask=None, **arguments):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **{**GREEDY, **arguments})


def frozen_base(family):
    """Return a base without trainable parameters, as it is under an adapter.

    torch multiplies a slice, such as the last position's hidden states, in another order when the
    weight is trainable, even under `no_grad`; one bit may differ.
    """
    return build(family).requires_grad_(False)


def along(logits, mask, sequences):
    """Return the logits from which the new tokens of `sequences` were chosen, `(batch, new, vocab)`."""
    return logits[:, mask.shape[1] - 1 : sequences.shape[1] - 1]


def grown(mask, sequences):
    """Return the mask of prompt and new tokens."""
    new = sequences.shape[1] - mask.shape[1]
    return torch.cat([mask, mask.new_ones(len(mask), new)], dim=1)


def expected_logits(adapted, family, mask, sequences):
    base = build(family, dtype=torch.float64)
    whole = grown(mask, sequences)
    # As `generate` counts, from the first token that is not padding. It matters more than in the
    # base: positions turn queries, but not the prompt's keys.
    positions = {"position_ids": (whole.cumsum(-1) - 1).clamp(min=0)}
    logits = reference_logits(adapted, base, sequences, whole, family=family, **positions)
    return along(logits, mask, sequences)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_agrees_with_the_formula(family, cache):
    ids, mask = left_padded()
    adapted = adapt(build(family))

    out = generated(adapted, ids, mask, **cache_arguments(cache))
    expected = expected_logits(adapted, family, mask, out.sequences)

    assert relative_error(torch.stack(out.logits, 1), expected) < FLOAT32
    assert torch.equal(out.sequences[:, -NEW:], expected.argmax(-1))
    flip_gates_(adapted)
    flipped = generated(adapted, ids, mask, **cache_arguments(cache))
    assert relative_error(flipped.logits[0][:, None], expected[:, :1]) > 50 * FLOAT32


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_and_disabled_generate_the_bases_bits(family, cache):
    ids, mask = left_padded()
    model = frozen_base(family)
    arguments = cache_arguments(cache)
    expected = generated(model, ids, mask, **arguments)

    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=3, gate="head")
    adapted = AdaptionPromptModel(model, {"untrained": config}, "untrained")
    untrained = generated(adapted, ids, mask, **arguments)
    adapted.unload()
    trained = adapt(model, adapter_layers=3)
    opened = generated(trained, ids, mask, **arguments)
    with trained.disable_adapter():
        disabled = generated(trained, ids, mask, **arguments)

    for actual in (untrained, disabled):
        assert torch.equal(expected.sequences, actual.sequences)
        assert torch.equal(torch.stack(expected.logits), torch.stack(actual.logits))
    assert not torch.equal(expected.logits[0], opened.logits[0])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", SLIDING)
def test_sliding_caches_slide_and_agree(family, cache):
    """Past the window, keys of the text are dropped; the prompt, which is in no cache, stays."""
    ids, mask = left_padded()
    adapted = adapt(build(family), adapter_layers=3)
    window = adapted.config.sliding_window

    out = generated(adapted, ids, mask, **cache_arguments(cache))
    expected = expected_logits(adapted, family, mask, out.sequences)

    layers = cache_of(out).layers
    assert SLIDING[family] == [layer.is_sliding for layer in layers]
    assert all(layer.keys.shape[-2] <= window < ids.shape[1] for layer in layers)
    assert relative_error(torch.stack(out.logits, 1), expected) < FLOAT32


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_cache_filled_by_the_base_serves_the_adapter(kind):
    """Turning the adapter on between prefill and decoding changes only what comes after."""
    ids = tokens(2, 8)
    adapted = adapt(build(), adapter_layers=1)
    past = kind(config=adapted.config, **({"max_cache_len": 8} if kind is StaticCache else {}))
    with torch.no_grad():
        with adapted.disable_adapter():
            adapted(ids[:, :5], **with_cache(past))
        actual = adapted(ids[:, 5:], **with_cache(past), position_ids=torch.arange(5, 8)[None])
    # Only the last layer is adapted: what the base leaves in the cache is what the adapter would.
    expected = reference_logits(adapted, build(dtype=torch.float64), ids)[:, 5:]

    assert relative_error(actual.logits, expected) < FLOAT32


@contextmanager
def quanto_in_python():
    """Import quanto, and let its unpacking run in Python: it would compile C++ at the first call."""
    pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")

    def unpack(packed, bits):
        parts = [(packed >> at) & (2**bits - 1) for at in range(0, 8, bits)]
        return torch.cat(parts)

    ext = import_module("optimum.quanto.library.extensions.cpp").ext
    kept, ext._lib = ext._lib, SimpleNamespace(unpack=unpack)
    try:
        yield
    finally:
        ext._lib = kept


def fp8(config):
    return QuantizedCache("fp8", config)


def int4(config):
    return QuantizedCache("quanto", config, nbits=4, q_group_size=8, residual_length=2)


def int2(config):
    return QuantizedCache("quanto", config, nbits=2, q_group_size=8, residual_length=2)


def check_quantised_cache(family, make, step):
    """Compare with the reference under a cache of the same kind, not with exact keys and values."""
    ids, mask = left_padded()
    model = frozen_base(family)
    untouched = generated(model, ids, mask, **with_cache(make(model.config)))
    adapted = adapt(model)
    with adapted.disable_adapter():
        disabled = generated(adapted, ids, mask, **with_cache(make(adapted.config)))
    out = generated(adapted, ids, mask, **with_cache(make(adapted.config)))
    actual = torch.stack(out.logits, 1)
    base = build(family, dtype=torch.float64)
    with reference(adapted, base, family):
        expected = generated(base, ids, mask, **with_cache(make(base.config)))
    exact = expected_logits(adapted, family, mask, out.sequences)

    assert isinstance(cache_of(out), QuantizedCache)
    assert torch.equal(expected.sequences, out.sequences)
    assert relative_error(actual, torch.stack(expected.logits, 1)) < FLOAT32
    # Or else nothing was quantised.
    assert relative_error(actual, exact) > step
    assert torch.equal(torch.stack(untouched.logits), torch.stack(disabled.logits))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_decoding_on_an_fp8_cache_agrees_with_the_formula(family):
    check_quantised_cache(family, fp8, FP8_STEP)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of quanto, about torch
@pytest.mark.parametrize("make", [int4, int2])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_decoding_on_an_integer_cache_agrees_with_the_formula(family, make):
    with quanto_in_python():
        check_quantised_cache(family, make, INT4_STEP)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search_finds_the_references_beams(family, cache):
    ids, mask = left_padded()
    arguments = {"num_beams": 3, "num_return_sequences": 3, **cache_arguments(cache)}
    model = build(family)
    unadapted = generated(model, ids, mask, **arguments)
    adapted = adapt(model)
    out = generated(adapted, ids, mask, **arguments)
    base = build(family, dtype=torch.float64)
    with reference(adapted, base, family):
        expected = generated(base, ids, mask, **arguments)

    assert torch.equal(expected.sequences, out.sequences)
    torch.testing.assert_close(
        out.sequences_scores.double(), expected.sequences_scores.double(), rtol=0, atol=FLOAT32
    )
    assert not torch.equal(unadapted.sequences, out.sequences)


@pytest.mark.parametrize("assistant", ["base", "twin", "lookup"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_assisted_generation_gives_the_greedy_tokens(family, assistant):
    """Whoever drafts, the adapted model decides, over several positions at a time."""
    ids = tokens(1, 7)
    adapted = adapt(build(family))
    greedy = generated(adapted, ids, max_new_tokens=10)
    drafting = {
        "base": lambda: {"assistant_model": build(family)},
        "twin": lambda: {"assistant_model": copy.deepcopy(adapted.model)},
        "lookup": lambda: {"prompt_lookup_num_tokens": 3},
    }[assistant]()
    lengths = []
    adapted.model.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )

    out = generated(adapted, ids, max_new_tokens=10, **drafting)
    expected = expected_logits(adapted, family, torch.ones_like(ids), out.sequences)

    assert torch.equal(greedy.sequences, out.sequences)
    assert relative_error(torch.stack(out.logits, 1), expected) < FLOAT32
    # Drafts were checked, several tokens at once; all of a twin's are right.
    assert any(length > 1 for length in lengths[1:])
    if assistant == "twin":
        assert len(lengths) < 10


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_continuous_batching_gives_the_references_tokens(family, backend):
    """Requests of several lengths are packed into one row; blocks of a paged cache hold their text."""
    prompts = [tokens(1, length, seed=length) for length in (3, 8, 5)]
    adapted = adapt(build(family, backend=backend))

    out = adapted.model.generate_batch(
        [ids[0].tolist() for ids in prompts],
        generation_config=GenerationConfig(
            max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=16, max_batch_tokens=32, return_logprobs=True
        ),
    )

    by_prompt = {tuple(answer.prompt_ids): answer for answer in out.values()}
    assert 3 == len(by_prompt)
    for ids in prompts:
        answer = by_prompt[tuple(ids[0].tolist())]
        sequences = torch.cat([ids, torch.tensor([answer.generated_tokens])], dim=1)
        expected = expected_logits(adapted, family, torch.ones_like(ids), sequences)
        assert answer.error is None
        assert NEW == len(answer.generated_tokens)
        assert expected.argmax(-1)[0].tolist() == answer.generated_tokens
        best = expected.log_softmax(-1).amax(-1)[0]
        torch.testing.assert_close(
            torch.tensor(answer.logprobs).double(), best, rtol=0, atol=FLOAT32
        )


def test_the_shape_of_the_tests_has_grouped_heads():
    """What the other tests rest on: grouped heads, and heads that are not the hidden size."""
    shape = Shape()

    assert shape.heads > shape.kv_heads > 1
    assert shape.heads * shape.head_dim != shape.hidden
