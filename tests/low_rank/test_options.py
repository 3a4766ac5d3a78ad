"""Options: what is refused, with which words, the schema that says the same, and what is chosen."""

import math

import pytest
import torch
from surgery_low_rank import LowRankOptions, plugin
from torch import nn

from surgery_core import NoMatchError, OptionsError, Rule, Session


class Block(nn.Module):
    """Layers of several names, one of which is the end of another."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(2, 2), nn.Linear(2, 2)
        self.my_q_proj = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)


def model():
    return nn.Sequential(Block(), Block())


def plan(found=None, select=None, **options):
    rule = Rule(operation="low_rank", select=select, options=options)
    return Session([plugin], discover=False).plan(found or model(), [rule])


def fqns(found):
    return [edit.fqn for edit in found.document.edits]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"r": 0}, "r must be a whole number of at least 1, got 0"),
        ({"r": True}, "r must be a whole number of at least 1, got True"),
        ({"r": 2.0}, "r must be a whole number of at least 1, got 2.0"),
        ({"lora_alpha": math.inf}, "lora_alpha must be a finite number, got inf"),
        ({"lora_alpha": "8"}, "lora_alpha must be a finite number, got '8'"),
        ({"lora_dropout": 1}, "lora_dropout must be a number of at least 0 and below 1, got 1"),
        (
            {"use_rslora": 1, "inference_mode": None},
            "use_rslora must be true or false, got 1; inference_mode must be true or false, got None",
        ),
        (
            {"target_modules": "q_proj"},
            "target_modules must be a list of names, or null, got 'q_proj'",
        ),
        ({"target_modules": []}, "target_modules must be a list of names, or null, got []"),
        ({"target_modules": [""]}, "target_modules must be a list of names, or null, got ['']"),
        (
            {"dtype": "int8"},
            "dtype must be one of float64, float32, float16, bfloat16, or null, got 'int8'",
        ),
        (
            {"rank": 8},
            "unknown option 'rank', expected one of r, lora_alpha, lora_dropout, use_rslora, "
            "target_modules, dtype, inference_mode",
        ),
    ],
)
def test_invalid_options_are_refused(options, problem):
    with pytest.raises(OptionsError) as caught:
        plan(**options)

    assert str(caught.value) == (
        f"Operation 'low_rank' has invalid options: {problem}. Fix the options."
    )


def test_the_schema_allows_what_is_accepted():
    """Its defaults are those of the options, and no other key is allowed."""
    schema = Session([plugin], discover=False).plugins.operation("low_rank").options_schema()
    defaults = {name: field["default"] for name, field in schema["properties"].items()}

    assert LowRankOptions() == LowRankOptions(**defaults)
    assert plan(**defaults).document.edits == plan().document.edits
    for dtype in schema["properties"]["dtype"]["enum"]:
        assert plan(dtype=dtype).claims
    assert not schema["additionalProperties"]


@pytest.mark.parametrize("inference_mode", [True, False])
def test_the_plan_says_what_is_added(inference_mode):
    found = plan(
        nn.Sequential(nn.Linear(3, 5)), r=2, dtype="float16", inference_mode=inference_mode
    )
    (edit,) = found.document.edits

    added = {spec.name: (spec.shape, spec.dtype, spec.trainable) for spec in edit.added}

    assert {
        "lora_A": ((2, 3), "float16", not inference_mode),
        "lora_B": ((5, 2), "float16", not inference_mode),
    } == added


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, ["0.q_proj", "0.v_proj", "0.my_q_proj", "1.q_proj", "1.v_proj", "1.my_q_proj"]),
        (["q_proj"], ["0.q_proj", "1.q_proj"]),
        (["v_proj", "1.q_proj"], ["0.v_proj", "1.q_proj", "1.v_proj"]),
    ],
)
def test_targets_are_named_by_their_last_segments(names, expected):
    assert expected == fqns(plan(target_modules=names))


def test_a_rules_selector_narrows_the_targets():
    assert ["1.q_proj"] == fqns(plan(select="1.**", target_modules=["q_proj"]))


def test_names_without_a_layer_are_refused():
    """Also if others have some, and if the module is there but not linear."""
    with pytest.raises(NoMatchError) as caught:
        plan(target_modules=["q_proj", "norm", "k_proj"])

    assert str(caught.value) == (
        "Operation 'low_rank' found no linear layer for target_modules 'norm', 'k_proj': expected "
        "names such as 'my_q_proj', 'q_proj', 'v_proj'. Fix the names, or widen the selector."
    )


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(NoMatchError, match="found no linear layer among 2 submodules"):
        plan(nn.Sequential(nn.ReLU()))


def test_matrices_for_inference_get_no_gradients():
    found = model()
    found.requires_grad_(requires_grad=False)

    plan(found, inference_mode=True).apply()

    assert not found[0].q_proj(torch.ones(1, 2)).requires_grad
