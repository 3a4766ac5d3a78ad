"""`AdapterStore` with a model: whatever asks the model for an adapter gets it from disk."""

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from support.families import build, open_gates_, tokens
from support.folders import without_header
from surgery_adaption_prompt import AdapterStore, AdaptionPromptConfig, AdaptionPromptModel
from surgery_adaption_prompt.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from surgery_adaption_prompt.store import StoreCounters, StoreError

from surgery_core import OptionsError, StateError, SurgeryError, VariantError
from surgery_core.testing import snapshot

CONFIGS = {
    "main": AdaptionPromptConfig(adapter_len=1, adapter_layers=1),
    "heads": AdaptionPromptConfig(adapter_len=2, adapter_layers=2, gate="head"),
    "half": AdaptionPromptConfig(adapter_len=3, adapter_layers=3, dtype="bfloat16"),
}
OWN = AdaptionPromptConfig(adapter_len=3, adapter_layers=3)
SIZES = {"main": 4 * (24 + 1), "heads": 4 * 2 * (2 * 24 + 4), "half": 2 * 3 * (3 * 24 + 1)}
"""In bytes."""
LARGEST_TWO = SIZES["heads"] + SIZES["half"]
IDS = tokens()
BASE = "__base__"
MIX = {"heads": 0.5, "main": -1.0}


def logits(model, ids=IDS, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def close(actual, expected, limit=1e-6):
    return bool((actual - expected).abs().max() <= limit * expected.abs().max())


@pytest.fixture
def known():
    """Return a model that has all the adapters in memory, with open gates."""
    model = AdaptionPromptModel(build(), {**CONFIGS, "own": OWN}, "own").eval()
    for seed, name in enumerate((*CONFIGS, "own")):
        open_gates_(model.adapter_modules(name), seed=seed)
    return model


@pytest.fixture
def folder(tmp_path, known):
    known.save_pretrained(tmp_path, selected_adapters=list(CONFIGS))
    return tmp_path


@pytest.fixture
def model(folder, known):
    """Return one that has its own in memory, and the others on disk."""
    return serving(folder, known)


def serving(folder, known, **options):
    store = AdapterStore(folder, base_check="error", **options)
    model = AdaptionPromptModel(build(), {"own": OWN}, "own", store=store).eval()
    for fqn, module in model.adapter_modules("own").items():
        theirs = known.adapter_modules("own")[fqn]
        with torch.no_grad():
            module.adaption_prompt.copy_(theirs.adaption_prompt)
            module.adaption_gate.copy_(theirs.adaption_gate)
    return model


def counted(model):
    counters = model.store.counters
    return counters.hits, counters.misses, counters.evictions


# -- asked by hand ----------------------------------------------------------------------------------


def test_adapters_of_a_store_compute_what_they_did_when_saved(known, model):
    store = model.store
    for name in ("half", "main", "heads", "half"):
        store.ensure(model, CONFIGS)
        model.set_adapter(name)
        assert (name,) == store.clear() == store.loaded
        known.set_adapter(name)
        assert torch.equal(logits(known), logits(model))

    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_active_adapter_stays_and_the_others_take_turns(folder, known):
    model = serving(folder, known, max_bytes=LARGEST_TWO)
    for name in ("main", "heads", "half", "heads", "main"):
        model.store.ensure(model, [name])
        model.set_adapter(name)
        known.set_adapter(name)
        assert torch.equal(logits(known), logits(model))
        assert model.store.counters.num_bytes <= LARGEST_TWO


@pytest.mark.parametrize("name", CONFIGS)
def test_the_size_told_from_the_file_is_that_in_the_model(folder, known, name):
    model = serving(folder, known, max_bytes=0)
    with pytest.raises(StoreError) as caught:
        model.set_adapter(name)

    model = serving(folder, known, max_bytes=caught.value.num_bytes)
    model.set_adapter(name)

    assert SIZES[name] == caught.value.num_bytes
    assert SIZES[name] == model.store.counters.num_bytes == model.adapter_bytes(name)


def test_adapters_swapped_or_renamed_become_the_models_own(folder, model):
    model.store.ensure(model, CONFIGS)

    model.hotswap_adapter(folder / "main", "main")
    model.rename_adapter("heads", "new")
    model.store.clear()

    assert {"own", "main", "new"} == set(model.peft_config)


def test_a_model_without_adapters_gets_its_first_from_the_store(known, model):
    """Loading activates nothing: a batch may have asked, and what is active cannot be evicted."""
    model.delete_adapter("own")
    with model.disable_adapter():
        base = logits(model)
    rows = logits(model, adapter_names=["heads", "__base__"])

    assert model.active_adapter is None
    assert torch.equal(base, logits(model))
    assert torch.equal(base[1], rows[1])
    assert not torch.equal(base[0], rows[0])
    model.set_adapter("heads")
    known.set_adapter("heads")
    assert torch.equal(logits(known), logits(model))
    model.unload()


# -- asked through the model ------------------------------------------------------------------------


def selecting(choice):
    return lambda model: model.set_adapter(choice) or logits(model)


def within(choices):
    def run(model):
        with model.activated(choices):
            return logits(model)

    return run


def with_rows(names):
    return lambda model: logits(model, adapter_names=names)


def generating(names):
    def run(model):
        mask = torch.ones_like(IDS)
        return model.generate(
            IDS, attention_mask=mask, adapter_names=names, max_new_tokens=4, do_sample=False
        )

    return run


def in_buffers(names):
    def run(model):
        with model.fixed_rows(2, adapter_len=3) as rows:
            rows.assign(names)
            return logits(model)

    return run


def summed(model):
    model.add_weighted_adapter(["heads"], [-0.5], "sum")
    model.set_adapter("sum")
    return logits(model)


def merged(model):
    model.set_adapter({"main": -2.0})
    model.merge_adapter()
    return logits(model)


WAYS = {
    "set_adapter": (selecting("heads"), ["heads"]),
    "set_adapter, several": (selecting(MIX), ["heads", "main"]),
    "activated": (within("half"), ["half"]),
    "activated, several": (within(MIX), ["heads", "main"]),
    "activated, rows": (within([MIX, "half"]), ["half", "heads", "main"]),
    "forward": (with_rows(["main", "heads"]), ["heads", "main"]),
    "forward, own and base": (with_rows(["own", BASE]), []),
    "generate": (generating(["heads", BASE]), ["heads"]),
    "fixed_rows": (in_buffers(["main", "own"]), ["main"]),
    "add_weighted_adapter": (summed, ["heads"]),
    "merge_adapter": (merged, ["main"]),
}


@pytest.mark.parametrize(("way", "loaded"), WAYS.values(), ids=WAYS)
def test_whatever_is_asked_for_is_loaded_and_computes_as_ever(known, model, way, loaded):
    """Once: the second time it is there, and what the model has in memory is never loaded."""
    expected = way(known)

    assert close(way(model), expected, limit=1e-6)
    assert loaded == sorted(model.store.loaded)
    assert (len(loaded), 0) == counted(model)[1:]
    if way is not summed:
        model.set_adapter("own")
        assert close(way(model), expected, limit=1e-6)
    assert (len(loaded), 0) == counted(model)[1:]


def test_hits_misses_and_evictions_are_counted(folder, known):
    model = serving(folder, known, max_bytes=LARGEST_TWO)
    for name in ("main", "own", "main", "half", "heads", "main"):
        known.set_adapter(name)
        model.set_adapter(name)
        assert torch.equal(logits(known), logits(model))

    # The second main is a hit; heads makes main leave, and main again makes half leave.
    assert model.store.counters == StoreCounters(
        hits=1,
        misses=4,
        evictions=2,
        num_loaded=2,
        num_bytes=SIZES["heads"] + SIZES["main"],
    )
    assert ["own", "heads", "main"] == list(model.peft_config)
    assert ("heads", "main") == model.store.loaded


def test_adapters_take_turns_in_rows_within_the_budget(folder, known):
    model = serving(folder, known, max_bytes=LARGEST_TWO)
    for names in (["main", "heads"], ["half", "heads"], ["own", BASE], ["main", "half"]):
        assert close(logits(model, adapter_names=names), logits(known, adapter_names=names))
        assert model.store.counters.num_bytes <= LARGEST_TWO
    with pytest.raises(StoreError, match=r"no room for 'half', 'heads', 'main'"):
        logits(model, tokens(3), adapter_names=["main", "heads", "half"])

    assert (2, 4, 2) == counted(model)
    assert "own" == model.active_adapter
    assert not model.sharing.is_in_force


# -- what is in use ---------------------------------------------------------------------------------


@contextmanager
def selected(model):
    model.set_adapter("heads")
    yield
    model.set_adapter("own")


@contextmanager
def selected_while_disabled(model):
    model.set_adapter("heads")
    with model.disable_adapter():
        yield
    model.set_adapter("own")


@contextmanager
def composed(model):
    model.set_adapter({"own": 1.0, "heads": 0.0})
    yield
    model.set_adapter("own")


@contextmanager
def used_by_a_thread(model):
    with ThreadPoolExecutor(1) as pool:
        context = model.activated(["heads", BASE])
        pool.submit(context.__enter__).result()
        yield
        pool.submit(context.__exit__, None, None, None).result()


@contextmanager
def leased(model):
    with model.store.lease(model, ["heads"]):
        yield


USES = [selected, selected_while_disabled, composed, used_by_a_thread, leased]


@pytest.mark.parametrize("use", USES)
def test_what_is_in_use_is_never_evicted(folder, known, use):
    """Neither for others, which find no room, nor by hand; afterwards it is."""
    model = serving(folder, known, max_bytes=SIZES["heads"] + SIZES["main"])
    with use(model):
        modules = model.adapter_modules("heads")
        model.store.ensure(model, ["main"])
        with pytest.raises(StoreError, match=r"(in use|leased): 'heads'"):
            model.store.ensure(model, ["half"])
        assert ("heads", "main") == tuple(sorted(model.store.loaded))
        model.store.evict("main")
        assert ("heads",) == model.store.clear()
        with pytest.raises(VariantError, match=r"'heads' cannot be evicted: .*(in use|leased)"):
            model.store.evict("heads")
        assert modules == model.adapter_modules("heads")

    model.store.ensure(model, ["half"])
    assert ("half",) == model.store.loaded


def test_what_is_merged_is_in_use(model):
    model.set_adapter("main")
    model.merge_adapter()

    assert ("main",) == model.store.clear()
    model.unmerge_adapter()
    assert ("main",) == model.store.clear()
    model.set_adapter("own")
    assert () == model.store.clear()


def test_the_adapters_of_a_composition_that_is_left_may_go_for_the_next(folder, known):
    """But not before: what is active while the others are loaded still computes with them."""
    model = serving(folder, known, max_bytes=LARGEST_TWO)
    model.set_adapter(MIX)
    with pytest.raises(StoreError, match="in use: 'heads', 'main'"):
        model.set_adapter("half")
    assert MIX == model.active_composition.weights

    model.set_adapter("own")
    model.set_adapter({"half": 1.0, "heads": 2.0})
    assert ("half", "heads") == model.store.loaded


def test_threads_with_adapters_of_their_own_share_one_budget(folder, known):
    """Each computes with what it asked for, whoever else makes room meanwhile."""
    expected = {name: logits(known, adapter_names=[name] * len(IDS)) for name in CONFIGS}
    model = serving(folder, known, max_bytes=sum(SIZES.values()) - 1)

    def run(names):
        for name in names:
            with model.activated(name):
                assert close(logits(model), expected[name])

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(run, list(CONFIGS) * 5), pool.submit(run, ["heads", "main"] * 8)]:
            done.result()

    counters = model.store.counters
    assert 5 * 3 + 8 * 2 == counters.hits + counters.misses
    assert counters.misses - counters.evictions == counters.num_loaded == len(model.store.loaded)


# -- what fails -------------------------------------------------------------------------------------


def for_another_model(folder):
    """Its configuration promises fewer layers than its tensors are for."""
    path = without_header(folder / "half") / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "adapter_layers": 2}))


def damaged(folder):
    path = folder / "half" / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (for_another_model, StateError, "State does not fit the adapter"),
        (damaged, SurgeryError, "has no readable adapter_model.safetensors"),
    ],
)
@pytest.mark.parametrize(
    "way",
    [
        selecting("half"),
        selecting({"half": 1.0, "main": 1.0, "heads": 2.0}),
        within(["main", "half"]),
        with_rows(["half", "heads"]),
        generating(["half", "main"]),
        lambda model: model.add_weighted_adapter(["half"], [1.0], "sum"),
        lambda model: model.store.ensure(model, ["main", "heads", "half"]),
    ],
    ids=["set", "set several", "activated", "forward", "generate", "sum", "ensure"],
)
def test_a_load_that_fails_leaves_the_model_as_it_was(folder, model, harm, error, message, way):
    """Also those are taken back that were loaded along with it."""
    harm(folder)
    model.set_adapter({"own": 0.5})
    before, expected = snapshot(model.get_base_model()), logits(model)

    with pytest.raises(error, match=message):
        way(model)

    assert before == snapshot(model.get_base_model())
    assert ["own"] == list(model.peft_config)
    assert {"own": 0.5} == model.active_composition.weights
    assert (0, 0, 0) == counted(model)
    assert not model.sharing.is_in_force
    assert torch.equal(expected, logits(model))
    model.set_adapter("main")
    assert ("main",) == model.store.loaded


def test_a_failed_assignment_leaves_the_buffers_as_they_were(model):
    with model.fixed_rows(2, adapter_len=2) as rows:
        rows.assign(["heads"])
        expected = logits(model)
        for names, error, message in (
            (["half"], OptionsError, r"Prompt has 3 tokens: expected at most adapter_len=2"),
            (["main", "nobody"], VariantError, r"has no adapter 'nobody'"),
        ):
            with pytest.raises(error, match=message):
                rows.assign(names)
            assert torch.equal(expected, logits(model))

    assert "own" == model.active_adapter


@pytest.mark.parametrize("name", ["nobody", "../main", "no folder"])
def test_names_that_neither_the_model_nor_the_store_has_are_refused(model, name):
    for way in (selecting(name), selecting({"own": 1.0, name: 1.0}), with_rows([name, "main"])):
        with pytest.raises(VariantError, match=name.replace(".", r"\.")):
            way(model)

    assert (0, 0, 0) == counted(model)
    assert "own" == model.active_adapter


# -- copies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_a_store_of_its_own_with_the_same_adapters(known, model, clone):
    model.set_adapter(MIX)
    twin = clone(model)

    assert twin.store is not model.store
    assert model.store.counters.num_bytes == SIZES["main"] + SIZES["heads"]
    twin.set_adapter("half")
    known.set_adapter("half")
    assert torch.equal(logits(known), logits(twin))
    assert ("half",) == twin.store.clear()
    assert ["own", "half"] == list(twin.peft_config)
    assert ("heads", "main") == model.store.loaded == model.store.clear()
    known.set_adapter(MIX)
    assert torch.equal(logits(known), logits(model))
