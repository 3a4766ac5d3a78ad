"""A prompt's keys and gated values, computed once, and used until anything they came from changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

Parameters = Mapping[str, Tensor | None]
"""A module's table of parameters."""

Held = tuple[Parameters, str, Tensor, int, Tensor, int]
"""A table, a name in it, the tensor there, its version, an alias of it, and where its values were."""

Child = tuple[Mapping[str, nn.Module | None], str, nn.Module]
"""A table of children, a name in it, and the projection there."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sources:
    """Parameters and projections that something was computed from, and whether they are unchanged.

    PyTorch counts writes to a tensor: edits in place, loads, and the steps of most optimizers are
    seen so. Another tensor, storage or module in the same place is seen too, and hooks, and a
    gradient that waits for an optimizer's step. Not counted are a fused optimizer's step and writes
    through `.data`, so whoever uses this must forget it when gradients are computed, when modules
    are exchanged, and when the adapter enters the model.

    Args:
        tensors: With an alias each, so that their storage is not freed and reused meanwhile.
        children: Projections whose output depends on their input and parameters alone.
    """

    tensors: tuple[Held, ...]
    children: tuple[Child, ...]

    @classmethod
    def of(cls, own: Parameters, names: Sequence[str], children: Sequence[Child]) -> Self | None:
        """Note how things are.

        Args:
            own: Table with the prompt and the gate, which may be trainable.
            names: Theirs.
            children: Projections; all their parameters must be frozen.

        Returns:
            None if something cannot be watched: a tensor subclass, a trainable base, hooks.
        """
        tables = [(module._parameters, False) for _, _, module in children]  # noqa: SLF001 (torch's registry)
        watched = [(own, name, own[name], True) for name in names]
        watched += [
            (table, name, tensor, may_train)
            for table, may_train in tables
            for name, tensor in table.items()
        ]
        held: list[Held] = []
        for table, name, tensor, may_train in watched:
            if tensor is None:
                continue
            if type(tensor) not in (nn.Parameter, Tensor) or tensor.is_inference():
                return None
            if tensor.requires_grad and not may_train:
                return None
            alias = tensor.detach()
            held.append((table, name, tensor, tensor._version, alias, alias.data_ptr()))  # noqa: SLF001 (no public name)
        found = cls(tensors=tuple(held), children=tuple(children))
        return found if found.are_plain() else None

    def are_unchanged(self) -> bool:
        """Tell whether everything is as it was noted, and no gradient waits for a step.

        Takes about two microseconds.
        """
        for table, name, tensor, version, _, pointer in self.tensors:
            if (
                table.get(name) is not tensor
                or tensor._version != version  # noqa: SLF001 (no public name)
                or tensor.data_ptr() != pointer
                or tensor.grad is not None
            ):
                return False
        return self.are_plain()

    def await_a_step(self) -> bool:
        """Tell whether gradients are there, which an optimizer may be about to use."""
        return any(tensor.grad is not None for _, _, tensor, _, _, _ in self.tensors)

    def are_plain(self) -> bool:
        """Tell whether the projections are those noted, and nothing but their parameters counts."""
        for children, name, module in self.children:
            if (
                children.get(name) is not module
                or module._forward_hooks  # noqa: SLF001 (torch's registry)
                or module._forward_pre_hooks  # noqa: SLF001 (same)
                or "forward" in module.__dict__
            ):
                return False
        return not _has_any_global_hook()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BakedPrompt:
    """Keys and gated values of a prompt, one set for each query head.

    Args:
        key: `(1, heads, prompt_len, head_dim)`.
        value: `(1, heads, prompt_len, value_dim)`, times the gate after its activation.
        sources: What they were computed from.
    """

    key: Tensor
    value: Tensor
    sources: Sources
