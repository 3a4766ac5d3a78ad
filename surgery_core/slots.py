"""Where a module lives: every place that holds an object, the root and aliases included."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn

from surgery_core.errors import ContractError, DriftError, listed


class SlotKind(Enum):
    """How a slot's container holds the module; a graph is held as a module is."""

    ROOT = "root"
    CHILD = "child"
    ATTRIBUTE = "attribute"
    ITEM = "item"
    GRAPH = "graph"


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """One place that holds a module: a registered child, a plain attribute, or a list or dict item.

    The place is looked up again at each access, so a container that rebuilds its dictionary of
    children (as `nn.ModuleList.insert` does) does not leave a slot writing into a dead one.

    Args:
        container: Module that owns the place; for the root, the `RootCell`.
        kind: How the container holds it.
        key: Child name, attribute name, list index or dictionary key.
        fqn: Dotted path of the place from the root; `""` is the root.
        attribute: For `SlotKind.ITEM`, the attribute that is the list or dictionary.
    """

    container: "nn.Module | RootCell"
    kind: SlotKind
    key: str | int
    fqn: str
    attribute: str = ""

    def get(self) -> object:
        """Return what the slot holds now; None when the place is gone."""
        if self.kind is SlotKind.CHILD:
            return self.container._modules.get(self.key)  # type: ignore[union-attr,arg-type]  # noqa: SLF001 (torch's own registry; getattr would follow __getattr__)
        if self.kind is SlotKind.GRAPH:
            return self.container.graph  # type: ignore[union-attr]
        holder = self._holder()
        try:
            return holder[self.key]
        except (LookupError, TypeError):
            return None

    def put(self, module: object) -> None:
        """Make the slot hold `module`; only `surgery_core.transaction` calls this.

        A child's place that holds None is taken away.
        """
        if self.kind is SlotKind.CHILD and module is None:
            self.container._modules.pop(self.key, None)  # type: ignore[union-attr,arg-type]  # noqa: SLF001 (same)
        elif self.kind is SlotKind.GRAPH:
            # Compiles the graph's code anew.
            self.container.graph = module  # type: ignore[union-attr]
        elif self.kind is SlotKind.CHILD:
            self.container._modules[self.key] = module  # type: ignore[union-attr,index,assignment]  # noqa: SLF001 (keeps the order of children; setattr runs user code)
        else:
            self._holder()[self.key] = module

    def _holder(self) -> Any:  # noqa: ANN401 (a list or a dict, by kind)
        if isinstance(self.container, RootCell):
            return self.container.cell
        if self.kind is SlotKind.ATTRIBUTE:
            return vars(self.container)
        return vars(self.container).get(self.attribute)


class RootCell:
    """Holds the root module, so that the root is a slot like any other."""

    def __init__(self, root: nn.Module) -> None:
        self.cell = [root]

    @property
    def module(self) -> nn.Module:
        """The root module as it is now."""
        return self.cell[0]


def registered(
    root: nn.Module, *, originals: Mapping[int, nn.Module] | None = None
) -> list[nn.Module]:
    """Return every registered module under a root, again for each place that holds it.

    Args:
        root: The module to begin with.
        originals: See `SlotIndex`.
    """
    shown = originals or {}
    found = [root]
    # The list grows while it is gone through.
    for place, module in enumerate(found):
        if id(module) in shown:
            module = found[place] = shown[id(module)]  # noqa: PLW2901 (looks through it)
        for child in module._modules.values():  # noqa: SLF001 (torch's registry)
            if child is not None:
                found.append(child)  # noqa: PERF401 (faster than a list for each module)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A module and every slot that holds it.

    Args:
        fqn: First FQN in the order of `named_modules()`.
        module: The module there.
        slots: Every place that holds it; writing to all of them replaces it everywhere.
        fqns: Every FQN by which it is reached, `fqn` first.
    """

    fqn: str
    module: nn.Module
    slots: tuple[Slot, ...]
    fqns: tuple[str, ...]


class SlotIndex:
    """Every module under a root, by FQN, and every slot that holds it, by identity.

    Read-only: building an index or asking it changes nothing.

    Args:
        root: The module to index.
        originals: Modules to look through, by `id`: where the tree holds a key of this mapping,
            the index shows its value instead. A swap state passes the modules it has put in place
            with what they stand for.
    """

    def __init__(
        self, root: nn.Module, *, originals: Mapping[int, nn.Module] | None = None
    ) -> None:
        self.root = RootCell(root)
        self.modules: dict[str, nn.Module] = {}
        self._originals = originals or {}
        self._slots: dict[int, list[Slot]] = {}
        self._fixed: dict[int, str] = {}
        self._fqns: dict[int, list[str]] = {}
        self._walk(root, "", Slot(self.root, SlotKind.ROOT, 0, ""), ancestors=())
        self._add_unregistered()

    def site(self, fqn: str) -> Site:
        """Return the module at `fqn` with all its slots and aliases.

        Raises:
            KeyError: No module is reached by `fqn`.
            ContractError: A tuple holds the module too, so it cannot be replaced everywhere.
        """
        module = self.modules[fqn]
        if id(module) in self._fixed:
            place = self._fixed[id(module)]
            msg = (
                f"Module at {fqn!r} cannot be replaced everywhere: expected places that can be "
                f"written to, got the tuple {place!r}, which holds it too. Make it a list."
            )
            raise ContractError(msg, fqn=fqn, expected="a list", actual="a tuple")
        fqns = self._fqns[id(module)]
        return Site(
            fqn=fqns[0], module=module, slots=tuple(self._slots[id(module)]), fqns=tuple(fqns)
        )

    def _walk(self, found: nn.Module, fqn: str, slot: Slot, ancestors: tuple[int, ...]) -> None:
        module = self._originals.get(id(found), found)
        if id(module) in ancestors:
            msg = (
                f"Module tree has a cycle at {fqn!r}: expected a tree, got a module that "
                "contains itself. Break the cycle before planning."
            )
            raise ContractError(msg, fqn=fqn, expected="a tree", actual="a cycle")
        self.modules[fqn] = module
        first_visit = id(module) not in self._fqns
        self._fqns.setdefault(id(module), []).append(fqn)
        slots = self._slots.setdefault(id(module), [])
        # A container reached by two FQNs offers each of its places once.
        if not any(known.container is slot.container and known.key == slot.key for known in slots):
            slots.append(slot)
        if not first_visit and not module._modules:  # noqa: SLF001 (see Slot.get)
            return
        for name, child in module._modules.items():  # noqa: SLF001 (named_children dedupes)
            if child is not None:
                child_fqn = f"{fqn}.{name}" if fqn else name
                child_slot = Slot(module, SlotKind.CHILD, name, child_fqn)
                self._walk(child, child_fqn, child_slot, (*ancestors, id(module)))

    def _add_unregistered(self) -> None:
        """Add plain attributes, list items and dict values that hold an indexed module."""
        for owner_id, fqns in list(self._fqns.items()):
            owner = self.modules[fqns[0]]
            for name, value in vars(owner).items():
                if name in _TORCH_STATE:
                    continue
                if isinstance(value, tuple):
                    place = f"{fqns[0]}.{name}" if fqns[0] else name
                    self._fixed.update(
                        {id(item): place for item in value if id(item) in self._slots}
                    )
                for slot, held in _held(owner, fqns[0], name, value):
                    if id(held) in self._slots and id(held) != owner_id:
                        self._slots[id(held)].append(slot)


_TORCH_STATE = frozenset(vars(nn.Module()))
"""Names of the attributes every `nn.Module` keeps for itself."""


def _held(owner: nn.Module, fqn: str, name: str, value: object) -> Iterator[tuple[Slot, nn.Module]]:
    prefix = f"{fqn}.{name}" if fqn else name
    if isinstance(value, nn.Module):
        yield Slot(owner, SlotKind.ATTRIBUTE, name, prefix), value
    elif isinstance(value, list | dict):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in pairs:
            if isinstance(item, nn.Module):
                yield Slot(owner, SlotKind.ITEM, key, f"{prefix}[{key!r}]", name), item


def check_holds(expected: Iterable[tuple[Slot, object]], *, subject: str, fix: str) -> None:
    """Check that every slot holds the module, or the graph, expected of it.

    Args:
        expected: Slots, and what each must hold.
        subject: How the error names what drifted.
        fix: What the error tells the user to do.

    Raises:
        DriftError: One or more do not; all are named, nothing was changed.
    """
    drifted = [(slot, module) for slot, module in expected if slot.get() is not module]
    if drifted:
        first, module = drifted[0]
        msg = (
            f"{subject} drifted at {listed(sorted(slot.fqn for slot, _ in drifted))}: expected the "
            f"{type(module).__name__} put there, got another {type(first.get()).__name__}. {fix}"
        )
        raise DriftError(msg, fqns=[slot.fqn for slot, _ in drifted])
