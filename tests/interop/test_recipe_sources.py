"""Adapters that PEFT, LLaMA-Adapter and litgpt saved, put on models by a recipe."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.families import build, open_gates_, tokens
from support.foreign import LitGPT, OriginalLlama, Sizes
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel, plugin

from surgery_core import (
    ModelRecipe,
    OptionsError,
    Session,
    StateError,
    SurgeryError,
    SurgeryWarning,
)

SIZES = Sizes()
IDS = tokens(2, 6)


@pytest.fixture
def session():
    return Session([plugin], discover=False)


def part(**adapters):
    return ModelRecipe.model_validate(
        {
            "adapters": {
                name: {"operation": "adaption_prompt", **found} for name, found in adapters.items()
            },
            "active": next(iter(adapters)),
        }
    )


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


@pytest.fixture
def saved(tmp_path):
    """Return a folder with two adapters in PEFT's format, and what each and their sum compute."""
    configs = {
        "fr": AdaptionPromptConfig(adapter_len=3, adapter_layers=2),
        "legal": AdaptionPromptConfig(adapter_len=2, adapter_layers=3, gate="head"),
    }
    model = AdaptionPromptModel(build(), configs, "fr").eval()
    expected = {}
    for seed, name in enumerate(configs):
        open_gates_(model.adapter_modules(name), seed=seed)
    for choice in ("fr", "legal"):
        model.set_adapter(choice)
        expected[choice] = logits(model)
    model.set_adapter({"fr": 0.5, "legal": -2.0})
    expected["both"] = logits(model)
    model.save_pretrained(tmp_path)
    return tmp_path, expected


def test_a_recipe_computes_what_the_adapters_model_does(session, saved):
    folder, expected = saved
    base = build()
    recipe = part(fr={"source": f"{folder}/fr"}, legal={"source": f"{folder}/legal"})

    edited = session.plan_recipe(base, recipe).apply()

    assert torch.equal(expected["fr"], logits(base))
    edited.set_active("legal")
    assert torch.equal(expected["legal"], logits(base))
    edited.set_active({"fr": 0.5, "legal": -2.0})
    assert torch.allclose(expected["both"], logits(base), atol=1e-6)
    assert not any(p.requires_grad for p in edited.added_parameters())


def test_options_beside_a_source_go_before_those_saved(session, saved):
    source = {"source": f"{saved[0]}/fr", "options": {"inference_mode": False, "dtype": "float64"}}

    edited = session.plan_recipe(build(), part(fr=source)).apply()

    assert 4 == len(edited.added_parameters())
    assert {torch.float64} == {tensor.dtype for tensor in edited.tensors("fr").values()}


def test_what_is_exported_is_what_was_there(session, saved, tmp_path):
    folder, _ = saved
    edited = session.plan_recipe(build(), part(legal={"source": f"{folder}/legal"})).apply()

    session.export(edited, "legal", tmp_path / "again")

    old, new = (
        load_file(p / "adapter_model.safetensors") for p in (folder / "legal", tmp_path / "again")
    )
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
    configs = [
        json.loads((p / "adapter_config.json").read_text())
        for p in (folder / "legal", tmp_path / "again")
    ]
    assert {**configs[0], "base_model_name_or_path": None} == {
        **configs[1],
        "base_model_name_or_path": None,
    }
    assert (tmp_path / "again" / "base_fingerprint.json").is_file()


def test_a_file_of_llama_adapter_is_read_with_what_it_does_not_say(session, tmp_path):
    llama = OriginalLlama(SIZES)
    adapter = llama.adapter()
    torch.save(adapter, tmp_path / "adapter.pth")
    options = {"adapter_len": SIZES.adapter_len, "gate_activation": "tanh", "dtype": "float64"}
    base = llama.to_transformers()

    session.plan_recipe(
        base, part(one={"source": str(tmp_path / "adapter.pth"), "options": options})
    ).apply()

    expected = llama.logits(IDS, adapter)
    # Transformers rotates queries in float32, whatever the weights are in.
    assert (logits(base) - expected).abs().max() < 1e-6 * expected.abs().max()


def test_a_file_of_litgpt_is_read(session, tmp_path):
    llama = LitGPT(SIZES, "grouped")
    adapter = llama.adapter()
    path = tmp_path / "lit_model.pth.adapter"
    torch.save({"model": adapter}, path)
    base = llama.to_transformers()

    with pytest.warns(SurgeryWarning, match="litgpt"):
        plan = session.plan_recipe(
            base, part(one={"source": str(path), "options": {"dtype": "float64"}})
        )
    plan.apply()

    expected = llama.logits(IDS, adapter)
    # Transformers rotates queries in float32, whatever the weights are in.
    assert (logits(base) - expected).abs().max() < 1e-6 * expected.abs().max()


def test_sources_that_do_not_fit_are_refused_and_change_nothing(session, saved, tmp_path):
    base = build()
    before = logits(base)
    cases = [
        ({"source": str(tmp_path / "nowhere")}, OptionsError, "cannot read"),
        ({"source": str(tmp_path)}, SurgeryError, "adapter_config.json"),
        ({"source": f"{saved[0]}/fr", "options": {"adapter_len": 9}}, StateError, "do not fit"),
        (
            {"source": f"{saved[0]}/fr", "options": {"gait": "head"}},
            OptionsError,
            "no field 'gait'",
        ),
    ]
    for found, kind, message in cases:
        with pytest.raises(kind, match=message):
            session.plan_recipe(base, part(one=found)).apply()
        assert torch.equal(before, logits(base))


def test_the_schema_of_options_names_every_field(session):
    schema = session.plugins.operation("adaption_prompt").options_schema()

    config = AdaptionPromptConfig(adapter_len=1, adapter_layers=1)
    assert set(vars(config)) == set(schema["properties"])
    assert schema["additionalProperties"] is False
