"""Rows of a batch with adapters of their own, in buffers that compiled code reads."""

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from surgery_adaption_prompt.architectures import architecture_of
from surgery_adaption_prompt.attention import AdaptedAttention, compose
from surgery_adaption_prompt.config import AdaptionPromptConfig
from surgery_adaption_prompt.functional import row_prompt_attention
from surgery_adaption_prompt.parts import Attention, AttentionArchitecture, AttentionCall, Entry
from surgery_adaption_prompt.rows import stacked_rows
from surgery_core import (
    BoundRule,
    ContractError,
    Effects,
    Operation,
    OptionsError,
    Rule,
    Selector,
    Site,
    Tree,
    Where,
    is_sharded,
    listed,
)

NAME = "adaption_prompt_fixed_rows"
KEY, VALUE, BIAS = "adaption_row_key", "adaption_row_value", "adaption_row_bias"

Rows = Mapping[str, Sequence[Sequence[Entry]]]
"""By FQN, for each row the adapters whose terms are added."""


class BufferedPart:
    """What each row of a batch gets at a module, read from buffers of the module."""

    def __init__(self, config: AdaptionPromptConfig, *, max_rows: int) -> None:
        self.config = config
        self.max_rows = max_rows

    def term(self, attention: Attention, call: AttentionCall) -> Tensor:
        """Return the term of the first rows; see `OwnTerm.term`.

        Raises:
            OptionsError: The batch has more rows than there is room for.
        """
        batch = call.query.shape[0]
        if batch > self.max_rows:
            msg = f"Batch has {batch} rows: expected at most max_rows={self.max_rows}. Make room."
            raise OptionsError(msg)
        key, value, bias = (getattr(attention, name)[:batch] for name in (KEY, VALUE, BIAS))
        return row_prompt_attention(
            call.query, key, value, bias, scaling=call.scaling, may_fuse=call.may_fuse
        )


class FixedRows:
    """Says which adapter each row of the batches to come gets, without new tensors.

    What was compiled or captured stays good. Values are those the adapters have when they are
    assigned: assign again after training.

    Args:
        modules: The modules with buffers, by FQN.
        resolve: Looks up the adapters of some rows.
        max_rows: How many rows there is room for.
    """

    def __init__(
        self,
        modules: Mapping[str, AdaptedAttention],
        resolve: Callable[[Sequence[str]], Rows],
        *,
        max_rows: int,
    ) -> None:
        self._modules = modules
        self._resolve = resolve
        self._max_rows = max_rows

    def assign(self, adapter_names: Sequence[str]) -> None:
        """Give each row of a batch an adapter; rows beyond the last name are the base's.

        Args:
            adapter_names: An adapter for each row, or `"__base__"`.

        Raises:
            OptionsError: There are more names than rows, or a prompt is longer than the buffers;
                nothing was changed.
            VariantError: There is no such adapter; nothing was changed.
        """
        if not 0 < len(adapter_names) <= self._max_rows:
            msg = (
                f"adapter_names has {len(adapter_names)} names: expected 1 to "
                f"max_rows={self._max_rows}, one for each row."
            )
            raise OptionsError(msg)
        bad = [name for name in adapter_names if not isinstance(name, str)]
        if bad:
            msg = f"adapter_names has {bad[0]!r}: expected one adapter's name for each row."
            raise OptionsError(msg)
        rows = self._resolve(adapter_names)
        self._check_places(rows)
        with torch.no_grad():
            found = {
                fqn: _stacked(module, rows[fqn])
                for fqn, module in self._modules.items()
                if fqn in rows
            }
            for fqn, module in self._modules.items():
                _fill_(module, found.get(fqn))

    def _check_places(self, rows: Rows) -> None:
        """Refuse adapters for which the modules with buffers were not made."""
        missing = sorted(rows.keys() - self._modules.keys())
        if missing:
            msg = (
                f"Adapters have modules at {listed(missing)}, where there are no buffers: expected "
                "adapters of layers that some adapter had when fixed_rows was called. Call it again."
            )
            raise OptionsError(msg)
        for fqn, chosen in rows.items():
            (own,) = self._modules[fqn].parts
            for _, part in (entry for row in chosen for entry in row):
                if part.config.project_output is not own.config.project_output:
                    msg = (
                        f"Adapter adds its term on another side of the output projection at {fqn!r} "
                        "than those fixed_rows was called with. Use adapter_names."
                    )
                    raise OptionsError(msg)


class FixedRowsOperation(Operation[None]):
    """Put modules with buffers for rows on a model; not offered to sessions.

    Args:
        fqns: Where.
        max_rows: How many rows there is room for.
        adapter_len: How long their prompts may be, in tokens.
        config: Says whether the terms go through the output projection.
    """

    name = NAME
    summary = "Adaption prompts for each row of a batch, in buffers."

    def __init__(
        self, fqns: frozenset[str], *, max_rows: int, adapter_len: int, config: AdaptionPromptConfig
    ) -> None:
        self._fqns = fqns
        self._max_rows = max_rows
        self._adapter_len = adapter_len
        self._config = config

    def parse_options(self, options: Mapping[str, Any]) -> None:
        """Take none."""

    def targets(self, tree: Tree, options: None) -> Selector:  # noqa: ARG002 (any tree)
        """Choose the modules of all adapters."""
        return Where(lambda fqn, _: fqn in self._fqns, "attention modules of all adapters")

    def describe(self, site: Site, options: None) -> Effects:  # noqa: ARG002 (the same for all)
        """Return that no key of the state dict changes: the buffers are not saved."""
        return Effects()

    def build(self, site: Site, options: None) -> AdaptedAttention:  # noqa: ARG002 (it has none)
        """Return the attention module of the site with empty buffers."""
        architecture = architecture_of(site.module, fqn=site.fqn)
        if any(map(is_sharded, site.module.parameters())):
            msg = (
                f"fixed_rows is not possible at {site.fqn!r}: expected whole weights, got some that "
                "are spread over processes. Use adapter_names."
            )
            raise ContractError(msg, fqn=site.fqn, expected="whole weights", actual="sharded ones")
        query = _query(site.module, architecture, self._max_rows)
        with torch.no_grad():
            prompt = query.new_zeros(1, self._adapter_len, architecture.sizes(site.module)[0])
            key, value = architecture.project(site.module, prompt, head_dim=query.shape[-1])
        heads, shape = query.shape[1], (self._max_rows, 1, 1, self._adapter_len)
        # As `rows` gathers them.
        dtype = torch.promote_types(query.dtype, torch.float32)
        buffers = {
            name: found.new_zeros(self._max_rows, heads, *found.shape[1:], dtype=dtype)
            for name, found in ((KEY, key), (VALUE, value))
        }
        buffers[BIAS] = key.new_zeros(shape, dtype=dtype)
        part = BufferedPart(self._config, max_rows=self._max_rows)
        return compose(site.module, architecture, [part], {}, buffers=buffers)


def fixed_rows_rule(
    adapters: Sequence[Mapping[str, AdaptedAttention]], *, max_rows: int, adapter_len: int | None
) -> BoundRule:
    """Return the rule that puts modules with buffers for rows on a model.

    Args:
        adapters: Modules of each adapter by FQN, at least one.
        max_rows: How many rows there is room for.
        adapter_len: How long their prompts may be, in tokens; None for the longest there is.

    Raises:
        OptionsError: A size is less than 1, or some adapters add their terms before the output
            projection and some after it.
    """
    configs = [part.config for found in adapters for m in found.values() for part in m.prompts]
    length = max(config.adapter_len for config in configs) if adapter_len is None else adapter_len
    if max_rows < 1 or length < 1:
        msg = (
            f"fixed_rows needs sizes of at least 1, got max_rows={max_rows}, adapter_len={length}."
        )
        raise OptionsError(msg)
    if len({config.project_output for config in configs}) > 1:
        msg = (
            "fixed_rows is not possible: expected adapters that all add their terms before the "
            "output projection, or all after it. Use adapter_names."
        )
        raise OptionsError(msg)
    operation = FixedRowsOperation(
        frozenset(fqn for found in adapters for fqn in found),
        max_rows=max_rows,
        adapter_len=length,
        config=configs[0],
    )
    return BoundRule(rule=Rule(operation=NAME), operation=operation)


def _query(attention: nn.Module, architecture: AttentionArchitecture, rows: int) -> Tensor:
    """Return something with shape and dtype of a query; its values do not matter."""
    _, heads = architecture.sizes(attention)
    weight = next(p for p in attention.parameters() if p.is_floating_point())
    return weight.new_zeros(rows, heads, 1, architecture.head_dim(attention))


def _stacked(
    module: AdaptedAttention, rows: Sequence[Sequence[Entry]]
) -> tuple[Tensor, Tensor, Tensor | None]:
    key, value, bias = stacked_rows(rows, _query(module, module.architecture, len(rows)))
    room = getattr(module, KEY).shape[2]
    if key.shape[2] > room:
        msg = (
            f"Prompt has {key.shape[2]} tokens: expected at most adapter_len={room}, for which "
            "there is room. Ask fixed_rows for more."
        )
        raise OptionsError(msg)
    return key, value, bias


def _fill_(module: AdaptedAttention, found: tuple[Tensor, Tensor, Tensor | None] | None) -> None:
    key, value, bias = (getattr(module, name) for name in (KEY, VALUE, BIAS))
    value.zero_()
    bias.zero_()
    if found is None:
        return
    rows, length = found[0].shape[0], found[0].shape[2]
    key[:rows, :, :length].copy_(found[0])
    value[:rows, :, :length].copy_(found[1])
    # Rows of the base keep all positions, all of them with values of zero.
    is_base = ~found[1].flatten(1).any(dim=1)
    bias[:rows, ..., length:] = bias.new_zeros(rows).masked_fill(~is_base, -inf)[
        :, None, None, None
    ]
    if found[2] is not None:
        bias[:rows, ..., :length] = found[2]
