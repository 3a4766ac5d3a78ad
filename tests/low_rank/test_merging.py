"""Terms in the weights: the outputs stay, the weights of before come back, and what is refused."""

import copy
import pickle

import pytest
import torch
from surgery_low_rank import LowRankLinear, Merge, merge_, plugin
from torch import nn

from surgery_core import (
    ContractError,
    DriftError,
    ModelRecipe,
    NoMatchError,
    Rule,
    Session,
    StateError,
    VariantError,
)
from surgery_core.testing import assert_unchanged, snapshot

X = torch.linspace(-2, 2, 12).unflatten(0, (3, 4))
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}
"""Of outputs up to about ten: the weight is rounded in its dtype, with as many terms as features."""


def session():
    return Session([plugin], discover=False)


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False))


def train_(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


def apply(model, **options):
    surgery = (
        session().plan(model, [Rule(operation="low_rank", options={"r": 2, **options})]).apply()
    )
    train_(model)
    return surgery


def edit(active, model=None):
    adapters = {
        name: {"operation": "low_rank", "options": {"r": n + 1}} for n, name in enumerate("ab")
    }
    recipe = ModelRecipe.model_validate({"adapters": adapters, "active": active})
    edited = session().plan_recipe(model or net(), recipe).apply()
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in edited.tensors(name).values():
                tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))
    return edited


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_merged_outputs_are_those_of_before(dtype):
    model = net().to(dtype)
    apply(model)
    x = X.to(dtype)
    expected = model(x)

    merge = merge_(dict(model.named_modules()))

    torch.testing.assert_close(model(x), expected, rtol=0, atol=TOLERANCES[dtype])
    assert dtype is model[0].weight.dtype
    assert ("0", "2") == merge.fqns
    base = model[0].overlay_base
    assert torch.equal(model[0](x), nn.functional.linear(x, base.weight, base.bias))


def test_the_merged_weight_is_the_formulas():
    model = net()
    apply(model, lora_alpha=3)
    layer = model[0]
    expected = layer.weight.double() + 1.5 * layer.lora_B.double() @ layer.lora_A.double()

    merge_({"0": layer})

    torch.testing.assert_close(layer.weight.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_very_weights_come_back(dtype):
    """Objects and bits, also where subtracting would not give them again."""
    model = net().to(dtype)
    apply(model)
    before, expected = snapshot(model), model(X.to(dtype))

    merge = merge_(dict(model.named_modules()))
    assert not torch.equal(expected, model(X.to(dtype))) or dtype is torch.float64
    merge.unmerge()

    assert_unchanged(before, model, subject="Merge and unmerge")
    assert torch.equal(expected, model(X.to(dtype)))


@pytest.mark.parametrize("active", ["a", {"a": 0.5, "b": -2.0}], ids=["one", "several"])
def test_the_active_adapters_of_a_recipe_are_merged(active):
    edited = edit(active, net().double())
    x = X.double()
    model, expected = edited.model, edited.model(x)
    weight = edited.plan.model[0].weight
    before = snapshot(model)

    with merge_(edited) as merge:
        assert isinstance(merge, Merge)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
        assert model[0].weight is not weight

    assert_unchanged(before, model, subject="Merge and unmerge")
    assert model[0].weight is weight
    assert torch.equal(expected, model(x))


def test_rules_and_the_active_adapter_are_merged_together():
    recipe = ModelRecipe.model_validate(
        {
            "rules": [{"operation": "low_rank", "select": "0"}],
            "adapters": {"a": {"operation": "low_rank", "select": "2"}},
        }
    )
    edited = session().plan_recipe(net(), recipe).apply()

    assert ("0", "2") == merge_(edited).fqns


def test_reverting_while_merged_leaves_a_plain_model():
    """Which may be saved as any other; and the weights of before can still be had."""
    edited = edit("b", net().double())
    x = X.double()
    expected, weight = edited.model(x), edited.plan.model[0].weight
    with edited.disabled():
        base = edited.model(x)

    merge = merge_(edited)
    model = edited.revert()

    assert [nn.Linear, nn.Tanh, nn.Linear] == [type(module) for module in model]
    assert ["0.weight", "0.bias", "2.weight"] == list(model.state_dict())
    assert vars(model[0]).keys() == vars(nn.Linear(1, 1)).keys()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    merge.unmerge()
    assert model[0].weight is weight
    assert torch.equal(base, model(x))


def test_other_adapters_are_as_before_while_one_is_merged():
    edited = edit("b")
    expected = edited.model(X)
    edited.set_active("a")

    merge = merge_(edited)
    edited.set_active("b")

    assert torch.equal(expected, edited.model(X))
    merge.unmerge()
    assert torch.equal(expected, edited.model(X))


@pytest.mark.parametrize("choice", [{"a": 1.0}, {"b": 1.0}, {"a": 1.0, "b": 1.0}])
def test_composing_while_one_is_merged_is_refused(choice):
    """Its term would count twice."""
    edited = edit("a")
    merge = merge_(edited)

    with pytest.raises(ContractError) as caught:
        edited.set_active(choice)

    assert "expected the weight of the base, got one that a variant was merged into" in str(
        caught.value
    )
    merge.unmerge()
    edited.set_active(choice)


def test_an_adapter_for_a_merged_model_may_be_composed():
    """What was merged for good is the base's weight."""
    edited = edit("a")
    merge_(edited)
    model = edited.revert()
    expected = model(X)

    again = edit({"a": 0.0, "b": 0.0}, model)

    assert torch.equal(expected, again.model(X))


def test_tied_weights_are_changed_in_the_layer_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    model, ids = Tied(), torch.arange(7)
    apply(model)
    expected, weight = model(ids), model.embed.weight

    merge = merge_(dict(model.named_modules()))

    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-5)
    assert model.embed.weight is weight
    merge.unmerge()
    assert model.head.weight is weight


def test_a_layer_with_two_names_is_merged_once():
    model = nn.Sequential(nn.Linear(4, 4))
    model.append(model[0])
    apply(model)
    expected = model(X)

    merge = merge_(dict(model.named_modules(remove_duplicate=False)))

    assert ("0",) == merge.fqns
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)


def test_weights_go_where_the_model_went_meanwhile():
    model = net()
    apply(model)
    weight = model[0].weight
    merge = merge_(dict(model.named_modules()))

    model.double()
    merge.unmerge()

    assert model[0].weight is weight
    assert {torch.float64} == {p.dtype for p in model.parameters()}


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_of_a_merged_model_compute_the_same(way):
    model = net()
    apply(model)
    merge_(dict(model.named_modules()))

    copied = way(model)

    assert torch.equal(model(X), copied(X))
    assert copied[0].is_merged


def test_compiled_it_computes_what_it_does():
    model = net()
    apply(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = compiled(X)

    with merge_(dict(model.named_modules())):
        assert torch.equal(model(X), compiled(X))
    assert torch.equal(before, compiled(X))
    torch._dynamo.reset()


def test_an_error_in_a_block_takes_the_weights_back():
    model = net()
    apply(model)
    before = snapshot(model)

    with pytest.raises(ZeroDivisionError), merge_(dict(model.named_modules())):
        raise ZeroDivisionError

    assert_unchanged(before, model, subject="A block that failed")


def test_a_block_may_end_unmerged():
    model = net()
    apply(model)
    weight = model[0].weight

    with merge_(dict(model.named_modules())) as merge:
        merge.unmerge()

    assert model[0].weight is weight


def test_unmerging_twice_is_refused():
    model = net()
    apply(model)
    merge = merge_(dict(model.named_modules()))
    merge.unmerge()

    with pytest.raises(VariantError, match="taken back already"):
        merge.unmerge()


def test_drift_stops_unmerging():
    model = net()
    apply(model)
    merge = merge_(dict(model.named_modules()))
    merged = model[0].weight
    model[2].weight = nn.Parameter(torch.zeros(4, 5))

    with pytest.raises(DriftError, match="drifted at '2'") as caught:
        merge.unmerge()

    assert ("2",) == caught.value.fqns
    assert model[0].weight is merged
    assert merge.is_merged


def test_merging_twice_is_refused():
    model = net()
    apply(model)
    merge_({"0": model[0]})
    before = snapshot(model)

    with pytest.raises(ContractError) as caught:
        merge_(dict(model.named_modules()))

    assert str(caught.value) == (
        "Layers cannot be merged: expected floating-point weights that nn.Linear's forward reads, "
        "got '0: one that is merged already'. Leave them out."
    )
    assert_unchanged(before, model, subject="A merge that was refused")


def test_a_merge_of_nothing_is_refused():
    with pytest.raises(NoMatchError, match="Nothing can be merged among 4 modules"):
        merge_(dict(net().named_modules()))


def test_weights_that_would_not_be_finite_are_refused():
    """In float16, of which the largest value is 65504; all or nothing."""
    model = net().half()
    apply(model)
    with torch.no_grad():
        model[2].lora_B.fill_(1e5)
    before = snapshot(model)

    with pytest.raises(StateError, match="finite in their dtype, got others at '2'"):
        merge_(dict(model.named_modules()))

    assert_unchanged(before, model, subject="A merge that was refused")


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_base_is_refused():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32)
    model = nn.Sequential(layer).to("cpu")
    apply(model)
    weight = model[0].weight

    with pytest.raises(ContractError, match="0: a weight of Params4bit"):
        merge_(dict(model.named_modules()))

    assert model[0].weight is weight


class Rounded(nn.Linear):
    """A layer that computes with something else than its weight."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.round(), self.bias)


@pytest.mark.parametrize(
    ("base", "problem"),
    [
        (Rounded(4, 5), "a forward of Rounded"),
        (
            torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)),
            "no weight of its own",
        ),
        (nn.Linear(4, 5, device="meta"), "a weight without values"),
        (nn.Linear(4, 5).to(torch.float8_e4m3fn), "a weight of Parameter in torch.float8_e4m3fn"),
    ],
    ids=["forward", "parametrised", "meta", "one byte"],
)
def test_layers_that_compute_otherwise_are_refused(base, problem):
    model = nn.Sequential(base)
    session().plan(model, [Rule(operation="low_rank")]).apply()
    assert isinstance(model[0], LowRankLinear)

    with pytest.raises(ContractError, match=f"got '0: {problem}'"):
        merge_(dict(model.named_modules()))


def test_what_an_adapter_brought_is_the_same_while_merged(tmp_path):
    """So that a record of it, or a folder for PEFT, has nothing of the base."""
    edited = edit("a")
    before = dict(edited.tensors("a"))
    merge_(edited)

    found = edited.tensors("a")

    assert before.keys() == found.keys()
    assert all(before[key] is found[key] for key in before)
    session().export(edited, "a", tmp_path)
