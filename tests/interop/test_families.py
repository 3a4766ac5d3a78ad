"""Every model type of transformers is right, refused, or not to be had: as the docs say."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from support.sweep import judge
from support.tiny import MODEL_TYPES
from surgery_adaption_prompt import architectures

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
    assert verdicts.count("right") >= 110


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


@pytest.mark.parametrize("model_type", ["diffllama", "hrm_text"])
def test_a_second_call_in_one_pass_is_found_wrong(monkeypatch, model_type):
    """The judge finds what is refused by name for being called more than once."""
    monkeypatch.setattr(architectures, "REFUSED_CLASSES", {})

    verdict = judge(model_type)

    assert "wrong" == verdict.kind
    assert "calls" in verdict.detail
