"""What a surgery must put back: everything about a model that one may look at, taken down."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from surgery_core.carry import HOOK_TABLES
from surgery_core.errors import listed

Pairs = tuple[tuple[str, object], ...]
"""Facts about a model by name, in the order in which the model shows them."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorValue:
    """A copy of a tensor that is equal to another one when dtype, shape and every value are.

    Args:
        tensor: Detached, of its own memory.
    """

    tensor: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorValue) and same_tensor(self.tensor, other.tensor)

    def __hash__(self) -> int:
        return hash((self.tensor.dtype, self.tensor.shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What a surgery must put back: two snapshots are equal when nothing of it differs.

    Args:
        modules: Module at every FQN, aliases included, by identity.
        attributes: Every attribute in `vars()` of every module, with the modules it holds.
        tensors: Every parameter and buffer by identity, and its `requires_grad`.
        state: The state dict: keys, order and values.
        modes: `training` of every module.
        hooks: Hooks in every table of every module, by their ids, in order.
        kept: The objects that the identities are of, so that none is reused.
    """

    modules: Pairs
    attributes: Pairs
    tensors: Pairs
    state: Pairs
    modes: Pairs
    hooks: Pairs
    kept: tuple[object, ...] = field(compare=False, repr=False)

    def differences(self, later: "Snapshot") -> list[str]:
        """Say what is not as it was, one line for each fact; empty when the two are equal."""
        found = []
        for kind in (item.name for item in fields(self) if item.compare):
            old, new = dict(getattr(self, kind)), dict(getattr(later, kind))
            found += [f"{kind}: {name} is gone" for name in old.keys() - new.keys()]
            found += [f"{kind}: {name} is new" for name in new.keys() - old.keys()]
            found += [
                f"{kind}: {name} differs" for name in old.keys() & new if old[name] != new[name]
            ]
            if not found and getattr(self, kind) != getattr(later, kind):
                found.append(f"{kind}: order differs")
        return sorted(found)

    def outside(self, fqns: Iterable[str]) -> "Snapshot":
        """Return what the snapshot says of everything that is not at or below one of the FQNs."""
        inside = tuple(fqns)

        def kept(pairs: Pairs) -> Pairs:
            return tuple(pair for pair in pairs if not is_below(pair[0], inside))

        facts = {item.name: kept(getattr(self, item.name)) for item in fields(self) if item.compare}
        return Snapshot(**facts, kept=self.kept)


def snapshot(model: nn.Module, *, values: bool = True) -> Snapshot:
    """Take down everything about a model that a surgery must put back.

    Args:
        model: The model.
        values: Copy every value; otherwise note where they are and how often they were written to,
            which takes no memory.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> before = snapshot(model)
        >>> model.scale = 3.0
        >>> before.differences(snapshot(model))
        ['attributes: :scale is new']
    """
    named = list(model.named_modules(remove_duplicate=False))
    # What accelerate has offloaded comes and goes as other objects.
    passing = {
        id(tensor)
        for _, module in named
        if "_hf_hook" in vars(module)
        for table in (module._parameters, module._buffers)  # noqa: SLF001 (torch's registries)
        for tensor in table.values()
        if tensor is not None and tensor.is_meta
    }
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    lasting = {id(tensor) for _, tensor in tensors} - passing
    attributes = [
        # Children are told apart by `modules`.
        (f"{fqn}:{name}", tuple(id(m) for m in _modules_in(value) if name != "_modules"))
        for fqn, module in named
        for name, value in vars(module).items()
    ]
    return Snapshot(
        modules=tuple((fqn, id(module)) for fqn, module in named),
        # Sorted: an attribute taken away and put back is as good as one left alone.
        attributes=tuple(sorted(attributes)),
        tensors=tuple(
            (fqn, (0 if id(tensor) in passing else id(tensor), tensor.requires_grad))
            for fqn, tensor in tensors
        ),
        state=tuple(
            # State dicts may have tensors that they make anew each time: those are copied.
            (key, frozen(value) if values or id(value) not in lasting else _written(value))
            for key, value in model.state_dict(keep_vars=True).items()
        ),
        modes=tuple((fqn, module.training) for fqn, module in named),
        hooks=tuple(
            (f"{fqn}:{table}", tuple(vars(module)[table]))
            for fqn, module in named
            for table in HOOK_TABLES
        ),
        kept=(*(module for _, module in named), *(tensor for _, tensor in tensors)),
    )


def assert_unchanged(before: Snapshot, model: nn.Module, *, subject: str) -> None:
    """Check that a model is as it was.

    Args:
        before: Taken when it was.
        model: The model now.
        subject: What must not have changed it, for the message.

    Raises:
        AssertionError: It is not; the message names what differs.
    """
    differences = before.differences(snapshot(model))
    assert not differences, f"{subject} changed the model: {listed(differences)}."


def same_tensor(left: Tensor, right: Tensor) -> bool:
    """Return whether dtype, device, shape and every value agree; NaN agrees with NaN."""
    if (left.dtype, left.device, left.shape) != (right.dtype, right.device, right.shape):
        return False
    if left.is_meta or torch.equal(left, right):
        return True
    return torch.allclose(left, right, rtol=0, atol=0, equal_nan=True)


def is_below(name: str, fqns: tuple[str, ...]) -> bool:
    """Return whether the name of a fact is about a module at or below one of the FQNs."""
    place = name.partition(":")[0]
    return any(not fqn or place == fqn or place.startswith(f"{fqn}.") for fqn in fqns)


def frozen(value: Any) -> object:  # noqa: ANN401 (extra state may be anything)
    """Copy an entry of a state dict to something that can be compared."""
    return TensorValue(value.detach().clone()) if isinstance(value, Tensor) else repr(value)


def _written(value: object) -> object:
    """Return where a tensor's values are, and how often PyTorch has counted writes to them."""
    if not isinstance(value, Tensor):
        return repr(value)
    # Tensors made in inference mode count no writes.
    version = None if value.is_inference() else value._version  # noqa: SLF001 (no public name)
    return value.shape, value.dtype, id(value), version


def _modules_in(value: object) -> Iterator[nn.Module]:
    """Yield the modules that a plain attribute holds, directly or in lists, tuples and dicts."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(item)
