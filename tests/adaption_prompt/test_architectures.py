"""What transformers looks like inside, at the corners the families do not reach."""

import pytest
import torch
from support.families import build, open_gates_, randomize_, tokens
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel, architectures
from surgery_adaption_prompt.architectures import architecture_of, attention_modules
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

from surgery_core import ContractError

CONFIG = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, gate="head")


@pytest.fixture
def with_sinks():
    """A model whose attention modules have a parameter of their own, besides projections."""
    config = GptOssConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_local_experts=2,
        num_experts_per_tok=1,
        pad_token_id=0,
        attn_implementation="eager",
    )
    model = GptOssForCausalLM(config).eval()
    randomize_(model, 0)
    return model


def test_attention_modules_come_lowest_layer_first():
    model = build()
    tree = dict(reversed(list(model.named_modules())))

    assert [f"model.layers.{n}.self_attn" for n in range(3)] == list(attention_modules(tree))


def test_a_module_that_is_no_attention_is_refused():
    with pytest.raises(ContractError) as caught:
        architecture_of(nn.Linear(2, 2), fqn="lm_head")

    assert str(caught.value) == (
        "Operation 'adaption_prompt' cannot work at 'lm_head': expected an attention module that "
        "uses transformers' attention interface, got Linear. Select the attention modules, for "
        "example 'model.layers.*.self_attn'."
    )


def test_without_a_scaling_the_interfaces_own_default_holds():
    model = AdaptionPromptModel(build(), {"a": CONFIG}, "a")
    open_gates_(model.adapter_modules("a"))
    module = model.adapter_modules("a")["model.layers.2.self_attn"]
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)

    default, _ = architectures._attend_with_prompt(module, query, key, key, None)
    explicit, _ = architectures._attend_with_prompt(module, query, key, key, None, scaling=8**-0.5)

    assert torch.allclose(explicit, default)


def test_parameters_of_the_attention_itself_stay_the_bases(with_sinks):
    """They keep their name, and when a move makes new objects the base has them too."""
    ids = tokens()
    attention = with_sinks.model.layers[1].self_attn
    with torch.no_grad():
        expected = with_sinks(ids).logits
        model = AdaptionPromptModel(with_sinks, {"a": CONFIG}, "a")
        assert torch.equal(expected, model(ids).logits)
        open_gates_(model.adapter_modules("a"))
        assert not torch.equal(expected, model(ids).logits)
    assert "model.layers.1.self_attn.sinks" in with_sinks.state_dict()

    model.to("meta")

    assert attention.sinks.is_meta
    assert attention.sinks is with_sinks.model.layers[1].self_attn.sinks
    model.unload()
    assert all(parameter.is_meta for parameter in with_sinks.parameters())
