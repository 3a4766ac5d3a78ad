"""Every operation on the disk fails once: whoever reads then gets all of before, or all of after."""

import errno
import os
import pathlib
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from core.edits import edited
from core.toys import Net, session
from fuzz.readers import LOW_RANK, READERS, build
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel, Composition

from surgery_core import ModelRecipe, StateError, write_files, write_folders
from surgery_core.atomic import _hidden_folder, _locked

pytestmark = pytest.mark.faults

FULL = "No space left on device"


class Disk:
    """Counts what is done to the disk, and fails at one of these operations."""

    def __init__(self, monkeypatch, folder):
        self.folder, self.count, self.fails_at = str(folder), 0, None
        for owner, name in (
            *((os, name) for name in ("fsync", "open", "replace", "mkdir")),
            *((pathlib.Path, name) for name in ("replace", "mkdir")),
        ):
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))
        real = pathlib.Path.open

        def opened(path, mode="r", *args, **kwargs):
            if "x" not in mode:
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


def several(value):
    """Save three adapters at once, each to a folder of its own."""
    config = AdaptionPromptConfig(adapter_len=2, adapter_layers=value)
    model = AdaptionPromptModel(build(), dict.fromkeys(("default", "a", "b"), config), "a")
    return model.save_pretrained


WRITERS["several adapters"] = several


def contents(folder):
    if not folder.exists():
        return None
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def committed(found):
    """Return what counts of a folder: tensors have all that belongs to them in their own file."""
    if found is None or not any(name.endswith(".safetensors") for name in found):
        return found
    return {name: data for name, data in found.items() if name.endswith(".safetensors")}


def written(save, folder):
    save(folder)
    return contents(folder)


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
    disk = Disk(monkeypatch, folder.parent)
    names = {folder.name, *(name.rpartition("/")[2] for name in new), "a", "b"}
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
        if failure is None and disk.count < number:
            # There were no more.
            break
        found = contents(folder)
        assert not list(folder.rglob(".*"))
        if failure is None:
            # Looking for what dead processes left may fail.
            assert found == new
        else:
            assert Path(failure.filename).name in names, str(failure)
            assert f"[Errno {errno.ENOSPC}] {FULL}: '{folder}" in str(failure)
            saved = [name for name in new if found is not None and found.get(name) == new[name]]
            notes = " ".join(getattr(failure, "__notes__", []))
            assert saved == [name for name in saved if f"'{folder / name}'" in notes]
            # Each file is whole, and only renames can fail when one is in its place.
            before = old if is_there else {}
            for name, data in (found or before).items():
                assert data in (before.get(name), new[name])
            if not saved:
                assert found == (old if is_there else None)
        outcomes.append(committed(found))
        if kind in READERS and committed(found) is not None:
            reader = READERS[kind]
            reader.read(folder, None if reader.make is None else reader.make())
        # What failed once works afterwards.
        save[2](folder)
        assert new == contents(folder)

    # Opening and writing each file at the least.
    assert number > 2 * len(new)
    if kind not in ("files", "several adapters"):
        assert all(
            each in (committed(old if is_there else None), committed(new)) for each in outcomes
        )
    assert committed(old if is_there else None) in outcomes
    record_property("operations on the disk that failed", {kind: {"injected": number - 1}})


def test_what_cannot_be_put_in_its_place_keeps_all_from_being_written(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_bytes(b"1")

    with pytest.raises(IsADirectoryError, match=f"{tmp_path}/b"):
        write_files(tmp_path, {"a": b"2", "b": b"2"})

    assert b"1" == (tmp_path / "a").read_bytes()
    assert ["a", "b"] == sorted(path.name for path in tmp_path.iterdir())


def test_an_error_between_two_renames_says_what_was_saved(tmp_path, monkeypatch):
    real = pathlib.Path.replace

    def refused(path, target):
        if target == tmp_path / "two" / "b":
            raise OSError(errno.EIO, "Input/output error")
        return real(path, target)

    monkeypatch.setattr(pathlib.Path, "replace", refused)

    with pytest.raises(OSError, match="two/b'") as caught:
        write_folders([(tmp_path / "one", {"a": b"1"}), (tmp_path / "two", {"b": b"1", "c": b"1"})])

    assert [f"Saved before this error: '{tmp_path}/one/a'."] == caught.value.__notes__
    assert {"one/a": b"1"} == contents(tmp_path)


LINKS = {
    "a file": lambda folder, victim: (folder / "a").symlink_to(victim / "precious"),
    "a file that is not there": lambda folder, victim: (folder / "a").symlink_to(victim / "new"),
    "a leftover": lambda folder, victim: (folder / ".surgery-0.tmp").symlink_to(victim),
    "a file in a leftover": lambda folder, victim: (
        (folder / ".surgery-0.tmp").mkdir(),
        (folder / ".surgery-0.tmp" / "a").symlink_to(victim / "precious"),
    ),
}


@pytest.mark.parametrize("link", LINKS)
def test_links_in_a_folder_are_not_followed(link, tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    for path in (victim, folder):
        path.mkdir()
    (victim / "precious").write_bytes(b"precious")
    LINKS[link](folder, victim)

    write_files(folder, {"a": b"new"})

    assert {"precious": b"precious"} == contents(victim)
    assert b"new" == (folder / "a").read_bytes()
    assert not (folder / "a").is_symlink()


def test_a_subfolder_that_is_a_link_is_refused(tmp_path):
    config = AdaptionPromptConfig(adapter_len=2, adapter_layers=1)
    model = AdaptionPromptModel(build(), {"default": config, "fr": config}, "fr")
    for name in ("victim", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "out/fr").symlink_to(tmp_path / "victim")

    with pytest.raises(StateError, match=r"Nothing was saved: '.*out/fr' is a link"):
        model.save_pretrained(tmp_path / "out")

    assert {} == contents(tmp_path / "out") == contents(tmp_path / "victim")


def test_leftovers_of_dead_processes_go_and_those_in_use_stay(tmp_path):
    dead = tmp_path / ".surgery-dead.tmp"
    dead.mkdir()
    (dead / "weights").write_bytes(b"half of th")

    with _hidden_folder(tmp_path) as used:
        (used / "weights").write_bytes(b"1")
        write_files(tmp_path, {"weights": b"2"})

        assert b"1" == (used / "weights").read_bytes()
        assert {used, tmp_path / "weights"} == set(tmp_path.iterdir())
    assert [tmp_path / "weights"] == list(tmp_path.iterdir())


def test_a_hidden_folder_that_was_swept_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    """Another process may look between the two."""
    made, real = [], tempfile.mkdtemp

    def mkdtemp(**kwargs):
        made.append(Path(real(**kwargs)))
        if len(made) == 1:
            made[0].rmdir()
        return str(made[-1])

    monkeypatch.setattr("tempfile.mkdtemp", mkdtemp)
    with _hidden_folder(tmp_path) as used:
        assert [used] == made[1:] == list(tmp_path.iterdir())


def test_file_systems_without_locks_keep_leftovers(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refused)
    (tmp_path / ".surgery-0.tmp").mkdir()

    write_files(tmp_path, {"a": b"1"})

    assert [".surgery-0.tmp", "a"] == sorted(path.name for path in tmp_path.iterdir())
    with _locked(tmp_path / ".surgery-0.tmp", wait=False) as is_locked:
        assert not is_locked
