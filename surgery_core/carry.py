"""What a replacement takes over from the module it replaces, and hands back when it leaves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from surgery_core.errors import ContractError, listed
from surgery_core.preflight import execution_device

HOOK_TABLES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Tables in which `nn.Module` (torch 2.8 to 2.14) keeps hooks and their options."""


Owners = Callable[[], Mapping[int, Sequence[str]]]
"""Looks up the FQNs of every tensor in a model, by `id`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CarryOver:
    """How the state of a replaced module went over to its replacement.

    Args:
        fqn: Where.
        hooks: `"none"`, `"shared"` (both modules use the same tables, so handles keep working),
            `"kept"` (they stay on the original, which the replacement calls), or `"merged"` (copied
            in front of hooks the replacement brought; handles reach the original only). A hook
            registered on a replacement whose hooks are not shared goes to the original at revert,
            where its handle no longer reaches it.
        training: Mode given to the replacement's own modules.
        devices: Devices of the tensors added, sorted names.
        dtypes: Dtypes of the tensors added, sorted names.
        num_trainable: How many of the values added have `requires_grad`.
        attributes_dropped: Plain attributes of the original that the replacement has not, sorted;
            what reads them finds them again after revert.
        ties_broken: FQNs elsewhere in the model of tensors that were shared with the replaced
            module and are not part of the replacement.
    """

    fqn: str
    hooks: str
    training: bool
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    num_trainable: int
    attributes_dropped: tuple[str, ...]
    ties_broken: tuple[str, ...]

    def render(self) -> str:
        """Write it on one line."""
        parts = [
            f"hooks {self.hooks}",
            "train" if self.training else "eval",
            f"{self.num_trainable:,} trainable",
            f"{'/'.join(self.dtypes) or 'nothing'} on {'/'.join(self.devices) or 'no device'}",
        ]
        if self.attributes_dropped:
            parts.append(f"dropped attributes {listed(self.attributes_dropped)}")
        if self.ties_broken:
            parts.append(f"broke ties with {listed(self.ties_broken)}")
        return f"{self.fqn or '(root)'}: {', '.join(parts)}"


def carry_over(old: nn.Module, new: nn.Module, *, fqns: Sequence[str], owners: Owners) -> CarryOver:
    """Give `new`, which is not in the model yet, the hooks and the mode of `old`.

    Args:
        old: The module in the model; not changed.
        new: Its replacement; may hold `old`, or modules of it.
        fqns: Every FQN of the place, the one for errors and the report first.
        owners: Asked only if a tensor of `old` is left behind.

    Raises:
        ContractError: A tensor that `new` adds is on another device than `old`.
    """
    fqn = fqns[0]
    # Where both have one table of children, only what they hold themselves can differ.
    is_deep = not shares_children(old, new)
    old_modules = {id(module) for module in old.modules()} if is_deep else {id(old)}
    new_modules = list(new.modules()) if is_deep else [new]
    old_tensors = {id(tensor): tensor for tensor in _tensors(old, is_deep=is_deep)}
    new_tensors = {id(tensor): tensor for tensor in _tensors(new, is_deep=is_deep)}
    added = [tensor for key, tensor in new_tensors.items() if key not in old_tensors]
    left = [key for key in old_tensors if key not in new_tensors]
    devices, strangers = set(), {tensor.device for tensor in added}
    anchor = next(_tensors(old, is_deep=True), None) if added else None
    # Nearly always all tensors are where the first one is.
    if anchor is not None and strangers != {anchor.device}:
        devices = {tensor.device for tensor in _tensors(old, is_deep=True)}
        computes_on = execution_device(old)
        # Weights that come and go are on the meta device meanwhile.
        devices |= {computes_on} if computes_on is not None else set()
    if devices and strangers - devices:
        strangers -= devices
        msg = (
            f"Replacement {type(new).__name__} is on another device at {fqn!r}: expected "
            f"{listed(sorted(map(str, devices)))}, got {listed(sorted(map(str, strangers)))}. "
            "Create its tensors on the device of the module it replaces."
        )
        raise ContractError(msg, fqn=fqn, expected=devices, actual=strangers)
    for module in new_modules:
        if id(module) not in old_modules:
            module.training = old.training
    return CarryOver(
        fqn=fqn,
        hooks="kept" if any(m is old for m in new_modules) else _carry_hooks(old, new),
        training=old.training,
        devices=tuple(sorted({str(tensor.device) for tensor in added})),
        num_trainable=sum(tensor.numel() for tensor in added if tensor.requires_grad),
        attributes_dropped=tuple(
            sorted(
                name
                for name in vars(old).keys() - vars(new).keys()
                # A property answers for it.
                if not any(name in vars(cls) for cls in type(new).__mro__)
            )
        ),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in added})),
        ties_broken=tuple(
            other
            for key in left
            for other in owners().get(key, ())
            if not any(_is_inside(other, place) for place in fqns)
        ),
    )


def hook_ids(module: nn.Module) -> frozenset[int]:
    """Return the ids of every hook on the module itself; torch never reuses one."""
    return frozenset(key for table in HOOK_TABLES for key in vars(module)[table])


def hand_over(
    outgoing: nn.Module, incoming: nn.Module, *, known: frozenset[int] | None = None
) -> None:
    """Give a module that has taken the place of `outgoing` what changed on that one meanwhile.

    That is the mode (`train` or `eval`; for modules that both contain it is the same already) and,
    where the two do not share their tables, hooks registered while `outgoing` was in place.

    Args:
        outgoing: The module that was in the slot.
        incoming: The module that is there now.
        known: Ids of the hooks `outgoing` had when it was put in place; None when the two share
            their tables.
    """
    if incoming.training is not outgoing.training:
        common = {id(module) for module in outgoing.modules()}
        for module in incoming.modules():
            if id(module) not in common:
                module.training = outgoing.training
    if known is not None:
        for table in HOOK_TABLES:
            theirs, ours = vars(outgoing)[table], vars(incoming)[table]
            if theirs is not ours:
                ours.update({key: hook for key, hook in theirs.items() if key not in known})
    # Only with hooks to read: a flag without any would forbid hooks of the other kind later.
    if incoming._backward_hooks and outgoing._is_full_backward_hook is not None:  # noqa: SLF001 (says how torch reads the table)
        incoming._is_full_backward_hook = outgoing._is_full_backward_hook  # noqa: SLF001 (same)


def _carry_hooks(old: nn.Module, new: nn.Module) -> str:
    state, given = vars(new), vars(old)
    if state["_forward_hooks"] is given["_forward_hooks"]:
        return "shared"
    new._is_full_backward_hook = (  # noqa: SLF001 (says how torch reads the table)
        new._is_full_backward_hook or old._is_full_backward_hook  # noqa: SLF001 (same)
    )
    outcome = "shared" if any(given[table] for table in HOOK_TABLES) else "none"
    for table in HOOK_TABLES:
        # A copy of the original brought copies of its hooks, under their ids: they are not its own.
        own = {key: hook for key, hook in state[table].items() if key not in given[table]}
        if own and given[table]:
            state[table].clear()
            state[table].update({**given[table], **own})
            outcome = "merged"
        elif not own:
            # The very table: a handle removes its hook from both, and a hook registered on the
            # replacement is still there when the original returns.
            state[table] = given[table]
    return outcome


def _is_inside(fqn: str, parent: str) -> bool:
    return not parent or fqn == parent or fqn.startswith(f"{parent}.")


def shares_children(old: nn.Module, new: nn.Module) -> bool:
    """Tell whether two modules have one table of children, so that each has whatever the other has."""
    return new._modules is old._modules  # noqa: SLF001 (torch's registry)


def _tensors(module: nn.Module, *, is_deep: bool) -> Iterator[torch.Tensor]:
    """Yield the tensors of a module, also those of its children if `is_deep`; some more than once."""
    # The registries themselves: `parameters()` takes ten times as long for a module this small.
    for table in (module._parameters, module._buffers):  # noqa: SLF001 (torch's registries)
        yield from (tensor for tensor in table.values() if tensor is not None)
    if is_deep:
        for child in module._modules.values():  # noqa: SLF001 (same)
            if child is not None:
                yield from _tensors(child, is_deep=True)


def tensor_owners(model: nn.Module) -> dict[int, list[str]]:
    """Return every FQN of every parameter and buffer, by `id`."""
    owners: dict[int, list[str]] = {}
    for fqn, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        owners.setdefault(id(tensor), []).append(fqn)
    return owners
