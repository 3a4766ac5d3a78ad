"""What is done to a layer while an adapter is on it is the base's when the adapter leaves."""

import copy

import pytest
import torch
from support.families import build, open_gates_, tokens
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from surgery_low_rank import merge_
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from surgery_core import DriftError, ModelRecipe, Session

# What PyTorch says of `weight_norm`, which models still have.
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")

X = torch.linspace(-1, 1, 12).unflatten(0, (3, 4))
IDS = tokens(2, 4)
OPTIONS = {"low_rank": {"r": 2}, "scale_shift": {}}
OWN = {"low_rank": "lora_A", "scale_shift": "adapter_scale"}


class Net(nn.Module):
    """Two layers, of which the first is changed."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class Square(nn.Module):
    """What a weight is parametrised with."""

    def forward(self, x):
        return x * x


def as_buffer(layer):
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight * 2)


def with_scale(layer):
    layer.scale = nn.Parameter(torch.arange(1.0, 5.0))
    layer.register_forward_hook(lambda module, _, output: output * module.scale)


def wider(layer):
    with torch.no_grad():
        layer.weight = nn.Parameter(torch.cat([layer.weight, layer.weight * 2])[2:6])
    layer.note, layer.in_features = "wider", 4


def swapped(layer):
    torch.utils.swap_tensors(layer.weight, nn.Parameter(layer.weight.detach() * 3))


CHANGES = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "buffer": as_buffer,
    "added": with_scale,
    "replaced": wider,
    "swapped": swapped,
}
REFUSED = {
    "parametrised": lambda layer: parametrize.register_parametrization(layer, "weight", Square()),
    "weight_norm of today": parametrizations.weight_norm,
}


def recipe(operation, kind):
    adapter = {"operation": operation, "options": OPTIONS[operation]}
    if kind == "rules":
        return ModelRecipe.model_validate({"rules": [adapter]})
    return ModelRecipe.model_validate({"adapters": {"x": adapter, "y": adapter}, "active": "x"})


def edited_net(operation, first):
    """Return a model with adapters that show, and a plain copy of it."""
    model = Net().eval()
    plain = copy.deepcopy(model)
    edited = Session().plan_recipe(model, recipe(operation, first)).apply()
    with torch.no_grad():
        for parameter in edited.added_parameters():
            parameter.copy_(torch.randn(parameter.shape))
    if first != "rules":
        edited.set_active(first)
    return model, edited, plain


def after(edited, way):
    """Take the adapter out in one of several ways, and return what the base computes then."""
    model = edited.model
    with torch.no_grad():
        if way == "revert":
            edited.revert()
            return model(X)
        if way == "switch":
            edited.set_active("y")
        with edited.paused() if way == "paused" else edited.disabled():
            return model(X)


both_operations = pytest.mark.parametrize("operation", sorted(OPTIONS))
FIRST = {"one": "x", "several": {"x": 1.0, "y": 0.5}, "rules": "rules"}
WAYS = ["revert", "disabled", "paused", "switch"]
CASES = [(f, w) for f in FIRST for w in WAYS if f != "rules" or w in ("revert", "paused")]
in_every_state = pytest.mark.parametrize(("first", "way"), CASES)


@both_operations
@in_every_state
@pytest.mark.parametrize("change", CHANGES)
def test_the_base_has_what_was_done_to_its_layer(operation, first, way, change):
    model, edited, plain = edited_net(operation, FIRST[first])
    for layer in (plain.a, model.a):
        torch.manual_seed(1)
        CHANGES[change](layer)
    with torch.no_grad():
        model(X)

    actual = after(edited, way)

    assert torch.allclose(plain(X), actual, atol=1e-6)
    if way != "revert":
        edited.revert()
    assert torch.allclose(plain(X), model(X), atol=1e-6)
    assert list(plain.state_dict()) == list(model.state_dict())
    assert vars(plain.a).keys() == vars(model.a).keys()


@both_operations
@in_every_state
@pytest.mark.parametrize("change", [*REFUSED, "own"])
def test_what_the_base_cannot_have_is_refused_before_anything_changes(
    operation, first, way, change
):
    model, edited, _ = edited_net(operation, FIRST[first])
    name = "weight"
    if change == "own":
        name = OWN[operation] + ("_x" if first == "several" else "")
        prune.l1_unstructured(model.a, name, amount=0.5)
    else:
        REFUSED[change](model.a)
    before, modules = model(X), list(model.modules())
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    with pytest.raises(DriftError) as caught:
        after(edited, way)

    subject = "surgery" if first == "rules" else "variants"
    what = "is no longer a parameter" if change == "own" else "was parametrised"
    assert str(caught.value) == (
        f"Model under {subject} drifted at 'a': '{name}' {what}, which the original module cannot "
        "take over. Undo that first, for example with torch.nn.utils.prune.remove or "
        "torch.nn.utils.parametrize.remove_parametrizations."
    )
    assert caught.value.fqns == ("a",)
    assert all(old is new for old, new in zip(modules, model.modules(), strict=True))
    assert torch.equal(before, model(X))
    assert state.keys() == model.state_dict().keys()
    if change == "own":
        prune.remove(model.a, name)
    else:
        parametrize.remove_parametrizations(model.a, name)
    after(edited, way)


@both_operations
def test_a_layer_that_is_whole_again_leaves_nothing_behind_in_any_adapter(operation):
    """The weights that pruning computes stand in attributes, which would hide the parameter."""
    model, edited, plain = edited_net(operation, "x")
    prune.l1_unstructured(model.a, "weight", amount=0.5)
    model(X)
    edited.set_active("y")
    model(X)
    prune.remove(model.a, "weight")
    weight = torch.randn(4, 4)
    model.a.weight = plain.a.weight = nn.Parameter(weight)

    fresh = Session().plan_recipe(plain, recipe(operation, "x")).apply()
    for name in "xy":
        fresh.load_(name, edited.tensors(name))
        fresh.set_active(name)
        edited.set_active(name)
        assert torch.equal(plain(X), model(X))


@both_operations
def test_tensors_of_an_adapter_do_not_include_what_was_added_to_its_layer(operation):
    model, edited, _ = edited_net(operation, "x")
    keys = list(edited.tensors("x"))
    weight_norm(model.a)

    assert keys == list(edited.tensors("x"))
    prune.l1_unstructured(model.b, OWN[operation], amount=0.5)
    with pytest.raises(DriftError, match=f"has lost '{OWN[operation]}', which belongs to its"):
        edited.tensors("x")


@both_operations
def test_flags_are_given_back_to_parameters_that_took_the_place_of_others(operation):
    """As PyTorch does, `assign=True` keeps the flags of what was there, which was frozen by us."""
    model, edited, _ = edited_net(operation, "x")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    model.load_state_dict(state, assign=True)

    assert not model.a.weight.requires_grad
    with edited.paused():
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.a.weight.requires_grad
    edited.revert()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_flags_of_parameters_that_cannot_be_trained_are_left_alone():
    model, edited, _ = edited_net("low_rank", "x")
    model.a.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with torch.inference_mode():
        model.b.weight = nn.Parameter(torch.ones(4, 4), requires_grad=False)

    edited.revert()

    assert not model.a.weight.requires_grad
    assert not model.b.weight.requires_grad
    assert model.b.bias.requires_grad


@both_operations
def test_rules_follow_what_became_of_the_base_while_they_were_paused(operation):
    model, edited, plain = edited_net(operation, "rules")
    own = {key: tensor.double() for key, tensor in edited.tensors("rules").items()}
    with edited.paused():
        model.double()
        model.a.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.float64))

    plain.double().a.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
    fresh = Session().plan_recipe(plain, recipe(operation, "rules")).apply()
    fresh.load_("rules", own)
    assert torch.equal(plain(X.double()), model(X.double()))
    assert all(tensor.dtype is torch.float64 for tensor in edited.tensors("rules").values())


def test_other_adapters_have_the_weights_of_before_a_merge():
    """Also those that were put in the base while they were not in the model."""
    model, edited, plain = edited_net("low_rank", "x")
    weight = torch.randn(4, 4)
    model.a.weight, plain.a.weight = (nn.Parameter(weight.clone()) for _ in range(2))

    merge = merge_(edited)
    edited.set_active("y")

    fresh = Session().plan_recipe(plain, recipe("low_rank", "y")).apply()
    fresh.load_("y", edited.tensors("y"))
    fresh.set_active("y")
    assert torch.equal(plain(X), model(X))
    edited.set_active("x")
    merge.unmerge()
    edited.revert()
    assert torch.equal(weight, model.a.weight)


@pytest.mark.parametrize("name", ["adaption_prompt", "adaption_gate"])
@pytest.mark.parametrize("leave", ["set_adapter", "disable_adapter_layers", "unload"])
def test_a_pruned_prompt_does_not_leave_its_hook_to_the_base(name, leave):
    config = AdaptionPromptConfig(adapter_len=2, adapter_layers=1, gate="head")
    base = build()
    expected = base(IDS).logits
    model = AdaptionPromptModel(base, {"x": config, "y": config}, "x").eval()
    open_gates_(model.adapter_modules("x"))
    (fqn, attention) = next(iter(model.adapter_modules("x").items()))
    prune.l1_unstructured(attention, name, amount=0.5)
    before = model(IDS).logits

    with pytest.raises(DriftError, match=f"drifted at '{fqn}': '{name}' is no longer a parameter"):
        getattr(model, leave)(*(["y"] if leave == "set_adapter" else []))

    assert torch.equal(before, model(IDS).logits)
    prune.remove(attention, name)
    assert torch.equal(before, model(IDS).logits)
    model.unload()
    assert torch.equal(expected, base(IDS).logits)
