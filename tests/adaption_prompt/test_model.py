"""`AdaptionPromptModel`: many adapters over one base, each its own, and the base given back."""

import pytest
import torch
from support.caches import cache_of, with_cache
from support.families import build, open_gates_, tokens
from surgery_adaption_prompt import (
    AdaptionPromptConfig,
    AdaptionPromptModel,
    adapter_state,
)

from surgery_core import DriftError, OptionsError, StateError, VariantError
from surgery_core.testing import InjectedError, failing_at, snapshot

A = AdaptionPromptConfig(adapter_len=2, adapter_layers=1)
B = AdaptionPromptConfig(adapter_len=3, adapter_layers=3, gate="head")
IDS = tokens()


@pytest.fixture
def base():
    return build()


@pytest.fixture
def model(base):
    """Two adapters with different layers, lengths, gates and values; `a` is active."""
    model = AdaptionPromptModel(base, {"a": A, "b": B}, "a")
    for seed, name in enumerate("ab"):
        open_gates_(model.adapter_modules(name), seed=seed)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_all_configurations_are_added_and_one_is_active(model):
    assert ["a", "b"] == list(model.peft_config)
    assert "a" == model.active_adapter
    assert ["a"] == model.active_adapters
    assert ("b",) == model.swap_state.stored


def test_each_adapter_keeps_its_own_logits(base, model):
    with model.disable_adapter():
        plain = logits(model)
    a = logits(model)
    model.set_adapter("b")
    b = logits(model)

    assert not torch.equal(plain, a)
    assert not torch.equal(a, b)
    model.set_adapter("a")
    assert torch.equal(a, logits(model))
    assert torch.equal(a, logits(base))


def test_adding_does_not_activate(model):
    expected = logits(model)

    model.add_adapter("c", B)

    assert "a" == model.active_adapter
    assert torch.equal(expected, logits(model))


def test_adding_and_selecting_while_disabled_stays_disabled(model):
    model.disable_adapter_layers()
    plain = logits(model)

    model.add_adapter("c", A)
    model.set_adapter("b")

    assert "b" == model.active_adapter
    assert torch.equal(plain, logits(model))
    model.enable_adapter_layers()
    assert not torch.equal(plain, logits(model))


def test_nested_and_repeated_disabling(model):
    expected = logits(model)
    model.enable_adapter_layers()
    with model.disable_adapter():
        with model.disable_adapter():
            model.disable_adapter_layers()
        plain = logits(model)
        assert not torch.equal(expected, plain)

    assert torch.equal(expected, logits(model))


def test_disabling_ends_after_an_error(model):
    expected = logits(model)

    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError

    assert torch.equal(expected, logits(model))


def test_deleting_the_active_adapter_activates_the_first_other(model):
    model.set_adapter("b")
    b = logits(model)
    model.add_adapter("c", A)
    model.set_adapter("c")

    model.delete_adapter("c")
    assert "a" == model.active_adapter
    model.delete_adapter("a")
    assert "b" == model.active_adapter
    assert torch.equal(b, logits(model))


def test_deleting_the_last_adapter_leaves_the_base(model):
    with model.disable_adapter():
        plain = logits(model)
    model.delete_adapter("a")
    model.delete_adapter("b")

    assert model.active_adapter is None
    assert [] == model.active_adapters
    assert torch.equal(plain, logits(model))
    model.add_adapter("c", A)
    assert "c" == model.active_adapter


def test_renaming_keeps_the_adapter(model):
    expected = logits(model)

    model.rename_adapter("a", "z")

    assert ["z", "b"] == list(model.peft_config)
    assert "z" == model.active_adapter
    assert torch.equal(expected, logits(model))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: m.add_adapter("__base__", m.peft_config["a"]),
            "Adapter name '__base__' stands for the base in lists of adapters. Choose another.",
        ),
        (lambda m: m.set_adapter("c"), "Adapter 'c' does not exist: expected some of 'a', 'b'."),
        (lambda m: m.delete_adapter("c"), "Variant 'c' does not exist: expected one of 'a', 'b'."),
        (
            lambda m: m.rename_adapter("a", "b"),
            "Variant name 'b' is taken: there are 'a', 'b'. Choose another.",
        ),
        (
            lambda m: m.add_adapter("a", A),
            "Variant name 'a' is taken: there are 'a', 'b'. Choose another.",
        ),
        (
            lambda m: m.add_adapter("x/y", A),
            "Adapter name 'x/y' cannot name a folder: expected one without separators that does "
            "not begin with a dot. Choose another.",
        ),
        (
            lambda m: m.rename_adapter("a", ".."),
            "Adapter name '..' cannot name a folder: expected one without separators that does "
            "not begin with a dot. Choose another.",
        ),
        (
            lambda m: m.rename_adapter("a", "adapter_config.json"),
            "Adapter name 'adapter_config.json' cannot be saved: a file of that name is saved in the "
            "same folder. Choose another.",
        ),
        (
            lambda m: m.add_adapter("B", A),
            "Adapter name 'B' cannot be saved: on some disks it is the same folder as 'b'. Choose "
            "another.",
        ),
        (
            lambda m: m.rename_adapter("a", "B"),
            "Adapter name 'B' cannot be saved: on some disks it is the same folder as 'b'. Choose "
            "another.",
        ),
        (
            lambda m: m.save_pretrained("nowhere", selected_adapters=["a", "c"]),
            "Variant 'c' does not exist: expected one of 'a', 'b'.",
        ),
    ],
)
def test_names_that_cannot_be_are_refused(model, call, message):
    before = snapshot(model)

    with pytest.raises(VariantError) as caught:
        call(model)

    assert message == str(caught.value)
    assert before == snapshot(model)


def test_a_name_without_a_configuration_is_refused(base):
    with pytest.raises(OptionsError) as caught:
        AdaptionPromptModel(base, {"a": A}, "b")

    assert str(caught.value) == (
        "Adapter 'b' has no configuration: configs has 'a'. Add one under that name."
    )


def test_names_of_a_new_model_that_cannot_be_are_refused(base):
    before = snapshot(base)

    for names in (("a", "A"), ("nul",), ("x" * 300,), ("base_fingerprint.json",)):
        with pytest.raises(VariantError, match="cannot be saved"):
            AdaptionPromptModel(base, dict.fromkeys(names, A), names[0])

    assert before == snapshot(base)


def test_a_folder_is_not_loaded_under_a_name_that_cannot_be_saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    before = snapshot(model)

    for name in ("B", "nul", "adapter_config.json"):
        with pytest.raises(VariantError, match="cannot be saved"):
            model.load_adapter(tmp_path / "b", name)

    assert before == snapshot(model)


def test_a_name_may_change_in_its_case_alone(model):
    model.rename_adapter("a", "A")

    assert ["A", "b"] == list(model.peft_config)


def test_a_bad_second_configuration_leaves_the_base_untouched(base):
    before = snapshot(base)

    with pytest.raises(OptionsError):
        AdaptionPromptModel(
            base, {"a": A, "b": AdaptionPromptConfig(adapter_len=1, adapter_layers=9)}, "a"
        )

    assert before == snapshot(base)


def test_a_failing_add_changes_nothing(model):
    before, expected = snapshot(model.model), logits(model)

    with pytest.raises(OptionsError):
        model.add_adapter("c", AdaptionPromptConfig(adapter_len=1, adapter_layers=9))

    assert ["a", "b"] == list(model.peft_config)
    assert ("a", "b") == model.swap_state.names
    assert before == snapshot(model.model)
    assert torch.equal(expected, logits(model))


@pytest.mark.parametrize(
    ("transition", "writes"),
    [
        (lambda m: m.set_adapter("b"), 3),
        (lambda m: m.disable_adapter_layers(), 1),
        (lambda m: m.delete_adapter("a"), 3),
        (lambda m: m.unload(), 1),
    ],
    ids=["set", "disable", "delete", "unload"],
)
def test_a_failure_at_any_write_leaves_everything_as_it_was(model, transition, writes):
    before, expected = snapshot(model.model), logits(model)
    for k in range(writes):
        model.swap_state.on_write = failing_at(k)

        with pytest.raises(InjectedError):
            transition(model)

        assert before == snapshot(model.model)
        assert ("a", ("b",)) == (model.swap_state.active, model.swap_state.stored)
        assert ["a", "b"] == list(model.peft_config)
        assert torch.equal(expected, logits(model))
    model.swap_state.on_write = failing_at(writes)
    transition(model)


def test_a_replaced_module_is_noticed_before_anything_changes(base, model):
    mine = base.model.layers[2].self_attn
    base.model.layers[2].self_attn = theirs = build(seed=3).model.layers[2].self_attn

    for transition in (lambda: model.set_adapter("b"), model.disable_adapter_layers, model.unload):
        with pytest.raises(DriftError) as caught:
            transition()
        assert ("model.layers.2.self_attn",) == caught.value.fqns
        assert base.model.layers[2].self_attn is theirs

    base.model.layers[2].self_attn = mine
    model.set_adapter("b")


def test_unloading_gives_the_base_back(base):
    base.model.embed_tokens.weight.requires_grad_(False)
    before, expected = snapshot(base), logits(base)
    model = AdaptionPromptModel(base, {"a": A, "b": B}, "a")
    model.set_adapter("b")

    assert base is model.unload()

    assert before == snapshot(base)
    assert torch.equal(expected, logits(base))


def test_only_the_active_adapter_trains(base, model):
    total = sum(parameter.numel() for parameter in base.parameters())

    assert (2 * 24 + 1, total) == model.get_nb_trainable_parameters()
    assert model.trainable_summary().startswith(f"trainable params: 49 || all params: {total:,d}")
    model.set_adapter("b")
    assert 3 * (3 * 24 + 4) == model.get_nb_trainable_parameters()[0]


def test_loaded_adapters_are_frozen_unless_asked(model, tmp_path):
    model.save_pretrained(tmp_path)

    model.load_adapter(tmp_path / "b", "frozen")
    model.load_adapter(tmp_path / "b", "trained", is_trainable=True)

    model.set_adapter("frozen")
    assert 0 == model.get_nb_trainable_parameters()[0]
    model.set_adapter("trained")
    assert 3 * (3 * 24 + 4) == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("active", ["a", "b", None])
def test_saving_writes_each_adapters_own_tensors(model, tmp_path, active):
    """Whichever is active, and also while disabled."""
    expected = {
        name: {key: t.clone() for key, t in adapter_state(model.adapter_modules(name)).items()}
        for name in "ab"
    }
    if active is None:
        model.disable_adapter_layers()
    else:
        model.set_adapter(active)

    model.save_pretrained(tmp_path)

    other = AdaptionPromptModel.from_pretrained(build(), tmp_path / "a", "a")
    other.load_adapter(tmp_path / "b", "b")
    for name, state in expected.items():
        actual = adapter_state(other.adapter_modules(name))
        assert state.keys() == actual.keys()
        assert all(torch.equal(state[key], actual[key]) for key in state)


def test_only_selected_adapters_are_saved(model, tmp_path):
    model.save_pretrained(tmp_path, selected_adapters=["b"])

    assert ["b"] == [path.name for path in tmp_path.iterdir()]


def test_loading_into_a_model_without_adapters_activates(model, tmp_path):
    expected = logits(model)
    model.save_pretrained(tmp_path)
    model.delete_adapter("a")
    model.delete_adapter("b")

    model.load_adapter(tmp_path / "a", "again")

    assert "again" == model.active_adapter
    assert torch.equal(expected, logits(model))


def test_generation_and_what_describes_the_base_pass_through(base, model):
    expected = base.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4)

    actual = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4)

    assert torch.equal(expected, actual)
    assert model.config is base.config
    assert model.get_base_model() is base
    assert (model.device, model.dtype) == (base.device, base.dtype)


def test_cached_decoding_equals_the_full_forward(model):
    with torch.no_grad():
        full = model(IDS).logits
        out = model(IDS[:, :3], use_cache=True)
        steps = [out.logits]
        for at in range(3, IDS.shape[1]):
            out = model(IDS[:, at : at + 1], **with_cache(cache_of(out)), use_cache=True)
            steps.append(out.logits)

    assert torch.allclose(full, torch.cat(steps, dim=1), atol=1e-5)


def test_inactive_adapters_follow_the_model(model):
    model.to(torch.bfloat16)

    for name in "ab":
        for tensor in adapter_state(model.adapter_modules(name)).values():
            assert torch.bfloat16 is tensor.dtype
    model.set_adapter("b")
    assert torch.isfinite(logits(model)).all()


def test_inactive_adapters_follow_a_base_moved_alone(base, model):
    base.to(torch.float64)

    model.set_adapter("b")

    assert all(t.dtype is torch.float64 for t in adapter_state(model.adapter_modules("b")).values())
    assert torch.float64 is logits(model).dtype


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("mode", [False, True])
def test_loading_for_inference_switches_dropout_off(mode, is_trainable, model, tmp_path):
    """A base made from a configuration is in training mode."""
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    base = build().train(mode)

    loaded = AdaptionPromptModel.from_pretrained(base, tmp_path / "a", is_trainable=is_trainable)

    expected = mode and is_trainable
    assert {expected} == {module.training for module in loaded.get_base_model().modules()}
    assert expected is base.training


def test_a_load_that_fails_leaves_the_mode_as_it_was(model, tmp_path):
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    base = build(seed=7).train()

    with pytest.raises(StateError, match="was trained for another base"):
        AdaptionPromptModel.from_pretrained(base, tmp_path / "a", base_check="error")

    assert all(module.training for module in base.modules())
