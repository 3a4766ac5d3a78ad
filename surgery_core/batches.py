"""The batch of a running pass, and whether it is the first axis of what a layer gets."""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

_NO_GRAPH = "it would not see which variants a thread uses"


@dataclass(slots=True, eq=False)
class _Pass:
    """A call of the module with which a pass began."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    depth: int = 1
    token: Token[Mapping["BatchWatch", "_Pass"]] | None = None


@dataclass(slots=True, eq=False)
class _Probe:
    """What layers get from a single row: the lengths of their first axes, by FQN."""

    lengths: dict[str, set[int]] = field(default_factory=dict)


_RUNNING: ContextVar[Mapping["BatchWatch", _Pass]] = ContextVar(
    "surgery_core_passes", default=MappingProxyType({})
)
_PROBE: ContextVar[_Probe | None] = ContextVar("surgery_core_probe", default=None)


class BatchWatch:
    """Hooks above some layers, by which these know the batch of the pass that runs.

    A layer's input alone does not tell: `(sequence, batch, features)` looks like
    `(batch, sequence, features)`.

    Args:
        root: The model.
    """

    def __init__(self, root: nn.Module) -> None:
        # In a tuple: this is no place of the model.
        self._root = (root,)
        self._fqns: frozenset[str] = frozenset()
        self._handles: list[RemovableHandle] = []
        self._is_first: dict[str, bool] = {}

    def watch(self, fqns: Collection[str]) -> None:
        """Have hooks above layers, and nowhere else."""
        if self._fqns == frozenset(fqns):
            return
        while self._handles:
            self._handles.pop().remove()
        self._fqns = frozenset(fqns)
        for module in _above(self._root[0], self._fqns):
            self._handles += [
                module.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
                module.register_forward_hook(self._end, always_call=True),
            ]

    def problem(
        self, fqn: str, x: Tensor, num_rows: int, base_alone: Callable[[Callable[[], Any]], Any]
    ) -> str | None:
        """Tell why the first axis of a layer's input is not the batch, or may not be.

        Args:
            fqn: Of the layer.
            x: What it got.
            num_rows: That the batch has, or a part of them.
            base_alone: Calls a function while the base computes.

        Returns:
            What is wrong; None if the axis is the batch.
        """
        running = _RUNNING.get().get(self)
        if running is None:
            # The pass began with the layer.
            return None
        batch = _batch_of(running, num_rows)
        if batch is None:
            return f"the model's own input has no axis of {num_rows} rows, or a multiple"
        if len(x) != batch:
            return f"the model's own input has {batch} rows"
        if batch not in x.shape[1:-1]:
            self._is_first[fqn] = True
        elif fqn not in self._is_first:
            self._is_first.update(base_alone(lambda: self._probed(running, batch)))
        if self._is_first.get(fqn, False):
            return None
        return f"its first axis may not be that of the {batch} rows, since another is as long"

    @torch.compiler.disable(reason=_NO_GRAPH)  # type: ignore[untyped-decorator,no-untyped-call]
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        known = _RUNNING.get()
        if self in known:
            known[self].depth += known[self].module is module
        else:
            begun = _Pass(module, args, kwargs)
            begun.token = _RUNNING.set({**known, self: begun})

    @torch.compiler.disable(reason=_NO_GRAPH)  # type: ignore[untyped-decorator,no-untyped-call]
    def _end(self, module: nn.Module, *_: Any) -> None:  # noqa: ANN401 (torch's signature)
        running = _RUNNING.get().get(self)
        if running is None or running.module is not module:
            return
        # A module may call itself, and does when it is probed.
        running.depth -= 1
        if not running.depth and running.token is not None:
            _RUNNING.reset(running.token)

    @torch.no_grad()
    def _probed(self, running: _Pass, batch: int) -> dict[str, bool]:
        """Run the first row alone, and tell by FQN whether the first axis of an input became one."""
        probe, model = _Probe(), running.module
        root = self._root[0]
        handles = [
            root.get_submodule(fqn).register_forward_pre_hook(_recording(fqn)) for fqn in self._fqns
        ]
        # In training, norms count.
        kept = [(buffer, buffer.clone()) for buffer in model.buffers()] if model.training else []
        token = _PROBE.set(probe)
        devices = {p.get_device() for p in model.parameters() if p.is_cuda}
        try:
            with torch.random.fork_rng(devices=sorted(devices)):
                args, kwargs = (
                    _first_row(given, batch) for given in (running.args, running.kwargs)
                )
                model(*args, **kwargs)
        except Exception:  # noqa: BLE001 (whatever it is, it does not tell)
            return {}
        finally:
            _PROBE.reset(token)
            for handle in handles:
                handle.remove()
            for buffer, values in kept:
                buffer.copy_(values)
        return {fqn: lengths == {1} for fqn, lengths in probe.lengths.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        # Hooks of copied models watch nothing.
        return BatchWatch, (nn.Module(),)


def _above(root: nn.Module, fqns: Collection[str]) -> Iterator[nn.Module]:
    """Yield every module above some, each once."""
    names = {fqn[: max(0, at)] for fqn in fqns for at in _dots(fqn)}
    yield from {id(m): m for m in map(root.get_submodule, sorted(names))}.values()


def _dots(fqn: str) -> Iterator[int]:
    yield -1
    yield from (at for at, letter in enumerate(fqn) if letter == ".")


def _recording(fqn: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def record(_: nn.Module, args: tuple[Any, ...]) -> None:
        probe = _PROBE.get()
        if probe is not None:
            is_known = bool(args) and isinstance(args[0], Tensor)
            probe.lengths.setdefault(fqn, set()).add(len(args[0]) if is_known else 0)

    return record


def _batch_of(running: _Pass, num_rows: int) -> int | None:
    """Return the rows of the first input that can have them, in the order of the parameters."""
    names = list(inspect.signature(running.module.forward).parameters)
    order = {name: place for place, name in enumerate(names)}
    by_name = sorted(running.kwargs, key=lambda name: order.get(name, len(order)))
    tensors = list(_tensors([*running.args, *(running.kwargs[name] for name in by_name)]))
    # Those of one axis may count tokens.
    for found in ([t for t in tensors if t.dim() > 1], [t for t in tensors if t.dim() == 1]):
        for tensor in found:
            if len(tensor) and len(tensor) % num_rows == 0:
                return len(tensor)
    return None


def _tensors(given: object) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, Mapping):
        yield from _tensors(list(given.values()))
    elif isinstance(given, list | tuple):
        for one in given:
            yield from _tensors(one)


def _first_row(given: Any, batch: int) -> Any:  # noqa: ANN401 (whatever a model takes)
    """Return an input with the first row of the batch alone.

    Raises:
        TypeError: There is an object that may keep something of the batch, as caches do.
    """
    if isinstance(given, Tensor):
        return given[:1] if given.dim() > 1 and len(given) == batch else given
    if isinstance(given, Mapping):
        return {name: _first_row(one, batch) for name, one in given.items()}
    if type(given) in (list, tuple):
        return type(given)(_first_row(one, batch) for one in given)
    if given is None or isinstance(given, bool | int | float | str | torch.dtype | torch.device):
        return given
    raise TypeError(type(given))
