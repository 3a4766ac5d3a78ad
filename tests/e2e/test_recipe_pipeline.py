"""One recipe, three families, five adapters: planned, applied, verified, saved, replayed, reverted."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.families import build, open_gates_, tokens
from typer.testing import CliRunner

from surgery_core import Session, load_recipe, verify
from surgery_core.cli import app
from surgery_core.snapshots import snapshot

FAMILIES = {"chat": "llama", "code": "qwen3", "legal": "phi3"}
IDS = tokens(2, 7)
RECIPE = """
variables:
  prompt: 4
  gate: head
models:
  chat:
    source: ./chat
    rules:
      - operation: trainable_copy
        options: {modules: [lm_head]}
        expect: 1
    adapters:
      french:
        operation: adaption_prompt
        options: {adapter_len: "${prompt}", adapter_layers: 3, gate: "${gate}"}
        expect: 3
      formal:
        operation: adaption_prompt
        options: {adapter_len: 2, adapter_layers: 2}
    active: {french: 0.7, formal: -0.5}
  code:
    source: ./code
    adapters:
      python:
        operation: adaption_prompt
        options: {adapter_len: "${prompt}", adapter_layers: 2, gate_activation: tanh}
      rust:
        operation: adaption_prompt
        select: model.layers.{..1}.self_attn
        options: {adapter_len: 3, adapter_layers: 1}
    active: rust
  legal:
    source: ./legal
    adapters:
      contracts:
        operation: adaption_prompt
        exclude: model.layers.2.**
        options: {adapter_len: 5, adapter_layers: 3}
        expect: 2
"""

REPLAY = """
import json
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
import surgery_core

folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
# As in the tests: sums over several threads are rounded otherwise.
torch.set_num_threads(1)
found = {}
for name in ("chat", "code", "legal"):
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}").eval()
    with torch.no_grad():
        before = base(ids).logits
        edited = surgery_core.load(base, f"{folder}/records/{name}", base_check="error")
        found[f"{name}/active"] = edited.model(ids).logits
        for adapter in edited.adapters:
            edited.set_active(adapter)
            found[f"{name}/{adapter}"] = edited.model(ids).logits
        assert edited.revert() is base
        assert torch.equal(before, base(ids).logits)
save_file(found, f"{folder}/replayed.safetensors")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with three models and a recipe for them."""
    folder = tmp_path_factory.mktemp("pipeline")
    for seed, (name, family) in enumerate(FAMILIES.items()):
        build(family, seed=seed).save_pretrained(folder / name)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def edited_models(folder):
    """Plan and apply the recipe in this process; return edited models and the bases by name."""
    session, recipe = Session(), load_recipe(folder / "recipe.yaml")
    found = {}
    for name in recipe.models:
        base = session.plugins.load_model(str(folder / name))
        found[name] = session.plan_recipe(base, recipe, name).apply(), base
    return session, found


@pytest.mark.slow
def test_one_recipe_from_plan_to_a_replay_in_another_process(folder):
    planned = invoke("plan", folder / "recipe.yaml", "--json")
    assert planned.exit_code == 2, planned.output
    documents = json.loads(planned.stdout)["models"]
    assert sum(len(document["adapters"]) for document in documents.values()) == 5
    assert len(documents["legal"]["adapters"]["contracts"]["edits"]) == 2

    session, models = edited_models(folder)
    expected = {}
    for name, (edited, _) in models.items():
        inputs = session.plugins.probe_inputs(edited.model)
        outcome = verify(edited, inputs)
        assert outcome.is_ok, outcome.render()
        assert {"ok"} == {check.status for check in outcome.checks}
        for seed, adapter in enumerate(edited.adapters):
            open_gates_(edited.variant(adapter), seed=seed)
        with torch.no_grad():
            if name == "chat":
                for tensor in edited.tensors("rules").values():
                    tensor.mul_(1.5)
            expected[f"{name}/active"] = edited.model(IDS).logits
            for adapter in edited.adapters:
                edited.set_active(adapter)
                expected[f"{name}/{adapter}"] = edited.model(IDS).logits
        selected = edited.plan.recipe.selected
        edited.set_active(selected)
        session.save(edited, folder / "records" / name)

    subprocess.run(  # noqa: S603 (our own interpreter and code)
        [sys.executable, "-c", REPLAY, str(folder), json.dumps(IDS.tolist())], check=True
    )
    replayed = load_file(folder / "replayed.safetensors")
    assert expected.keys() == replayed.keys()
    wrong = [key for key in expected if not torch.equal(expected[key], replayed[key])]
    assert not wrong
    assert len({tuple(value.flatten()[:4].tolist()) for value in expected.values()}) == 6

    for name, (edited, base) in models.items():
        before = edited.before
        assert edited.revert() is base
        assert [] == before.differences(snapshot(base, values=False))
        with torch.no_grad():
            assert torch.equal(
                build(FAMILIES[name], seed=list(FAMILIES).index(name))(IDS).logits, base(IDS).logits
            )


@pytest.mark.slow
def test_the_command_line_applies_verifies_shows_and_exports(folder, tmp_path):
    applied = invoke("apply", folder / "recipe.yaml", "--out", tmp_path / "out", "--json")
    assert applied.exit_code == 0, applied.output
    data = json.loads(applied.stdout)["models"]
    assert all(found["verification"]["is_ok"] for found in data.values())

    verified = invoke("verify", tmp_path / "out", "--json")
    assert verified.exit_code == 0, verified.output
    shown = invoke("show", tmp_path / "out" / "chat")
    assert "french" in shown.stdout
    assert "adaption_prompt" in shown.stdout
    same = invoke("diff", tmp_path / "out" / "chat", tmp_path / "out" / "chat")
    assert (0, "No differences.\n") == (same.exit_code, same.stdout)
    other = invoke("diff", tmp_path / "out" / "chat", tmp_path / "out" / "code")
    assert other.exit_code == 2

    exported = invoke(
        *("export", tmp_path / "out" / "chat", "--adapter", "formal"),
        *("--out", tmp_path / "peft"),
    )
    assert exported.exit_code == 0, exported.output
    imported = invoke(
        *("import", tmp_path / "peft", "--operation", "adaption_prompt"),
        *("--model", folder / "chat", "--out", tmp_path / "again", "--name", "formal"),
    )
    assert imported.exit_code == 0, imported.output
    first = load_file(tmp_path / "out" / "chat" / "surgery.safetensors")
    again = load_file(tmp_path / "again" / "surgery.safetensors")
    assert {key for key in first if key.startswith("formal:")} == set(again)
    assert all(torch.equal(first[key], tensor) for key, tensor in again.items())
