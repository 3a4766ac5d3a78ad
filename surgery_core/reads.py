"""Find code that reads the parameters of a module instead of calling the module."""

import dis
import inspect
from collections.abc import Collection, Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_ABOUT = frozenset({"dtype", "device", "shape", "size", "ndim", "dim", "is_meta", "requires_grad"})
"""What code may ask of a parameter without computing with it."""

_TESTS = frozenset({"isinstance", "hasattr", "getattr", "type", "id"})

_LOADS = frozenset({"LOAD_ATTR", "LOAD_METHOD"})


def reads_parameters(owner: type[nn.Module], name: str, parameters: Collection[str]) -> bool:
    """Tell whether the forward of a class computes with parameters of a child, as `self.name.weight`.

    What is added to such a child is passed over, also if other code calls it. The forward, the methods
    and the functions of the same file that it uses are looked at, and not run.

    Args:
        owner: The class of the module that holds the child.
        name: Attribute under which the child is held.
        parameters: Names of the child's parameters.

    Example:
        >>> class Reader(nn.Module):
        ...     def forward(self, x):
        ...         return x @ self.inner.weight.T
        >>> reads_parameters(Reader, "inner", ["weight"])
        True
    """
    found = _reads_of(owner)  # type: ignore[arg-type]  # mypy takes the instances' __hash__ for the class's
    return any((name, parameter) in found for parameter in parameters)


@cache
def _reads_of(owner: type[nn.Module]) -> frozenset[tuple[str, str]]:
    """Return pairs of attributes that are read one from the other, and computed with."""
    found: set[tuple[str, str]] = set()
    seen: set[FunctionType] = set()
    waiting = _methods(owner, "forward")
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        for code in _codes(function.__code__):
            loaded = list(dis.get_instructions(code))
            found.update(_pairs(loaded))
            for each in loaded:
                if each.opname in (*_LOADS, "LOAD_SUPER_ATTR"):
                    waiting += _methods(owner, each.argval)
                elif each.opname == "LOAD_GLOBAL":
                    waiting += _functions(function.__globals__.get(each.argval), owner)
        for cell in function.__closure__ or ():
            # A decorator's wrapper has what it wraps here, or in `__wrapped__`.
            waiting += _functions(_content(cell), owner)
    return frozenset(found)


def _pairs(loaded: list[dis.Instruction]) -> Iterator[tuple[str, str]]:
    """Yield `(a, b)` where code loads `x.a.b`, or `x.a` by a local name and `b` from that."""
    local: dict[str, str] = {}
    for place, each in enumerate(loaded[:-1]):
        after = loaded[place + 1]
        if each.opname in _LOADS and after.opname == "STORE_FAST":
            local[after.argval] = each.argval
        is_local = each.opname == "LOAD_FAST" and each.argval in local
        if not (each.opname in _LOADS or is_local) or after.opname not in _LOADS:
            continue
        if not (_is_about(loaded, place + 2) or _is_tested(loaded, place - (not is_local) - 1)):
            yield local[each.argval] if is_local else each.argval, after.argval


def _is_about(loaded: list[dis.Instruction], place: int) -> bool:
    """Tell whether what was loaded is asked for its dtype and the like, or compared to None."""
    while place < len(loaded) and loaded[place].argval == "data":
        place += 1
    if place >= len(loaded):
        return False
    each = loaded[place]
    is_none = each.opname == "LOAD_CONST" and each.argval is None
    return (each.opname in _LOADS and each.argval in _ABOUT) or is_none or "NONE" in each.opname


def _is_tested(loaded: list[dis.Instruction], place: int) -> bool:
    """Tell whether a function that only looks was loaded before the object."""
    return place >= 0 and loaded[place].opname == "LOAD_GLOBAL" and loaded[place].argval in _TESTS


def _methods(owner: type[nn.Module], name: str) -> list[FunctionType]:
    """Return what the class and its bases have under a name, as functions."""
    bases = owner.__mro__[: owner.__mro__.index(nn.Module)]
    return [
        function for base in bases for function in _functions(vars(base).get(name), None) if name
    ]


def _functions(value: Any, owner: type[nn.Module] | None) -> list[FunctionType]:  # noqa: ANN401 (whatever stands there)
    """Return the function that a value is or wraps; of an owner's file alone, if one is given."""
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    if not callable(value) or isinstance(value, type):
        return []
    inner = inspect.unwrap(value)
    found = [one for one in (value, inner) if isinstance(one, FunctionType)]
    is_here = owner is None or getattr(inner, "__module__", None) == owner.__module__
    return found if is_here else []


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _codes(each)


def _content(cell: Any) -> object:  # noqa: ANN401 (a cell has no public type)
    try:
        return cell.cell_contents
    except ValueError:
        return None
