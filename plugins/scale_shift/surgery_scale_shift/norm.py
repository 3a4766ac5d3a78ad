"""Copies of norms whose parameters are trained in a wider dtype than the norm computes in."""

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from surgery_core import dispatch_again


class WideNorm(nn.Module):
    """A module that keeps its parameters wide, and gives its own code what they are in its dtype.

    Never built directly: `trainable_norm` gives an object of a class that derives from this one and
    from the base's class. The wide parameters are those in `parameters()`, `state_dict()` and
    optimizers, under the base's names; `module.weight` is one of them cast, which gradients pass.

    Invariant: with the base's values the output equals the base's, bit for bit.
    """

    base_class: type[nn.Module]
    base_dtype: torch.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's signature)
        device = next(self.parameters(recurse=False)).device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # What becomes of the model's dtype; parameters in the wide dtype do not tell.
        self.base_dtype = fn(torch.empty(0, dtype=self.base_dtype, device=device)).dtype
        return self

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        # The class is made at run time, so copies and pickles make it again.
        names = tuple(name for name, found in self._parameters.items() if found is not None)
        return _blank, (self.base_class, names), vars(self).copy()


def trainable_norm(base: nn.Module, dtype: torch.dtype, *, is_trainable: bool) -> nn.Module:
    """Return a copy of a norm with parameters of its own; the base is not changed.

    Args:
        base: The norm, which has parameters and no children.
        dtype: Of the copy's floating-point parameters.
        is_trainable: Whether they get gradients.

    Example:
        >>> base = nn.LayerNorm(3).bfloat16()
        >>> copied = trainable_norm(base, torch.float32, is_trainable=True)
        >>> copied.weight.dtype, next(copied.parameters()).dtype
        (torch.bfloat16, torch.float32)
    """
    copied = copy.deepcopy(base)
    table = copied._parameters  # noqa: SLF001 (torch's registry)
    own = {name: found for name, found in table.items() if found is not None}
    base_dtype = next(iter(own.values())).dtype
    # New ones, without the gradients that the base's may have.
    table.update(
        {
            name: nn.Parameter(found.detach().to(dtype), requires_grad=is_trainable)
            for name, found in own.items()
        }
    )
    if dtype is not base_dtype:
        wide = _blank(type(base), tuple(own))
        vars(wide).update(vars(copied), base_class=type(base), base_dtype=base_dtype)
        copied = wide
        dispatch_again(copied)
    return copied


def _blank(base: type[nn.Module], names: tuple[str, ...]) -> WideNorm:
    cls = _wide_class(base, names)  # type: ignore[arg-type]  # mypy takes the instances' __hash__ for the class's
    return cls.__new__(cls)


@cache
def _wide_class(base: type[nn.Module], names: Sequence[str]) -> type[WideNorm]:
    """Return the one class for wide norms of a base class: torch.compile guards on it."""
    own = {name: property(_cast(name)) for name in names}
    return type(f"Wide{base.__name__}", (WideNorm, base), {"__module__": __name__, **own})


def _cast(name: str) -> Callable[[WideNorm], Tensor | None]:
    def get(self: WideNorm) -> Tensor | None:
        found = self._parameters[name]
        return None if found is None else found.to(self.base_dtype)

    return get
