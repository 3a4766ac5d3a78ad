"""What the API pages need of docstrings: sections named `Example` are examples, run by the tests."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Gives sections named `Example` the name that griffe knows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:  # noqa: ANN401 (griffe calls it)
        """Rename the sections of an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )
