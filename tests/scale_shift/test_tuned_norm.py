"""`tuned_norm`: which modules it takes, and copies that are wider than their base."""

import copy
import pickle

import accelerate
import pytest
import torch
from surgery_scale_shift import WideNorm, plugin
from torch import nn

from surgery_core import ContractError, ModelRecipe, NoMatchError, Rule, Session
from surgery_core.testing import assert_unchanged, snapshot

X = torch.linspace(-2, 2, 24).unflatten(0, (4, 6))
NARROW = (torch.bfloat16, torch.float16)


class Scale(nn.Module):
    """A norm by another name, in whose place bits get lost unless the dtype is right."""

    def __init__(self, size=6):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.3, 1.7, size))

    def forward(self, x):
        return self.gain * (x * torch.rsqrt(x.float().square().mean(-1, keepdim=True))).to(x.dtype)


class RootNorm(Scale):
    """The same by a name of norms."""


class PreNorm(nn.Module):
    """Something that holds more than a norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.body = nn.Linear(6, 6)

    def forward(self, x):
        return self.body(self.norm(x))


def session():
    return Session([plugin], discover=False)


def net():
    model = nn.Sequential(
        PreNorm(), RootNorm(), Scale(), nn.LayerNorm(6, elementwise_affine=False), nn.RMSNorm(6)
    )
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape) + 0.01 * number)
    return model


def apply(model, select=None, **options):
    rule = Rule(operation="tuned_norm", select=select, options=options)
    return session().plan(model, [rule]).apply()


def claimed(surgery):
    return [edit.fqn for edit in surgery.plan.document.edits]


def test_norms_are_found_by_the_name_of_their_class():
    """Those without children and with something to train."""
    assert ["0.norm", "1", "4"] == claimed(apply(net()))


def test_a_rule_may_choose_any_module():
    assert ["2"] == claimed(apply(net(), "2", modules="selected"))


@pytest.mark.parametrize(
    ("select", "actual"),
    [("0", "PreNorm with no parameters"), ("3", "LayerNorm with no parameters")],
)
def test_a_module_without_parameters_of_its_own_is_refused(select, actual):
    with pytest.raises(ContractError) as caught:
        apply(net(), select, modules="selected")

    assert str(caught.value) == (
        f"Operation 'tuned_norm' cannot work at {select!r}: expected a module with parameters and "
        f"without children, got {actual}. Narrow the selector to norms."
    )


def test_a_module_with_children_is_refused():
    model = net()
    model[0].gain = nn.Parameter(torch.ones(6))

    with pytest.raises(ContractError, match="got PreNorm with children"):
        apply(model, "0", modules="selected")


def test_parameters_of_several_dtypes_are_refused():
    model = nn.Sequential(nn.LayerNorm(6))
    model[0].bias.data = model[0].bias.data.double()

    with pytest.raises(ContractError, match="expected parameters of one dtype, got several"):
        apply(model)


def test_parameters_that_are_no_floats_are_refused():
    model = nn.Sequential(nn.Embedding(3, 4))
    weight = torch.ones(3, 4, dtype=torch.int64)
    model[0].weight = nn.Parameter(weight, requires_grad=False)

    with pytest.raises(ContractError, match=r"floating-point parameters, got torch\.int64"):
        apply(model, "0", modules="selected")


def test_a_model_without_norms_is_refused():
    with pytest.raises(NoMatchError, match="found no norm among 2 submodules"):
        apply(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32, torch.float64])
@pytest.mark.parametrize("own", [None, "float32", "bfloat16", "float64"])
def test_untrained_is_exact_in_every_dtype(dtype, own):
    """Unless the copies are kept in a narrower dtype, in which the values are others."""
    model = net().to(dtype)
    expected = model(X.to(dtype))

    apply(model, dtype=own)
    actual = model(X.to(dtype))

    is_lossy = own == "bfloat16" and dtype is not torch.bfloat16
    assert is_lossy is not torch.equal(expected, actual)
    assert expected.dtype is actual.dtype


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_norms_are_trained_in_float32(dtype):
    """A step too small for the base's dtype is kept, and counts when steps have added up."""
    model = nn.Sequential(RootNorm()).to(dtype)
    before = model[0].gain.clone()
    apply(model)
    expected = model(X.to(dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    stepped = []

    for _ in range(200):
        optimizer.zero_grad()
        model(X.to(dtype)).float().sum().backward()
        for parameter in model.parameters():
            parameter.grad.sign_()
        optimizer.step()
        stepped.append(not torch.equal(expected, model(X.to(dtype))))

    (parameter,) = model.parameters()
    assert parameter.dtype is torch.float32
    assert 0.01 < (parameter - before.float()).abs().min()
    assert not stepped[0]
    assert stepped[-1]
    assert model[0].gain.dtype is dtype


def test_trained_values_give_what_the_module_computes_with_them():
    model = net()
    surgery = apply(model)
    values = torch.linspace(-1, 2, 6)

    with torch.no_grad():
        model[1].gain.copy_(values)
        model[0].norm.bias.copy_(values)

    base = surgery.plan.model
    expected_norm = nn.functional.layer_norm(X, (6,), model[0].norm.weight, values)
    assert torch.equal(expected_norm, model[0].norm(X))
    assert torch.equal(values * (X * torch.rsqrt(X.square().mean(-1, keepdim=True))), model[1](X))
    assert base is surgery.revert()
    assert not torch.equal(values, model[1].gain)


def test_gradients_of_the_base_are_not_the_copys():
    model = nn.Sequential(nn.LayerNorm(6))
    model(X).square().sum().backward()

    surgery = apply(model)

    assert model[0].weight.grad is None
    assert surgery.revert()[0].weight.grad is not None


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_compute_the_same_and_are_their_own(way):
    model = nn.Sequential(RootNorm()).bfloat16()
    apply(model)
    with torch.no_grad():
        next(model.parameters()).mul_(1.7)
    expected = model(X.bfloat16())

    copied = way(model)
    with torch.no_grad():
        next(model.parameters()).zero_()

    assert torch.equal(expected, copied(X.bfloat16()))
    assert isinstance(copied[0], WideNorm)


def test_compiled_it_computes_the_same():
    model = nn.Sequential(RootNorm(), nn.LayerNorm(6)).bfloat16()
    apply(model)
    expected = model(X.bfloat16())

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    assert torch.equal(expected, compiled(X.bfloat16()))
    torch._dynamo.reset()


def test_a_wide_copy_computes_in_the_dtype_the_model_gets():
    model = nn.Sequential(RootNorm()).bfloat16()
    surgery = apply(model)

    model.to(torch.float64)

    assert model(X.double()).dtype is torch.float64
    assert model[0].gain.dtype is torch.float64
    model.to(torch.float16)
    assert model[0].gain.dtype is torch.float16
    state = {"0.gain": torch.ones(6, dtype=torch.float16)}
    model.load_state_dict(state, assign=True)
    assert torch.equal(model[0].gain, state["0.gain"])
    assert surgery.revert()[0].gain.dtype is torch.bfloat16


def test_running_statistics_are_the_copys_own():
    model = nn.Sequential(nn.BatchNorm1d(6)).train()
    before = snapshot(model)
    surgery = apply(model)

    model(X)

    assert 1 == model[0].num_batches_tracked
    surgery.revert()
    assert_unchanged(before, model, subject="Apply, training and revert")


def test_a_record_keeps_what_was_trained(tmp_path):
    def base():
        torch.manual_seed(4)
        return net().bfloat16()

    recipe = ModelRecipe.model_validate({"rules": [{"operation": "tuned_norm"}]})
    edited = session().plan_recipe(base(), recipe).apply()
    with torch.no_grad():
        for parameter in edited.added_parameters():
            parameter.add_(torch.randn(parameter.shape))
    expected = edited.model(X.bfloat16())

    session().save(edited, tmp_path)
    again = session().load(base(), tmp_path, base_check="error")

    assert torch.equal(expected, again.model(X.bfloat16()))
    tensors = again.tensors("rules")
    assert {"0.norm.weight", "0.norm.bias", "1.gain", "4.weight"} == tensors.keys()
    assert {torch.float32} == {tensor.dtype for tensor in tensors.values()}


def test_what_is_kept_wide_is_in_the_plan_and_follows_to_a_base_as_wide(tmp_path):
    """There the copies are of the base's own dtype, and need no mention."""
    recipe = ModelRecipe.model_validate({"rules": [{"operation": "tuned_norm"}]})
    narrow, wide = net().bfloat16(), net()
    edited = session().plan_recipe(narrow, recipe).apply()
    session().save(edited, tmp_path)

    again = session().load(wide, tmp_path, on_other_model="rematch")

    def kept(found):
        edits = found.plan.document.documents["rules"].edits
        return {f"{edit.fqn}.{s.name} {s.dtype}" for edit in edits for s in edit.retyped}

    expected = edited.tensors("rules")
    assert {f"{key} float32" for key in expected} == kept(edited)
    assert set() == kept(again)
    assert all(torch.equal(expected[key], own) for key, own in again.tensors("rules").items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inside_a_dispatched_model_arguments_are_still_moved(dtype):
    plain = nn.Sequential(RootNorm(), nn.LayerNorm(6)).to(dtype)
    model = accelerate.dispatch_model(copy.deepcopy(plain), {"": "cpu"}, force_hooks=True)
    before, expected = snapshot(model), plain(X.to(dtype))

    surgery = apply(model)

    assert torch.equal(expected, model(X.to(dtype)))
    with torch.no_grad():
        next(model[0].parameters()).fill_(3.0)
    assert not torch.equal(expected, model(X.to(dtype)))
    surgery.revert()
    assert_unchanged(before, model, subject="Apply and revert")
    assert torch.equal(expected, model(X.to(dtype)))


def test_a_patched_forward_is_refused():
    model = net()
    model[1].forward = lambda x: x

    with pytest.raises(
        ContractError, match=r"'tuned_norm' cannot work at '1': .* got a patched one"
    ):
        apply(model)
