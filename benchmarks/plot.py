"""The ratios as a picture: one line a row, a dot at the median, a bar from quartile to quartile."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rows import Row

COLOURS = {"base": "#777777", "peft": "#b35806", "turns": "#777777", "ours": "#1f4e9c"}
NAMES = {"base": "base", "peft": "PEFT", "turns": "one row after the other", "ours": "ours"}
OFFSETS = {"base": -0.16, "peft": -0.16, "turns": -0.16, "ours": 0.16}
SETTINGS = {
    # Text stays text, and the same results give the same file.
    "svg.fonttype": "none",
    "svg.hashsalt": "surgery",
    "font.size": 9,
}


def draw(rows: Iterable[Row], path: Path, title: str) -> None:
    """Write an SVG of all rows that have a ratio."""
    found = [row for row in rows if row.ratio("ours")]
    panels = [
        (panel, label)
        for reference, label in (
            ("base", "ratio to the base model"),
            ("peft", "ratio to PEFT"),
            ("one", "eight adapters in a batch: ratio to one adapter"),
        )
        if (panel := [row for row in found if row.reference == reference])
    ]
    if not panels:
        return
    sizes = [len(panel) for panel, _ in panels]
    with mpl.rc_context(SETTINGS):
        figure = Figure(
            figsize=(8, 1.3 + 0.3 * sum(sizes) + 0.6 * len(sizes)), layout="constrained"
        )
        axes = figure.subplots(len(sizes), squeeze=False, height_ratios=sizes)[:, 0]
        for ax, (panel, label) in zip(axes, panels, strict=True):
            _fill(ax, panel, label)
        figure.suptitle(title, fontsize=9)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _fill(ax: Axes, rows: Sequence[Row], label: str) -> None:
    for side, colour in COLOURS.items():
        shown = [
            (place + OFFSETS[side], ratio)
            for place, row in enumerate(rows)
            if side != row.reference and (ratio := row.ratio(side))
        ]
        if not shown:
            continue
        places = [place for place, _ in shown]
        ratios = [ratio for _, ratio in shown]
        ax.hlines(places, [r.low for r in ratios], [r.high for r in ratios], color=colour, lw=2.5)
        ax.plot([r.median for r in ratios], places, "o", color=colour, ms=4.5, label=NAMES[side])
        for place, ratio in shown:
            ax.annotate(
                f"{ratio.median:.2f}",
                (max(ratio.high, ratio.median), place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=colour,
            )
    ax.axvline(1.0, color="black", lw=1)
    ax.set_yticks(range(len(rows)), [row.name for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.margins(x=0.1)
    ax.grid(axis="x", color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)
    ax.set_xlabel(label)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="upper right", frameon=False, fontsize=8)
