"""The status of adapters: sizes, places, states and gates, of models and of bare tensors."""

import json
import math

import pytest
import torch
from support.families import Shape, build, open_gates_
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel, adapter_state
from surgery_adaption_prompt.status import (
    AdapterStatus,
    ModelStatus,
    adapter_status,
    model_status,
    tensors_status,
)

from surgery_core import VariantError

LEGAL = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, gate="head", gate_activation="tanh")
FRENCH = AdaptionPromptConfig(adapter_len=5, adapter_layers=1)
LAYER_1, LAYER_2 = "model.layers.1.self_attn", "model.layers.2.self_attn"
GATES = {LAYER_1: (0.5, -0.25, 0.125, 1.5), LAYER_2: (-0.75, 2.0, -0.0625, 0.375)}


@pytest.fixture
def model():
    """Two adapters: "legal", active, with gates for each head, and "french" with one for a layer."""
    model = AdaptionPromptModel(build(), {"legal": LEGAL, "french": FRENCH}, "legal")
    with torch.no_grad():
        for fqn, module in model.adapter_modules("legal").items():
            module.adaption_gate.copy_(torch.tensor(GATES[fqn]))
        for module in model.adapter_modules("french").values():
            module.adaption_gate.fill_(-0.3125)
    return model


def status_of(model, name):
    return adapter_status(name, model.peft_config[name], model.swap_state.variant(name))


def whole(model, **arguments):
    return model_status(swap_state=model.swap_state, configs=model.peft_config, **arguments)


def test_an_adapter_with_gates_for_each_head(model):
    status = status_of(model, "legal")

    assert ("legal", 3, 2, "head", "tanh") == (
        *(status.name, status.adapter_len, status.adapter_layers),
        *(status.gate, status.gate_activation),
    )
    # Two layers, each with 3 tokens of 24 and 4 gates.
    assert 2 * (3 * 24 + 4) == status.num_parameters
    assert 2 * (3 * 24 + 4) == status.num_trainable
    assert 4 * 2 * (3 * 24 + 4) == status.num_bytes
    assert ("cpu",) == status.devices
    assert ("float32",) == status.dtypes
    assert [LAYER_1, LAYER_2] == list(status.gates)
    for fqn, values in GATES.items():
        assert pytest.approx([math.tanh(value) for value in values]) == list(status.gates[fqn])


def test_an_adapter_with_one_gate_a_layer_that_is_used_as_it_is(model):
    status = status_of(model, "french")

    assert ("layer", "identity", "layer") == (
        *(status.gate, status.gate_activation),
        status.gate_kind,
    )
    assert {LAYER_2: (-0.3125,)} == status.gates
    assert 5 * 24 + 1 == status.num_parameters


def test_the_kind_of_gate_names_its_activation(model):
    assert "head, tanh" == status_of(model, "legal").gate_kind


def test_magnitudes_are_over_all_layers_and_heads(model):
    status = status_of(model, "legal")
    expected = [math.tanh(abs(value)) for values in GATES.values() for value in values]

    assert pytest.approx(sum(expected) / 8) == status.mean_gate_magnitude
    # The largest has a negative neighbour of no account, and is in the second layer.
    assert pytest.approx(math.tanh(2.0)) == status.max_gate_magnitude


def test_a_large_negative_gate_is_the_largest():
    assert 0.3125 == tensors_status("a", FRENCH, gates_only(-0.3125, 0.25)).max_gate_magnitude


def gates_only(*values):
    return {f"h.{i}.attn.adaption_gate": torch.tensor([v]) for i, v in enumerate(values)}


def test_layers_are_in_order_of_their_numbers():
    tensors = {f"h.{i}.attn.adaption_gate": torch.tensor([i / 8]) for i in (10, 2, 9)}

    assert [("h.2.attn", 0.25), ("h.9.attn", 1.125), ("h.10.attn", 1.25)] == [
        (fqn, *values) for fqn, values in tensors_status("a", FRENCH, tensors).gates.items()
    ]


def test_a_frozen_adapter_has_nothing_to_train():
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=1, inference_mode=True)
    model = AdaptionPromptModel(build(), {"default": config}, "default")

    status = status_of(model, "default")

    assert (0, 3 * 24 + 1) == (status.num_trainable, status.num_parameters)


def test_modules_saved_whole_count():
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=1, modules_to_save=["lm_head"])
    model = AdaptionPromptModel(build(), {"default": config}, "default")
    model.saved_modules("default")["lm_head"].to(torch.bfloat16)

    status = status_of(model, "default")

    assert 3 * 24 + 1 + 40 * 24 == status.num_parameters == status.num_trainable
    assert 4 * (3 * 24 + 1) + 2 * 40 * 24 == status.num_bytes
    assert ("bfloat16", "float32") == status.dtypes
    assert [LAYER_2] == list(status.gates)


def test_gates_in_a_narrow_dtype_are_those_the_model_uses():
    tensors = {"h.0.attn.adaption_gate": torch.tensor([0.7], dtype=torch.bfloat16)}
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=1, gate_activation="tanh")

    (values,) = tensors_status("a", config, tensors).gates.values()

    # tanh of what 0.7 is in bfloat16, rounded to that dtype again.
    assert (torch.tanh(torch.tensor(0.69921875)).bfloat16().item(),) == values


def test_on_the_meta_device_gates_have_no_values(model):
    model.to("meta")

    status = status_of(model, "legal")

    assert {LAYER_1: None, LAYER_2: None} == status.gates
    assert (None, None) == (status.mean_gate_magnitude, status.max_gate_magnitude)
    assert ("meta",) == status.devices
    assert 4 * 2 * (3 * 24 + 4) == status.num_bytes
    assert json.loads(json.dumps(status.to_mapping()))["gates"] == {LAYER_1: None, LAYER_2: None}


class _Elsewhere(torch.Tensor):
    """Stands for a sharded parameter, whose values PyTorch does not list either."""


def test_gates_of_a_class_of_their_own_are_not_read():
    gate = torch.tensor([0.5]).as_subclass(_Elsewhere)
    tensors = {**gates_only(0.25), "h.1.attn.adaption_gate": gate}

    status = tensors_status("a", FRENCH, tensors)

    assert {"h.0.attn": (0.25,), "h.1.attn": None} == status.gates
    # A mean of the layers at hand would pass for that of all.
    assert status.mean_gate_magnitude is None
    assert status.max_gate_magnitude is None


@pytest.mark.parametrize("values", [(math.nan, 0.5), (0.5, math.nan)])
def test_a_gate_that_is_not_a_number_shows(values):
    status = tensors_status("a", FRENCH, gates_only(*values))

    assert math.isnan(status.mean_gate_magnitude)
    assert math.isnan(status.max_gate_magnitude)


def test_numbers_that_are_not_finite_are_none_in_the_mapping():
    mapping = tensors_status("a", FRENCH, gates_only(0.5, -math.inf)).to_mapping()

    assert {"h.0.attn": [0.5], "h.1.attn": [None]} == mapping["gates"]
    assert (None, None) == (mapping["mean_gate_magnitude"], mapping["max_gate_magnitude"])


def test_a_mapping_has_every_field(model):
    status = status_of(model, "french")

    assert {
        "name": "french",
        "adapter_len": 5,
        "adapter_layers": 1,
        "gate": "layer",
        "gate_activation": "identity",
        "condition_size": None,
        "condition_rank": None,
        "num_parameters": 121,
        "num_trainable": 121,
        "num_bytes": 484,
        "devices": ["cpu"],
        "dtypes": ["float32"],
        "mean_gate_magnitude": 0.3125,
        "max_gate_magnitude": 0.3125,
        "gates": {LAYER_2: [-0.3125]},
    } == json.loads(json.dumps(status.to_mapping()))
    assert set(AdapterStatus.__dataclass_fields__) < set(status.to_mapping())


def test_looking_changes_nothing(model):
    before = {n: t.clone() for n, t in adapter_state(model.swap_state.variant("legal")).items()}

    status = status_of(model, "legal")
    with torch.no_grad():
        model.adapter_modules("legal")[LAYER_1].adaption_gate.zero_()

    # And what was seen stays: no view of the parameter.
    assert pytest.approx(math.tanh(0.5)) == status.gates[LAYER_1][0]
    after = adapter_state(model.swap_state.variant("legal"))
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        f"{LAYER_1}.adaption_gate"
    ]


def test_the_state_of_each_adapter_follows_the_model(model):
    def states():
        status = whole(model)
        found = [status.state_of(adapter.name) for adapter in status.adapters]
        return (*found, status.selected, status.active, status.is_enabled, status.stored)

    assert ("active", "stored", ("legal",), ("legal",), True, ("french",)) == states()
    model.set_adapter("french")
    assert ("stored", "active", ("french",), ("french",), True, ("legal",)) == states()
    model.disable_adapter_layers()
    assert ("stored", "selected, disabled", ("french",), (), False) == states()[:-1]
    assert ("legal", "french") == states()[-1]


def test_adapters_combined_in_one_variant_are_active_under_their_own_names(model):
    names = ["french", "legal"]

    assert ("french", "legal") == whole(model, selected=names).active
    assert "active" == whole(model, selected=names).state_of("french")
    assert "Active: 'french', |gate|\n" in str(whole(model, selected=names))
    assert "Active: 'legal', |gate| by head\n" in str(whole(model, selected=names))
    model.disable_adapter_layers()
    assert "selected, disabled" == whole(model, selected=names).state_of("french")
    assert () == whole(model, selected=names).active


def test_variants_that_are_no_adapters_are_left_out(model):
    del model.peft_config["french"]

    status = whole(model)

    assert () == status.stored
    assert ["legal"] == [adapter.name for adapter in status.adapters]


def test_a_configuration_without_a_variant_is_refused(model):
    with pytest.raises(VariantError) as caught:
        model_status(swap_state=model.swap_state, configs={"german": FRENCH})

    assert str(caught.value) == (
        "Variant 'german' does not exist: expected one of 'french', 'legal'."
    )


def test_totals_are_of_all_adapters_wherever_they_are():
    frozen = AdaptionPromptConfig(adapter_len=5, adapter_layers=1, inference_mode=True)
    model = AdaptionPromptModel(build(), {"legal": LEGAL, "french": frozen}, "legal")

    status = whole(model)

    assert 152 + 121 == status.num_parameters
    assert 152 == status.num_trainable
    assert 4 * (152 + 121) == status.num_bytes


def test_a_status_of_a_model_as_a_mapping(model):
    mapping = json.loads(json.dumps(whole(model).to_mapping()))

    adapters = mapping.pop("adapters")
    assert {
        "selected": ["legal"],
        "active": ["legal"],
        "is_enabled": True,
        "stored": ["french"],
        "num_parameters": 273,
        "num_trainable": 273,
        "num_bytes": 1092,
    } == mapping
    assert [("legal", "active"), ("french", "stored")] == [
        (adapter["name"], adapter["state"]) for adapter in adapters
    ]
    assert status_of(model, "french").to_mapping() == {
        name: value for name, value in adapters[1].items() if name != "state"
    }
    assert set(ModelStatus.__dataclass_fields__) <= {"adapters", *mapping}


def test_printed_it_is_a_table_and_the_active_gates_by_head(model):
    assert str(whole(model)) == (
        "adapter  state   layers  K  gate        parameters  bytes  devices  dtypes   "
        "mean |gate|  max |gate|\n"
        "-------  ------  ------  -  ----------  ----------  -----  -------  -------  "
        "-----------  ----------\n"
        "legal    active  2       3  head, tanh  152         608    cpu      float32  "
        "0.47         0.964\n"
        "french   stored  1       5  layer       121         484    cpu      float32  "
        "0.312        0.312\n"
        "Total: 2 adapters, 273 parameters (273 trainable), 1,092 bytes.\n"
        "\n"
        "Active: 'legal', |gate| by head\n"
        "module                    0      1      2       3\n"
        "------------------------  -----  -----  ------  -----\n"
        "model.layers.1.self_attn  0.462  0.245  0.124   0.905\n"
        "model.layers.2.self_attn  0.635  0.964  0.0624  0.358"
    )


def test_printed_with_one_gate_a_layer(model):
    model.set_adapter("french")

    assert str(whole(model)).partition("\n\n")[2] == (
        "Active: 'french', |gate|\n"
        "module                    |gate|\n"
        "------------------------  ------\n"
        "model.layers.2.self_attn  0.312"
    )


def test_printed_while_disabled_there_are_no_active_gates(model):
    model.disable_adapter_layers()

    text = str(whole(model))

    assert "legal    selected, disabled  2 " in text
    assert text.endswith("Total: 2 adapters, 273 parameters (273 trainable), 1,092 bytes.")


def test_printed_without_values():
    model = AdaptionPromptModel(build(), {"legal": LEGAL}, "legal").to("meta")

    table, _, gates = str(whole(model)).partition("\n\n")

    assert "meta     float32  no values    no values\nTotal: 1 adapter, 152" in table
    assert gates == (
        "Active: 'legal', |gate| by head\n"
        "module                    0\n"
        "------------------------  ---------\n"
        "model.layers.1.self_attn  no values\n"
        "model.layers.2.self_attn  no values"
    )


def test_a_small_gate_does_not_look_closed():
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=1)
    model = AdaptionPromptModel(build(), {"default": config}, "default")
    with torch.no_grad():
        model.adapter_modules("default")[LAYER_2].adaption_gate.fill_(-1.25e-5)

    assert str(whole(model)).endswith("\nmodel.layers.2.self_attn  1.25e-05")


def test_without_adapters_there_is_nothing_to_print(model):
    model.delete_adapter("legal")
    model.delete_adapter("french")

    status = whole(model)

    assert "No adapters." == str(status)
    assert ((), (), (), ()) == (status.selected, status.active, status.stored, status.adapters)
    assert 0 == status.num_parameters


def test_wide_models_have_all_their_heads():
    shape = Shape(hidden=24, heads=12, kv_heads=3, head_dim=4)
    config = AdaptionPromptConfig(adapter_len=2, adapter_layers=3, gate="head")
    model = AdaptionPromptModel(build(shape=shape), {"default": config}, "default")
    open_gates_(model.adapter_modules("default"))

    status = whole(model)

    assert [12, 12, 12] == [len(values) for values in status.adapters[0].gates.values()]
    header = str(status).partition("by head\n")[2].splitlines()[0]
    assert ["module", *map(str, range(12))] == header.split()
