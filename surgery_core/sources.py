"""Load the model that a source names, and decide here, and nowhere else, whether text may become code."""

import importlib
import sys
from pathlib import Path

from torch import nn

from surgery_core.errors import OptionsError
from surgery_core.plugins import Plugins


def is_factory(source: str) -> bool:
    """Tell whether a source is `package.module:factory`, which is imported and called."""
    return ":" in source and not Path(source).exists()


def load_source(
    plugins: Plugins, source: str, *, weights: bool, asked_by: str | None = None
) -> nn.Module:
    """Build the model a source names.

    Args:
        plugins: Asked for sources that are not `package.module:factory`.
        source: A folder, a file, an identifier or a factory.
        weights: With them; otherwise the model may be on the meta device.
        asked_by: Where a file asks for it that must not run code; None if the user does, or allowed
            it.

    Raises:
        OptionsError: Nobody knows the source; or it is a factory, and a file asks for it.
    """
    check_allowed(source, asked_by=asked_by)
    found: object
    if is_factory(source):
        found = _called(source)
    elif weights:
        found = plugins.load_model(source)
    else:
        found = plugins.load_skeleton(source)
    if not isinstance(found, nn.Module):
        msg = (
            f"Source {source!r} gives no model: expected package.module:factory, or a folder that "
            f"an installed plugin can read, got {found!r}. See `surgery plugins`."
        )
        raise OptionsError(msg)
    return found


def check_allowed(source: str, *, asked_by: str | None) -> None:
    """Refuse a factory that only a file asks for.

    Args:
        source: See `load_source`.
        asked_by: Same.

    Raises:
        OptionsError: It is one.
    """
    if asked_by is not None and is_factory(source):
        module, _, name = source.partition(":")
        msg = (
            f"{asked_by} names {source!r}, which is code: the module {module!r} would be imported and "
            f"its {name!r} called. If you trust it, pass --allow-code, or allow_code=True to Session. "
            "Otherwise name another model with --model."
        )
        raise OptionsError(msg)


def _called(source: str) -> object:
    module, _, name = source.partition(":")
    # Last, so that nothing there hides what is installed; and only now, so that nothing there is
    # imported by others that look for what is optional to them.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, TypeError, ValueError) as err:
        msg = f"Source {source!r} cannot be imported: {err}. Write package.module:factory."
        raise OptionsError(msg) from err
