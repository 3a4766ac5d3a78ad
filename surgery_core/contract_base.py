"""What an author says of an operation for the contract suite, and how its tests use it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery_core.operation import Rule
from surgery_core.session import Session
from surgery_core.snapshots import TensorValue
from surgery_core.surgery import Plan

Backend = str | Callable[..., Any]
"""As `torch.compile` takes it."""


class ContractBase(ABC):
    """What to try an operation on; see `surgery_core.testing.OperationContract`."""

    identity_at_init: bool = True
    fullgraph: bool = True

    @abstractmethod
    def make_model(self) -> nn.Module:
        """Return a new model, small enough to run many times."""

    @abstractmethod
    def rules(self) -> Sequence[Rule]:
        """Return rules that use the operation; claim more than one module if it can."""

    @abstractmethod
    def run(self, model: nn.Module) -> Tensor | tuple[Tensor, ...]:
        """Run the model on an input that is always the same, with gradients if it can train."""

    def session(self) -> Session:
        """Return a session that knows the operation."""
        return Session()

    def make_aliased_model(self) -> nn.Module | None:
        """Return a model in which every module the rules claim has two FQNs; None if there is none."""
        return None

    def make_compiled(self, model: nn.Module, backend: Backend) -> nn.Module | None:
        """Return a compiled form of a model, for `run`; None if there is none, so that none is tried.

        Override it to compile a part, in place, or with other settings. Every run that is compared
        with a compiled one is made with compiled code switched off.

        Args:
            model: One of `make_model`, an operation applied or not.
            backend: Pass it on to `torch.compile`.
        """
        # An `OptimizedModule`, which is a module.
        return cast("nn.Module", torch.compile(model, backend=backend, fullgraph=self.fullgraph))

    def _model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            # In training, a mere run would change running statistics.
            return self.make_model().eval()

    def _plan(self, model: nn.Module) -> Plan:
        return self.session().plan(model, self.rules())

    def _run(self, model: nn.Module) -> tuple[Tensor, ...]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            output = self.run(model)
        return output if isinstance(output, tuple) else (output,)

    def _outputs(self, model: nn.Module) -> list[TensorValue]:
        return [TensorValue(tensor.detach().clone()) for tensor in self._run(model)]
