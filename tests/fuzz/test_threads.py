"""Several threads add, load, activate, run, save and delete on one model, each by a schedule of its own.

What a thread computes in a context is what the adapter gives when nothing else goes on; whatever is
refused meanwhile is refused with an error of ours; and nobody waits for ever.
"""

import collections
import faulthandler
import itertools
import random
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from core.toys import Net, example
from fuzz.readers import LOW_RANK
from support.families import build, open_gates_, tokens
from support.threads import Turns
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel

from surgery_core import ModelRecipe, SurgeryError, read_record
from surgery_core.testing import assert_unchanged, snapshot

pytestmark = [pytest.mark.slow, pytest.mark.faults]

NUM_THREADS, SECONDS, PATIENCE = 5, 6, 120


@contextmanager
def often_interrupted():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def stress(make_actions):
    """Have threads draw from actions until the time is up; return how often each was done or refused."""
    done, refused, findings = collections.Counter(), collections.Counter(), []
    end = time.monotonic() + SECONDS

    def work(number):
        draw = random.Random(number)  # noqa: S311 (no secrets)
        actions = make_actions(number, draw)
        while time.monotonic() < end and not findings:
            action = draw.choice(actions)
            try:
                action()
            except SurgeryError:
                refused[action.__name__] += 1
            except BaseException as err:  # noqa: BLE001 (whatever it is, it is the finding)
                findings.append(f"{action.__name__}: {err!r}")
            else:
                done[action.__name__] += 1

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(NUM_THREADS)]
    with often_interrupted():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(1, end + PATIENCE - time.monotonic()))
    waiting = [thread.name for thread in threads if thread.is_alive()]
    if waiting:
        faulthandler.dump_traceback(all_threads=True)
    assert waiting == []
    assert findings == []
    return done, refused


def counted(done, refused):
    return {name: {"done": done[name], "refused": refused[name]} for name in done | refused}


IDS = tokens(2, 5)
CONFIGS = {
    "fr": AdaptionPromptConfig(adapter_len=3, adapter_layers=1, gate="head"),
    "legal": AdaptionPromptConfig(adapter_len=5, adapter_layers=3, gate_activation="tanh"),
    "plain": AdaptionPromptConfig(adapter_len=2, adapter_layers=2),
}
CHOICES = ("__base__", "fr", "legal", "plain", {"fr": 0.5, "legal": 2.0}, ["legal", "fr"])


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_threads_on_an_adaption_prompt_model(tmp_path, record_property):  # noqa: C901, PLR0915 (one function for each action)
    base = build(seed=1)
    before = snapshot(base)
    model = AdaptionPromptModel(base, CONFIGS, "fr").eval()
    for seed, name in enumerate(CONFIGS):
        open_gates_(model.adapter_modules(name), seed=seed)
    expected = {}
    for choice in CHOICES:
        with model.activated(choice):
            expected[str(choice)] = logits(model)
    assert len(CHOICES) == len({tuple(x.flatten().tolist()) for x in expected.values()})
    model.save_pretrained(tmp_path / "all")
    saved = (tmp_path / "all" / "legal" / "adapter_model.safetensors").read_bytes()
    numbers, turns = itertools.count(), Turns()

    def make_actions(thread, draw):
        def run():
            choice = draw.choice(CHOICES)
            with turns.shared(), model.activated(choice):
                for _ in range(draw.randint(1, 3)):
                    assert torch.equal(expected[str(choice)], logits(model)), choice

        def run_nested():
            outer, inner = draw.sample(CHOICES, 2)
            with turns.shared(), model.activated(outer):
                with model.activated(inner):
                    assert torch.equal(expected[str(inner)], logits(model)), inner
                assert torch.equal(expected[str(outer)], logits(model)), outer

        def load():
            name, source = f"disk{next(numbers)}", draw.choice(["fr", "legal", "plain"])
            model.load_adapter(tmp_path / "all" / source, name, base_check="error")
            try:
                with turns.shared(), model.activated(name):
                    assert torch.equal(expected[source], logits(model)), source
            finally:
                model.delete_adapter(name)

        def add():
            name = f"new{next(numbers)}"
            model.add_adapter(name, CONFIGS["plain"])
            try:
                with model.activated(name):
                    assert torch.equal(expected["__base__"], logits(model))
            finally:
                model.delete_adapter(name)

        def activate():
            model.set_adapter(draw.choice(["fr", "legal", "plain", {"fr": 1.0, "plain": 0.5}]))

        def disable():
            choice = draw.choice(CHOICES)
            with turns.alone(), model.disable_adapter(), model.activated(choice):
                assert torch.equal(expected["__base__"], logits(model)), choice

        def save():
            folder = tmp_path / f"thread{thread}"
            model.save_pretrained(folder, selected_adapters=["legal"])
            found = (folder / "legal" / "adapter_model.safetensors").read_bytes()
            assert saved == found

        return [run, run, run, run_nested, load, add, activate, disable, save]

    done, refused = stress(make_actions)

    record_property("actions of several threads", counted(done, refused))
    for name in ("run", "run_nested", "load", "add", "activate", "disable", "save"):
        assert done[name], done
    assert {"fr", "legal", "plain"} == set(model.peft_config)
    for choice in CHOICES:
        with model.activated(choice):
            assert torch.equal(expected[str(choice)], logits(model))
    model.unload()
    assert_unchanged(before, base, subject="Stress and unloading")


LOW = {"operation": "low_rank", "select": "layers.*.up"}
RECIPE = {
    "adapters": {"a": {**LOW, "options": {"r": 1}}, "b": {**LOW, "options": {"r": 2}}},
    "active": "a",
}
CHOSEN = ("__base__", "a", "b", {"a": 0.5, "b": 2.0}, {"b": -1.0})


def test_threads_on_an_edited_model(tmp_path, record_property):  # noqa: C901 (same)
    torch.manual_seed(1)
    base = Net().eval()
    before = snapshot(base)
    edited = LOW_RANK.plan_recipe(base, ModelRecipe.model_validate(RECIPE)).apply()
    for name in ("a", "b"):
        for tensor in edited.tensors(name).values():
            torch.nn.init.normal_(tensor)
    expected = {}
    for choice in CHOSEN:
        with edited.activated(choice):
            expected[str(choice)] = base(example()).detach()
    assert len(CHOSEN) == len({tuple(x.flatten().tolist()) for x in expected.values()})
    state = {name: {k: t.clone() for k, t in edited.tensors(name).items()} for name in ("a", "b")}

    def make_actions(thread, draw):
        def run():
            choice = draw.choice(CHOSEN)
            with edited.activated(choice):
                for _ in range(draw.randint(1, 3)):
                    assert torch.equal(expected[str(choice)], base(example())), choice

        def activate():
            edited.set_active(draw.choice(["a", "b", {"a": 1.0, "b": 0.5}]))

        def load():
            # The same values: what others compute meanwhile stays.
            name = draw.choice(["a", "b"])
            edited.load_(name, state[name])

        def save():
            folder = tmp_path / f"thread{thread}"
            LOW_RANK.save(edited, folder)
            record = read_record(folder)
            for name, tensors in state.items():
                assert all(torch.equal(t, record.state[name][k]) for k, t in tensors.items())

        def export():
            folder = tmp_path / f"exported{thread}"
            LOW_RANK.export(edited, "b", folder)
            assert 2 == len(list(folder.iterdir()))

        return [run, run, run, activate, load, save, export]

    done, refused = stress(make_actions)

    record_property("actions of several threads", counted(done, refused))
    for name in ("run", "activate", "load", "save", "export"):
        assert done[name], done
    for choice in CHOSEN:
        with edited.activated(choice):
            assert torch.equal(expected[str(choice)], base(example()))
    edited.revert()
    assert_unchanged(before, base, subject="Stress and reverting")
