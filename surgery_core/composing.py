"""Several variants of one operation at once, each with a weight: what such operations have in common."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import islice
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
from surgery_core.swap import Loans, Variants

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class WeightedSum(Operation[Mapping[str, float]], Generic[ModuleT]):
    """Put several variants at once on their modules, with parameters borrowed of them; abstract.

    Made for the variants at hand, so it is not offered to sessions.

    Args:
        variants: Their modules by FQN, by the name of the variant.
    """

    parameters: tuple[str, ...]
    """Names of the parameters that a variant's module has; see `names_of`."""

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

    def names_of(self, module: ModuleT) -> Sequence[str]:
        """Return the names of the parameters that a variant's module has; `parameters` for all.

        Args:
            module: One of the variant's, whose others have the same.
        """
        del module
        return self.parameters

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
            for own, given in composed_names(name, self.names_of(module)).items()
        }

    def composed(self, weights: Mapping[str, float]) -> Composed:
        """Return what puts the variants in a model with these weights."""
        rule = Rule(operation=self.name, options={"weights": dict(weights)})
        return Composed(
            rule=BoundRule(rule=rule, operation=self),
            loans={
                name: composed_names(name, self.names_of(module))
                for name in weights
                for module in islice(self._variants[name].values(), 1)
            },
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


def compose_all(weights: Mapping[str, float], variants: Variants) -> tuple[list[BoundRule], Loans]:
    """Return what puts variants in a model at once, each made by one operation or by several.

    Args:
        weights: Factors on what they add, by name.
        variants: All of them.

    Returns:
        A rule for each operation, and what the modules they build borrow; for `SwapState.add`.

    Raises:
        ContractError: An operation's variants cannot be active together.
        OptionsError: A weight is not finite.
    """
    operations = {
        operation.name: operation for name in weights for operation, _ in variants[name].values()
    }
    rules, loans = [], {name: dict[str, str]() for name in weights}
    for operation in operations.values():
        own = {
            name: {
                fqn: module
                for fqn, (maker, module) in variants[name].items()
                if maker.name == operation.name
            }
            for name in weights
        }
        composed = operation.compose(
            [
                WeightedVariant(name=name, weight=weights[name], modules=modules)
                for name, modules in own.items()
                if modules
            ]
        )
        rules.append(composed.rule)
        for name, names in composed.loans.items():
            loans[name].update(names)
    return rules, loans
