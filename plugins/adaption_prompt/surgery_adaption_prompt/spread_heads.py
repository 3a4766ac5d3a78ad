"""Heads spread over processes by tensor parallelism: what of a gate is whose, and whose gradients count."""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from surgery_core import is_sharded


class _OwnPart(torch.autograd.Function):
    """Some entries of a vector that all processes have; its gradient is the sum of all of theirs."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, first: int, count: int, group: Any) -> Tensor:  # noqa: ANN401 (torch's signature)
        ctx.place = len(vector), first, group
        return vector[first : first + count].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401 (same)
        length, first, group = ctx.place
        whole = grad.new_zeros(length)
        whole[first : first + len(grad)] = grad
        dist.all_reduce(whole, group=group)
        return whole, None, None, None


def own_part(
    gate: Tensor, projection: Iterable[Tensor], *, heads: int, total: int
) -> Tensor | None:
    """Return what of a gate is for the heads of this process.

    Args:
        gate: `(1,)` or `(total,)`, the same in all processes.
        projection: Parameters of a projection that is spread as the heads are.
        heads: How many heads this process has.
        total: How many there are.

    Returns:
        `(1,)` or `(heads,)`; its gradient is that of all processes. None if the heads are not in
        blocks of equal size over the processes of one mesh.
    """
    mesh = next((cast("Any", found).device_mesh for found in projection if is_sharded(found)), None)
    if mesh is None or mesh.ndim != 1 or heads * mesh.size() != total:
        return None
    per_head = len(gate) == total
    first, count = (mesh.get_local_rank() * heads, heads) if per_head else (0, 1)
    part: Tensor = _OwnPart.apply(gate, first, count, mesh.get_group())  # type: ignore[no-untyped-call]
    return part
