"""The commands: train, resume, generate and eval, in this process; what they print and refuse."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from core.cli_toys import cells
from support.trainable import pairs, write_lines, write_task
from surgery_training import plugin
from typer.testing import CliRunner

from surgery_core import Plugins, read_record
from surgery_core.cli import with_commands

TESTS = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def invoke(*arguments, status=0):
    app = with_commands(Plugins([plugin], discover=False))
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == status, result.output
    return result


@pytest.fixture
def trained(tmp_path):
    """Return a folder with an adapter that learned two answers by heart."""
    files = write_task(tmp_path, "low_rank", max_steps=60, learning_rate=0.05, batch_size=2)
    data = json.loads(files[0].read_text())
    own = data["models"]["chat"]["adapters"]["own"]
    own.update(select="**.mlp.*", options={"r": 8, "lora_alpha": 16})
    files[0].write_text(json.dumps(data))
    write_lines(tmp_path / "train.jsonl", pairs(2))
    write_lines(tmp_path / "held.jsonl", pairs(2))
    result = invoke("train", *files, "--out", tmp_path / "out")
    assert "step 60/60  validation loss" in result.stdout
    return tmp_path / "out"


def test_what_was_trained_is_tried_and_measured(trained):
    rows = pairs(2)
    prompts = [argument for row in rows for argument in ("--prompt", row["prompt"])]

    said = invoke("generate", trained, *prompts).stdout.splitlines()
    before = invoke("generate", trained, *prompts, "--base", "--max-new-tokens", 3).stdout
    table = invoke("eval", trained, "--data", trained.parent / "held.jsonl").stdout
    scores = json.loads(
        invoke("eval", trained, "--data", trained.parent / "held.jsonl", "--json").stdout
    )

    assert said == [row["answer"] for row in rows]
    assert not any(row["answer"] in before for row in rows)
    assert (scores["base"]["exact"], scores["adapted"]["exact"]) == (0, 2)
    assert scores["adapted"]["replies"] == said
    assert scores["adapted"]["loss"] < 0.1 < scores["base"]["loss"]
    assert ["adapted", f"{scores['adapted']['loss']:.4f}", "2/2", "100.0 %"] in cells(table)
    assert ["base", f"{scores['base']['loss']:.4f}", "0/2", "0.0 %"] in cells(table)
    limited = invoke(
        "eval", trained, "--data", trained.parent / "held.jsonl", "--limit", 1, "--json"
    )
    assert json.loads(limited.stdout)["base"]["total"] == 1


def test_a_training_that_is_finished_stays(trained):
    folder = trained.parent
    files = (folder / "recipe.json", folder / "training.json")
    before = (trained / "surgery.safetensors").read_bytes()

    again = invoke("train", *files, "--out", trained, "--resume")
    refused = invoke("train", *files, "--out", trained, status=1)

    assert again.stdout == f"Training in {str(trained)!r} is finished already.\n"
    assert "has a training already" in refused.stderr
    assert (trained / "surgery.safetensors").read_bytes() == before


def test_recipes_are_tried_too(tmp_path):
    """First values change nothing."""
    recipe, _ = write_task(tmp_path)
    arguments = ("--prompt", "say 1", "--max-new-tokens", 4)

    one = invoke("generate", recipe, *arguments, "--adapter", "own").stdout
    other = invoke("generate", recipe, *arguments, "--base").stdout

    assert one == other


def test_models_and_adapters_are_chosen(tmp_path):
    recipe, training = write_task(tmp_path, max_steps=1)
    data = json.loads(recipe.read_text())
    data["models"]["other"] = data["models"]["chat"]
    data["models"]["chat"]["adapters"]["more"] = data["models"]["chat"]["adapters"]["own"]
    data["models"]["chat"]["active"] = {"own": 0.5, "more": 0.5}
    recipe.write_text(json.dumps(data))
    out = tmp_path / "out"

    unnamed = invoke("train", recipe, training, "--out", out, status=1)
    several = invoke("train", recipe, training, "--out", out, "--model", "chat", status=1)
    source = f"other={tmp_path / 'llama'}"
    chosen = ("--model", source, "--adapter", "more")
    invoke("train", recipe, training, "--out", out, *chosen)

    assert "has the models 'chat', 'other': expected the name of one, got None" in unnamed.stderr
    assert "expected the name of one, got {'own': 0.5, 'more': 0.5}" in several.stderr
    assert read_record(out).recipe.active == "more"
    told = invoke("generate", out, "--prompt", "a", "--model", tmp_path / "llama", "--base")
    assert told.exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "none", "training.json", "--out", "out"), "Source 'none' is no recipe"),
        (("train", "recipe.json", "none.yaml", "--out", "out"), "'none.yaml' cannot be read"),
        (("generate", "none", "--prompt", "a"), "Folder 'none' has no record"),
        (
            ("generate", "recipe.json", "--prompt", "a", "--template", "x"),
            "Template 'x' is unknown",
        ),
        (("eval", "recipe.json", "--data", "none"), "Examples 'none' cannot be read"),
        (
            ("generate", "recipe.json", "--prompt", "a", "--tokenizer", "none"),
            "Tokenizer of 'none' cannot be loaded",
        ),
    ],
)
def test_what_is_wrong_is_said(tmp_path, monkeypatch, arguments, message):
    write_task(tmp_path)
    monkeypatch.chdir(tmp_path)

    result = invoke(*arguments, status=1)

    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_examples_that_are_cut_off_are_counted(tmp_path):
    files = write_task(tmp_path, max_steps=1, max_length=27, too_long="truncate")

    result = invoke("train", *files, "--out", tmp_path / "out")

    assert "examples were cut off at max_length" in result.stderr
    assert json.loads((tmp_path / "out/training.json").read_text())["truncated"] > 0


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from surgery_training import trainer
place, count, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
calls = 0

def dying(call):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapped

if place == "publish":
    trainer.publish = dying(trainer.publish)
elif place == "rename":
    trainer.shutil.rmtree = dying(trainer.shutil.rmtree)
elif place == "torch.save":
    torch.save = dying(torch.save)
elif place == "step":
    torch.optim.AdamW.step = dying(torch.optim.AdamW.step)
from surgery_core.cli import run
sys.argv = ["surgery", *arguments]
run()
"""


@pytest.mark.faults
@pytest.mark.parametrize(
    ("place", "count"),
    [("step", 5), ("torch.save", 2), ("torch.save", 5), ("publish", 2), ("rename", 5)],
)
def test_a_process_that_is_killed_is_resumed_to_the_same_values(
    tmp_path, record_property, place, count
):
    """In a step, while a checkpoint is written, before it has its name, and while others go."""
    values = {"max_steps": 8, "save_every": 2, "evaluate_every": 3}
    files = write_task(tmp_path, "low_rank", **values)
    (tmp_path / "killed.py").write_text(textwrap.dedent(KILLED))
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "HF_HUB_OFFLINE": "1"}
    command = ["train", *files, "--out", tmp_path / "out"]

    done = subprocess.run(  # noqa: S603 (our own)
        [sys.executable, tmp_path / "killed.py", place, str(count), *map(str, command)],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out/surgery.safetensors").exists()
    invoke(*command, "--resume")
    invoke(*command[:-1], tmp_path / "whole")

    (one,) = read_record(tmp_path / "out").state.values()
    (other,) = read_record(tmp_path / "whole").state.values()
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert any(bool(tensor.any()) for name, tensor in one.items() if name.endswith("lora_B"))
    record_property("processes killed with SIGKILL", {f"training, {place}": {"killed": 1}})


def test_a_source_from_the_environment_is_in_no_file_and_no_message(tmp_path, monkeypatch):
    files = write_task(tmp_path, "low_rank", max_steps=2, batch_size=2)
    (tmp_path / "llama").rename(tmp_path / "s3cr3t")
    monkeypatch.setenv("LLAMA", str(tmp_path / "s3cr3t"))
    data = json.loads(files[0].read_text())
    data["models"]["chat"]["source"] = "${env:LLAMA}"
    files[0].write_text(json.dumps(data))
    out = tmp_path / "out"

    results = [
        invoke("train", *files, "--out", out),
        invoke("generate", out, "--prompt", "say 1", "--max-new-tokens", 2),
        invoke("eval", out, "--data", tmp_path / "held.jsonl", "--json"),
        invoke("eval", files[0], "--data", tmp_path / "held.jsonl"),
    ]
    monkeypatch.setenv("LLAMA", str(tmp_path / "s3cr3t-not-there"))
    results += [
        invoke("train", *files, "--out", tmp_path / "other", status=1),
        invoke("generate", out, "--prompt", "say 1", status=1),
        invoke("generate", out, "--prompt", "x", "--tokenizer", tmp_path / "llama", status=1),
    ]

    assert "${env:LLAMA}" == read_record(out).recipe.source
    assert "${env:LLAMA}" == json.loads((out / "training.json").read_text())["tokenizer"]
    assert not any("s3cr3t" in result.output for result in results)
    assert "'${env:LLAMA}'" in results[4].stderr
    written = [p for p in out.rglob("*") if p.is_file()]
    assert written
    assert not any(b"s3cr3t" in path.read_bytes() for path in written)
