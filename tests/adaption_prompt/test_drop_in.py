"""Names that PEFT users rely on, besides those of `test_model.py`."""

import copy
import pickle

import pytest
import torch
from support.families import build, open_gates_, tokens
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel, get_peft_model

from surgery_core import VariantError

CONFIG = AdaptionPromptConfig(adapter_len=2, adapter_layers=2, task_type="CAUSAL_LM")


@pytest.fixture
def model():
    model = get_peft_model(build(seed=1), CONFIG)
    open_gates_(model.adapter_modules("default"))
    return model


def test_the_function_makes_a_model(model):
    assert type(model) is AdaptionPromptModel
    assert ("default", {"default": CONFIG}) == (model.active_adapter, model.peft_config)
    assert "fr" == get_peft_model(build(), CONFIG, "fr").active_adapter


def test_the_base_is_where_it_is_in_peft(model):
    assert model.base_model.model is model.get_base_model()
    assert CONFIG is model.active_peft_config
    assert "ADAPTION_PROMPT" == model.peft_type


def test_without_adapters_there_is_no_active_configuration(model):
    model.delete_adapter("default")

    with pytest.raises(VariantError, match="Model has no adapter"):
        _ = model.active_peft_config


def test_trainable_parameters_are_printed(model, capsys):
    model.print_trainable_parameters()

    assert f"{model.trainable_summary()}\n" == capsys.readouterr().out


def test_what_is_not_here_is_the_bases(model):
    base = model.get_base_model()

    assert model.lm_head is base.lm_head
    assert model.generation_config is base.generation_config
    assert model.get_input_embeddings() is base.model.embed_tokens
    assert "input_ids" == model.main_input_name


def test_what_neither_has_is_an_error(model):
    with pytest.raises(AttributeError, match="has no attribute 'no_such_thing'"):
        _ = model.no_such_thing


@pytest.mark.parametrize("name", ["disable_adapters", "enable_adapters", "get_adapter_state_dict"])
def test_methods_for_other_adapters_are_not_the_bases(model, name):
    """Every model has adapter methods by transformers, which know nothing of ours."""
    with pytest.raises(AttributeError, match=f"AdaptionPromptModel has no '{name}'"):
        getattr(model, name)


def test_an_unfinished_object_has_no_attributes():
    """As `copy` and `pickle` ask of one before its state is there."""
    with pytest.raises(AttributeError):
        _ = AdaptionPromptModel.__new__(AdaptionPromptModel).config_of


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_models_of_their_own(model, duplicate):
    other = duplicate(model)

    with torch.no_grad():
        expected = model(tokens()).logits
        assert torch.equal(expected, other(tokens()).logits)
        other.disable_adapter_layers()
        assert torch.equal(expected, model(tokens()).logits)
        assert not torch.equal(expected, other(tokens()).logits)
