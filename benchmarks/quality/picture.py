"""The results as a picture: a line a method, a dot a seed, a bar at the mean."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from methods import ABLATIONS, COMPARED, METHODS
from report import Spread, finals, losses, percent
from runs import Result
from tasks import TASKS

SHOWN = (*COMPARED, *ABLATIONS)
COLOURS = {
    "base": "#777777",
    "ours": "#1f4e9c",
    "peft": "#b35806",
    "peft_lora": "#8073ac",
}
SETTINGS = {
    # Text stays text, and the same results give the same file.
    "svg.fonttype": "none",
    "svg.hashsalt": "surgery",
    "font.size": 9,
}
MEASURES: Sequence[tuple[str, Callable[[Sequence[Result]], Spread]]] = (
    ("held-out exact match, %", percent),
    ("held-out loss, nats a token", losses),
)


def draw(results: Sequence[Result], path: Path) -> None:
    """Write an SVG with a row for each task, exact match on the left and loss on the right."""
    shown = {task: [key for key in SHOWN if finals(results, task, key)] for task in TASKS}
    sizes = [max(len(keys), 1) for keys in shown.values()]
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(9, 0.25 * sum(sizes) + 1.1 * len(sizes)), layout="constrained")
        axes = figure.subplots(
            len(sizes), len(MEASURES), squeeze=False, sharey="row", height_ratios=sizes
        )
        for row, task in zip(axes, TASKS, strict=True):
            for ax, (label, measure) in zip(row, MEASURES, strict=True):
                _fill(ax, {key: measure(finals(results, task, key)) for key in shown[task]})
                ax.set_xlabel(label)
            row[0].set_title(f"task {task!r}", loc="left", fontsize=9)
            # Zero to 100 in both tasks; losses have scales of their own.
            row[0].set_xlim(-3, 103)
            row[1].set_xscale("log")
            row[1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            row[1].xaxis.set_major_formatter("{x:g}")
            row[1].xaxis.set_minor_formatter("")
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _fill(ax: Axes, spreads: Mapping[str, Spread]) -> None:
    for place, (key, spread) in enumerate(spreads.items()):
        places, colour = [place] * len(spread.values), COLOURS[METHODS[key].kind]
        ax.vlines(spread.mean, place - 0.3, place + 0.3, color=colour, lw=2)
        ax.plot(spread.values, places, "o", ms=4.5, mfc="none", mec=colour)
    num_compared = sum(key in COMPARED for key in spreads)
    if num_compared < len(spreads):
        ax.axhline(num_compared - 0.5, color="#bbbbbb", lw=0.8)
    ax.set_yticks(range(len(spreads)), [METHODS[key].title for key in spreads])
    ax.set_ylim(max(len(spreads), 1) - 0.4, -0.6)
    ax.grid(axis="x", color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
