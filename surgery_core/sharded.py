"""Tensors and modules of which each process holds a part: what they are, and the whole of them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn

from surgery_core.errors import StateError


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a `DTensor`: the processes hold it together.

    Args:
        tensor: Any.

    Example:
        >>> is_sharded(nn.Parameter())
        False
    """
    return _is_a(type(tensor), "DTensor", "torch.distributed.")


def is_partitioned(tensor: Tensor) -> bool:
    """Tell whether DeepSpeed has taken the values of a parameter away until they are needed.

    Args:
        tensor: Any.
    """
    # Its `zero.Init` and engine note an id on each parameter; gathered ones have their shape.
    return "ds_id" in vars(tensor) and tuple(tensor.shape) != tuple(vars(tensor)["ds_shape"])


def is_flattened(tensor: Tensor) -> bool:
    """Tell whether `FullyShardedDataParallel` (FSDP1) has made a parameter part of a flat one.

    Args:
        tensor: Any.
    """
    # What torch notes on each of them; gathered or not, they are views that it exchanges.
    return "_fsdp_flattened" in vars(tensor)


def is_held_together(tensor: Tensor) -> bool:
    """Tell whether what shards tensors for training looks after one: FSDP, DeepSpeed, or another.

    Args:
        tensor: Any.
    """
    return is_sharded(tensor) or "ds_id" in vars(tensor) or is_flattened(tensor)


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of a tensor that may be partitioned."""
    return tuple(vars(tensor)["ds_shape"] if is_partitioned(tensor) else tensor.shape)


def is_fully_sharded(module: nn.Module) -> bool:
    """Tell whether `fully_shard` (FSDP2) has been called for a module itself.

    Args:
        module: The module; those around it do not count.
    """
    return _is_a(type(module), "FSDPModule", "torch.distributed.fsdp.")  # type: ignore[arg-type]  # mypy takes the instances' __hash__ for the class's


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors whole, those that the processes hold together gathered from all of them.

    Every process must call this, with the same names, if any tensor is sharded: one that does not
    is waited for. Tensors that are whole are returned as they are, not copied.

    Args:
        tensors: By name.

    Returns:
        By name, each process the same; on the devices the parts are on.

    Raises:
        StateError: See `whole_tensor`.

    Example:
        >>> weight = nn.Parameter()
        >>> whole_tensors({"w": weight})["w"] is weight
        True
    """
    return {name: whole_tensor(tensor) for name, tensor in tensors.items()}


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor whole; see `whole_tensors`.

    Raises:
        StateError: It is one that DeepSpeed has partitioned, or FSDP1 flattened, which cannot be
            gathered here.
    """
    if is_flattened(tensor):
        msg = (
            "Tensor is flattened by FullyShardedDataParallel (FSDP1): expected whole values, got a "
            "piece. Use `fully_shard` (FSDP2)."
        )
        raise StateError(msg)
    if is_partitioned(tensor):
        msg = (
            "Tensor is partitioned by DeepSpeed (ZeRO-3): expected whole values, got none. Read it "
            "inside `deepspeed.zero.GatheredParameters`."
        )
        raise StateError(msg)
    return cast("Tensor", cast("Any", tensor).full_tensor()) if is_sharded(tensor) else tensor


def copy_into_(own: Tensor, given: Tensor) -> None:
    """Copy a tensor into another, of which this process may hold a part.

    Args:
        own: Written to; sharded or not.
        given: The whole values, the same in each process.
    """
    if not is_sharded(own):
        own.copy_(given)
        return
    mesh, placements = cast("Any", own).device_mesh, cast("Any", own).placements
    # Each process takes its part of what it has; nothing is sent.
    distribute = import_module("torch.distributed.tensor").distribute_tensor
    local = given.to(own.device, own.dtype)
    own.copy_(distribute(local, mesh, placements, src_data_rank=None))


@contextmanager
def one_writer(tensors: Iterable[Tensor]) -> Iterator[bool]:
    """Let the first of the processes that hold tensors together write files, and the others wait.

    Args:
        tensors: What is written, as it is held.

    Yields:
        Whether to write. Where nothing is sharded that is true in every process, and none waits.
    """
    held = [found for found in tensors if is_held_together(found)]
    mesh = _mesh_of(held)
    # Without a mesh it is DeepSpeed, which has all processes.
    groups = [None] if mesh is None else [mesh.get_group(dim) for dim in range(mesh.ndim)]
    place = [dist.get_rank()] if held and mesh is None else mesh.get_coordinate() if held else [0]
    try:
        yield not any(place)
    finally:
        for group in groups if held else ():
            dist.barrier(group=group)


def replicate_(tensor: Tensor, beside: nn.Module) -> None:
    """Let every process have the values that the first one drew, if they hold a module together.

    Args:
        tensor: Written to.
        beside: The module; whose processes, its parameters say.
    """
    mesh = _mesh_of(beside.parameters())
    if mesh is None or tensor.is_meta:
        return
    # Along one dimension of the mesh after the other, so that the values of the very first arrive.
    for dim in range(mesh.ndim):
        dist.broadcast(tensor, group=mesh.get_group(dim), group_src=0)


def whole_module(module: nn.Module) -> nn.Module:
    """Return a module that computes with whole parameters what all processes would together.

    Every process must call this.

    Args:
        module: Not changed, and returned if nothing of it is sharded.
    """
    if not any(map(is_sharded, module.parameters())):
        return module
    # Without the forward of tensor parallelism, which would take parts for granted.
    bare = object.__new__(unsharded_class(module))
    vars(bare).update({name: value for name, value in vars(module).items() if name != "forward"})
    vars(bare).update(
        _parameters={
            name: None if found is None else nn.Parameter(whole_tensor(found), requires_grad=False)
            for name, found in module._parameters.items()  # noqa: SLF001 (torch's registry)
        },
        _modules={
            name: None if child is None else whole_module(child)
            for name, child in module._modules.items()  # noqa: SLF001 (same)
        },
    )
    return bare


def reshard_(model: nn.Module) -> None:
    """Let modules have the parts that `fully_shard` gave them, after it gathered them for a pass.

    It keeps those of the root gathered until the backward, so that without one they still are.

    Args:
        model: Its parameters are other objects afterwards.
    """
    if not is_one_of_several():
        return
    for module in model.modules():
        if is_fully_sharded(module):
            cast("Any", module).reshard()


def is_sharded_at(model: nn.Module, fqn: str) -> bool:
    """Tell whether something gathers the parameters of a module for each pass: FSDP, or DeepSpeed.

    Args:
        model: The root.
        fqn: Of the module.
    """
    found = model
    for name in fqn.split("."):
        # What torch notes on all modules inside one that it shards, which may be around the model.
        if "_is_fsdp_managed_module" in vars(found):
            return True
        found = cast("nn.Module", found._modules[name])  # noqa: SLF001 (torch's registry, which is faster)
    return is_fully_sharded(found) or any("ds_id" in vars(own) for own in found.parameters())


def unsharded_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, as it was before `fully_shard` derived one from it."""
    cls = type(module)
    if is_fully_sharded(module):
        # (FSDPModule, the class before)
        return cls.__mro__[2]
    return cls


def _mesh_of(tensors: Iterable[Tensor]) -> Any:  # noqa: ANN401 (a DeviceMesh)
    """Return the mesh of the processes that hold tensors together; None if each has its own."""
    return next((cast("Any", found).device_mesh for found in tensors if is_sharded(found)), None)


def is_one_of_several() -> bool:
    """Tell whether this process is in a group of such, without which nothing is sharded."""
    return dist.is_available() and dist.is_initialized()


@cache
def _is_a(cls: type, name: str, package: str) -> bool:
    """By name, since builds of PyTorch without `torch.distributed` have no such class."""
    # With the dot: packages may begin alike.
    return any(
        base.__name__ == name and f"{base.__module__}.".startswith(package) for base in cls.__mro__
    )
