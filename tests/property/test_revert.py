"""Whatever happens between apply and revert: the same objects, keys and attributes come back."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.families import CLASSES, build, open_gates_, tokens
from surgery_adaption_prompt import AdaptedAttention, plugin

from surgery_core import Rule, Session

IDS = tokens()


def train(model):
    trained = [p for name, p in model.named_parameters() if "adaption_" in name]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.zero_grad()


def fail_in_forward(model):
    handle = model.model.layers[-1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(IDS)
    handle.remove()


def reload_state(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()))


def toggle_mode(model):
    model.train()
    model.eval()


def generate(model):
    model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3)


EVENTS = {
    "forward": lambda model: model(IDS),
    "generate": generate,
    "train": train,
    "error": fail_in_forward,
    "state": reload_state,
    "mode": toggle_mode,
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "backend": lambda model: (
        model.set_attn_implementation("eager"),
        model(IDS, output_attentions=False),
        model.set_attn_implementation("sdpa"),
    ),
    "gates": lambda model: open_gates_(
        {fqn: m for fqn, m in model.named_modules() if isinstance(m, AdaptedAttention)}
    ),
    "double": lambda model: model.double().float(),
    "flags": lambda model: (model.requires_grad_(False), model.requires_grad_(True)),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", CLASSES)
@given(
    events=st.lists(st.sampled_from(sorted(EVENTS)), max_size=6),
    layers=st.integers(1, 3),
    gate=st.sampled_from(["layer", "head"]),
)
def test_revert_after_anything(family, events, layers, gate):
    model = build(family)
    modules = [(name, id(module)) for name, module in model.named_modules()]
    tensors = [(name, id(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()]
    attributes = [set(vars(module)) for module in model.modules()]
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    configs = [id(layer.self_attn.config) for layer in model.model.layers]
    with torch.no_grad():
        expected = model(IDS).logits
    options = {"adapter_len": 3, "adapter_layers": layers, "gate": gate}
    rule = Rule(operation="adaption_prompt", options=options)
    surgery = Session([plugin], discover=False).plan(model, [rule]).apply()

    for event in events:
        EVENTS[event](model)
    reverted = surgery.revert()

    assert reverted is model
    assert modules == [(name, id(module)) for name, module in model.named_modules()]
    assert tensors == [
        (name, id(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()
    ]
    assert attributes == [set(vars(module)) for module in model.modules()]
    assert hooks == [dict(module._forward_hooks) for module in model.modules()]
    assert configs == [id(layer.self_attn.config) for layer in model.model.layers]
    with torch.no_grad():
        assert torch.equal(expected, model(IDS).logits)
