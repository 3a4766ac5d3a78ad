"""Hook implementations, and nothing else."""

from collections.abc import Iterable
from typing import Any

from surgery_core import Operation, hookimpl
from surgery_scale_shift.operation import ScaleShiftOperation
from surgery_scale_shift.tuned_norm import TunedNormOperation


@hookimpl
def surgery_operations() -> Iterable[Operation[Any]]:
    """Offer `scale_shift` and `tuned_norm`."""
    return [ScaleShiftOperation(), TunedNormOperation()]
