"""The rule that gives linear layers a learned scale and bias, as an operation of the core."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from surgery_core import (
    Composed,
    Effects,
    NoMatchError,
    Operation,
    Saved,
    Selector,
    Site,
    TensorSpec,
    Tree,
    WeightedVariant,
    Where,
    check_linear,
)
from surgery_scale_shift import litgpt
from surgery_scale_shift.composition import compose
from surgery_scale_shift.linear import BIAS, SCALE, ScaledLinear, added_shapes, scale_linear
from surgery_scale_shift.options import ScaleShiftOptions, parameter_dtype, scale_shift_schema

NAME = "scale_shift"


class ScaleShiftOperation(Operation[ScaleShiftOptions]):
    """Give linear layers a learned scale and bias; options as `ScaleShiftOptions`.

    Every `nn.Linear` that the rule selects, also one of a subclass, whose own forward is run. One
    that is not called, since its owner reads its weight instead, is refused.
    """

    name = NAME
    summary = "LLaMA-Adapter V2: a learned scale and bias for each feature of linear layers."

    def parse_options(self, options: Mapping[str, Any]) -> ScaleShiftOptions:
        """Validate the options.

        Raises:
            OptionsError: An option is unknown or has no such value.
        """
        return ScaleShiftOptions.parse(NAME, options)

    def targets(self, tree: Tree, options: ScaleShiftOptions) -> Selector:  # noqa: ARG002 (any options)
        """Choose every linear layer.

        Raises:
            NoMatchError: There is none.
        """
        if not any(isinstance(module, nn.Linear) for module in tree.values()):
            msg = (
                f"Operation {NAME!r} found no linear layer among {len(tree)} submodules: expected "
                "modules of torch.nn.Linear or a subclass. Widen the selector."
            )
            raise NoMatchError(msg, selector=NAME, candidates=())
        return Where(lambda _, module: isinstance(module, nn.Linear), "linear layers")

    def describe(self, site: Site, options: ScaleShiftOptions) -> Effects:
        """Return the two tensors that are added.

        Raises:
            ContractError: The layer has a scale already, or has no shape yet, or is not called, or
                its forward is patched, or accelerate loads its weights with each call.
        """
        check_linear(site, NAME, added=(SCALE, BIAS))
        dtype = str(parameter_dtype(site.module, options.dtype)).removeprefix("torch.")
        # The targets are linear layers.
        shapes = added_shapes(site.module, options.form)  # type: ignore[arg-type]
        return Effects(
            added=tuple(
                TensorSpec(name=name, shape=shape, dtype=dtype, trainable=options.is_trainable)
                for name, shape in shapes.items()
            )
        )

    def build(self, site: Site, options: ScaleShiftOptions) -> ScaledLinear:
        """Return the layer of the site with a new scale and bias."""
        return scale_linear(site.module, options)  # type: ignore[arg-type]  # see describe

    def options_schema(self) -> Mapping[str, Any]:
        """Return the JSON Schema of the options."""
        return scale_shift_schema()

    def compose(self, variants: Sequence[WeightedVariant]) -> Composed:
        """Return the weighted sum of what they change; see `surgery_scale_shift.composition`.

        Raises:
            OptionsError: A weight is not finite.
            ContractError: Variants of both forms are at one layer.
        """
        return compose(variants)

    def read_saved(self, source: str, model: nn.Module, options: Mapping[str, Any]) -> Saved | None:
        """Read the scales and biases in litgpt's `lit_model.pth.adapter_v2`.

        For a model with litgpt's own names: see `surgery_scale_shift.litgpt.check_names`. The
        prompts and norms in the file are for other rules.

        Raises:
            SurgeryError: The file is damaged, or something else.
            StateError: It is for a model with other names.
        """
        if not Path(source).is_file():
            return None
        scales = litgpt.read_adapter(source).scales
        litgpt.check_names(source, scales, model)
        return Saved(options={"form": "litgpt", **options}, state=scales)
