"""Checks the demo must pass: each is printed, and the first that fails ends the run."""

from dataclasses import dataclass
from typing import Self

import torch
from rich.console import Console
from torch import Tensor, nn


class CheckFailedError(Exception):
    """Something the demo claims does not hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Which objects a model is made of.

    Args:
        modules: Ids by FQN, aliases included.
        tensors: Ids of parameters and buffers by FQN, aliases included.
        keys: Of the state dict, in order.
        trainable: Names of the parameters that require gradients.
    """

    modules: dict[str, int]
    tensors: dict[str, int]
    keys: tuple[str, ...]
    trainable: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Take it down for a model."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers(remove_duplicate=False))
        modules = dict(model.named_modules(remove_duplicate=False))
        return cls(
            modules={fqn: id(module) for fqn, module in modules.items()},
            tensors={fqn: id(tensor) for fqn, tensor in (parameters | buffers).items()},
            keys=tuple(model.state_dict()),
            trainable=frozenset(fqn for fqn, p in parameters.items() if p.requires_grad),
        )


@dataclass(frozen=True, slots=True)
class Checks:
    """Print what holds; raise about what does not."""

    console: Console

    def holds(self, claim: str, *, passed: bool) -> None:
        """Print a claim that holds.

        Raises:
            CheckFailedError: It does not.
        """
        if not passed:
            msg = f"Check failed: {claim}."
            raise CheckFailedError(msg)
        self.console.print(f"  [green]ok[/]  {claim}", highlight=False)

    def same_bits(self, claim: str, expected: Tensor, actual: Tensor) -> None:
        """Print that two float32 tensors are equal bit for bit.

        Raises:
            CheckFailedError: They are not.
        """
        # As integers: 0.0 and -0.0 are equal numbers, but not the same bits.
        bits = [tensor.contiguous().view(torch.int32) for tensor in (expected, actual)]
        self.holds(claim, passed=torch.equal(*bits))
