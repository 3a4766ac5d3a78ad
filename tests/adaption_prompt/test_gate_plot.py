"""The picture of an adapter's gates: values where they belong, and files that do not change."""

import math
import sys
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
import torch
from surgery_adaption_prompt import AdaptionPromptConfig
from surgery_adaption_prompt.gate_plot import draw_gates
from surgery_adaption_prompt.status import tensors_status

from surgery_core import StateError, SurgeryError

GATES = {8: [0.5, -0.25, 0.125], 9: [-0.75, 2.0, 0.375], 10: [1.0, -1.5, -0.0625]}


def status(*, activation="identity", gate="head", gates=None):
    """Return the status of an adapter with those gates by layer."""
    config = AdaptionPromptConfig(
        adapter_len=4, adapter_layers=3, gate=gate, gate_activation=activation
    )
    tensors = {
        f"model.layers.{layer}.self_attn.adaption_gate": torch.tensor(values)
        for layer, values in (gates or GATES).items()
    }
    return tensors_status("legal", config, tensors)


def drawn(figure):
    """Return the axes, the image and the colour bar's axes."""
    axes, bar = figure.axes
    (image,) = axes.images
    return axes, image, bar


def texts(labels):
    return [label.get_text() for label in labels]


def test_rows_are_layers_upwards_and_columns_heads():
    axes, image, _ = drawn(draw_gates(status()))

    assert list(GATES.values()) == image.get_array().tolist()
    assert "lower" == image.origin
    assert ["8", "9", "10"] == texts(axes.get_yticklabels())
    assert [0, 1, 2] == axes.get_yticks().tolist()
    assert "model.layers.*.self_attn" == axes.get_ylabel()
    assert [0, 1, 2] == axes.get_xticks().tolist()
    assert "attention head" == axes.get_xlabel()
    assert "Gates of adapter 'legal'" == axes.get_title()


def test_both_signs_have_one_scale_with_the_closed_gate_in_its_middle():
    _, image, bar = drawn(draw_gates(status()))

    assert (-2.0, 2.0) == image.get_clim()
    red, green, blue, _ = image.cmap(image.norm(0.0))
    assert pytest.approx(red, abs=0.03) == green == pytest.approx(blue, abs=0.03)
    assert red > 0.95
    positive, negative = image.cmap(image.norm(1.5)), image.cmap(image.norm(-1.5))
    assert positive[0] > positive[2]
    assert negative[0] < negative[2]
    assert "gate" == bar.get_ylabel()


def test_gates_are_drawn_after_their_activation():
    _, image, bar = drawn(draw_gates(status(activation="tanh")))

    expected = [[math.tanh(value) for value in row] for row in GATES.values()]
    assert pytest.approx(np.array(expected)) == image.get_array().data
    assert pytest.approx(math.tanh(2.0)) == image.get_clim()[1]
    assert "tanh of gate" == bar.get_ylabel()


def test_one_gate_a_layer_is_one_column():
    axes, image, _ = drawn(draw_gates(status(gate="layer", gates={2: [0.5], 3: [-0.25]})))

    assert [[0.5], [-0.25]] == image.get_array().tolist()
    assert [] == texts(axes.get_xticklabels())
    assert "all heads" == axes.get_xlabel()


def test_of_many_heads_some_are_numbered():
    axes, _, _ = drawn(draw_gates(status(gates={0: [0.1] * 40, 1: [0.2] * 40})))

    assert list(range(0, 40, 3)) == axes.get_xticks().tolist()


def test_one_layer_has_its_whole_name():
    axes, _, _ = drawn(draw_gates(status(gates={7: [0.5, -0.5]})))

    assert ["model.layers.7.self_attn"] == texts(axes.get_yticklabels())
    assert "module" == axes.get_ylabel()


def test_names_that_differ_in_several_places_keep_what_differs():
    found = replace(status(), gates={"a.0.attn.b": (0.5,), "a.1.other.b": (0.25,)})

    axes, _, _ = drawn(draw_gates(found))

    assert ["0.attn", "1.other"] == texts(axes.get_yticklabels())
    assert "a.*.*.b" == axes.get_ylabel()


def test_names_of_different_depth_are_whole():
    found = replace(status(), gates={"a.attn": (0.5,), "a.0.attn": (0.25,)})

    axes, _, _ = drawn(draw_gates(found))

    assert ["a.attn", "a.0.attn"] == texts(axes.get_yticklabels())


def test_what_is_not_finite_or_not_there_is_left_out_and_the_scale_is_that_of_the_rest():
    gates = {8: [math.nan, -0.25, math.inf], 9: [0.125]}

    axes, image, _ = drawn(draw_gates(status(gates=gates)))

    assert [[True, False, True], [False, True, True]] == image.get_array().mask.tolist()
    assert (-0.25, 0.25) == image.get_clim()
    assert axes.get_facecolor()[:3] == pytest.approx([0.6] * 3)


def test_closed_gates_are_white_on_some_scale():
    _, image, _ = drawn(draw_gates(status(gates={8: [0.0, 0.0], 9: [0.0, 0.0]})))

    assert (-1.0, 1.0) == image.get_clim()


def test_the_file_is_written_and_the_same_gates_give_the_same_svg(tmp_path):
    first, second = tmp_path / "first.svg", tmp_path / "second.SVG"

    draw_gates(status(), first)
    draw_gates(status(), second)

    text = first.read_text()
    assert text == second.read_text()
    assert ">attention head<" in text
    assert "model.layers.*.self_attn<" in text
    assert "<dc:date>" not in text


def test_the_suffix_names_the_format(tmp_path):
    draw_gates(status(), str(tmp_path / "gates.png"))

    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")


def test_a_dollar_sign_in_a_name_is_one(tmp_path):
    figure = draw_gates(replace(status(), name="a$b$c"), tmp_path / "gates.svg")

    assert ">Gates of adapter 'a$b$c'<" in (tmp_path / "gates.svg").read_text()
    assert figure.axes[0].get_title() == "Gates of adapter 'a$b$c'"


def test_drawing_leaves_matplotlib_as_it_was_and_needs_no_pyplot(monkeypatch):
    before = dict(mpl.rcParams)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)

    draw_gates(status())

    assert before == dict(mpl.rcParams)


def test_gates_without_values_are_refused():
    found = replace(status(), gates={"h.0.attn": None, "h.1.attn": (0.5,), "h.2.attn": None})

    with pytest.raises(StateError) as caught:
        draw_gates(found)

    assert str(caught.value) == (
        "Gates of adapter 'legal' cannot be drawn: expected values in this process, got none for "
        "'h.0.attn.adaption_gate', 'h.2.attn.adaption_gate'. Load the weights, or gather them, "
        "before."
    )
    assert caught.value.missing == ("h.0.attn.adaption_gate", "h.2.attn.adaption_gate")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(SurgeryError) as caught:
        draw_gates(status())

    assert str(caught.value) == (
        "Gates of adapter 'legal' cannot be drawn: expected matplotlib 3.9 or later, got "
        "ModuleNotFoundError('import of matplotlib halted; None in sys.modules'). Install "
        "surgery-adaption-prompt[plots]."
    )
    assert isinstance(caught.value.__cause__, ImportError)
