"""Pipes, sockets and devices in the place of files: an error at once, and nothing is waited for."""

import os
import signal
import socket
from contextlib import contextmanager

import pytest
from fuzz.readers import READERS, adapted
from surgery_adaption_prompt import AdapterStore
from surgery_training.examples import read_dialogues

from surgery_core import RecipeError, SurgeryError

pytestmark = pytest.mark.faults

SECONDS = 20
"""Much longer than anything here takes."""

NAMES = sorted(READERS.keys() - {"plan"})
"""Of the readers; the caller reads the file of a plan."""


@contextmanager
def an_alarm():
    """Raise if something waits."""

    def waited(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def a_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        # Names of sockets are short.
        os.chdir(path.parent)
        made.bind(path.name)


KINDS = {
    "a pipe": os.mkfifo,
    "a socket": a_socket,
    "a device that never ends": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_is_refused_at_once(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reader = READERS[name]
    files = reader.files()
    model = None if reader.make is None else reader.make()
    refused = 0
    for number, target in enumerate(files):
        folder = tmp_path / str(number)
        folder.mkdir()
        for other, data in files.items():
            (folder / other).write_bytes(data)
        (folder / target).unlink()
        KINDS[kind](folder / target)
        with an_alarm():
            try:
                reader.read(folder, model)
            except SurgeryError:
                refused += 1
    # Those that stand in the header of another file are not read.
    texts = sum(other.endswith(".json") for other in files) if "in one file" in name else 0
    assert len(files) - texts <= refused <= len(files)


def test_a_store_and_examples_wait_for_nothing(tmp_path):
    for name, data in READERS["adapter"].files().items():
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes(data)
    (tmp_path / "a/adapter_model.safetensors").unlink()
    os.mkfifo(tmp_path / "a/adapter_model.safetensors")
    os.mkfifo(tmp_path / "train.jsonl")
    store = AdapterStore(tmp_path)

    with an_alarm():
        with pytest.raises(SurgeryError, match="Not a regular file"):
            store.ensure(adapted(), ["a"])
        with pytest.raises(RecipeError, match=r"cannot be read: .*Not a regular file"):
            read_dialogues(str(tmp_path / "train.jsonl"))
