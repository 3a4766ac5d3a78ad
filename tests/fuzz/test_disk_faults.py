"""Every operation on the disk fails once: the folder then holds all of before, or all of after."""

import errno
import os
import pathlib
import shutil
from pathlib import Path

import pytest
import torch
from core.edits import edited
from core.toys import Net, session
from fuzz.readers import LOW_RANK, READERS, build
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel, Composition

from surgery_core import ModelRecipe, write_files
from surgery_core.record import TENSORS_FILE

pytestmark = pytest.mark.faults

FULL = "No space left on device"


class Disk:
    """Counts what is done to the disk, and fails at one of these operations."""

    def __init__(self, monkeypatch, folder):
        self.folder, self.count, self.fails_at = str(folder), 0, None
        for owner, name in (
            *((os, name) for name in ("fsync", "open", "replace", "link", "mkdir")),
            *((pathlib.Path, name) for name in ("replace", "hardlink_to", "mkdir")),
            (shutil, "copy2"),
        ):
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))
        real = pathlib.Path.open

        def opened(path, mode="r", *args, **kwargs):
            if "w" not in mode:
                return real(path, mode, *args, **kwargs)
            self.step([path])
            return _Writing(real(path, mode, *args, **kwargs), self)

        monkeypatch.setattr(pathlib.Path, "open", opened)

    def _wrapped(self, function):
        def call(*args, **kwargs):
            self.step(args)
            return function(*args, **kwargs)

        return call

    def step(self, args=()):
        if self.fails_at is None or (
            args and isinstance(args[0], str | Path) and not str(args[0]).startswith(self.folder)
        ):
            return
        self.count += 1
        if self.count == self.fails_at:
            raise OSError(errno.ENOSPC, FULL)


class _Writing:
    """A file that counts what is written to it."""

    def __init__(self, file, disk):
        self._file, self._disk = file, disk

    def write(self, data):
        # Half of it is on the disk when it fails.
        self._file.write(data[: len(data) // 2])
        self._disk.step()
        return self._file.write(data[len(data) // 2 :])

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *args):
        return self._file.__exit__(*args)

    def __getattr__(self, name):
        return getattr(self._file, name)


def adapter(value):
    config = AdaptionPromptConfig(adapter_len=2, adapter_layers=value)
    model = AdaptionPromptModel(build(), {"default": config}, "default")
    with torch.no_grad():
        for module in model.adapter_modules("default").values():
            module.adaption_gate.fill_(value)
    return model.save_pretrained


def record(value):
    found = edited(Net().eval())
    with torch.no_grad():
        for name in ("rules", *found.adapters):
            for tensor in found.tensors(name).values():
                tensor.fill_(value)
    return lambda folder: session().save(found, folder)


def low_rank(value):
    rule = {"operation": "low_rank", "select": "layers.*.up", "options": {"r": value}}
    recipe = ModelRecipe.model_validate({"adapters": {"a": rule}})
    found = LOW_RANK.plan_recipe(Net().eval(), recipe).apply()
    return lambda folder: LOW_RANK.export(found, "a", folder)


def composition(value):
    return lambda folder: Composition({"fr": value}).save(folder / "c.json")


def files(value):
    data = {"a": b"%d" % value, "b": b"%d" % value * 100}
    return lambda folder: write_files(folder, data)


WRITERS = {
    "adapter": adapter,
    "record": record,
    "low_rank": low_rank,
    "composition": composition,
    "files": files,
}
"""By the name of the reader, where there is one: what returns a function that saves a number."""


def contents(folder):
    if not folder.exists():
        return None
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def written(save, folder):
    save(folder)
    return contents(folder)


def settled(kind, folder):
    """Return what a folder holds to those who read it."""
    found = contents(folder)
    if kind == "record" and found is not None and f"{TENSORS_FILE}.new" in found:
        # Tensors of the record in it, which were not put in their place any more.
        found[TENSORS_FILE] = found.pop(f"{TENSORS_FILE}.new")
    return found


# Records are of models with other values.
@pytest.mark.filterwarnings("ignore::surgery_core.SurgeryWarning")
@pytest.mark.parametrize("is_there", [False, True], ids=["a new folder", "a folder of before"])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_failure_leaves_all_of_before_or_all_of_after(
    kind, is_there, tmp_path, monkeypatch, record_property
):
    torch.manual_seed(0)
    save = {value: WRITERS[kind](value) for value in (1, 2)}
    old, new = (written(save[value], tmp_path / f"expected{value}") for value in (1, 2))
    folder = tmp_path / "parent" / "folder"
    monkeypatch.setattr("threading.get_ident", lambda: 7)
    disk = Disk(monkeypatch, folder.parent)
    names = {folder.name, *new, f"{TENSORS_FILE}.new"}
    number, outcomes = 0, []
    while True:
        number += 1
        shutil.rmtree(folder.parent, ignore_errors=True)
        if is_there:
            save[1](folder)
        disk.count, disk.fails_at = 0, number
        failure = None
        try:
            save[2](folder)
        except OSError as err:
            failure = err
        finally:
            disk.fails_at = None
        if failure is not None:
            assert failure.filename is not None, str(failure)
            assert Path(failure.filename).name in names, str(failure)
            assert f"[Errno {errno.ENOSPC}] {FULL}: '{folder}" in str(failure)
        elif disk.count < number:
            # There were no more.
            break
        found = settled(kind, folder)
        assert found in ((old if is_there else None), new), (number, list(found or ()))
        outcomes.append(found)
        if kind in READERS and found is not None:
            reader = READERS[kind]
            reader.read(folder, None if reader.make is None else reader.make())
        # What failed once works afterwards.
        save[2](folder)
        assert new == contents(folder)

    # Opening and writing each file at the least.
    assert number > 2 * len(new)
    assert (old if is_there else None) in outcomes
    assert new == contents(folder)
    record_property("operations on the disk that failed", {kind: {"injected": number - 1}})


def test_a_failure_while_files_are_put_in_place_puts_those_of_before_back(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_bytes(b"1")

    with pytest.raises(OSError, match=f"{tmp_path}/b"):
        write_files(tmp_path, {"a": b"2", "b": b"2"})

    assert b"1" == (tmp_path / "a").read_bytes()
    assert ["a", "b"] == sorted(path.name for path in tmp_path.iterdir())


def test_file_systems_without_links_keep_a_copy(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(pathlib.Path, "hardlink_to", refused)
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_bytes(b"1")

    write_files(tmp_path, {"a": b"2"})
    assert b"2" == (tmp_path / "a").read_bytes()
    with pytest.raises(OSError, match=f"{tmp_path}/b"):
        write_files(tmp_path, {"a": b"3", "b": b"3"})
    assert b"2" == (tmp_path / "a").read_bytes()
    assert ["a", "b"] == sorted(path.name for path in tmp_path.iterdir())
