"""Ctrl-C in the middle of a switch to adapters leaves what was active, or what was to be."""

import pytest
import torch
from core.test_swap_interrupted import interrupted
from torch import nn

import surgery_core
from surgery_core import ModelRecipe, Session

ROOT = surgery_core.__path__[0]
X = torch.linspace(-1, 1, 8).unflatten(0, (2, 4))
ADAPTER = {"operation": "low_rank", "options": {"r": 2}}
CHOICES = {"x": "x", "xy": {"x": 1.0, "y": 0.5}, "yx": {"x": 0.2, "y": 1.0}}
EVERY = 23
"""Of some thousand lines; another prime reaches others."""


def is_ours(code):
    return code.co_filename.startswith(ROOT)


@pytest.mark.parametrize(("first", "second"), [("x", "xy"), ("xy", "x"), ("xy", "yx")])
def test_an_interrupted_switch_leaves_one_of_the_two(first, second):
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    recipe = {"adapters": {"x": ADAPTER, "y": ADAPTER}, "active": "x"}
    edited = Session().plan_recipe(model, ModelRecipe.model_validate(recipe)).apply()
    weight, bias = (tensor.detach().clone() for tensor in model[0].overlay_base.parameters())
    terms = {}
    for name in "xy":
        own = edited.tensors(name)
        for tensor in own.values():
            nn.init.normal_(tensor)
        scaling = edited.variant(name)["0"].low_rank_parts[0].scaling
        terms[name] = scaling * X @ own["0.lora_A"].detach().T @ own["0.lora_B"].detach().T
    base = X @ weight.T + bias
    expected = {
        "x": base + terms["x"],
        "xy": base + terms["x"] + 0.5 * terms["y"],
        "yx": base + 0.2 * terms["x"] + terms["y"],
    }
    edited.set_active(CHOICES[first])
    line = 1

    while interrupted(lambda: edited.set_active(CHOICES[second]), line, is_ours):
        found = [name for name, choice in CHOICES.items() if choice == edited.active]
        assert found in ([first], [second]), line
        assert torch.allclose(expected[found[0]], model(X), atol=1e-5), line
        edited.set_active(CHOICES[first])
        line += EVERY

    assert line > 2 * EVERY
    assert torch.allclose(expected[second], model(X), atol=1e-5)
    edited.revert()
    assert torch.equal(nn.functional.linear(X, weight, bias), model(X))
