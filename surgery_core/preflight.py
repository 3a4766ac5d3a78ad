"""What a model is wrapped in or placed by, and whether it can be worked on so."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from surgery_core.errors import PreflightError
from surgery_core.sharded import is_fully_sharded, is_partitioned, is_sharded

Level = Literal["error", "note"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostic:
    """Something about a model that matters before it is written to.

    Args:
        level: An error keeps a plan from being made; a note does not.
        subject: What it is, for example `DistributedDataParallel`.
        fqn: Where; empty for the root.
        message: What follows from it, and what to do.
    """

    level: Level
    subject: str
    fqn: str
    message: str

    def __str__(self) -> str:
        where = f"at {self.fqn!r}" if self.fqn else "at the root"
        return f"{self.subject} {where}: {self.message}"


@dataclass(frozen=True, slots=True)
class _Kind:
    """A class by name, since most of these live in packages that need not be installed."""

    package: str
    name: str
    level: Level
    message: str

    def is_(self, cls: type) -> bool:
        """Tell whether a class is the one that is meant."""
        # With the dot: packages may begin alike.
        return cls.__name__ == self.name and f"{cls.__module__}.".startswith(f"{self.package}.")


_KINDS = (
    _Kind(
        *("torch.nn.parallel", "DistributedDataParallel", "error"),
        "it has noted which parameters there are. Plan for its `module`, and wrap it afterwards.",
    ),
    _Kind(
        *("torch.distributed._composable", "DDP", "error"),
        "it has noted which parameters there are. Apply before `replicate`.",
    ),
    _Kind(
        *("torch.nn.parallel", "DataParallel", "error"),
        "it copies the model at each call. Plan for its `module`, and wrap it afterwards.",
    ),
    _Kind(
        *("torch.distributed.fsdp", "FullyShardedDataParallel", "error"),
        "its parameters are flattened and sharded. Apply first, and use `fully_shard` instead.",
    ),
    _Kind(
        *("torch.distributed.fsdp", "FSDPModule", "error"),
        "its parameters are sharded. Apply before `fully_shard`.",
    ),
    _Kind(
        *("torch._dynamo", "OptimizedModule", "error"),
        "it is a compiled view of another module. Plan for its `_orig_mod`, and compile it "
        "afterwards, or use `model.compile()`.",
    ),
    _Kind(
        *("torch.jit", "ScriptModule", "error"),
        "its code is fixed. Plan for the module it was scripted from.",
    ),
    _Kind(
        *("deepspeed", "DeepSpeedEngine", "error"),
        "it has noted which parameters there are. Apply before `deepspeed.initialize`.",
    ),
    _Kind(
        *("deepspeed", "PipelineModule", "error"),
        "its layers are spread over processes. Apply to the layers it is made from.",
    ),
    _Kind(
        *("peft", "PeftModel", "note"),
        "FQNs begin with those of its wrappers. Its own adapters stay as they are.",
    ),
)


_DISPATCHED, _LOADED_WHOLE = "dispatched by accelerate", "loaded whole by accelerate"
_META, _COMPILED = "on the meta device", "compiled in place"
_SPREAD, _PARTITIONED = "spread over processes", "partitioned by DeepSpeed"

_PRELOADED = (
    "each call looks up the tensors inside by name, and finds none that was added. Dispatch without "
    "`preload_module_classes`."
)

_TAKEN_AWAY = (
    "their parameters are empty between calls (ZeRO-3). Load the model without `zero.Init`, and apply "
    "before `deepspeed.initialize`."
)
_PARTS = (
    "each process has a part of their weights. Apply in all of them; what needs whole weights is "
    "refused."
)

_STATES: Mapping[str, tuple[Level, str]] = {
    _LOADED_WHOLE: ("error", _PRELOADED),
    _DISPATCHED: (
        "note",
        "weights may come and go with each call. What is added stays where they compute.",
    ),
    _PARTITIONED: ("error", _TAKEN_AWAY),
    _SPREAD: ("note", _PARTS),
    _META: ("note", "there are no values to compute with. Load them before running the model."),
    _COMPILED: (
        "note",
        "what replaces one of them is not compiled. Call its `compile()` where that matters.",
    ),
}
"""What modules may be in, whatever their class, and what follows."""


def diagnose(model: nn.Module) -> list[Diagnostic]:
    """Return what matters about a model before it is written to; nothing is changed.

    Args:
        model: The model.

    Example:
        >>> [str(found) for found in diagnose(nn.DataParallel(nn.Linear(2, 2)))]
        ['DataParallel at the root: it copies the model at each call. Plan for its `module`, and wrap it afterwards.']
    """
    return list(_diagnose(model))


def check_preflight(diagnostics: Iterable[Diagnostic]) -> None:
    """Refuse a model about which something is an error.

    Raises:
        PreflightError: All of them are named.
    """
    errors = [found for found in diagnostics if found.level == "error"]
    if errors:
        msg = f"Model cannot be worked on: {' '.join(map(str, errors))}"
        raise PreflightError(msg, diagnostics=errors)


def execution_device(module: nn.Module) -> torch.device | None:
    """Return where a module computes whose weights are elsewhere until they are needed.

    That is what accelerate does for models that do not fit on a device: between calls the weights
    are on the meta device.

    Args:
        module: The module; those inside it count too.

    Returns:
        None for a module whose tensors are where it computes.
    """
    for found in module.modules():
        for each in _dispatch_hooks(found):
            device = getattr(each, "execution_device", None)
            if device is not None:
                # An integer is the number of an accelerator, and without one it is the current one:
                # a tensor says which that is.
                return torch.empty(0, device=device).device
    return None


def _diagnose(model: nn.Module) -> Iterator[Diagnostic]:
    seen: set[type[nn.Module]] = set()
    found: dict[str, list[str]] = {state: [] for state in _STATES}
    for fqn, module in model.named_modules():
        for state in _states(module):
            found[state].append(fqn)
        cls = type(module)
        if cls not in seen:
            seen.add(cls)
            for kind in _KINDS:
                if any(kind.is_(base) for base in cls.__mro__):
                    yield Diagnostic(
                        level=kind.level, subject=kind.name, fqn=fqn, message=kind.message
                    )
    if any(map(is_fully_sharded, model.modules())):
        # Then that is said of it already.
        found[_SPREAD] = []
    for state, (level, message) in _STATES.items():
        fqns = found[state]
        if fqns:
            modules = "1 module" if len(fqns) == 1 else f"{len(fqns)} modules"
            subject = f"{modules} {state}"
            yield Diagnostic(level=level, subject=subject, fqn=fqns[0], message=message)


def _states(module: nn.Module) -> Iterator[str]:
    hooks = _dispatch_hooks(module)
    own = [p for p in module._parameters.values() if p is not None]  # noqa: SLF001 (torch's registry)
    if any(map(is_partitioned, own)):
        yield _PARTITIONED
    if any(map(is_sharded, own)):
        yield _SPREAD
    if any(getattr(each, "offload", False) and each.place_submodules for each in hooks):
        yield _LOADED_WHOLE
    if hooks:
        yield _DISPATCHED
    elif any(p.is_meta for p in own):
        yield _META
    # Nothing public says that `nn.Module.compile` has been called.
    if vars(module).get("_compiled_call_impl") is not None:
        yield _COMPILED


def _dispatch_hooks(module: nn.Module) -> tuple[Any, ...]:
    """Return what accelerate calls before and after a module's forward."""
    hook = vars(module).get("_hf_hook")
    if hook is None:
        return ()
    # Several hooks may be chained in one.
    return tuple(getattr(hook, "hooks", (hook,)))
