"""Curves: the same text for the same history, every value in its place."""

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from surgery_training import History, draw_curves
from surgery_training.curves import BOTTOM, LEFT, PANEL, RIGHT, TOP, WIDTH, _ticks

SVG = "{http://www.w3.org/2000/svg}"
HISTORY = History(
    losses=((1, 2.0), (2, 1.0), (3, math.nan), (4, 0.5)),
    validation=((2, 1.5), (4, 0.75)),
    gates={"a.gate": ((2, 0.0), (4, 0.2)), "b<c>.gate": ((2, 0.1), (4, 0.4))},
)


def curves(text):
    """Return the points of each curve by its title."""
    found = {}
    for line in ET.fromstring(text).iter(f"{SVG}polyline"):  # noqa: S314 (our own)
        points = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
        found[line.find(f"{SVG}title").text] = points
    return found


def test_values_are_where_the_axes_say():
    found = curves(draw_curves(HISTORY))

    width = WIDTH - LEFT - RIGHT

    def place(step, value, highest, panel=0):
        below = (TOP + PANEL + BOTTOM) * panel
        y = below + TOP + PANEL * (1 - value / highest)
        return (pytest.approx(LEFT + width * step / 4, abs=0.1), pytest.approx(y, abs=0.1))

    assert found["training"] == [place(1, 2.0, 2), place(2, 1.0, 2), place(4, 0.5, 2)]
    assert found["validation"] == [place(2, 1.5, 2), place(4, 0.75, 2)]
    assert found["a"] == [place(2, 0.0, 0.4, 1), place(4, 0.2, 0.4, 1)]
    assert found["b<c>"] == [place(2, 0.1, 0.4, 1), place(4, 0.4, 0.4, 1)]


def test_the_same_history_gives_the_same_text():
    assert draw_curves(HISTORY) == draw_curves(HISTORY)
    assert "NaN" not in draw_curves(HISTORY)
    assert "nan" not in draw_curves(HISTORY)


def test_gates_are_left_out_where_there_are_none():
    text = draw_curves(History(losses=((1, 2.0),)))

    assert list(curves(text)) == ["training"]
    assert "gate" not in text
    assert curves(draw_curves(History())) == {"training": []}


def test_of_many_gates_some_are_named():
    gates = {f"layers.{i}.gate": ((1, 0.1 * i),) for i in range(30)}
    text = draw_curves(History(losses=((1, 2.0),), gates=gates))

    legend = re.findall(rf'<text x="{WIDTH - RIGHT + 28}"[^>]*>([^<]*)</text>', text)
    assert len(curves(text)) == 31
    assert legend == ["training", *(str(i) for i in range(0, 30, 4))]
    assert "30 in all" in text
    assert "mean magnitude of layers.*.gate" in text


def test_gates_that_have_little_in_common_have_their_whole_names():
    gates = {"a.b.first_gate": ((1, 0.1),), "gate": ((1, 0.2),)}

    text = draw_curves(History(losses=((1, 2.0),), gates=gates))

    assert list(curves(text)) == ["training", "a.b.first_gate", "gate"]
    one = draw_curves(History(losses=((1, 2.0),), gates={"a.gate": ((1, 0.1),)}))
    assert list(curves(one)) == ["training", "gate"]
    assert "mean magnitude of a.gate" in one


@given(st.floats(1e-12, 1e12))
def test_axes_are_round_and_reach_the_highest_value(highest):
    ticks = _ticks(highest)

    assert ticks[0] == 0
    assert ticks[-1] >= highest * (1 - 1e-6)
    assert ticks[-2] < highest
    assert 2 <= len(ticks) <= 6
