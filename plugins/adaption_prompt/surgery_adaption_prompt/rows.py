"""Terms of several adapters at one attention module: for a whole batch, or one for each row."""

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from surgery_adaption_prompt.functional import folded_prompt_attention, row_prompt_attention
from surgery_adaption_prompt.kept import Folded, FoldedPrompts, Stacked
from surgery_adaption_prompt.parts import (
    AttentionCall,
    Entry,
    folded_prompts,
    prompt_terms,
)
from surgery_core import WeightedModule, repeats_of, rows_at

if TYPE_CHECKING:
    from surgery_adaption_prompt.attention import AdaptedAttention

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
        # By identity: a part stands for an adapter with a weight.
        distinct = {id(entry[1]): entry for row in rows for entry in row}
        self._entries = list(distinct.values())
        places = {part: place for place, part in enumerate(distinct)}
        # At most one adapter for each row in each; the base comes after the last adapter.
        self._levels = [
            tuple(places[id(row[level][1])] if level < len(row) else len(places) for row in rows)
            for level in range(max(map(len, rows)))
        ]

    def term(self, call: AttentionCall) -> Tensor:
        """Return the sum of each row's terms.

        Args:
            call: For a batch of as many rows, or of a multiple: then each row counts that many
                times in succession, as beam search lays them out.

        Raises:
            OptionsError: The batch has another number of rows.
        """
        repeats = repeats_of(call.query.shape[0], self._num_rows)
        folded = folded_prompts(self._entries, call, are_rows=True)
        terms = [self._level(index, folded, call, repeats) for index in self._levels]
        return sum(terms[1:], start=terms[0])

    def stacked(self, call: AttentionCall) -> Stacked:
        """Return what the rows attend to, of at most one adapter each."""
        (index,) = self._levels
        return _gathered(index, folded_prompts(self._entries, call, are_rows=True).pairs, 1)

    def _level(
        self, index: tuple[int, ...], folded: FoldedPrompts, call: AttentionCall, repeats: int
    ) -> Tensor:
        query = call.query
        if query.shape[2] < LONG:
            stacked = folded.stacked.get((index, repeats))
            if stacked is None:
                stacked = _gathered(index, folded.pairs, repeats)
                folded.stacked[index, repeats] = stacked
            return row_prompt_attention(
                query, *stacked, scaling=call.scaling, may_fuse=call.may_fuse
            )
        total: Tensor | None = None
        for place in sorted(set(index) - {len(self._entries)}):
            rows = rows_at(index, place, repeats)
            term = folded_prompt_attention(
                query[rows], *folded.pairs[place], scaling=call.scaling, may_fuse=call.may_fuse
            )
            if total is None:
                total = term.new_zeros(len(query), *term.shape[1:])
            total[rows] = term
        return cast("Tensor", total)


def _gathered(index: Sequence[int], pairs: Sequence[Folded], repeats: int) -> Stacked:
    """Return keys, gated values and bias of each row, in float32 or wider.

    For one query in bfloat16 that takes a third of the time.

    Args:
        index: For each row the place of its pair; one beyond the last for a row of the base.
        pairs: Keys and gated values of each adapter.
        repeats: How many rows in succession each row stands for.
    """
    wide = torch.promote_types(pairs[0][0].dtype, torch.float32)
    used = set(index)
    lengths = [key.shape[2] if place in used else 0 for place, (key, _) in enumerate(pairs)]
    longest = max(lengths)
    lengths.append(longest)
    at = [place for place in index for _ in range(repeats)]
    # (batch, heads, prompt_len, head_dim), zeros beyond each prompt and for rows of the base.
    key, value = (
        torch.cat(
            [
                pad(one[:, :, :longest].to(wide), (0, 0, 0, longest - one[:, :, :longest].shape[2]))
                for one in ones
            ]
            + [ones[0].new_zeros(1, ones[0].shape[1], longest, ones[0].shape[3], dtype=wide)]
        )[at]
        for ones in zip(*pairs, strict=True)
    )
    ends = [lengths[place] for place in at]
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
    return RowTerms(rows).stacked(AttentionCall(query=query, scaling=1.0))


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

    def term(self, call: AttentionCall, *, is_projected: bool) -> Tensor | None:
        """Return the term at the attention module; None for none."""
        if is_projected not in self._rows:
            return None
        if is_projected in self._terms:
            return self._terms[is_projected].term(call)
        terms = prompt_terms(self._rows[is_projected][0], call)
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
