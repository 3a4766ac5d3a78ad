"""litgpt's files of LLaMA-Adapter V2 are read for models with litgpt's names, and refused for others."""

import pytest
import torch
from surgery_scale_shift import plugin
from surgery_scale_shift.litgpt import read_adapter
from torch import nn

from surgery_core import ModelRecipe, Session, StateError, SurgeryError

HIDDEN, MIDDLE = 4, 6


class Attention(nn.Module):
    """As litgpt's, of one head of the hidden size."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class MLP(nn.Module):
    """As litgpt's LLaMAMLP."""

    def __init__(self):
        super().__init__()
        self.fc_1 = nn.Linear(HIDDEN, MIDDLE, bias=False)
        self.fc_2 = nn.Linear(HIDDEN, MIDDLE, bias=False)
        self.proj = nn.Linear(MIDDLE, HIDDEN, bias=False)

    def forward(self, x):
        return self.proj(nn.functional.silu(self.fc_1(x)) * self.fc_2(x))


class Block(nn.Module):
    """As litgpt's."""

    def __init__(self):
        super().__init__()
        self.norm_1, self.attn = nn.RMSNorm(HIDDEN), Attention()
        self.norm_2, self.mlp = nn.RMSNorm(HIDDEN), MLP()

    def forward(self, x):
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """As litgpt's, with hidden states for tokens."""

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(HIDDEN, 7, bias=False)
        self.transformer = nn.ModuleDict(
            {"h": nn.ModuleList([Block(), Block()]), "ln_f": nn.RMSNorm(HIDDEN)}
        )

    def forward(self, x):
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


def checkpoint(model):
    """Return what litgpt's adapter_filter would let through, all values different."""
    found = {}
    for fqn, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[f"{fqn}.adapter_scale"] = 0.5 + torch.rand(module.out_features)
            found[f"{fqn}.adapter_bias"] = torch.randn(module.out_features)
        if isinstance(module, nn.RMSNorm):
            found[f"{fqn}.weight"] = torch.rand(HIDDEN)
    found["transformer.h.1.attn.adapter_wte.weight"] = torch.randn(3, HIDDEN)
    found["transformer.h.1.attn.gating_factor"] = torch.zeros(1, 1, 1, 1)
    return found


def expected_output(model, state, x):
    """Compute with litgpt's formula, by hooks on the layers of an untouched model."""
    for fqn, module in model.named_modules():
        if isinstance(module, nn.Linear):
            scale, bias = state[f"{fqn}.adapter_scale"], state[f"{fqn}.adapter_bias"]
            module.register_forward_hook(lambda _m, _x, y, s=scale, b=bias: s * (y + b))
        if isinstance(module, nn.RMSNorm):
            module.weight.data.copy_(state[f"{fqn}.weight"])
    return model(x)


@pytest.mark.parametrize("is_nested", [True, False])
def test_a_file_gives_what_litgpt_computes(tmp_path, is_nested):
    """Scales and norms are read by an adapter each, and together they are V2 without prompts."""
    torch.manual_seed(5)
    model, x = GPT(), torch.randn(2, 3, HIDDEN)
    state = checkpoint(model)
    path = tmp_path / "lit_model.pth.adapter_v2"
    torch.save({"model": state} if is_nested else state, path)
    session = Session([plugin], discover=False)
    edits = []

    for name in ("scale_shift", "tuned_norm"):
        adapters = {name: {"operation": name, "source": str(path)}}
        recipe = ModelRecipe.model_validate({"adapters": adapters})
        edits.append(session.plan_recipe(model, recipe).apply())
    actual = model(x)

    assert 2 * 11 == len(edits[0].tensors("scale_shift"))
    for edited in reversed(edits):
        edited.revert()
    assert torch.equal(expected_output(model, state, x), actual)


def test_the_rest_of_the_file_is_told_apart(tmp_path):
    state = checkpoint(GPT())
    torch.save(state, tmp_path / "file")

    found = read_adapter(tmp_path / "file")

    assert {*found.scales, *found.norms, *found.prompts} == state.keys()
    assert 2 == len(found.prompts)
    assert 5 == len(found.norms)


@pytest.mark.parametrize(
    ("operation", "name"),
    [("scale_shift", "'lm_head.adapter_bias'"), ("tuned_norm", "'transformer.h.0.norm_1.weight'")],
)
def test_a_model_with_other_names_is_refused(tmp_path, operation, name):
    """As those of transformers: queries, keys and values are three modules there."""
    torch.save(checkpoint(GPT()), tmp_path / "file")
    adapters = {"a": {"operation": operation, "source": str(tmp_path / "file")}}
    recipe = ModelRecipe.model_validate({"adapters": adapters})
    other = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))

    with pytest.raises(StateError, match=f"is for a model with other names: .* got {name}"):
        Session([plugin], discover=False).plan_recipe(other, recipe)


@pytest.mark.parametrize("operation", ["scale_shift", "tuned_norm"])
def test_a_folder_is_not_read(tmp_path, operation):
    found = Session([plugin], discover=False).plugins.operation(operation)

    assert found.read_saved(str(tmp_path), GPT(), {}) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "is no adapter: expected tensors by name"),
        ({"a": 1}, "is no adapter: expected tensors by name"),
        ({"transformer.h.1.attn.gating_factor": torch.zeros(1)}, "not of the method adapter_v2"),
        ({"model": {}}, "not of the method adapter_v2"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "file")

    with pytest.raises(SurgeryError, match=message):
        read_adapter(tmp_path / "file")


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "file")

    with pytest.raises(SurgeryError, match=r"cannot be read: .* UnpicklingError"):
        read_adapter(tmp_path / "file")
