"""What must not mix: merged adapters, fused optimizers, copies and late deletions with threads and rows."""

import copy

import pytest
import torch
from support.families import build, open_gates_, tokens
from surgery_adaption_prompt import AdapterStore, AdaptionPromptConfig, AdaptionPromptModel

from surgery_core import OptionsError, VariantError

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
