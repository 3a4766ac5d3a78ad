"""Small steps that the tests of the contract suite are made of."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from surgery_core.snapshots import TensorValue
from surgery_core.surgery import Surgery


def register_hooks(module: nn.Module, calls: Counter[str]) -> list[RemovableHandle]:
    """Register a hook of every kind, each of which counts its calls; return the handles."""

    def counting(kind: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[kind] += 1

        return hook

    return [
        module.register_forward_hook(counting("forward")),
        module.register_forward_hook(counting("forward_with_kwargs"), with_kwargs=True),
        module.register_forward_hook(counting("forward_prepended"), prepend=True),
        module.register_forward_hook(counting("forward_always"), always_call=True),
        module.register_forward_pre_hook(counting("forward_pre")),
        module.register_forward_pre_hook(counting("forward_pre_with_kwargs"), with_kwargs=True),
        module.register_full_backward_hook(counting("backward")),
        module.register_full_backward_pre_hook(counting("backward_pre")),
        module.register_state_dict_post_hook(counting("state_dict")),  # type: ignore[no-untyped-call]
        module.register_state_dict_pre_hook(counting("state_dict_pre")),  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(counting("load")),  # type: ignore[no-untyped-call]
        module.register_load_state_dict_post_hook(counting("load_post")),  # type: ignore[no-untyped-call]
    ]


@contextmanager
def must_raise(expected: type[Exception], subject: str) -> Iterator[None]:
    """Fail unless the block raises an error of a kind."""
    try:
        yield
    except expected:
        return
    msg = f"{subject} did not raise {expected.__name__}."
    raise AssertionError(msg)


def edited_fqns(surgery: Surgery) -> list[str]:
    """Return every FQN at which something was replaced, aliases included."""
    return [fqn for edit in surgery.plan.document.edits for fqn in (edit.fqn, *edit.aliases)]


def as_dtype(value: object, dtype: torch.dtype) -> object:
    """Return what a tensor that was taken down is in another dtype; what is no tensor stays."""
    return TensorValue(value.tensor.to(dtype)) if isinstance(value, TensorValue) else value


def join(fqn: str, name: str) -> str:
    """Return the key of a tensor in the state dict of the root."""
    return f"{fqn}.{name}" if fqn else name
