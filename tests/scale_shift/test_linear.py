"""`ScaledLinear`: what it computes, and that nothing around a linear layer stops working."""

import copy

import accelerate
import pytest
import torch
from surgery_scale_shift import ScaledLinear, ScaleShiftOptions, plugin
from surgery_scale_shift.linear import scale_linear
from torch import nn

from surgery_core import ContractError, ModelRecipe, Rule, Session, verify
from surgery_core.testing import assert_unchanged, snapshot

FORMS = ("paper", "chat65b")
every_form = pytest.mark.parametrize("form", FORMS)
X = torch.linspace(-2, 2, 12).unflatten(0, (3, 4))
IN, OUT = 4, 5


def session():
    return Session([plugin], discover=False)


def net():
    return nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN, bias=False))


def train_(module):
    """Give every scale and bias values that differ from feature to feature."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for found in module.modules():
            if isinstance(found, ScaledLinear):
                scale, bias = found.adapter_scale, found.adapter_bias
                scale.copy_(0.5 + torch.rand(scale.shape, generator=generator))
                bias.copy_(torch.randn(bias.shape, generator=generator))


def reference(base, x, form, scale, bias):
    """Compute a layer in float64, one output value after another, as the formulas say."""
    weight, x = base.weight.double().tolist(), x.double().tolist()
    own = base.bias.double().tolist() if base.bias is not None else [0.0] * len(weight)
    scale, bias = scale.double().tolist(), bias.double().tolist()
    rows = []
    for row in x:
        values = []
        for o, weights in enumerate(weight):
            if form == "paper":
                wx = sum(w * value for w, value in zip(weights, row, strict=True)) + own[o]
                values.append(scale[o] * (wx + bias[o]))
            else:
                scaled = [s * value for s, value in zip(scale, row, strict=True)]
                wx = sum(w * value for w, value in zip(weights, scaled, strict=True)) + own[o]
                values.append(wx + bias[o])
        rows.append(values)
    return torch.tensor(rows, dtype=torch.float64)


def apply(model, form="paper", **options):
    rule = Rule(operation="scale_shift", options={"form": form, **options})
    return session().plan(model, [rule]).apply()


@every_form
@pytest.mark.parametrize("bias", [True, False])
def test_trained_values_give_what_the_formula_says(form, bias):
    """Against sums in float64; the layers are not square, so that no axis is mistaken."""
    base = nn.Linear(IN, OUT, bias=bias)
    scaled = scale_linear(base, ScaleShiftOptions(form=form))
    train_(scaled)

    expected = reference(base, X, form, scaled.adapter_scale, scaled.adapter_bias)

    torch.testing.assert_close(scaled(X).double(), expected, rtol=1e-5, atol=1e-6)
    assert 0.1 < (scaled(X) - base(X)).abs().max()


@every_form
def test_gradients_are_those_of_the_formula(form):
    base = nn.Linear(IN, OUT).double().requires_grad_(requires_grad=False)
    scaled = scale_linear(base, ScaleShiftOptions(form=form))
    train_(scaled)
    x = X.double().requires_grad_()

    def function(x, scale, bias):
        return torch.func.functional_call(
            scaled, {"adapter_scale": scale, "adapter_bias": bias}, (x,)
        )

    assert torch.autograd.gradcheck(function, (x, scaled.adapter_scale, scaled.adapter_bias))


def test_litgpt_is_another_name_of_the_papers_form():
    base = nn.Linear(IN, OUT)

    found = [
        apply(nn.Sequential(copy.deepcopy(base)), form).model[0] for form in ("litgpt", "paper")
    ]

    for scaled in found:
        train_(scaled)
    assert torch.equal(found[0](X), found[1](X))
    assert found[0].form == found[1].form


@every_form
def test_base_names_and_parameters_stay(form):
    model = net()
    weight, before = model[0].weight, list(model.state_dict())

    surgery = apply(model, form)

    assert model[0].weight is weight
    assert isinstance(model[0], nn.Linear)
    assert (IN, OUT) == (model[0].in_features, model[0].out_features)
    added = [key for key in model.state_dict() if key not in before]
    assert [f"{n}.adapter_{what}" for n in (0, 2) for what in ("scale", "bias")] == added
    assert ((IN,) if form == "chat65b" else (OUT,)) == tuple(model[0].adapter_scale.shape)
    assert (OUT,) == tuple(model[0].adapter_bias.shape)
    surgery.revert()
    assert list(model.state_dict()) == before


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("own", [None, "float32", "bfloat16", "float64"])
def test_untrained_is_exact_in_every_dtype(form, dtype, own):
    """Also where the parameters are wider, or narrower, than the layer."""
    model = net().to(dtype)
    expected = model(X.to(dtype))

    apply(model, form, dtype=own)

    assert torch.equal(expected, model(X.to(dtype)))
    assert expected.dtype is model(X.to(dtype)).dtype
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert model[0].adapter_scale.dtype is (getattr(torch, own) if own else wide)


@every_form
def test_under_autocast_it_is_exact_and_trains(form):
    model = net()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(X)
    apply(model, form)

    with torch.autocast("cpu", torch.bfloat16):
        actual = model(X)
        actual.float().sum().backward()

    assert torch.equal(expected, actual)
    assert actual.dtype is torch.bfloat16
    assert model[0].adapter_scale.grad.abs().sum() > 0


@every_form
def test_zeros_keep_their_sign(form):
    """A bias of plus zero would make plus zeros of minus zeros."""

    class Minus(nn.Linear):
        def forward(self, x):
            return -0.0 * super().forward(x).abs()

    base = Minus(IN, OUT)
    scaled = scale_linear(base, ScaleShiftOptions(form=form))

    assert torch.signbit(base(X)).all()
    assert torch.signbit(scaled(X)).all()
    assert torch.equal(scaled.adapter_bias, torch.zeros(OUT))


@every_form
def test_compiled_it_computes_the_same(form):
    model = net()
    apply(model, form)
    train_(model)
    expected = model(X)

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    torch.testing.assert_close(compiled(X), expected, rtol=0, atol=0)
    torch._dynamo.reset()


def test_training_reaches_the_added_parameters_alone():
    model = net().requires_grad_(requires_grad=False)
    apply(model)

    model(X).square().sum().backward()

    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name for name, _ in model.named_parameters() if "adapter" in name} == with_gradient


def test_a_subclass_keeps_its_own_forward():
    """It is run, whatever it does to the weight, as quantised layers do."""

    class Packed(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight.round(), self.bias)

    base = Packed(IN, OUT)
    model = nn.Sequential(base)
    with torch.no_grad():
        base.weight.mul_(5)
    expected = base(X)

    apply(model)

    assert isinstance(model[0], Packed)
    assert torch.equal(expected, model(X))
    train_(model)
    own = model[0].adapter_scale * (expected + model[0].adapter_bias)
    assert torch.equal(own, model(X))


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_layer_is_run_as_it_is():
    """Of bitsandbytes, in four bits."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32)
    model = nn.Sequential(layer).to("cpu")
    x = torch.randn(3, 64)
    expected = model(x)

    surgery = apply(model)

    assert torch.equal(expected, model(x))
    assert model[0].weight is layer.weight
    train_(model)
    own = model[0].adapter_scale * (expected + model[0].adapter_bias)
    assert torch.equal(own, model(x))
    assert surgery.revert()[0] is layer


@every_form
def test_inside_a_dispatched_model_arguments_are_still_moved(form):
    """Accelerate's forward is around the replacement's, and the base has its own afterwards."""
    plain = net()
    model = accelerate.dispatch_model(copy.deepcopy(plain), {"": "cpu"}, force_hooks=True)
    assert "forward" in vars(model[0])
    before, expected = snapshot(model), plain(X)

    surgery = apply(model, form)
    assert torch.equal(expected, model(X))
    apply(plain, form)
    train_(model), train_(plain)
    assert torch.equal(plain(X), model(X))

    surgery.revert()
    assert_unchanged(before, model, subject="Apply and revert")
    assert torch.equal(expected, model(X))


def test_an_offloaded_layer_is_refused():
    model = accelerate.cpu_offload(net(), torch.device("cpu"))

    with pytest.raises(ContractError) as caught:
        apply(model)

    assert str(caught.value) == (
        "Operation 'scale_shift' cannot work at '0': expected weights that stay, got some that "
        "accelerate loads with each call. Give the module a device in the device map."
    )


def test_a_patched_forward_is_refused():
    """It would be called in place of the replacement's."""
    model = net()
    model[2].forward = lambda x: x

    with pytest.raises(
        ContractError, match=r"at '2': expected its class's own forward, got a patched one"
    ):
        apply(model)


def test_a_lazy_layer_is_refused():
    with pytest.raises(ContractError, match="expected a layer with shapes, got a lazy one"):
        apply(nn.Sequential(nn.LazyLinear(3)))


@pytest.mark.parametrize(
    ("model", "reader"),
    [
        (nn.MultiheadAttention(4, 2), "MultiheadAttention"),
        (nn.TransformerEncoderLayer(4, 2, 4).linear1, None),
        (nn.Sequential(nn.TransformerEncoderLayer(4, 2, 4)), "MultiheadAttention"),
    ],
    ids=["attention", "alone", "encoder"],
)
def test_a_layer_that_is_not_called_is_refused(model, reader):
    """Its weight is read by its owner, so that what is added would have no effect."""
    if reader is None:
        assert isinstance(apply(model).model, ScaledLinear)
        return
    with pytest.raises(
        ContractError, match=f"expected a layer that is called, got one whose weight {reader} reads"
    ):
        apply(model)


def test_a_feed_forward_of_torchs_fast_path_is_refused():
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True))
    rule = Rule(operation="scale_shift", select="0.linear1")

    with pytest.raises(ContractError, match="whose weight TransformerEncoderLayer reads"):
        session().plan(model, [rule])


def test_a_second_scale_is_refused():
    model = net()
    apply(model)

    with pytest.raises(ContractError, match="expected a layer without 'adapter_scale'"):
        apply(model)


@every_form
def test_it_passes_the_checks_of_the_core(form):
    """Exported too."""
    rules = [{"operation": "scale_shift", "options": {"form": form}}]
    recipe = ModelRecipe.model_validate({"rules": rules})
    edited = session().plan_recipe(net(), recipe).apply()
    train_(edited.model)
    edited.loaded.add("rules")
    tiers = ("structure", "identity", "revert", "gradients", "export")

    outcome = verify(edited, (X,), tiers=tiers)

    assert outcome.is_ok, outcome.render()
