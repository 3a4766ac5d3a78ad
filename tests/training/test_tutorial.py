"""The files on the tutorial's page are those it says: they convert, plan and train as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.trainable import make_model, make_tokenizer
from surgery_training import load_training_settings
from surgery_training.examples import read_dialogues
from surgery_training.run import train
from surgery_training.settings import TrainingSettings

from surgery_core import load_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/tutorials/train-an-adapter.md").read_text()
SCRIPT = ROOT / "docs/examples/payments/prepare.py"
FILES = dict(
    re.findall(r"^<!-- (\S+) -->\n```\w+[^\n]*\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
)


@pytest.fixture
def payments(tmp_path, monkeypatch):
    """Return a folder with the files of the page, and the examples, without the real model."""
    model = tmp_path / "cache/surgery/SmolLM2-135M-Instruct"
    make_model().save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, SCRIPT]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 (ours)
    assert done.stdout.splitlines()[1:] == re.findall(r"^payments/.* examples$", PAGE, re.MULTILINE)
    for name in ("recipe.yaml", "training.yaml"):
        (tmp_path / "payments" / name).write_text(FILES[name])
    return tmp_path / "payments"


def test_the_script_is_on_the_page_as_it_is():
    assert SCRIPT.read_text() == FILES["prepare.py"]


def test_the_keys_are_all_on_the_page(tmp_path):
    (tmp_path / "training.yaml").write_text(FILES["training.yaml"])
    settings = load_training_settings(tmp_path / "training.yaml")
    table = PAGE[PAGE.index("| key |") : PAGE.index("A key that is unknown")]
    shown = dict(re.findall(r"^\| (`.*?) \| (.*?) \|", table, re.MULTILINE))

    names = {name for keys in shown for name in re.findall(r"`(\w+)`", keys)}
    assert names | settings.model_fields_set == TrainingSettings.model_fields.keys()
    defaults = {name: field.default for name, field in TrainingSettings.model_fields.items()}
    assert "1024, `refuse`" == shown["`max_length`, `too_long`"]
    assert (1024, "refuse") == (defaults["max_length"], defaults["too_long"])
    for name in ("template", "collator", "gate_pattern", "keep"):
        assert f"`{defaults[name]}`" == shown[f"`{name}`"]
    for name in ("gradient_accumulation", "warmup", "seed"):
        assert str(defaults[name]) == shown[f"`{name}`"]
    assert (
        shown["`learning_rate`, `gate_learning_rate`"] == f"{defaults['learning_rate']}, the same"
    )


@pytest.mark.slow
def test_the_files_train(payments):
    """With a tiny model in the place of the real one, which has fewer layers."""
    recipe = FILES["recipe.yaml"].replace("adapter_layers: 20", "adapter_layers: 2")
    recipe = recipe.replace("~/.cache", str(payments.parent / "cache"))
    (payments / "recipe.yaml").write_text(recipe)
    training = FILES["training.yaml"].replace("max_steps: 80", "max_steps: 2")
    (payments / "training.yaml").write_text(training)
    settings = load_training_settings(payments / "training.yaml")

    outcome = train(load_recipe(payments / "recipe.yaml"), settings, payments / "trained")

    assert outcome.steps == 2
    assert (payments / "trained/curves.svg").is_file()
    assert len(read_dialogues(settings.data.train)) == 600
    assert (payments / "train.jsonl").read_text().splitlines()[0] in PAGE
