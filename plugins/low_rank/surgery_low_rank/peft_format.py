"""Folders that PEFT saved of LoRA, read and written: which of them mean what this plugin computes."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery_core import (
    Saved,
    StateError,
    SurgeryError,
    TensorFile,
    listed,
    one_writer,
    read_tensor_file,
    tensor_files,
    whole_tensors,
    write_files,
)
from surgery_low_rank.linear import A, B, LowRankLinear
from surgery_low_rank.options import WHOLE, LowRankOptions, is_target

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FILES = (WEIGHTS_FILE, CONFIG_FILE)
PREFIX = "base_model.model."

_OWN = ("r", "lora_alpha", "lora_dropout", "use_rslora", "inference_mode")
"""Fields that are options of the operation."""

_WITHOUT_EFFECT = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "peft_type", "peft_version", "revision"),
        *("task_type", "runtime_config"),
        # Which layers there are, the tensors say.
        *("target_modules", "exclude_modules"),
        # They matter with other fields alone, which are refused.
        *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
        # How the matrices began.
        *("eva_config", "corda_config", "loftq_config", "lora_ga_config"),
    )
)
"""Fields that do not change what saved tensors compute."""

_FIRST_VALUES = (True, False, "gaussian", "orthogonal", "eva", None)
"""Ways to begin that leave the base's weights as they are; the others subtract something from them."""

_ENDS = {f".{name}.weight": f".{name}" for name in (A, B)}


def read_folder(folder: Path, model: nn.Module) -> Saved:
    """Read a folder for a model.

    Raises:
        SurgeryError: A file is missing or damaged, or is not of LoRA, or would compute something
            that this plugin does not; all reasons are named.
        StateError: The tensors are not those of linear layers of the model.
    """
    found = _read(folder)
    config = _config_in(found)
    problems = _problems(config)
    if problems:
        msg = (
            f"LoRA folder {os.fspath(folder)!r} computes something else than this plugin: "
            f"{'; '.join(problems)}. Use PEFT for it, or save it without that."
        )
        raise SurgeryError(msg)
    state = _state_in(found, model)
    fqns = sorted({key.rpartition(".")[0] for key in state})
    strange = [fqn for fqn in fqns if not _is_linear(model, fqn)]
    if strange:
        msg = (
            f"LoRA folder {os.fspath(folder)!r} is not for this model: expected linear layers of "
            f"{type(model).__name__}, got {listed(strange)}. Pass the model it was trained for."
        )
        raise StateError(msg, unexpected=strange)
    options = {name: config[name] for name in _OWN if name in config}
    return Saved(options={**options, "target_modules": _targets(config, fqns, model)}, state=state)


def write_folder(
    folder: Path, options: LowRankOptions, modules: Mapping[str, LowRankLinear]
) -> None:
    """Write a folder that PEFT loads.

    Layers are named by their whole FQNs, since PEFT has no other way to say which ones a rule chose.
    Where the matrices are sharded every process must call this, and the first one writes.

    Args:
        folder: Made if it is not there; the two files in it are replaced.
        options: Of the adapter.
        modules: Its layers by FQN.

    Raises:
        StateError: A value is not finite; nothing was written.
        OSError: A file could not be written; it is named.
    """
    held: dict[str, Tensor] = {
        f"{PREFIX}{fqn}.{name}.weight": getattr(module, name)
        for fqn, module in modules.items()
        for name in (A, B)
    }
    tensors = whole_tensors(held)
    bad = [key for key, t in tensors.items() if t.is_meta or not bool(torch.isfinite(t).all())]
    if bad:
        msg = (
            f"Nothing was written to {os.fspath(folder)!r}: expected values that are finite, got "
            f"others in {listed(bad)}. Load or train them again."
        )
        raise StateError(msg, mismatched=bad)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        # As PEFT does: what is loaded is not trained unless asked for.
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "r": options.r,
        "target_modules": sorted(modules),
        # PEFT takes every layer whose name ends with one of those.
        "exclude_modules": _any_but(modules),
        "use_rslora": options.use_rslora,
    }
    with one_writer(held.values()) as is_writer:
        if is_writer:
            texts = {CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True)}
            # As PEFT does: who trains saves often, and waits for no disk.
            write_files(folder, tensor_files(WEIGHTS_FILE, tensors, texts), durable=False)


def _any_but(fqns: Iterable[str]) -> str:
    """Return a regular expression for any name but these."""
    return rf"(?!(?:{'|'.join(map(re.escape, sorted(fqns)))})\Z).*"


def _read(folder: Path) -> TensorFile:
    path = folder / WEIGHTS_FILE
    try:
        return read_tensor_file(path)
    except (OSError, ValueError) as err:
        msg = (
            f"{os.fspath(path)!r} cannot be read: {err}. Pass a folder that save_pretrained wrote, "
            "with safe_serialization."
        )
        raise SurgeryError(msg) from err


def _config_in(saved: TensorFile) -> dict[str, Any]:
    path = saved.path.with_name(CONFIG_FILE)
    try:
        found = json.loads(saved.text(CONFIG_FILE))
    except (OSError, ValueError, RecursionError) as err:
        msg = (
            f"{os.fspath(path)!r} cannot be read: {err}. Pass a folder that save_pretrained wrote."
        )
        raise SurgeryError(msg) from err
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        got = found.get("peft_type") if isinstance(found, dict) else type(found).__name__
        msg = (
            f"{os.fspath(path)!r} is not of LoRA: expected peft_type 'LORA', got {got!r}. Read it "
            "with the operation it is for."
        )
        raise SurgeryError(msg)
    return found


def _problems(config: Mapping[str, Any]) -> list[str]:
    """Return which fields ask for what is not computed here, those that are unknown included."""
    known = {*_OWN, *_WITHOUT_EFFECT, "bias", "init_lora_weights"}
    asked = {name: config[name] for name in sorted(config.keys() - known) if config[name]}
    if config.get("bias", "none") != "none":
        asked["bias"] = config["bias"]
    first = config.get("init_lora_weights", True)
    if first not in _FIRST_VALUES:
        asked["init_lora_weights"] = first
    return [f"{name} is {value!r:.80}" for name, value in asked.items()]


def _state_in(saved: TensorFile, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors by `fqn.name`; PEFT adds weights of the base where the head has matrices."""
    state, strange = {}, []
    own = model.state_dict()
    for key, tensor in saved.tensors.items():
        end = next((end for end in _ENDS if key.endswith(end)), None)
        if end is None or not key.startswith(PREFIX):
            base = own.get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
            # Others than the model's would be put in their place by PEFT.
            if not key.startswith(PREFIX) or not _is_same(base, tensor):
                strange.append(key)
        else:
            state[key.removeprefix(PREFIX).removesuffix(end) + _ENDS[end]] = tensor
    if strange or not state:
        msg = (
            f"{os.fspath(saved.path)!r} is not of linear layers alone: expected keys like "
            f"'{PREFIX}layer.{A}.weight', got {listed(sorted(strange))}. Use PEFT for it."
        )
        raise StateError(msg, unexpected=strange)
    return state


def _is_same(own: object, given: Tensor) -> bool:
    """Tell whether a tensor in a file is what the model has anyway."""
    if not isinstance(own, Tensor) or own.is_meta or own.shape != given.shape:
        return False
    return torch.equal(own.cpu(), given.to(own.dtype))


def _targets(config: Mapping[str, Any], fqns: list[str], model: nn.Module) -> list[str]:
    """Return PEFT's names where they mean the layers that have tensors, and otherwise their FQNs."""
    names = config.get("target_modules")
    if isinstance(names, list) and names and all(isinstance(name, str) and name for name in names):
        # A name that means no layer would be refused.
        found = [target_fqns(model, LowRankOptions(target_modules=(name,))) for name in names]
        if all(found) and fqns == sorted({fqn for each in found for fqn in each}):
            return sorted(names)
    # The name of one layer may be the end of another's.
    is_exact = fqns == sorted(target_fqns(model, LowRankOptions(target_modules=tuple(fqns))))
    return fqns if is_exact else [f"{WHOLE}{fqn}" for fqn in fqns]


def target_fqns(model: nn.Module, options: LowRankOptions) -> list[str]:
    """Return the linear layers of a model that options name."""
    return [
        fqn
        for fqn, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_target(fqn, options)
    ]


def _is_linear(model: nn.Module, fqn: str) -> bool:
    try:
        return isinstance(model.get_submodule(fqn), nn.Linear)
    except AttributeError:
        return False
