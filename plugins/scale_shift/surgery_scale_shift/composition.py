"""Several scale-and-shift variants at once: their weighted sum, again one scale and one bias."""

from collections.abc import Mapping, Sequence

from surgery_core import (
    Composed,
    ContractError,
    Site,
    WeightedSum,
    WeightedVariant,
    composed_names,
    finite_weights,
    listed,
    modules_of,
)
from surgery_scale_shift.linear import BIAS, SCALE, Part, ScaledLinear, scale_with


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
    weights = finite_weights(variants)
    modules = modules_of(variants, ScaledLinear)
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
    return ScaleShiftSum(modules).composed(weights)


class ScaleShiftSum(WeightedSum[ScaledLinear]):
    """Put several variants at once on their layers; not offered to sessions."""

    name = "scale_shift_composition"
    summary = "Several scales and biases at once, each with a weight."
    parameters = (SCALE, BIAS)

    def join(
        self, site: Site, modules: Mapping[str, ScaledLinear], weights: Mapping[str, float]
    ) -> ScaledLinear:
        """Return the layer of the site with the scales and biases of all of them."""
        parts = [
            Part(weight=weights[name], scale=scale, bias=bias)
            for name in modules
            for scale, bias in [composed_names(name, self.parameters)]
        ]
        form = next(iter(modules.values())).form
        return scale_with(site.module, form, parts, self.borrowed(modules))
