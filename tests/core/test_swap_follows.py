"""Modules outside the model keep up with what happens to the model: dtype, device and mode."""

import pytest
import torch
from core.toys import Gated, Net, Shifted, example, session
from core.variants import gates, plan
from torch import nn

from surgery_core import Rule, SwapState

OPERATIONS = ["gate", "shift", "fresh"]


class Pair(nn.Module):
    """Model and swap state, registered side by side."""

    def __init__(self, model, swap):
        super().__init__()
        self.model = model
        self.swap = swap


def two_variants(operation):
    """Return a model and variants `a` and `b` over some modules in common."""
    model = Net().eval()
    swap = SwapState(model)
    for name, pattern in {"a": "layers.{..1}.up", "b": "layers.{1..}.up"}.items():
        rule = Rule(operation=operation, select=pattern)
        swap.add(name, session().plan(model, [rule], beneath=swap))
    return model, swap


def dtypes(module):
    return {tensor.dtype for tensor in module.state_dict().values() if tensor.is_floating_point()}


def check_all(model, swap, dtype):
    """Check that every variant, and the base, computes in a dtype."""
    for step in (lambda: swap.set("a"), lambda: swap.set("b"), swap.disable, swap.enable):
        step()
        assert dtypes(model) == {dtype}
        assert model(example(dtype=dtype)).dtype is dtype


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("start", [None, "a", "b"])
def test_variants_follow_when_the_base_alone_is_moved(operation, start):
    model, swap = two_variants(operation)
    if start is not None:
        swap.set(start)

    model.double()

    check_all(model, swap, torch.float64)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("start", [None, "a", "b"])
def test_variants_follow_when_the_state_is_moved_too(operation, start):
    model, swap = two_variants(operation)
    if start is not None:
        swap.set(start)

    Pair(model, swap).double()

    for name in swap.stored:
        own = [m for m in swap.variant(name).values() if not isinstance(m, Gated)]
        assert all(dtypes(m) == {torch.float64} for m in own if not isinstance(m, Shifted))
    check_all(model, swap, torch.float64)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_variants_follow_while_disabled_and_back(operation):
    model, swap = two_variants(operation)
    swap.set("a")
    swap.disable()

    model.half()
    swap.set("b")
    swap.enable()
    assert dtypes(model) == {torch.float16}
    model.float()

    check_all(model, swap, torch.float32)


def test_stored_variants_follow_at_once_with_the_state():
    model, swap = two_variants("gate")

    Pair(model, swap).half()

    for name in ("a", "b"):
        assert all(m.gate.dtype is torch.float16 for m in swap.variant(name).values())


def test_variants_follow_to_another_device():
    model, swap = two_variants("fresh")
    swap.set("a")

    model.to("meta")
    swap.set("b")

    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_move_of_device_does_not_impose_a_dtype():
    """A variant may be kept in a wider dtype than the base."""
    model, swap = two_variants("gate")
    for module in swap.variant("a").values():
        module.gate.data = module.gate.data.double()

    model.to("meta")
    swap.set("a")

    assert model.layers[0].up.gate.device.type == "meta"
    assert model.layers[0].up.gate.dtype is torch.float64


def test_tensors_that_are_not_floating_keep_their_dtype():
    model, swap = two_variants("gate")
    module = swap.variant("a")["layers.0.up"]
    module.register_buffer("count", torch.ones(1, dtype=torch.int64))

    model.half()
    swap.set("a")

    assert module.count.dtype is torch.int64
    assert module.gate.dtype is torch.float16


def test_a_variant_of_a_module_without_parameters_has_nothing_to_follow():
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
    swap = SwapState(model)
    rule = Rule(operation="gate", select="0", options={"anything": True})
    swap.add("a", session().plan(model, [rule]))

    model.half()
    swap.set("a")

    assert model[0].gate.dtype is torch.float32


def test_originals_with_parameters_of_integers_are_no_anchor():
    model = nn.Sequential(nn.ReLU())
    model[0].count = nn.Parameter(torch.ones(1, dtype=torch.int64), requires_grad=False)
    swap = SwapState(model)
    rule = Rule(operation="gate", select="0", options={"anything": True})
    swap.add("a", session().plan(model, [rule]))

    model.half()
    swap.set("a")

    assert isinstance(model[0], Gated)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("mode", [True, False])
def test_a_mode_set_while_disabled_reaches_the_variant(operation, mode):
    model, swap = two_variants(operation)
    model.train(not mode)
    swap.set("a")
    swap.disable()

    model.train(mode)
    swap.enable()

    assert {module.training for module in model.modules()} == {mode}
    swap.set("b")
    assert {module.training for module in model.modules()} == {mode}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("mode", [True, False])
def test_a_mode_set_while_active_reaches_the_base(operation, mode):
    model, swap = two_variants(operation)
    model.train(not mode)
    swap.set("a")

    model.train(mode)
    swap.disable()

    assert {module.training for module in model.modules()} == {mode}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_hooks_on_the_base_fire_under_every_variant(operation):
    model, swap = two_variants(operation)
    calls = []
    handle = model.layers[1].up.register_forward_hook(lambda *_: calls.append(1))

    for name in ("a", "b", "a"):
        swap.set(name)
        model(example())
    assert len(calls) == 3
    handle.remove()
    model(example())
    swap.disable()
    model(example())

    assert len(calls) == 3


class Hollow(nn.Module):
    """A module without parameters of its own, and with a child that is None."""

    def __init__(self):
        super().__init__()
        self.register_module("extra", None)
        self.inner = nn.Linear(2, 2)


def test_a_child_that_is_none_does_not_hide_where_a_module_is():
    model = nn.Sequential(Hollow())
    swap = SwapState(model)
    swap.add("a", plan(swap, model, gates("0", anything=True)))

    model.double()
    swap.set("a")

    assert model[0].gate.dtype is torch.float64
