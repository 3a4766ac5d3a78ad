"""Tensors by key: those that a replacement brought, and copying others into them."""

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor, nn

from surgery_core.errors import DriftError, StateError, listed
from surgery_core.overlay import Overlay
from surgery_core.sharded import copy_into_, is_flattened, is_partitioned, whole_tensors


def owned_tensors(before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers in a replacement's state dict that the original has not.

    Of an `Overlay` those that it added: the others were the original's, and may have been sharded or
    replaced since.

    Raises:
        DriftError: A parameter that an overlay added is gone, since it was pruned, say.
    """
    state = after.state_dict(keep_vars=True)
    if isinstance(after, Overlay):
        gone = sorted(after.overlay_added - state.keys())
        if gone:
            msg = (
                f"{type(after).__name__} has lost {listed(gone)}, which belongs to its adapter: it "
                "was pruned, parametrised or deleted. Take that back first, for example with "
                "torch.nn.utils.prune.remove."
            )
            raise DriftError(msg, fqns=())
        return {key: tensor for key, tensor in state.items() if key in after.overlay_added}
    # State dicts may have more: what bitsandbytes makes anew with each call is the base's.
    own = {id(tensor) for tensor in (*after.parameters(), *after.buffers())}
    own -= {id(tensor) for tensor in (*before.parameters(), *before.buffers())}
    return {
        key: tensor
        for key, tensor in state.items()
        if isinstance(tensor, Tensor) and id(tensor) in own
    }


def load_tensors_(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    *,
    subject: str,
    fix: str,
    beside: Iterable[Tensor] = (),
) -> None:
    """Copy tensors into others, all or none of them; dtype, device and sharding of those stay.

    Args:
        own: By key; of what is sharded each process takes its part.
        state: Exactly the same keys; the same values in each process.
        subject: How the error begins, for example `State does not fit the adapter`.
        fix: What the error tells the user to do.
        beside: What the values will be computed with: they must be finite in its dtypes too.

    Raises:
        StateError: Keys are missing or unexpected, a shape or the kind of values differs, or a value
            is not finite in the dtype it would get, or would be cast to; all problems are named,
            nothing was copied.

    Example:
        >>> weight = torch.zeros(2)
        >>> load_tensors_({"w": weight}, {"w": torch.ones(2)}, subject="No fit", fix="Stop.")
        >>> weight
        tensor([1., 1.])
    """
    given = state.items() if isinstance(state, Mapping) else [(type(state).__name__, state)]
    foreign = [f"{n}: {type(t).__name__}" for n, t in given if not isinstance(t, Tensor)]
    if foreign or not isinstance(state, Mapping):
        msg = f"{subject}: expected tensors by name, got {listed(foreign)}. Give a state dict."
        raise StateError(msg, mismatched=foreign)
    state = whole_tensors(state)
    # Narrower ones are of stored weights, which nothing is cast to.
    dtypes = {t.dtype for t in beside if t.is_floating_point() and t.itemsize >= _MIN_ITEMSIZE}
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    mismatched = [
        f"{name}: {problem}"
        for name in own.keys() & state.keys()
        if (problem := _problem(state[name], own[name], dtypes))
    ]
    if missing or unexpected or mismatched:
        msg = (
            f"{subject}: missing {listed(sorted(missing))}; unexpected "
            f"{listed(sorted(unexpected))}; mismatched {listed(sorted(mismatched))}. {fix}"
        )
        raise StateError(msg, missing=missing, unexpected=unexpected, mismatched=mismatched)
    written: list[tuple[Tensor, Tensor]] = []
    try:
        for name, tensor in own.items():
            written.append((tensor, tensor.detach().clone()))
            _copy_into_(tensor, state[name])
    except BaseException:
        # Whatever it was, an interrupt included: not a mixture of two states.
        for tensor, before in reversed(written):
            _copy_into_(tensor, before)
        raise


def _copy_into_(tensor: Tensor, values: Tensor) -> None:
    # Tensors made in inference mode can be written in it alone.
    with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
        copy_into_(tensor, values)


_MIN_ITEMSIZE = 2


def _problem(given: Tensor, own: Tensor, others: AbstractSet[torch.dtype]) -> str | None:
    if is_partitioned(own):
        return "expected a parameter with values, got one that DeepSpeed has partitioned"
    if is_flattened(own):
        return "expected a parameter of its own, got one that FSDP1 has flattened"
    if given.shape != own.shape:
        return f"expected shape {tuple(own.shape)}, got {tuple(given.shape)}"
    if given.is_floating_point() != own.is_floating_point():
        return f"expected {own.dtype} values, got {given.dtype}"
    cast = given.to(own.dtype)
    if not given.is_floating_point():
        fits = torch.equal(cast.to(given.dtype), given)
        return None if fits else f"values do not fit in {own.dtype}"
    dtypes = (own.dtype, *sorted(others - {own.dtype}, key=str))
    bad = (dtype for dtype in dtypes if not torch.isfinite(cast.to(dtype)).all())
    return next((f"values are not finite in {dtype}" for dtype in bad), None)
