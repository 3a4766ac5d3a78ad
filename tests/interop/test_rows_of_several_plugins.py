"""Prompts, low-rank terms and scales in one model: which of them rows, threads and sums may mix."""

import asyncio

import peft
import pytest
import torch
from support.families import build, open_gates_, tokens
from surgery_adaption_prompt import AdaptedAttention
from surgery_low_rank import LowRankLinear
from torch.utils.checkpoint import checkpoint

from surgery_core import ContractError, ModelRecipe, OptionsError, Session
from surgery_core.testing import assert_unchanged, snapshot

IDS = tokens(4, 7)
BASE = "__base__"
PROMPTS = {
    "operation": "adaption_prompt",
    "options": {"adapter_len": 3, "adapter_layers": 2, "gate": "head"},
}
SHORTER = {**PROMPTS, "options": {"adapter_len": 2, "adapter_layers": 3}}


def terms(*names, r=2):
    return {
        "operation": "low_rank",
        "options": {"r": r, "lora_alpha": 3, "target_modules": list(names)},
    }


ADAPTERS = {
    "prompts": PROMPTS,
    "terms": terms("q_proj", "o_proj", "up_proj"),
    # The query's projection is inside what the prompts wrap.
    "both": {"rules": [SHORTER, terms("q_proj", r=3)]},
}
KEYS = {"rules": [PROMPTS, terms("k_proj", "v_proj")]}
SCALES = {"operation": "scale_shift", "select": "**.mlp.down_proj"}
CHOICES = ("prompts", BASE, "both", {"terms": 0.5, "both": -1.5})
TOLERANCE = 1e-5
"""Relative to the largest logit, in float32."""


def edit(active="prompts", adapters=None, dtype=torch.float32):
    recipe = {"adapters": adapters or ADAPTERS, "active": active}
    model = build(seed=1, dtype=dtype)
    edited = Session().plan_recipe(model, ModelRecipe.model_validate(recipe)).apply()
    generator = torch.Generator().manual_seed(0)
    for seed, name in enumerate(edited.adapters):
        found = edited.variant(name).values()
        gated = {id(m): m for m in found if isinstance(m, AdaptedAttention)}
        open_gates_(gated, seed=seed)
        with torch.no_grad():
            for key, tensor in edited.tensors(name).items():
                if "adaption" not in key:
                    tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator))
    return edited


@torch.no_grad()
def logits(edited, ids=IDS):
    return edited.model(ids, use_cache=False).logits


def alone(edited, choice):
    if choice == BASE:
        with edited.disabled():
            return logits(edited)
    before = edited.active
    edited.set_active(choice)
    found = logits(edited)
    edited.set_active(before)
    return found


def error(actual, expected):
    assert torch.isfinite(actual).all()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def check_rows(edited, choices):
    with edited.activated(choices):
        actual = logits(edited)
    found = [alone(edited, choice) for choice in choices]
    for row, choice in enumerate(choices):
        assert error(actual[row], found[row][row]) < TOLERANCE, choice
        if choice == BASE:
            assert torch.equal(found[row][row], actual[row])
    return found


@pytest.mark.parametrize("active", [*ADAPTERS, {"prompts": 1.0, "terms": 1.0}], ids=str)
def test_rows_mix_prompts_and_terms(active):
    """An adapter of two rules is one choice; so are several with weights."""
    edited = edit(active)
    before = [type(module) for module in edited.model.modules()]

    found = check_rows(edited, CHOICES)

    assert 1e-2 < min(error(a, b) for a in found for b in found if a is not b)
    assert before == [type(module) for module in edited.model.modules()]


@pytest.mark.parametrize("choice", [*ADAPTERS, BASE, {"terms": 0.5, "both": -1.5}], ids=str)
def test_one_choice_is_the_active_one(choice):
    edited = edit("terms")
    expected = alone(edited, choice)
    with edited.activated(choice):
        actual = logits(edited)
    assert error(actual, expected) < 1e-6


def test_weighted_sums_of_adapters_of_several_rules():
    """A sum of two that are for different places changes both, and one with weight one is itself."""
    edited = edit({"prompts": 0.5, "both": 0.5})
    model = edited.model
    attention = model.model.layers[2].self_attn
    assert {"adaption_prompt_prompts", "adaption_prompt_both"} <= dict(
        attention.named_parameters()
    ).keys()
    assert isinstance(attention.q_proj, LowRankLinear)
    half = logits(edited)

    edited.set_active({"both": 1.0})
    assert torch.equal(alone(edited, "both"), logits(edited))
    edited.set_active({"both": 0.5, "prompts": 0.5})
    assert torch.equal(half, logits(edited))
    for name in ("prompts", "both"):
        assert 1e-3 < error(half, alone(edited, name))


def test_a_sum_of_prompts_and_terms_follows_the_parts_in_one_layer():
    """In float64: terms put into the weights with their factor, and prompts with theirs."""
    weights = {"both": 0.5, "prompts": -2.0}
    edited = edit(weights, dtype=torch.float64)
    reference = build(seed=1, dtype=torch.float64)
    with torch.no_grad():
        for fqn, module in edited.variant("both").items():
            if isinstance(module, LowRankLinear):
                change = 0.5 * 3 / 3 * module.lora_B.double() @ module.lora_A.double()
                reference.get_submodule(fqn).weight.add_(change)
    recipe = {"adapters": {"both": SHORTER, "prompts": PROMPTS}, "active": weights}
    other = Session().plan_recipe(reference, ModelRecipe.model_validate(recipe)).apply()
    for name in weights:
        own = {k: t for k, t in edited.tensors(name).items() if "adaption" in k}
        other.load_(name, own)

    assert error(logits(edited), logits(other)) < 1e-9


def test_sums_are_taken_back():
    model = build(seed=1)
    before = snapshot(model)
    recipe = {"adapters": ADAPTERS, "active": {"prompts": 0.5, "both": 0.5, "terms": 1.0}}
    edited = Session().plan_recipe(model, ModelRecipe.model_validate(recipe)).apply()
    with edited.activated(CHOICES):
        logits(edited)
    edited.set_active("terms")
    edited.set_active({"both": 2.0})

    edited.revert()

    assert_unchanged(before, model, subject="Sums, rows and revert")


def test_gradients_of_rows_go_to_their_adapters():
    edited = edit("terms")
    edited.model.train()

    def run(forward):
        for name in edited.adapters:
            for tensor in edited.tensors(name).values():
                tensor.grad = None
        with edited.activated(CHOICES[:3]):
            out = forward(IDS[:3])
        out.square().sum().backward()
        return {n: [t.grad for t in edited.tensors(n).values()] for n in edited.adapters}

    def plain(ids):
        return edited.model(ids, use_cache=False).logits

    expected = run(plain)
    contexts = edited.recompute_contexts
    actual = run(lambda ids: checkpoint(plain, ids, use_reentrant=False, context_fn=contexts))

    assert all(g is not None and g.any() for n in ("prompts", "both") for g in expected[n])
    assert all(g is None for g in expected["terms"])
    for name in ("prompts", "both"):
        torch.testing.assert_close(actual[name], expected[name])


def test_generation_gives_each_prompt_its_choice():
    edited, options = edit("terms"), {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    options["attention_mask"] = torch.ones_like(IDS)
    with edited.activated(CHOICES):
        actual = edited.model.generate(IDS, **options)
    for row, choice in enumerate(CHOICES):
        with edited.activated(choice):
            assert torch.equal(edited.model.generate(IDS, **options)[row], actual[row])


def test_tasks_with_adapters_of_different_kinds_never_mix():
    edited = edit("both")
    expected = [alone(edited, choice) for choice in CHOICES]

    async def run(choice, result):
        for _ in range(2):
            with edited.activated(choice):
                await asyncio.sleep(0)
                assert error(logits(edited), result) < 1e-6

    async def run_all():
        await asyncio.gather(*map(run, CHOICES, expected))

    asyncio.run(run_all())


def test_terms_on_the_projections_of_prompts_share_no_batch():
    """Prompts pass these projections too, and they are no row; one choice is as ever."""
    edited = edit("prompts", {"prompts": PROMPTS, "keys": KEYS})
    expected = alone(edited, "keys")
    with edited.activated("keys"):
        assert error(logits(edited), expected) < 1e-6

    with (
        edited.activated(["prompts", "keys", BASE, BASE]),
        pytest.raises(
            OptionsError,
            match=r"'model\.layers\.1\.self_attn\.k_proj' got a batch of 1 rows: expected 4",
        ),
    ):
        logits(edited)
    # The prompts of one row do not get the terms of another that is active.
    edited.set_active("keys")
    check_rows(edited, ["prompts", BASE, "prompts", BASE])


@pytest.mark.parametrize("choice", ["scaled", ["prompts", "scaled", BASE, BASE]], ids=str)
@pytest.mark.parametrize(
    "scaled", [SCALES, {"rules": [PROMPTS, SCALES]}], ids=["alone", "with prompts"]
)
def test_adapters_with_scales_are_not_used_beside_others(choice, scaled):
    edited = edit("prompts", {"prompts": PROMPTS, "scaled": scaled})
    before = logits(edited)
    with pytest.raises(ContractError) as caught, edited.activated(choice):
        pytest.fail("never entered")

    assert str(caught.value) == (
        "Variant 'scaled' cannot be used beside others: expected modules that can be shared at "
        "'model.layers.0.mlp.down_proj', got ScaledLinear, made by 'scale_shift'. Make it the active "
        "one."
    ).replace(
        "ScaledLinear", type(edited.variant("scaled")["model.layers.0.mlp.down_proj"]).__name__
    )
    assert not edited.sharing.is_in_force
    assert torch.equal(before, logits(edited))


@pytest.mark.parametrize("active", ["scaled", {"scaled": 0.5}], ids=["one", "sum"])
def test_an_active_adapter_with_scales_is_refused_beside_others(active):
    """Whoever uses something else would get its scales too."""
    edited = edit(active, {"prompts": PROMPTS, "scaled": SCALES})
    before = logits(edited)
    for choice in ("prompts", BASE, ["prompts", BASE, BASE, BASE]):
        with (
            pytest.raises(ContractError, match="cannot be active while threads or rows have"),
            edited.activated(choice),
        ):
            pytest.fail("never entered")
    assert torch.equal(before, logits(edited))

    edited.set_active("prompts")
    with edited.activated(["prompts", BASE, BASE, BASE]):
        for choice in ("scaled", {"scaled": 0.5}):
            with pytest.raises(ContractError, match="cannot be active while threads or rows have"):
                edited.set_active(choice)
        assert "prompts" == edited.active
    edited.set_active("scaled")


def test_an_adapter_with_scales_stays_out_while_others_are_used():
    """A block without it that ends in between says so, and leaves it out."""
    edited = edit("scaled", {"prompts": PROMPTS, "scaled": SCALES})
    disabled = edited.disabled()
    disabled.__enter__()
    with edited.activated("prompts"):
        base = logits(edited)
        with pytest.raises(ContractError, match="'scaled' cannot be active while threads"):
            disabled.__exit__(None, None, None)
        actual = logits(edited)
    edited.set_active("prompts")
    edited.sharing.enable()
    assert torch.equal(logits(edited), actual)
    edited.revert()
    assert torch.equal(base, logits(edited))


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("length", [1, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mixed_batches_are_those_of_peft(length, dtype):
    """Of two ranks, with rows of the base between them."""
    configs = {"a": {"r": 2, "lora_alpha": 3}, "b": {"r": 2, "lora_alpha": 5}, "c": {"r": 4}}
    names = ["q_proj", "v_proj", "down_proj"]
    adapters = {
        name: {"operation": "low_rank", "options": {**found, "target_modules": names}}
        for name, found in configs.items()
    }
    edited = edit("a", adapters, dtype)
    theirs = None
    for name, found in configs.items():
        config = peft.LoraConfig(**found, target_modules=names)
        if theirs is None:
            theirs = peft.get_peft_model(build(seed=1, dtype=dtype), config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
        tables = dict(theirs.named_parameters())
        with torch.no_grad():
            for key, tensor in edited.tensors(name).items():
                tables[f"base_model.model.{key}.{name}.weight"].copy_(tensor)
    rows, ids = ["b", BASE, "a", "c", "b"], tokens(5, length)

    with torch.no_grad():
        expected = theirs.eval()(ids, use_cache=False, adapter_names=rows).logits
    with edited.activated(rows):
        actual = logits(edited, ids)

    assert error(actual, expected) < (TOLERANCE if dtype is torch.float32 else 1e-12)
