"""The only writer: every change to a model goes through a transaction that can take it back."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from surgery_core.sharded import is_held_together
from surgery_core.slots import Slot, SlotKind, check_holds

OnWrite = Callable[[int, Slot | nn.Parameter], None]
"""Called before each write with its number, from 0, and what is written. An error it raises aborts."""

Move = tuple[Slot, nn.Module, nn.Module]
"""A slot, what it holds, and what it shall hold."""


Places = Sequence[tuple[nn.Module, str]]
"""Modules and names of their parameters."""


class Transaction:
    """A sequence of writes that all happen or none.

    As a context manager it commits on a normal exit and rolls back, in reverse, when the body
    raises. After a commit, `undo` takes everything back in a transaction of its own.

    Args:
        on_write: Told of every write before it happens.
    """

    def __init__(self, *, on_write: OnWrite | None = None) -> None:
        self._on_write = on_write
        self._replaced: list[tuple[Slot, object, object]] = []
        self._flagged: list[tuple[nn.Parameter, bool, Places]] = []
        self._noted: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._count = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_on_write": None}

    def replace(self, slot: Slot, old: object, new: object) -> None:
        """Put `new` where `old` is; both are modules, or graphs, or None where there is nothing.

        The caller has checked with `check_holds` that `old` is there.
        """
        self._announce(slot)
        self._replaced.append((slot, old, new))
        slot.put(new)

    def replace_all(self, moves: Iterable[Move]) -> None:
        """Do `replace` for each of `(slot, old, new)`, faster."""
        if self._on_write is not None:
            for slot, old, new in moves:
                self.replace(slot, old, new)
            return
        replaced = self._replaced
        for move in moves:
            replaced.append(move)
            slot = move[0]
            # What `Slot.put` does, without a call for each: switching is done for every request.
            if slot.kind is SlotKind.CHILD:
                slot.container._modules[slot.key] = move[2]  # type: ignore[union-attr,index]  # noqa: SLF001 (torch's registry)
            else:
                slot.put(move[2])

    def note(self, table: dict[Any, Any], values: Mapping[Any, object]) -> None:
        """Write to a table of what is known of the model, so that both are taken back together.

        Args:
            table: Any dictionary.
            values: What to put in it; `GONE` takes a key out.
        """
        self._noted.append((table, {key: table.get(key, GONE) for key in values}))
        _put_all(table, values)

    def set_requires_grad(
        self, parameter: nn.Parameter, *, value: bool, places: Places = ()
    ) -> None:
        """Set whether a parameter is trained, remembering what it was.

        Args:
            parameter: The parameter.
            value: The new `requires_grad` flag.
            places: Where it is; see `parameter_places`.
        """
        if parameter.requires_grad is value:
            return
        self._announce(parameter)
        self._flagged.append((parameter, value, places))
        _set_requires_grad(parameter, places, value=value)

    @property
    def replaced(self) -> tuple[tuple[Slot, object, object], ...]:
        """`(slot, old, new)` of every replacement, in order."""
        return tuple(self._replaced)

    @property
    def flagged(self) -> tuple[nn.Parameter, ...]:
        """Parameters whose trainable flag was changed, in order."""
        return tuple(parameter for parameter, _, _ in self._flagged)

    def rollback(self) -> None:
        """Take back every write, last first."""
        while self._noted:
            _put_all(*self._noted.pop())
        while self._replaced:
            slot, old, _ = self._replaced.pop()
            slot.put(old)
        while self._flagged:
            parameter, value, places = self._flagged.pop()
            _set_requires_grad(parameter, places, value=not value)

    def undo(self, *, subject: str, fix: str, on_write: OnWrite | None = None) -> None:
        """Take back a committed transaction, all or nothing.

        Args:
            subject: How a drift error names what is undone.
            fix: What the error tells the user to do.
            on_write: As for the transaction itself.

        Raises:
            DriftError: A slot no longer holds what this transaction put there; nothing was changed.
        """
        # A slot written twice must hold what was written last.
        last = {slot: new for slot, _, new in self._replaced}
        check_holds(last.items(), subject=subject, fix=fix)
        with Transaction(on_write=on_write) as reverse:
            for slot, old, new in reversed(self._replaced):
                reverse.replace(slot, new, old)
            for parameter, value, places in reversed(self._flagged):
                reverse.set_requires_grad(parameter, value=not value, places=places)

    def redo(self, *, on_write: OnWrite | None = None) -> None:
        """Do again what `undo` took back, all or nothing.

        Args:
            on_write: As for the transaction itself.
        """
        with Transaction(on_write=on_write) as again:
            for slot, old, new in self._replaced:
                again.replace(slot, old, new)
            for parameter, value, places in self._flagged:
                again.set_requires_grad(parameter, value=value, places=places)

    def _announce(self, target: Slot | nn.Parameter) -> None:
        if self._on_write is not None:
            self._on_write(self._count, target)
        self._count += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.rollback()


GONE = object()
"""In `Transaction.note`: nothing."""


def _put_all(table: dict[Any, Any], values: Mapping[Any, object]) -> None:
    for key, value in values.items():
        if value is GONE:
            table.pop(key, None)
        else:
            table[key] = value


def parameter_places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return the modules that have each parameter, by its `id`, and its names there.

    For `Transaction.set_requires_grad`: other parameters may be in these places when it is undone,
    such as those that `load_state_dict(assign=True)` puts there, or accelerate with each call.
    """
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():  # noqa: SLF001 (torch's registry)
            if parameter is not None:
                found.setdefault(id(parameter), []).append((module, name))
    return found


def _set_requires_grad(parameter: nn.Parameter, places: Places, *, value: bool) -> None:
    _flag(parameter, value=value)
    for module, name in places:
        now = module._parameters.get(name)  # noqa: SLF001 (torch's registry)
        if now is not None and now is not parameter and _can_be_trained(now):
            _flag(now, value=value)


def _can_be_trained(parameter: nn.Parameter) -> bool:
    is_number = parameter.is_floating_point() or parameter.is_complex()
    # What was sharded since is another object in each pass, with a flag of its own.
    return is_number and not parameter.is_inference() and not is_held_together(parameter)


def _flag(parameter: nn.Parameter, *, value: bool) -> None:
    # Parameters made in inference mode can be made trainable in it alone.
    with torch.inference_mode() if parameter.is_inference() else nullcontext():
        parameter.requires_grad_(value)
