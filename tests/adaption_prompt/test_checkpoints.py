"""Folders: what is refused, that nothing is half loaded, and that nothing is half written."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import build, open_gates_, tokens
from support.folders import without_header
from surgery_adaption_prompt import (
    AdaptionPromptConfig,
    AdaptionPromptModel,
    adapter_state,
    load_state_,
)

from surgery_core import OptionsError, StateError, SurgeryError

CONFIG = AdaptionPromptConfig(adapter_len=3, adapter_layers=2)


@pytest.fixture
def model():
    model = AdaptionPromptModel(build(), {"default": CONFIG}, "default")
    open_gates_(model.adapter_modules("default"))
    return model


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change):
    """Change the tensors in a folder."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


GATE = "base_model.model.model.layers.1.self_attn.adaption_gate"
PROMPT = "base_model.model.model.layers.2.self_attn.adaption_prompt"


def test_what_was_saved_comes_back(model, folder):
    ids = tokens()

    other = AdaptionPromptModel.from_pretrained(build(), folder)

    assert torch.equal(model(ids).logits, other(ids).logits)


def test_head_gates_and_our_fields_come_back(tmp_path):
    config = AdaptionPromptConfig(
        adapter_len=2, adapter_layers=1, gate="head", gate_activation="tanh"
    )
    model = AdaptionPromptModel(build(), {"fr": config}, "fr")
    open_gates_(model.adapter_modules("fr"))
    model.save_pretrained(tmp_path)
    ids = tokens()

    other = AdaptionPromptModel.from_pretrained(build(), tmp_path / "fr", is_trainable=True)

    assert config == other.peft_config["default"]
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_all_problems_are_named_and_nothing_is_loaded(model):
    modules = model.adapter_modules("default")
    before = {name: tensor.clone() for name, tensor in adapter_state(modules).items()}
    state = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    del state["model.layers.1.self_attn.adaption_gate"]
    state["model.layers.0.self_attn.adaption_gate"] = torch.zeros(1)
    state["model.layers.1.self_attn.adaption_prompt"] = torch.zeros(1, 4, 24)
    state["model.layers.2.self_attn.adaption_gate"] = torch.tensor([float("nan")])
    state["model.layers.2.self_attn.adaption_prompt"] = torch.zeros(1, 3, 24, dtype=torch.int8)

    with pytest.raises(StateError) as caught:
        load_state_(modules, state)

    assert caught.value.missing == ("model.layers.1.self_attn.adaption_gate",)
    assert caught.value.unexpected == ("model.layers.0.self_attn.adaption_gate",)
    assert caught.value.mismatched == (
        "model.layers.1.self_attn.adaption_prompt: expected shape (1, 3, 24), got (1, 4, 24)",
        "model.layers.2.self_attn.adaption_gate: values are not finite in torch.float32",
        "model.layers.2.self_attn.adaption_prompt: expected torch.float32 values, got torch.int8",
    )
    assert str(caught.value) == (
        "State does not fit the adapter: missing 'model.layers.1.self_attn.adaption_gate'; "
        "unexpected 'model.layers.0.self_attn.adaption_gate'; mismatched "
        "'model.layers.1.self_attn.adaption_prompt: expected shape (1, 3, 24), got (1, 4, 24)', "
        "'model.layers.2.self_attn.adaption_gate: values are not finite in torch.float32', "
        "'model.layers.2.self_attn.adaption_prompt: expected torch.float32 values, got "
        "torch.int8'. Load it with the configuration it was trained with, on the model it was "
        "trained for."
    )
    for name, tensor in adapter_state(modules).items():
        assert torch.equal(before[name], tensor)


def test_values_too_large_for_the_parameters_dtype_are_refused():
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=1, dtype="float16")
    model = AdaptionPromptModel(build(), {"default": config}, "default")
    modules = model.adapter_modules("default")
    state = {name: tensor.float() + 1e6 for name, tensor in adapter_state(modules).items()}

    with pytest.raises(StateError, match=r"values are not finite in torch\.float16"):
        load_state_(modules, state)


@pytest.mark.parametrize(
    ("change", "attribute"),
    [
        (lambda t: t.pop(GATE), "missing"),
        (lambda t: t.update({GATE.replace("1", "0"): torch.zeros(1)}), "unexpected"),
        (lambda t: t.update({GATE: torch.full((1,), float("inf"))}), "mismatched"),
        (lambda t: t.update({PROMPT: torch.zeros(1, 3, 25)}), "mismatched"),
        (lambda t: t.update({"lora_A": torch.zeros(1)}), "unexpected"),
    ],
)
def test_a_folder_that_does_not_fit_leaves_the_model_alone(folder, change, attribute):
    rewrite(folder, change)
    base = build()
    modules, keys = list(base.modules()), list(base.state_dict())

    with pytest.raises(StateError) as caught:
        AdaptionPromptModel.from_pretrained(base, folder)

    assert getattr(caught.value, attribute)
    assert modules == list(base.modules())
    assert keys == list(base.state_dict())
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_an_adapter_that_does_not_fit_is_not_added(model, folder):
    rewrite(folder, lambda tensors: tensors.pop(GATE))
    ids = tokens()
    expected = model(ids).logits

    with pytest.raises(StateError):
        model.load_adapter(folder, "fr")

    assert ["default"] == list(model.peft_config)
    assert ("default",) == model.swap_state.names
    assert torch.equal(expected, model(ids).logits)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("adapter_config.json", None, SurgeryError, "has no readable adapter_config.json"),
        ("adapter_config.json", "{", SurgeryError, "has no readable adapter_config.json"),
        ("adapter_config.json", "[1]", SurgeryError, r"expected a JSON object, got \[1\]"),
        ("adapter_config.json", '{"r": 8}', OptionsError, "has no field 'r'"),
        ("adapter_model.safetensors", None, SurgeryError, "has no readable adapter_model"),
        ("adapter_model.safetensors", "junk", SurgeryError, "has no readable adapter_model"),
    ],
)
def test_damaged_folders_are_refused(folder, name, content, error, message):
    path = without_header(folder) / name
    path.unlink()
    if content is not None:
        path.write_text(content)

    with pytest.raises(error, match=message):
        AdaptionPromptModel.from_pretrained(build(), folder)


def test_values_that_are_not_finite_are_not_saved(model, folder):
    (module, _) = model.adapter_modules("default").values()
    before = (folder / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        module.adaption_prompt[0, 0, 0] = float("nan")

    with pytest.raises(StateError) as caught:
        model.save_pretrained(folder)

    assert str(caught.value) == (
        "Adapter is not saved: expected finite values, got others in "
        "'model.layers.1.self_attn.adaption_prompt'. Training diverged; go back to an earlier "
        "state."
    )
    assert before == (folder / "adapter_model.safetensors").read_bytes()


def test_no_temporary_files_are_left(folder):
    assert ["adapter_config.json", "adapter_model.safetensors", "base_fingerprint.json"] == sorted(
        path.name for path in folder.iterdir()
    )


def test_the_folder_is_written_as_peft_writes_it(folder):
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())

    assert path.read_text() == json.dumps(values, indent=2, sort_keys=True)
    assert values["inference_mode"] is True
    assert {GATE: (1,), PROMPT: (1, 3, 24)}.items() <= {
        name: tuple(tensor.shape)
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }.items()


def test_one_adapter_that_cannot_be_saved_keeps_all_from_being_written(model, tmp_path):
    model.add_adapter("bad", CONFIG)
    with torch.no_grad():
        for module in model.adapter_modules("bad").values():
            module.adaption_gate.fill_(float("inf"))

    with pytest.raises(StateError):
        model.save_pretrained(tmp_path / "new")

    assert not (tmp_path / "new").exists()


def test_the_name_of_the_base_is_written_unless_the_configuration_has_one(tmp_path):
    base = build()
    base.config.name_or_path = "some/base"
    configs = {
        "default": CONFIG,
        "own": replace(CONFIG, base_model_name_or_path="another/base"),
    }
    AdaptionPromptModel(base, configs, "own").save_pretrained(tmp_path)

    names = [
        json.loads((tmp_path / folder / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
        for folder in ("", "own")
    ]
    assert ["some/base", "another/base"] == names
