"""What a rule of this plugin may say, validated."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import nn

from surgery_core import OptionsError

DType = Literal["float64", "float32", "float16", "bfloat16"]
"""Dtypes that parameters may be kept in."""


WHOLE = "^"
"""Begins one of the `target_modules` that is the whole FQN of a layer, not the end of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankOptions:
    """Which linear layers get two narrow matrices, and how; names are those of PEFT's `LoraConfig`.

    Args:
        r: Rank: rows of `lora_A` and columns of `lora_B`.
        lora_alpha: Divided by `r`, the factor on what is added; dimensionless.
        lora_dropout: Probability with which a feature of the input is dropped in training, on its
            way to the matrices alone.
        use_rslora: Divide `lora_alpha` by the square root of `r` instead.
        target_modules: FQNs of layers, or their last segments, or `^` with a whole FQN; None means
            every linear layer that the rule selects.
        dtype: Of the two matrices; None means the base's, but at least float32.
        inference_mode: The matrices get no gradients.

    Source:
        See `surgery_low_rank.functional`.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] | None = None
    dtype: DType | None = None
    inference_mode: bool = False

    @property
    def scaling(self) -> float:
        """Factor on what is added, dimensionless."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @classmethod
    def parse(cls, operation: str, options: Mapping[str, Any]) -> "LowRankOptions":
        """Validate what a rule says.

        Raises:
            OptionsError: An option is unknown or has no such value; all problems are named.

        Example:
            >>> LowRankOptions.parse("low_rank", {"r": 4, "lora_alpha": 16}).scaling
            4.0
        """
        known = [field.name for field in fields(cls)]
        problems = [
            f"unknown option {name!r}, expected one of {', '.join(known)}"
            for name in sorted(options.keys() - set(known))
        ]
        problems += [
            f"{name} must be {expected}, got {options[name]!r}"
            for name, (expected, is_right) in _CHECKS.items()
            if name in options and not is_right(options[name])
        ]
        if problems:
            msg = f"Operation {operation!r} has invalid options: {'; '.join(problems)}. Fix the options."
            raise OptionsError(msg)
        found = dict(options)
        if found.get("target_modules") is not None:
            found["target_modules"] = tuple(found["target_modules"])
        return cls(**found)


def is_target(fqn: str, options: LowRankOptions) -> bool:
    """Tell whether a layer is among the `target_modules`, as PEFT does, but for those with a `^`.

    Example:
        >>> is_target("model.layers.0.q_proj", LowRankOptions(target_modules=("q_proj",)))
        True
    """
    names = options.target_modules
    return names is None or any(names_layer(name, fqn) for name in names)


def names_layer(name: str, fqn: str) -> bool:
    """Tell whether one of the `target_modules` means a layer.

    Example:
        >>> names_layer("0.q", "talker.0.q"), names_layer("^0.q", "talker.0.q")
        (True, False)
    """
    if name.startswith(WHOLE):
        return fqn == name.removeprefix(WHOLE)
    return fqn == name or fqn.endswith(f".{name}")


def parameter_dtype(base: nn.Module, dtype: DType | None) -> torch.dtype:
    """Return the dtype of the matrices that are added to a layer."""
    if dtype is not None:
        found: torch.dtype = getattr(torch, dtype)
        return found
    is_double = any(parameter.dtype is torch.float64 for parameter in base.parameters())
    # Small steps of training would be lost in narrower dtypes.
    return torch.float64 if is_double else torch.float32


def low_rank_schema() -> dict[str, Any]:
    """Return the JSON Schema of `LowRankOptions` as a rule gives them."""
    names = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "r": {"type": "integer", "minimum": 1, "default": 8},
            "lora_alpha": {"type": "number", "default": 8},
            "lora_dropout": {
                "type": "number",
                "minimum": 0,
                "exclusiveMaximum": 1,
                "default": 0.0,
            },
            "use_rslora": {"type": "boolean", "default": False},
            "target_modules": {"anyOf": [names, {"type": "null"}], "default": None},
            "dtype": {"enum": [*get_args(DType), None], "default": None},
            "inference_mode": {"type": "boolean", "default": False},
        },
    }


def _is_number(value: object) -> bool:
    # True and False are integers too.
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        # JSON has integers that no float can be.
        return False


def _are_names(value: object) -> bool:
    if value is None:
        return True
    are_several = isinstance(value, list | tuple) and len(value) > 0
    return are_several and all(isinstance(name, str) and name for name in value)  # type: ignore[attr-defined]  # several


_CHECKS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a whole number of at least 1", lambda v: type(v) is int and v >= 1),
    "lora_alpha": ("a finite number", _is_number),
    "lora_dropout": ("a number of at least 0 and below 1", lambda v: _is_number(v) and 0 <= v < 1),
    "use_rslora": ("true or false", lambda v: isinstance(v, bool)),
    "target_modules": ("a list of names, or null", _are_names),
    "dtype": (
        f"one of {', '.join(get_args(DType))}, or null",
        lambda v: v is None or (isinstance(v, str) and v in get_args(DType)),
    ),
    "inference_mode": ("true or false", lambda v: isinstance(v, bool)),
}
"""By option: what it must be, in words, and whether a value is that."""
