"""Adapters that a server makes or loads in inference mode are ordinary ones outside it."""

import pytest
import torch
from support.families import build, open_gates_, tokens
from surgery_adaption_prompt import AdapterStore, AdaptionPromptConfig, AdaptionPromptModel

IDS = tokens(2, 5)
CONFIG = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, gate="head")


@pytest.fixture
def folder(tmp_path):
    model = AdaptionPromptModel(build(), {"a": CONFIG, "b": CONFIG}, "a")
    for seed, name in enumerate("ab"):
        open_gates_(model.adapter_modules(name), seed=seed)
    model.save_pretrained(tmp_path)
    return tmp_path


def alone(folder, name):
    """Return what a model computes that was never in inference mode."""
    with torch.no_grad():
        return AdaptionPromptModel.from_pretrained(build(), folder / name)(IDS).logits


def from_store(folder):
    model = AdaptionPromptModel(build(), {"own": CONFIG}, "own", store=AdapterStore(folder)).eval()
    model.set_adapter("a")
    return model


def by_hand(folder):
    model = AdaptionPromptModel(build(), {"own": CONFIG}, "own").eval()
    model.load_adapter(folder / "a", "a", is_trainable=True)
    model.set_adapter("a")
    return model


def whole(folder):
    """The base too."""
    return AdaptionPromptModel.from_pretrained(build(), folder / "a", "a", is_trainable=True)


MADE = {"store": from_store, "load_adapter": by_hand, "from_pretrained": whole}


@pytest.mark.parametrize("made", MADE)
def test_a_hot_swap_outside_is_whole(made, folder):
    with torch.inference_mode():
        model = MADE[made](folder)
        assert torch.allclose(alone(folder, "a"), model(IDS).logits, atol=1e-5)

    model.hotswap_adapter(folder / "b", "a")

    with torch.no_grad():
        assert torch.allclose(alone(folder, "b"), model(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("made", ["store", "load_adapter"])
def test_it_moves_and_trains_outside(made, folder):
    with torch.inference_mode():
        parameters = MADE[made](folder).adapter_modules("a")["model.layers.2.self_attn"]
    assert not any(p.is_inference() for p in parameters.prompt_parameters().values())

    with torch.inference_mode():
        base = build()
    model = AdaptionPromptModel(build(), {"own": CONFIG}, "own")
    with torch.inference_mode():
        model.load_adapter(folder / "a", "a", is_trainable=True)
    model.set_adapter("a")
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.adapter_parameters(["a"]))
    model.double()
    assert AdaptionPromptModel(base, {"a": CONFIG}, "a").unload() is base


def test_rows_in_buffers_assigned_in_either_mode(folder):
    model = by_hand(folder)
    model.load_adapter(folder / "b", "b")
    with model.fixed_rows(2) as rows:
        with torch.inference_mode():
            rows.assign(["a", "b"])
            model.half()
            model.float()
            rows.refresh()
        rows.assign(["b", "b"])
        with torch.no_grad():
            actual = model(IDS).logits
    assert torch.allclose(alone(folder, "b"), actual, atol=2e-2)
