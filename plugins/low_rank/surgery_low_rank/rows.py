"""Low-rank terms for each row of a batch its own, in place of those that a layer has itself."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from surgery_core import OptionsError, Sharing, WeightedModule, rows_at
from surgery_low_rank.functional import wide
from surgery_low_rank.linear import LowRankLinear, Part

Entry = tuple[LowRankLinear, Part]
"""A variant's share at a layer: what has the matrices, and which, with what factor."""

LONG = 32
"""Tokens of a row from which variants are computed one after the other, and not stacked.

8 rows with 8 variants of rank 8, 576 features, one core, float32, time over that of one variant for
the batch: one token 1.67 stacked, 2.35 one after the other; 8 tokens 1.42 and 1.69; 32 tokens 1.18 and
1.30; 64 tokens 1.12 and 1.14.
"""

MOST_ROWS = 4
"""Rows for each variant up to which they are stacked, since that copies the matrices for each row.

32 rows with 2 variants, one token, as above: 1.55 stacked, 1.40 one after the other.
"""


class RowTerms:
    """What each row of a batch gets at one layer.

    Args:
        rows: For each row the layers of the variants that it gets, none for a row of the base. A
            single row stands for a whole batch, of any size.
        fqn: Of the layer, for errors.
    """

    def __init__(self, rows: Sequence[Sequence[WeightedModule]], *, fqn: str) -> None:
        self._fqn = fqn
        self._num_rows = len(rows)
        places: dict[tuple[int, ...], list[int]] = {}
        for place, row in enumerate(rows):
            # By identity: rows that get the same have the same objects.
            places.setdefault(tuple(map(id, row)), []).append(place)
        self._groups = [
            _Group(rows=found, entries=[_entry(one) for one in rows[found[0]]])
            for found in places.values()
        ]
        self._stacks = _stacked(self._groups)
        self._kept: dict[tuple[bool, int, torch.device], _Places] = {}

    @torch.compiler.disable(reason="rows are those of one context")  # type: ignore[untyped-decorator,no-untyped-call]
    def added_to(self, output: Tensor, x: Tensor, *, is_training: bool, sharing: Sharing) -> Tensor:
        """Return the output of the base's forward with each row's terms.

        Args:
            output: `(batch, ..., out_features)`, of as many rows, or of a multiple: then each row
                counts that many times in succession, as beam search lays them out.
            x: `(batch, ..., in_features)`, what the base's forward was given.
            is_training: Whether features of it may be dropped.
            sharing: Knows the batch of the pass.

        Returns:
            Shape and dtype of `output`. Rows of the base are as they were.

        Raises:
            OptionsError: The batch has another number of rows, or is not, or may not be, the first
                axis of the input; or the input has no axis besides that of its features and one
                more, which may then count tokens of all rows.
        """
        if self._num_rows == 1:
            return self._groups[0].added_to(output, x, is_training=is_training)
        self._check(x, sharing)
        # Dropping features is each variant's own.
        is_long = is_training or x.shape[1:-1].numel() >= LONG
        steps = self._groups if is_long else self._stacks
        repeats = len(x) // self._num_rows
        key = (is_long, repeats, x.device)
        if key not in self._kept:
            self._kept[key] = _Places.of([step.rows for step in steps], repeats, x.device)
        places = self._kept[key]
        pieces = [
            step.added_to(output[at], x[at], is_training=is_training)
            for step, at in zip(steps, places.each, strict=True)
        ]
        found = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return found if places.back is None else found[places.back]

    def _check(self, x: Tensor, sharing: Sharing) -> None:
        if x.dim() < _MIN_AXES:
            msg = (
                f"Linear layer {self._fqn!r} got an input of shape {tuple(x.shape)} for rows with "
                "variants of their own: expected (batch, ..., in_features) with at least three axes, "
                "since the first of two may count tokens. Give the whole batch one variant."
            )
            raise OptionsError(msg)
        if len(x) % self._num_rows:
            msg = (
                f"Linear layer {self._fqn!r} got a batch of {len(x)} rows: expected {self._num_rows}, "
                "one for each choice of variants, or a multiple of that. Name one for each row. If "
                "another plugin calls the layer with an input of its own, as prompts do for their "
                "keys and values, give the whole batch one choice."
            )
            raise OptionsError(msg)
        problem = sharing.axis_problem(self._fqn, x, self._num_rows)
        if problem is not None:
            msg = (
                f"Linear layer {self._fqn!r} got an input of shape {tuple(x.shape)} for rows with "
                f"adapters that differ: expected (batch, ..., in_features), but {problem}. Give the "
                "whole batch one adapter, or make the batch another length than the sequence."
            )
            raise OptionsError(msg)


_MIN_AXES = 3


class _Step(Protocol):
    """Some rows, and how their terms are computed."""

    @property
    def rows(self) -> Sequence[int]:
        """Their places."""

    def added_to(self, output: Tensor, x: Tensor, *, is_training: bool) -> Tensor:
        """Return the output of these rows with their terms."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Group:
    """Rows that get the same.

    Args:
        rows: Their places.
        entries: None for the base.
    """

    rows: Sequence[int]
    entries: Sequence[Entry]

    def added_to(self, output: Tensor, x: Tensor, *, is_training: bool) -> Tensor:
        """Return the output of these rows with their terms."""
        # In the order and the dtypes in which a layer adds its own, and rounded once.
        found = output
        for layer, part in self.entries:
            found = found + part.term(layer, x, is_training=is_training)
        return found.to(output.dtype)


class _Stack:
    """Rows of one variant each, whose matrices have one shape and dtype.

    Each row is multiplied by its own alone, so that what is not finite in one stays there.

    Args:
        rows: Their places.
        entries: That of each.
    """

    def __init__(self, rows: Sequence[int], entries: Sequence[Entry]) -> None:
        self.rows = rows
        self._a = [(layer, part.a) for layer, part in entries]
        self._b = [(layer, part.b) for layer, part in entries]
        self._factors = [part.factor for _, part in entries]
        self._kept: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def added_to(self, output: Tensor, x: Tensor, *, is_training: bool) -> Tensor:
        """Return the output of these rows with their terms."""
        del is_training
        # The matrices may have changed since the last pass, so these are not kept.
        a = torch.stack([getattr(layer, name) for layer, name in self._a])
        b = torch.stack([getattr(layer, name) for layer, name in self._b])
        # (rows * repeats, ..., in_features) -> (rows, repeats * tokens, in_features)
        narrow = torch.bmm(x.to(a.dtype).reshape(len(a), -1, x.shape[-1]), a.mT)
        term = wide(torch.bmm(narrow, b.mT))
        return (output + (term * self._factor(term)).view_as(output)).to(output.dtype)

    def _factor(self, term: Tensor) -> Tensor | float:
        first, *others = self._factors
        if all(factor == first for factor in others):
            return first
        key = (term.dtype, term.device)
        if key not in self._kept:
            with torch.inference_mode(mode=False):
                factors = torch.tensor(self._factors, dtype=term.dtype, device=term.device)
            self._kept[key] = factors[:, None, None]
        return self._kept[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """Where the rows of several steps are in a batch.

    Args:
        each: By step.
        back: Where each row is when the steps' are put one after the other; None if in its place.
    """

    each: Sequence[slice | Tensor]
    back: Tensor | None

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], repeats: int, device: torch.device) -> "_Places":
        """Return them for a batch where each row counts several times in succession."""
        step_of = {row: step for step, found in enumerate(rows) for row in found}
        steps = [step_of[row] for row in range(len(step_of))]
        at = [rows_at(steps, step, repeats) for step in range(len(rows))]
        order = [
            row * repeats + again for found in rows for row in found for again in range(repeats)
        ]
        # Not of the mode of inference, if that is on: passes with gradients may come later.
        with torch.inference_mode(mode=False):
            index = torch.tensor(order, device=device)
            return cls(
                each=[
                    one if isinstance(one, slice) else torch.tensor(one, device=device)
                    for one in at
                ],
                back=None if order == sorted(order) else index.argsort(),
            )


def _entry(one: WeightedModule) -> Entry:
    layer = one.module
    assert isinstance(layer, LowRankLinear)
    # It has one part, since variants are no compositions.
    return layer, replace(layer.low_rank_parts[0], weight=one.weight)


def _stacked(groups: Sequence[_Group]) -> list[_Step]:
    """Return the steps for short inputs: groups of one variant each are one if they are alike."""
    kinds: dict[object, list[_Group]] = {}
    for group in groups:
        # Others by themselves.
        kind: object = id(group)
        if len(group.entries) == 1:
            layer, part = group.entries[0]
            matrix = getattr(layer, part.a)
            kind = (matrix.shape, matrix.dtype)
        kinds.setdefault(kind, []).append(group)
    steps: list[_Step] = []
    for alike in kinds.values():
        entries = {row: group.entries[0] for group in alike for row in group.rows if group.entries}
        if len(alike) == 1 or len(entries) > MOST_ROWS * len(alike):
            steps += alike
            continue
        rows = sorted(entries)
        steps.append(_Stack(rows, [entries[row] for row in rows]))
    return steps
