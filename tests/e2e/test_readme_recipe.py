"""The recipe on the README's first screen gives the plan that stands below it."""

import re
from pathlib import Path

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from surgery_core.cli import app

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.slow
def test_the_plan_is_that_of_the_recipe(tmp_path, monkeypatch):
    """For a model of SmolLM2-135M's shape, of which planning reads the configuration alone."""
    (recipe,) = re.findall(r"^```yaml\n(# recipe.yaml\n.*?)^```", README, re.MULTILINE | re.DOTALL)
    (shown,) = re.findall(
        r"^\$ surgery plan recipe.yaml.*?\n(.*?)\n\n\$", README, re.MULTILINE | re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(recipe)
    LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained("smollm2")

    result = CliRunner().invoke(app, ["plan", "recipe.yaml"])

    assert 2 == result.exit_code, result.output
    printed = result.stdout.replace(str(tmp_path.resolve()), ".").rstrip()
    assert shown.splitlines() == printed.splitlines()
