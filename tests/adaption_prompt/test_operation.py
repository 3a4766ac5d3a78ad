"""The rule: which modules it takes, what it promises, and what it refuses."""

import math

import pytest
import torch
from support.families import CLASSES, build
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel, plugin
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from surgery_core import (
    ContractError,
    NoMatchError,
    OptionsError,
    Rule,
    Session,
    fingerprint,
)


@pytest.fixture
def session():
    return Session([plugin], discover=False)


def rule(**options):
    return Rule(operation="adaption_prompt", options={"adapter_len": 4, **options})


@pytest.mark.parametrize("family", CLASSES)
def test_the_topmost_layers_are_chosen(session, family):
    plan = session.plan(build(family), [rule(adapter_layers=2)])

    fqns = [edit.fqn for edit in plan.document.edits]
    assert ["model.layers.1.self_attn", "model.layers.2.self_attn"] == fqns


def test_a_selector_narrows_where_the_top_is_counted(session):
    narrowed = Rule(
        operation="adaption_prompt",
        select="model.layers.{..1}.self_attn",
        options={"adapter_len": 4, "adapter_layers": 1},
    )

    plan = session.plan(build(), [narrowed])

    assert ["model.layers.1.self_attn"] == [edit.fqn for edit in plan.document.edits]


@pytest.mark.parametrize(
    ("gate", "shape", "dtype"), [("layer", (1,), None), ("head", (4,), "bfloat16")]
)
def test_the_plan_says_what_apply_adds(session, gate, shape, dtype):
    model = build()
    plan = session.plan(model, [rule(adapter_layers=1, gate=gate, dtype=dtype)])
    (edit,) = plan.document.edits

    plan.apply()

    module = model.get_submodule(edit.fqn)
    promised = {spec.name: (spec.shape, f"torch.{spec.dtype}") for spec in edit.added}
    assert promised == {
        name: (tuple(getattr(module, name).shape), str(getattr(module, name).dtype))
        for name in ("adaption_prompt", "adaption_gate")
    }
    assert shape == promised["adaption_gate"][0]


@pytest.mark.parametrize(
    ("base", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2],
)
def test_parameters_are_at_least_float32_unless_asked(base, expected):
    config = AdaptionPromptConfig(adapter_len=2, adapter_layers=1)

    model = AdaptionPromptModel(build(dtype=base), {"a": config}, "a")

    (module,) = model.adapter_modules("a").values()
    assert expected is module.adaption_prompt.dtype
    assert expected is module.adaption_gate.dtype


def test_llama_7b_takes_the_papers_number_of_values(session):
    """K = 10 and L = 30 on LLaMA-7B: 1.2M prompt values, planned and applied without memory."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    for gate, gates in (("layer", 30), ("head", 30 * 32)):
        plan = session.plan(model, [rule(adapter_len=10, adapter_layers=30, gate=gate)])
        surgery = plan.apply()

        added = [spec for edit in plan.document.edits for spec in edit.added]
        prompts = sum(math.prod(s.shape) for s in added if s.name == "adaption_prompt")
        assert 1_228_800 == prompts
        assert 1_228_800 + gates == plan.document.num_parameters
        assert all(parameter.is_meta for parameter in model.parameters())
        surgery.revert()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"adapter_layers": 4},
            OptionsError,
            "adapter_layers must be between 1 and 3 (attention modules of this model), got 4.",
        ),
        (
            {"adapter_layers": 1, "target_modules": "attn"},
            NoMatchError,
            "target_modules 'attn' names no attention module: this model calls them 'self_attn'. "
            "Use that name, or leave target_modules out.",
        ),
        (
            {"adapter_layers": 0},
            OptionsError,
            "AdaptionPromptConfig is invalid: adapter_layers must be an integer of at least 1, "
            "got 0.",
        ),
    ],
)
def test_what_the_model_cannot_take_is_refused(session, options, error, message):
    model = build()
    before = fingerprint(model)

    with pytest.raises(error) as caught:
        session.plan(model, [rule(**options)])

    assert message == str(caught.value)
    assert before == fingerprint(model)


def test_a_model_without_attention_is_refused(session):
    model = nn.Sequential(nn.Linear(2, 2))

    with pytest.raises(NoMatchError) as caught:
        session.plan(model, [rule(adapter_layers=1)])

    assert str(caught.value) == (
        "Operation 'adaption_prompt' found no attention module among 2 submodules: expected "
        "modules that use transformers' attention interface. Pass a decoder of transformers 5."
    )


def test_a_double_wrap_is_refused(session):
    model = build()
    session.plan(model, [rule(adapter_layers=1)]).apply()
    before = list(model.modules())

    with pytest.raises(ContractError) as caught:
        session.plan(model, [rule(adapter_layers=2)])

    assert str(caught.value) == (
        "Operation 'adaption_prompt' cannot work at 'model.layers.2.self_attn': expected a base "
        "attention module, got AdaptedLlamaAttention, adapted already. Remove the adapter first, "
        "or add this one to the model that holds it."
    )
    assert before == list(model.modules())


def test_a_patched_forward_is_refused(session):
    model = build()
    attention = model.model.layers[2].self_attn
    attention.forward = attention.forward

    with pytest.raises(ContractError, match="got LlamaAttention with a patched forward"):
        session.plan(model, [rule(adapter_layers=1)])


def test_unknown_projections_are_refused(session):
    model = build()
    attention = model.model.layers[2].self_attn
    attention.keys = attention.k_proj
    del attention.k_proj

    with pytest.raises(ContractError) as caught:
        session.plan(model, [rule(adapter_layers=1)])

    assert str(caught.value) == (
        "Operation 'adaption_prompt' cannot work at 'model.layers.2.self_attn': expected "
        "projections named k_proj and v_proj, or key and value, got LlamaAttention with 'q_proj', 'v_proj', "
        "'o_proj', 'keys'. This architecture is not supported."
    )


def test_one_attention_under_two_names_is_one_layer(session):
    """A tied layer is counted once, and adapted in both places."""
    model = build()
    model.model.layers[0].self_attn = model.model.layers[1].self_attn

    plan = session.plan(model, [rule(adapter_layers=2)])
    plan.apply()

    assert ["model.layers.0.self_attn", "model.layers.2.self_attn"] == [
        edit.fqn for edit in plan.document.edits
    ]
    assert model.model.layers[0].self_attn is model.model.layers[1].self_attn


def test_the_report_says_that_everything_went_over(session):
    surgery = session.plan(build(), [rule(adapter_layers=1)]).apply()

    assert surgery.report() == (
        "model.layers.2.self_attn: hooks shared, eval, 97 trainable, float32 on cpu"
    )
