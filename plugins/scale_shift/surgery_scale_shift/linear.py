"""`ScaledLinear`: a linear layer of the base with a learned scale and bias around its own forward."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery_core import Overlay, make_overlay, replacement_device
from surgery_scale_shift.functional import scale_and_shift, shift_then_scale
from surgery_scale_shift.options import Form, ScaleShiftOptions, parameter_dtype

SCALE, BIAS = "adapter_scale", "adapter_bias"
"""Names of the parameters, those that litgpt gives them."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One scale and bias of a layer.

    Args:
        weight: Factor on what they change, dimensionless.
        scale: Name of the parameter with the scale.
        bias: Name of the parameter with the bias.
    """

    weight: float = 1.0
    scale: str = SCALE
    bias: str = BIAS


class ScaledLinear(Overlay):
    """A linear layer that computes `s (W x + b)`, or `W (s x) + b`, with `W x` by the base's forward.

    Never built directly: `scale_linear` gives an object of a class that derives from this one and
    from the base's class, so that whatever looks for `nn.Linear` or a subclass of it, quantised ones
    included, finds it. The object has the base's parameters, buffers, hook tables and attributes, and
    two parameters more, or two for each of its `parts`:

    - `adapter_scale`, `(out_features,)`, or `(in_features,)` in the form `chat65b`: one at first.
    - `adapter_bias`, `(out_features,)`: minus zero at first, which no sum with it shows.

    Invariant: with those values the output equals the base's, bit for bit. Base FQNs stay.
    """

    overlay_prefix = "Scaled"

    form: Form
    parts: tuple[Part, ...]

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002, ANN401 (the base's own signature)
        """Run the base's forward between the scale and the bias."""
        alone = self.parts[0] if len(self.parts) == 1 and self.parts[0].weight == 1.0 else None
        if self.form == "paper":
            output = super().forward(input, *args, **kwargs)
            if alone is not None:
                return shift_then_scale(
                    output, getattr(self, alone.scale), getattr(self, alone.bias)
                )
            return scale_and_shift(output, self._scale(), self._bias(are_scaled=True))
        scale = getattr(self, alone.scale) if alone is not None else self._scale()
        bias = getattr(self, alone.bias) if alone is not None else self._bias(are_scaled=False)
        output = super().forward(scale_and_shift(input, scale), *args, **kwargs)
        return scale_and_shift(output, bias=bias)

    def _scale(self) -> Tensor:
        """Return one plus what the parts change of it, which is exact where that is nothing."""
        found: Tensor | float = 1.0
        for part in self.parts:
            found = found + part.weight * (_wide(getattr(self, part.scale)) - 1.0)
        return found  # type: ignore[return-value]  # there is a part

    def _bias(self, *, are_scaled: bool) -> Tensor:
        """Return the weighted sum of the biases, each as its own scale makes it if `are_scaled`."""
        # So that the first is added to nothing.
        found: Tensor | float = -0.0
        for part in self.parts:
            bias = _wide(getattr(self, part.bias))
            own = _wide(getattr(self, part.scale)) * bias if are_scaled else bias
            found = found + part.weight * own
        return found  # type: ignore[return-value]  # same


def scale_linear(base: nn.Linear, options: ScaleShiftOptions) -> ScaledLinear:
    """Return a linear layer with a new scale and bias; the base is not changed.

    Args:
        base: The layer.
        options: Form, dtype, and whether the parameters are trained.

    Returns:
        The replacement, in the base's mode, on its device.

    Example:
        >>> base = nn.Linear(2, 3)
        >>> scaled, x = scale_linear(base, ScaleShiftOptions()), torch.randn(5, 2)
        >>> torch.equal(base(x), scaled(x)), scaled.weight is base.weight
        (True, True)
        >>> [name for name, _ in scaled.named_parameters()]
        ['weight', 'bias', 'adapter_scale', 'adapter_bias']
    """
    device = replacement_device(base)
    dtype = parameter_dtype(base, options.dtype)
    own = {
        name: nn.Parameter(
            torch.full(shape, value, device=device, dtype=dtype),
            requires_grad=options.is_trainable,
        )
        for (name, shape), value in zip(
            added_shapes(base, options.form).items(), (1.0, -0.0), strict=True
        )
    }
    return scale_with(base, options.form, [Part()], own)


def added_shapes(base: nn.Linear, form: Form) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the two parameters by name."""
    scaled = base.out_features if form == "paper" else base.in_features
    return {SCALE: (scaled,), BIAS: (base.out_features,)}


def scale_with(
    base: nn.Module, form: Form, parts: Sequence[Part], own: Mapping[str, nn.Parameter]
) -> ScaledLinear:
    """Return a linear layer with scales and biases that exist; the base is not changed.

    Args:
        base: The layer.
        form: Of every part.
        parts: At least one.
        own: The parameters that they name.
    """
    attributes = {"form": form, "parts": tuple(parts)}
    return make_overlay(base, ScaledLinear, parameters=own, attributes=attributes)


def _wide(tensor: Tensor) -> Tensor:
    # Sums of several parts would be rounded coarsely in the dtype of narrow parameters.
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
