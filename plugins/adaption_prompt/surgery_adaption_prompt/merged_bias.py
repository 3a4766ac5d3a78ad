"""Prompts of one token as a bias of the output projection: the term does not depend on the query."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery_adaption_prompt.attention import AdaptedAttention
from surgery_adaption_prompt.parts import AttentionCall, folded_prompts
from surgery_core import (
    BoundRule,
    ContractError,
    Effects,
    Operation,
    OptionsError,
    Rule,
    Selector,
    Site,
    TensorSpec,
    Tree,
    Where,
    is_sharded,
    listed,
)

NAME = "adaption_prompt_merged_bias"


class MergedBiasOperation(Operation[None]):
    """Replace output projections by copies whose bias has the terms in it; not offered to sessions.

    With `adapter_len=1` the softmax over the prompt is 1 whatever the query, so the term is
    `o_proj(act(g) * v)`, a constant.

    Args:
        attentions: Adapted attention modules by the FQN of their output projection.
    """

    name = NAME
    summary = "Adaption prompts of one token as a bias of the output projection."

    def __init__(self, attentions: Mapping[str, AdaptedAttention]) -> None:
        self._attentions = attentions

    def parse_options(self, options: Mapping[str, Any]) -> None:
        """Take none."""

    def targets(self, tree: Tree, options: None) -> Selector:  # noqa: ARG002 (any tree)
        """Choose the output projections."""
        return Where(lambda fqn, _: fqn in self._attentions, "output projections of the adapter")

    def describe(self, site: Site, options: None) -> Effects:  # noqa: ARG002 (it has none)
        """Return the bias, if there was none."""
        linear = _linear(site)
        if "bias" in dict(linear.named_parameters()):
            return Effects()
        dtype = str(linear.weight.dtype).removeprefix("torch.")
        spec = TensorSpec(name="bias", shape=(linear.out_features,), dtype=dtype, trainable=False)
        return Effects(added=(spec,))

    def build(self, site: Site, options: None) -> nn.Linear:  # noqa: ARG002 (it has none)
        """Return a projection with the same weight, and the terms in its bias."""
        linear = _linear(site)
        with torch.no_grad():
            bias = _bias(linear, self._attentions[site.fqn])
        merged = nn.Linear(linear.in_features, linear.out_features, device="meta")
        merged.weight = linear.weight
        merged.bias = nn.Parameter(bias.to(linear.weight.dtype), requires_grad=False)
        return merged


def merged_bias_rule(modules: Mapping[str, AdaptedAttention]) -> BoundRule:
    """Return the rule that merges an adapter, or a composition of adapters.

    Args:
        modules: Its modules by FQN.

    Raises:
        OptionsError: A prompt has more than one token.
        ContractError: An output projection is not known.
    """
    lengths = {part.config.adapter_len for module in modules.values() for part in module.prompts}
    if lengths != {1}:
        msg = (
            f"Adapter cannot be merged: expected adapter_len=1, got {listed(map(str, sorted(lengths)))}. "
            "A longer prompt's term depends on the query; keep the adapter in the model."
        )
        raise OptionsError(msg)
    attentions = {
        f"{fqn}.{module.architecture.output_projection(module, fqn=fqn)}": module
        for fqn, module in modules.items()
    }
    return BoundRule(rule=Rule(operation=NAME), operation=MergedBiasOperation(attentions))


def _bias(linear: nn.Linear, attention: AdaptedAttention) -> Tensor:
    """Return the bias with the terms of all parts, in float32 or wider."""
    weight = linear.weight.to(torch.promote_types(linear.weight.dtype, torch.float32))
    total = torch.zeros_like(weight[:, 0])
    if linear.bias is not None:
        total = total + linear.bias
    _, heads = attention.architecture.sizes(attention)
    head_dim = attention.architecture.head_dim(attention)
    # Has the shape of a query, (batch, heads, query_len, head_dim); its values do not matter.
    query = linear.weight.new_zeros(1, heads, 1, head_dim)
    entries = [(attention, part) for part in attention.prompts]
    folded = folded_prompts(entries, AttentionCall(query=query, scaling=1.0))
    for part, (_, gated) in zip(attention.prompts, folded.pairs, strict=True):
        # (1, heads, 1, value_dim) -> (heads * value_dim,)
        term = gated.flatten().to(weight.dtype)
        total = total + (weight @ term if part.config.project_output else term)
    return total


def _linear(site: Site) -> nn.Linear:
    module: object = site.module
    if any(map(is_sharded, site.module.parameters())):
        msg = (
            f"Adapter cannot be merged at {site.fqn!r}: expected whole weights, got some that are "
            "spread over processes. Keep the adapter in the model."
        )
        raise ContractError(msg, fqn=site.fqn, expected="whole weights", actual="sharded ones")
    if type(module) is not nn.Linear:
        msg = (
            f"Adapter cannot be merged at {site.fqn!r}: expected torch.nn.Linear, got "
            f"{type(site.module).__name__}. Keep the adapter in the model."
        )
        raise ContractError(msg, fqn=site.fqn, expected=nn.Linear, actual=type(site.module))
    return module
