"""Several variants of one operation at once, each with a weight: what such operations have in common."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from torch import nn

from surgery_core.errors import OptionsError, listed
from surgery_core.operation import (
    BoundRule,
    Composed,
    Effects,
    Operation,
    Rule,
    TensorSpec,
    WeightedVariant,
)
from surgery_core.selectors import Selector, Tree, Where
from surgery_core.slots import Site

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class WeightedSum(Operation[Mapping[str, float]], Generic[ModuleT]):
    """Put several variants at once on their modules, with parameters borrowed of them; abstract.

    Made for the variants at hand, so it is not offered to sessions.

    Args:
        variants: Their modules by FQN, by the name of the variant.
    """

    parameters: tuple[str, ...]
    """Names of the parameters that a variant's module has."""

    def __init__(self, variants: Mapping[str, Mapping[str, ModuleT]]) -> None:
        self._variants = variants

    @abstractmethod
    def join(
        self, site: Site, modules: Mapping[str, ModuleT], weights: Mapping[str, float]
    ) -> nn.Module:
        """Return the module that stands for those of several variants at a site.

        Args:
            site: Where.
            modules: Of the variants that are for it, by name.
            weights: Of all variants.
        """

    def parse_options(self, options: Mapping[str, Any]) -> Mapping[str, float]:
        """Return the weights."""
        weights: Mapping[str, float] = options["weights"]
        return weights

    def targets(self, tree: Tree, options: Mapping[str, float]) -> Selector:  # noqa: ARG002 (any tree)
        """Choose every module that one of the variants is for."""
        fqns = frozenset(fqn for name in options for fqn in self._variants[name])
        return Where(lambda fqn, _: fqn in fqns, f"modules of {listed(options)}")

    def describe(self, site: Site, options: Mapping[str, float]) -> Effects:
        """Return the tensors of every variant that is for the module."""
        own = self.borrowed(self._at(site, options))
        return Effects(added=tuple(TensorSpec.of(name, tensor) for name, tensor in own.items()))

    def build(self, site: Site, options: Mapping[str, float]) -> nn.Module:
        """Return the module that stands for those of all of them."""
        return self.join(site, self._at(site, options), options)

    def borrowed(self, modules: Mapping[str, ModuleT]) -> dict[str, nn.Parameter]:
        """Return the parameters of variants under the names that they have in a composition."""
        return {
            own: getattr(module, given)
            for name, module in modules.items()
            for own, given in composed_names(name, self.parameters).items()
        }

    def composed(self, weights: Mapping[str, float]) -> Composed:
        """Return what puts the variants in a model with these weights."""
        rule = Rule(operation=self.name, options={"weights": dict(weights)})
        return Composed(
            rule=BoundRule(rule=rule, operation=self),
            loans={name: composed_names(name, self.parameters) for name in weights},
        )

    def _at(self, site: Site, options: Mapping[str, float]) -> dict[str, ModuleT]:
        return {
            name: self._variants[name][site.fqn]
            for name in options
            if site.fqn in self._variants[name]
        }


def composed_names(variant: str, names: Sequence[str]) -> dict[str, str]:
    """Return the names that parameters of a variant have in a composition, with those it gives them.

    Example:
        >>> composed_names("v1.0", ["gate"])
        {'gate_v1%2E0': 'gate'}
    """
    # A dot would begin another segment of the FQN.
    key = variant.replace("%", "%25").replace(".", "%2E")
    return {f"{name}_{key}": name for name in names}


def finite_weights(variants: Sequence[WeightedVariant]) -> dict[str, float]:
    """Return the weights of variants by name, sorted, so that a sum does not depend on the order.

    Raises:
        OptionsError: A weight is not finite.
    """
    bad = [f"{v.name!r}: {v.weight!r}" for v in variants if not math.isfinite(v.weight)]
    if bad:
        msg = f"Weights of variants must be finite numbers, got {', '.join(bad)}. Fix them."
        raise OptionsError(msg)
    return {v.name: v.weight for v in sorted(variants, key=lambda variant: variant.name)}


def modules_of(
    variants: Sequence[WeightedVariant], cls: type[ModuleT]
) -> dict[str, dict[str, ModuleT]]:
    """Return the modules of a class by FQN, by the name of the variant, sorted by it."""
    return {
        variant.name: {fqn: m for fqn, m in variant.modules.items() if isinstance(m, cls)}
        for variant in sorted(variants, key=lambda variant: variant.name)
    }
