"""Hook implementations, and nothing else."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from surgery_activation_probe.operation import ActivationProbe
from surgery_core import Operation, hookimpl


class ActivationProbePlugin:
    """What the core asks of this distribution."""

    @hookimpl
    def surgery_operations(self) -> Iterable[Operation[Any]]:
        """Offer `activation_probe`."""
        return [ActivationProbe()]

    @hookimpl
    def surgery_probe_inputs(self, model: nn.Module) -> Mapping[str, Any] | None:
        """Return the example that a model carries, in the attribute that Lightning uses."""
        example = getattr(model, "example_input_array", None)
        return example if isinstance(example, Mapping) else None


plugin = ActivationProbePlugin()
