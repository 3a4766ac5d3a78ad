"""What a probe promises beyond the contract: the right numbers, kept and taken back."""

import pytest
import torch
from surgery_activation_probe.operation import Probed
from surgery_activation_probe.plugin import plugin
from tiny import Tiny, make_model
from torch import nn

from surgery_core import ConflictError, ContractError, ModelRecipe, OptionsError, Rule, Session
from surgery_core.testing import OperationContract

SESSION = Session([plugin], discover=False)
INPUTS = [torch.linspace(-3, 2, 24).reshape(2, 3, 4), torch.linspace(-1, 5, 4).reshape(1, 4)]


def rule(select, **options):
    return Rule(operation="activation_probe", select=select, options=options)


def outputs_of(module, model):
    """Run a model on all inputs and return what one of its modules gave."""
    found = []
    handle = module.register_forward_hook(lambda *arguments: found.append(arguments[-1]))
    with torch.no_grad():
        for hidden in INPUTS:
            model(hidden)
    handle.remove()
    return found


class Pair(nn.Module):
    def forward(self, hidden):
        return hidden, None


class Several(Tiny):
    """A model in which one module gives several outputs."""

    def __init__(self):
        super().__init__()
        self.pair = Pair()

    def forward(self, hidden):
        hidden, _ = self.pair(hidden)
        return super().forward(hidden)


class TestSeveralOutputs(OperationContract):
    """Blocks with children of their own, and a module that gives a tuple."""

    def session(self):
        return SESSION

    def make_model(self):
        return Several()

    def rules(self):
        return [rule("layers.*"), rule("pair")]

    def run(self, model):
        return model(INPUTS[0])


def test_statistics_are_those_of_all_outputs():
    model = make_model()
    expected = torch.cat([out.flatten() for out in outputs_of(model.head, model)]).abs()

    surgery = SESSION.plan(model, [rule("head")]).apply()
    outputs_of(model.head, model)

    probe = model.head.activation_probe
    assert probe.count == expected.numel() == 21
    torch.testing.assert_close(probe.mean_abs, expected.mean())
    assert torch.equal(probe.max_abs, expected.max())
    assert surgery.revert() is model


def test_statistics_of_each_channel():
    model = make_model()
    expected = torch.cat([out.flatten(0, -2) for out in outputs_of(model.head, model)]).abs()

    SESSION.plan(model, [rule("head", per_channel=True)]).apply()
    outputs_of(model.head, model)

    probe = model.head.activation_probe
    assert probe.count == len(expected) == 7
    torch.testing.assert_close(probe.mean_abs, expected.mean(0))
    assert torch.equal(probe.max_abs, expected.amax(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_statistics_are_float32_whatever_the_model_is(dtype):
    model = make_model().to(dtype)
    SESSION.plan(model, [rule("head")]).apply()

    model(INPUTS[0].to(dtype))

    assert model.head.activation_probe.mean_abs.dtype is torch.float32
    assert model.head.activation_probe.count == 18


def test_an_empty_output_counts_nothing():
    model = make_model()
    SESSION.plan(model, [rule("head", per_channel=True)]).apply()

    model(torch.empty(0, 4))

    assert model.head.activation_probe.count == 0
    assert torch.equal(model.head.activation_probe.mean_abs, torch.zeros(3))


def test_what_looks_for_the_base_finds_it():
    model = make_model()
    before, head = list(model.state_dict()), model.head
    SESSION.plan(model, [rule("head")]).apply()

    assert isinstance(model.head, nn.Linear)
    assert isinstance(model.head, Probed)
    assert model.head.out_features == 3
    assert model.head.weight is head.weight
    assert [key for key in model.state_dict() if "activation_probe" not in key] == before


def test_the_model_can_move_and_be_trained_while_it_is_watched():
    """The base has what became of its parameters."""
    model = make_model()
    head = model.head
    surgery = SESSION.plan(model, [rule("head")]).apply()

    model.double()(INPUTS[0].double()).sum().backward()
    surgery.revert()

    assert head.weight.dtype is torch.float64
    assert head.weight.grad is not None


def test_a_record_has_the_statistics_of_every_adapter(tmp_path):
    """Only the active adapter counts."""
    adapters = {
        name: {"operation": "activation_probe", "select": select}
        for name, select in (("act", "layers.*.act"), ("head", "head"))
    }
    recipe = ModelRecipe.model_validate({"adapters": adapters, "active": "act"})
    model = make_model()
    edited = SESSION.plan_recipe(model, recipe).apply()
    outputs_of(model.head, model)
    edited.set_active("head")
    outputs_of(model.head, model)
    model(INPUTS[0])
    SESSION.save(edited, tmp_path)

    again = SESSION.load(make_model(), tmp_path, base_check="error")

    expected, actual = edited.tensors("head"), again.tensors("head")
    assert expected["head.activation_probe.count"] == 39
    assert edited.tensors("act")["layers.0.act.activation_probe.count"] == 7 * 8
    assert all(torch.equal(tensor, actual[key]) for key, tensor in expected.items())


def test_compiled_code_counts_too():
    model = make_model()
    SESSION.plan(model, [rule("layers.*"), rule("head", per_channel=True)]).apply()
    plain = [out.clone() for out in outputs_of(model.head, model)]
    expected = model.head.activation_probe.mean_abs.clone()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    with torch.no_grad():
        actual = [compiled(hidden) for hidden in INPUTS]

    assert all(torch.equal(old, new) for old, new in zip(plain, actual, strict=True))
    assert model.head.activation_probe.count == 14
    torch.testing.assert_close(model.head.activation_probe.mean_abs, expected)


def test_compiled_code_of_the_base_does_not_run_in_place_of_the_probe():
    model = make_model()
    model.head.compile(backend="eager")
    SESSION.plan(model, [rule("head")]).apply()

    model(INPUTS[0])

    assert model.head.activation_probe.count == 18


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        (
            [rule("head", per_chanel=True, per_channel=1)],
            OptionsError,
            "Operation 'activation_probe' has invalid options: per_channel: Input should be a "
            "valid boolean; per_chanel: Extra inputs are not permitted. Fix the options.",
        ),
        (
            [rule("layers.0.act", per_channel=True)],
            ContractError,
            "Operation 'activation_probe' cannot work at 'layers.0.act': expected a Linear not "
            "probed or patched yet, got GELU. Exclude it.",
        ),
    ],
)
def test_what_cannot_be_probed_is_refused(rules, error, message):
    with pytest.raises(error) as caught:
        SESSION.plan(make_model(), rules)

    assert str(caught.value) == message


def test_a_rule_that_selects_nothing_in_particular_is_a_conflict():
    with pytest.raises(ConflictError, match=r"'activation_probe' \(rule 0\) claims 'layers'"):
        SESSION.plan(make_model(), [rule(None)])


def test_what_has_a_probe_or_a_patch_already_is_refused():
    model = make_model()
    SESSION.plan(model, [rule("head")]).apply()
    model.layers[0].up.forward = lambda hidden: hidden

    for select, found in (("head", "ProbedLinear"), ("layers.0.up", "Linear")):
        with pytest.raises(ContractError) as caught:
            SESSION.plan(model, [rule(select)])
        assert str(caught.value) == (
            f"Operation 'activation_probe' cannot work at {select!r}: expected a Module not probed "
            f"or patched yet, got {found}. Exclude it."
        )


def test_a_model_brings_its_own_inputs():
    model = make_model()

    assert SESSION.plugins.probe_inputs(model) is model.example_input_array
    assert SESSION.plugins.probe_inputs(nn.ReLU()) is None
