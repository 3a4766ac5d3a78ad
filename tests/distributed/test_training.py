"""`surgery train` by two processes gives the record that one gives, and one of them writes it."""

import json
import sys
from pathlib import Path

import pytest
from distributed.launching import EXAMPLES, assert_near, launch, run
from support.trainable import pairs, write_lines, write_task

from surgery_core import read_record

pytestmark = pytest.mark.slow

SURGERY = Path(sys.executable).with_name("surgery")
LOSS = 1e-4
"""Of losses of about five; they are written with all digits, and are sums in float32."""
TRAINED = 1e-4
"""Three steps in float32, of gradients that are clipped to a norm which is rounded too."""


def task(folder, batch_size):
    """Write a task without dropout, for which every process would draw other numbers."""
    folder.mkdir()
    files = write_task(folder, batch_size=batch_size, max_steps=3, evaluate_every=3, save_every=3)
    config = folder / "llama" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_dropout": 0.0}))
    # As many as batches of all processes take, so that none is seen twice.
    write_lines(folder / "train.jsonl", pairs(12))
    write_lines(folder / "held.jsonl", pairs(4, start=40))
    return [SURGERY, "train", *files, "--out", folder / "out"]


def test_two_processes_train_what_one_does(tmp_path):
    run([*map(str, task(tmp_path / "one", 4))])

    launch(*task(tmp_path / "two", 2), config=EXAMPLES / "ddp.yaml")

    records = [read_record(tmp_path / name / "out") for name in ("one", "two")]
    assert_near(records[0].state["own"], records[1].state["own"], TRAINED)
    reports = [
        json.loads((tmp_path / name / "out" / "training.json").read_text())
        for name in ("one", "two")
    ]
    assert reports[0]["steps"] == reports[1]["steps"] == 3
    for kind in ("losses", "validation"):
        ours, theirs = (flat(report[kind]) for report in reports)
        assert len(ours) > 0
        assert ours == pytest.approx(theirs, abs=LOSS)


def flat(found):
    """Return the numbers in lists of lists."""
    return [x for one in found for x in flat(one)] if isinstance(found, list) else [found]
