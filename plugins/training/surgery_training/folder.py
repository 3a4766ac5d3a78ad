"""What a training leaves in its folder, and whether it may go on in one."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery_core import OptionsError, listed, read_text, write_files

RECORD_FILES = ("surgery.safetensors", "surgery.json")
"""What a record is known by; 0.1.0 wrote the second too."""

RUN_FILE, CURVES_FILE = "training.json", "curves.svg"
CHECKPOINTS, IDENTITY_FILE = "checkpoints", "run.json"

FORMAT, VERSION = "surgery training", 1


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of a training.

    It has `checkpoints`, with what the run was started with, and at the end the record of what was
    trained, `curves.svg` and, last of all, `training.json`.

    Args:
        path: Made when something is written.
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / CHECKPOINTS

    @property
    def is_finished(self) -> bool:
        """Whether a training came to its end here."""
        return (self.path / RUN_FILE).is_file()

    def begin(self, identity: Mapping[str, Any], *, resume: bool) -> None:
        """Take note of what a run is started with, or see that it goes on as it was started.

        Args:
            identity: Settings, recipe and digests of the data, as plain data.
            resume: Go on with what is there.

        Raises:
            OptionsError: There is a run, and `resume` was not said; or it was another.
        """
        noted = self.checkpoints / IDENTITY_FILE
        if not noted.is_file():
            if any((self.path / name).exists() for name in RECORD_FILES):
                msg = (
                    f"Folder {str(self.path)!r} has a record that is of no training: expected an "
                    "empty folder, or one to resume in. Pass another with --out."
                )
                raise OptionsError(msg)
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write(noted, json.dumps(identity, indent=1))
            return
        if not resume:
            msg = (
                f"Folder {str(self.path)!r} has a training already: expected an empty one. Pass "
                "--resume to go on with it, or another folder with --out."
            )
            raise OptionsError(msg)
        before = json.loads(read_text(noted))
        changed = sorted(
            key for key in {*before, *identity} if before.get(key) != identity.get(key)
        )
        if changed:
            details = "; ".join(
                f"{key}: {before.get(key)!r:.60} then, {identity.get(key)!r:.60} now"
                for key in changed
            )
            msg = (
                f"Training in {str(self.path)!r} cannot be resumed: expected what it was started "
                f"with, got another {listed(changed)} ({details}). Undo that, or pass another folder."
            )
            raise OptionsError(msg)

    def finish(self, data: Mapping[str, Any], curves: str) -> None:
        """Write what was measured; the record must be there already.

        Args:
            data: For `training.json`.
            curves: An SVG document.
        """
        write(self.path / CURVES_FILE, curves)
        head = {"format": FORMAT, "version": VERSION}
        write(self.path / RUN_FILE, json.dumps({**head, **data}, indent=1) + "\n")

    def read(self) -> dict[str, Any] | None:
        """Return what `finish` wrote; None if this is no training's folder.

        Raises:
            OptionsError: It is damaged, or of a later version.
        """
        path = self.path / RUN_FILE
        if not path.is_file():
            return None
        try:
            data: dict[str, Any] = json.loads(read_text(path))
            is_known = data["format"] == FORMAT and data["version"] <= VERSION
        except (OSError, ValueError, LookupError, TypeError) as err:
            msg = f"File {str(path)!r} is damaged: {err}. Restore it, or remove it."
            raise OptionsError(msg) from err
        if not is_known:
            msg = (
                f"File {str(path)!r} is of version {data['version']}: expected at most {VERSION}. "
                "Install a later surgery-training."
            )
            raise OptionsError(msg)
        return data


def write(path: Path, text: str) -> None:
    """Write a file whole: it is complete or not there, whenever the process dies."""
    write_files(path.parent, {path.name: text.encode()})


def digest(path: str) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
