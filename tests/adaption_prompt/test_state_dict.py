"""The model's own state dict says of which adapters it is, in every way in which it is kept."""

import io

import pytest
import torch
from safetensors.torch import load, save
from support.families import build, open_gates_, tokens
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel

from surgery_core import StateError

CONFIG = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, gate="head")
IDS = tokens(2, 5)


def make(active="a"):
    model = AdaptionPromptModel(build(), {"a": CONFIG, "b": CONFIG}, active).eval()
    for seed, name in enumerate("ab"):
        open_gates_(model.adapter_modules(name), seed=seed)
    return model


def values(model):
    return {
        (name, fqn, key): tensor.clone()
        for name in "ab"
        for fqn, module in model.adapter_modules(name).items()
        for key, tensor in module.prompt_parameters().items()
    }


def pickled(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


WAYS = {
    "as it is": lambda state: state,
    "cloned": lambda state: {key: value.clone() for key, value in state.items()},
    "half": lambda state: {key: value.half() for key, value in state.items()},
    "averaged": lambda state: {key: 0.9 * value + 0.1 * value for key, value in state.items()},
    "safetensors": lambda state: load(save({k: v.contiguous() for k, v in state.items()})),
    "pickled": pickled,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("strict", [False, True])
def test_what_is_of_one_adapter_does_not_go_into_another(way, strict):
    model, other = make("a"), make("b")
    state = WAYS[way](model.state_dict())
    before = values(other)

    with pytest.raises(StateError) as caught:
        other.load_state_dict(state, strict=strict)

    after = values(other)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert str(caught.value) == (
        "State dict was taken while 'a' was active: it cannot be loaded while 'b' is, whose tensors "
        "have the same keys. Call set_adapter first; or, if these values are meant for it, take "
        "'_extra_state' out of the state dict."
    )
    other.set_adapter("a")
    other.load_state_dict(state, strict=strict)
    for key, tensor in values(model).items():
        if key[0] == "a":
            assert torch.allclose(tensor, values(other)[key], rtol=1e-3)
        else:
            assert torch.equal(before[key], values(other)[key])


def test_in_a_wrapper_too():
    model, other = torch.nn.Sequential(make("a")), torch.nn.Sequential(make("b"))
    with pytest.raises(StateError, match="taken while 'a' was active"):
        other.load_state_dict(model.state_dict())


@pytest.mark.parametrize("choice", [{"a": 0.5, "b": 1.0}, {"b": 2.0}])
def test_what_is_of_a_composition_goes_into_a_composition_of_the_same(choice):
    model, other = make(), make()
    model.set_adapter(choice)
    other.set_adapter(dict.fromkeys(choice, 3.0))
    other.load_state_dict(model.state_dict())
    other.set_adapter("a")
    model.set_adapter("a")
    with pytest.raises(StateError):
        model.set_adapter(choice) or other.load_state_dict(model.state_dict())


def test_what_is_of_no_adapter_goes_into_any():
    """Of the base alone, of older releases, and while adapters are merged or rows have buffers."""
    model = make()
    old = {key: value for key, value in model.state_dict().items() if key != "_extra_state"}
    assert {f"model.{key}" for key in model.get_base_model().state_dict()} == set(old)
    other = make("b")

    assert not any(other.load_state_dict(old))
    with model.disable_adapter():
        base = model.state_dict()
    assert not any("adaption" in key for key in base)
    assert not other.load_state_dict(base, strict=False).unexpected_keys
    with model.fixed_rows(2):
        assert not any("adaption" in key for key in model.state_dict())
        model.load_state_dict(base)


@pytest.mark.parametrize(
    "state", [None, torch.tensor([1.5, float("nan")]), {"a": 1}, torch.ones(3)]
)
def test_what_names_nothing_is_refused(state):
    model = make()
    with pytest.raises(StateError, match=r"does not say which adapters .* out of it\.$"):
        model.load_state_dict({**model.state_dict(), "_extra_state": state})
