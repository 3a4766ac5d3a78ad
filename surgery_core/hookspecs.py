"""The contract with plugins: every hook the core calls, when, and what an answer means.

An implementation names the arguments it wants, and must not give them defaults: pluggy never
passes an argument that has one, so such a plugin is refused when it is loaded. What a hook prints
while the command line runs goes to stderr, since stdout is for results; one that ends the process is
an error.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pluggy
from torch import nn

from surgery_core.operation import Operation
from surgery_core.preflight import Diagnostic
from surgery_core.shown import Shown
from surgery_core.surgery import Surgery

PROJECT = "surgery_core"
"""Name of the pluggy project and of the entry-point group."""

COMMANDS_GROUP = "surgery_core.commands"
"""Entry-point group of the plugins that have commands, so that `surgery --help` loads no others."""

CORE_COMMANDS = frozenset(
    {"apply", "diff", "export", "import", "plan", "plugins", "schema", "show", "verify"}
)
"""Names of the core's own commands, which no plugin's can have."""

Command = Callable[..., None]
"""What a command does; its signature says, in typer's terms, which arguments it has."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def surgery_operations() -> Iterable[Operation[Any]]:  # type: ignore[empty-body]
    """Offer operations.

    Called once, when the plugin is loaded. Returns operations; a name that another plugin offers
    too is an error that names both. An exception makes the plugin a broken one: reported, not
    fatal. The order between plugins does not matter.
    """


@hookspec
def surgery_commands() -> Mapping[str, Command]:  # type: ignore[empty-body]
    """Add commands to `surgery`.

    Called once, when the plugin is loaded; the command line loads the entry points of group
    `surgery_core.commands` before it does anything else, and no other plugin, so a plugin with this
    hook names itself there as well as in `surgery_core`. Returns functions by the names of their
    commands. What takes long to import must be imported when a command runs, not when it is offered.
    A name that the core or another plugin has too is an error that names both. An exception makes the
    plugin a broken one: reported, not fatal. A command ends with `typer.Exit`, or by returning; a
    `SurgeryError` is printed with its notes, and the exit status is 1; so it is after `sys.exit`. The
    order between plugins does not matter.
    """


@hookspec(firstresult=True)
def surgery_load_skeleton(source: str) -> nn.Module | None:
    """Build the model that `source` names without its weights, on the meta device.

    Called by `surgery plan` for a source that is not `package.module:factory`, until a plugin
    answers. Return None for a source that is not yours; an exception ends the command.

    Args:
        source: What the user wrote: a folder, a file or an identifier.
    """


@hookspec(firstresult=True)
def surgery_load_model(source: str) -> nn.Module | None:
    """Load the model that `source` names, weights included.

    Called by `surgery apply` and its kin for a source that is not `package.module:factory`, until a
    plugin answers. Return None for a source that is not yours; an exception ends the command.

    Args:
        source: What the user wrote: a folder, a file or an identifier.
    """


@hookspec(firstresult=True)
def surgery_probe_inputs(model: nn.Module) -> Mapping[str, Any] | None:
    """Return arguments with which the model can be called, to verify it.

    Called once by `surgery verify`, until a plugin answers. They must be the same each time, and
    exercise every layer. Return None for a model that is not of yours.

    Args:
        model: Any model.
    """


@hookspec
def surgery_preflight(model: nn.Module) -> Iterable[Diagnostic]:  # type: ignore[empty-body]
    """Say what about a model matters before it is written to.

    Called once for each plan, for every plugin; the core's own findings come first. An error among
    the diagnostics keeps the plan from being made; an exception, or an answer that is no diagnostics,
    becomes a `PluginError`.

    Args:
        model: The model to plan for; it must not be changed.
    """


@hookspec(firstresult=True)
def surgery_show(source: str) -> Shown | None:
    """Say what is saved in `source`, without building a model.

    Called by `surgery show` until a plugin answers. Return None for a source that is not yours; an
    exception ends the command. Two plugins must not know the same source: which of them is asked
    first is not defined.

    Args:
        source: What the user wrote: a folder, a file or an identifier.
    """


@hookspec
def surgery_applied(surgery: Surgery) -> None:
    """Take note that a plan of this session was applied.

    Called once after each `Plan.apply`, for every plugin. An exception becomes a warning that names
    the plugin; the surgery stays applied.

    Args:
        surgery: The applied surgery.
    """


@hookspec
def surgery_reverted(surgery: Surgery) -> None:
    """Take note that a surgery of this session was reverted.

    Called once after each `Surgery.revert`, for every plugin. An exception becomes a warning that
    names the plugin; the surgery stays reverted.

    Args:
        surgery: The reverted surgery.
    """
