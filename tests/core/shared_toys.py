"""Operations whose variants can be used by row, by thread and with weights; for tests of the core."""

from dataclasses import dataclass

import torch
from core.toys import ToyOperation
from torch import nn

from surgery_core import (
    Effects,
    Overlay,
    Shareable,
    TensorSpec,
    WeightedSum,
    composed_names,
    finite_weights,
    make_overlay,
    modules_of,
    repeats_of,
    rows_at,
)


class Offset(Overlay, Shareable):
    """A linear layer that adds an offset to its output, or the weighted sum of several."""

    overlay_prefix = "Offset"
    parameter = "offset"

    def forward(self, x):
        output = super().forward(x)
        if self.sharing is not None and self.sharing.is_in_force:
            terms = self.sharing.terms()
            if terms is not None:
                rows = terms.get(id(self.overlay_base))
                return output if rows is None else rows.added_to(output)
        for name, weight in self.weights.items():
            output = self.change(output, getattr(self, name), weight)
        return output

    @staticmethod
    def change(output, value, weight):
        return output + weight * value


class Factor(Offset):
    """A linear layer that multiplies its output."""

    overlay_prefix = "Factor"
    parameter = "factor"

    @staticmethod
    def change(output, value, weight):
        return output * (1 + weight * value)


@dataclass
class OffsetRows:
    """What the rows of a batch get."""

    rows: list

    def added_to(self, output):
        if len(self.rows) == 1:
            for one in self.rows[0]:
                module = one.module
                output = module.change(output, getattr(module, module.parameter), one.weight)
            return output
        repeats, found = repeats_of(len(output), len(self.rows)), output.clone()
        for one in {id(one): one for row in self.rows for one in row}.values():
            at = rows_at([one in row for row in self.rows], place=True, repeats=repeats)
            value = getattr(one.module, one.module.parameter)
            found[at] = one.module.change(found[at], value, one.weight)
        return found


class OffsetSum(WeightedSum):
    """Several at once."""

    name = "offsets"
    summary = "Offsets at once."

    def __init__(self, variants, operation):
        super().__init__(variants)
        self.kind = operation.kind
        self.name = f"{operation.name}_sum"
        self.parameters = (operation.kind.parameter,)

    def join(self, site, modules, weights):
        named = {
            own: weights[name] for name in modules for own in composed_names(name, self.parameters)
        }
        return made(self.kind, site.module, named, self.borrowed(modules))


class OffsetOperation(ToyOperation):
    """Give linear layers an offset, of zeros at first."""

    name = "offset"
    summary = "An offset."
    known = frozenset({"value"})
    kind = Offset

    def describe(self, site, _options):
        shape = (site.module.out_features,)
        return Effects(added=(TensorSpec(name=self.kind.parameter, shape=shape, dtype="float32"),))

    def build(self, site, options):
        value = nn.Parameter(torch.full((site.module.out_features,), options.get("value", 0.0)))
        name = self.kind.parameter
        return made(self.kind, site.module, {name: 1.0}, {name: value})

    def compose(self, variants):
        return OffsetSum(modules_of(variants, self.kind), self).composed(finite_weights(variants))

    def listener(self, site):
        return made(self.kind, site.module, {}, {})

    def shared(self, _site, rows):
        return OffsetRows(rows)


class FactorOperation(OffsetOperation):
    """Give linear layers a factor of one plus zero at first."""

    name = "factor"
    summary = "A factor."
    kind = Factor


def made(kind, base, weights, parameters):
    """Return a layer with parameters that exist, by the weight of each."""
    attributes = {"weights": weights, "sharing": None}
    return make_overlay(base, kind, parameters=parameters, attributes=attributes)
