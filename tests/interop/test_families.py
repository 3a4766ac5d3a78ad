"""Every model type of transformers is right, refused, or not to be had: as the docs say."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from support import tiny
from support.families import build, open_gates_, tokens
from support.sweep import judge
from support.tiny import MODEL_TYPES
from surgery_adaption_prompt import (
    AdaptedAttention,
    AdaptionPromptConfig,
    AdaptionPromptModel,
    architectures,
    operation,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PAGE = Path(__file__).parents[2] / "docs/reference/families.md"
TABLE = dict(
    re.findall(r"^\| (\S+) \| (right|refused|not tiny|wrong) \|", PAGE.read_text(), re.MULTILINE)
)

# Models warn about their own defaults and deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_table_is_true(model_type):
    if f"transformers {version('transformers')}" not in PAGE.read_text():
        pytest.skip("the table is of another transformers: run `make docs-tables`")

    verdict = judge(model_type)

    assert TABLE[model_type] == verdict.kind, verdict.detail


def test_nothing_is_wrong_and_most_is_right():
    verdicts = list(TABLE.values())

    assert "wrong" not in verdicts
    assert verdicts.count("right") >= 125
    assert verdicts.count("not tiny") <= 5


@pytest.mark.parametrize(
    ("model_type", "name", "projections"),
    [
        ("gpt_neox", "GPTNeoXAttention", architectures.FusedProjection("query_key_value")),
        ("gpt2", "GPT2Attention", architectures.InterleavedProjection("c_attn")),
        ("llama", "LlamaAttention", architectures.SeparateProjections("v_proj", "k_proj")),
    ],
)
def test_a_wrong_projection_is_found_wrong(monkeypatch, model_type, name, projections):
    """The judge can tell: keys and values from the wrong place do not pass."""
    known = {**architectures.KNOWN_CLASSES, name: projections}
    monkeypatch.setattr(architectures, "KNOWN_CLASSES", known)

    verdict = judge(model_type)

    assert "wrong" == verdict.kind
    assert "differs from the formula" in verdict.detail


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("blt", "a gate gets no gradient"), ("diffllama", "calls"), ("hrm_text", "calls")],
)
def test_what_is_refused_by_name_is_found_wrong(monkeypatch, model_type, reason):
    """The judge finds layers that run more than once in a pass, or that logits do not depend on."""
    monkeypatch.setattr(architectures, "REFUSED_CLASSES", {})
    # Two of them have several stacks of layers, which are refused too.
    monkeypatch.setattr(operation, "one_stack", lambda _, fqns, *, named: list(fqns))  # noqa: ARG005

    verdict = judge(model_type)

    assert "wrong" == verdict.kind
    assert reason in verdict.detail


def test_a_term_wider_than_the_output_is_found_wrong(monkeypatch):
    """The judge looks at bfloat16 too."""

    def wide(self, output, call):
        dtype = torch.promote_types(output.dtype, torch.float32)
        return output + self.prompt_term(call).to(dtype)

    monkeypatch.setattr(AdaptedAttention, "add_prompt", wide)

    verdict = judge("llama")

    assert "wrong" == verdict.kind
    assert "dtype" in verdict.detail


def test_queries_may_be_wider_than_the_projections(monkeypatch):
    """A prompt gets the dtype of the projection it goes through, not that of the query."""
    model = build("qwen3", dtype=torch.bfloat16)
    for layer in model.model.layers:
        layer.self_attn.q_norm.float()
        layer.self_attn.k_norm.float()
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    widths = set()

    def narrowing(module, query, key, value, *args, **kwargs):
        # As transformers' flash attention does with float32 queries.
        widths.add((query.dtype, value.dtype))
        narrow = (states.to(value.dtype) for states in (query, key))
        return attend(module, *narrow, value, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", narrowing)
    ids, config = tokens(), AdaptionPromptConfig(adapter_len=3, adapter_layers=2)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        adapted = AdaptionPromptModel(model, {"a": config}, "a")

        untrained = adapted(input_ids=ids, use_cache=False).logits
        open_gates_(adapted.adapter_modules("a"))
        actual = adapted(input_ids=ids, use_cache=False).logits

    assert {(torch.float32, torch.bfloat16)} == widths
    assert torch.equal(expected, untrained)
    assert torch.isfinite(actual).all()
    assert not torch.equal(expected, actual)


@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
        {"attention_k_eq_v": True},
    ],
)
def test_layers_without_projections_of_their_own_are_refused(monkeypatch, options):
    """Options of Gemma 4 that its default configuration leaves off."""
    monkeypatch.setitem(tiny._OVERRIDES, "gemma4_text", options)

    verdict = judge("gemma4_text")

    assert "refused" == verdict.kind
    assert "Gemma4TextAttention" in verdict.detail


@pytest.mark.parametrize("weight_dtype", [torch.int8, torch.float8_e4m3fn, None])
def test_a_quantised_projection_gets_the_dtype_of_the_query(weight_dtype):
    """What a quantised weight is kept in says nothing about the input it takes."""

    class Quantised(torch.nn.Module):
        def forward(self, states):
            return states

    projection, attention = Quantised(), torch.nn.Module()
    if weight_dtype is not None:
        projection.register_buffer("weight", torch.empty(4, 4, dtype=weight_dtype))
    attention.k_proj = attention.v_proj = projection
    prompt = torch.ones(1, 3, 4, dtype=torch.bfloat16)

    key, value = architectures.SeparateProjections()(attention, prompt)

    assert torch.bfloat16 == key.dtype == value.dtype
