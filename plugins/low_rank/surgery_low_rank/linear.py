"""`LowRankLinear`: a linear layer of the base with two narrow matrices beside its own forward."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from surgery_core import dispatch_again, execution_device
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


class LowRankLinear(nn.Module):
    """A linear layer that computes `W x + scaling * B (A x)`, with `W x` by the base's forward.

    Never built directly: `low_rank_linear` gives an object of a class that derives from this one and
    from the base's class, so that whatever looks for `nn.Linear` or a subclass of it, quantised ones
    included, finds it. The object has the base's parameters, buffers, hook tables and attributes, and
    two parameters more, or two for each of its `low_rank_parts`:

    - `lora_A`, `(r, in_features)`: random at first.
    - `lora_B`, `(out_features, r)`: zeros at first.

    While it is merged (see `surgery_low_rank.merging`) the base's forward alone is run, with a weight
    that has all of it.

    Invariant: where `lora_B` is zero the output equals the base's, if `A x` is finite; the sign of a
    zero may change. Base FQNs stay.
    """

    low_rank_base: nn.Module
    low_rank_parts: tuple[Part, ...]
    is_merged: bool

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002, ANN401 (the base's own signature)
        """Run the base's forward, and add what every part computes."""
        output: Tensor = super().forward(input, *args, **kwargs)
        if self.is_merged:
            return output
        found = output
        for part in self.low_rank_parts:
            a, b = getattr(self, part.a), getattr(self, part.b)
            # Cast before dropout, as in PEFT, so that the same features are dropped.
            x = input.to(a.dtype)
            if part.dropout:
                x = functional.dropout(x, part.dropout, self.training)
            found = found + low_rank_term(x, a, b, scaling=part.factor)
        # Rounded once: the sum is in float32 at least.
        return found.to(output.dtype)

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401 (torch's signature)
        """Set an attribute; another parameter in the place of a base's is the base's too."""
        super().__setattr__(name, value)
        if isinstance(value, nn.Parameter):
            self._give_back()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's signature)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Parameters may have become new objects (from or to the meta device).
        self._give_back()
        return self

    def _give_back(self) -> None:
        """Let the base have the parameters that stand under its names here."""
        theirs = self.low_rank_base._parameters  # noqa: SLF001 (torch's registry)
        for name in theirs.keys() & self._parameters.keys():
            if theirs[name] is not self._parameters[name]:
                # Not past the base, which may stand for another layer in turn.
                setattr(self.low_rank_base, name, self._parameters[name])

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        # The class is made at run time, so copies and pickles make it again.
        state = {name: value for name, value in vars(self).items() if name != _COMPILED}
        return _over, (self.low_rank_base,), state


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
    device = execution_device(base)
    if device is None:
        # Packed quantised layers have buffers only.
        device = next((t.device for t in (*base.parameters(), *base.buffers())), None)
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
        parts: At least one.
        own: The parameters that they name.
    """
    adapted = _over(base)
    # Not __init__: the replacement takes over the state of the base, tables shared, and makes none.
    vars(adapted).update(vars(base))
    vars(adapted).update(
        low_rank_base=base,
        low_rank_parts=tuple(parts),
        is_merged=False,
        _parameters={**base._parameters, **own},  # noqa: SLF001 (torch's registry; a table of its own keeps the base's free of ours)
    )
    # Of the base, which would be called in place of the replacement.
    vars(adapted).pop(_COMPILED, None)
    dispatch_again(adapted)
    return adapted


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


_COMPILED = "_compiled_call_impl"
_MERGED = "_has_low_rank_terms"


def _over(base: nn.Module) -> LowRankLinear:
    # Of the object, since its class may be made at run time too.
    return _blank(type(base))


def _blank(base: type[nn.Module]) -> LowRankLinear:
    cls = _low_rank_class(base)  # type: ignore[arg-type]  # mypy takes the instances' __hash__ for the class's
    return cls.__new__(cls)


@cache
def _low_rank_class(base: type[nn.Module]) -> type[LowRankLinear]:
    """Return the one class for such layers of a base class: torch.compile guards on it."""
    return type(f"LowRank{base.__name__}", (LowRankLinear, base), {"__module__": __name__})
