"""The gates of an adapter as a picture: layers upwards, heads to the right, colour for the value."""

import math
import os
from typing import TYPE_CHECKING, Any

from surgery_adaption_prompt.parts import GATE
from surgery_adaption_prompt.status import AdapterStatus
from surgery_core import StateError, SurgeryError, listed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = "RdBu_r"
NO_VALUE = "#999999"
"""Colour of what has no place in `COLOURS`."""
EDGES = "#bbbbbb"
CELL = 0.26
"""Width and height of a gate, in inches."""
MOST_TICKS = 16
"""How many heads have their number written below them."""


def draw_gates(status: AdapterStatus, path: str | os.PathLike[str] | None = None) -> "Figure":
    """Draw the activated gates of an adapter as a heat map, layers by heads.

    White is a closed gate; both signs have the same scale. Grey is a gate that is not finite, or
    a head that a layer does not have. Needs matplotlib, which the extra `plots` installs.

    Args:
        status: Of the adapter.
        path: File to write, its format named by the suffix; the same gates give the same SVG.

    Returns:
        The figure, which pyplot does not know and nobody has to close.

    Raises:
        StateError: The gates of a layer have no values here.
        SurgeryError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415 (an optional extra)
        from matplotlib.figure import Figure  # noqa: PLC0415 (same)
    except ImportError as err:
        msg = (
            f"Gates of adapter {status.name!r} cannot be drawn: expected matplotlib 3.9 or later, "
            f"got {err!r}. Install surgery-adaption-prompt[plots]."
        )
        raise SurgeryError(msg) from err
    grid = _grid(status)
    size = (2.6 + CELL * max(len(grid[0]), 3), 1.3 + CELL * max(len(grid), 3))
    settings: dict[Any, object] = {
        "font.size": 9,
        # Text stays text, and the same gates give the same file.
        "svg.fonttype": "none",
        "svg.hashsalt": "surgery",
        # A dollar sign in a name is one.
        "text.parse_math": False,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        _fill(axes, status, grid)
        bar = figure.colorbar(axes.images[0], ax=axes, aspect=2 * max(len(grid), 7), pad=0.03)
        bar.set_label("gate" if status.gate_activation == "identity" else "tanh of gate")
        bar.outline.set_edgecolor(EDGES)
        if path is not None:
            is_svg = os.fspath(path).lower().endswith(".svg")
            metadata = {"Date": None, "Creator": None} if is_svg else None
            figure.savefig(path, dpi=150, metadata=metadata)
    return figure


def _fill(axes: "Axes", status: AdapterStatus, grid: list[list[float]]) -> None:
    largest = max(
        (abs(value) for row in grid for value in row if math.isfinite(value)), default=0.0
    )
    # Where all are closed any scale will do, but it needs a width.
    limit = largest or 1.0
    num_layers, num_heads = len(grid), len(grid[0])
    axes.imshow(
        grid,
        cmap=COLOURS,
        vmin=-limit,
        vmax=limit,
        origin="lower",
        aspect="auto",
        interpolation="none",
    )
    # The map leaves out what is not finite, which shows the background.
    axes.set_facecolor(NO_VALUE)
    labels, pattern = _layer_labels(list(status.gates))
    axes.set_yticks(range(num_layers), labels)
    axes.set_ylabel(pattern)
    is_by_head = status.gate == "head"
    axes.set_xticks(range(0, num_heads, math.ceil(num_heads / MOST_TICKS)) if is_by_head else [])
    axes.set_xlabel("attention head" if is_by_head else "all heads")
    # Lines between the cells, so that neighbours of one colour can be counted.
    axes.set_xticks([head - 0.5 for head in range(1, num_heads)], minor=True)
    axes.set_yticks([layer - 0.5 for layer in range(1, num_layers)], minor=True)
    axes.grid(which="minor", color="white", lw=0.8)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_color(EDGES)
    axes.set_title(f"Gates of adapter {status.name!r}", fontsize=9)


def _grid(status: AdapterStatus) -> list[list[float]]:
    """Return the gates as rows of one length, nan where a layer has fewer heads than another."""
    known = [values for values in status.gates.values() if values is not None]
    missing = [f"{fqn}.{GATE}" for fqn, values in status.gates.items() if values is None]
    if missing or not known:
        msg = (
            f"Gates of adapter {status.name!r} cannot be drawn: expected values in this process, "
            f"got none for {listed(missing)}. Load the weights, or gather them, before."
        )
        raise StateError(msg, missing=missing)
    num_heads = max(map(len, known))
    return [[*values, *[math.nan] * (num_heads - len(values))] for values in known]


def _layer_labels(fqns: list[str]) -> tuple[list[str], str]:
    """Return what tells modules apart, and what they have in common, with `*` in place of it.

    Example:
        >>> _layer_labels(["h.8.attn", "h.9.attn"])
        (['8', '9'], 'h.*.attn')
    """
    rows = [fqn.split(".") for fqn in fqns]
    if len(rows) == 1 or len({len(row) for row in rows}) > 1:
        return fqns, "module"
    differs = [len(set(column)) > 1 for column in zip(*rows, strict=True)]
    own = [[part for part, is_own in zip(row, differs, strict=True) if is_own] for row in rows]
    shared = ["*" if is_own else part for part, is_own in zip(rows[0], differs, strict=True)]
    return [".".join(parts) for parts in own], ".".join(shared)
