"""Folders: what is refused, that nothing is half loaded, and that nothing is half written."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import build, open_gates_, tokens
from support.folders import header_of, without_header
from surgery_adaption_prompt import (
    AdaptionPromptConfig,
    AdaptionPromptModel,
    adapter_state,
    load_state_,
)
from surgery_adaption_prompt.checkpoints import folder_stamp

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


@pytest.mark.parametrize(
    ("value", "base"), [(1e300, torch.float32), (1e38, torch.float16), (-7e4, torch.float16)]
)
def test_values_too_large_to_be_computed_with_are_refused_at_load(folder, value, base):
    """In float16 the prompt is cast to the base's dtype, whatever its own is."""
    rewrite(folder, lambda tensors: tensors.update({PROMPT: tensors[PROMPT].double()}))
    AdaptionPromptModel.from_pretrained(build(dtype=base), folder, base_check="ignore").unload()
    rewrite(folder, lambda tensors: tensors[PROMPT][0, 1, 2:3].fill_(value))

    with pytest.raises(StateError, match=r"values are not finite in torch\.float"):
        AdaptionPromptModel.from_pretrained(build(dtype=base), folder)


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


def test_layers_that_share_a_parameter_are_saved(model, tmp_path):
    """As copies, as PEFT does: what is computed stays."""
    first, second = model.adapter_modules("default").values()
    second.adaption_prompt = first.adaption_prompt
    expected = model(tokens()).logits

    model.save_pretrained(tmp_path)

    state = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(state[PROMPT], first.adaption_prompt)
    assert torch.equal(state[PROMPT.replace("2", "1")], first.adaption_prompt)
    again = AdaptionPromptModel.from_pretrained(build(), tmp_path)
    assert torch.equal(expected, again(tokens()).logits)


def test_what_belongs_to_the_tensors_stands_in_their_file_too(model, folder):
    """Other files are for people and PEFT: whatever they say, the adapter is what was saved."""
    header = header_of(folder / "adapter_model.safetensors")
    texts = {path.name: path.read_text() for path in folder.glob("*.json")}
    assert {"format": "pt", **texts} == header
    assert {"adapter_config.json", "base_fingerprint.json"} == texts.keys()
    expected = model(tokens()).logits

    for change in (lambda p: p.write_text('{"adapter_len": 7}'), lambda p: p.unlink()):
        for name in texts:
            change(folder / name)
        again = AdaptionPromptModel.from_pretrained(build(), folder, base_check="error")
        assert torch.equal(expected, again(tokens()).logits)


def test_the_same_adapter_is_the_same_bytes(model, folder, tmp_path):
    model.save_pretrained(tmp_path / "again")

    for name in ("adapter_model.safetensors", "adapter_config.json", "base_fingerprint.json"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("is_pickled", [False, True])
def test_a_folder_of_pefts_that_is_saved_anew_while_it_is_read_is_refused(
    folder, monkeypatch, is_pickled
):
    """Its tensors are read before its configuration, which is then of another save."""
    path = without_header(folder) / "adapter_model.safetensors"
    if is_pickled:
        torch.save(load_file(path), folder / "adapter_model.bin")
        path.unlink()
    other = AdaptionPromptModel(
        build(), {"default": replace(CONFIG, gate_activation="tanh")}, "default"
    )

    def read_text(path, **_):
        if path.name == "adapter_config.json":
            other.save_pretrained(folder)
        return path.read_text()

    monkeypatch.setattr("surgery_core.tensor_file.read_text", read_text)

    with pytest.raises(SurgeryError, match="Saved anew while it was read; read it again"):
        AdaptionPromptModel.from_pretrained(build(), folder)
    monkeypatch.undo()
    again = AdaptionPromptModel.from_pretrained(build(), folder)
    assert "tanh" == again.peft_config["default"].gate_activation


def test_the_stamp_of_a_folder_changes_with_each_save(model, tmp_path):
    folder = tmp_path / "a"
    stamps = {folder_stamp(folder)}

    for _ in range(3):
        model.save_pretrained(folder)
        stamps.add(folder_stamp(folder))
        assert folder_stamp(folder) in stamps

    assert 4 == len(stamps)
