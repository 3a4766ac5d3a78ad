"""Several low-rank variants at once: the weighted sum of what each adds."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from surgery_core import (
    Composed,
    ContractError,
    Effects,
    Site,
    WeightedSum,
    WeightedVariant,
    composed_names,
    finite_weights,
    listed,
    modules_of,
)
from surgery_low_rank.linear import A, B, LowRankLinear, is_over_merged, low_rank_with


def compose(variants: Sequence[WeightedVariant]) -> Composed:
    """Return what computes `W x + sum of w_i scaling_i B_i (A_i x)`, with one call of the base.

    Ranks, factors and dropout may differ from variant to variant.

    Raises:
        OptionsError: A weight is not finite.
        ContractError: A variant is merged into the weights of a layer.
    """
    weights = finite_weights(variants)
    return LowRankSum(modules_of(variants, LowRankLinear)).composed(weights)


class LowRankSum(WeightedSum[LowRankLinear]):
    """Put several variants at once on their layers; not offered to sessions."""

    name = "low_rank_composition"
    summary = "Several low-rank terms at once, each with a weight."
    parameters = (A, B)

    def describe(self, site: Site, options: Mapping[str, float]) -> Effects:
        """Return the tensors of every variant that is for the layer.

        Raises:
            ContractError: A variant is merged into the layer's weight.
        """
        check_unmerged(site, self._at(site, options))
        return super().describe(site, options)

    def join(
        self, site: Site, modules: Mapping[str, LowRankLinear], weights: Mapping[str, float]
    ) -> LowRankLinear:
        """Return the layer of the site with the matrices of all of them."""
        # Each has one part, since variants are no compositions.
        parts = [
            replace(module.low_rank_parts[0], weight=weights[name], a=a, b=b)
            for name, module in modules.items()
            for a, b in [composed_names(name, self.parameters)]
        ]
        return low_rank_with(site.module, parts, self.borrowed(modules))


def check_unmerged(site: Site, modules: Mapping[str, LowRankLinear]) -> None:
    """Refuse variants where one is in the weight of the layer, and would count for all.

    Args:
        site: The layer.
        modules: Those of the variants for it, by name.

    Raises:
        ContractError: It is so.
    """
    if any(is_over_merged(module, site.module) for module in modules.values()):
        expected, actual = "the weight of the base", "one that a variant was merged into"
        msg = (
            f"Variants {listed(modules)} cannot be used together at {site.fqn!r}: expected "
            f"{expected}, got {actual}. Call unmerge() first."
        )
        raise ContractError(msg, fqn=site.fqn, expected=expected, actual=actual)
