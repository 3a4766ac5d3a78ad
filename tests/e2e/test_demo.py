"""The demo's data is what its script makes, and its splits and its measure are honest."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "demo"


@pytest.fixture
def load(monkeypatch):
    """Import a module of the demo, which runs as scripts and is no package."""
    monkeypatch.syspath_prepend(str(DEMO))

    def load(name):
        spec = importlib.util.spec_from_file_location(name, DEMO / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def examples(name):
    return [json.loads(line) for line in (DEMO / "data" / name).read_text().splitlines()]


def test_the_committed_data_is_what_the_script_makes(load):
    for name, text in load("make_data").make().items():
        assert text == (DEMO / "data" / name).read_text()


def test_the_splits_are_large_enough_and_share_no_name():
    train, heldout = examples("train.jsonl"), examples("heldout.jsonl")
    names = [
        {part for row in rows for part in json.loads(row["answer"])["name"].split()}
        for rows in (train, heldout)
    ]

    assert len(train) >= 300
    assert len(heldout) >= 100
    assert names[0].isdisjoint(names[1])


@pytest.mark.parametrize(
    ("reply", "is_exact"),
    [
        ('{"name":"Ann Lee","date":"2020-01-02","amount":3.50}', True),
        ('Sure: {"date": "2020-01-02", "name": "Ann Lee", "amount": "3.5"}', True),
        ('{"name":"Ann Lee","date":"2020-01-03","amount":3.50}', False),
        ('{"name":"Ann","date":"2020-01-02","amount":3.50}', False),
        ('{"name":"Ann Lee","date":"2020-01-02"}', False),
        ("Ann Lee, 2020-01-02, 3.50", False),
        ("", False),
    ],
)
def test_exact_match_means_every_field(load, reply, is_exact):
    answer = '{"name":"Ann Lee","date":"2020-01-02","amount":3.50}'

    assert is_exact is load("task").is_exact(reply, answer)


def test_a_model_that_another_process_converted_meanwhile_is_taken(load, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    smollm2 = load("smollm2")
    folder = tmp_path / "surgery/SmolLM2-135M-Instruct"

    def convert(_, scratch):
        for target in (folder, scratch / "converted"):
            target.mkdir(parents=True)
            (target / "config.json").write_text(target.name)

    monkeypatch.setattr(smollm2, "_wheel", lambda _: None)
    monkeypatch.setattr(smollm2, "_convert", convert)

    assert folder == smollm2.prepare()
    assert folder.name == (folder / "config.json").read_text()
    assert [folder] == list(folder.parent.iterdir())


def test_a_conversion_that_cannot_be_put_in_its_place_is_an_error(load, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    smollm2 = load("smollm2")
    monkeypatch.setattr(smollm2, "_wheel", lambda _: None)
    monkeypatch.setattr(smollm2, "_convert", lambda *_: None)

    with pytest.raises(FileNotFoundError):
        smollm2.prepare()
