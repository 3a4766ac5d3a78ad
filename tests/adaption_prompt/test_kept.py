"""Prompts' keys and values are as old as the KV cache of a pass, whatever was written in between."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.adapted import relative_error
from support.caches import cache_of, with_cache
from support.families import build, gpt2, open_gates_, tokens
from support.kept import (
    IDS,
    LAYER,
    TOLERANCE,
    A,
    all_ways,
    expected_logits,
    logits,
    make,
    reference_adapters,
    top,
)
from support.reference import reference_model
from surgery_adaption_prompt import AdaptionPromptModel
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import DynamicCache, StaticCache

# -- transformed and captured code ----------------------------------------------------------------


class Scaled(nn.Module):
    """Twice a tensor."""

    def forward(self, x):
        """Return it."""
        return 2 * x


def test_parametrized_and_pruned_prompts_and_gates_work_without_gradients():
    model = make()
    parametrize.register_parametrization(top(model), "adaption_gate", Scaled())
    prune.l1_unstructured(top(model), "adaption_prompt", amount=0.5)
    expected = expected_logits(model)
    rows = logits(model, adapter_names=["a", "a"])

    assert relative_error(rows.double(), expected) < TOLERANCE
    for actual in all_ways(model):
        assert relative_error(actual.double(), expected) < TOLERANCE
    assert relative_error(expected_logits(make()), expected) > 100 * TOLERANCE


@pytest.mark.parametrize("use_cache", [False, True])
def test_stacked_adapters_are_vectorised_with_and_without_gradients(use_cache):
    model = make(build(seed=1, backend="eager"))
    own = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
    stacked = {key: torch.stack([p, 2 * p]) for key, p in own.items()}

    def run(parameters):
        arguments = ((IDS,), {"use_cache": use_cache})
        return torch.func.functional_call(model, parameters, *arguments).logits

    logits(model)
    expected = [expected_logits(model)]
    for module in model.adapter_modules("a").values():
        with torch.no_grad():
            module.adaption_prompt.mul_(2)
            module.adaption_gate.mul_(2)
    expected.append(expected_logits(model))
    with torch.no_grad():
        without = torch.vmap(run)(stacked)

    for actual in (without, torch.vmap(run)(stacked).detach()):
        for found, wanted in zip(actual, expected, strict=True):
            assert relative_error(found.double(), wanted) < TOLERANCE


def test_parameters_handed_over_act_on_a_cache_that_others_filled():
    """By `functional_call`, for a single token."""
    ids = IDS
    model = make(build(seed=1, dtype=torch.float64))
    with torch.no_grad():
        past = cache_of(model(ids[:, :-1]))
        twin = copy.deepcopy(past)
        model(ids[:, -1:], **with_cache(copy.deepcopy(past)))
        gates = {
            key: p.detach().flip(0) for key, p in model.named_parameters() if "adaption_gate" in key
        }
        actual = torch.func.functional_call(model, gates, (ids[:, -1:],), with_cache(past)).logits
        for module in model.adapter_modules("a").values():
            module.adaption_gate.copy_(module.adaption_gate.flip(0))
        base, adapters = formula(model)
        with reference_model(base, adapters, scaling=8**-0.5):
            expected = base(ids[:, -1:], **with_cache(twin)).logits

    assert relative_error(actual, expected) < 1e-12


def formula(model):
    base = build(seed=1, dtype=torch.float64)
    return base, reference_adapters(base, model)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit.trace
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_traced_module_keeps_its_parameters(warm):
    model = make()

    class Logits(nn.Module):
        """The model, with a tensor as its output."""

        def __init__(self):
            super().__init__()
            self.model = model.get_base_model()

        def forward(self, ids):
            """Return the logits."""
            return self.model(ids, use_cache=False).logits

    with torch.no_grad():
        if warm:
            model(IDS)
        traced = torch.jit.trace(Logits(), IDS, check_trace=False)
        for module in model.adapter_modules("a").values():
            module.adaption_gate.mul_(-2)
        actual = traced(IDS)

    assert relative_error(actual.double(), expected_logits(model)) < TOLERANCE


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")  # of torch's forward-mode AD
def test_terms_have_the_derivatives_that_eager_attention_has():
    """Second derivatives and forward-mode ones, against finite differences of first ones."""
    model = make(build(seed=1, backend="eager", dtype=torch.float64))
    gate = top(model).adaption_gate
    own = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
    name = next(key for key in own if key.endswith(f"{LAYER}.adaption_gate"))

    def loss(value):
        arguments = ((IDS,), {"labels": IDS, "use_cache": False})
        return torch.func.functional_call(model, {**own, name: value}, *arguments).loss

    at, direction = gate.detach(), torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    step = 1e-3  # eager attention takes its softmax in float32
    slopes = [
        torch.autograd.functional.jacobian(loss, at + sign * step * direction) for sign in (1, -1)
    ]
    expected = (slopes[0] - slopes[1]) / (2 * step)
    hessian = torch.autograd.functional.hessian(loss, at)
    _, along = torch.func.jvp(loss, (at,), (direction,))
    with torch.no_grad():
        _, quietly = torch.func.jvp(loss, (at,), (direction,))

    assert torch.allclose(hessian @ direction, expected, rtol=5e-3, atol=1e-4)
    rise = (loss(at + step * direction) - loss(at - step * direction)) / (2 * step)
    assert torch.allclose(along, rise, rtol=5e-3)
    assert torch.equal(along, quietly)


# -- where they are kept --------------------------------------------------------------------------


def projections(model, run):
    """Return how often the prompt of the top layer is projected while `run` runs."""
    count = 0

    def counting(_, args):
        nonlocal count
        count += args[0].shape[:2] == (1, A.adapter_len)

    handle = top(model).k_proj.register_forward_pre_hook(counting)
    try:
        run()
    finally:
        handle.remove()
    return count


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize(
    "cache", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=["", "static"]
)
def test_the_prompt_is_projected_once_for_a_generation(length, cache):
    model, ids = make(), tokens(2, length)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "eos_token_id": None}

    for _ in range(2):
        assert 1 == projections(model, lambda: model.generate(ids, **options, **cache))


def test_nothing_is_kept_without_a_cache_nor_with_gradients():
    model = make()

    assert 3 == projections(model, lambda: [logits(model, use_cache=False) for _ in range(3)])
    past = cache_of(model(IDS[:, :3]))
    assert 2 == projections(
        model, lambda: [model(IDS[:, :1], **with_cache(past)) for _ in range(2)]
    )
    with torch.no_grad():
        past = cache_of(model(IDS[:, :3]))
        assert 0 == projections(model, lambda: model(IDS[:, :1], **with_cache(past)))
    model(IDS[:, :1], **with_cache(past))
    with torch.no_grad():
        assert 1 == projections(model, lambda: model(IDS[:, :1], **with_cache(past)))


def test_a_pass_with_gradients_that_fills_a_cache_leaves_nothing_old_in_it():
    model = make(build(seed=1, dtype=torch.float64))
    past = StaticCache(config=model.config, max_cache_len=16)
    logits(model, IDS[:, :4], **with_cache(past))
    past.reset()
    top(model).adaption_prompt.data.mul_(3)
    model(IDS[:, :1].clone(), **with_cache(past))
    actual = logits(model, IDS[:, 1:2], **with_cache(past))
    base, adapters = formula(model)
    with torch.no_grad(), reference_model(base, adapters, scaling=8**-0.5):
        expected = base(IDS[:, :2]).logits[:, 1:]

    assert relative_error(actual, expected) < 1e-12


def test_copies_of_a_cache_have_what_it_keeps_and_pickles_do_not():
    model = make()
    with torch.no_grad():
        past = cache_of(model(IDS))
        expected = model(IDS[:, :1], **with_cache(copy.deepcopy(past))).logits
        assert 0 == projections(model, lambda: model(IDS[:, :1], **with_cache(copy.deepcopy(past))))
        again = pickle.loads(pickle.dumps(past))
        assert 1 == projections(model, lambda: model(IDS[:, :1], **with_cache(again)))
        actual = model(IDS[:, :1], **with_cache(pickle.loads(pickle.dumps(past)))).logits

    assert torch.equal(expected, actual)


def test_a_model_that_was_cached_is_not_kept_alive():
    model = make()
    past = cache_of(model(IDS))
    found = weakref.ref(model.get_base_model())
    logits(model)
    logits(model, IDS[:, :1], **with_cache(past))
    del model, past
    gc.collect()

    assert found() is None


def test_caches_in_threads_do_not_mix():
    """Each thread decodes with an adapter of its own over one model, and a cache of its own."""
    model = make(build(seed=1, dtype=torch.float64))

    def decode(name):
        with torch.no_grad(), model.activated(name):
            past, parts = DynamicCache(config=model.config), []
            for place in range(IDS.shape[1]):
                out = model(IDS[:, place : place + 1], **with_cache(past))
                parts.append(out.logits)
            return torch.cat(parts, dim=1)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(decode, "abab"))

    for name, actual in zip("abab", found, strict=True):
        assert relative_error(actual, expected_logits(model, name)) < 1e-12


@pytest.mark.parametrize("kind", ["one", "rows"])
def test_gpt2_keeps_prompts_too(kind):
    base = gpt2()
    model = AdaptionPromptModel(base, {"a": A, "b": A}, "a").eval()
    for seed, name in enumerate("ab"):
        open_gates_(model.adapter_modules(name), seed=seed)
    rows = {"adapter_names": ["a", "b"]} if kind == "rows" else {}
    with torch.no_grad():
        whole = model(IDS, **rows).logits
        past = cache_of(model(IDS[:, :4], **rows))
        count = 0

        def counting(_, args):
            nonlocal count
            count += args[0].shape[1] == A.adapter_len * (2 if rows else 1)

        base.transformer.h[-1].attn.c_attn.register_forward_pre_hook(counting)
        parts = [
            model(IDS[:, at : at + 1], **with_cache(past), **rows).logits
            for at in range(4, IDS.shape[1])
        ]

    assert 0 == count
    assert torch.allclose(whole[:, 4:], torch.cat(parts, 1), atol=1e-4)
