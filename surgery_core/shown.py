"""What a plugin says of something on disk, and how the core writes tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery_core.errors import ContractError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What `surgery show` prints of one source.

    Args:
        title: Stands above the table.
        columns: Headings of the table.
        rows: Cells as text; each row has one for each column.
        notes: What a reader should know besides, a sentence each.
        data: The same and more for programs: what `json` writes, numbers finite.

    Raises:
        ContractError: A row has more or fewer cells than there are columns.

    Example:
        >>> Shown(title="fruit", columns=("name",), rows=(("pear",),), data={}).notes
        ()
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    data: Mapping[str, Any]

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                msg = (
                    f"Row {number} of {self.title!r} does not fit: expected {len(self.columns)} "
                    f"cells, got {len(row)}. Give one for each column."
                )
                raise ContractError(msg, fqn="", expected=len(self.columns), actual=len(row))


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table as plain text: a heading, a rule, and a line for each row, columns aligned.

    Args:
        columns: The headings.
        rows: Cells as text; each row has one for each column.

    Example:
        >>> print(format_table(["name", "size"], [["gate", "1"], ["prompt", "80"]]))
        name    size
        ------  ----
        gate    1
        prompt  80
    """
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [columns, ["-" * width for width in widths], *rows]
    )
