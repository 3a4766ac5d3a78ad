"""Files that are no checkpoints of LLaMA-Adapter or litgpt: a typed error, and nothing is run."""

import pathlib
from argparse import Namespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.foreign import OriginalLlama
from support.importing import (
    QUERY,
    SIZES,
    litgpt,
    original,
    read_original,
    read_quietly,
)
from surgery_adaption_prompt.importers import read_litgpt

from surgery_core import StateError, SurgeryError


@pytest.mark.parametrize("reader", [read_original, read_quietly])
def test_a_file_with_more_than_tensors_is_refused_and_not_run(reader, tmp_path):
    path, model = original(tmp_path)
    ran = tmp_path / "ran"
    torch.save({"model": {}, "args": Namespace(lr=1e-3), "run": _Touch(ran)}, path)

    with pytest.raises(SurgeryError) as err:
        reader(path, model)

    assert not ran.exists()
    assert str(err.value).startswith(
        f"Checkpoint {str(path)!r} cannot be read: expected tensors by name, as torch.save writes "
        "them, got UnpicklingError: "
    )
    assert str(err.value).endswith(
        ". Save its tensors alone with torch.save in the program that wrote it; nothing in the file "
        "was run."
    )


class _Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "expected tensors by name, got list."),
        (
            {QUERY: torch.zeros(1), "epoch": 3, 5: torch.zeros(1)},
            "expected tensors by name, got something else under 'epoch', 5. Save its tensors alone.",
        ),
        (
            {"model": {}, "optimizer": {}},
            "expected tensors by name, got something else under 'model', 'optimizer'. Save its "
            "tensors alone.",
        ),
    ],
    ids=["list", "other values", "more than a model"],
)
def test_a_file_without_tensors_by_name_is_refused(content, message, tmp_path):
    path, model = litgpt(tmp_path)
    torch.save(content, path)

    with pytest.raises(SurgeryError) as err:
        read_litgpt(path, model)

    assert f"Checkpoint {str(path)!r} is no adapter: {message}" == str(err.value)


def test_a_missing_file_is_refused(tmp_path):
    _, model = litgpt(tmp_path)

    with pytest.raises(SurgeryError, match="got FileNotFoundError"):
        read_litgpt(tmp_path / "none.pth", model)


@given(content=st.binary(max_size=200))
def test_random_bytes_are_refused(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("random") / "adapter.pth"
    path.write_bytes(content)

    with pytest.raises(SurgeryError):
        read_original(path, MODEL)


MODEL = OriginalLlama(SIZES).to_transformers()


@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(data, tmp_path_factory):
    path, _ = original(tmp_path_factory.mktemp("damaged"))
    content = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        content[at] = data.draw(st.integers(0, 255))
    del content[data.draw(st.sampled_from([len(content), len(content) // 2])) :]
    path.write_bytes(content)

    try:
        _, state = read_original(path, MODEL)
    except SurgeryError:
        return
    assert 4 == len(state)


@given(data=st.data())
def test_a_file_with_keys_removed_is_refused(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("removed")
    name = data.draw(st.sampled_from(["original", "litgpt"]))
    save, read = {"original": (original, read_original), "litgpt": (litgpt, read_litgpt)}[name]
    needed = []

    def remove(state):
        unused = {"layers.0.attention.gate", "layers.1.attention.gate"}
        needed.extend(sorted(state.keys() - unused))
        gone = data.draw(st.sets(st.sampled_from(needed), min_size=1))
        # Without both tensors of its lowest layer, litgpt's file is that of one layer fewer.
        assume(gone != {key for key in needed if key.startswith("transformer.h.2.")})
        for key in gone:
            del state[key]

    path, _ = save(folder, remove)

    with pytest.raises(StateError) as err:
        read(path, MODEL)
    assert set(err.value.missing) <= set(needed)
    assert err.value.missing
