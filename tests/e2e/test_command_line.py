"""The installed command plans for a model folder without its weights."""

import json
import subprocess
import sysconfig
from pathlib import Path

import pytest
from support.families import build

SURGERY = Path(sysconfig.get_path("scripts")) / "surgery"


def surgery(*arguments):
    return subprocess.run(  # noqa: S603 (our own command)
        [SURGERY, *arguments], capture_output=True, text=True, check=False
    )


@pytest.fixture
def folder(tmp_path):
    build("qwen3").config.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.slow
def test_a_plan_is_printed_and_exits_with_two(folder):
    found = surgery(
        "plan", folder, "--operation", "adaption_prompt",
        "-o", "adapter_len=4", "-o", "adapter_layers=2", "-o", "gate=head",
    )  # fmt: skip

    assert 2 == found.returncode
    assert found.stdout.splitlines()[-1] == "Plan: 2 modules replaced, 200 parameters added."


@pytest.mark.slow
def test_a_plan_as_json(folder):
    found = surgery(
        "plan", folder, "--operation", "adaption_prompt",
        "--select", "model.layers.0.*", "-o", "adapter_len=4", "-o", "adapter_layers=1", "--json",
    )  # fmt: skip

    assert 2 == found.returncode
    (edit,) = json.loads(found.stdout)["edits"]
    assert "model.layers.0.self_attn" == edit["fqn"]


@pytest.mark.slow
def test_an_error_exits_with_one(folder):
    found = surgery("plan", folder, "--operation", "adaption_prompt", "-o", "adapter_len=4")

    assert 1 == found.returncode
    # Libraries that transformers finds may warn above it.
    assert found.stderr.splitlines()[-1] == (
        "error: AdaptionPromptConfig is invalid: adapter_layers must be an integer of at least 1, "
        "got None."
    )


@pytest.mark.slow
def test_the_plugin_is_listed():
    found = surgery("plugins", "--json")

    infos = {info["name"]: info for info in json.loads(found.stdout)}
    assert ["adaption_prompt", "trainable_copy"] == infos["adaption_prompt"]["operations"]
