"""Prompt keys and values that live in a KV cache, and are as old as the base's keys and values there."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_not

import torch
from torch import Tensor, nn

Folded = tuple[Tensor, Tensor]
"""Keys and gated values of a prompt, one set for each query head; see `functional.fold_gate`."""

Stacked = tuple[Tensor, Tensor, Tensor | None]
"""Keys, gated values and bias of each row, for `row_prompt_attention`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoldedPrompts:
    """Keys and gated values of some adapters' prompts at one attention module.

    Args:
        parameters: The prompts and gates that they were computed from.
        weights: Factor on the term of each adapter, dimensionless.
        dtype: Of the queries that they are for.
        pairs: Keys and gated values of each adapter.
        stacked: The same gathered for the rows of a batch, by row assignment and repeats.
    """

    parameters: Sequence[Tensor | None]
    weights: Sequence[float]
    dtype: torch.dtype
    pairs: Sequence[Folded]
    stacked: dict[tuple[tuple[int, ...], int], Stacked] = field(default_factory=dict)

    def fits(
        self, parameters: Sequence[Tensor | None], weights: Sequence[float], query: Tensor
    ) -> bool:
        """Tell whether they are those of adapters with these parameters and weights, for a query."""
        return (
            len(parameters) == len(self.parameters)
            and not any(map(is_not, parameters, self.parameters))
            and weights == self.weights
            and query.dtype is self.dtype
            and query.device == self.pairs[0][0].device
        )


class KeptPrompts:
    """The latest folded prompts of each attention module, as an attribute of a KV cache.

    A copy of the cache has the same ones; a pickled cache has none.
    """

    def __init__(self) -> None:
        self.found: dict[nn.Module, FoldedPrompts] = {}

    def __deepcopy__(self, memo: object) -> "KeptPrompts":
        copied = KeptPrompts()
        copied.found.update(self.found)
        return copied

    def __reduce__(self) -> tuple[type["KeptPrompts"], tuple[()]]:
        return KeptPrompts, ()
