"""Configurations are validated before a model is seen."""

from dataclasses import FrozenInstanceError

import pytest
from surgery_adaption_prompt import AdaptionPromptConfig

from surgery_core import OptionsError


def test_pefts_positional_order_is_kept():
    config = AdaptionPromptConfig(
        "ADAPTION_PROMPT", None, "base", "main", "CAUSAL_LM", True, "attn", 10, 30
    )

    assert config.base_model_name_or_path == "base"
    assert config.inference_mode
    assert (config.adapter_len, config.adapter_layers) == (10, 30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"adapter_layers": 2},
            "AdaptionPromptConfig is invalid: adapter_len must be an integer of at least 1, got "
            "None.",
        ),
        (
            {"adapter_len": 0, "adapter_layers": 2.0},
            "AdaptionPromptConfig is invalid: adapter_len must be an integer of at least 1, got 0; "
            "adapter_layers must be an integer of at least 1, got 2.0.",
        ),
        (
            {"adapter_len": True, "adapter_layers": 1},
            "AdaptionPromptConfig is invalid: adapter_len must be an integer of at least 1, got "
            "True.",
        ),
        (
            {"adapter_len": 1, "adapter_layers": 1, "gate": "row"},
            "AdaptionPromptConfig is invalid: gate must be one of 'layer', 'head', got 'row'.",
        ),
        (
            {"adapter_len": 1, "adapter_layers": 1, "gate_activation": "relu"},
            "AdaptionPromptConfig is invalid: gate_activation must be one of 'identity', 'tanh', "
            "got 'relu'.",
        ),
        (
            {"adapter_len": 1, "adapter_layers": 1, "dtype": "int8"},
            "AdaptionPromptConfig is invalid: dtype must name a floating-point torch dtype of "
            "at least 16 bits, got 'int8'.",
        ),
        (
            {"adapter_len": 1, "adapter_layers": 1, "peft_type": "LORA"},
            "AdaptionPromptConfig is invalid: peft_type must be one of 'ADAPTION_PROMPT', got "
            "'LORA'.",
        ),
        (
            {"adapter_len": 1, "adapter_layers": 1, "target_modules": ["self_attn"]},
            "AdaptionPromptConfig is invalid: target_modules has the wrong type, got "
            "['self_attn'].",
        ),
        (
            {"adapter_len": 1, "adapter_layers": 1, "modules_to_save": "score"},
            "AdaptionPromptConfig is invalid: modules_to_save has the wrong type, got 'score'.",
        ),
        (
            {"adapter_len": 1, "adapter_layers": 1, "modules_to_save": ["score", ""]},
            "AdaptionPromptConfig is invalid: modules_to_save must hold names, got ('score', '').",
        ),
    ],
)
def test_invalid_fields_are_all_named(options, message):
    with pytest.raises(OptionsError) as caught:
        AdaptionPromptConfig(**options)

    assert message == str(caught.value)


def test_an_unknown_field_is_refused_by_name():
    with pytest.raises(OptionsError, match=r"has no field 'adapter_length': expected some of"):
        AdaptionPromptConfig.from_mapping({"adapter_length": 3, "adapter_layers": 1})


def test_only_pefts_fields_are_written_for_what_peft_can_say():
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=1)

    assert {
        "adapter_layers": 1,
        "adapter_len": 3,
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "inference_mode": False,
        "peft_type": "ADAPTION_PROMPT",
        "revision": None,
        "target_modules": None,
        "task_type": None,
    } == config.to_mapping()


def test_mappings_round_trip_with_our_fields():
    config = AdaptionPromptConfig(
        adapter_len=3, adapter_layers=1, gate="head", gate_activation="tanh", dtype="bfloat16"
    )

    assert config == AdaptionPromptConfig.from_mapping(config.to_mapping())


def test_configurations_cannot_be_changed():
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=1)

    with pytest.raises(FrozenInstanceError):
        config.adapter_len = 4
