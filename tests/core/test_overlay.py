"""A module over its base: what both share, and what each has for itself."""

import copy
import functools
import pickle
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from surgery_core import ContractError, Overlay, make_overlay, replacement_device
from surgery_core.testing import assert_unchanged, snapshot

X = torch.linspace(-2, 2, 12).unflatten(0, (3, 4))
IN, OUT = 4, 5
copied_and_pickled = pytest.mark.parametrize(
    "way",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["copy", "pickle"],
)


class Louder(Overlay):
    """Its base's output, times a gain for each feature, times a factor."""

    overlay_prefix = "Louder"

    def forward(self, x):
        return self.factor * self.gain * super().forward(x)


class Moved(Overlay):
    """Its base's output, and a shift for each feature."""

    overlay_prefix = "Moved"

    def forward(self, x):
        return super().forward(x) + self.shift


class Leaving(nn.Linear):
    """A layer that leaves something behind when it is copied."""

    def __init__(self, *args):
        super().__init__(*args)
        self.calls = Counter(own=1)

    def __getstate__(self):
        return {**super().__getstate__(), "calls": Counter()}


def louder(base, factor=2.0):
    gain = nn.Parameter(torch.arange(1.0, OUT + 1, device=replacement_device(base)))
    return make_overlay(base, Louder, parameters={"gain": gain}, attributes={"factor": factor})


def moved(base):
    shift = nn.Parameter(torch.linspace(1, 2, OUT, device=replacement_device(base)))
    return make_overlay(base, Moved, parameters={"shift": shift}, attributes={})


def names_of(base):
    return [name for name, _ in base.named_parameters()]


def test_it_computes_with_the_bases_own_forward():
    base = nn.Linear(IN, OUT)

    new = louder(base)

    expected = 2.0 * torch.arange(1.0, OUT + 1) * base(X)
    assert torch.equal(expected, new(X))
    assert torch.equal(expected + torch.linspace(1, 2, OUT), moved(new)(X))


def test_it_is_of_the_bases_class_and_has_its_attributes():
    class Own(nn.Linear):
        """A class that a model brings."""

    base = Own(IN, OUT).eval()
    base.note = "kept"

    new = louder(base)

    assert isinstance(new, Own)
    assert isinstance(new, Louder)
    assert ("LouderOwn", __name__) == (type(new).__name__, type(new).__module__)
    assert (IN, OUT, "kept", False) == (
        new.in_features,
        new.out_features,
        new.note,
        new.training,
    )


def test_it_shares_everything_but_the_table_of_parameters():
    base = nn.BatchNorm1d(OUT)
    base.inner = nn.Linear(1, 1)
    before, table = snapshot(base), vars(base)["_parameters"]

    new = make_overlay(
        base, Louder, parameters={"gain": nn.Parameter(torch.ones(OUT))}, attributes={"factor": 1.0}
    )

    others = {name for name in vars(base) if name.startswith("_") and name != "_parameters"}
    assert {"_buffers", "_modules", "_forward_hooks", "_backward_hooks"} <= others
    assert all(vars(new)[name] is vars(base)[name] for name in others)
    assert new.weight is base.weight
    assert vars(base)["_parameters"] is table
    assert ["weight", "bias", "gain", "inner.weight", "inner.bias"] == names_of(new)
    assert_unchanged(before, base, subject="Making an overlay")


def test_a_hook_of_either_is_the_others():
    base = nn.Linear(IN, OUT)
    seen = []
    base.register_forward_hook(lambda module, _args, _output: seen.append(module))
    new = louder(base)
    handle = new.register_forward_pre_hook(lambda module, _args: seen.append(module))

    new(X)
    base(X)

    assert [new, new, base, base] == seen
    handle.remove()
    assert not base._forward_pre_hooks


def test_overlays_of_one_kind_and_base_class_have_one_class():
    one, other = louder(nn.Linear(IN, OUT)), louder(nn.Linear(2, OUT), factor=3.0)

    assert type(one) is type(other)
    assert type(one) is not type(moved(nn.Linear(IN, OUT)))
    assert type(one) is not type(louder(Leaving(IN, OUT)))
    assert type(moved(one)) is type(moved(other))


def test_compiled_code_is_used_again_for_another_overlay():
    """Their class is the same, and nothing else about them is looked at."""
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph

    function = torch.compile(lambda module, x: module(x), backend=backend, fullgraph=True)
    one, other = louder(nn.Linear(IN, OUT)), louder(nn.Linear(IN, OUT))

    found = function(one, X), function(other, X)

    assert torch.equal(one(X), found[0])
    assert torch.equal(other(X), found[1])
    assert len(compiled) == 1
    torch._dynamo.reset()


def test_a_compiled_base_is_not_called_in_its_place():
    base = nn.Linear(IN, OUT)
    base.compile(backend="eager")

    new = louder(base)

    assert "_compiled_call_impl" in vars(base)
    assert torch.equal(2.0 * new.gain * nn.functional.linear(X, base.weight, base.bias), new(X))
    torch._dynamo.reset()


def test_a_parameter_put_in_it_is_the_bases_too():
    base = nn.Linear(IN, OUT)
    bottom = louder(base)
    top = moved(bottom)
    weight = nn.Parameter(torch.zeros(OUT, IN))

    top.weight = weight
    top.bias = None

    assert weight is top.weight is bottom.weight is base.weight
    assert top.bias is bottom.bias is base.bias is None
    bias = nn.Parameter(torch.ones(OUT))
    bottom.register_parameter("bias", bias)
    assert bias is bottom.bias is base.bias


def test_a_state_that_is_assigned_reaches_the_base():
    base = nn.Linear(IN, OUT)
    new = moved(louder(base))
    state = {name: torch.full_like(value, 2.0) for name, value in new.state_dict().items()}

    new.load_state_dict(state, assign=True)

    assert new.weight is base.weight
    assert new.bias is base.bias
    assert (base.weight == 2.0).all()


def test_the_base_never_gets_a_parameter_that_was_added():
    base = nn.Linear(IN, OUT, bias=False)
    bottom = louder(base)
    top = moved(bottom)

    top.gain = nn.Parameter(torch.zeros(OUT))
    top.shift = nn.Parameter(torch.zeros(OUT))
    top.another = nn.Parameter(torch.zeros(1))
    top.double()

    assert ["weight"] == names_of(base)
    assert ["weight", "gain"] == names_of(bottom)
    assert ["weight", "gain", "shift", "another"] == names_of(top)
    assert top.gain is bottom.gain


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_base_goes_with_it_to_another_dtype(dtype):
    base = nn.BatchNorm1d(OUT)
    weight = base.weight
    new = moved(base)

    assert new.to(dtype) is new

    assert new.weight is base.weight is weight
    assert {dtype} == {found.dtype for found in (base.weight, base.running_mean, new.shift)}


@pytest.mark.parametrize("is_overwritten", [True, False])
def test_the_base_goes_with_it_to_the_meta_device_and_back(is_overwritten):
    """Parameters are new objects then; so are all where torch is told not to keep them."""
    base = nn.BatchNorm1d(OUT)
    bottom = moved(base)
    top = louder(bottom)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(is_overwritten)
    try:
        top.to("meta")
        assert all(tensor.is_meta for tensor in base.state_dict().values())
        top.to_empty(device="cpu")
        top.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)

    assert top.weight is bottom.weight is base.weight
    assert top.running_mean is base.running_mean
    assert not any(tensor.is_meta for tensor in base.state_dict().values())
    assert base.bias.dtype is bottom.shift.dtype is torch.float64
    assert top.shift is bottom.shift


@copied_and_pickled
@pytest.mark.parametrize("make", [louder, lambda base: moved(louder(base))], ids=["one", "stacked"])
def test_copies_compute_the_same_and_are_their_own(make, way):
    new = make(nn.Linear(IN, OUT))
    expected = new(X)

    copied = way(new)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.zero_()

    assert torch.equal(expected, copied(X))
    assert not new(X).any()
    assert type(copied) is type(new)
    modules, copies = list(new.overlay_stack()), list(copied.overlay_stack())
    assert [type(module) for module in modules] == [type(module) for module in copies]
    assert all(each.weight is copied.weight for each in copies)
    assert copies[-1]._forward_hooks is copied._forward_hooks
    assert copies[-1]._buffers is copied._buffers
    copied.weight = nn.Parameter(torch.zeros(OUT, IN))
    assert copies[-1].weight is copied.weight


@copied_and_pickled
def test_a_copy_leaves_behind_what_the_bases_class_does(way):
    new = louder(Leaving(IN, OUT))

    copied = way(new)

    assert Counter(own=1) == new.calls
    assert Counter() == copied.calls


@copied_and_pickled
def test_a_copy_of_a_compiled_one_is_not_compiled(way):
    new = louder(nn.Linear(IN, OUT))
    new.compile(backend="eager")

    copied = way(new)

    assert "_compiled_call_impl" not in vars(copied)
    assert torch.equal(new(X), copied(X))
    torch._dynamo.reset()


def test_a_parametrised_base_keeps_its_parametrisation():
    base = parametrizations.weight_norm(nn.Linear(IN, OUT))

    new = louder(base)

    assert torch.equal(2.0 * new.gain * base(X), new(X))
    with torch.no_grad():
        base.parametrizations.weight.original0.zero_()
    assert torch.equal(2.0 * new.gain * base.bias.expand(3, OUT), new(X))


def test_the_stack_ends_with_the_base():
    base = nn.Linear(IN, OUT)
    bottom = louder(base)
    top = moved(bottom)

    assert [top, bottom, base] == list(top.overlay_stack())


def test_the_same_kind_twice_is_refused():
    """Also where another is between them."""
    with pytest.raises(ContractError) as caught:
        louder(moved(louder(nn.Linear(IN, OUT))))

    assert str(caught.value) == (
        "Louder cannot stand for MovedLouderLinear: expected a module that is no Louder yet, got "
        "one that is. Revert it first."
    )


def test_names_that_the_base_has_are_refused():
    """Of parameters and of anything else."""
    base = nn.Linear(IN, OUT)
    names = ("weight", "gain", "in_features")

    with pytest.raises(ContractError) as caught:
        make_overlay(
            base, Louder, parameters={n: nn.Parameter(torch.ones(1)) for n in names}, attributes={}
        )

    assert str(caught.value) == (
        "Louder cannot stand for Linear: expected a module without 'weight', 'in_features', got "
        "one that has them. Use other names."
    )


def test_a_patched_forward_is_refused():
    base = nn.Linear(IN, OUT)
    base.forward = functools.partial(type(base).forward, base)

    with pytest.raises(ContractError) as caught:
        louder(base)

    assert str(caught.value) == (
        "Louder cannot stand for Linear: expected its class's own forward, got a patched one, which "
        "would be called in place of the replacement's. Remove what patched it."
    )


class _Hook:
    """What accelerate leaves at a module whose weights are elsewhere between calls."""

    offload, place_submodules, execution_device = True, False, "cpu"


def test_new_tensors_go_where_the_base_is():
    """Parameters say so before buffers; its children's count too."""
    packed = nn.Module()
    packed.inner = nn.Module()
    packed.inner.register_buffer("codes", torch.zeros(1, device="meta"))
    mixed = nn.BatchNorm1d(2)
    mixed.weight = nn.Parameter(torch.zeros(2, device="meta"))

    assert torch.device("cpu") == replacement_device(nn.Linear(1, 1))
    assert torch.device("meta") == replacement_device(nn.Linear(1, 1, device="meta"))
    assert torch.device("meta") == replacement_device(packed)
    assert torch.device("meta") == replacement_device(mixed)
    assert replacement_device(nn.Tanh()) is None


def test_new_tensors_go_where_a_base_computes_whose_weights_come_and_go():
    base = nn.Linear(1, 1, device="meta")
    base._hf_hook = _Hook()

    assert torch.device("cpu") == replacement_device(base)
