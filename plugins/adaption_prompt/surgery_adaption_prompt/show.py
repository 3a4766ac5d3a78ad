"""What `surgery show` says of folders with adapters: configuration and tensors, without a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery_adaption_prompt.checkpoints import CONFIG_FILE, AdapterFolder, written_values
from surgery_adaption_prompt.config import OWN_TYPE, PEFT_TYPE, AdaptionPromptConfig
from surgery_adaption_prompt.folders import DEFAULT_ADAPTER
from surgery_adaption_prompt.parts import CONDITION_DOWN, GATE, PROMPT
from surgery_adaption_prompt.status import AdapterStatus, described, tensors_status
from surgery_core import Shown, StateError, SurgeryError, listed

COLUMNS = (
    *("adapter", "type", "layers", "K", "gate", "parameters", "bytes", "dtypes", "mean |gate|"),
    *("max |gate|", "base model"),
)
OURS = (PEFT_TYPE, OWN_TYPE)


@dataclass(frozen=True, slots=True, kw_only=True)
class _SavedAdapter:
    """One adapter on disk; `peft_type` is the one written, which says whether PEFT loads it."""

    peft_type: str
    config: AdaptionPromptConfig
    status: AdapterStatus
    notes: tuple[str, ...]

    @classmethod
    def of(cls, name: str, found: AdapterFolder, peft_type: str) -> "_SavedAdapter":
        config, state = found.config(), found.state
        strange = sorted(key for key, found in state.items() if _is_complex_gate(key, found))
        if strange:
            msg = (
                f"{found.folder!r} is no adapter: expected real numbers, got complex ones under "
                f"{listed(strange)}. Pass a folder that save_pretrained wrote."
            )
            raise StateError(msg, mismatched=strange)
        status = tensors_status(name, config, state)
        return cls(peft_type=peft_type, config=config, status=status, notes=_notes(status, state))

    def row(self) -> tuple[str, ...]:
        layers, length, gate, parameters, num_bytes, _, dtypes, mean, most = described(self.status)
        base = self.config.base_model_name_or_path or "-"
        name = self.status.name
        return (
            *(name, self.peft_type, layers, length, gate, parameters, num_bytes, dtypes),
            *(mean, most, base),
        )

    def to_mapping(self) -> dict[str, Any]:
        values = self.status.to_mapping()
        # What holds for parameters in a model only.
        for name in ("devices", "num_trainable"):
            del values[name]
        base = self.config.base_model_name_or_path
        return {**values, "peft_type": self.peft_type, "base_model_name_or_path": base}


def show_folder(source: str) -> Shown | None:
    """Describe the adapters in a folder and in its subfolders, as `save_pretrained` writes them.

    Args:
        source: The folder.

    Returns:
        A row for each adapter, that in the folder itself first, as `default`; the data has the
        gates after activation, by FQN and head. None if there is no adapter of this method.

    Raises:
        SurgeryError: An adapter cannot be read.
    """
    root = Path(source)
    if not root.is_dir():
        return None
    inside = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    folders = [(DEFAULT_ADAPTER, root), *((path.name, path) for path in inside)]
    found = [
        (name, folder, _peft_type(folder))
        for name, folder in folders
        if (folder / CONFIG_FILE).is_file()
    ]
    adapters = [
        _SavedAdapter.of(name, AdapterFolder.read(folder), kind)
        for name, folder, kind in found
        if kind in OURS
    ]
    if not adapters:
        return None
    notes = [note for adapter in adapters for note in adapter.notes]
    others = [name for name, _, kind in found if kind not in OURS]
    if others:
        notes.append(f"Adapters of other methods are left out: {listed(others)}.")
    return Shown(
        title=f"Adaption prompts in {source!r}",
        columns=COLUMNS,
        rows=tuple(adapter.row() for adapter in adapters),
        notes=tuple(notes),
        data={
            "source": source,
            "adapters": [adapter.to_mapping() for adapter in adapters],
            "notes": notes,
        },
    )


def _peft_type(folder: Path) -> str:
    """Return the type that a configuration names, empty if it names none."""
    try:
        values = written_values(folder)
    except SurgeryError:
        # Whose it is cannot be told; reading it says what is wrong with it.
        return OWN_TYPE
    return str(values.get("peft_type", "")) if isinstance(values, dict) else ""


def _notes(status: AdapterStatus, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Say what will keep an adapter from being loaded."""
    suffix = f".{PROMPT}"
    prompts = {key.removesuffix(suffix): t for key, t in state.items() if key.endswith(suffix)}
    # Prompts are (1, adapter_len, hidden).
    lengths = {fqn: tuple(prompt.shape[1:2]) for fqn, prompt in prompts.items()}
    notes = []
    if (
        status.gates.keys() != prompts.keys()
        or len(prompts) != status.adapter_layers
        or set(lengths.values()) != {(status.adapter_len,)}
    ):
        found = [f"{fqn}: {list(prompt.shape)}" for fqn, prompt in sorted(prompts.items())]
        notes.append(
            f"Adapter {status.name!r} is not what its configuration says: expected prompts of "
            f"{status.adapter_len} tokens and gates in {status.adapter_layers} layers, got prompts "
            f"{listed(found)} and gates in {listed(status.gates)}."
        )
    wanted = (status.condition_rank, status.condition_size)
    down = {k: tuple(t.shape) for k, t in state.items() if k.endswith(f".{CONDITION_DOWN}")}
    expected = {f"{fqn}.{CONDITION_DOWN}": wanted for fqn in prompts if wanted[1] is not None}
    if down != expected:
        found = [f"{key}: {list(shape)}" for key, shape in sorted(down.items())]
        size, rank = status.condition_size, status.condition_rank
        said = "none" if size is None else f"features of size {size} projected with rank {rank}"
        notes.append(
            f"Adapter {status.name!r} is not what its configuration says: expected {said}, got "
            f"{listed(found)}."
        )
    bad = sorted(key for key, tensor in state.items() if not _is_finite(tensor))
    if bad:
        notes.append(f"Adapter {status.name!r} has values that are not finite in {listed(bad)}.")
    return tuple(notes)


def _is_complex_gate(key: str, tensor: Tensor) -> bool:
    return key.endswith(f".{GATE}") and tensor.is_complex()


def _is_finite(tensor: Tensor) -> bool:
    # Wide, since not every dtype knows of isfinite.
    wide = tensor.double() if tensor.is_floating_point() else tensor
    return bool(torch.isfinite(wide).all())
