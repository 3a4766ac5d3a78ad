"""`Overlay`: a module that is its base in everything but what its own class adds."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from functools import cache
from itertools import chain
from operator import is_
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from surgery_core.errors import ContractError, DriftError, listed
from surgery_core.forwards import dispatch_again, is_dispatched
from surgery_core.preflight import execution_device
from surgery_core.sharded import is_held_together, reshard_

OverlayT = TypeVar("OverlayT", bound="Overlay")


class _Agreed(NamedTuple):
    """What an overlay and its base had in common when one last took over from the other.

    Args:
        parameters: All that the overlay had, by name.
        attributes: Of both.
        sizes: How many attributes of any kind overlay and base had.
    """

    parameters: dict[str, nn.Parameter | None]
    attributes: dict[str, Any]
    sizes: tuple[int, int]


class Overlay(nn.Module):
    """A module over a base that it leaves as it is; abstract.

    Never built directly: `make_overlay` gives an object of a class that derives from a subclass of
    this one and from the base's class (as PyTorch's `fully_shard` does), so that whatever looks for
    the base's class or its attributes finds them. The object shares the base's parameters, children,
    and the tables of its buffers and hooks. A subclass says what it computes in `forward`, where
    `super().forward` is the base's.

    Invariant: parameters and attributes that are not added are the base's. A parameter put here
    under a name of the base's is the base's at once. Any other change (what pruning and weight norm
    do, tables that are written to) is the base's when this module leaves the model (`hand_down`);
    what changed in the base is here when this module comes back (`take_over`). A base may be an
    overlay of another class in turn.
    """

    overlay_prefix: ClassVar[str]
    """What the names of the classes begin with; the base class's follows."""

    overlay_kind: ClassVar[type["Overlay"]]
    """Of the outermost of a stack, whose object runs the forwards of those under it too."""

    overlay_base: nn.Module

    overlay_added: AbstractSet[str]
    """Names of the parameters that it adds to its base's."""

    overlay_fields: AbstractSet[str]
    """Names of the attributes that are its own, or those of an overlay under it."""

    overlay_agreed: _Agreed

    def stand_over(self, base: nn.Module, *, added: Iterable[str], fields: Iterable[str]) -> None:
        """Note what is this module's own, and that the rest is as its base has it; `make_overlay` does.

        Args:
            base: The module.
            added: Names of the parameters that are not the base's.
            fields: Names of the attributes that are not.
        """
        own = {*fields, *Overlay.__annotations__}
        vars(self).update(
            overlay_base=base,
            overlay_added=frozenset(added),
            overlay_fields=own | (base.overlay_fields if isinstance(base, Overlay) else set()),
        )
        self._agree()

    def overlay_stack(self) -> Iterator[nn.Module]:
        """Yield this module, its base, that one's if it is an overlay too, and so on."""
        found: nn.Module = self
        while isinstance(found, Overlay):
            yield found
            found = found.overlay_base
        yield found

    def is_changed(self) -> bool:
        """Tell whether something was changed here since this module and its base last agreed.

        Attributes that both had do not count: the base got them when they were set.
        """
        known, base = self.overlay_agreed, self.overlay_base
        return (
            len(vars(self)) != known.sizes[0]
            or known.parameters.keys() != self._parameters.keys()
            or not _have(known.parameters, self._parameters)
            or (isinstance(base, Overlay) and base.is_changed())
        )

    def hand_down(self) -> None:
        """Change in the base what was changed here since the two last agreed, added parameters aside."""
        known, base, now = self.overlay_agreed, self.overlay_base, vars(self)
        # In their order, which is that of the state dict.
        tables = dict.fromkeys((*known.parameters, *self._parameters))
        names = [name for name in tables if name not in self.overlay_added]
        _copy_changes(names, known.parameters, self._parameters, base._parameters)  # noqa: SLF001 (torch's registry)
        names = [*dict.fromkeys((*known.attributes, *filter(self._is_shared, now)))]
        _copy_changes(names, known.attributes, now, vars(base))
        if isinstance(base, Overlay):
            base.hand_down()
        self._agree()

    def is_up_to_date(self) -> bool:
        """Tell whether the base has changed nothing since the two last agreed."""
        known, base, here = self.overlay_agreed, self.overlay_base, self._parameters
        theirs, table = vars(base), base._parameters  # noqa: SLF001 (torch's registry)
        return (
            len(here) == len(table) + len(self.overlay_added)
            and len(theirs) == known.sizes[1]
            and _have(table, here)
            and _have(known.attributes, theirs)
            and (not isinstance(base, Overlay) or base.is_up_to_date())
        )

    def take_over(self) -> None:
        """Have the parameters and attributes that the base has now, as far as `takes` says.

        None that were sharded since, which are gathered for the module that was there then.
        """
        base, here = self.overlay_base, self._parameters
        if isinstance(base, Overlay):
            base.take_over()
        found = {
            name: here[name] if name in here and not self._takes(name, theirs) else theirs
            for name, theirs in base._parameters.items()  # noqa: SLF001 (torch's registry)
        }
        found |= {name: own for name, own in here.items() if name in self.overlay_added}
        here.clear()
        here.update(found)
        known, theirs = self.overlay_agreed.attributes, vars(base)
        names = [*dict.fromkeys((*known, *filter(self._is_shared, theirs)))]
        _copy_changes(names, known, theirs, vars(self))
        self._agree()

    def overlay_problem(self) -> str | None:
        """Tell why its base cannot have what was changed here; None if it can."""
        gone = sorted(self.overlay_added - self._parameters.keys())
        if gone:
            return f"{listed(gone)} is no longer a parameter"
        cls, base = type(self), type(self.overlay_base)
        parametrised: Any = self._modules.get("parametrizations") or ()
        changed = [
            name
            for name in parametrised
            # PyTorch makes it a property of the class, which only this module has.
            if isinstance(getattr(cls, name, None), property)
            is not isinstance(getattr(base, name, None), property)
        ]
        return f"{listed(changed)} was parametrised" if changed else None

    def _takes(self, name: str, theirs: nn.Parameter | None) -> bool:
        is_foreign = theirs is not None and is_held_together(theirs)
        return not is_foreign and self.takes(name, theirs)

    def _is_shared(self, name: str) -> bool:
        """Tell whether an attribute of this name is the base's too; PyTorch's own have private names."""
        return (
            not name.startswith("_")
            and name != "training"
            and name not in self.overlay_fields
            # A class may have defaults for attributes of its own.
            and not hasattr(self.overlay_kind, name)
        )

    def _agree(self) -> None:
        base, now = self.overlay_base, vars(self)
        # Counted below, the first time too.
        now.setdefault("overlay_agreed")
        attributes = {name: value for name, value in now.items() if self._is_shared(name)}
        now["overlay_agreed"] = _Agreed(
            dict(self._parameters), attributes, (len(now), len(vars(base)))
        )

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
        """Set an attribute here, and in the base if both have it.

        That there is a method also keeps `fully_shard` from writing to a table instead.
        """
        super().__setattr__(name, value)
        known = vars(self).get("overlay_agreed")
        if known is not None and name in known.attributes and name in vars(self):
            setattr(self.overlay_base, name, value)
            known.attributes[name] = value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's signature)
        before = dict(self._parameters)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Parameters may have become new objects (from or to the meta device).
        for name, parameter in self._parameters.items():
            if parameter is not before[name]:
                self._give_back(name)
        return self

    def _give_back(self, name: str) -> None:
        """Let the base have the parameter that stands here under a name of the base's."""
        theirs = self.overlay_base._parameters  # noqa: SLF001 (torch's registry)
        if name in theirs and theirs[name] is not self._parameters[name]:
            # Not past the base, which may stand for another module in turn.
            self.overlay_base.register_parameter(name, self._parameters[name])
            self.overlay_agreed.parameters[name] = self._parameters[name]

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        # The class is made at run time, so copies and pickles make it again. What both agreed on is
        # left out: a base's class may leave some of it behind.
        if self.overlay_problem() is None:
            self.hand_down()
        state = {**self.__getstate__()}  # type: ignore[no-untyped-call]
        state.pop("overlay_agreed", None)
        return _blank, (self.overlay_kind, self.overlay_base), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._agree()


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
    table = {**base._parameters, **parameters}  # noqa: SLF001 (torch's registry; a table of its own keeps the base's free of ours)
    vars(new).update(_parameters=table)
    # Of the base, which would be called in place of the replacement.
    vars(new).pop("_compiled_call_impl", None)
    dispatch_again(new)
    new.stand_over(base, added=parameters, fields=attributes)
    return new


def hand_down(modules: Iterable[tuple[str, nn.Module]], *, subject: str) -> None:
    """Let the bases of overlays have what was changed in those, all of them or none.

    Args:
        modules: In the model, each with the FQN of its place. The others pass.
        subject: How an error begins, for example `Model under surgery`.

    Raises:
        DriftError: A base cannot have it; all are named.
    """
    changed = [pair for pair in modules if isinstance(pair[1], Overlay) and pair[1].is_changed()]
    _check(changed, subject)
    for _, module in changed:
        module.hand_down()  # type: ignore[operator]


def take_over(modules: Iterable[tuple[str, nn.Module]], *, model: nn.Module, subject: str) -> None:
    """Let overlays have what was changed in their bases, all of them or none.

    Args:
        modules: To be put in the model, each with the FQN of its place. The others pass.
        model: Theirs.
        subject: How an error begins.

    Raises:
        DriftError: An overlay has lost a parameter of its own; all are named.
    """
    stale = [
        pair for pair in modules if isinstance(pair[1], Overlay) and not pair[1].is_up_to_date()
    ]
    _check(stale, subject)
    if stale:
        reshard_(model)  # so that nothing is taken over that was gathered for one pass
    for _, module in stale:
        module.take_over()  # type: ignore[operator]


def _check(overlays: Iterable[tuple[str, nn.Module]], subject: str) -> None:
    problems = {
        fqn: problem
        for fqn, module in overlays
        if isinstance(module, Overlay) and (problem := module.overlay_problem()) is not None
    }
    if problems:
        msg = (
            f"{subject} drifted at {listed(sorted(problems))}: {'; '.join(sorted(set(problems.values())))}, "
            "which the original module cannot take over. Undo that first, for example with "
            "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations."
        )
        raise DriftError(msg, fqns=sorted(problems))


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


def _have(known: Mapping[str, object], now: Mapping[str, object]) -> bool:
    """Tell whether a table has the very objects that are known, under the same names."""
    # No loop of Python's: asked of every module in every switch.
    return all(map(is_, map(now.get, known), known.values()))


def _copy_changes(
    names: Iterable[str],
    known: Mapping[str, Any],
    source: Mapping[str, Any],
    target: dict[str, Any],
) -> None:
    """Let a table have what another got under some names, or lost, since it was as it is known."""
    for name in names:
        now = source.get(name, _GONE)
        if now is known.get(name, _GONE):
            continue
        if now is _GONE:
            target.pop(name, None)
        else:
            target[name] = now


_GONE = object()


def _blank(kind: type[OverlayT], base: nn.Module) -> OverlayT:
    # Given the object, since its class may be made at run time too.
    cls = _class(kind, type(base))  # type: ignore[arg-type]  # mypy takes the instances' __hash__ for the class's
    return cls.__new__(cls)  # type: ignore[return-value]  # of `kind`, which the cache does not say


@cache
def _class(kind: type[Overlay], base: type[nn.Module]) -> type[Overlay]:
    """Return the one class for overlays of a kind and a base class: torch.compile guards on it."""
    own = {"__module__": kind.__module__, "overlay_kind": kind}
    return type(f"{kind.overlay_prefix}{base.__name__}", (kind, base), own)
