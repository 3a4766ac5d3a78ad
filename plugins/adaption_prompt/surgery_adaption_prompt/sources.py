"""Models of transformers by folder, GGUF file or hub identifier: without weights, with them, to call."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from surgery_core import SurgeryError

_IDENTIFIER = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""Of a model on the hub."""

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
        SurgeryError: It cannot be loaded.
    """
    where = _where(source)
    if where is None:
        return None

    def load() -> nn.Module:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(where[0], dtype="auto", **where[1])
        return model.eval()

    return _tried(source, load)


def probe_inputs(model: nn.Module) -> Mapping[str, Any] | None:
    """Return a small batch for a model of transformers, one row of it padded on the left.

    Returns:
        `input_ids` and `attention_mask`, `(2, 12)`; None for other models.
    """
    base = model if isinstance(model, PreTrainedModel) else getattr(model, "base_model", None)
    if not isinstance(base, PreTrainedModel):
        return None
    size = base.config.get_text_config().vocab_size
    # No two neighbours alike, within any vocabulary.
    ids = torch.arange(PROBE_ROWS * PROBE_TOKENS).view(PROBE_ROWS, PROBE_TOKENS) * 7919 % size
    mask = torch.ones_like(ids)
    mask[1, : PROBE_TOKENS // 3] = 0
    device = next((p.device for p in base.parameters() if not p.is_meta), torch.device("cpu"))
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _where(source: str) -> tuple[str, dict[str, Any]] | None:
    """Return what `from_pretrained` takes; None for something else."""
    path = Path(source)
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}
    if (path / "config.json").is_file():
        return source, {"local_files_only": True}
    if not path.exists() and _IDENTIFIER.fullmatch(source):
        return source, {}
    return None


def _tried(source: str, call: Callable[[], nn.Module]) -> nn.Module:
    try:
        return call()
    except (OSError, ValueError, KeyError, ImportError) as err:
        msg = f"Model {source!r} cannot be loaded: {err} Check the path, or the connection."
        raise SurgeryError(msg) from err
