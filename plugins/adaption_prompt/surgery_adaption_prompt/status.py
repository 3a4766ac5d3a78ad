"""What adapters are made of, where they are, and how far their gates are open."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from surgery_adaption_prompt.attention import AdaptedAttention
from surgery_adaption_prompt.config import AdaptionPromptConfig, Gate, GateActivation
from surgery_adaption_prompt.functional import activate_gate
from surgery_adaption_prompt.parts import GATE
from surgery_core import SwapState, format_table

GateValues = tuple[float, ...]
"""Gates of one layer after their activation: one for each head, or a single one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterStatus:
    """What one adapter is made of, as it was when this was made.

    Args:
        name: The adapter's.
        adapter_len: K, in tokens.
        adapter_layers: L, how many layers are adapted.
        gate: One gate for each layer or each head.
        gate_activation: What is applied to the gates before use.
        num_parameters: How many values it has, those of modules saved whole included.
        num_trainable: How many of them get gradients.
        num_bytes: What they take; of parameters sharded over processes, in all of these together.
        devices: Where they are, sorted.
        dtypes: Names without the `torch.` prefix, sorted.
        gates: By FQN of the attention module, lower layers first, after activation; None where
            this process has no values: on the meta device, or sharded over processes.
        condition_size: Features for each row that the prompts depend on; None for none.
        condition_rank: Rank of what projects them; None for none.
    """

    name: str
    adapter_len: int
    adapter_layers: int
    gate: Gate
    gate_activation: GateActivation
    num_parameters: int
    num_trainable: int
    num_bytes: int
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    gates: Mapping[str, GateValues | None]
    condition_size: int | None = None
    condition_rank: int | None = None

    @property
    def prompt_kind(self) -> str:
        """`adapter_len`, with the features where there are some, for example `"10 + f(64)"`."""
        given = "" if self.condition_size is None else f" + f({self.condition_size})"
        return f"{self.adapter_len}{given}"

    @property
    def gate_kind(self) -> str:
        """`gate`, with the activation where there is one, for example `"head, tanh"`."""
        return (
            self.gate
            if self.gate_activation == "identity"
            else f"{self.gate}, {self.gate_activation}"
        )

    @property
    def mean_gate_magnitude(self) -> float | None:
        """Mean of |gate| over layers and heads; None where a layer has no values."""
        magnitudes = self._magnitudes()
        return sum(magnitudes) / len(magnitudes) if magnitudes else None

    @property
    def max_gate_magnitude(self) -> float | None:
        """Largest |gate|, not a number if one of them is none; None where a layer has no values."""
        magnitudes = self._magnitudes()
        if any(map(math.isnan, magnitudes)):
            return math.nan
        return max(magnitudes, default=None)

    def to_mapping(self) -> dict[str, Any]:
        """Return all of it as `json` writes it; numbers that are not finite become None."""
        return {
            "name": self.name,
            "adapter_len": self.adapter_len,
            "adapter_layers": self.adapter_layers,
            "gate": self.gate,
            "gate_activation": self.gate_activation,
            "condition_size": self.condition_size,
            "condition_rank": self.condition_rank,
            "num_parameters": self.num_parameters,
            "num_trainable": self.num_trainable,
            "num_bytes": self.num_bytes,
            "devices": list(self.devices),
            "dtypes": list(self.dtypes),
            "mean_gate_magnitude": _finite(self.mean_gate_magnitude),
            "max_gate_magnitude": _finite(self.max_gate_magnitude),
            "gates": {
                fqn: None if values is None else [_finite(value) for value in values]
                for fqn, values in self.gates.items()
            },
        }

    def _magnitudes(self) -> list[float]:
        """Return |gate| of all layers and heads; nothing where a layer has no values."""
        found = [values for values in self.gates.values() if values is not None]
        if len(found) < len(self.gates):
            return []
        return [abs(value) for values in found for value in values]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """All adapters of a model and which of them is in it; printed, it is a table.

    Args:
        selected: The adapter that is active, or will be when adapters are enabled; several if they
            are combined.
        is_enabled: Whether what is selected is in the model.
        stored: Names of the adapters outside the model.
        adapters: What each is made of, in the order they were added.
    """

    selected: tuple[str, ...]
    is_enabled: bool
    stored: tuple[str, ...]
    adapters: tuple[AdapterStatus, ...]

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the adapters in the model now."""
        return self.selected if self.is_enabled else ()

    @property
    def num_parameters(self) -> int:
        """How many values all adapters have."""
        return sum(adapter.num_parameters for adapter in self.adapters)

    @property
    def num_trainable(self) -> int:
        """How many of them get gradients when their adapter is active."""
        return sum(adapter.num_trainable for adapter in self.adapters)

    @property
    def num_bytes(self) -> int:
        """What all adapters take, in the model and outside it."""
        return sum(adapter.num_bytes for adapter in self.adapters)

    def state_of(self, name: str) -> str:
        """Return `"active"`, `"selected, disabled"` or `"stored"`."""
        if name not in self.selected:
            return "stored"
        return "active" if self.is_enabled else "selected, disabled"

    def to_mapping(self) -> dict[str, Any]:
        """Return all of it as `json` writes it; numbers that are not finite become None."""
        return {
            "selected": list(self.selected),
            "active": list(self.active),
            "is_enabled": self.is_enabled,
            "stored": list(self.stored),
            "num_parameters": self.num_parameters,
            "num_trainable": self.num_trainable,
            "num_bytes": self.num_bytes,
            "adapters": [
                {**adapter.to_mapping(), "state": self.state_of(adapter.name)}
                for adapter in self.adapters
            ],
        }

    def __str__(self) -> str:
        if not self.adapters:
            return "No adapters."
        columns = (
            *("adapter", "state", "layers", "K", "gate", "parameters", "bytes", "devices"),
            *("dtypes", "mean |gate|", "max |gate|"),
        )
        rows = [
            (adapter.name, self.state_of(adapter.name), *described(adapter))
            for adapter in self.adapters
        ]
        adapters = "1 adapter" if len(rows) == 1 else f"{len(rows)} adapters"
        total = (
            f"Total: {adapters}, {self.num_parameters:,} parameters ({self.num_trainable:,} "
            f"trainable), {self.num_bytes:,} bytes."
        )
        active = [_gate_table(a) for a in self.adapters if a.name in self.active]
        return "\n\n".join([f"{format_table(columns, rows)}\n{total}", *active])


def adapter_status(
    name: str, config: AdaptionPromptConfig, modules: Mapping[str, nn.Module]
) -> AdapterStatus:
    """Look at the modules of an adapter, wherever they are; nothing is changed.

    Args:
        name: The adapter's.
        config: Its configuration.
        modules: Its modules by FQN, adapted attention modules and those saved whole.
    """
    return tensors_status(name, config, dict(_tensors(modules)))


def tensors_status(
    name: str, config: AdaptionPromptConfig, tensors: Mapping[str, Tensor]
) -> AdapterStatus:
    """Look at the tensors of an adapter, as they are in a model or in a folder.

    Args:
        name: The adapter's.
        config: Its configuration.
        tensors: By `fqn.name`, as `adapter_state` gives them.

    Example:
        >>> import torch
        >>> config = AdaptionPromptConfig(adapter_len=4, adapter_layers=1, gate="head")
        >>> tensors = {
        ...     "layers.7.attn.adaption_gate": torch.tensor([0.5, -0.25]),
        ...     "layers.7.attn.adaption_prompt": torch.ones(1, 4, 8),
        ... }
        >>> status = tensors_status("legal", config, tensors)
        >>> status.num_parameters, status.gates, status.max_gate_magnitude
        (34, {'layers.7.attn': (0.5, -0.25)}, 0.5)
    """
    suffix = f".{GATE}"
    gates = {key.removesuffix(suffix): t for key, t in tensors.items() if key.endswith(suffix)}
    return AdapterStatus(
        name=name,
        adapter_len=config.adapter_len,
        adapter_layers=config.adapter_layers,
        gate=config.gate,
        gate_activation=config.gate_activation,
        condition_size=config.condition_size,
        condition_rank=None if config.condition_size is None else config.condition_rank,
        num_parameters=sum(tensor.numel() for tensor in tensors.values()),
        num_trainable=sum(tensor.numel() for tensor in tensors.values() if tensor.requires_grad),
        num_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        devices=tuple(sorted({str(tensor.device) for tensor in tensors.values()})),
        dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})),
        gates={
            fqn: _gate_values(gates[fqn], config.gate_activation)
            for fqn in sorted(gates, key=_by_number)
        },
    )


def model_status(
    *,
    swap_state: SwapState,
    configs: Mapping[str, AdaptionPromptConfig],
    selected: Sequence[str] | None = None,
) -> ModelStatus:
    """Look at all adapters of a model; nothing is changed or moved.

    Args:
        swap_state: Which adapters there are, and which is in the model.
        configs: Their configurations by name; each names a variant.
        selected: Names of the adapters that the selected variant is made of, where these are
            several; None if it is an adapter itself.

    Raises:
        VariantError: A name in `configs` is no variant's.
    """
    if selected is None:
        selected = () if swap_state.selected is None else (swap_state.selected,)
    return ModelStatus(
        selected=tuple(selected),
        is_enabled=swap_state.is_enabled,
        stored=tuple(name for name in swap_state.stored if name in configs),
        adapters=tuple(
            adapter_status(name, config, swap_state.variant(name))
            for name, config in configs.items()
        ),
    )


def described(adapter: AdapterStatus) -> tuple[str, ...]:
    """Return the cells that tables show of every adapter, from its layers to its largest gate."""
    return (
        str(adapter.adapter_layers),
        adapter.prompt_kind,
        adapter.gate_kind,
        f"{adapter.num_parameters:,}",
        f"{adapter.num_bytes:,}",
        ", ".join(adapter.devices),
        ", ".join(adapter.dtypes),
        _short(adapter.mean_gate_magnitude),
        _short(adapter.max_gate_magnitude),
    )


def _tensors(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Yield an adapter's tensors with `fqn.name`; unlike `adapter_state`, not detached."""
    for fqn, module in modules.items():
        if isinstance(module, AdaptedAttention):
            own: Mapping[str, Tensor] = module.prompt_parameters()
        else:
            own = module.state_dict(keep_vars=True)
        yield from ((f"{fqn}.{name}", tensor) for name, tensor in own.items())


def _gate_values(gate: Tensor, activation: GateActivation) -> GateValues | None:
    gate = gate.detach()
    # A sharded parameter is of a class of its own; to gather it all processes would have to ask.
    if gate.is_meta or type(gate) is not Tensor:
        return None
    # (1,) or (heads,), in some folders with further axes of size one -> (gates,)
    return tuple(activate_gate(gate, activation).flatten().tolist())


def _gate_table(adapter: AdapterStatus) -> str:
    """Write |gate| of each layer, by head where heads have their own."""
    num_columns = max((len(values or ()) for values in adapter.gates.values()), default=0)
    by_head = adapter.gate == "head"
    columns = [str(head) for head in range(max(num_columns, 1))] if by_head else ["|gate|"]
    rows = []
    for fqn, values in adapter.gates.items():
        cells = ["no values"] if values is None else [_short(abs(value)) for value in values]
        rows.append([fqn, *cells, *[""] * (len(columns) - len(cells))])
    kind = "|gate| by head" if by_head else "|gate|"
    return f"Active: {adapter.name!r}, {kind}\n{format_table(['module', *columns], rows)}"


def _short(value: float | None) -> str:
    """Write with three significant digits, so that a small gate does not look closed."""
    return "no values" if value is None else f"{value:.3g}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _by_number(fqn: str) -> list[tuple[int, str]]:
    """Return a key that sorts `layers.9` before `layers.10`, as files do not."""
    parts = re.split(r"(\d+)", fqn)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
