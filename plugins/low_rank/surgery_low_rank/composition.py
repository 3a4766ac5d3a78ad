"""Several low-rank variants at once: the weighted sum of what each adds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgery_core import (
    BoundRule,
    Composed,
    ContractError,
    Effects,
    Operation,
    OptionsError,
    Rule,
    Selector,
    Site,
    TensorSpec,
    Tree,
    WeightedVariant,
    Where,
    listed,
)
from surgery_low_rank.linear import A, B, LowRankLinear, is_over_merged, low_rank_with

NAME = "low_rank_composition"


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """Variants that are active at once, each with a weight on what it adds.

    Args:
        weights: By the name of the variant, in the order of the names; may be negative.
    """

    weights: Mapping[str, float]


def compose(variants: Sequence[WeightedVariant]) -> Composed:
    """Return what computes `W x + sum of w_i scaling_i B_i (A_i x)`, with one call of the base.

    Ranks, factors and dropout may differ from variant to variant.

    Raises:
        OptionsError: A weight is not finite.
        ContractError: A variant is merged into the weights of a layer.
    """
    bad = [f"{v.name!r}: {v.weight!r}" for v in variants if not math.isfinite(v.weight)]
    if bad:
        msg = f"Weights of variants must be finite numbers, got {', '.join(bad)}. Fix them."
        raise OptionsError(msg)
    found = sorted(variants, key=lambda variant: variant.name)
    modules = {variant.name: _own(variant) for variant in found}
    weights = {variant.name: variant.weight for variant in found}
    rule = Rule(operation=NAME, options={"weights": weights})
    return Composed(
        rule=BoundRule(rule=rule, operation=CompositionOperation(modules)),
        loans={name: parameter_names(name) for name in modules},
    )


def parameter_names(variant: str) -> dict[str, str]:
    """Return the names a variant's parameters have in a composition, with those it gives them.

    Example:
        >>> parameter_names("v1.0")
        {'lora_A_v1%2E0': 'lora_A', 'lora_B_v1%2E0': 'lora_B'}
    """
    # A dot would begin another segment of the FQN.
    key = variant.replace("%", "%25").replace(".", "%2E")
    return {f"{A}_{key}": A, f"{B}_{key}": B}


class CompositionOperation(Operation[Composition]):
    """Put several variants at once on their layers; not offered to sessions.

    Args:
        variants: Their layers by FQN, by the name of the variant.
    """

    name = NAME
    summary = "Several low-rank terms at once, each with a weight."

    def __init__(self, variants: Mapping[str, Mapping[str, LowRankLinear]]) -> None:
        self._variants = variants

    def parse_options(self, options: Mapping[str, Any]) -> Composition:
        """Read the weights."""
        return Composition(weights=options["weights"])

    def targets(self, tree: Tree, options: Composition) -> Selector:  # noqa: ARG002 (any tree)
        """Choose every layer that one of the variants is for."""
        fqns = frozenset(fqn for name in options.weights for fqn in self._variants[name])
        return Where(lambda fqn, _: fqn in fqns, f"layers of {listed(options.weights)}")

    def describe(self, site: Site, options: Composition) -> Effects:
        """Return the tensors of every variant that is for the layer.

        Raises:
            ContractError: A variant is merged into the layer's weight.
        """
        names = self._names(site, options)
        if any(is_over_merged(self._variants[name][site.fqn], site.module) for name in names):
            expected, actual = "the weight of the base", "one that a variant was merged into"
            msg = (
                f"Variants {listed(names)} cannot be active together at {site.fqn!r}: expected "
                f"{expected}, got {actual}. Call unmerge() first."
            )
            raise ContractError(msg, fqn=site.fqn, expected=expected, actual=actual)
        return Effects(
            added=tuple(
                TensorSpec(
                    name=own,
                    shape=tuple(parameter.shape),
                    dtype=str(parameter.dtype).removeprefix("torch."),
                    trainable=parameter.requires_grad,
                )
                for name in names
                for own, given in parameter_names(name).items()
                for parameter in [getattr(self._variants[name][site.fqn], given)]
            )
        )

    def build(self, site: Site, options: Composition) -> LowRankLinear:
        """Return the layer of the site with the matrices of all of them."""
        names = self._names(site, options)
        modules = {name: self._variants[name][site.fqn] for name in names}
        # Each has one, since variants are no compositions.
        parts = [
            replace(module.low_rank_parts[0], weight=options.weights[name], a=a, b=b)
            for name, module in modules.items()
            for a, b in [parameter_names(name)]
        ]
        own = {
            key: getattr(module, given)
            for name, module in modules.items()
            for key, given in parameter_names(name).items()
        }
        return low_rank_with(site.module, parts, own)

    def _names(self, site: Site, options: Composition) -> list[str]:
        return [name for name in options.weights if site.fqn in self._variants[name]]


def _own(variant: WeightedVariant) -> dict[str, LowRankLinear]:
    return {
        fqn: module for fqn, module in variant.modules.items() if isinstance(module, LowRankLinear)
    }
