"""What was trained and saved here gives the same logits and tokens in a process of its own."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import build, tokens
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel

RELOAD = """
import sys
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from surgery_adaption_prompt import AdaptionPromptModel

folder = sys.argv[1]
base = AutoModelForCausalLM.from_pretrained(f"{folder}/base").eval()
model = AdaptionPromptModel.from_pretrained(base, f"{folder}/adapters/fr", "fr")
ids = load_file(f"{folder}/ids.safetensors")["ids"]
logits = model(ids).logits.detach()
tokens = model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=8, do_sample=False)
save_file({"logits": logits, "tokens": tokens}, f"{folder}/reloaded.safetensors")
"""


@pytest.mark.slow
def test_train_save_and_reload_in_a_fresh_process(tmp_path):
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    configs = {
        "fr": AdaptionPromptConfig(adapter_len=4, adapter_layers=2, gate="head"),
        "legal": AdaptionPromptConfig(adapter_len=2, adapter_layers=3),
    }
    model = AdaptionPromptModel(base, configs, "fr")
    ids = tokens()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    losses = []
    for _ in range(10):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.set_adapter("legal")
    model.save_pretrained(tmp_path / "adapters")
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    model.set_adapter("fr")
    with torch.no_grad():
        logits = model(ids).logits
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )

    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], check=True)  # noqa: S603 (our own text)

    reloaded = load_file(tmp_path / "reloaded.safetensors")
    assert losses[-1] < losses[0]
    # One process may split its sums over other threads than another.
    assert torch.allclose(logits, reloaded["logits"], atol=1e-5)
    assert torch.equal(expected, reloaded["tokens"])
