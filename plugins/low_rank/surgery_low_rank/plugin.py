"""Hook implementations, and nothing else."""

from collections.abc import Iterable
from typing import Any

from surgery_core import Operation, hookimpl
from surgery_low_rank.operation import LowRankOperation


@hookimpl
def surgery_operations() -> Iterable[Operation[Any]]:
    """Offer `low_rank`."""
    return [LowRankOperation()]
