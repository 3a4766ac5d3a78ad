"""Importing the package stays light, and its public names are sorted and complete."""

import json
import subprocess
import sys

import pytest

import surgery_core

HEAVY = ("transformers", "peft", "typer", "rich", "surgery_adaption_prompt")


def loaded_by(statement):
    """Return which of the heavy packages a new interpreter has loaded after a statement."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    found = subprocess.run(  # noqa: S603 (our own interpreter and code)
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return [name for name in HEAVY if name in json.loads(found.stdout)]


@pytest.mark.slow
def test_importing_the_core_imports_no_plugin_no_model_library_and_no_command_line():
    assert loaded_by("import surgery_core") == []


@pytest.mark.slow
def test_the_check_of_imports_can_fail():
    assert loaded_by("import surgery_core.cli") == ["typer", "rich"]


def test_public_names_exist_and_are_sorted():
    assert surgery_core.__all__ == sorted(surgery_core.__all__)
    assert all(hasattr(surgery_core, name) for name in surgery_core.__all__)
