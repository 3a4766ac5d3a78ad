"""Adapters on disk, in PEFT's folder format, and what PEFT would make of them."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery_adaption_prompt.attention import AdaptedAttention
from surgery_adaption_prompt.config import OWN_TYPE, AdaptionPromptConfig
from surgery_adaption_prompt.functional import activate_gate
from surgery_adaption_prompt.parts import GATE, parameter_names
from surgery_core import (
    StateError,
    SurgeryError,
    TensorFile,
    file_stamp,
    listed,
    load_pickled,
    load_tensors_,
    read_tensor_file,
    read_tensor_header,
    tensor_files,
    whole_tensors,
    write_files,
)

WEIGHTS_FILE = "adapter_model.safetensors"
"""All of an adapter: the other two stand in its header too, and those there are what is read."""
CONFIG_FILE = "adapter_config.json"
BASE_FILE = "base_fingerprint.json"
PICKLE_FILE = "adapter_model.bin"
"""What old releases of PEFT wrote in place of it; read as tensors only."""
_FILES = (WEIGHTS_FILE, PICKLE_FILE, CONFIG_FILE, BASE_FILE)
PEFT_PREFIX = "base_model.model."
"""What PEFT's key names begin with, before the FQN in the transformers model."""


def adapter_state(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return an adapter's tensors by `fqn.name`, detached and not copied.

    Args:
        modules: Adapted attention modules, and modules saved whole, by FQN.

    Returns:
        `{fqn}.adaption_prompt`, `(1, adapter_len, hidden)`, and `{fqn}.adaption_gate`, `(1,)` or
        `(num_attention_heads,)`; of a conditioned adapter also `{fqn}.adaption_condition_down`,
        `(condition_rank, condition_size)`, and `{fqn}.adaption_condition_up`, `(hidden,
        condition_rank)`; of other modules everything in their state dict.
    """
    return {name: tensor.detach() for name, tensor in _held_state(modules).items()}


def whole_state(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return what `adapter_state` does, whole; every process must call this where it is sharded.

    Args:
        modules: As for `adapter_state`.

    Raises:
        StateError: See `whole_tensors`.
    """
    # Before they are detached: what shards them notes it on the parameters.
    whole = whole_tensors(_held_state(modules))
    return {name: tensor.detach() for name, tensor in whole.items()}


def _held_state(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for fqn, module in modules.items():
        own: Mapping[str, Tensor]
        if isinstance(module, AdaptedAttention):
            own = module.prompt_parameters()
        else:
            own = module.state_dict(keep_vars=True)
        state |= {f"{fqn}.{name}": tensor for name, tensor in own.items()}
    return state


def load_state_(modules: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> None:
    """Copy tensors into an adapter, all or none of them.

    Args:
        modules: As for `adapter_state`; dtype and device of their tensors stay.
        state: By `fqn.name`, exactly those of the adapter.

    Raises:
        StateError: Keys are missing or unexpected, a shape differs, or a value is not finite; all
            problems are named and nothing was copied.
    """
    load_tensors_(
        _held_state(modules),
        state,
        subject="State does not fit the adapter",
        fix="Load it with the configuration it was trained with, on the model it was trained for.",
        beside=(found for module in modules.values() for found in module.parameters()),
    )


def save_adapter(
    folder: str | os.PathLike[str],
    config: AdaptionPromptConfig,
    state: Mapping[str, Tensor],
    *,
    is_for_peft: bool = True,
) -> None:
    """Write an adapter as PEFT writes it, without a record of its base.

    Args:
        folder: Made if need be; the two files in it are replaced.
        config: The adapter's configuration.
        state: Its tensors by `fqn.name`.
        is_for_peft: See `adapter_files`.

    Raises:
        StateError: A value is not finite.
        OSError: A file could not be written; it is named.
    """
    files = adapter_files(config, state, is_for_peft=is_for_peft)
    # As PEFT does: who trains saves often, and waits for no disk.
    write_files(folder, files, durable=False)


def adapter_files(
    config: AdaptionPromptConfig,
    state: Mapping[str, Tensor],
    *,
    is_for_peft: bool,
    base: str | None = None,
) -> dict[str, bytes]:
    """Return what the files of an adapter hold, by name, as PEFT writes them.

    The configuration is written with `inference_mode` true, as PEFT does. Everything also stands in
    the header of the first file, so that putting that one in its place saves the adapter.

    Args:
        config: The adapter's configuration.
        state: Its tensors by `fqn.name`.
        is_for_peft: PEFT computes the same with it. Otherwise the folder names a type of its own,
            which PEFT refuses, instead of computing something else.
        base: Text of the record of its base.

    Raises:
        StateError: A value is not finite.
    """
    check_finite(state)
    values = {**config.to_mapping(), "inference_mode": True}
    if not is_for_peft:
        values["peft_type"] = OWN_TYPE
    texts = {CONFIG_FILE: json.dumps(values, indent=2, sort_keys=True)}
    if base is not None:
        texts[BASE_FILE] = base
    tensors = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in state.items()}
    return tensor_files(WEIGHTS_FILE, tensors, texts)


def peft_problems(config: AdaptionPromptConfig, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return why PEFT would compute something else with an adapter, or could not load it.

    Args:
        config: The adapter's configuration.
        modules: Its modules by FQN.
    """
    problems = [
        problem
        for is_one, problem in (
            (config.gate == "head", "PEFT has one gate for a layer, not one for each head"),
            (config.gate_activation != "identity", "PEFT applies no activation to the gate"),
            (config.condition_size is not None, "PEFT's prompts depend on no features"),
            (
                any(not isinstance(module, AdaptedAttention) for module in modules.values()),
                "PEFT saves no whole modules with adaption prompts",
            ),
        )
        if is_one
    ]
    found = {
        module.architecture.peft_problem(module, project_output=config.project_output)
        for module in modules.values()
        if isinstance(module, AdaptedAttention)
    }
    return problems + sorted(problem for problem in found if problem is not None)


def peft_form(
    config: AdaptionPromptConfig, state: Mapping[str, Tensor]
) -> tuple[AdaptionPromptConfig, dict[str, Tensor]]:
    """Say an adapter in PEFT's terms, as far as the values allow: one gate a layer, no activation.

    The activation is folded into the gate, so the outputs stay and further training differs.

    Returns:
        The adapter with one gate where those of all heads are equal, otherwise with a gate for each.
    """
    folded = dict(state)
    gates = [name for name in state if name.endswith(f".{GATE}")]
    for name in gates:
        folded[name] = activate_gate(state[name], config.gate_activation)
    config = replace(config, gate_activation="identity")
    if all(bool((folded[name] == folded[name][0]).all()) for name in gates):
        folded |= {name: folded[name][:1] for name in gates}
        config = replace(config, gate="layer")
    return config, folded


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


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFolder:
    """An adapter's folder that was read, all of it of one save.

    Args:
        folder: The folder.
        values: Its configuration, as written.
        state: Its tensors by `fqn.name`, on the CPU.
        base: Text of the record of its base; None if it has none.
    """

    folder: str
    values: Mapping[str, Any]
    state: Mapping[str, Tensor]
    base: str | None

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> "AdapterFolder":
        """Read a folder that `save_pretrained` or PEFT wrote.

        The tensors are in `adapter_model.safetensors`, or where there is none in `adapter_model.bin`,
        of which nothing but tensors is read. The configuration and the record of the base are in the
        header of the first, if we wrote it, and otherwise in files next to it.

        Raises:
            SurgeryError: A file is missing, damaged or not a regular file, or holds something else.
            StateError: A key lacks PEFT's prefix.
        """
        found = _tensors_in(Path(folder))
        values = _values_in(found)
        try:
            base = found.text(BASE_FILE)
        except FileNotFoundError:
            base = None
        except (OSError, ValueError) as err:
            raise _unreadable(folder, BASE_FILE, err) from err
        strange = [name for name in found.tensors if not name.startswith(PEFT_PREFIX)]
        if strange:
            msg = (
                f"{os.fspath(folder)!r} is no adapter: expected keys that begin with {PEFT_PREFIX!r}, "
                f"got {listed(sorted(strange))}."
            )
            raise StateError(msg, unexpected=strange)
        state = {name.removeprefix(PEFT_PREFIX): t for name, t in found.tensors.items()}
        return cls(folder=os.fspath(folder), values=values, state=state, base=base)

    def config(self, *, peft_projects: bool = True) -> AdaptionPromptConfig:
        """Return the configuration, ours or PEFT's.

        Keys that are no fields of ours or PEFT's are refused, but for `peft_version`.

        Args:
            peft_projects: For the model at hand PEFT sends the prompt's term through the output
                projection; what is meant where the folder is PEFT's and does not say it.

        Raises:
            OptionsError: It is no configuration of an adaption prompt.
        """
        values = dict(self.values)
        values.pop("peft_version", None)
        if values.get("peft_type") != OWN_TYPE:
            values.setdefault("project_output", peft_projects)
        return AdaptionPromptConfig.from_mapping(values)


def folder_stamp(folder: str | os.PathLike[str]) -> tuple[object, ...]:
    """Return what changes when an adapter is saved anew to a folder; no file is opened.

    Args:
        folder: The folder.
    """
    return tuple(file_stamp(f"{os.fspath(folder)}{os.sep}{name}") for name in _FILES)


def written_values(folder: str | os.PathLike[str]) -> object:
    """Return the JSON of an adapter's configuration, as written; of the tensors no values are read.

    Raises:
        SurgeryError: It cannot be read.
    """
    path = Path(folder) / WEIGHTS_FILE
    try:
        found, _ = read_tensor_header(path)
    except (OSError, ValueError):
        found = TensorFile(path=path, tensors={}, texts={}, stamp=file_stamp(path))
    try:
        return json.loads(found.text(CONFIG_FILE))
    except (OSError, ValueError, RecursionError) as err:
        raise _unreadable(folder, CONFIG_FILE, err) from err


def _tensors_in(folder: Path) -> TensorFile:
    path, pickle = folder / WEIGHTS_FILE, folder / PICKLE_FILE
    if _is_pickled(folder):
        tensors = load_pickled(pickle, subject=f"Checkpoint {str(pickle)!r}")
        return TensorFile(path=path, tensors=tensors, texts={}, stamp=None)
    try:
        return read_tensor_file(path)
    except (OSError, ValueError) as err:
        is_one = path.exists() or (folder / CONFIG_FILE).exists()
        name = WEIGHTS_FILE if is_one else f"{WEIGHTS_FILE}, nor {CONFIG_FILE}"
        raise _unreadable(folder, name, err) from err


def _is_pickled(folder: Path) -> bool:
    return (folder / PICKLE_FILE).exists() and not (folder / WEIGHTS_FILE).exists()


def _values_in(found: TensorFile) -> dict[str, Any]:
    """Return the configuration that was saved with tensors, as written."""
    folder = found.path.parent
    try:
        values = json.loads(found.text(CONFIG_FILE))
    except (OSError, ValueError, RecursionError) as err:
        raise _unreadable(folder, CONFIG_FILE, err) from err
    if not isinstance(values, dict):
        path = folder / CONFIG_FILE
        msg = f"{str(path)!r} is no configuration: expected a JSON object, got {values!r:.80}."
        raise SurgeryError(msg)
    return values


def _unreadable(folder: str | os.PathLike[str], name: str, err: Exception) -> SurgeryError:
    msg = (
        f"Adapter folder {os.fspath(folder)!r} has no readable {name}: {err}. Pass a folder that "
        "save_pretrained wrote."
    )
    return SurgeryError(msg)


def expected_bytes(folder: Path) -> int:
    """Return what an adapter will take in a model, from its configuration and its tensors' header.

    It may be too much where modules are trained whole or values are kept in a needlessly wide dtype,
    and too little for a base in float64 or an `adapter_model.bin`, of which the size is taken.

    Raises:
        SurgeryError: One of the files cannot be read.
    """
    if _is_pickled(folder):
        # Whatever is wrong with it shows before anything is evicted.
        AdapterFolder.read(folder).config()
        return (folder / PICKLE_FILE).stat().st_size
    try:
        found, shapes = read_tensor_header(folder / WEIGHTS_FILE)
    except (OSError, ValueError) as err:
        raise _unreadable(folder, WEIGHTS_FILE, err) from err
    read = AdapterFolder(folder=str(folder), values=_values_in(found), state={}, base=None)
    config = read.config()
    dtype, own = config.dtype, tuple(f".{name}" for name in parameter_names(config))
    total = 0
    for name, (kind, shape) in shapes.items():
        # Of safetensors' dtypes, those with 64 in their names are wider than four bytes.
        itemsize = 8 if kind.endswith("64") else 4
        if dtype is not None and name.endswith(own):
            itemsize = getattr(torch, dtype).itemsize
        total += itemsize * prod(shape)
    return total
