"""The rule that gives linear layers two narrow matrices, as an operation of the core."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

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
    WeightedModule,
    WeightedVariant,
    Where,
    check_linear,
    listed,
)
from surgery_low_rank import peft_format
from surgery_low_rank.composition import check_unmerged, compose
from surgery_low_rank.linear import (
    A,
    B,
    LowRankLinear,
    added_shapes,
    low_rank_linear,
    low_rank_with,
)
from surgery_low_rank.options import (
    LowRankOptions,
    is_target,
    low_rank_schema,
    names_layer,
    parameter_dtype,
)
from surgery_low_rank.rows import RowTerms

NAME = "low_rank"


class LowRankOperation(Operation[LowRankOptions]):
    """Give linear layers a trained low-rank term; options as `LowRankOptions`.

    Every `nn.Linear` that the rule selects and `target_modules` names, also one of a subclass, whose
    own forward is run. One that is not called, since its owner reads its weight instead, is refused.
    """

    name = NAME
    summary = "LoRA: a trained low-rank term beside linear layers."

    def parse_options(self, options: Mapping[str, Any]) -> LowRankOptions:
        """Validate the options.

        Raises:
            OptionsError: An option is unknown or has no such value.
        """
        return LowRankOptions.parse(NAME, options)

    def targets(self, tree: Tree, options: LowRankOptions) -> Selector:
        """Choose every linear layer that the options name.

        Raises:
            NoMatchError: There is none, or for one of the names.
        """
        layers = [fqn for fqn, module in tree.items() if isinstance(module, nn.Linear)]
        if not layers:
            msg = (
                f"Operation {NAME!r} found no linear layer among {len(tree)} submodules: expected "
                "modules of torch.nn.Linear or a subclass. Widen the selector."
            )
            raise NoMatchError(msg, selector=NAME, candidates=())
        unmatched = [
            name
            for name in options.target_modules or ()
            if not any(names_layer(name, fqn) for fqn in layers)
        ]
        if unmatched:
            segments = sorted({fqn.rpartition(".")[2] for fqn in layers})
            msg = (
                f"Operation {NAME!r} found no linear layer for target_modules {listed(unmatched)}: "
                f"expected names such as {listed(segments)}. Fix the names, or widen the selector."
            )
            raise NoMatchError(msg, selector=NAME, candidates=tuple(segments))
        return Where(
            lambda fqn, module: isinstance(module, nn.Linear) and is_target(fqn, options),
            "linear layers" if options.target_modules is None else listed(options.target_modules),
        )

    def describe(self, site: Site, options: LowRankOptions) -> Effects:
        """Return the two tensors that are added.

        Raises:
            ContractError: The layer has a low-rank term already, or has no shape yet, or is not
                called, or its forward is patched, or accelerate loads its weights with each call.
        """
        check_linear(site, NAME, added=(A, B))
        dtype = str(parameter_dtype(site.module, options.dtype)).removeprefix("torch.")
        # The targets are linear layers.
        shapes = added_shapes(site.module, options)  # type: ignore[arg-type]
        return Effects(
            added=tuple(
                TensorSpec(
                    name=name, shape=shape, dtype=dtype, trainable=not options.inference_mode
                )
                for name, shape in shapes.items()
            )
        )

    def build(self, site: Site, options: LowRankOptions) -> LowRankLinear:
        """Return the layer of the site with two new matrices."""
        return low_rank_linear(site.module, options)  # type: ignore[arg-type]  # see describe

    def options_schema(self) -> Mapping[str, Any]:
        """Return the JSON Schema of the options."""
        return low_rank_schema()

    def listener(self, site: Site) -> LowRankLinear:
        """Return the layer of the site without matrices."""
        return low_rank_with(site.module, [], {})

    def shared(self, site: Site, rows: Sequence[Sequence[WeightedModule]]) -> RowTerms:
        """Return the terms of the rows' variants.

        Raises:
            ContractError: A variant is merged into the weight of the layer.
        """
        modules = {one.name: cast("LowRankLinear", one.module) for row in rows for one in row}
        check_unmerged(site, modules)
        return RowTerms(rows, fqn=site.fqn)

    def compose(self, variants: Sequence[WeightedVariant]) -> Composed:
        """Return the weighted sum of what they add; see `surgery_low_rank.composition`.

        Raises:
            OptionsError: A weight is not finite.
        """
        return compose(variants)

    def read_saved(self, source: str, model: nn.Module, options: Mapping[str, Any]) -> Saved | None:
        """Read a folder that PEFT saved of LoRA; see `surgery_low_rank.peft_format`.

        Raises:
            SurgeryError: It is damaged, or of another kind, or computes something else.
            StateError: It is for a model with other layers.
        """
        folder = Path(source)
        if not any((folder / name).is_file() for name in peft_format.FILES):
            return None
        saved = peft_format.read_folder(folder, model)
        return Saved(options={**saved.options, **options}, state=saved.state)

    def write_saved(
        self, folder: str, options: Mapping[str, Any], modules: Mapping[str, nn.Module]
    ) -> None:
        """Write a folder that PEFT loads; see `surgery_low_rank.peft_format`.

        Raises:
            StateError: A value is not finite; nothing was written.
        """
        own = {fqn: m for fqn, m in modules.items() if isinstance(m, LowRankLinear)}
        peft_format.write_folder(Path(folder), self.parse_options(options), own)
