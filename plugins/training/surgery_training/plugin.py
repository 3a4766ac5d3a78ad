"""Hook implementations, and nothing else."""

from collections.abc import Callable, Mapping

from surgery_core import hookimpl
from surgery_training import commands


@hookimpl
def surgery_commands() -> Mapping[str, Callable[..., None]]:
    """Add `train`, `generate` and `eval`."""
    return {"train": commands.train, "generate": commands.generate, "eval": commands.evaluate}
