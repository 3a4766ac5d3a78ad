"""LLaMA-Adapter V2 as a whole: scales, biases and norms of one plugin beside the prompts of another."""

import copy

import pytest
import torch
import transformers
from support.caches import cache_of, with_cache
from support.families import Shape, build, open_gates_, tokens
from surgery_adaption_prompt import AdaptedAttention
from surgery_scale_shift import ScaledLinear
from torch import nn

from surgery_core import ConflictError, ModelRecipe, Rule, Session, verify
from surgery_core.testing import assert_unchanged, snapshot

IDS = tokens(2, 7)
PROMPTS = {
    "operation": "adaption_prompt",
    "options": {"adapter_len": 3, "adapter_layers": 2, "gate": "head", "gate_activation": "tanh"},
}
EVERYWHERE = [{"operation": "scale_shift"}, {"operation": "tuned_norm"}]
"""Also inside the attention modules, which the adapter with the prompts wraps."""

OUTSIDE = [
    {"operation": "scale_shift", "select": "**.mlp.*"},
    {"operation": "scale_shift", "select": "lm_head"},
    {"operation": "tuned_norm"},
]
"""What is not inside them."""


def recipe(rules=EVERYWHERE, **adapters):
    adapters = adapters or {"prompts": PROMPTS}
    return ModelRecipe.model_validate(
        {"rules": rules, "adapters": adapters, "active": next(iter(adapters))}
    )


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def train_(model, seed=0):
    """Give all that was added values that are different everywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ScaledLinear):
                scale, bias = module.adapter_scale, module.adapter_bias
                scale.copy_(0.6 + 0.8 * torch.rand(scale.shape, generator=generator))
                bias.copy_(0.3 * torch.randn(bias.shape, generator=generator))
    attentions = {
        str(n): m for n, m in enumerate(model.modules()) if isinstance(m, AdaptedAttention)
    }
    open_gates_(attentions, seed=seed)


def folded(model, base):
    """Return a copy of the base, in float64, whose linear layers and norms compute as the model's do.

    `s (W x + c + b)` is the linear layer `(s W) x + s (c + b)`, and `W (s x) + c + b` is `(W s) x + c + b`.
    """
    found = copy.deepcopy(base).double()
    with torch.no_grad():
        for fqn, module in model.named_modules():
            if fqn.endswith("norm"):
                found.get_submodule(fqn).weight.copy_(module.weight)
            if not isinstance(module, ScaledLinear):
                continue
            scale, bias = module.adapter_scale.double(), module.adapter_bias.double()
            if module.bias is not None:
                bias = bias + module.bias.double()
            linear = nn.Linear(module.in_features, module.out_features).double()
            is_paper = module.form == "paper"
            linear.weight.copy_(module.weight.double() * (scale[:, None] if is_paper else scale))
            linear.bias.copy_(scale * bias if is_paper else bias)
            found.set_submodule(fqn, linear)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_recipe_is_exact_at_init_and_reverts(dtype):
    model = build(dtype=dtype)
    before, expected = snapshot(model), logits(model)
    edited = Session().plan_recipe(model, recipe()).apply()

    assert torch.equal(expected, logits(model))
    layers = [m for m in model.modules() if isinstance(m, ScaledLinear)]
    assert 3 * 7 + 1 == len(layers)
    assert 2 == sum(isinstance(m, AdaptedAttention) for m in model.modules())
    assert isinstance(model.model.layers[2].self_attn.q_proj, ScaledLinear)
    assert {torch.float32} == {p.dtype for p in edited.added_parameters()}
    train_(model)
    assert 1e-2 < (logits(model) - expected).abs().max()

    edited.revert()
    assert_unchanged(before, model, subject="Apply, training and revert")
    assert torch.equal(expected, logits(model))


def test_one_recipe_passes_the_checks_of_the_core():
    edited = Session().plan_recipe(build(), recipe()).apply()

    outcome = verify(edited, {"input_ids": IDS, "use_cache": False})

    assert outcome.is_ok, outcome.render()
    assert {"ok"} == {check.status for check in outcome.checks}


def test_each_part_counts():
    """Taken back to its first value, every kind of part changes the output."""
    model = build()
    edited = Session().plan_recipe(model, recipe()).apply()
    train_(model)
    expected = logits(model)

    added = [*edited.tensors("rules").items(), *edited.tensors("prompts").items()]
    for end in ("adapter_scale", "adapter_bias", "norm.weight", "_prompt", "_gate"):
        chosen = [tensor for name, tensor in added if name.endswith(end)]
        assert chosen, end
        kept = [tensor.detach().clone() for tensor in chosen]
        with torch.no_grad():
            for tensor in chosen:
                tensor.add_(0.5)
        assert not torch.equal(expected, logits(model)), end
        with torch.no_grad():
            for tensor, value in zip(chosen, kept, strict=True):
                tensor.copy_(value)
    assert torch.equal(expected, logits(model))


def test_a_record_computes_the_same(tmp_path):
    model, session = build(), Session()
    edited = session.plan_recipe(model, recipe()).apply()
    train_(model)
    expected = logits(model)

    session.save(edited, tmp_path)
    again = session.load(build(), tmp_path, base_check="error")

    assert torch.equal(expected, logits(again.model))


def test_an_adapter_may_have_all_of_it():
    """Rules of two plugins make up one adapter, switched as a whole, if none is inside another's place."""
    model = build()
    before, expected = snapshot(model), logits(model)
    whole = {"rules": [*OUTSIDE, PROMPTS]}
    edited = Session().plan_recipe(model, recipe((), v2=whole, v1=PROMPTS)).apply()
    train_(model)
    trained = logits(model)

    edited.set_active("v1")
    assert torch.equal(expected, logits(model))
    edited.set_active("v2")
    assert torch.equal(trained, logits(model))
    with edited.disabled():
        assert torch.equal(expected, logits(model))
    edited.revert()
    assert_unchanged(before, model, subject="Apply, switching and revert")


def test_all_of_it_is_one_adapter_that_takes_turns_with_another():
    model = build()
    before, expected = snapshot(model), logits(model)
    rules = [
        PROMPTS,
        {"operation": "scale_shift", "exclude": "lm_head"},
        {"operation": "tuned_norm"},
    ]
    edited = Session().plan_recipe(model, recipe((), v2={"rules": rules}, v1=PROMPTS)).apply()
    outcome = verify(edited, Session().plugins.probe_inputs(model))
    assert outcome.is_ok, outcome.render()
    assert torch.equal(expected, logits(model))

    train_(model)
    trained = logits(model)
    assert not torch.allclose(expected, trained, atol=1e-3)
    edited.set_active("v1")
    assert torch.equal(expected, logits(model))
    edited.set_active("v2")
    assert torch.equal(trained, logits(model))
    edited.revert()
    assert_unchanged(before, model, subject="Apply, switching and revert")


@pytest.mark.parametrize(
    ("rules", "adapters", "places"),
    [
        (
            [PROMPTS],
            {"scales": {"operation": "scale_shift", "select": "**.q_proj"}},
            ("model.layers.1.self_attn", "model.layers.1.self_attn.q_proj"),
        ),
        (
            [{"operation": "scale_shift", "select": "lm_head"}],
            {"head": {"operation": "trainable_copy", "options": {"modules": ["lm_head"]}}},
            ("lm_head", "lm_head"),
        ),
        (
            [
                {"operation": "tuned_norm"},
                {"operation": "trainable_copy", "options": {"modules": ["model.norm"]}},
            ],
            {"prompts": PROMPTS},
            ("model.norm", "model.norm"),
        ),
    ],
    ids=["adapter inside rule", "rule and adapter", "two rules"],
)
def test_claims_of_two_plugins_on_one_place_conflict(rules, adapters, places):
    model = build()
    before = snapshot(model)

    with pytest.raises(ConflictError) as caught:
        Session().plan_recipe(model, recipe(rules, **adapters))

    assert set(places) == {fqn for _, fqn in caught.value.claims[0]}
    assert_unchanged(before, model, subject="Planning")


def check_against_folded(model, base, prompts):
    """Hold logits to those of the folded base with the same prompts, for two sets of values.

    Two, since what the prompts keep from one call to the next must not be used after a change.

    Args:
        model: With all of V2.
        base: The same before, in float32.
        prompts: The recipe, as applied, that has the prompts.
    """
    untrained = logits(model)
    for seed in (0, 1):
        train_(model, seed)
        reference = folded(model, base)
        again = Session().plan_recipe(reference, recipe((), prompts=PROMPTS)).apply()
        state = {key: t.detach().clone() for key, t in prompts.tensors("prompts").items()}
        again.load_("prompts", state)
        for _ in range(2):
            torch.testing.assert_close(logits(model).double(), logits(reference), rtol=0, atol=2e-5)
        with prompts.disabled(), again.disabled():
            torch.testing.assert_close(logits(model).double(), logits(reference), rtol=0, atol=2e-5)
    assert 1e-2 < (logits(model) - untrained).abs().max()


@pytest.mark.parametrize("form", ["paper", "chat65b"])
@pytest.mark.parametrize("bias", [True, False])
def test_keys_and_values_of_prompts_are_scaled_as_those_of_tokens(form, bias):
    """As in the authors' code. The reference has scales and norms folded into its weights."""
    base = build(shape=Shape(attention_bias=bias))
    model = copy.deepcopy(base)
    rules = [{"operation": "scale_shift", "options": {"form": form}}, {"operation": "tuned_norm"}]
    edited = Session().plan_recipe(model, recipe(rules)).apply()

    check_against_folded(model, base, edited)


@pytest.mark.parametrize("is_inner_first", [True, False])
def test_in_two_surgeries_the_order_does_not_matter(is_inner_first):
    """Neither that of applying nor that of reverting: the places of one are not those of the other."""
    base = build()
    model = copy.deepcopy(base)
    before, expected = snapshot(model), logits(model)
    session = Session()
    rules = [Rule(operation="scale_shift"), Rule(operation="tuned_norm")]
    steps = [
        lambda: session.plan(model, rules).apply(),
        lambda: session.plan_recipe(model, recipe((), prompts=PROMPTS)).apply(),
    ]
    done = [step() for step in (steps if is_inner_first else reversed(steps))]

    assert torch.equal(expected, logits(model))
    check_against_folded(model, base, done[is_inner_first])
    for step in done:
        step.revert()
    assert_unchanged(before, model, subject="Two surgeries and their reverts")
    assert torch.equal(expected, logits(model))


def test_generation_step_by_step_gives_the_logits_of_the_whole():
    """With a cache of keys and values, which have passed the scales when they are kept."""
    model = build()
    Session().plan_recipe(model, recipe()).apply()
    train_(model)
    whole = logits(model)
    cache, steps = None, []

    for position in range(IDS.shape[1]):
        with torch.no_grad():
            step = model(IDS[:, position : position + 1], **with_cache(cache), use_cache=True)
        cache = cache_of(step)
        steps.append(step.logits)

    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=2e-5)


def meta_llama(*, hidden, middle, layers, heads):
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=middle,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def count(model, select, form):
    """Return how many values are trained: in scales and biases, and in norms."""
    rules = [
        Rule(operation="scale_shift", select=select, options={"form": form}),
        Rule(operation="tuned_norm", select=select),
    ]
    plan = Session().plan(model, rules)
    norms = [claim.site.module for claim in plan.claims if claim.rule == 1]
    return plan.document.num_parameters, sum(n.weight.numel() for n in norms)


def test_numbers_of_parameters_on_llama_7b():
    """Of the paper's form, every linear layer and norm; and the prompts of V1, 1.2M."""
    model = meta_llama(hidden=4096, middle=11008, layers=32, heads=32)
    options = {"adapter_len": 10, "adapter_layers": 30}
    rule = Rule(operation="adaption_prompt", options=options)

    prompts = Session().plan(model, [rule]).document.num_parameters

    layer = 2 * (5 * 4096 + 2 * 11008)
    assert (32 * layer + 2 * 32000, 65 * 4096) == count(model, None, "paper")
    assert (2_783_744, 266_240) == count(model, None, "paper")
    assert 30 * 10 * 4096 + 30 == prompts
    assert 2_783_744 + 266_240 + prompts == 4_278_814


def test_numbers_of_parameters_on_llama_65b():
    """What the authors' code trains of the chat model: 13.8M, perhaps the 14M of the paper's abstract.

    Of every layer but not of the head: neither `output` has a scale there, nor is `norm`, the last
    one, among the parameters whose names have `_norm.` in them.
    """
    model = meta_llama(hidden=8192, middle=22016, layers=80, heads=64)

    scales, norms = count(model, "model.layers.**", "chat65b")

    assert 80 * (6 * 8192 + 22016 + 5 * 8192 + 2 * 22016) == scales
    assert (12_492_800, 1_310_720) == (scales, norms)
    assert 13_803_520 == scales + norms
