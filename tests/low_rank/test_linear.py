"""`LowRankLinear`: what it computes, and that nothing around a linear layer stops working."""

import copy
import math
from types import SimpleNamespace

import accelerate
import pytest
import torch
from surgery_low_rank import LowRankLinear, LowRankOptions, plugin
from surgery_low_rank.linear import low_rank_linear
from torch import nn

from surgery_core import (
    ContractError,
    DriftError,
    ModelRecipe,
    Overlay,
    Rule,
    Session,
    Shareable,
    make_overlay,
    verify,
)
from surgery_core.testing import assert_unchanged, snapshot

X = torch.linspace(-2, 2, 12).unflatten(0, (3, 4))
IN, OUT = 4, 5


def session():
    return Session([plugin], discover=False)


def net():
    return nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN, bias=False))


def train_(module, seed=1):
    """Give both matrices of every layer values of their own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for found in module.modules():
            if isinstance(found, LowRankLinear):
                for matrix in (found.lora_A, found.lora_B):
                    matrix.copy_(torch.randn(matrix.shape, generator=generator))


def reference(base, x, a, b, scaling):
    """Compute a layer in float64, one output value after another, as the formula says."""
    weight, x, a, b = (t.double().tolist() for t in (base.weight, x, a, b))
    own = base.bias.double().tolist() if base.bias is not None else [0.0] * len(weight)
    rows = []
    for row in x:
        narrow = [sum(w * value for w, value in zip(ws, row, strict=True)) for ws in a]
        rows.append(
            [
                sum(w * value for w, value in zip(weights, row, strict=True))
                + own[o]
                + scaling * sum(w * value for w, value in zip(b[o], narrow, strict=True))
                for o, weights in enumerate(weight)
            ]
        )
    return torch.tensor(rows, dtype=torch.float64)


def apply(model, select=None, **options):
    rule = Rule(operation="low_rank", select=select, options={"r": 2, **options})
    return session().plan(model, [rule]).apply()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({"r": 2, "lora_alpha": 3}, 1.5),
        ({"r": 3, "lora_alpha": 0.5, "use_rslora": True}, 0.5 / math.sqrt(3)),
        ({"r": 1, "lora_alpha": -2}, -2.0),
    ],
)
def test_trained_values_give_what_the_formula_says(bias, options, scaling):
    """Against sums in float64; neither layers nor matrices are square, so no axis is mistaken."""
    base = nn.Linear(IN, OUT, bias=bias)
    adapted = low_rank_linear(base, LowRankOptions(**options))
    train_(adapted)

    expected = reference(base, X, adapted.lora_A, adapted.lora_B, scaling)

    torch.testing.assert_close(adapted(X).double(), expected, rtol=1e-5, atol=1e-5)
    assert 0.1 < (adapted(X) - base(X)).abs().max()


def test_gradients_are_those_of_the_formula():
    base = nn.Linear(IN, OUT).double().requires_grad_(requires_grad=False)
    adapted = low_rank_linear(base, LowRankOptions(r=2, lora_alpha=3))
    train_(adapted)
    x = X.double().requires_grad_()

    def function(x, a, b):
        return torch.func.functional_call(adapted, {"lora_A": a, "lora_B": b}, (x,))

    assert torch.autograd.gradcheck(function, (x, adapted.lora_A, adapted.lora_B))


def test_values_begin_as_in_the_paper():
    """`B` is zero; `A` is uniform in the interval that Kaiming's formula gives with a of sqrt(5)."""
    adapted = low_rank_linear(nn.Linear(100, 7), LowRankOptions(r=50))

    assert torch.equal(adapted.lora_B, torch.zeros(7, 50))
    bound = 1 / math.sqrt(100)
    assert 0.99 * bound < adapted.lora_A.abs().max() <= bound
    assert adapted.lora_A.mean().abs() < 0.02 * bound
    assert 0.9 * bound / math.sqrt(3) < adapted.lora_A.std() < 1.1 * bound / math.sqrt(3)


def test_at_first_only_the_second_matrix_gets_gradients():
    adapted = low_rank_linear(nn.Linear(IN, OUT), LowRankOptions(r=2))

    adapted(X).square().sum().backward()

    assert not adapted.lora_A.grad.any()
    assert 0 < adapted.lora_B.grad.abs().sum()


def test_base_names_and_parameters_stay():
    model = net()
    weight, before = model[0].weight, list(model.state_dict())

    surgery = apply(model)

    assert model[0].weight is weight
    assert isinstance(model[0], nn.Linear)
    assert (IN, OUT) == (model[0].in_features, model[0].out_features)
    added = [key for key in model.state_dict() if key not in before]
    assert ["0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"] == added
    assert ((2, IN), (OUT, 2)) == (tuple(model[0].lora_A.shape), tuple(model[0].lora_B.shape))
    surgery.revert()
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("own", [None, "float32", "bfloat16", "float64"])
def test_untrained_is_exact_in_every_dtype(dtype, own):
    """Also where the matrices are wider, or narrower, than the layer."""
    model = net().to(dtype)
    expected = model(X.to(dtype))

    apply(model, dtype=own)

    assert torch.equal(expected, model(X.to(dtype)))
    assert expected.dtype is model(X.to(dtype)).dtype
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert model[0].lora_A.dtype is (getattr(torch, own) if own else wide)


def test_a_wide_term_is_rounded_once():
    """In bfloat16 the layer and its term are added before they are rounded."""
    base = nn.Linear(IN, OUT).bfloat16()
    adapted = low_rank_linear(base, LowRankOptions(r=2))
    train_(adapted)
    x = X.bfloat16()

    term = x.float() @ adapted.lora_A.T @ adapted.lora_B.T * 4

    assert torch.equal((base(x).float() + term).bfloat16(), adapted(x))


def test_under_autocast_it_is_exact_and_trains():
    model = net()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(X)
    apply(model)

    with torch.autocast("cpu", torch.bfloat16):
        actual = model(X)
        actual.float().sum().backward()

    assert torch.equal(expected, actual)
    assert actual.dtype is torch.bfloat16
    assert model[0].lora_B.grad is not None
    assert 0 < model[2].lora_B.grad.abs().sum()


def test_dropout_is_on_the_terms_input_in_training_alone():
    base = nn.Linear(IN, OUT)
    adapted = low_rank_linear(base, LowRankOptions(r=2, lora_dropout=0.5))
    train_(adapted)
    plain = adapted.eval()(X)
    adapted.train()

    torch.manual_seed(3)
    actual = adapted(X)

    torch.manual_seed(3)
    dropped = nn.functional.dropout(X, 0.5)
    expected = base(X) + nn.functional.linear(dropped @ adapted.lora_A.T, adapted.lora_B) * 4
    torch.testing.assert_close(actual, expected)
    assert not torch.equal(plain, actual)


def test_compiled_it_computes_the_same():
    model = net()
    apply(model)
    train_(model)
    expected = model(X)

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    torch.testing.assert_close(compiled(X), expected, rtol=0, atol=0)
    torch._dynamo.reset()


def test_a_model_on_meta_is_planned_and_built_there():
    with torch.device("meta"):
        model = net()

    apply(model)

    assert {"meta"} == {p.device.type for p in model.parameters()}


def test_training_reaches_the_added_parameters_alone():
    model = net().requires_grad_(requires_grad=False)
    apply(model)

    model(X).square().sum().backward()

    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name for name, _ in model.named_parameters() if "lora" in name} == with_gradient


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
    torch.testing.assert_close(
        expected + X @ model[0].lora_A.T @ model[0].lora_B.T * 4, model(X), rtol=1e-5, atol=1e-5
    )


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
    term = nn.functional.linear(x @ model[0].lora_A.T, model[0].lora_B) * 4
    torch.testing.assert_close(expected + term, model(x), rtol=1e-5, atol=1e-4)
    assert surgery.revert()[0] is layer


def test_inside_a_dispatched_model_arguments_are_still_moved():
    """Accelerate's forward is around the replacement's, and the base has its own afterwards."""
    plain = net()
    model = accelerate.dispatch_model(copy.deepcopy(plain), {"": "cpu"}, force_hooks=True)
    assert "forward" in vars(model[0])
    before, expected = snapshot(model), plain(X)

    surgery = apply(model)
    assert torch.equal(expected, model(X))
    apply(plain)
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
        "Operation 'low_rank' cannot work at '0': expected weights that stay, got some that "
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
    ("model", "select", "reader"),
    [
        (nn.MultiheadAttention(4, 2), None, "MultiheadAttention"),
        (
            nn.Sequential(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)),
            "0.linear1",
            "TransformerEncoderLayer",
        ),
    ],
    ids=["attention", "encoder"],
)
def test_a_layer_that_is_not_called_is_refused(model, select, reader):
    """Its weight is read by its owner, so that what is added would have no effect."""
    with pytest.raises(
        ContractError, match=f"expected a layer that is called, got one whose weight {reader} reads"
    ):
        apply(model, select)


def test_a_second_term_is_refused():
    model = net()
    apply(model)

    with pytest.raises(ContractError, match="expected a layer without 'lora_A' and 'lora_B'"):
        apply(model)


def test_it_passes_the_checks_of_the_core():
    """Exported too."""
    recipe = ModelRecipe.model_validate({"rules": [{"operation": "low_rank"}]})
    edited = session().plan_recipe(net(), recipe).apply()
    tiers = ("structure", "identity", "revert", "gradients", "export")

    outcome = verify(edited, (X,), tiers=tiers)

    assert outcome.is_ok, outcome.render()
    assert {"ok"} == {check.status for check in outcome.checks}


class Doubled(Overlay, Shareable):
    """Another plugin's layer, which may be asked for what threads use."""

    overlay_prefix = "Doubled"

    def forward(self, x):
        return 2 * super().forward(x)


def test_under_another_layer_the_terms_are_the_bases_whatever_threads_use_there():
    inner = low_rank_linear(nn.Linear(3, 4), LowRankOptions(r=2))
    nn.init.normal_(inner.lora_B)
    outer = make_overlay(inner, Doubled, parameters={}, attributes={})
    outer.sharing = SimpleNamespace(is_in_force=True, terms=lambda: {id(inner): None})
    x = torch.randn(5, 3)

    assert torch.equal(2 * inner(x), outer(x))


@pytest.mark.parametrize("outputs", [1, 7])
def test_a_base_that_was_resized_is_an_error_of_ours(outputs):
    """As tied heads are when embeddings are resized; one output would be spread over all."""
    layer = low_rank_linear(nn.Linear(4, 5, bias=False), LowRankOptions(r=2))
    layer.weight = nn.Parameter(torch.ones(outputs, 4))
    with pytest.raises(DriftError) as caught:
        layer(torch.ones(3, 4))
    assert str(caught.value) == (
        f"Linear layer has {outputs} outputs, and its low-rank term 5: the base was resized after "
        "the adapter was applied. Revert, resize, and apply again."
    )
