"""Adapters that are saved while processes die, others save, and others read."""

import os
import random
import signal
import time

import pytest
import torch
from support.families import build, open_gates_, tokens
from support.folders import without_header
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel

from surgery_core import SurgeryError

pytestmark = [pytest.mark.slow, pytest.mark.faults]

KILLS, SECONDS = 40, 3


def adapter(**fields):
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, gate="head", **fields)
    model = AdaptionPromptModel(build(), {"default": config, "fr": config}, "default").eval()
    for name in model.peft_config:
        open_gates_(model.adapter_modules(name))
    return model


@pytest.fixture
def models():
    """Two models whose adapters have the same shapes, and compute otherwise with the same values."""
    return adapter(), adapter(gate_activation="tanh")


def forked(call):
    """Run a function in another process; return the process's id."""
    pid = os.fork()
    if pid == 0:
        try:
            call()
        finally:
            # Nothing of the tests' own is to run there.
            os._exit(0)
    return pid


def which(folder, expected):
    """Return which of the models a folder has the adapter of, all of it."""
    again = AdaptionPromptModel.from_pretrained(build(), folder, base_check="error").eval()
    found = again(tokens()).logits
    (number,) = (n for n, logits in enumerate(expected) if torch.allclose(logits, found, atol=1e-6))
    return number


@torch.no_grad()
def outputs(models, name="default"):
    for model in models:
        model.set_adapter(name)
    return [model(tokens()).logits for model in models]


def save_for_ever(models, folder, number=0):
    while True:
        models[number % 2].save_pretrained(folder)
        number += 1


def test_a_process_killed_while_saving_leaves_one_of_the_adapters_saved(
    models, tmp_path, record_property
):
    """Also over folders that 0.1.0 wrote, and several adapters at once."""
    draw = random.Random(5)  # noqa: S311 (no secrets)
    expected = {tmp_path: outputs(models), tmp_path / "fr": outputs(models, "fr")}
    seen = set()
    models[0].save_pretrained(tmp_path)
    for number in range(KILLS):
        if number % 4 == 0:
            # A process that was killed may have left files for PEFT of the save before.
            models[number // 4 % 2].save_pretrained(tmp_path)
            without_header(tmp_path)
            without_header(tmp_path / "fr")
        pid = forked(lambda at=number: save_for_ever(models, tmp_path, at))
        time.sleep(draw.uniform(0.005, 0.08))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for folder, logits in expected.items():
            seen.add(which(folder, logits))
            assert len(list(folder.glob(".*"))) <= 1

    assert {0, 1} == seen
    models[0].save_pretrained(tmp_path)
    assert not list(tmp_path.rglob(".*"))
    record_property("processes killed with SIGKILL", {"saving adapters": {"killed": KILLS}})


def test_two_processes_that_save_and_one_that_reads_do_not_mix_adapters(models, tmp_path):
    expected, seen = outputs(models), set()
    models[0].save_pretrained(tmp_path)
    pids = [forked(lambda m=model: save_for_ever([m, m], tmp_path)) for model in models]
    try:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until or len(seen) < 2:
            try:
                seen.add(which(tmp_path, expected))
            except SurgeryError as err:
                assert "aved anew" in str(err)  # noqa: PT017 (others may not be raised)
            assert time.monotonic() < until + 60
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    assert {0, 1} == seen
    # Of each one at most.
    assert len(list(tmp_path.glob(".*"))) <= 2
    models[1].save_pretrained(tmp_path)
    assert 1 == which(tmp_path, expected)
    assert not list(tmp_path.glob(".*"))
