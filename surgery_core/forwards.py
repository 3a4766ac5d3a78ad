"""Whose forward runs when a module is called: its class's, accelerate's around that, or another."""

from collections.abc import Iterator, Sequence
from functools import partial, update_wrapper
from types import MethodType

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy

from surgery_core.errors import ContractError
from surgery_core.preflight import execution_device
from surgery_core.reads import reads_parameters
from surgery_core.sharded import is_sharded
from surgery_core.slots import Site, Slot, SlotKind


def check_forward(site: Site, operation: str) -> None:
    """Refuse a module whose replacement would not be called as it is, or has no weights that stay.

    For operations whose replacement takes over the attributes of the original, as `vars()` has them.

    Args:
        site: The module and its place.
        operation: Name of the operation, for the message.

    Raises:
        ContractError: Its forward is patched, or accelerate loads its weights with each call, or
            they are spread over processes.
    """
    module = site.module
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if any(tensor.is_meta for tensor in tensors) and execution_device(module) is not None:
        expected, actual = "weights that stay", "some that accelerate loads with each call"
        fix = "Give the module a device in the device map"
    elif any(map(is_sharded, tensors)):
        expected, actual = "whole weights", "some that are spread over processes"
        fix = "Choose layers that stay whole, or a model that is not spread"
    elif "forward" in vars(module) and not is_dispatched(module):
        expected, actual = "its class's own forward", "a patched one"
        fix = "Remove what patched it, which would be called in place of the replacement's"
    else:
        return
    msg = (
        f"Operation {operation!r} cannot work at {site.fqn!r}: expected {expected}, got {actual}. "
        f"{fix}."
    )
    raise ContractError(msg, fqn=site.fqn, expected=expected, actual=actual)


def check_linear(site: Site, operation: str, *, added: Sequence[str]) -> None:
    """Refuse a linear layer whose replacement would not be called as it is, or not once.

    Args:
        site: The layer and its place.
        operation: Name of the operation, for the message.
        added: Names of the parameters that the replacement adds.

    Raises:
        ContractError: The layer has such parameters already, or has no shape yet, or is not called
            by its owner; or see `check_forward`.
    """
    for expected, actual, fix in _linear_problems(site, added):
        msg = (
            f"Operation {operation!r} cannot work at {site.fqn!r}: expected {expected}, got "
            f"{actual}. {fix}."
        )
        raise ContractError(msg, fqn=site.fqn, expected=expected, actual=actual)
    check_forward(site, operation)


def _linear_problems(site: Site, added: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield what was expected, what there is, and what to do."""
    module = site.module
    if any(hasattr(module, name) for name in added):
        yield (
            f"a layer without {' and '.join(map(repr, added))}",
            "one that has them",
            "Revert what was applied before, or exclude the layer",
        )
    if any(is_lazy(parameter) for parameter in module.parameters()):
        yield "a layer with shapes", "a lazy one", "Run the model once before planning"
    # Both read the weights of these layers, and call none of them; the second in its fast path. Others'
    # code tells.
    readers = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    owner = next(
        (
            slot.container
            for slot in site.slots
            if isinstance(slot.container, readers) or _is_read(slot, module)
        ),
        None,
    )
    if owner is not None or isinstance(module, NonDynamicallyQuantizableLinear):
        reader = "MultiheadAttention" if owner is None else type(owner).__name__
        yield (
            "a layer that is called",
            f"one whose weight {reader} reads",
            "Exclude it: what was added would be passed over",
        )


def _is_read(slot: Slot, module: nn.Module) -> bool:
    owner, names = slot.container, [n for n, p in module.named_parameters() if p is not None]
    return (
        isinstance(owner, nn.Module)
        and slot.kind is SlotKind.CHILD
        and reads_parameters(type(owner), str(slot.key), names)
    )


def is_dispatched(module: nn.Module) -> bool:
    """Tell whether a module has a forward of accelerate's that moves its arguments, and no more.

    Args:
        module: The module.
    """
    state = vars(module)
    forward, hook = state.get("forward"), state.get("_hf_hook")
    return (
        isinstance(forward, partial)
        and forward.args == (module,)
        and getattr(state.get("_old_forward"), "__func__", None) is type(module).forward
        # Several hooks may be chained in one.
        and all(
            type(each).__name__ == "AlignDevicesHook" and not getattr(each, "offload", True)
            for each in getattr(hook, "hooks", (hook,))
        )
    )


def dispatch_again(new: nn.Module) -> None:
    """Make the forward of accelerate's that `new` has from the module it stands for its own.

    Args:
        new: Has the attributes of a module that `check_forward` let pass.
    """
    state = vars(new)
    if "forward" in state:
        state["_old_forward"] = MethodType(type(new).forward, new)
        state["forward"] = update_wrapper(
            partial(state["forward"].func, new), state["_old_forward"]
        )
