"""`Overlay`: a module that is its base in everything but what its own class adds."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import chain
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from surgery_core.errors import ContractError, listed
from surgery_core.forwards import dispatch_again, is_dispatched
from surgery_core.preflight import execution_device
from surgery_core.sharded import is_held_together

OverlayT = TypeVar("OverlayT", bound="Overlay")


class Overlay(nn.Module):
    """A module over a base that it leaves as it is; abstract.

    Never built directly: `make_overlay` gives an object of a class that derives from a subclass of
    this one and from the base's class (as PyTorch's `fully_shard` does), so that whatever looks for
    the base's class or its attributes finds them. The object shares the base's parameters, children,
    and the tables of its buffers and hooks. A subclass says what it computes in `forward`, where
    `super().forward` is the base's.

    Invariant: the base has the parameters that stand under its names here, new ones too, and none
    that were added. A base may be an overlay of another class in turn.
    """

    overlay_prefix: ClassVar[str]
    """What the names of the classes begin with; the base class's follows."""

    overlay_kind: ClassVar[type["Overlay"]]
    """Of the outermost of a stack, whose object runs the forwards of those under it too."""

    overlay_base: nn.Module

    def overlay_stack(self) -> Iterator[nn.Module]:
        """Yield this module, its base, that one's if it is an overlay too, and so on."""
        found: nn.Module = self
        while isinstance(found, Overlay):
            yield found
            found = found.overlay_base
        yield found

    def take_over(self) -> None:
        """Have the parameters that the base has under its names now, as far as `takes` says.

        None that were sharded meanwhile, which are gathered for the module that was there then.
        """
        for name, theirs in self.overlay_base._parameters.items():  # noqa: SLF001 (torch's registry)
            is_foreign = theirs is not None and is_held_together(theirs)
            if (
                self._parameters.get(name) is not theirs
                and not is_foreign
                and self.takes(name, theirs)
            ):
                self._parameters[name] = theirs

    def takes(self, name: str, parameter: nn.Parameter | None) -> bool:
        """Tell whether this module shall have a parameter that was put in its base meanwhile.

        Asked when it comes back to a model whose base got other parameters, such as those that
        `load_state_dict(assign=True)` puts there.

        Args:
            name: Of a parameter of the base.
            parameter: What is there.
        """
        del name, parameter
        return True

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Put a parameter here, and in the base if it has one of that name.

        Setting an attribute comes here too, and so does `load_state_dict(assign=True)`.
        """
        super().register_parameter(name, param)
        self._give_back(name)

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401 (torch's signature)
        """Set an attribute; that there is a method keeps `fully_shard` from writing to a table instead."""
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's signature)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Parameters may have become new objects (from or to the meta device).
        for name in self._parameters:
            self._give_back(name)
        return self

    def _give_back(self, name: str) -> None:
        """Let the base have the parameter that stands here under a name of the base's."""
        theirs = self.overlay_base._parameters  # noqa: SLF001 (torch's registry)
        if name in theirs and theirs[name] is not self._parameters[name]:
            # Not past the base, which may stand for another module in turn.
            self.overlay_base.register_parameter(name, self._parameters[name])

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        # The class is made at run time, so copies and pickles make it again.
        state = self.__getstate__()  # type: ignore[no-untyped-call]
        return _blank, (self.overlay_kind, self.overlay_base), state


def make_overlay(
    base: nn.Module,
    kind: type[OverlayT],
    *,
    parameters: Mapping[str, nn.Parameter],
    attributes: Mapping[str, Any],
) -> OverlayT:
    """Return a module that stands for another; that one is not changed.

    Args:
        base: The module.
        kind: A subclass of `Overlay`, from which and from the base's class the new one's is made.
        parameters: What is added, by name.
        attributes: What else `kind` needs, set as it is: modules among it are no children.

    Returns:
        The replacement, in the base's mode. Those of one `kind` and base class have one class.

    Raises:
        ContractError: The base is of this `kind` already, has something of the name of a parameter,
            or has a patched forward, which would be called in place of the replacement's.

    Example:
        >>> class Louder(Overlay):
        ...     overlay_prefix = "Louder"
        ...
        ...     def forward(self, x):
        ...         return self.gain * super().forward(x)
        >>> base, gain = nn.Linear(2, 3), nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        >>> new = make_overlay(base, Louder, parameters={"gain": gain}, attributes={})
        >>> type(new).__name__, isinstance(new, nn.Linear), new.weight is base.weight
        ('LouderLinear', True, True)
        >>> list(new.state_dict()), list(base.state_dict())
        (['weight', 'bias', 'gain'], ['weight', 'bias'])
    """
    for expected, actual, fix in _problems(base, kind, parameters):
        msg = (
            f"{kind.__name__} cannot stand for {type(base).__name__}: expected {expected}, got "
            f"{actual}. {fix}."
        )
        raise ContractError(msg, fqn="", expected=expected, actual=actual)
    new = _blank(kind, base)
    # Not __init__: the replacement takes over the state of the base, tables shared, and makes none.
    vars(new).update(vars(base))
    vars(new).update(attributes)
    vars(new).update(
        overlay_base=base,
        _parameters={**base._parameters, **parameters},  # noqa: SLF001 (torch's registry; a table of its own keeps the base's free of ours)
    )
    # Of the base, which would be called in place of the replacement.
    vars(new).pop("_compiled_call_impl", None)
    dispatch_again(new)
    return new


def replacement_device(base: nn.Module) -> torch.device | None:
    """Return where a module's replacement has to put the tensors that it adds.

    That is where accelerate lets the module compute, else where its tensors are: packed quantised
    layers have buffers only.

    Args:
        base: The module; those inside it count too.

    Returns:
        None if it has no tensors.

    Example:
        >>> replacement_device(nn.Linear(2, 3)), replacement_device(nn.Tanh())
        (device(type='cpu'), None)
    """
    device = execution_device(base)
    if device is not None:
        return device
    return next((found.device for found in chain(base.parameters(), base.buffers())), None)


def _problems(
    base: nn.Module, kind: type[Overlay], names: Mapping[str, object]
) -> Iterator[tuple[str, str, str]]:
    """Yield what was expected, what there is, and what to do."""
    if isinstance(base, kind):
        yield f"a module that is no {kind.__name__} yet", "one that is", "Revert it first"
    taken = [name for name in names if hasattr(base, name)]
    if taken:
        yield f"a module without {listed(taken)}", "one that has them", "Use other names"
    if "forward" in vars(base) and not is_dispatched(base):
        yield (
            "its class's own forward",
            "a patched one, which would be called in place of the replacement's",
            "Remove what patched it",
        )


def _blank(kind: type[OverlayT], base: nn.Module) -> OverlayT:
    # Given the object, since its class may be made at run time too.
    cls = _class(kind, type(base))  # type: ignore[arg-type]  # mypy takes the instances' __hash__ for the class's
    return cls.__new__(cls)  # type: ignore[return-value]  # of `kind`, which the cache does not say


@cache
def _class(kind: type[Overlay], base: type[nn.Module]) -> type[Overlay]:
    """Return the one class for overlays of a kind and a base class: torch.compile guards on it."""
    own = {"__module__": kind.__module__, "overlay_kind": kind}
    return type(f"{kind.overlay_prefix}{base.__name__}", (kind, base), own)
