"""Curves of a training as a picture: losses above, gates below, by steps."""

import math
from collections.abc import Iterable, Sequence
from html import escape

from surgery_training.history import History

WIDTH, PANEL = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 62, 170, 34, 40
TICKS = 5
MOST_LISTED = 8
"""How many gates have their name beside their curve; of more, evenly spaced ones have."""

TRAINING, VALIDATION = "#9db4c8", "#c23b22"
GRID, TEXT = "#dddddd", "#333333"

Points = Sequence[tuple[int, float]]


def draw_curves(history: History) -> str:
    """Draw losses and gates; the same history gives the same text.

    Args:
        history: What was measured.

    Returns:
        An SVG document; text stays text. The panel of the gates is left out where there are none.

    Example:
        >>> draw_curves(History(losses=((1, 2.0), (2, 1.0)))).count("<polyline")
        1
    """
    last = max(
        (step for points in (history.losses, history.validation) for step, _ in points), default=1
    )
    losses = [("training", history.losses, TRAINING, False)]
    if history.validation:
        losses.append(("validation", history.validation, VALIDATION, True))
    parts = _panel(0, "loss, nats per token", last, losses)
    height = TOP + PANEL + BOTTOM
    if history.gates:
        labels, pattern = _labels(list(history.gates))
        curves = [
            (label, points, _colour(number, len(labels)), False)
            for number, (label, points) in enumerate(
                zip(labels, history.gates.values(), strict=True)
            )
        ]
        parts += _panel(height, f"mean magnitude of {pattern}", last, curves)
        height *= 2
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="11" fill="{TEXT}">'
    )
    ground = f'<rect width="{WIDTH}" height="{height}" fill="white"/>'
    return "\n".join([head, ground, *parts, "</svg>", ""])


def _panel(
    top: int, title: str, last: int, curves: Sequence[tuple[str, Points, str, bool]]
) -> list[str]:
    """Return the elements of one panel; a curve has a name, points, a colour, and marks or not."""
    width = WIDTH - LEFT - RIGHT
    values = [value for _, points, _, _ in curves for _, value in points if math.isfinite(value)]
    ticks = _ticks(max(values, default=1.0))

    def x_of(step: float) -> float:
        return LEFT + width * step / last

    def y_of(value: float) -> float:
        return top + TOP + PANEL * (1 - value / ticks[-1])

    parts = [f'<text x="{LEFT}" y="{top + 20}" font-weight="bold">{escape(title)}</text>']
    for tick in ticks:
        y = f"{y_of(tick):.1f}"
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + width}" y1="{y}" y2="{y}" stroke="{GRID}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y_of(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    parts += [
        f'<text x="{x_of(step):.1f}" y="{top + TOP + PANEL + 16}" text-anchor="middle">{step}</text>'
        for step in sorted({round(last * part / 4) for part in range(5)})
    ]
    parts.append(
        f'<text x="{LEFT + width / 2:.1f}" y="{top + TOP + PANEL + 32}" '
        'text-anchor="middle">step</text>'
    )
    for name, points, colour, has_marks in curves:
        at = [(x_of(step), y_of(value)) for step, value in points if math.isfinite(value)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5">'
            f"<title>{escape(name)}</title></polyline>"
        )
        if has_marks:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in at]
    return parts + _legend(top + TOP, curves)


def _legend(top: int, curves: Sequence[tuple[str, Points, str, bool]]) -> list[str]:
    spacing = max(1, math.ceil(len(curves) / MOST_LISTED))
    shown = [curves[number] for number in range(0, len(curves), spacing)]
    parts = []
    x = WIDTH - RIGHT + 12
    for row, (name, _, colour, _) in enumerate(shown):
        y = top + 12 + 18 * row
        parts.append(f'<rect x="{x}" y="{y - 8}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 16}" y="{y}">{escape(_short(name))}</text>')
    if len(shown) < len(curves):
        parts.append(f'<text x="{x}" y="{top + 12 + 18 * len(shown)}">{len(curves)} in all</text>')
    return parts


def _labels(names: list[str]) -> tuple[list[str], str]:
    """Return what tells names apart, and what they have in common, with `*` in place of it.

    Example:
        >>> _labels(["h.8.gate", "h.9.gate"])
        (['8', '9'], 'h.*.gate')
    """
    rows = [name.split(".") for name in names]
    if len(rows) == 1:
        return ["gate"], names[0]
    if len({len(row) for row in rows}) > 1:
        return names, "gates"
    differs = [len(set(column)) > 1 for column in zip(*rows, strict=True)]
    own = [[part for part, is_own in zip(row, differs, strict=True) if is_own] for row in rows]
    shared = ["*" if is_own else part for part, is_own in zip(rows[0], differs, strict=True)]
    return [".".join(parts) for parts in own], ".".join(shared)


def _short(name: str) -> str:
    """Keep the end of a name, and no more than there is room for."""
    return name if len(name) <= 22 else f"...{name[-20:]}"  # noqa: PLR2004 (what fits)


def _ticks(highest: float) -> list[float]:
    """Return round values from zero to what is not below the highest one."""
    if not highest > 0:
        return [0.0, 1.0]
    rough = highest / (TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    return [step * number for number in range(math.ceil(highest / step - 1e-9) + 1)]


def _colour(number: int, total: int) -> str:
    """Return one of `total` colours from blue, for the first gate, to red, for the last."""
    part = number / max(total - 1, 1)
    first, last = (49, 104, 176), (214, 84, 38)
    return "#" + "".join(_hex(a + (b - a) * part) for a, b in _pairs(first, last))


def _pairs(first: Iterable[int], last: Iterable[int]) -> Iterable[tuple[int, int]]:
    return zip(first, last, strict=True)


def _hex(value: float) -> str:
    return f"{round(value):02x}"
