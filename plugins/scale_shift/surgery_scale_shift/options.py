"""What the rules of this plugin may say, validated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from surgery_core import OptionsError

Form = Literal["paper", "chat65b"]
"""Where the scale acts: on the output after the bias, or on the input; see `ScaleShiftOptions`."""

DType = Literal["float64", "float32", "float16", "bfloat16"]
"""Dtypes that parameters may be kept in."""

Modules = Literal["norms", "selected"]
"""Which modules `tuned_norm` takes; see `TunedNormOptions`."""

FORMS: Mapping[str, Form] = {"paper": "paper", "litgpt": "paper", "chat65b": "chat65b"}
"""By each name that a rule may use for it; litgpt computes what the paper says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleShiftOptions:
    """How linear layers are scaled and shifted, and what of it is trained.

    Args:
        form: `"paper"`, `s (W x + b)` with a scale and a bias for each output feature; `"litgpt"` is
            another name of it. Or `"chat65b"`, `W (s x) + b` with a scale for each input feature,
            after the folder of the authors' code. A bias that the layer has belongs to `W x`.
        dtype: Of the two parameters; None means the base's, but at least float32.
        is_trainable: Whether they get gradients.

    Source:
        See `surgery_scale_shift.functional`.
    """

    form: Form = "paper"
    dtype: DType | None = None
    is_trainable: bool = True

    @classmethod
    def parse(cls, operation: str, options: Mapping[str, Any]) -> "ScaleShiftOptions":
        """Validate what a rule says.

        Raises:
            OptionsError: An option is unknown or has no such value; all problems are named.

        Example:
            >>> ScaleShiftOptions.parse("scale_shift", {"form": "litgpt"}).form
            'paper'
        """
        checked = _Checked(operation, options, known=("form", "dtype", "is_trainable"))
        form = checked.choice("form", FORMS, default="paper")
        dtype, is_trainable = checked.dtype(), checked.flag("is_trainable")
        checked.close()
        return cls(form=FORMS[form], dtype=dtype, is_trainable=is_trainable)


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedNormOptions:
    """Which modules get trainable copies, and how.

    Args:
        modules: `"norms"`, those without children whose class is called `...Norm`, perhaps with
            `1d`, `2d` or `3d` behind it, and which have parameters; or `"selected"`, all that the
            rule's `select` chose.
        dtype: Of the copies' parameters; None means the base's, but at least float32. They are
            cast to the base's dtype for computing.
        is_trainable: Whether they get gradients.
    """

    modules: Modules = "norms"
    dtype: DType | None = None
    is_trainable: bool = True

    @classmethod
    def parse(cls, operation: str, options: Mapping[str, Any]) -> "TunedNormOptions":
        """Validate what a rule says.

        Raises:
            OptionsError: An option is unknown or has no such value; all problems are named.
        """
        checked = _Checked(operation, options, known=("modules", "dtype", "is_trainable"))
        modules: Modules = checked.choice("modules", get_args(Modules), default="norms")
        dtype, is_trainable = checked.dtype(), checked.flag("is_trainable")
        checked.close()
        return cls(modules=modules, dtype=dtype, is_trainable=is_trainable)


def scale_shift_schema() -> dict[str, Any]:
    """Return the JSON Schema of `ScaleShiftOptions` as a rule gives them."""
    return _schema({"form": {"enum": list(FORMS), "default": "paper"}})


def tuned_norm_schema() -> dict[str, Any]:
    """Return the JSON Schema of `TunedNormOptions` as a rule gives them."""
    return _schema({"modules": {"enum": list(get_args(Modules)), "default": "norms"}})


def parameter_dtype(base: nn.Module, dtype: DType | None) -> torch.dtype:
    """Return the dtype of the parameters that are added for a module."""
    if dtype is not None:
        found: torch.dtype = getattr(torch, dtype)
        return found
    is_double = any(parameter.dtype is torch.float64 for parameter in base.parameters())
    # Steps of training would be lost between the values near one that narrower dtypes have.
    return torch.float64 if is_double else torch.float32


def _schema(own: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            **own,
            "dtype": {"enum": [*get_args(DType), None], "default": None},
            "is_trainable": {"type": "boolean", "default": True},
        },
    }


class _Checked:
    """Reads options and gathers what is wrong with them."""

    def __init__(
        self, operation: str, options: Mapping[str, Any], *, known: tuple[str, ...]
    ) -> None:
        self._operation = operation
        self._options = options
        self._problems = [
            f"unknown option {name!r}, expected one of {', '.join(known)}"
            for name in sorted(options.keys() - set(known))
        ]

    def choice(self, name: str, allowed: Any, *, default: Any) -> Any:  # noqa: ANN401 (of a Literal)
        """Return one of some texts."""
        value = self._options.get(name, default)
        if isinstance(value, str) and value in allowed:
            return value
        self._problems.append(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        return default

    def dtype(self) -> DType | None:
        """Return the option `dtype`."""
        if self._options.get("dtype") is None:
            return None
        found: DType = self.choice("dtype", get_args(DType), default="float32")
        return found

    def flag(self, name: str) -> bool:
        """Return an option that is true or false, true if it is not there."""
        value = self._options.get(name, True)
        if isinstance(value, bool):
            return value
        self._problems.append(f"{name} must be true or false, got {value!r}")
        return True

    def close(self) -> None:
        """Raise what was gathered, if anything was."""
        if self._problems:
            problems = "; ".join(self._problems)
            msg = f"Operation {self._operation!r} has invalid options: {problems}. Fix the options."
            raise OptionsError(msg)
