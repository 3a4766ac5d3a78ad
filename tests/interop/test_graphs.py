"""Adaption prompts on a traced Llama whose attention modules are leaves of the graph."""

import pytest
import torch
from support.contracts import SlowToCompile
from support.families import build, open_gates_, tokens
from surgery_adaption_prompt import plugin
from torch import nn
from torch.fx import GraphModule, Tracer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

from surgery_core import Rule, Session
from surgery_core.testing import assert_unchanged, snapshot

IDS = tokens(2, 7)
RULE = Rule(
    operation="adaption_prompt",
    options={"adapter_len": 3, "adapter_layers": 2, "gate": "head"},
)


class Decoder(nn.Module):
    """What a Llama computes without a cache, in terms that can be traced; FQNs are the model's."""

    def __init__(self, llama):
        super().__init__()
        self.model, self.lm_head = llama.model, llama.lm_head

    def forward(self, input_ids, mask):
        hidden = self.model.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1]).unsqueeze(0)
        rotation = self.model.rotary_emb(hidden, positions)
        for layer in self.model.layers:
            attended, _ = layer.self_attn(
                layer.input_layernorm(hidden), position_embeddings=rotation, attention_mask=mask
            )
            hidden = hidden + attended
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.lm_head(self.model.norm(hidden))


class AttentionIsALeaf(Tracer):
    def is_leaf_module(self, module, qualified_name):
        leaves = (LlamaAttention, LlamaRMSNorm)
        is_rotary = qualified_name.endswith("rotary_emb")
        return (
            is_rotary
            or isinstance(module, leaves)
            or super().is_leaf_module(module, qualified_name)
        )


def traced(dtype=torch.float32):
    root = Decoder(build(dtype=dtype)).eval()
    return GraphModule(root, AttentionIsALeaf().trace(root))


def run(model, dtype=torch.float32):
    # (1, 1, query_len, key_len): later tokens are hidden.
    mask = torch.full((IDS.shape[1],) * 2, torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
    return model(IDS, mask)


def session():
    return Session([plugin], discover=False)


class TestGraph(SlowToCompile):
    """The whole contract of the core, on a graph."""

    def make_model(self):
        return traced()

    def rules(self):
        return [RULE]

    def run(self, model):
        return run(model)

    def session(self):
        return session()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_topmost_attention_nodes_get_prompts_and_untrained_ones_change_no_bit(dtype):
    model = traced(dtype)
    before, graph, expected = snapshot(model), model.graph, run(model, dtype)

    surgery = session().plan(model, [RULE]).apply()

    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    fqns = [item.site.fqn for item in surgery.replacements]
    assert ["model.layers.1.self_attn", "model.layers.2.self_attn"] == fqns
    assert set(fqns) <= called
    assert torch.equal(expected, run(model, dtype))
    surgery.revert()
    assert graph is model.graph
    assert_unchanged(before, model, subject="Applying and reverting")
    assert torch.equal(expected, run(model, dtype))


@torch.no_grad()
def test_open_gates_compute_what_they_do_in_the_model():
    """The graph's own logits are the model's, so what the prompts add is too."""
    llama, graph = build(), traced()
    assert torch.allclose(llama(IDS).logits, run(graph), atol=1e-6)

    for model in (llama, graph):
        torch.manual_seed(1)
        surgery = session().plan(model, [RULE]).apply()
        open_gates_({item.site.fqn: item.module for item in surgery.replacements}, seed=4)

    expected = llama(IDS).logits
    assert torch.allclose(expected, run(graph), atol=1e-6)
    assert not torch.allclose(build()(IDS).logits, expected, atol=1e-2)
