"""Models of transformers by folder, GGUF file or hub identifier: without weights, with them, to call."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from surgery_core import SurgeryError, execution_device, listed

_IDENTIFIER = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""Of a model on the hub."""

# Nothing of a model's own is executed, and nobody is asked whether it may be.
_OPTIONS: Mapping[str, Any] = {"trust_remote_code": False}

PROBE_ROWS, PROBE_TOKENS = 2, 12


def load_skeleton(source: str) -> nn.Module | None:
    """Build the causal language model of a source on the meta device, from its configuration.

    Args:
        source: A folder with a `config.json`, a GGUF file, or an identifier on the hub.

    Returns:
        The model without weights; None if `source` is none of these.

    Raises:
        SurgeryError: The configuration cannot be read.
    """
    where = _where(source)
    if where is None:
        return None

    def build() -> nn.Module:
        _check_kernels(*where)
        config = AutoConfig.from_pretrained(where[0], **where[1])
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        return model

    return _tried(source, build)


def load_model(source: str) -> nn.Module | None:
    """Load the causal language model of a source, in the dtype it was saved in, for evaluation.

    Args:
        source: See `load_skeleton`.

    Returns:
        The model; None if `source` is not one that is known.

    Raises:
        SurgeryError: It cannot be loaded, or has no values for some of its weights.
    """
    where = _where(source)
    if where is None:
        return None

    def load() -> nn.Module:
        _check_kernels(*where)
        # The types know of no report. Mismatches are in it instead of an error that names none.
        options = {"ignore_mismatched_sizes": True, "output_loading_info": True, **where[1]}
        found: Any = AutoModelForCausalLM.from_pretrained(where[0], dtype="auto", **options)
        model, report = found
        # transformers gives them random values, and says so in its log alone.
        lacking = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
        if lacking:
            msg = f"there are no values of the right shape for {listed(sorted(lacking))}"
            raise ValueError(msg)
        loaded: nn.Module = model.eval()
        return loaded

    return _tried(source, load)


def probe_inputs(model: nn.Module) -> Mapping[str, Any] | None:
    """Return a small batch for a model of transformers, one row of it padded on the left.

    Args:
        model: Such a model, or one that PEFT has wrapped.

    Returns:
        `input_ids` and `attention_mask`, `(2, 12)`; None for other models, and for those that have
        no values to compute with.
    """
    base = _pretrained(model)
    size = getattr(base.config.get_text_config(), "vocab_size", None) if base is not None else None
    if base is None or not size:
        return None
    # What accelerate has offloaded is on the meta device.
    device = execution_device(base) or next((p.device for p in base.parameters()), None)
    if device is None or device.type == "meta":
        return None
    # No two neighbours alike, within any vocabulary.
    stride = 7919 if size % 7919 else 1
    ids = torch.arange(PROBE_ROWS * PROBE_TOKENS).view(PROBE_ROWS, PROBE_TOKENS) * stride % size
    mask = torch.ones_like(ids)
    mask[1, : PROBE_TOKENS // 3] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _pretrained(model: nn.Module) -> PreTrainedModel | None:
    """Return the model of transformers that this is, or that PEFT has wrapped in it."""
    # PEFT's prompt learning wraps it once, its other methods twice.
    for fqn in ("", "base_model", "base_model.model"):
        try:
            found = model.get_submodule(fqn)
        except AttributeError:
            return None
        if isinstance(found, PreTrainedModel):
            return found
    return None


def _where(source: str) -> tuple[str, dict[str, Any]] | None:
    """Return what `from_pretrained` takes; None for something else."""
    path = Path(source)
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name, **_OPTIONS, "local_files_only": True}
    if (path / "config.json").is_file():
        return source, {**_OPTIONS, "local_files_only": True}
    if not path.exists() and _IDENTIFIER.fullmatch(source):
        return source, dict(_OPTIONS)
    return None


def _check_kernels(place: str, options: Mapping[str, Any]) -> None:
    """Refuse a configuration that has transformers fetch code from the hub, and import it."""
    if "gguf_file" in options:
        # It has nothing of the kind.
        return
    config, _ = PreTrainedConfig.get_config_dict(place, **options)
    kernels = sorted(set(_kernels(config)))
    if kernels:
        msg = (
            f"its configuration asks for code on the hub, {listed(kernels)}, which would be imported; "
            "take `attn_implementation` and its like out of config.json, and choose one when you load "
            "the model yourself"
        )
        raise ValueError(msg)


def _kernels(config: Mapping[str, Any], *, is_named: bool = False) -> Iterator[str]:
    """Yield implementations in a configuration, or in one inside it, that are repositories."""
    for key, value in config.items():
        is_one = is_named or key.endswith("_implementation")
        if isinstance(value, Mapping):
            yield from _kernels(value, is_named=is_one)
        elif is_one and isinstance(value, str) and "/" in value:
            yield value


def _tried(source: str, call: Callable[[], nn.Module]) -> nn.Module:
    try:
        return call()
    except Exception as err:
        # Whatever transformers, and what it reads with, raise: there is no end to it. Some messages
        # go on for pages.
        first = str(err).strip().partition("\n")[0].rstrip(".")
        msg = (
            f"Model {source!r} cannot be loaded: {first or type(err).__name__}. Check the path, or "
            "the connection."
        )
        raise SurgeryError(msg) from err
