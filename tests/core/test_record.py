"""Records are written whole, read strictly, replayed exactly and rematched elsewhere."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from core.edits import edited, recipe
from core.toys import Net, example, session
from support.folders import as_two_files, change_text, header_of, rewrite
from torch import nn

from surgery_core import RecordError, StateError, SurgeryWarning, load, read_record
from surgery_core.record import MIGRATIONS, PENDING_FILE, RECORD_FILE, TENSORS_FILE
from surgery_core.testing import assert_unchanged, snapshot


def trained(model):
    """Return a model with the recipe applied and values that show."""
    found = edited(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for name in ("rules", *found.adapters):
            for tensor in found.tensors(name).values():
                tensor.normal_()
    return found


def make(seed=0):
    torch.manual_seed(seed)
    return Net().eval()


@pytest.fixture
def saved(tmp_path):
    """Return a folder with a record, and what each adapter computes."""
    found = trained(make())
    outputs = {}
    for name in found.adapters:
        found.set_active(name)
        outputs[name] = found.model(example()).detach()
    found.set_active("narrow")
    session().save(found, tmp_path / "record")
    return tmp_path / "record", outputs


def test_saving_leaves_the_model_as_it_is(tmp_path):
    model = make()
    found = trained(model)
    before = snapshot(model)

    session().save(found, tmp_path)

    assert_unchanged(before, model, subject="Saving")
    assert [TENSORS_FILE] == [path.name for path in tmp_path.iterdir()]


def test_a_replay_computes_what_was_saved(saved):
    folder, outputs = saved
    model = make()
    before = snapshot(model)

    found = session().load(model, folder, base_check="error")

    assert "narrow" == found.active
    for name, expected in outputs.items():
        found.set_active(name)
        assert torch.equal(expected, model(example()))
    found.revert()
    assert_unchanged(before, model, subject="Replaying and reverting")


def test_a_record_holds_exactly_what_was_added(saved):
    record = read_record(saved[0])

    assert ["rules", "wide", "narrow", "shift"] == list(record.plans)
    assert {"head.shift"} == set(record.state["rules"])
    assert {f"layers.{i}.up.gate" for i in range(3)} == set(record.state["wide"])
    assert "narrow" == record.recipe.active
    assert {"gate": None, "shift": None} == dict(record.operations)


def test_the_module_level_load_uses_installed_plugins(saved):
    with pytest.raises(Exception, match="Operation 'shift' is unknown"):
        load(make(), saved[0])


def wider():
    model = make()
    model.layers[1].down = nn.Linear(4, 4, bias=True)
    return model


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (wider, "at 'layers.1.down' expected .*, got 'p:bias:"),
        (lambda: Net(blocks=2).eval(), "at 'layers.2' expected 'layers.2:core.toys.Block', got"),
        (lambda: make().double(), "at 'stem' expected 'p:weight:.*float32', got .*float64"),
        (lambda: nn.Sequential(make()), "expected ':core.toys.Net', got"),
    ],
)
def test_another_model_is_refused_with_the_first_difference(saved, other, message):
    model = other()
    before = snapshot(model)

    with pytest.raises(RecordError, match=message):
        session().load(model, saved[0])
    assert_unchanged(before, model, subject="A refused replay")


def test_other_values_of_the_base_are_noticed(saved):
    model = make(seed=1)
    with pytest.warns(SurgeryWarning, match="was made of a model with other values"):
        session().load(model, saved[0]).revert()
    with pytest.raises(StateError, match="expected those recorded, got others at 'head'"):
        session().load(model, saved[0], base_check="error")
    session().load(model, saved[0], base_check="ignore").revert()


def test_rematch_follows_in_order_to_another_dtype(saved):
    folder, outputs = saved
    model = make().double()

    found = session().load(model, folder, on_other_model="rematch")

    for name, expected in outputs.items():
        found.set_active(name)
        assert torch.allclose(expected.double(), model(example(dtype=torch.float64)), atol=1e-5)


def test_rematch_of_something_else_names_what_does_not_suit(saved):
    model = Net(blocks=2).eval()
    before = snapshot(model)

    with pytest.raises(StateError, match="wide: expected 3 edits, got 2; shift: expected 2 edits"):
        session().load(model, saved[0], on_other_model="rematch")
    wide = Net(size=6).eval()
    with pytest.raises(StateError, match=r"layers.1.down is not as layers.1.down was"):
        session().load(wide, saved[0], on_other_model="rematch")
    assert_unchanged(before, model, subject="A refused rematch")


def test_an_operation_that_does_something_else_now_is_refused(saved):
    def change(data):
        data["plans"]["wide"]["edits"][0]["added"][0]["shape"] = [2]
        data["operations"]["gate"] = "toys 0.9"

    broken(change)(saved[0])

    with pytest.raises(RecordError, match=r"would do something else for 'wide' now.*toys 0.9"):
        session().load(make(), saved[0])


def broken(change):
    """Return a function that changes the JSON of a record."""
    return lambda folder: change_text(folder / TENSORS_FILE, RECORD_FILE, change)


def cut(folder):
    path = folder / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-1])


def with_other_values(folder):
    path = folder / TENSORS_FILE
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


DAMAGES = {
    "no record": (
        lambda f: (f / TENSORS_FILE).unlink(),
        "has no record: expected 'surgery.safetensors'",
    ),
    "no JSON": (
        lambda f: rewrite(f / TENSORS_FILE, metadata={RECORD_FILE: "{"}),
        "is damaged",
    ),
    "a list": (lambda f: rewrite(f / TENSORS_FILE, metadata={RECORD_FILE: "[]"}), "is damaged"),
    "cut tensors": (cut, "is damaged"),
    "other values": (with_other_values, "is damaged: .* got values with SHA-256"),
    "two files, one without JSON": (
        lambda f: (as_two_files(f) / RECORD_FILE).write_text("{"),
        "is damaged",
    ),
    "two files, of which one is not there": (
        lambda f: (as_two_files(f) / TENSORS_FILE).unlink(),
        "has no tensors of its own",
    ),
    "two files, one of them cut": (lambda f: cut(as_two_files(f)), "has no tensors of its own"),
    "another format": (broken(lambda d: d.update(format="x")), "is damaged"),
    "a later version": (
        broken(lambda d: d.update(version=99)),
        "is of version 99: expected at most",
    ),
    "an old version": (broken(lambda d: d.update(version=0)), "is damaged"),
    "a strange recipe": (broken(lambda d: d["recipe"].update(x=1)), "is damaged"),
    "a strange plan": (broken(lambda d: d["plans"].update(wide={})), "is damaged"),
    "no plan": (
        broken(lambda d: d["plans"].pop("wide")),
        "expected plans of 'rules', 'wide', 'narrow', 'shift', got those of 'rules', 'narrow'",
    ),
    "binary": (lambda f: (f / TENSORS_FILE).write_bytes(b"\xff\xfe"), "is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_refused(saved, damage):
    harm, message = DAMAGES[damage]
    harm(saved[0])

    with pytest.raises(RecordError, match=message):
        session().load(make(), saved[0])


def test_records_of_earlier_versions_are_migrated(saved, monkeypatch):
    broken(lambda d: d.update(version=0, recipe_of_old=d.pop("recipe")))(saved[0])

    def migrate(data):
        return {**data, "recipe": data["recipe_of_old"], "version": 1}

    monkeypatch.setattr("surgery_core.record.MIGRATIONS", {**MIGRATIONS, 0: migrate})
    assert read_record(saved[0]).recipe.active == "narrow"


def test_values_that_are_not_finite_are_not_saved(tmp_path):
    found = trained(make())
    with torch.no_grad():
        found.tensors("wide")["layers.1.up.gate"].fill_(float("nan"))

    with pytest.raises(StateError, match=r"Nothing was saved: .*'wide: layers.1.up.gate'"):
        session().save(found, tmp_path / "record")
    assert not (tmp_path / "record").exists()


def test_a_record_that_0_1_0_wrote_is_read_and_replaced(saved):
    """Also one of which the tensors still wait under another name, since the process died."""
    folder, outputs = saved
    before = as_two_files(folder) / TENSORS_FILE
    (folder / PENDING_FILE).write_bytes(before.read_bytes())
    before.write_bytes(b"of the record before")
    model = make()

    found = session().load(model, folder, base_check="error")
    for name, expected in outputs.items():
        found.set_active(name)
        assert torch.equal(expected, model(example()))
    session().save(found, folder)

    assert [TENSORS_FILE] == [path.name for path in folder.iterdir()]
    assert outputs.keys() <= read_record(folder).state.keys()


def test_old_json_next_to_a_record_is_not_read(saved):
    """It is there if a process died after it put a new record in the place of an old one."""
    folder, _ = saved
    (folder / RECORD_FILE).write_text("{}")

    assert "narrow" == read_record(folder).recipe.active


def test_the_same_record_is_the_same_bytes(tmp_path):
    found = trained(make())
    session().save(found, tmp_path / "one")
    session().save(found, tmp_path / "two")

    one, two = ((tmp_path / name / TENSORS_FILE).read_bytes() for name in ("one", "two"))
    assert one == two
    assert {"format", RECORD_FILE} == header_of(tmp_path / "one" / TENSORS_FILE).keys()


KILLED = """
import sys
import torch
from core.edits import edited
from core.toys import Net, session

torch.manual_seed(0)
found = edited(Net().eval())
known = session()
print("ready", flush=True)
number = 0
while True:
    number += 1
    with torch.no_grad():
        for name in ("rules", *found.adapters):
            for tensor in found.tensors(name).values():
                tensor.fill_(float(number))
    found.set_active(("wide", "narrow", "shift")[number % 3])
    known.save(found, sys.argv[1])
"""


@pytest.mark.faults
@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_a_record_that_is_one_of_those_saved(
    tmp_path, record_property
):
    """Killed at random points: every tensor is of one save, and so is which adapter is active."""
    draw = random.Random(3)  # noqa: S311 (no secrets)
    seen = set()
    where = str(Path(__file__).parents[1])
    kills = 6
    for _ in range(kills):
        process = subprocess.Popen(  # noqa: S603 (our own interpreter and code)
            [sys.executable, "-c", KILLED, str(tmp_path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": where},
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(draw.uniform(0.02, 0.25))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert len(list(tmp_path.glob(".*"))) <= 1
        if not (tmp_path / TENSORS_FILE).exists():
            continue
        record = read_record(tmp_path)
        values = {float(v) for state in record.state.values() for t in state.values() for v in t}
        (value,) = values
        assert ("wide", "narrow", "shift")[int(value) % 3] == record.recipe.active
        seen.add(value)
        session().load(make(), tmp_path).revert()

    assert len(seen) > 2
    record_property("processes killed with SIGKILL", {"saving a record": {"killed": kills}})


def test_intent_survives_without_its_sources(saved):
    assert recipe().model_dump() == {
        **read_record(saved[0]).recipe.model_dump(),
        "active": "wide",
    }
