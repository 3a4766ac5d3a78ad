"""The second task of the demo is measured exactly, and every reply goes with its sentence."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

DEMO = Path(__file__).parents[2] / "demo"


@pytest.fixture
def load(monkeypatch):
    """Import a module of the demo, which runs as scripts and is no package."""
    monkeypatch.syspath_prepend(str(DEMO))
    known = set(sys.modules)

    def load(name):
        spec = importlib.util.spec_from_file_location(name, DEMO / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    yield load
    # What they import of each other has names that other tests may use.
    for name in set(sys.modules) - known:
        if (DEMO / f"{name}.py").exists():
            del sys.modules[name]


def test_the_answer_is_the_name_with_the_last_name_first(load):
    example = load("task").Example(
        sentence="Ann Lee paid.", answer='{"name":"Ann Lee","date":"2020-01-02","amount":3.50}'
    )

    found = load("surname").surname_first(example)

    assert ("Ann Lee paid.", "Lee, Ann") == (found.sentence, found.answer)


@pytest.mark.parametrize(
    ("reply", "is_exact"),
    [
        ("Lee, Ann", True),
        (" Lee, Ann\n", True),
        ("Lee, Anna", False),
        ("Ann Lee", False),
        ("Lee, Ann.", False),
        ("Name: Lee, Ann", False),
        ('{"name":"Lee, Ann"}', False),
        ("", False),
    ],
)
def test_exact_match_means_the_name_and_nothing_else(load, reply, is_exact):
    assert is_exact is load("surname").is_exact(reply, "Lee, Ann")


def test_every_heldout_sentence_has_an_answer_of_its_name(load):
    task, surname = load("task"), load("surname")
    for example in task.read_examples("heldout.jsonl"):
        last, first = surname.surname_first(example).answer.split(", ")
        assert f"{first} {last}" == json.loads(example.answer)["name"]
        assert f"{first} {last}" in example.sentence


def test_batches_have_every_sentence_once_and_neighbours_in_length(load):
    sentences = ["x" * (7 * index % 64) for index in range(64)]

    found = list(load("evaluate").batches(sentences))

    assert [30, 30, 4] == [len(batch) for batch in found]
    lengths = [len(sentences[index]) for batch in found for index in batch]
    assert sorted(map(len, sentences)) == lengths
    assert sorted(index for batch in found for index in batch) == list(range(64))


def test_replies_and_adapters_stay_with_their_sentences(load, monkeypatch):
    """Batches are in another order than the sentences."""
    evaluate = load("evaluate")
    tokenizer = SimpleNamespace(eos_token_id=0)

    def generate(model, tokenizer, sentences, *, adapter_names, prompt):  # noqa: ARG001
        rows = [[len(s), int(n), 0, 0] for s, n in zip(sentences, adapter_names, strict=True)]
        return torch.tensor(rows)

    monkeypatch.setattr(evaluate, "generate", generate)
    sentences = ["x" * (1 + 7 * index % 64) for index in range(64)]
    names = [str(1 + index) for index in range(64)]

    found = evaluate.generate_all(None, tokenizer, sentences, adapter_names=names)

    assert [[len(s), int(n)] for s, n in zip(sentences, names, strict=True)] == found


def test_a_reply_ends_at_its_first_end_token(load):
    tokenizer = SimpleNamespace(eos_token_id=2)

    assert [5, 6] == load("evaluate").without_end(torch.tensor([5, 6, 2, 7, 2]), tokenizer)
