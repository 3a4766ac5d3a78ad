"""Low-rank terms beside what other plugins do: in conflict at one place, together otherwise."""

import copy
import pickle

import pytest
import torch
from support.families import build, open_gates_, tokens
from surgery_adaption_prompt import AdaptedAttention
from surgery_low_rank import LowRankLinear, merge_
from torch import nn

from surgery_core import ConflictError, ContractError, ModelRecipe, Rule, Session, verify
from surgery_core.testing import assert_unchanged, snapshot

IDS = tokens(2, 7)
TERMS = {
    "operation": "low_rank",
    "options": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "o_proj"]},
}
PROMPTS = {
    "operation": "adaption_prompt",
    "options": {"adapter_len": 3, "adapter_layers": 2, "gate": "head"},
}
RECIPE = ModelRecipe.model_validate(
    {
        "rules": [TERMS],
        "adapters": {
            "a": PROMPTS,
            "b": {**PROMPTS, "options": {"adapter_len": 2, "adapter_layers": 3}},
        },
        "active": "a",
    }
)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def train_(edited):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in edited.tensors("rules").values():
            tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator))
    for seed, name in enumerate(edited.adapters):
        open_gates_(edited.variant(name), seed=seed)


@pytest.mark.parametrize(
    ("first", "second"), [("low_rank", "scale_shift"), ("scale_shift", "low_rank")]
)
def test_scales_and_terms_at_one_layer_conflict(first, second):
    model = build()
    before = snapshot(model)
    rules = [{"operation": first, "select": "**.mlp.*_proj"}]
    rules += [{"operation": second, "select": "model.layers.1.mlp.up_proj"}]

    with pytest.raises(ConflictError) as caught:
        Session().plan_recipe(model, ModelRecipe.model_validate({"rules": rules}))

    claims = {(operation, fqn) for operation, fqn in caught.value.claims[0]}
    assert {(name, "model.layers.1.mlp.up_proj") for name in (first, second)} == claims
    assert_unchanged(before, model, subject="Planning")


def test_scales_and_terms_at_different_layers_work_together():
    model = build()
    before, expected = snapshot(model), logits(model)
    rules = [{"operation": "scale_shift", "select": "**.mlp.*_proj"}, TERMS]

    edited = Session().plan_recipe(model, ModelRecipe.model_validate({"rules": rules})).apply()

    assert torch.equal(expected, logits(model))
    edited.revert()
    assert_unchanged(before, model, subject="Apply and revert")


@pytest.mark.parametrize("order", [("low_rank", "scale_shift"), ("scale_shift", "low_rank")])
def test_in_two_surgeries_one_is_around_the_other(order):
    """The later one takes what the earlier one computes for the layer."""
    model = nn.Sequential(nn.Linear(4, 5)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    base, before, expected = model[0], snapshot(model), model(x)
    session = Session()

    done = [session.plan(model, [Rule(operation=name)]).apply() for name in order]

    assert torch.equal(expected, model(x))
    layer = model[0]
    with torch.no_grad():
        for tensor in (layer.lora_B, layer.adapter_scale, layer.adapter_bias):
            tensor.copy_(torch.randn(tensor.shape))
    term = x @ layer.lora_A.T @ layer.lora_B.T
    if order[0] == "low_rank":
        trained = layer.adapter_scale * (expected + term + layer.adapter_bias)
    else:
        trained = layer.adapter_scale * (expected + layer.adapter_bias) + term
    torch.testing.assert_close(model(x), trained, rtol=1e-12, atol=1e-12)
    assert torch.equal(model(x), copy.deepcopy(model)(x))
    if order[0] == "low_rank":
        with merge_(dict(model.named_modules())):
            torch.testing.assert_close(model(x), trained, rtol=1e-12, atol=1e-12)
        assert not torch.equal(expected, model(x))
    else:
        with pytest.raises(ContractError, match="0: a forward of ScaledLinear"):
            merge_(dict(model.named_modules()))
    weight = nn.Parameter(torch.ones(5, 4, dtype=torch.float64))
    kept = base.weight
    model[0].weight = weight
    if order[1] == "low_rank":
        assert base.weight is weight
        assert torch.equal(model(x), pickle.loads(pickle.dumps(model))(x))
    model[0].weight = base.weight = kept
    for surgery in reversed(done):
        surgery.revert()
    assert_unchanged(before, model, subject="Two surgeries and their reverts")
    assert torch.equal(expected, model(x))


def test_a_layer_over_a_merged_one_may_leave_before_it_is_unmerged():
    """What was under it is merged as well, also after the model has gone elsewhere and back."""
    model = nn.Sequential(nn.Linear(4, 5)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    base, weight = model[0], model[0].weight
    session = Session()
    session.plan(model, [Rule(operation="low_rank")]).apply()
    nn.init.normal_(model[0].lora_B)
    expected = model(x)
    outer = session.plan(model, [Rule(operation="scale_shift")]).apply()

    merge = merge_(dict(model.named_modules()))
    model.float().double()
    outer.revert()

    assert model[0].is_merged
    torch.testing.assert_close(expected, model(x), rtol=1e-6, atol=1e-6)
    merge.unmerge()
    assert not model[0].is_merged
    assert model[0].weight is base.weight is weight
    torch.testing.assert_close(expected, model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_terms_inside_attention_with_prompts_are_exact_at_init_and_revert(dtype):
    model = build(dtype=dtype)
    before, expected = snapshot(model), logits(model)

    edited = Session().plan_recipe(model, RECIPE).apply()

    assert torch.equal(expected, logits(model))
    assert 9 == sum(isinstance(module, LowRankLinear) for module in model.modules())
    assert 2 == sum(isinstance(module, AdaptedAttention) for module in model.modules())
    assert isinstance(model.model.layers[2].self_attn.q_proj, LowRankLinear)
    train_(edited)
    assert 1e-2 < (logits(model) - expected).abs().max()
    edited.revert()
    assert_unchanged(before, model, subject="Apply, training and revert")
    assert torch.equal(expected, logits(model))


def test_keys_and_values_of_prompts_pass_the_terms():
    """The reference is a base with the terms in its weights, and the same prompts."""
    model, reference = build(dtype=torch.float64), build(dtype=torch.float64)
    edited = Session().plan_recipe(model, RECIPE).apply()
    train_(edited)
    with torch.no_grad():
        for fqn, module in model.named_modules():
            if isinstance(module, LowRankLinear):
                change = 2.0 * module.lora_B @ module.lora_A
                reference.get_submodule(fqn.replace(".base_attention", "")).weight.add_(change)
    alone = RECIPE.model_copy(update={"rules": ()})
    other = Session().plan_recipe(reference, alone).apply()
    for name in "ab":
        other.load_(name, edited.tensors(name))

    for name in "ab":
        edited.set_active(name)
        other.set_active(name)
        torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=1e-6)
    edited.set_active({"a": 0.5, "b": -1.0})
    other.set_active({"a": 0.5, "b": -1.0})
    torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=1e-6)


def test_terms_inside_attention_with_prompts_are_merged():
    model = build(dtype=torch.float64)
    edited = Session().plan_recipe(model, RECIPE).apply()
    train_(edited)
    expected = logits(model)

    with merge_(edited) as merge:
        assert 9 == len(merge.fqns)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)

    assert torch.equal(expected, logits(model))


def test_a_record_of_both_computes_the_same(tmp_path):
    model, session = build(), Session()
    edited = session.plan_recipe(model, RECIPE).apply()
    train_(edited)
    expected = logits(model)

    session.save(edited, tmp_path)
    again = session.load(build(), tmp_path, base_check="error")

    assert torch.equal(expected, logits(again.model))
    for each in (edited, again):
        each.set_active("b")
    assert torch.equal(logits(model), logits(again.model))


def test_both_pass_the_checks_of_the_core():
    edited = Session().plan_recipe(build(), RECIPE).apply()

    outcome = verify(edited, {"input_ids": IDS, "use_cache": False})

    assert outcome.is_ok, outcome.render()
    assert {"ok"} == {check.status for check in outcome.checks}
