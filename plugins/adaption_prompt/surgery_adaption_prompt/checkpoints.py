"""Adapters on disk, in PEFT's folder format: safetensors and JSON, never pickle."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from surgery_adaption_prompt.attention import GATE, PROMPT, AdaptedAttention
from surgery_adaption_prompt.config import AdaptionPromptConfig
from surgery_core import StateError, SurgeryError, listed

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
"""What PEFT's key names begin with, before the FQN in the transformers model."""


def adapter_state(modules: Mapping[str, AdaptedAttention]) -> dict[str, Tensor]:
    """Return an adapter's tensors by `fqn.name`, detached and not copied.

    Args:
        modules: Adapted modules by FQN.

    Returns:
        `{fqn}.adaption_prompt`, `(1, adapter_len, hidden)`, and `{fqn}.adaption_gate`, `(1,)` or
        `(num_attention_heads,)`.
    """
    return {
        f"{fqn}.{name}": getattr(module, name).detach()
        for fqn, module in modules.items()
        for name in (GATE, PROMPT)
    }


def load_state_(modules: Mapping[str, AdaptedAttention], state: Mapping[str, Tensor]) -> None:
    """Copy tensors into an adapter, all or none of them.

    Args:
        modules: Adapted modules by FQN; dtype and device of their parameters stay.
        state: By `fqn.name`, exactly those of the adapter.

    Raises:
        StateError: Keys are missing or unexpected, a shape differs, or a value is not finite; all
            problems are named and nothing was copied.
    """
    own = adapter_state(modules)
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    mismatched = [
        f"{name}: {problem}"
        for name in own.keys() & state.keys()
        if (problem := _problem(state[name], own[name]))
    ]
    if missing or unexpected or mismatched:
        msg = (
            f"State does not fit the adapter: missing {listed(sorted(missing))}; unexpected "
            f"{listed(sorted(unexpected))}; mismatched {listed(sorted(mismatched))}. Load it with "
            "the configuration it was trained with, on the model it was trained for."
        )
        raise StateError(msg, missing=missing, unexpected=unexpected, mismatched=mismatched)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def save_adapter(
    folder: str | os.PathLike[str], config: AdaptionPromptConfig, state: Mapping[str, Tensor]
) -> None:
    """Write an adapter as PEFT writes it; each file is complete or not there.

    The configuration is written with `inference_mode` true, as PEFT does.

    Args:
        folder: Made if need be; the two files in it are replaced.
        config: The adapter's configuration.
        state: Its tensors by `fqn.name`.

    Raises:
        StateError: A value is not finite.
    """
    check_finite(state)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    values = {**config.to_mapping(), "inference_mode": True}
    tensors = {f"{PEFT_PREFIX}{name}": tensor.contiguous() for name, tensor in state.items()}
    staged = {name: target / f".{name}.{os.getpid()}.tmp" for name in (WEIGHTS_FILE, CONFIG_FILE)}
    try:
        save_file(tensors, staged[WEIGHTS_FILE], metadata={"format": "pt"})
        staged[CONFIG_FILE].write_text(json.dumps(values, indent=2, sort_keys=True))
        for name, path in staged.items():
            path.replace(target / name)
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Refuse to save an adapter with values that are not finite.

    Raises:
        StateError: There are such values.
    """
    bad = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if bad:
        msg = (
            f"Adapter is not saved: expected finite values, got others in {listed(sorted(bad))}. "
            "Training diverged; go back to an earlier state."
        )
        raise StateError(msg, mismatched=[f"{name}: not finite" for name in bad])


def load_config(folder: str | os.PathLike[str]) -> AdaptionPromptConfig:
    """Read the configuration of an adapter folder, ours or PEFT's.

    Keys that are no fields of ours or PEFT's are refused, but for `peft_version`.

    Raises:
        SurgeryError: There is no such file, or it is no JSON object.
        OptionsError: It is no configuration of an adaption prompt.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as err:
        msg = (
            f"Adapter folder {str(folder)!r} has no readable {CONFIG_FILE}: {err}. Pass a folder "
            "that save_pretrained wrote."
        )
        raise SurgeryError(msg) from err
    if not isinstance(values, dict):
        msg = f"{str(path)!r} is no configuration: expected a JSON object, got {values!r:.80}."
        raise SurgeryError(msg)
    values.pop("peft_version", None)
    return AdaptionPromptConfig.from_mapping(values)


def load_state(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of an adapter folder by `fqn.name`, on the CPU.

    Raises:
        SurgeryError: There is no such file, or it is damaged.
        StateError: A key lacks PEFT's prefix.
    """
    path = Path(folder) / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as err:
        msg = (
            f"Adapter folder {str(folder)!r} has no readable {WEIGHTS_FILE}: {err}. Pass a folder "
            "that save_pretrained wrote."
        )
        raise SurgeryError(msg) from err
    strange = [name for name in tensors if not name.startswith(PEFT_PREFIX)]
    if strange:
        msg = (
            f"{str(path)!r} is no adapter: expected keys that begin with {PEFT_PREFIX!r}, got "
            f"{listed(sorted(strange))}."
        )
        raise StateError(msg, unexpected=strange)
    return {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}


def _problem(given: Tensor, own: Tensor) -> str | None:
    if given.shape != own.shape:
        return f"expected shape {tuple(own.shape)}, got {tuple(given.shape)}"
    if not given.is_floating_point():
        return f"expected floating-point values, got {given.dtype}"
    if not torch.isfinite(given.to(own.dtype)).all():
        return f"values are not finite in {own.dtype}"
    return None
