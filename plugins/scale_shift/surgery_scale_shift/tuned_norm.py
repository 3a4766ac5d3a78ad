"""The rule that gives norms trainable copies of their parameters, as an operation of the core."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from surgery_core import (
    ContractError,
    Effects,
    NoMatchError,
    Operation,
    Saved,
    Selector,
    Site,
    TensorSpec,
    Tree,
    Where,
    check_forward,
)
from surgery_scale_shift import litgpt
from surgery_scale_shift.norm import trainable_norm
from surgery_scale_shift.options import TunedNormOptions, parameter_dtype, tuned_norm_schema

NAME = "tuned_norm"

_NORM = re.compile(r"\w*Norm([123]d)?")


class TunedNormOperation(Operation[TunedNormOptions]):
    """Replace norms by copies whose weights and biases are trained; options as `TunedNormOptions`.

    The base's parameters stay as they are, and come back at revert. Running statistics, if a norm has
    them, are the copy's own too. Several variants cannot be active at once: whether a norm is affine
    in its weight, so that a sum of weights is the sum of the outputs, its class does not say.
    """

    name = NAME
    summary = "LLaMA-Adapter V2: trainable copies of norms."

    def parse_options(self, options: Mapping[str, Any]) -> TunedNormOptions:
        """Validate the options.

        Raises:
            OptionsError: An option is unknown or has no such value.
        """
        return TunedNormOptions.parse(NAME, options)

    def targets(self, tree: Tree, options: TunedNormOptions) -> Selector:
        """Choose the norms, or all that the rule selects.

        Raises:
            NoMatchError: There is no norm.
        """
        if options.modules == "selected":
            return Where(lambda _fqn, _module: True, "all that are selected")
        if not any(is_norm(module) for module in tree.values()):
            msg = (
                f"Operation {NAME!r} found no norm among {len(tree)} submodules: expected modules "
                "with parameters and without children, of a class called '...Norm'. Widen the "
                "selector, or select other modules and set modules to 'selected'."
            )
            raise NoMatchError(msg, selector=NAME, candidates=())
        return Where(lambda _, module: is_norm(module), "norms")

    def describe(self, site: Site, options: TunedNormOptions) -> Effects:
        """Return that no key of the state dict changes, and which parameters get another dtype.

        Raises:
            ContractError: The module has children or no parameters, or its forward is patched, or
                accelerate loads its weights with each call.
        """
        module = site.module
        own = list(module.parameters(recurse=False))
        if next(module.children(), None) is not None or not own:
            expected = "a module with parameters and without children"
            actual = f"{type(module).__name__} with {'children' if own else 'no parameters'}"
        elif len({parameter.dtype for parameter in own}) > 1:
            expected, actual = "parameters of one dtype", "several dtypes"
        elif not own[0].is_floating_point():
            expected, actual = "floating-point parameters", str(own[0].dtype)
        else:
            check_forward(site, NAME)
            return _effects(module, options)
        msg = (
            f"Operation {NAME!r} cannot work at {site.fqn!r}: expected {expected}, got {actual}. "
            "Narrow the selector to norms."
        )
        raise ContractError(msg, fqn=site.fqn, expected=expected, actual=actual)

    def build(self, site: Site, options: TunedNormOptions) -> nn.Module:
        """Return a copy of the norm of the site, with parameters of its own."""
        dtype = parameter_dtype(site.module, options.dtype)
        return trainable_norm(site.module, dtype, is_trainable=options.is_trainable)

    def options_schema(self) -> Mapping[str, Any]:
        """Return the JSON Schema of the options."""
        return tuned_norm_schema()

    def read_saved(self, source: str, model: nn.Module, options: Mapping[str, Any]) -> Saved | None:
        """Read the norms in litgpt's `lit_model.pth.adapter_v2`.

        For a model with litgpt's own names: see `surgery_scale_shift.litgpt.check_names`. The
        prompts, scales and biases in the file are for other rules.

        Raises:
            SurgeryError: The file is damaged, or something else.
            StateError: It is for a model with other names.
        """
        if not Path(source).is_file():
            return None
        norms = litgpt.read_adapter(source).norms
        litgpt.check_names(source, norms, model)
        return Saved(options=dict(options), state=norms)


def _effects(module: nn.Module, options: TunedNormOptions) -> Effects:
    dtype = parameter_dtype(module, options.dtype)
    return Effects(
        retyped=tuple(
            TensorSpec(
                name=name,
                shape=tuple(parameter.shape),
                dtype=str(dtype).removeprefix("torch."),
                trainable=options.is_trainable,
            )
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
            if parameter.dtype is not dtype
        )
    )


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a norm with something to train.

    Example:
        >>> is_norm(nn.BatchNorm2d(3)), is_norm(nn.LayerNorm(3, elementwise_affine=False))
        (True, False)
    """
    return (
        _NORM.fullmatch(type(module).__name__) is not None
        and next(module.children(), None) is None
        and next(module.parameters(recurse=False), None) is not None
    )
