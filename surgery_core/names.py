"""Names of adapters and models, which become names of folders on any system."""

import unicodedata
from collections.abc import Iterable

_NOT_IN_NAMES = set("/\\:")
"""They separate folders, streams of files on Windows, and names from keys in records."""

_MAX_BYTES = 255
"""Of the name of a folder, in the form that takes more of them."""

_FILES = frozenset(
    {
        *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
        *("base_fingerprint.json", "readme.md", "surgery.json", "surgery.safetensors"),
    }
)
"""Files that are saved next to the folders, in lower case."""

_DEVICES = frozenset(
    {
        *("con", "prn", "aux", "nul"),
        *(f"{port}{number}" for port in ("com", "lpt") for number in "123456789\xb9\xb2\xb3"),
    }
)
"""Names that mean a device on Windows, with any suffix, in lower case."""


def can_name_folder(name: str) -> bool:
    """Tell whether a name is one part of a path, and not of a hidden folder."""
    is_hidden = name.startswith(".")
    return bool(name) and not is_hidden and not set(name) & _NOT_IN_NAMES and name.isprintable()


def name_problem(name: str, others: Iterable[str] = ()) -> str | None:
    """Return why a folder of this name could not be saved everywhere; None if it can.

    Args:
        name: The name, for which `can_name_folder` holds.
        others: Names of its neighbours; itself is not looked at.

    Example:
        >>> name_problem("french") is None
        True
        >>> name_problem("French", ["french"])
        "on some disks it is the same folder as 'french'"
    """
    if name.endswith((".", " ")):
        return "it ends with a dot or a space, which Windows drops"
    if max(len(unicodedata.normalize(form, name).encode()) for form in ("NFC", "NFD")) > _MAX_BYTES:
        return f"it is longer than {_MAX_BYTES} bytes"
    same = _as_on_disk(name)
    if same in _FILES:
        return "a file of that name is saved in the same folder"
    if same.partition(".")[0].rstrip() in _DEVICES:
        return "it names a device on Windows"
    twin = next((other for other in others if other != name and _as_on_disk(other) == same), None)
    return None if twin is None else f"on some disks it is the same folder as {twin!r}"


def _as_on_disk(name: str) -> str:
    """Return what is equal for names that a disk may take for the same: Unicode's caseless matching."""
    folded = unicodedata.normalize("NFD", name).casefold()
    return unicodedata.normalize("NFD", folded)
