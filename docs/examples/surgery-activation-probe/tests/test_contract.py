"""The contract suite that surgery-core has for every operation."""

from collections.abc import Sequence

from surgery_activation_probe.plugin import plugin
from tiny import Tiny, make_model
from torch import Tensor, nn

from surgery_core import Rule, Session
from surgery_core.testing import OperationContract


class TestActivationProbe(OperationContract):
    """Modules with parameters, and modules without."""

    def session(self) -> Session:
        """Know this plugin, installed or not, and no other."""
        return Session([plugin], discover=False)

    def make_model(self) -> Tiny:
        """Return the model of the recipe."""
        return make_model()

    def make_aliased_model(self) -> Tiny:
        """Return one whose layers are one and the same."""
        model = make_model()
        model.layers[1] = model.layers[0]
        return model

    def rules(self) -> Sequence[Rule]:
        """Probe two modules of each layer."""
        return [
            Rule(
                operation="activation_probe",
                select="layers.*.down",
                options={"per_channel": True},
            ),
            Rule(operation="activation_probe", select="layers.*.act"),
        ]

    def run(self, model: nn.Module) -> Tensor:
        """Call the model with what it says it can be called with."""
        return model(**model.example_input_array)
