"""Copies and pickles of a model with a recipe applied go on alone."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.families import build, tokens
from torch import nn

from surgery_core import ModelRecipe, OptionsError, Session

IDS = tokens(2, 4)
ADAPTERS = {
    "low_rank": {"operation": "low_rank", "options": {"r": 2, "target_modules": ["q_proj"]}},
    "scale_shift": {"operation": "scale_shift", "select": "**.q_proj"},
    "adaption_prompt": {
        "operation": "adaption_prompt",
        "options": {"adapter_len": 2, "adapter_layers": 2, "gate": "head"},
    },
}
SEVERAL = {"x": 1.0, "y": -0.5}
shared = pytest.mark.parametrize("kind", ["low_rank", "adaption_prompt"])
every_kind = pytest.mark.parametrize("kind", sorted(ADAPTERS))
in_both_ways = pytest.mark.parametrize(
    "way",
    [copy.deepcopy, lambda edited: pickle.loads(pickle.dumps(edited))],
    ids=["copy", "pickle"],
)


def edited_model(kind, *, rule=None):
    recipe = {
        "adapters": dict.fromkeys("xy", ADAPTERS[kind]),
        "active": "x",
        "rules": [rule] if rule else [],
    }
    edited = Session().plan_recipe(build(), ModelRecipe.model_validate(recipe)).apply()
    with torch.no_grad():
        for parameter in edited.added_parameters():
            parameter.copy_(torch.randn(parameter.shape) / 2)
    return edited


def computed(edited):
    with torch.no_grad():
        return edited.model(IDS).logits


def zero_(edited):
    with torch.no_grad():
        for parameter in edited.model.parameters():
            parameter.zero_()
    for name in edited.adapters:
        for tensor in edited.tensors(name).values():
            tensor.data.zero_()


@every_kind
@in_both_ways
@pytest.mark.parametrize("first", ["x", SEVERAL], ids=["one", "several"])
def test_a_copy_switches_and_reverts_alone(kind, way, first):
    expected = {}
    edited = edited_model(kind, rule={"operation": "low_rank", "select": "**.up_proj"})
    for name, choice in {"several": SEVERAL, "y": "y", "x": "x"}.items():
        edited.set_active(choice)
        expected[name] = computed(edited)
    edited.set_active(first)

    copied = way(edited)
    zero_(edited)

    assert copied.active == first
    for name, choice in {"x": "x", "several": SEVERAL, "y": "y"}.items():
        copied.set_active(choice)
        assert torch.equal(expected[name], computed(copied))
    assert len({id(p) for p in (*copied.model.parameters(), *edited.model.parameters())}) == sum(
        len(list(found.model.parameters())) for found in (copied, edited)
    )
    plain = build()
    copied.revert()
    assert edited.is_applied
    assert torch.equal(plain(IDS).logits, computed(copied))
    assert all(parameter.requires_grad for parameter in copied.model.parameters())
    assert [type(m) for m in plain.modules()] == [type(m) for m in copied.model.modules()]


@shared
@in_both_ways
def test_nobody_uses_a_copy_and_its_lock_is_its_own(kind, way):
    edited = edited_model(kind)
    base = build()(IDS).logits
    edited.set_active("y")
    other = computed(edited)
    edited.set_active("x")
    active = computed(edited)
    with ThreadPoolExecutor(1) as pool, edited.activated("y"), edited.sharing.lock:
        copied = way(edited)
        assert torch.equal(other, computed(edited))
        assert torch.equal(active, computed(copied))
        assert not copied.sharing.is_in_force
        # Another thread would wait for the lock if it were the same.
        pool.submit(copied.set_active, "y").result(timeout=30)
    assert torch.equal(other, computed(copied))
    with copied.activated(["x", "__base__"]):
        rows = computed(copied)
    assert torch.allclose(active[0], rows[0], atol=1e-5)
    assert torch.equal(base[1], rows[1])
    assert torch.equal(active, computed(edited))


@in_both_ways
def test_no_optimizer_has_the_parameters_of_a_copy(way):
    edited = edited_model("low_rank")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    edited.add_to_optimizer(optimizer, ["x"])

    copied = way(edited)
    copied.revert()

    assert len(optimizer.param_groups) == 2
    with pytest.raises(OptionsError):
        edited.add_to_optimizer(optimizer, ["x"])
    edited.revert()
    assert len(optimizer.param_groups) == 1
