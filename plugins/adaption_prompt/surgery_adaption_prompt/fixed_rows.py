"""Rows of a batch with adapters of their own, in buffers that compiled code reads."""

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery_adaption_prompt.architectures import architecture_of
from surgery_adaption_prompt.attention import AdaptedAttention, compose
from surgery_adaption_prompt.config import AdaptionPromptConfig
from surgery_adaption_prompt.functional import row_prompt_attention
from surgery_adaption_prompt.parts import Attention, AttentionArchitecture, AttentionCall, Entry
from surgery_adaption_prompt.rows import RowTerms, stacked_rows
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
COUNT = "adaption_row_count"

Rows = Mapping[str, Sequence[Sequence[Entry]]]
"""By FQN, for each row the adapters whose terms are added."""


class BufferedPart:
    """What each row of a batch gets at a module.

    Compiled and captured code reads buffers of the module, since it sees nothing else that changes.
    All other code asks the adapters, as they are in that pass.

    Attributes:
        rows: What the rows were assigned; None if they all are the base's.
    """

    def __init__(self, config: AdaptionPromptConfig, *, max_rows: int) -> None:
        self.config = config
        self.max_rows = max_rows
        self.rows: RowTerms | None = None

    def term(self, attention: Attention, call: AttentionCall) -> Tensor:
        """Return the term of the rows; see `OwnTerm.term`.

        Raises:
            OptionsError: The batch has more rows than there is room for, or is no multiple of the
                rows that were assigned.
        """
        batch = call.query.shape[0]
        if batch > self.max_rows:
            msg = f"Batch has {batch} rows: expected at most max_rows={self.max_rows}. Make room."
            raise OptionsError(msg)
        key, value, bias, count = (getattr(attention, name) for name in (KEY, VALUE, BIAS, COUNT))
        if _is_captured(call.query):
            # Row i of a batch of n times `count` rows is row i // n; the graph stays good, whatever
            # the count is. For a batch that is no multiple the index is one that there is not.
            row = torch.arange(batch, device=count.device)
            row = torch.where(batch % count == 0, row * count // batch, self.max_rows)
            found = (buffer.index_select(0, row) for buffer in (key, value, bias))
            return row_prompt_attention(
                call.query, *found, scaling=call.scaling, may_fuse=call.may_fuse
            )
        if self.rows is None:
            # (batch, query_len, heads, value_dim): the term of the base is nothing.
            return call.query.new_zeros(batch, call.query.shape[2], value.shape[1], value.shape[3])
        return self.rows.term(call)


class FixedRows:
    """Says which adapter each row of the batches to come gets, without new tensors.

    What was compiled or captured stays good. It has the values that the adapters had when they were
    assigned, loaded by `hotswap_adapter` or `load_state_dict`, or moved; after training, or after
    writing to a tensor yourself, call `refresh`. Code that runs uncompiled sees such writes at once.

    Args:
        modules: The modules with buffers, by FQN.
        resolve: Looks up the adapters of some rows.
        max_rows: How many rows there is room for.

    Attributes:
        names: The adapter of each row, as they were assigned last.
        is_open: Whether the modules are in the model, or will be when it is enabled.
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
        self._rows: Rows = {}
        self.names: tuple[str, ...] = ()
        self.is_open = True

    def assign(self, adapter_names: Sequence[str]) -> None:
        """Give each row of a batch an adapter.

        A batch of n times as many rows gives each to n rows in succession, as beam search lays them
        out; any other batch is refused. Name `"__base__"` for rows that only fill a batch up.

        Args:
            adapter_names: An adapter for each row, or `"__base__"`.

        Raises:
            OptionsError: There are more names than rows, or a prompt is longer than the buffers, or
                `fixed_rows` has ended; nothing was changed.
            VariantError: There is no such adapter; nothing was changed.
        """
        if isinstance(adapter_names, str | bytes) or not isinstance(adapter_names, Sequence):
            msg = f"adapter_names is {adapter_names!r}: expected a list with a name for each row."
            raise OptionsError(msg)
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
        if not self.is_open:
            msg = (
                "Rows cannot be assigned: fixed_rows has ended, or another adapter was activated "
                "inside. Call fixed_rows again."
            )
            raise OptionsError(msg)
        rows = self._resolve(adapter_names)
        self._check_places(rows)
        self._fill(rows, count=len(adapter_names))
        for fqn, module in self._modules.items():
            (part,) = cast("tuple[BufferedPart]", module.parts)
            part.rows = RowTerms(rows[fqn]) if fqn in rows else None
        self._rows, self.names = rows, tuple(adapter_names)

    def refresh(self) -> None:
        """Give compiled code the values that the assigned adapters have now."""
        if self.names:
            self._fill(self._rows, count=len(self.names))

    def _fill(self, rows: Rows, *, count: int) -> None:
        """Write the buffers, after everything that goes into them has been computed."""
        # Also for who asks in inference mode: buffers made there could not be written outside it.
        with torch.inference_mode(mode=False), torch.no_grad():
            found = {
                fqn: _stacked(module, rows[fqn])
                for fqn, module in self._modules.items()
                if fqn in rows
            }
            for fqn, module in self._modules.items():
                _fill_(module, found.get(fqn), count=count)

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
        # All rows are the base's: any batch is a multiple of one of them.
        buffers[COUNT] = key.new_ones((), dtype=torch.int64)
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
    if not all(type(size) is int and size >= 1 for size in (max_rows, length)):
        msg = (
            f"fixed_rows needs sizes of at least 1, got max_rows={max_rows!r}, "
            f"adapter_len={length!r}. Pass integers."
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


def _is_captured(query: Tensor) -> bool:
    """Tell whether what runs is written down, to be run again without Python."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]  # untyped in torch
        or (query.is_cuda and torch.cuda.is_current_stream_capturing())
    )


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


def _fill_(
    module: AdaptedAttention, found: tuple[Tensor, Tensor, Tensor | None] | None, *, count: int
) -> None:
    for name in (KEY, VALUE, BIAS, COUNT):
        buffer = getattr(module, name)
        # The model may have moved to a narrower dtype, which cannot hold all values, or in inference
        # mode.
        is_narrow = found is not None and name != COUNT and buffer.dtype is not found[0].dtype
        if is_narrow or buffer.is_inference():
            dtype = found[0].dtype if found is not None and is_narrow else buffer.dtype
            module._buffers[name] = torch.zeros_like(buffer, dtype=dtype)  # noqa: SLF001 (torch's registry)
    key, value, bias = (getattr(module, name) for name in (KEY, VALUE, BIAS))
    getattr(module, COUNT).fill_(count)
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
