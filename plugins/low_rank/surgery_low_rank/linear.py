"""`LowRankLinear`: a linear layer of the base with two narrow matrices beside its own forward."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from surgery_core import DriftError, Overlay, Shareable, Sharing, make_overlay, replacement_device
from surgery_low_rank.functional import low_rank_term
from surgery_low_rank.options import LowRankOptions, parameter_dtype

A, B = "lora_A", "lora_B"
"""Names of the parameters, those that PEFT gives them."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Two matrices of a layer, and what is done with them.

    Args:
        scaling: Factor on their product, dimensionless.
        dropout: Probability with which a feature of their input is dropped in training.
        weight: Another factor, of a composition; dimensionless.
        a: Name of the parameter that comes first.
        b: Name of the parameter that comes second.
    """

    scaling: float
    dropout: float = 0.0
    weight: float = 1.0
    a: str = A
    b: str = B

    @property
    def factor(self) -> float:
        """Both factors as one."""
        return self.weight * self.scaling

    def term(self, layer: nn.Module, x: Tensor, *, is_training: bool) -> Tensor:
        """Return what the matrices of a layer add to its output.

        Args:
            layer: Has the parameters.
            x: `(..., in_features)`, in any floating-point dtype.
            is_training: Whether features of it may be dropped.

        Returns:
            `(..., out_features)`, in the parameters' dtype, but at least float32.
        """
        a, b = getattr(layer, self.a), getattr(layer, self.b)
        # Cast before dropout, as in PEFT, so that the same features are dropped.
        x = x.to(a.dtype)
        if self.dropout:
            x = functional.dropout(x, self.dropout, is_training)
        return low_rank_term(x, a, b, scaling=self.factor)


class OtherTerms(Protocol):
    """What the code that runs now gets from a layer in place of the layer's own terms."""

    def added_to(self, output: Tensor, x: Tensor, *, is_training: bool, sharing: Sharing) -> Tensor:
        """Return the output of the base's forward with them."""


class LowRankLinear(Overlay, Shareable):
    """A linear layer that computes `W x + scaling * B (A x)`, with `W x` by the base's forward.

    Never built directly: `low_rank_linear` gives an object of a class that derives from this one and
    from the base's class, so that whatever looks for `nn.Linear` or a subclass of it, quantised ones
    included, finds it. The object has the base's parameters, buffers, hook tables and attributes, and
    two parameters more, or two for each of its `low_rank_parts`:

    - `lora_A`, `(r, in_features)`: random at first.
    - `lora_B`, `(out_features, r)`: zeros at first.

    Without any part it is a place for the terms of `sharing`.

    While it is merged (see `surgery_low_rank.merging`) the base's forward alone is run, with a weight
    that has all of it.

    Invariant: where `lora_B` is zero the output equals the base's, if `A x` is finite; the sign of a
    zero may change. Base FQNs stay.
    """

    overlay_prefix = "LowRank"
    needs_batch_axis = True

    low_rank_parts: tuple[Part, ...]
    is_merged: bool

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002, ANN401 (the base's own signature)
        """Run the base's forward, and add what every part computes."""
        output: Tensor = super().forward(input, *args, **kwargs)
        if self.is_merged:
            return output
        # Under another overlay this is part of its base, and the object's `sharing` is that one's.
        sharing = self.sharing if self.overlay_kind is LowRankLinear else None
        if sharing is not None and sharing.is_in_force:
            terms = sharing.terms()
            if terms is not None:
                other: OtherTerms | None = terms.get(id(self.overlay_base))
                if other is None:
                    return output
                return other.added_to(output, input, is_training=self.training, sharing=sharing)
        found = output
        for part in self.low_rank_parts:
            term = part.term(self, input, is_training=self.training)
            if term.shape[-1] != output.shape[-1]:
                raise _resized(term, output)
            found = found + term
        # Rounded once: the sum is in float32 at least.
        return found.to(output.dtype)

    def takes(self, name: str, parameter: nn.Parameter | None) -> bool:
        """Tell whether a parameter has no terms in it, which are those of another layer here."""
        del name
        return not getattr(parameter, _MERGED, False)

    def sharing_problem(self) -> str | None:
        """Tell whether everybody gets the terms of this layer, since they are in the weight."""
        if is_over_merged(self, self.overlay_base):
            return "a merged layer" if self.is_merged else "a layer over a merged weight"
        return None

    def change_problem(self) -> str | None:
        """Tell whether the terms of this layer are in the weight, where others' values do not reach."""
        return "its terms are merged into the weight of the base" if self.is_merged else None


def low_rank_linear(base: nn.Linear, options: LowRankOptions) -> LowRankLinear:
    """Return a linear layer with two new matrices; the base is not changed.

    Args:
        base: The layer.
        options: Rank, factors, dtype, and whether the matrices are trained.

    Returns:
        The replacement, in the base's mode, on its device.

    Example:
        >>> base = nn.Linear(2, 3)
        >>> adapted, x = low_rank_linear(base, LowRankOptions(r=1)), torch.randn(5, 2)
        >>> torch.equal(base(x), adapted(x)), adapted.weight is base.weight
        (True, True)
        >>> [name for name, _ in adapted.named_parameters()]
        ['weight', 'bias', 'lora_A', 'lora_B']
    """
    device = replacement_device(base)
    dtype = parameter_dtype(base, options.dtype)
    shapes = added_shapes(base, options)
    # Drawn in float32 on the CPU: the values then depend on neither dtype nor device.
    first = torch.empty(shapes[A])
    nn.init.kaiming_uniform_(first, a=math.sqrt(5))
    own = {
        name: nn.Parameter(value.to(device, dtype), requires_grad=not options.inference_mode)
        for name, value in {A: first, B: torch.zeros(shapes[B])}.items()
    }
    part = Part(scaling=options.scaling, dropout=options.lora_dropout)
    return low_rank_with(base, [part], own)


def added_shapes(base: nn.Linear, options: LowRankOptions) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the two parameters by name."""
    return {A: (options.r, base.in_features), B: (base.out_features, options.r)}


def low_rank_with(
    base: nn.Module, parts: Sequence[Part], own: Mapping[str, nn.Parameter]
) -> LowRankLinear:
    """Return a linear layer with matrices that exist; the base is not changed.

    Args:
        base: The layer.
        parts: None for a layer that only listens to `sharing`.
        own: The parameters that they name.
    """
    # Not the sharing of a base that stands for another layer in turn.
    attributes = {"low_rank_parts": tuple(parts), "is_merged": False, "sharing": None}
    return make_overlay(base, LowRankLinear, parameters=own, attributes=attributes)


def _resized(term: Tensor, output: Tensor) -> DriftError:
    msg = (
        f"Linear layer has {output.shape[-1]} outputs, and its low-rank term {term.shape[-1]}: the "
        "base was resized after the adapter was applied. Revert, resize, and apply again."
    )
    return DriftError(msg, fqns=())


def mark_merged_(weight: nn.Parameter) -> None:
    """Note on a weight that low-rank terms are in it."""
    setattr(weight, _MERGED, True)


def is_over_merged(module: LowRankLinear, base: nn.Module) -> bool:
    """Tell whether terms were merged that are not this layer's, or that are and would count twice.

    Not if the layer was made for the merged weight, which is its base's own then.

    Args:
        module: The layer.
        base: What it stands for.
    """
    weight = getattr(base, "weight", None)
    return module.is_merged or (
        getattr(weight, _MERGED, False) and module._parameters.get("weight") is not weight  # noqa: SLF001 (torch's registry)
    )


_MERGED = "_has_low_rank_terms"
