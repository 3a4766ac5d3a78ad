"""Threads and tasks with adapters of their own over one model."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from support.families import build, open_gates_, tokens
from support.threads import Turns, inside
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel

from surgery_core import DriftError, VariantError
from surgery_core.testing import InjectedError

CONFIGS = {
    "fr": AdaptionPromptConfig(adapter_len=3, adapter_layers=1, gate="head"),
    "legal": AdaptionPromptConfig(adapter_len=5, adapter_layers=3, gate_activation="tanh"),
    "plain": AdaptionPromptConfig(adapter_len=2, adapter_layers=2),
}
IDS = tokens(2, 6)
CHOICES = ("__base__", "fr", "legal", "plain", {"fr": 0.5, "legal": 2.0}, ["legal", "fr"])


@pytest.fixture
def model():
    model = AdaptionPromptModel(build(seed=1), CONFIGS, "fr").eval()
    for seed, name in enumerate(CONFIGS):
        open_gates_(model.adapter_modules(name), seed=seed)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def expected_logits(model):
    """Return what each choice gives when nothing else goes on, as text by choice."""
    found = {}
    for choice in CHOICES:
        with model.activated(choice):
            found[str(choice)] = logits(model)
    assert len(CHOICES) == len({tuple(x.flatten().tolist()) for x in found.values()})
    return found


def layers(model):
    return [layer.self_attn for layer in model.get_base_model().model.layers]


def test_a_context_uses_an_adapter_and_leaves_nothing(model):
    before, modules = logits(model), layers(model)
    keys = list(model.get_base_model().state_dict())
    model.set_adapter("legal")
    expected = logits(model)
    model.set_adapter("fr")

    with model.activated("legal"):
        assert torch.equal(expected, logits(model))
        assert "fr" == model.active_adapter
        assert keys == list(model.get_base_model().state_dict())

    assert modules == layers(model)
    assert torch.equal(before, logits(model))


def test_contexts_nest_and_errors_end_them(model):
    expected = expected_logits(model)
    before = logits(model)
    with model.activated("legal"):
        with suppress(InjectedError), model.activated("plain"):
            assert torch.equal(expected["plain"], logits(model))
            raise InjectedError
        with model.activated("__base__"):
            assert torch.equal(expected["__base__"], logits(model))
        assert torch.equal(expected["legal"], logits(model))
    assert torch.equal(before, logits(model))
    assert not model.sharing.is_in_force


def test_what_is_active_may_change_meanwhile(model):
    """The context keeps its adapter; the main thread gets what is active, also without modules below."""
    expected = expected_logits(model)

    with inside(model.activated("legal")) as call:
        for change, name in (
            (lambda: model.set_adapter("plain"), "plain"),
            (model.disable_adapter_layers, "__base__"),
            (lambda: model.set_adapter({"fr": 0.5, "legal": 2.0}), "__base__"),
            (model.enable_adapter_layers, "{'fr': 0.5, 'legal': 2.0}"),
            (lambda: model.add_adapter("new", CONFIGS["fr"]), "{'fr': 0.5, 'legal': 2.0}"),
            (lambda: model.delete_adapter("plain"), "{'fr': 0.5, 'legal': 2.0}"),
            (lambda: model.set_adapter("fr"), "fr"),
        ):
            change()
            kept = "__base__" if name == "__base__" else "legal"
            assert torch.equal(expected[kept], call(logits, model)), name
            assert torch.equal(expected[name], logits(model)), name


def test_two_models_in_one_context_do_not_mix(model):
    other = AdaptionPromptModel(build(seed=2), CONFIGS, "plain").eval()
    open_gates_(other.adapter_modules("fr"), seed=5)
    plain = logits(other)
    other.set_adapter("fr")
    expected = logits(other), expected_logits(model)["legal"]
    other.set_adapter("plain")

    with model.activated("legal"):
        assert torch.equal(plain, logits(other))
        with other.activated("fr"):
            assert torch.equal(expected[0], logits(other))
            assert torch.equal(expected[1], logits(model))


def test_adapters_in_use_are_not_taken_away(model):
    message = r"Adapter 'legal' is in use by a thread or task: expected one that is not"
    with model.activated(["legal", "fr"]):
        for call in (
            lambda: model.delete_adapter("legal"),
            lambda: model.rename_adapter("legal", "x"),
            model.unload,
        ):
            with pytest.raises(VariantError, match=r"'(legal|fr)' is in use by a thread or task"):
                call()
        assert model.is_in_use("legal")
        with pytest.raises(VariantError, match=message):
            model.delete_adapter("legal")
    assert not model.is_in_use("legal")
    model.delete_adapter("legal")


def test_a_module_replaced_meanwhile_is_noticed_and_nothing_is_used(model):
    base = model.get_base_model()
    mine, original = torch.nn.Identity(), base.model.layers[0].self_attn
    base.model.layers[0].self_attn = mine
    with (
        pytest.raises(DriftError, match=r"drifted at 'model\.layers\.0\.self_attn'"),
        model.activated("legal"),
    ):
        pytest.fail("never entered")

    assert mine is base.model.layers[0].self_attn
    assert not model.sharing.is_in_force
    base.model.layers[0].self_attn = original
    with model.activated("legal"):
        assert 3 == sum(type(m).__name__.startswith("Adapted") for m in layers(model))


@pytest.mark.slow
def test_threads_never_mix(model):
    """Under load, with one that switches the active adapter all the while."""
    expected = expected_logits(model)
    barrier = threading.Barrier(7)
    stop, turns = threading.Event(), Turns()
    switches = []

    def run(choice):
        barrier.wait()
        for _ in range(60):
            with turns.shared(), model.activated(choice):
                assert torch.equal(expected[str(choice)], logits(model)), choice
                assert torch.equal(expected[str(choice)], logits(model)), choice

    def switch():
        barrier.wait()
        while not stop.is_set():
            for name in ("legal", {"fr": 0.5, "legal": 2.0}, "plain", "fr"):
                model.set_adapter(name)
                switches.append(name)
            with turns.alone(), model.disable_adapter(), model.activated("legal"):
                assert torch.equal(expected["__base__"], logits(model))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(7) as pool:
            switching = pool.submit(switch)
            running = [pool.submit(run, choice) for choice in CHOICES]
            for future in running:
                future.result()
            stop.set()
            switching.result()
    finally:
        stop.set()
        torch.set_num_threads(threads)
    assert 8 < len(switches)
    assert not model.sharing.is_in_force
    model.set_adapter("fr")
    assert torch.equal(expected["fr"], logits(model))


@pytest.mark.slow
def test_threads_generate_with_adapters_of_their_own(model):
    ids, options = tokens(2, 4), {"max_new_tokens": 5, "do_sample": False}
    options["attention_mask"] = torch.ones_like(ids)
    rows = [["fr", "legal"], ["legal", "legal"], ["__base__", "plain"]]
    expected = [model.generate(ids, adapter_names=names, **options) for names in rows]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            found = pool.map(
                lambda names: model.generate(ids, adapter_names=names, **options), rows
            )
            for tokens_found, tokens_expected in zip(found, expected, strict=True):
                assert torch.equal(tokens_expected, tokens_found)


def test_tasks_of_one_thread_never_mix(model):
    expected = expected_logits(model)

    async def run(choice):
        for _ in range(3):
            with model.activated(choice):
                await asyncio.sleep(0)
                assert torch.equal(expected[str(choice)], logits(model))

    async def run_all():
        await asyncio.gather(*(run(choice) for choice in CHOICES))

    asyncio.run(run_all())


# -- checkpointing -------------------------------------------------------------------------------------


def gradients(model, run):
    model.zero_grad()
    for parameter in model.adapter_parameters(list(CONFIGS)):
        parameter.grad = None
    run()
    return [
        None if p.grad is None else p.grad.clone() for p in model.adapter_parameters(list(CONFIGS))
    ]


def by_rows(model):
    model(IDS, labels=IDS, adapter_names=["fr", "legal"]).loss.backward()


def two_adapters_in_one_step(model):
    """The first loss is differentiated while the second adapter is active."""
    model.set_adapter("fr")
    first = model(IDS, labels=IDS).loss
    model.set_adapter("legal")
    (first + model(IDS, labels=IDS).loss).backward()


def backward_after_disabling(model):
    model.set_adapter("legal")
    loss = model(IDS, labels=IDS).loss
    model.disable_adapter_layers()
    loss.backward()
    model.enable_adapter_layers()


def base_in_between(model):
    """What was computed without an adapter is computed again without one."""
    model.set_adapter({"fr": 0.5, "plain": 1.0})
    first = model(IDS, labels=IDS).loss
    with model.activated("__base__"):
        second = model(IDS, labels=IDS).loss
    with model.activated("legal"):
        (first + second).backward()


@pytest.mark.parametrize("method", ["activation", "gradient"])
@pytest.mark.parametrize(
    "run", [by_rows, two_adapters_in_one_step, backward_after_disabling, base_in_between]
)
def test_checkpointing_recomputes_with_the_adapters_of_the_forward(model, run, method):
    model.train()
    expected = gradients(model, lambda: run(model))
    assert sum(gradient is not None for gradient in expected) >= 2 * 1
    getattr(model, f"{method}_checkpointing_enable")()

    actual = gradients(model, lambda: run(model))

    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7)
    assert not model.sharing.is_in_force
