"""What must not mix: merged adapters, fused optimizers, copies and late deletions with threads and rows."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.families import build, open_gates_, tokens
from surgery_adaption_prompt import AdapterStore, AdaptionPromptConfig, AdaptionPromptModel

from surgery_core import OptionsError, VariantError
from surgery_core.testing import InjectedError, failing_at

IDS = tokens(2, 6)


def make(**lengths):
    configs = {
        name: AdaptionPromptConfig(adapter_len=length, adapter_layers=2)
        for name, length in (lengths or {"one": 1, "fr": 3}).items()
    }
    model = AdaptionPromptModel(build(seed=1), configs, next(iter(configs))).eval()
    for seed, name in enumerate(configs):
        open_gates_(model.adapter_modules(name), seed=seed)
    return model


def logits(model, **options):
    with torch.no_grad():
        return model(IDS, **options).logits


def test_rows_and_threads_are_refused_while_an_adapter_is_merged():
    """Its bias would reach them too."""
    model = make()
    model.merge_adapter()
    merged = logits(model)
    for call in (
        lambda: logits(model, adapter_names=["__base__", "fr"]),
        lambda: model.activated("fr").__enter__(),
    ):
        with pytest.raises(OptionsError, match="Model has a merged adapter: expected none while"):
            call()

    assert torch.equal(merged, logits(model))
    assert not model.sharing.is_in_force


def test_nothing_is_merged_while_a_thread_uses_adapters():
    model = make()
    with model.activated("fr"):
        for call in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(
                OptionsError, match="expected no thread that uses adapters of its own"
            ):
                call()
    model.merge_adapter()


@pytest.mark.parametrize("way", ["rows", "context", "active"])
def test_a_fused_step_shows_everywhere_at_once(way):
    """PyTorch does not count such a step: the active adapter, rows and open contexts see it."""
    model = make(fr=3, legal=2)
    with model.activated("fr") as other:
        before = logits(other)
        rows = logits(model, adapter_names=["fr", "legal"])
        optimizer = torch.optim.AdamW(model.adapter_parameters(["fr"]), lr=0.3, fused=True)
        if way == "rows":
            loss = model(IDS, labels=IDS, adapter_names=["fr", "fr"]).loss
        elif way == "context":
            with model.activated("fr"):
                loss = model(IDS, labels=IDS).loss
        else:
            with model.activated({"fr": 1.0}):
                loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        after = logits(other)
    fresh = copy.deepcopy(model)

    assert not torch.allclose(before, after)
    assert torch.equal(logits(fresh), logits(model))
    assert torch.allclose(after, logits(model), atol=1e-6)
    actual = logits(model, adapter_names=["fr", "legal"])
    assert not torch.allclose(rows[0], actual[0])
    assert torch.equal(logits(fresh, adapter_names=["fr", "legal"]), actual)


def test_a_copy_made_inside_a_context_has_no_listeners():
    model = make(fr=3, legal=2)
    model.add_adapter("deep", AdaptionPromptConfig(adapter_len=2, adapter_layers=3))
    with model.activated("deep"):
        twin = copy.deepcopy(model)
    expected = logits(model)

    assert torch.equal(expected, logits(twin))
    assert "LlamaAttention" == type(twin.get_base_model().model.layers[0].self_attn).__name__
    twin.delete_adapter("deep")
    twin.disable_adapter_layers()
    twin.unload()


def test_an_adapter_deleted_before_the_backward_pass_is_named():
    model = make(fr=3, legal=2)
    model.train()
    model.activation_checkpointing_enable()
    loss = model(IDS, labels=IDS, adapter_names=["fr", "legal"]).loss
    model.delete_adapter("legal")

    with pytest.raises(VariantError, match="Adapter 'legal' was deleted before the backward pass"):
        loss.backward()


def test_fixed_rows_refuse_what_there_are_no_buffers_for():
    model = make(fr=3)
    with model.fixed_rows(2) as rows:
        model.add_adapter("deep", AdaptionPromptConfig(adapter_len=2, adapter_layers=3))
        with pytest.raises(
            OptionsError, match=r"at 'model\.layers\.0\.self_attn', where there are no"
        ):
            rows.assign(["deep"])
        with pytest.raises(OptionsError, match=r"adapter_names has \{'fr': 1\.0\}: expected one"):
            rows.assign([{"fr": 1.0}])


def test_unmerging_asks_the_store_before_it_takes_the_lock(tmp_path):
    """The other order could wait for a store that waits for the model."""
    model = make()
    model.save_pretrained(tmp_path)
    model.store = AdapterStore(tmp_path)
    model.merge_adapter()
    lease = model.store.lease

    def unlocked(*arguments):
        assert not model.sharing.lock._is_owned()
        return lease(*arguments)

    model.store.lease = unlocked
    model.unmerge_adapter()
    assert "one" == model.swap_state.active


def test_an_evaluation_between_backward_and_a_fused_step_leaves_nothing_stale():
    """PyTorch does not count what a fused optimizer writes; a waiting gradient tells of it."""
    model = make(fr=3)
    optimizer = torch.optim.AdamW(model.adapter_parameters(["fr"]), lr=0.3, fused=True)
    model(IDS, labels=IDS).loss.backward()
    before = logits(model)
    optimizer.step()
    optimizer.zero_grad()

    assert not torch.allclose(before, logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_an_evaluation_between_forward_and_backward_keeps_nothing_either():
    model = make(fr=3)
    optimizer = torch.optim.AdamW(model.adapter_parameters(["fr"]), lr=0.3, fused=True)
    loss = model(IDS, labels=IDS).loss
    logits(model)
    loss.backward()
    before = logits(model)
    optimizer.step()
    optimizer.zero_grad()

    assert not torch.allclose(before, logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def failing_on(model, number=0):
    model.swap_state.on_write = failing_at(number)


def test_a_first_adapter_that_cannot_be_activated_is_not_added(tmp_path):
    model = make()
    model.save_pretrained(tmp_path, selected_adapters=["fr"])
    for name in ("one", "fr"):
        model.delete_adapter(name)
    config = AdaptionPromptConfig(adapter_len=2, adapter_layers=1)
    for add in (
        lambda: model.add_adapter("new", config),
        lambda: model.load_adapter(tmp_path / "fr", "new"),
    ):
        failing_on(model)
        with pytest.raises(InjectedError):
            add()
        model.swap_state.on_write = None

        assert {} == model.peft_config
        assert () == model.swap_state.names
    model.add_adapter("new", config)
    assert "new" == model.active_adapter


def test_a_composition_that_cannot_be_activated_leaves_nothing():
    model = make()
    failing_on(model)
    with pytest.raises(InjectedError):
        model.set_adapter({"one": 1.0, "fr": 1.0})
    model.swap_state.on_write = None

    assert ("fr", "one") == model.swap_state.names
    model.set_adapter({"one": 1.0, "fr": 1.0})
    model.set_adapter("one")
    assert ("fr", "one") == model.swap_state.names


def test_a_context_that_cannot_be_left_cleanly_leaves_a_model_that_computes_right():
    """Listeners that stay compute what the base does; the next change takes them out."""
    model = make()
    expected = logits(model)
    context = model.activated("fr")
    context.__enter__()
    failing_on(model)
    with pytest.raises(InjectedError):
        context.__exit__(None, None, None)
    model.swap_state.on_write = None

    assert not model.sharing.is_in_force
    assert torch.equal(expected, logits(model))
    base = model.unload()
    assert not any("Adapted" in type(module).__name__ for module in base.modules())


def test_a_switch_that_fails_after_the_base_moved_leaves_adapters_where_it_went():
    model = make()
    model.get_base_model().double()
    failing_on(model)
    with pytest.raises(InjectedError):
        model.set_adapter("fr")
    model.swap_state.on_write = None
    model.get_base_model().float()
    model.set_adapter("fr")

    for module in model.adapter_modules("fr").values():
        assert torch.float32 is module.adaption_prompt.dtype


def test_hotswapping_waits_for_whoever_holds_the_lock(tmp_path):
    """A context being entered, or another switch, sees the values before or those after."""
    model = make()
    model.save_pretrained(tmp_path, selected_adapters=["fr"])
    with ThreadPoolExecutor(1) as pool, model.sharing.lock:
        done = pool.submit(model.hotswap_adapter, tmp_path / "fr", "fr")
        with pytest.raises(TimeoutError):
            done.result(timeout=0.3)
        model.sharing.lock.release()
        done.result(timeout=30)
        model.sharing.lock.acquire()
