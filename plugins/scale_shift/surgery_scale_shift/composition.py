"""Several scale-and-shift variants at once: their weighted sum, again one scale and one bias."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from surgery_scale_shift.linear import BIAS, SCALE, Part, ScaledLinear, scale_with

NAME = "scale_shift_composition"


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """Variants that are active at once, each with a weight on what it changes.

    Args:
        weights: By the name of the variant, in the order of the names; may be negative.
    """

    weights: Mapping[str, float]


def compose(variants: Sequence[WeightedVariant]) -> Composed:
    """Return what computes `y + sum of w_i (y_i - y)`, where `y_i` is what variant i alone gives.

    A variant changes a layer to something affine in its output (form `paper`) or in its input
    (`chat65b`), and so does a weighted sum of changes. In the first form that is `S y + C` with
    `S = 1 + sum of w_i (s_i - 1)` and `C = sum of w_i s_i b_i`; in the second `W (S x) + C` with
    `C = sum of w_i b_i`. Of layers whose forward is not affine, such as those of bitsandbytes, which
    round the input, the second is the sum up to that rounding.

    Raises:
        OptionsError: A weight is not finite.
        ContractError: Variants of both forms are at one layer, which takes the base's forward twice.
    """
    bad = [f"{v.name!r}: {v.weight!r}" for v in variants if not math.isfinite(v.weight)]
    if bad:
        msg = f"Weights of variants must be finite numbers, got {', '.join(bad)}. Fix them."
        raise OptionsError(msg)
    found = sorted(variants, key=lambda variant: variant.name)
    modules = {variant.name: _own(variant) for variant in found}
    mixed = {
        fqn
        for own in modules.values()
        for fqn, module in own.items()
        if any(module.form != other[fqn].form for other in modules.values() if fqn in other)
    }
    if mixed:
        expected, actual = "one form", "'paper' and 'chat65b'"
        msg = (
            f"Variants {listed(modules)} cannot be active together at {listed(sorted(mixed))}: "
            f"expected {expected}, got {actual}. Make one of them the active one."
        )
        raise ContractError(msg, fqn=min(mixed), expected=expected, actual=actual)
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
        {'adapter_scale_v1%2E0': 'adapter_scale', 'adapter_bias_v1%2E0': 'adapter_bias'}
    """
    # A dot would begin another segment of the FQN.
    key = variant.replace("%", "%25").replace(".", "%2E")
    return {f"{SCALE}_{key}": SCALE, f"{BIAS}_{key}": BIAS}


class CompositionOperation(Operation[Composition]):
    """Put several variants at once on their layers; not offered to sessions.

    Args:
        variants: Their layers by FQN, by the name of the variant.
    """

    name = NAME
    summary = "Several scales and biases at once, each with a weight."

    def __init__(self, variants: Mapping[str, Mapping[str, ScaledLinear]]) -> None:
        self._variants = variants

    def parse_options(self, options: Mapping[str, Any]) -> Composition:
        """Read the weights."""
        return Composition(weights=options["weights"])

    def targets(self, tree: Tree, options: Composition) -> Selector:  # noqa: ARG002 (any tree)
        """Choose every layer that one of the variants is for."""
        fqns = frozenset(fqn for name in options.weights for fqn in self._variants[name])
        return Where(lambda fqn, _: fqn in fqns, f"layers of {listed(options.weights)}")

    def describe(self, site: Site, options: Composition) -> Effects:
        """Return the tensors of every variant that is for the layer."""
        return Effects(
            added=tuple(
                TensorSpec(
                    name=own,
                    shape=tuple(parameter.shape),
                    dtype=str(parameter.dtype).removeprefix("torch."),
                    trainable=parameter.requires_grad,
                )
                for name in self._names(site, options)
                for own, given in parameter_names(name).items()
                for parameter in [getattr(self._variants[name][site.fqn], given)]
            )
        )

    def build(self, site: Site, options: Composition) -> ScaledLinear:
        """Return the layer of the site with the scales and biases of all of them."""
        names = self._names(site, options)
        parts = [
            Part(weight=options.weights[name], scale=scale, bias=bias)
            for name in names
            for scale, bias in [parameter_names(name)]
        ]
        own = {
            key: getattr(self._variants[name][site.fqn], given)
            for name in names
            for key, given in parameter_names(name).items()
        }
        form = self._variants[names[0]][site.fqn].form
        return scale_with(site.module, form, parts, own)

    def _names(self, site: Site, options: Composition) -> list[str]:
        return [name for name in options.weights if site.fqn in self._variants[name]]


def _own(variant: WeightedVariant) -> dict[str, ScaledLinear]:
    return {
        fqn: module for fqn, module in variant.modules.items() if isinstance(module, ScaledLinear)
    }
