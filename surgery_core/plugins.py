"""Find, load and ask plugins: one manager per session, a broken plugin reported and not fatal."""

import importlib.metadata
import inspect
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, cast

import pluggy
from torch import nn

from surgery_core import hookspecs
from surgery_core.errors import (
    PluginError,
    SurgeryWarning,
    UnknownOperationError,
    listed,
)
from surgery_core.hookspecs import COMMANDS_GROUP, CORE_COMMANDS, PROJECT, Command
from surgery_core.operation import Operation
from surgery_core.preflight import Diagnostic, diagnose
from surgery_core.shown import Shown
from surgery_core.surgery import Surgery

BLOCK_VARIABLE = "SURGERY_BLOCK_PLUGINS"
"""Environment variable: names of entry points not to load, separated by commas."""

SLOW_SECONDS = 10.0
"""After which it is said which plugin is being loaded."""

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginInfo:
    """What `surgery plugins` says of one plugin.

    Args:
        name: Entry-point name, or the name of the module or class registered.
        distribution: `name version`; None when it was registered by hand.
        hooks: Names of the hooks it implements, sorted.
        operations: Names of the operations it offers, sorted.
        error: Why it could not be loaded; None when it was.
        commands: Names of the commands it adds to `surgery`, sorted.
    """

    name: str
    distribution: str | None
    hooks: tuple[str, ...]
    operations: tuple[str, ...]
    error: str | None
    commands: tuple[str, ...] = ()


class Plugins:
    """The plugins of one session, and a typed way to ask them.

    Loading a plugin makes its operations nameable and does nothing else. Loading is
    transactional: a plugin that breaks the contract leaves nothing behind.

    Args:
        plugins: Modules or objects with hook implementations; one that is broken raises.
        discover: Also load entry points; one that is broken is kept in `broken` and does not raise.
        group: Of the entry points: every plugin, or those that have commands.

    Raises:
        PluginError: A plugin passed breaks the contract.
    """

    def __init__(
        self, plugins: Iterable[object] = (), *, discover: bool = True, group: str = PROJECT
    ) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._operations: dict[str, tuple[Operation[Any], str]] = {}
        self._commands: dict[str, tuple[Command, str]] = {}
        self._infos: dict[str, PluginInfo] = {}
        self.broken: dict[str, PluginError] = {}
        for plugin in plugins:
            self._load(plugin, _name_of(plugin), None)
        if discover:
            self._discover(group)

    @property
    def infos(self) -> tuple[PluginInfo, ...]:
        """Every plugin found, broken ones included, sorted by name."""
        return tuple(self._infos[name] for name in sorted(self._infos))

    @property
    def operations(self) -> dict[str, Operation[Any]]:
        """Operations by name, sorted."""
        return {name: self._operations[name][0] for name in sorted(self._operations)}

    @property
    def commands(self) -> dict[str, Command]:
        """Commands of plugins by name, sorted."""
        return {name: self._commands[name][0] for name in sorted(self._commands)}

    def operation(self, name: str) -> Operation[Any]:
        """Return the operation of that name.

        Raises:
            UnknownOperationError: No loaded plugin offers it; the cause is the error of a broken
                plugin, if there is one.
        """
        if name in self._operations:
            return self._operations[name][0]
        msg = f"Operation {name!r} is unknown: expected one of {listed(self.operations)}."
        msg += (
            f" Plugins that failed to load: {listed(sorted(self.broken))}; see `surgery plugins`."
            if self.broken
            else " Install the plugin that offers it, or pass the plugin to Session."
        )
        cause = next(iter(self.broken.values()), None)
        raise UnknownOperationError(msg) from cause

    def load_skeleton(self, source: str) -> nn.Module | None:
        """Ask the plugins for the model a source names, without weights; None if nobody knows it."""
        found: nn.Module | None = self._manager.hook.surgery_load_skeleton(source=source)
        return found

    def load_model(self, source: str) -> nn.Module | None:
        """Ask the plugins for the model a source names; None if nobody knows it."""
        found: nn.Module | None = self._manager.hook.surgery_load_model(source=source)
        return found

    def probe_inputs(self, model: nn.Module) -> Mapping[str, Any] | None:
        """Ask the plugins for arguments to call a model with; None if nobody knows it."""
        found: Mapping[str, Any] | None = self._manager.hook.surgery_probe_inputs(model=model)
        return found

    def preflight(self, model: nn.Module) -> list[Diagnostic]:
        """Return what the core and the plugins find about a model before it is written to.

        Raises:
            PluginError: A plugin failed to look.
        """
        found = diagnose(model)
        for implementation in self._manager.hook.surgery_preflight.get_hookimpls():
            try:
                arguments = {"model": model} if implementation.argnames else {}
                answer = cast("Iterable[object]", implementation.function(**arguments))
                found += [_checked_diagnostic(value) for value in answer]
            except KeyboardInterrupt:
                raise
            except BaseException as err:
                name = implementation.plugin_name
                msg = f"Plugin {name!r} failed in surgery_preflight: {err!r}."
                raise PluginError(msg, plugin=name) from err
        return found

    def owner(self, operation: str) -> str | None:
        """Return `name version` of the distribution that offers an operation; None if it has none."""
        for info in self._infos.values():
            if operation in info.operations:
                return info.distribution
        return None

    def show(self, source: str) -> Shown | None:
        """Ask the plugins what is saved in a source; None if nobody knows it."""
        found: Shown | None = self._manager.hook.surgery_show(source=source)
        return found

    def notify_applied(self, surgery: Surgery) -> None:
        """Tell every plugin that a plan was applied."""
        self._notify("surgery_applied", surgery)

    def notify_reverted(self, surgery: Surgery) -> None:
        """Tell every plugin that a surgery was reverted."""
        self._notify("surgery_reverted", surgery)

    def _notify(self, hook: str, surgery: Surgery) -> None:
        # One plugin at a time: an observer that raises must not keep the others from being told.
        for implementation in getattr(self._manager.hook, hook).get_hookimpls():
            arguments = {"surgery": surgery} if implementation.argnames else {}
            try:
                implementation.function(**arguments)
            except KeyboardInterrupt:
                raise
            except BaseException as err:  # noqa: BLE001 (whatever an observer does becomes a warning)
                msg = f"Plugin {implementation.plugin_name!r} failed in {hook}: {err!r}."
                warnings.warn(msg, SurgeryWarning, stacklevel=4)

    def _discover(self, group: str) -> None:
        blocked = {name.strip() for name in os.environ.get(BLOCK_VARIABLE, "").split(",")}
        for entry_point in importlib.metadata.entry_points(group=group):
            distribution = _distribution(entry_point)
            if entry_point.name in blocked:
                continue
            with _interrupts() as is_interrupted, _watched(entry_point.name, distribution):
                try:
                    self._discovered(entry_point, distribution)
                except BaseException as err:  # noqa: BLE001 (whatever a plugin's import raises)
                    if not (isinstance(err, KeyboardInterrupt) and is_interrupted()):
                        self._report_broken(entry_point.name, distribution, err)
            # Also where the plugin made light of it.
            if is_interrupted():
                interrupt = KeyboardInterrupt()
                interrupt.add_note(_said(entry_point.name, distribution, "was being loaded"))
                raise interrupt

    def _discovered(
        self, entry_point: importlib.metadata.EntryPoint, distribution: str | None
    ) -> None:
        plugin = entry_point.load()
        if plugin not in self._manager.get_plugins():
            self._check_free(entry_point.name, distribution)
            self._load(plugin, entry_point.name, distribution)

    def _check_free(self, name: str, distribution: str | None) -> None:
        if self._manager.has_plugin(name):
            other = self._infos[name].distribution
            msg = (
                f"Plugin {name!r} ({distribution}) is not loaded: a plugin of that name is, from "
                f"{other or 'this session'}. Uninstall or leave out one of them."
            )
            raise PluginError(msg, plugin=name, distribution=distribution)

    def _report_broken(self, name: str, distribution: str | None, err: BaseException) -> None:
        error = err
        if not isinstance(err, PluginError):
            msg = f"Plugin {name!r} ({distribution}) could not be imported: {err!r}."
            error = PluginError(msg, plugin=name, distribution=distribution)
            error.__cause__ = err
        # Another distribution may have a plugin of that name, broken or not.
        key = f"{name} ({distribution})" if name in self._infos else name
        self.broken[key] = error  # type: ignore[assignment]  # narrowed just above
        self._infos[key] = PluginInfo(
            name=name, distribution=distribution, hooks=(), operations=(), error=str(error)
        )

    def _load(self, plugin: object, name: str, distribution: str | None) -> None:
        owner = f"{name!r} ({distribution})" if distribution else repr(name)
        try:
            self._manager.register(plugin, name=name)
            self._manager.check_pending()
            hooks = _check_defaults(self._manager, plugin)
            offered = self._ask_operations(plugin)
            self._check_names(offered, owner)
            commands = self._ask_commands(plugin)
            self._check_commands(commands, owner)
            if commands and distribution is not None:
                _check_listed(name)
        except BaseException as err:
            if self._manager.is_registered(plugin):
                self._manager.unregister(plugin)
            if isinstance(err, KeyboardInterrupt):
                raise
            what = str(err) if isinstance(err, Exception) else f"it raised {err!r}."
            msg = f"Plugin {owner} breaks the contract: {what}"
            raise PluginError(msg, plugin=name, distribution=distribution) from err
        self._operations.update({operation.name: (operation, owner) for operation in offered})
        self._commands.update({name: (command, owner) for name, command in commands.items()})
        self._infos[name] = PluginInfo(
            name=name,
            distribution=distribution,
            hooks=hooks,
            operations=tuple(sorted(operation.name for operation in offered)),
            commands=tuple(sorted(commands)),
            error=None,
        )

    def _ask_operations(self, plugin: object) -> list[Operation[Any]]:
        others = [known for known in self._manager.get_plugins() if known is not plugin]
        caller = self._manager.subset_hook_caller("surgery_operations", remove_plugins=others)
        offered = [operation for answer in caller() for operation in answer]
        for operation in offered:
            if not isinstance(operation, Operation):
                msg = f"surgery_operations returned {operation!r}: expected an Operation."
                raise TypeError(msg)
        return offered

    def _ask_commands(self, plugin: object) -> dict[str, Command]:
        others = [known for known in self._manager.get_plugins() if known is not plugin]
        caller = self._manager.subset_hook_caller("surgery_commands", remove_plugins=others)
        found: dict[Any, Any] = {}
        for answer in caller():
            if not isinstance(answer, Mapping):
                msg = f"surgery_commands returned {answer!r}: expected functions by name."
                raise TypeError(msg)
            found.update(answer)
        for name, command in found.items():
            if not isinstance(name, str) or not callable(command):
                msg = f"surgery_commands returned {command!r} for {name!r}: expected a function."
                raise TypeError(msg)
        return found

    def _check_commands(self, commands: Mapping[str, Command], owner: str) -> None:
        for name in commands:
            by = self._commands[name][1] if name in self._commands else None
            by = "the core" if name in CORE_COMMANDS else by
            if by is not None:
                msg = (
                    f"command {name!r} is offered by {by} and by {owner}. Block one of them with "
                    f"{BLOCK_VARIABLE}."
                )
                raise ValueError(msg)

    def _check_names(self, offered: list[Operation[Any]], owner: str) -> None:
        taken = {name: by for name, (_, by) in self._operations.items()}
        for operation in offered:
            if operation.name in taken:
                msg = (
                    f"operation {operation.name!r} is offered by {taken[operation.name]} and by "
                    f"{owner}. Block one of them with {BLOCK_VARIABLE}."
                )
                raise ValueError(msg)
            taken[operation.name] = owner


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Tell whether the user interrupts, which a plugin may swallow, or pretend by raising the same."""
    noted: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        # Interrupts go to the main thread, or are ignored.
        yield lambda: False
        return

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        # Unless somebody else's is there now.
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, before)


@contextmanager
def _watched(name: str, distribution: str | None) -> Iterator[None]:
    """Say which plugin is being loaded if that takes long; nothing is stopped."""

    def tell() -> None:
        what = f"has been loading for {SLOW_SECONDS:g} seconds"
        _LOGGER.warning("%s", _said(name, distribution, what))

    timer = threading.Timer(SLOW_SECONDS, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _said(name: str, distribution: str | None, what: str) -> str:
    return f"Plugin {name!r} ({distribution}) {what}. Set {BLOCK_VARIABLE}={name} to leave it out."


def _check_listed(name: str) -> None:
    """Refuse a plugin whose commands the command line would not find."""
    if not importlib.metadata.entry_points(group=COMMANDS_GROUP, name=name):
        msg = (
            f"it has commands, and no entry point {name!r} in group {COMMANDS_GROUP!r}, where the "
            "command line looks for them. Add one."
        )
        raise ValueError(msg)


def _check_defaults(manager: pluggy.PluginManager, plugin: object) -> tuple[str, ...]:
    """Refuse implementations whose arguments have defaults; return the names of the hooks."""
    names = []
    for caller in manager.get_hookcallers(plugin) or ():
        names.append(caller.name)
        for implementation in caller.get_hookimpls():
            if implementation.plugin is not plugin:
                continue
            defaulted = [
                parameter.name
                for parameter in inspect.signature(implementation.function).parameters.values()
                if parameter.default is not inspect.Parameter.empty
            ]
            if defaulted:
                msg = (
                    f"{caller.name} gives a default to {listed(defaulted)}, so pluggy would never "
                    "pass it. Remove the default."
                )
                raise TypeError(msg)
    return tuple(sorted(names))


def _checked_diagnostic(value: object) -> Diagnostic:
    if not isinstance(value, Diagnostic):
        msg = f"expected a Diagnostic, got {value!r}"
        raise TypeError(msg)
    return value


def _name_of(plugin: object) -> str:
    name = getattr(plugin, "__name__", None)
    return name if isinstance(name, str) else type(plugin).__name__


def _distribution(entry_point: importlib.metadata.EntryPoint) -> str | None:
    dist = entry_point.dist
    return f"{dist.name} {dist.version}" if dist is not None else None
