"""Models of transformers come from folders, GGUF files and identifiers, whole or not at all."""

import json

import peft
import pytest
import torch
from interop.test_quantised_bases import write_gguf
from support.families import VOCAB, build, gpt2, tokens
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from surgery_adaption_prompt.sources import load_model, load_skeleton, probe_inputs
from torch import nn
from transformers import ViTConfig, ViTModel

from surgery_core import SurgeryError, fingerprint

LOADERS = pytest.mark.parametrize("load", [load_model, load_skeleton])


def refusal(load, source):
    """Return why a source cannot be loaded, without what is the same for all."""
    with pytest.raises(SurgeryError) as caught:
        load(str(source))
    assert caught.value.__cause__ is not None
    message = str(caught.value)
    begin, end = f"Model {str(source)!r} cannot be loaded: ", ". Check the path, or the connection."
    assert message.startswith(begin)
    assert message.endswith(end)
    assert "\n" not in message
    return message.removeprefix(begin).removesuffix(end)


def change(folder, **values):
    """Change a configuration."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# -- what is loaded -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_folder_gives_the_values_and_the_dtype_that_were_saved(tmp_path, dtype):
    """For evaluation, whatever mode it was saved in; the skeleton has the same structure."""
    saved = build(dtype=dtype).train()
    saved.save_pretrained(tmp_path)

    model, skeleton = load_model(str(tmp_path)), load_skeleton(str(tmp_path))

    state = model.state_dict()
    assert {"model.safetensors"} == {path.name for path in tmp_path.glob("*.safetensors")}
    assert {dtype} == {parameter.dtype for parameter in model.parameters()}
    assert all(torch.equal(value, state[key]) for key, value in saved.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert fingerprint(model) == fingerprint(skeleton)
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_weights_that_are_tied_are_not_lacking(tmp_path):
    saved = gpt2()
    saved.save_pretrained(tmp_path)

    model = load_model(str(tmp_path))

    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(saved(tokens()).logits, model(tokens()).logits)


def test_a_gguf_file_gives_its_values(tmp_path):
    """In a folder of several, each by its name."""
    pytest.importorskip("gguf", reason="needs gguf")
    for seed, name in enumerate(("one", "two")):
        write_gguf(build(seed=seed), tmp_path / f"{name}.gguf")

    one, two = (load_model(str(tmp_path / f"{name}.gguf")) for name in ("one", "two"))
    skeleton = load_skeleton(str(tmp_path / "two.gguf"))

    for seed, model in enumerate((one, two)):
        # Too narrow to be quantised; not among those that llama.cpp has in another order.
        actual, expected = (m.model.layers[1].self_attn.v_proj for m in (model, build(seed=seed)))
        assert torch.equal(expected.weight, actual.weight)
    assert one(tokens()).logits.isfinite().all()
    assert two.state_dict().keys() == skeleton.state_dict().keys()
    assert all(parameter.is_meta for parameter in skeleton.parameters())


# -- what is not ----------------------------------------------------------------------------------


@LOADERS
@pytest.mark.parametrize("source", ["", "chat", "./chat", "a b", "/", "org/name/more", "package:f"])
def test_what_is_no_source_is_left_to_others(load, source):
    assert load(source) is None


@LOADERS
def test_folders_and_files_of_others_are_left_to_them(load, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "folder.gguf").mkdir()

    assert load(str(tmp_path)) is None
    assert load(str(tmp_path / "model.safetensors")) is None
    assert load(str(tmp_path / "folder.gguf")) is None
    assert load(str(tmp_path / "missing.gguf")) is None


@LOADERS
@pytest.mark.parametrize("source", ["nobody/nothing", "models/chat"])
def test_an_identifier_without_a_connection_is_an_error(load, source):
    """A folder whose name is misspelt may look like one."""
    assert (
        "We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them "
        "in the cached files"
    ) == refusal(load, source)


@LOADERS
def test_a_damaged_configuration_is_an_error(load, tmp_path):
    path = tmp_path / "config.json"

    path.write_text("{")
    assert f"It looks like the config file at '{path}' is not a valid JSON file" == refusal(
        load, tmp_path
    )
    path.write_text('{"model_type": "nobodys"}')
    assert "model type `nobodys`" in refusal(load, tmp_path)


@LOADERS
def test_a_model_that_is_no_language_model_is_an_error(load, tmp_path):
    ViTConfig().save_pretrained(tmp_path)

    assert "Unrecognized configuration class" in refusal(load, tmp_path)


@LOADERS
def test_code_in_a_folder_is_not_executed(load, tmp_path):
    """And nobody is asked whether it may be."""
    build().config.save_pretrained(tmp_path)
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change(tmp_path, model_type="own", auto_map=names)
    (tmp_path / "own.py").write_text("raise AssertionError")

    assert "contains custom code" in refusal(load, tmp_path)


@LOADERS
def test_a_damaged_gguf_file_is_an_error(load, tmp_path):
    pytest.importorskip("gguf", reason="needs gguf")
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and nothing more")

    assert refusal(load, path)


def test_missing_and_damaged_weights_are_errors(tmp_path):
    build().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"

    path.write_bytes(b"short")
    assert "header" in refusal(load_model, tmp_path)
    path.unlink()
    assert "no file named model.safetensors" in refusal(load_model, tmp_path)


def test_weights_that_transformers_would_draw_at_random_are_errors(tmp_path):
    """A head that was not saved, and layers of other sizes."""
    build().model.save_pretrained(tmp_path / "headless")
    build().save_pretrained(tmp_path / "wider")
    change(tmp_path / "wider", intermediate_size=18)

    assert "there are no values of the right shape for 'lm_head.weight'" == refusal(
        load_model, tmp_path / "headless"
    )
    assert (
        "there are no values of the right shape for 'model.layers.0.mlp.down_proj.weight', "
        "'model.layers.0.mlp.gate_proj.weight', 'model.layers.0.mlp.up_proj.weight', "
        "'model.layers.1.mlp.down_proj.weight', 'model.layers.1.mlp.gate_proj.weight' and 4 more"
    ) == refusal(load_model, tmp_path / "wider")


# -- how to call a model --------------------------------------------------------------------------


def test_probe_inputs_are_always_the_same_and_padded_on_the_left():
    first, second = probe_inputs(build()), probe_inputs(build(seed=1))

    assert ["input_ids", "attention_mask"] == list(first)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert (2, 12) == first["input_ids"].shape
    assert [12, 8] == first["attention_mask"].sum(1).tolist()
    assert [0] * 4 == first["attention_mask"][1, :4].tolist()


@pytest.mark.parametrize("size", [1, 2, 3, VOCAB, 7919, 7920, 2 * 7919, 151_936])
def test_probe_inputs_fit_any_vocabulary(size):
    model = build()
    model.config.vocab_size = size

    ids = probe_inputs(model)["input_ids"]

    assert 0 <= ids.min()
    assert ids.max() < size
    assert size == 1 or (ids[:, 1:] != ids[:, :-1]).all()


def test_probe_inputs_are_where_the_model_computes():
    """Not for a model without values, which computes nowhere."""
    model = build()

    assert {torch.device("cpu")} == {tensor.device for tensor in probe_inputs(model).values()}
    assert probe_inputs(model.to("meta")) is None


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=2, target_modules=["q_proj"]),
        peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    ],
    ids=["twice", "once"],
)
def test_probe_inputs_suit_a_model_that_peft_wraps(config):
    model = peft.get_peft_model(build(), config).eval()

    inputs = probe_inputs(model)

    assert torch.equal(probe_inputs(build())["input_ids"], inputs["input_ids"])
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


class Own(nn.Module):
    """Has a `base_model`, but answers for itself."""

    def __init__(self, base_model):
        super().__init__()
        self.base_model = base_model


def test_probe_inputs_suit_an_adapted_model():
    config = AdaptionPromptConfig(adapter_len=2, adapter_layers=1)
    model = AdaptionPromptModel(build(), {"a": config}, "a")

    assert probe_inputs(model).keys() == probe_inputs(build()).keys()


def test_models_of_others_and_without_a_vocabulary_have_no_probe_inputs():
    for model in (nn.Linear(2, 2), Own(nn.Linear(2, 2)), Own(Own(nn.ReLU()))):
        assert probe_inputs(model) is None
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    assert probe_inputs(ViTModel(config)) is None
