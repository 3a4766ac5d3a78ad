"""Terms of several adapters at one attention module: for a whole batch, or for each row its own."""

from collections.abc import Sequence
from math import inf
from operator import is_not
from typing import cast

import torch
from torch import Tensor

from surgery_adaption_prompt.attention import AdaptedAttention
from surgery_adaption_prompt.functional import fold_gate, row_prompt_attention
from surgery_adaption_prompt.parts import PromptPart, baked_together
from surgery_core import WeightedModule, repeats_of, rows_at

Entry = tuple[AdaptedAttention, PromptPart]
"""An adapter's share at a module: what has the parameters, and which, with what weight."""

Stacked = tuple[Tensor, Tensor, Tensor | None]
"""Keys, gated values and bias of each row, for `row_prompt_attention`."""

LONG = 32
"""Query length from which rows are computed adapter by adapter, and not gathered.

8 rows with 8 adapters, 9 heads, on 2 cores, in microseconds: one query 24 gathered, 102 by adapter;
16 queries 246 and 310; 128 queries 1560 and 1360, where the same with one adapter takes 830.
"""


class RowTerms:
    """What each row of a batch gets at one attention module.

    Args:
        rows: For each row the adapters whose terms are added; none for a row of the base.
    """

    def __init__(self, rows: Sequence[Sequence[Entry]]) -> None:
        self._num_rows = len(rows)
        depth = max(map(len, rows))
        self._layers = [
            _Layer([row[level] if level < len(row) else None for row in rows])
            for level in range(depth)
        ]

    def term(self, query: Tensor, *, scaling: float, is_training: bool) -> Tensor:
        """Return the sum of each row's terms, as `PromptPart.term` does.

        Args:
            query: A batch of as many rows, or of a multiple: then each row counts that many times
                in succession, as beam search lays them out.
            scaling: Factor on the logits, dimensionless.
            is_training: Whether the model is in training mode.

        Raises:
            OptionsError: The batch has another number of rows.
        """
        repeats = repeats_of(query.shape[0], self._num_rows)
        terms = [
            layer.term(query, scaling=scaling, repeats=repeats, is_training=is_training)
            for layer in self._layers
        ]
        return sum(terms[1:], start=terms[0])


class _Layer:
    """At most one adapter for each row."""

    def __init__(self, entries: Sequence[Entry | None]) -> None:
        # By identity: a part stands for an adapter with a weight.
        distinct = {id(entry[1]): entry for entry in entries if entry is not None}
        places = {part: place for place, part in enumerate(distinct)}
        self._entries = list(distinct.values())
        # The base comes after the last adapter.
        self._index = [len(places) if e is None else places[id(e[1])] for e in entries]
        self._kept: tuple[Sequence[object], int, Stacked] | None = None

    def term(self, query: Tensor, *, scaling: float, repeats: int, is_training: bool) -> Tensor:
        """Return each row's term."""
        if query.shape[2] < LONG:
            stacked = self.stacked(query, repeats=repeats, is_training=is_training)
            return row_prompt_attention(query, *stacked, scaling=scaling)
        # All at once, before each is asked for its term.
        baked_together(self._entries, query, is_training=is_training)
        total: Tensor | None = None
        for place, (attention, part) in enumerate(self._entries):
            rows = rows_at(self._index, place, repeats)
            term = part.term(attention, query[rows], scaling=scaling, is_training=is_training)
            if total is None:
                total = term.new_zeros(len(query), *term.shape[1:])
            total[rows] = term
        return cast("Tensor", total)

    def stacked(self, query: Tensor, *, repeats: int, is_training: bool) -> Stacked:
        """Return what the rows attend to; gathered once as long as nothing of it changes."""
        baked = baked_together(self._entries, query, is_training=is_training)
        if baked is None:
            return self._gather([_folded(*entry, query) for entry in self._entries], repeats)
        kept = self._kept
        if kept is None or kept[1] != repeats or any(map(is_not, kept[0], baked)):
            pairs = [_widened(one.key, one.value) for one in baked]
            kept = self._kept = (baked, repeats, self._gather(pairs, repeats))
        return kept[2]

    def _gather(self, pairs: Sequence[tuple[Tensor, Tensor]], repeats: int) -> Stacked:
        lengths = [key.shape[2] for key, _ in pairs]
        longest, batch = max(lengths), len(self._index) * repeats
        # (batch, heads, prompt_len, head_dim), zeros beyond each prompt and for rows of the base.
        key, value = (one.new_zeros(batch, one.shape[1], longest, one.shape[3]) for one in pairs[0])
        for place, (found_key, found_value) in enumerate(pairs):
            rows = rows_at(self._index, place, repeats)
            key[rows, :, : lengths[place]] = found_key
            value[rows, :, : lengths[place]] = found_value
        lengths.append(longest)
        ends = [lengths[place] for place in self._index for _ in range(repeats)]
        if set(ends) == {longest}:
            return key, value, None
        bias = [[0.0] * end + [-inf] * (longest - end) for end in ends]
        # Seen as (batch, 1, 1, prompt_len).
        return key, value, key.new_tensor(bias)[:, None, None]


def stacked_rows(rows: Sequence[Sequence[Entry]], query: Tensor) -> Stacked:
    """Return what the rows attend to, of at most one adapter each.

    Args:
        rows: For each row its adapter, or none.
        query: Has the shape, dtype and device of the queries; its values do not matter.
    """
    layer = _Layer([row[0] if row else None for row in rows])
    return layer.stacked(query, repeats=1, is_training=False)


class SharedTerms:
    """What code gets from the modules at one place in place of the active adapter's terms.

    Args:
        rows: For each row of a batch, the modules of its adapters. A single row stands for a whole
            batch, of any size.
    """

    def __init__(self, rows: Sequence[Sequence[WeightedModule]]) -> None:
        found = entries_of(rows)
        self._rows = {
            is_projected: chosen
            for is_projected in (True, False)
            if any(chosen := [_of_kind(row, is_projected=is_projected) for row in found])
        }
        self._terms = {
            is_projected: RowTerms(chosen)
            for is_projected, chosen in self._rows.items()
            if len(chosen) > 1
        }

    def term(
        self, attention: AdaptedAttention, query: Tensor, *, scaling: float, is_projected: bool
    ) -> Tensor | None:
        """Return the term at an attention module; see `PromptPart.term`."""
        if is_projected not in self._rows:
            return None
        if is_projected in self._terms:
            return self._terms[is_projected].term(
                query, scaling=scaling, is_training=attention.training
            )
        terms = [
            part.term(at, query, scaling=scaling, is_training=attention.training)
            for at, part in self._rows[is_projected][0]
        ]
        return sum(terms[1:], start=terms[0])


def entries_of(rows: Sequence[Sequence[WeightedModule]]) -> list[list[Entry]]:
    """Return the shares of adapters that rows get; rows that get the same have the same ones."""
    known: dict[int, Entry] = {}
    for one in (one for row in rows for one in row):
        if id(one) not in known:
            attention = cast("AdaptedAttention", one.module)
            (part,) = attention.prompts
            known[id(one)] = attention, part.weighted(one.weight)
    return [[known[id(one)] for one in row] for row in rows]


def _of_kind(row: Sequence[Entry], *, is_projected: bool) -> list[Entry]:
    return [entry for entry in row if entry[1].config.project_output is is_projected]


def _widened(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values in float32 or wider.

    For one query in bfloat16 that takes a third of the time; and float16 cannot hold all products.
    """
    wide = torch.promote_types(key.dtype, torch.float32)
    return key.to(wide), value.to(wide)


def _folded(attention: AdaptedAttention, part: PromptPart, query: Tensor) -> tuple[Tensor, Tensor]:
    key, value, gate = part.prepared(attention, query)
    return fold_gate(*_widened(key, value), gate, heads=query.shape[1])
