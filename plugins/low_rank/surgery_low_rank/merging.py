"""Low-rank terms put into the weights of their layers, and taken out of them exactly."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from surgery_core import (
    ContractError,
    DriftError,
    EditedModel,
    NoMatchError,
    OptionsError,
    StateError,
    VariantError,
    listed,
)
from surgery_low_rank.functional import low_rank_delta, wide
from surgery_low_rank.linear import LowRankLinear, mark_merged_

_WEIGHT = "weight"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Merged:
    """A layer with its weight of before, and the one that was put there."""

    fqn: str
    module: LowRankLinear
    before: nn.Parameter
    after: nn.Parameter


class Merge:
    """What `merge_` has done; as a context manager it is undone at the end.

    Invariant: after `unmerge` the layers hold the very parameters of before, with their values.

    Args:
        layers: What was merged.
    """

    def __init__(self, layers: tuple[_Merged, ...]) -> None:
        self._layers = layers
        self.is_merged = True

    @property
    def fqns(self) -> tuple[str, ...]:
        """Layers that were merged."""
        return tuple(found.fqn for found in self._layers)

    def unmerge(self) -> None:
        """Put the weights of before back, or change nothing and raise.

        Where the model went to another device or dtype meanwhile, they go there too.

        Raises:
            VariantError: It has been done already.
            DriftError: A layer has another weight than was put there.
        """
        if not self.is_merged:
            msg = "Weights have been taken back already: expected a merge that is in place."
            raise VariantError(msg)
        drifted = [
            found.fqn
            for found in self._layers
            if found.module._parameters[_WEIGHT] is not found.after  # noqa: SLF001 (torch's registry)
        ]
        if drifted:
            msg = (
                f"Merged layers drifted at {listed(sorted(drifted))}: expected the weights that "
                "were put there, got others. Put them back first."
            )
            raise DriftError(msg, fqns=drifted)
        for found in self._layers:
            before, after = found.before, found.after
            if (before.device, before.dtype) != (after.device, after.dtype):
                # The object stays, as it does where torch moves a module.
                before.data = before.data.to(after.device, after.dtype)
            _put(found.module, before, is_merged=False)
        self.is_merged = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.is_merged:
            self.unmerge()


def merge_(target: EditedModel | Mapping[str, nn.Module]) -> Merge:
    """Put the low-rank terms of layers into the weights of these and of their bases.

    The layers then run the base's forward alone. A recipe that is reverted while it is merged leaves
    a plain model with the merged weights. Weights that other modules have too (tied ones) stay as
    they are there. Dropout is not applied while merged, and the matrices get no gradients. A merged
    weight gets gradients if the one of before does at that moment, which frozen bases' do not.

    Args:
        target: A model with a recipe applied, of which all that is in the model now is merged: rules
            and the active adapter, or several with their weights. Or modules by FQN, such as
            `dict(model.named_modules())`.

    Returns:
        What takes the weights back.

    Raises:
        OptionsError: The target is something else.
        NoMatchError: There is no layer of this plugin.
        ContractError: A layer is merged already, is quantised or parametrised, has a forward of its
            own, or its weight has no values; all are named, and nothing was changed.
        StateError: Merged weights would not be finite in the dtype of a weight; same.
        DriftError: A module of the recipe was exchanged; same.

    Numerics:
        Summed in the widest dtype of weight and matrices, at least float32, and rounded once to that
        of the weight. Outputs are those of before up to rounding in the weight's dtype.

    Example:
        >>> from surgery_low_rank.linear import low_rank_linear
        >>> from surgery_low_rank.options import LowRankOptions
        >>> layer, x = low_rank_linear(nn.Linear(3, 4), LowRankOptions(r=2)), torch.randn(5, 3)
        >>> _ = nn.init.normal_(layer.lora_B)
        >>> expected, weight = layer(x), layer.weight
        >>> with merge_({"layer": layer}):
        ...     torch.allclose(expected, layer.overlay_base(x), atol=1e-6)
        True
        >>> layer.weight is weight
        True
    """
    if isinstance(target, EditedModel):
        target.check_in_place()
        for name in target.adapters:
            # Those that are not in the model keep the weights that were there before.
            target.swap_state.caught_up(name)
    elif not isinstance(target, Mapping):
        msg = (  # type: ignore[unreachable]  # for callers without a type checker
            f"Merging takes a model with a recipe applied, or modules by FQN, got "
            f"{type(target).__name__}. For a plain model give dict(model.named_modules())."
        )
        raise OptionsError(msg)
    modules = dict(target.model.named_modules() if isinstance(target, EditedModel) else target)
    # By object: a module that has several FQNs is merged once.
    named = {
        id(m): (fqn, m) for fqn, m in reversed(modules.items()) if isinstance(m, LowRankLinear)
    }
    found = sorted(named.values(), key=lambda pair: pair[0])
    if not found:
        msg = (
            f"Nothing can be merged among {len(modules)} modules: expected layers with low-rank "
            "terms, got none. Make an adapter active that has some."
        )
        raise NoMatchError(msg, selector="low-rank layers", candidates=())
    problems = {fqn: problem for fqn, m in found if (problem := _problem(m)) is not None}
    if problems:
        fqn, actual = next(iter(problems.items()))
        expected = "floating-point weights that nn.Linear's forward reads"
        what = listed([f"{where}: {problem}" for where, problem in problems.items()])
        msg = f"Layers cannot be merged: expected {expected}, got {what}. Leave them out."
        raise ContractError(msg, fqn=fqn, expected=expected, actual=actual)
    layers = []
    for fqn, module in found:
        before = module._parameters[_WEIGHT]  # noqa: SLF001 (torch's registry)
        # See `_problem`.
        assert before is not None
        after = nn.Parameter(merged_weight(module), requires_grad=before.requires_grad)
        mark_merged_(after)
        layers.append(_Merged(fqn=fqn, module=module, before=before, after=after))
    bad = [found.fqn for found in layers if not bool(torch.isfinite(found.after).all())]
    if bad:
        msg = (
            f"Nothing was merged: expected weights that are finite in their dtype, got others at "
            f"{listed(bad)}. Use a wider dtype, or keep the terms beside the weights."
        )
        raise StateError(msg, mismatched=bad)
    for each in layers:
        _put(each.module, each.after, is_merged=True)
    return Merge(tuple(layers))


@torch.no_grad()
def merged_weight(module: LowRankLinear) -> Tensor:
    """Return the weight of a layer with all of its terms in it, in the weight's dtype."""
    weight = module.get_parameter(_WEIGHT)
    found = wide(weight)
    for part in module.low_rank_parts:
        a, b = getattr(module, part.a), getattr(module, part.b)
        found = found + low_rank_delta(a, b, scaling=part.factor)
    return found.to(weight.dtype)


def _problem(module: LowRankLinear) -> str | None:
    """Return why a layer cannot be merged; None if it can."""
    weight = module._parameters.get(_WEIGHT)  # noqa: SLF001 (torch's registry)
    # Another layer may be over this one, and is one of its kind then.
    base = type(next(m for m in module.overlay_stack() if not isinstance(m, LowRankLinear)))
    if module.is_merged:
        return "one that is merged already"
    if module.sharing is not None and module.sharing.is_in_use:
        return "one that rows or threads use other variants at"
    if weight is None:
        return "no weight of its own"
    # Quantised ones are of classes of their own, or of one byte.
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.itemsize < 2:  # noqa: PLR2004 (bytes)
        return f"a weight of {type(weight).__name__} in {weight.dtype}"
    if base.forward is not nn.Linear.forward:
        return f"a forward of {base.__name__}"
    return "a weight without values" if weight.is_meta else None


def _put(module: LowRankLinear, weight: nn.Parameter, *, is_merged: bool) -> None:
    """Let a layer and all that is under it have a weight, with or without its terms."""
    for each in module.overlay_stack():
        each._parameters[_WEIGHT] = weight  # noqa: SLF001 (torch's registry)
        if isinstance(each, LowRankLinear):
            each.is_merged = is_merged
