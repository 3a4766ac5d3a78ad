"""Prompts of one token as a bias of the output projection: the term does not depend on the query."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from surgery_adaption_prompt.attention import AdaptedAttention
from surgery_adaption_prompt.config import AdaptionPromptConfig
from surgery_adaption_prompt.functional import activate_gate, fold_gate
from surgery_adaption_prompt.parts import GATE, PROMPT, AttentionArchitecture
from surgery_adaption_prompt.straight_output import goes_straight
from surgery_core import (
    BoundRule,
    ContractError,
    Effects,
    Operation,
    OptionsError,
    Rule,
    Selector,
    Site,
    StateError,
    TensorSpec,
    Tree,
    Where,
    is_sharded,
    listed,
)

NAME = "adaption_prompt_merged_bias"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Share:
    """An adapter that is merged at one attention module.

    Args:
        attention: The base's; not the adapter's, which cannot be copied as a part of what it wraps.
        architecture: How to deal with it.
        parameters: The table of the adapter's module, in which its parameters are looked up.
        config: The adapter's.
        weight: Factor on its term, dimensionless.
    """

    attention: nn.Module
    architecture: AttentionArchitecture
    parameters: Mapping[str, Tensor | None]
    config: AdaptionPromptConfig
    weight: float

    @classmethod
    def of(cls, module: AdaptedAttention, weight: float) -> Self:
        """Return the share of an adapter's module."""
        (part,) = module.prompts
        return cls(
            attention=module.base_attention,
            architecture=module.architecture,
            parameters=module._parameters,  # noqa: SLF001 (torch's registry)
            config=part.config,
            weight=weight,
        )

    def term(self, like: Tensor) -> Tensor:
        """Return the term, the same for every position, `(heads * value_dim,)`.

        Args:
            like: Says dtype and device.
        """
        _, heads = self.architecture.sizes(self.attention)
        # To where the projections are, which may have moved without a stored adapter.
        prompt, gate = (
            cast("Tensor", self.parameters[name]).to(like.device) for name in (PROMPT, GATE)
        )
        key, value = self.architecture.project(
            self.attention,
            prompt.to(like.dtype),  # as when the adapter is in the model
            head_dim=self.architecture.head_dim(self.attention),
        )
        # Weighted in float32 or wider, as there.
        wide = torch.promote_types(gate.dtype, torch.float32)
        gate = activate_gate(gate, self.config.gate_activation).to(wide) * self.weight
        # (1, heads, 1, value_dim) -> (heads * value_dim,)
        return fold_gate(key, value, gate, heads=heads)[1].flatten().to(like.dtype)


Shares = Sequence[Share]
"""All that is merged at one module."""


class MergedLinear(nn.Linear):
    """An output projection that adds the terms of prompts of one token.

    Each pass computes them from the adapters and the base as they are then: one value projection of
    one token. So a hot swap, an edited gate or other weights in the base count at once.

    Args:
        base: The output projection; its parameters are shared.
        shares: Adapters whose terms are added.
    """

    def __init__(self, base: nn.Linear, shares: Shares) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self._shares = tuple(shares)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's signature)
        """Return the projection of the input with the terms."""
        before, after = constant_terms(self._shares, input)
        output = linear(input if before is None else input + before, self.weight, self.bias)
        return output if after is None else output + after


class MergedBiasOperation(Operation[None]):
    """Replace output projections by ones with the terms in them; not offered to sessions.

    With `adapter_len=1` the softmax over the prompt is 1 whatever the query, so the term is
    `o_proj(act(g) * v)`, the same for every position.

    Args:
        shares: Adapters by the FQN of the output projection.
        is_final: Write a bias that needs no adapter any more. Otherwise compute it in each pass.
    """

    name = NAME
    summary = "Adaption prompts of one token as a bias of the output projection."

    def __init__(self, shares: Mapping[str, Shares], *, is_final: bool) -> None:
        self._shares = shares
        self._is_final = is_final

    def parse_options(self, options: Mapping[str, Any]) -> None:
        """Take none."""

    def targets(self, tree: Tree, options: None) -> Selector:  # noqa: ARG002 (any tree)
        """Choose the output projections."""
        return Where(lambda fqn, _: fqn in self._shares, "output projections of the adapter")

    def describe(self, site: Site, options: None) -> Effects:  # noqa: ARG002 (it has none)
        """Return the bias, if there was none and one is written."""
        projection = _linear(site)
        if not self._is_final or "bias" in dict(projection.named_parameters()):
            return Effects()
        dtype = str(projection.weight.dtype).removeprefix("torch.")
        shape = (projection.out_features,)
        return Effects(added=(TensorSpec(name="bias", shape=shape, dtype=dtype, trainable=False),))

    def build(self, site: Site, options: None) -> nn.Linear:  # noqa: ARG002 (it has none)
        """Return a projection with the same weight, and the terms.

        Raises:
            StateError: A value of the bias is not finite in the dtype of the weight.
        """
        projection, shares = _linear(site), self._shares[site.fqn]
        dtype = projection.weight.dtype
        with torch.no_grad():
            bias = _bias(projection, shares).to(dtype)
            terms = () if self._is_final else constant_terms(shares, projection.weight)
        if not all(_is_finite(value) for value in (bias, *terms)):
            problem = f"the bias of {site.fqn!r} is not finite in {dtype}"
            msg = (
                f"Nothing was merged: {problem}. The adapter diverged, or its gates are too large "
                "for this dtype. Go back to an earlier state, or merge into a base of a wider dtype."
            )
            raise StateError(msg, mismatched=[problem])
        if not self._is_final:
            return MergedLinear(projection, shares)
        merged = nn.Linear(projection.in_features, projection.out_features, device="meta")
        merged.weight = projection.weight
        merged.bias = nn.Parameter(bias, requires_grad=False)
        return merged


def merged_projections(shares: Mapping[str, Shares]) -> dict[str, Shares]:
    """Return the adapters by the FQN of the output projection in place of the attention module's.

    Raises:
        ContractError: An output projection is not known, or gets something else than the attention
            function gave.
    """
    found: dict[str, Shares] = {}
    for fqn, chosen in shares.items():
        attention = chosen[0].attention
        name = chosen[0].architecture.output_projection(attention, fqn=fqn)
        cls: Any = type(attention)
        if not goes_straight(cls, name):
            actual = f"{cls.__name__}, which gates or norms it first"
            msg = (
                f"Adapter cannot be merged at {fqn!r}: expected an attention whose output goes to "
                f"{name!r} as it is, got {actual}. Keep the adapter in the model."
            )
            raise ContractError(msg, fqn=fqn, expected="a direct way", actual=actual)
        found[f"{fqn}.{name}"] = chosen
    return found


def merged_bias_rule(
    shares: Mapping[str, Shares], *, is_final: bool, zeros: Collection[str] = ()
) -> BoundRule:
    """Return the rule that merges an adapter, or a composition of adapters.

    Args:
        shares: The adapters at each attention module, by its FQN.
        is_final: See `MergedBiasOperation`.
        zeros: FQNs of other linear layers that get a bias of zero.

    Raises:
        OptionsError: A prompt has more than one token.
        ContractError: An output projection is not known.
    """
    lengths = {share.config.adapter_len for found in shares.values() for share in found}
    if lengths != {1}:
        msg = (
            f"Adapter cannot be merged: expected adapter_len=1, got {listed(map(str, sorted(lengths)))}. "
            "A longer prompt's term depends on the query; keep the adapter in the model."
        )
        raise OptionsError(msg)
    projections: dict[str, Shares] = {**dict.fromkeys(zeros, ()), **merged_projections(shares)}
    operation = MergedBiasOperation(projections, is_final=is_final)
    return BoundRule(rule=Rule(operation=NAME), operation=operation)


def constant_terms(shares: Shares, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return what prompts of one token add to the input of the output projection, and to its output.

    Args:
        shares: The adapters.
        like: Says dtype and device.

    Returns:
        Each `(heads * value_dim,)`; None for nothing.
    """
    found: list[Tensor | None] = [None, None]
    for share in shares:
        place = 0 if share.config.project_output else 1
        term, before = share.term(like), found[place]
        found[place] = term if before is None else before + term
    return found[0], found[1]


def _bias(projection: nn.Linear, shares: Shares) -> Tensor:
    """Return the bias with the terms, in float32 or wider."""
    # The projections round to the base's dtype, as when the adapter is in the model; what comes after
    # is computed in float32 or wider, and cast once.
    weight = projection.weight.to(torch.promote_types(projection.weight.dtype, torch.float32))
    total = torch.zeros_like(weight[:, 0])
    if projection.bias is not None:
        total = total + projection.bias
    before, after = constant_terms(shares, weight)
    if before is not None:
        total = total + weight @ before
    return total if after is None else total + after


def _is_finite(value: Tensor | None) -> bool:
    return value is None or value.is_meta or bool(torch.isfinite(value).all())


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
