"""An adapter knows the base it was trained for, and says so when it meets another."""

import json
import warnings

import pytest
import torch
from support.families import Shape, build, open_gates_
from support.folders import without_header
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel, base_fingerprint
from surgery_adaption_prompt.base_check import BASE_FILE, TOLERANCE

from surgery_core import StateError, SurgeryError, SurgeryWarning

CONFIG = AdaptionPromptConfig(adapter_len=2, adapter_layers=2)


@pytest.fixture
def folder(tmp_path):
    model = AdaptionPromptModel(build(seed=1), {"default": CONFIG}, "default")
    open_gates_(model.adapter_modules("default"))
    model.save_pretrained(tmp_path)
    return tmp_path


def other_base(size):
    """Return the base with noise of a size, relative to each weight's own, on all projections."""
    base = build(seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if "_proj" in name:
                noise = torch.randn(weight.shape, generator=generator)
                weight.add_(size * weight.std() * noise)
    return base


def test_the_same_base_passes(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdaptionPromptModel.from_pretrained(build(seed=1), folder, base_check="error")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_dtype_passes(folder, dtype):
    AdaptionPromptModel.from_pretrained(build(seed=1, dtype=dtype), folder, base_check="error")


@pytest.mark.parametrize("size", [2 * TOLERANCE, 1.0])
def test_another_base_is_noticed(folder, size):
    base = other_base(size)
    before = [id(module) for module in base.modules()]

    with pytest.warns(SurgeryWarning, match="was trained for another base"):
        AdaptionPromptModel.from_pretrained(base, folder).unload()
    with pytest.raises(StateError, match="was trained for another base") as caught:
        AdaptionPromptModel.from_pretrained(base, folder, base_check="error")

    assert ("model.layers.1.self_attn", "model.layers.2.self_attn") == caught.value.mismatched
    assert before == [id(module) for module in base.modules()]
    AdaptionPromptModel.from_pretrained(base, folder, base_check="ignore")


def test_a_base_a_little_off_passes(folder):
    AdaptionPromptModel.from_pretrained(other_base(TOLERANCE / 4), folder, base_check="error")


def test_loading_beside_another_adapter_checks_too(folder):
    model = AdaptionPromptModel(other_base(1.0), {"default": CONFIG}, "default")

    with pytest.raises(StateError, match="was trained for another base"):
        model.load_adapter(folder, "fr", base_check="error")
    assert ["default"] == list(model.peft_config)
    with pytest.warns(SurgeryWarning, match="was trained for another base"):
        model.load_adapter(folder, "fr")
    assert ["default", "fr"] == list(model.peft_config)


def test_a_folder_without_a_record_passes(folder):
    (without_header(folder) / BASE_FILE).unlink()

    AdaptionPromptModel.from_pretrained(other_base(1.0), folder, base_check="error")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "answers": {}}',
                                  '{"format": 1, "answers": [1]}', '{"format": [], "answers": 1}',
                                  '{"format": 1, "answers": {"a": ["x"]}}'])  # fmt: skip
def test_a_damaged_record_is_an_error(folder, text):
    (without_header(folder) / BASE_FILE).write_text(text)

    with pytest.raises(SurgeryError, match="is no record of a base: expected format 1"):
        AdaptionPromptModel.from_pretrained(build(seed=1), folder)


def test_a_record_of_other_layers_counts_as_another_base(folder):
    path = without_header(folder) / BASE_FILE
    record = json.loads(path.read_text())
    record["answers"].pop("model.layers.1.self_attn")
    path.write_text(json.dumps(record))

    with pytest.raises(StateError) as caught:
        AdaptionPromptModel.from_pretrained(build(seed=1), folder, base_check="error")

    assert ("model.layers.1.self_attn",) == caught.value.mismatched


def test_the_fingerprint_is_of_keys_and_values():
    """Sixteen of each at most, and what the projections themselves give."""
    model = AdaptionPromptModel(
        build(shape=Shape(heads=4, kv_heads=2, head_dim=6), seed=1), {"a": CONFIG}, "a"
    )
    modules = model.adapter_modules("a")

    found = base_fingerprint(modules)

    assert modules.keys() == found.keys()
    for fqn, module in modules.items():
        probe = torch.cos(torch.arange(24, dtype=torch.float64) * 2.399963229728653).float()
        expected = torch.cat([module.k_proj(probe), module.v_proj(probe)])
        assert torch.allclose(expected, torch.tensor(found[fqn]), atol=1e-5)
