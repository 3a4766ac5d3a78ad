"""Options of both operations: what is refused, with which words, and the schema that says the same."""

import pytest
import torch
from surgery_scale_shift import plugin
from torch import nn

from surgery_core import NoMatchError, OptionsError, Rule, Session

MODEL = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))


def plan(operation, **options):
    rule = Rule(
        operation=operation,
        select={"scale_shift": "0", "tuned_norm": "1"}[operation],
        options=options,
    )
    return Session([plugin], discover=False).plan(MODEL, [rule])


@pytest.mark.parametrize(
    ("operation", "options", "problem"),
    [
        (
            "scale_shift",
            {"form": "v2"},
            "form must be one of paper, litgpt, chat65b, got 'v2'",
        ),
        ("scale_shift", {"form": 1}, "form must be one of paper, litgpt, chat65b, got 1"),
        (
            "scale_shift",
            {"shape": 1},
            "unknown option 'shape', expected one of form, dtype, is_trainable",
        ),
        ("scale_shift", {"is_trainable": 1}, "is_trainable must be true or false, got 1"),
        (
            "tuned_norm",
            {"dtype": "int8", "modules": "all"},
            "modules must be one of norms, selected, got 'all'; "
            "dtype must be one of float64, float32, float16, bfloat16, got 'int8'",
        ),
        (
            "tuned_norm",
            {"form": "paper"},
            "unknown option 'form', expected one of modules, dtype, is_trainable",
        ),
    ],
)
def test_invalid_options_are_refused(operation, options, problem):
    with pytest.raises(OptionsError) as caught:
        plan(operation, **options)

    assert str(caught.value) == (
        f"Operation {operation!r} has invalid options: {problem}. Fix the options."
    )


@pytest.mark.parametrize("operation", ["scale_shift", "tuned_norm"])
def test_the_schema_allows_what_is_accepted(operation):
    """Every value that it lists is accepted, and no other key."""
    schema = Session([plugin], discover=False).plugins.operation(operation).options_schema()

    for name, field in schema["properties"].items():
        for value in field.get("enum", [True, False]):
            assert plan(operation, **{name: value}).claims
        assert plan(operation, **{name: field["default"]}).document == plan(operation).document
    assert not schema["additionalProperties"]


@pytest.mark.parametrize("form", ["paper", "chat65b"])
@pytest.mark.parametrize("is_trainable", [True, False])
def test_the_plan_says_what_is_added(form, is_trainable):
    (edit,) = plan(
        "scale_shift", form=form, is_trainable=is_trainable, dtype="float16"
    ).document.edits

    found = {spec.name: (spec.shape, spec.dtype, spec.trainable) for spec in edit.added}

    assert {
        "adapter_scale": ((3,) if form == "paper" else (2,), "float16", is_trainable),
        "adapter_bias": ((3,), "float16", is_trainable),
    } == found


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(NoMatchError, match="found no linear layer among 2 submodules"):
        Session([plugin], discover=False).plan(
            nn.Sequential(nn.ReLU()), [Rule(operation="scale_shift")]
        )


def test_selectors_narrow_the_targets():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    rule = Rule(operation="scale_shift", select="{..1}", exclude="0")

    document = Session([plugin], discover=False).plan(model, [rule]).document

    assert ["1"] == [edit.fqn for edit in document.edits]


def test_frozen_parameters_get_no_gradients():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)).requires_grad_(requires_grad=False)
    rules = [
        Rule(operation=name, options={"is_trainable": False})
        for name in ("scale_shift", "tuned_norm")
    ]

    Session([plugin], discover=False).plan(model, rules).apply()

    assert not model(torch.ones(1, 2)).requires_grad
