"""Was an adapter trained for this base: what its projections answer to a probe, kept with it."""

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from surgery_adaption_prompt.attention import AdaptedAttention
from surgery_adaption_prompt.checkpoints import BASE_FILE, AdapterFolder
from surgery_core import StateError, SurgeryError, SurgeryWarning, listed

FORMAT = 1
NUM_VALUES = 16
"""How many values of the answer are kept for each layer, keys and values each."""
TOLERANCE = 0.02
"""Relative: bfloat16 and 8-bit weights stay below it, other weights of the same shape do not."""

BaseCheck = Literal["warn", "error", "ignore"]
"""What to do when an adapter was trained for another base."""

Fingerprint = dict[str, list[float]]
"""Some of the keys and values that a fixed probe gives, by FQN of the attention module."""


def base_fingerprint(modules: Mapping[str, AdaptedAttention]) -> Fingerprint:
    """Return what the key and value projections of adapted layers answer to a fixed probe.

    Through the modules, so it is the same for quantised weights, up to their rounding. Every process
    must call this where they are sharded.

    Args:
        modules: Adapted modules by FQN.

    Returns:
        For each FQN up to 16 values of the key, then as many of the value.
    """
    with torch.no_grad():
        return {fqn: _answer(module) for fqn, module in modules.items()}


def fingerprint_text(answers: Fingerprint) -> str:
    """Return what is saved of the fingerprint of the base."""
    return json.dumps({"format": FORMAT, "answers": answers}, indent=2)


def check_base(
    folder: str | os.PathLike[str] | AdapterFolder,
    modules: Mapping[str, AdaptedAttention],
    *,
    policy: BaseCheck,
) -> None:
    """Compare the base with the one an adapter was saved from; folders without a record pass.

    Args:
        folder: The adapter's, or what was read of it.
        modules: Adapted modules by FQN, in the base at hand.
        policy: Warn, raise, or do not look.

    Raises:
        SurgeryError: The record is damaged.
        StateError: The base is another one, and the policy is `"error"`.
    """
    if policy == "ignore":
        return
    found = folder if isinstance(folder, AdapterFolder) else AdapterFolder.read(folder)
    if found.base is None:
        return
    expected, actual = _parsed(found), base_fingerprint(modules)
    errors = {fqn: _difference(actual[fqn], expected.get(fqn)) for fqn in actual}
    other = sorted(fqn for fqn, error in errors.items() if not error <= TOLERANCE)
    if not other:
        return
    worst = max(errors.values())
    msg = (
        f"Adapter in {found.folder!r} was trained for another base: expected key and value "
        f"projections that differ by at most {TOLERANCE:.0%} from the recorded ones, got "
        f"{worst:.1%} at {listed(other)}. Load it on the model it was trained for, or pass "
        "base_check='ignore'."
    )
    if policy == "error":
        raise StateError(msg, mismatched=other)
    warnings.warn(msg, SurgeryWarning, stacklevel=3)


def _answer(module: AdaptedAttention) -> list[float]:
    length = module.adaption_prompt.shape[-1]
    # No two channels alike, no random numbers: cosines at steps of the golden angle.
    probe = torch.cos(torch.arange(length, dtype=torch.float64) * (math.pi * (3 - math.sqrt(5))))
    dtypes = (p.dtype for p in module.base_attention.parameters() if p.is_floating_point())
    prompt = probe.to(module.adaption_prompt.device, next(dtypes, torch.float32))
    # Heads do not matter here: as if each channel were one.
    sides = module.architecture.project_whole(module, prompt.view(1, 1, length), head_dim=1)
    return [value for side in sides for value in _sample(side.flatten())]


def _sample(values: Tensor) -> list[float]:
    """Return up to 16 values, evenly spaced."""
    step = max(1, values.numel() // NUM_VALUES)
    sampled: list[float] = values[::step][:NUM_VALUES].double().tolist()
    return sampled


def _difference(actual: list[float], expected: list[float] | None) -> float:
    """Return the norm of the difference over that of what is expected; infinite if they differ in size."""
    if expected is None or len(actual) != len(expected):
        return math.inf
    return math.dist(actual, expected) / (math.hypot(*expected) or 1.0)


def _parsed(found: AdapterFolder) -> Fingerprint:
    path = Path(found.folder) / BASE_FILE
    try:
        record = json.loads(found.base or "")
        answers = {FORMAT: record["answers"]}[record["format"]]
        return {fqn: [float(x) for x in values] for fqn, values in answers.items()}
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError),
        *(OverflowError, RecursionError),
    ) as err:
        msg = (
            f"{str(path)!r} is no record of a base: expected format {FORMAT}, got {err}. Delete the "
            "file to load the adapter unchecked."
        )
        raise SurgeryError(msg) from err
