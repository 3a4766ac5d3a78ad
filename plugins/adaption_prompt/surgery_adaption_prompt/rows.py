"""Terms of several adapters at one attention module: for a whole batch, or for each row its own."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from surgery_adaption_prompt.attention import AdaptedAttention
from surgery_adaption_prompt.baked import BakedPrompt
from surgery_adaption_prompt.functional import fold_gate, row_prompt_attention
from surgery_adaption_prompt.parts import PromptPart
from surgery_core import OptionsError

Entry = tuple[AdaptedAttention, PromptPart]
"""An adapter's share at a module: what has the parameters, and which, with what weight."""

Stacked = tuple[Tensor, Tensor, Tensor | None]
"""Keys, gated values and mask of each row, for `row_prompt_attention`."""


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
        batch = query.shape[0]
        if batch % self._num_rows:
            msg = (
                f"Batch has {batch} rows: expected {self._num_rows}, one for each adapter name, or "
                "a multiple of that. Name one adapter for each row."
            )
            raise OptionsError(msg)
        repeats = batch // self._num_rows
        terms = [
            row_prompt_attention(
                query,
                *layer.stacked(query, repeats=repeats, is_training=is_training),
                scaling=scaling,
            )
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
        self._kept: tuple[list[BakedPrompt], int, Stacked] | None = None

    def stacked(self, query: Tensor, *, repeats: int, is_training: bool) -> Stacked:
        """Return what the rows attend to; gathered once as long as nothing of it changes."""
        found = [part.baked(at, query, is_training=is_training) for at, part in self._entries]
        baked = [one for one in found if one is not None]
        if len(baked) < len(found):
            return self._gather([_folded(*entry, query) for entry in self._entries], repeats)
        kept = self._kept
        if kept is None or kept[1] != repeats or any(map(_differ, kept[0], baked)):
            pairs = [(one.key, one.value) for one in baked]
            kept = self._kept = (baked, repeats, self._gather(pairs, repeats))
        return kept[2]

    def _gather(self, pairs: Sequence[tuple[Tensor, Tensor]], repeats: int) -> Stacked:
        lengths = [key.shape[2] for key, _ in pairs]
        longest = max(lengths)
        # (adapters, heads, prompt_len, head_dim), zeros beyond each one's length.
        key = torch.cat([pad(key, (0, 0, 0, longest - key.shape[2])) for key, _ in pairs])
        value = torch.cat([pad(value, (0, 0, 0, longest - value.shape[2])) for _, value in pairs])
        if max(self._index) == len(pairs):
            # A row of the base attends to values of zero.
            key = torch.cat([key, torch.zeros_like(key[:1])])
            value = torch.cat([value, torch.zeros_like(value[:1])])
            lengths.append(longest)
        index = torch.tensor(self._index, device=key.device).repeat_interleave(repeats)
        mask = None
        if len(set(lengths)) > 1:
            ends = torch.tensor(lengths, device=key.device)[index]
            # Seen as (batch, 1, 1, prompt_len).
            mask = (torch.arange(longest, device=key.device) < ends[:, None])[:, None, None]
        return key[index], value[index], mask


def stacked_rows(rows: Sequence[Sequence[Entry]], query: Tensor) -> Stacked:
    """Return what the rows attend to, of at most one adapter each.

    Args:
        rows: For each row its adapter, or none.
        query: Has the shape, dtype and device of the queries; its values do not matter.
    """
    layer = _Layer([row[0] if row else None for row in rows])
    return layer.stacked(query, repeats=1, is_training=False)


class SharedTerms:
    """What code gets from the attention modules of a model in place of the active adapter's terms.

    Args:
        rows: By the `id` of a base attention module, the adapters of each row. A single row stands
            for a whole batch, of any size.
    """

    def __init__(self, rows: Mapping[int, Sequence[Sequence[Entry]]]) -> None:
        self._rows = {
            (site, is_projected): chosen
            for site, at in rows.items()
            for is_projected in (True, False)
            if any(chosen := [_of_kind(row, is_projected=is_projected) for row in at])
        }
        self._terms = {
            site: RowTerms(chosen) for site, chosen in self._rows.items() if len(chosen) > 1
        }

    def term(
        self, attention: AdaptedAttention, query: Tensor, *, scaling: float, is_projected: bool
    ) -> Tensor | None:
        """Return the term at an attention module; see `PromptPart.term`."""
        site = id(attention.base_attention), is_projected
        if site not in self._rows:
            return None
        if site in self._terms:
            return self._terms[site].term(query, scaling=scaling, is_training=attention.training)
        terms = [
            part.term(at, query, scaling=scaling, is_training=attention.training)
            for at, part in self._rows[site][0]
        ]
        return sum(terms[1:], start=terms[0])


def _of_kind(row: Sequence[Entry], *, is_projected: bool) -> list[Entry]:
    return [entry for entry in row if entry[1].config.project_output is is_projected]


def _differ(left: BakedPrompt, right: BakedPrompt) -> bool:
    return left is not right


def _folded(attention: AdaptedAttention, part: PromptPart, query: Tensor) -> tuple[Tensor, Tensor]:
    key, value, gate = part.prepared(attention, query)
    if query.dtype is torch.float16:
        # Gated values, and logits, may exceed what float16 can hold.
        key, value = key.float(), value.float()
    return fold_gate(key, value, gate, heads=query.shape[1])
