"""LLaMA-Adapter's and litgpt's checkpoints: the numbers of their formulas, or a typed error."""

from dataclasses import replace

import pytest
import torch
from support.families import build, tokens
from support.foreign import LitGPT, OriginalLlama
from support.importing import (
    GATE,
    GROUPED,
    QUERY,
    SIZES,
    WTE,
    imported_logits,
    litgpt,
    original,
    read_original,
    read_quietly,
    relative_error,
)
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from surgery_adaption_prompt.importers import read_litgpt
from torch import nn

from surgery_core import (
    ContractError,
    NoMatchError,
    OptionsError,
    StateError,
    SurgeryError,
    SurgeryWarning,
)

FLOAT32_PARTS = 1e-6
"""Relative to the largest logit: transformers computes norms and rotary angles in float32."""

# -- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["identity", "tanh"])
@pytest.mark.parametrize("gate", ["layer", "head"])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_llama_adapters_file_gives_llama_adapters_logits(activation, gate, count, tmp_path):
    sizes = replace(SIZES, adapter_layers=count)
    llama = OriginalLlama(sizes)
    adapter = llama.adapter(gate=gate)
    torch.save(adapter, tmp_path / "adapter.pth")
    model, ids = llama.to_transformers(), tokens(2, 9)
    with torch.no_grad():
        base_error = relative_error(model(ids).logits, llama.logits(ids))

    config, state = read_original(tmp_path / "adapter.pth", model, gate_activation=activation)

    expected = llama.logits(ids, adapter, activation)
    assert base_error < FLOAT32_PARTS
    assert relative_error(llama.logits(ids), expected) > 0.1
    assert relative_error(imported_logits(model, config, state, ids), expected) < FLOAT32_PARTS
    assert config == AdaptionPromptConfig(
        adapter_len=3, adapter_layers=count, gate=gate, gate_activation=activation
    )


def test_the_wrong_activation_is_noticed(tmp_path):
    path, model = original(tmp_path)
    llama, ids = OriginalLlama(SIZES), tokens(2, 9)

    config, state = read_original(path, model, gate_activation="identity")

    expected = llama.logits(ids, llama.adapter(), "tanh")
    assert relative_error(imported_logits(model, config, state, ids), expected) > 1e-2


def test_the_wrong_order_of_blocks_is_noticed(tmp_path):
    def swap(state):
        state[QUERY] = torch.cat(state[QUERY].split(SIZES.adapter_len)[::-1])

    path, model = original(tmp_path, swap)
    llama, ids = OriginalLlama(SIZES), tokens(2, 9)

    config, state = read_original(path, model)

    expected = llama.logits(ids, llama.adapter(), "tanh")
    assert relative_error(imported_logits(model, config, state, ids), expected) > 1e-2


def test_the_wrong_order_of_heads_is_noticed(tmp_path):
    def flip(state):
        state["layers.3.attention.gate"] = state["layers.3.attention.gate"].flip(1)

    path, model = original(tmp_path, flip)
    llama, ids = OriginalLlama(SIZES), tokens(2, 9)

    config, state = read_original(path, model)

    expected = llama.logits(ids, llama.adapter(), "tanh")
    assert relative_error(imported_logits(model, config, state, ids), expected) > 1e-2


@pytest.mark.parametrize("layout", ["grouped", "concatenated"])
@pytest.mark.parametrize("gate", ["layer", "head", "head, before"])
@pytest.mark.parametrize("sizes", [SIZES, GROUPED, replace(GROUPED, kv_heads=1)], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_litgpts_file_gives_litgpts_logits(layout, gate, sizes, nested, tmp_path):
    llama = LitGPT(sizes, layout)
    adapter = llama.adapter(gate=gate)
    torch.save({"model": adapter} if nested else adapter, tmp_path / "lit_model.pth.adapter")
    model, ids = llama.to_transformers(), tokens(2, 9)
    with torch.no_grad():
        base_error = relative_error(model(ids).logits, llama.logits(ids))

    config, state = read_quietly(tmp_path / "lit_model.pth.adapter", model)

    expected = llama.logits(ids, adapter)
    assert base_error < FLOAT32_PARTS
    assert relative_error(llama.logits(ids), expected) > 0.1
    assert relative_error(imported_logits(model, config, state, ids), expected) < FLOAT32_PARTS
    assert config == AdaptionPromptConfig(
        adapter_len=3, adapter_layers=2, gate="layer" if gate == "layer" else "head"
    )


# -- what comes back --------------------------------------------------------------------------


def test_the_tensors_keep_their_dtype_and_share_no_memory(tmp_path):
    def halve(state):
        state |= {name: nn.Parameter(tensor.half()) for name, tensor in state.items()}

    path, model = original(tmp_path, halve)

    _, state = read_original(path, model)

    assert [
        "model.layers.2.self_attn.adaption_prompt",
        "model.layers.2.self_attn.adaption_gate",
        "model.layers.3.self_attn.adaption_prompt",
        "model.layers.3.self_attn.adaption_gate",
    ] == list(state)
    assert {torch.float16} == {tensor.dtype for tensor in state.values()}
    assert [(1, 3, 24), (4,)] * 2 == [tuple(tensor.shape) for tensor in state.values()]
    assert not any(tensor.requires_grad for tensor in state.values())
    assert 4 == len({tensor.untyped_storage().data_ptr() for tensor in state.values()})


def test_unused_gates_that_are_zero_need_not_be_there(tmp_path):
    def drop(state):
        del state["layers.0.attention.gate"]

    path, model = original(tmp_path, drop)

    config, _ = read_original(path, model)

    assert 2 == config.adapter_layers


@pytest.mark.parametrize("reader", [read_original, read_quietly])
def test_an_adapted_model_gives_the_same_as_its_base(reader, tmp_path):
    path, model = (original if reader is read_original else litgpt)(tmp_path)
    config, expected = reader(path, model)
    AdaptionPromptModel(
        model, {"other": AdaptionPromptConfig(adapter_len=5, adapter_layers=3)}, "other"
    )

    again, actual = reader(path, model)

    assert config == again
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_an_imported_adapter_is_added_whole(tmp_path):
    path, model = original(tmp_path)
    config, state = read_original(path, model)
    adapted = AdaptionPromptModel(
        model, {"other": AdaptionPromptConfig(adapter_len=5, adapter_layers=3)}, "other"
    )

    adapted.add_adapter("imported", config, state)

    modules = adapted.adapter_modules("imported")
    assert all(
        torch.equal(state[f"{fqn}.adaption_gate"], module.adaption_gate)
        for fqn, module in modules.items()
    )


# -- problems ---------------------------------------------------------------------------------


def test_every_problem_of_a_llama_adapter_file_is_named_at_once(tmp_path):
    def spoil(state):
        del state["layers.3.attention.gate"]
        state["layers.2.attention.gate"] = torch.zeros(1, 5, 1, 1)
        state["layers.1.attention.gate"] += 0.5
        state["layers.0.attention.gate"] += torch.nan
        state["layers.4.attention.gate"] = torch.zeros(1, 4, 1, 1)

    path, model = original(tmp_path, spoil)

    with pytest.raises(StateError) as err:
        read_original(path, model)

    assert ("layers.3.attention.gate",) == err.value.missing
    assert ("layers.4.attention.gate",) == err.value.unexpected
    assert (
        "layers.0.attention.gate: values are not finite",
        "layers.1.attention.gate: expected zero, since adapter_len=3 leaves no prompt for this layer",
        "layers.2.attention.gate: expected shape (1,) or (1, 4, 1, 1), got (1, 5, 1, 1)",
    ) == err.value.mismatched
    assert str(err.value) == (
        f"LLaMA-Adapter checkpoint {str(path)!r} does not fit the model: missing "
        "'layers.3.attention.gate'; unexpected 'layers.4.attention.gate'; mismatched "
        "'layers.0.attention.gate: values are not finite', 'layers.1.attention.gate: expected "
        "zero, since adapter_len=3 leaves no prompt for this layer', 'layers.2.attention.gate: "
        "expected shape (1,) or (1, 4, 1, 1), got (1, 5, 1, 1)'. Pass the adapter_len it was "
        "trained with, and the model it was trained for."
    )


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((7, 24), "expected adapter_len=3 rows for each of 1 to 4 layers, got 7"),
        ((2, 24), "expected adapter_len=3 rows for each of 1 to 4 layers, got 2"),
        ((15, 24), "expected adapter_len=3 rows for each of 1 to 4 layers, got 15"),
        ((0, 24), "expected shape (1 or more, 24), got (0, 24)"),
        ((6, 25), "expected shape (1 or more, 24), got (6, 25)"),
        ((24,), "expected shape (1 or more, 24), got (24,)"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(shape, problem, tmp_path):
    path, model = original(tmp_path, lambda state: state.update({QUERY: torch.zeros(shape)}))

    with pytest.raises(StateError) as err:
        read_original(path, model)

    assert (f"{QUERY}: {problem}",) == err.value.mismatched


def test_a_length_that_leaves_too_few_layers_is_noticed_by_their_gates(tmp_path):
    path, model = original(tmp_path)

    with pytest.raises(StateError) as err:
        read_original(path, model, adapter_len=6)

    assert (
        "layers.2.attention.gate: expected zero, since adapter_len=6 leaves no prompt for this layer",
    ) == err.value.mismatched


@pytest.mark.parametrize(
    "options",
    [{"adapter_len": 0}, {"adapter_len": 2.0}, {"gate_activation": "sigmoid"}],
    ids=str,
)
def test_options_out_of_range_are_refused(options, tmp_path):
    path, model = original(tmp_path)

    with pytest.raises(OptionsError, match=next(iter(options))):
        read_original(path, model, **options)


def test_every_problem_of_a_litgpt_file_is_named_at_once(tmp_path):
    def spoil(state):
        del state[WTE]
        state[GATE] = state[GATE][0]
        state["transformer.h.2.attn.adapter_wte.weight"][0, 0] = torch.inf
        state["transformer.h.2.attn.gating_factor"] = torch.ones(1, 1, 4, 1, dtype=torch.int64)
        state["transformer.h.4.attn.gating_factor"] = torch.ones(1, 1, 4, 1)
        state["transformer.h.3.attn.adapter_bias"] = torch.ones(4)

    path, model = litgpt(tmp_path, spoil)

    with pytest.raises(StateError) as err:
        read_litgpt(path, model)

    assert (WTE,) == err.value.missing
    assert (
        "transformer.h.3.attn.adapter_bias",
        "transformer.h.4.attn.gating_factor",
    ) == err.value.unexpected
    assert (
        "transformer.h.2.attn.adapter_wte.weight: values are not finite",
        "transformer.h.2.attn.gating_factor: expected a dense floating-point tensor, got torch.int64 "
        "with torch.strided",
        f"{GATE}: expected shape (1,) or (1, 1, 4, 1) or (1, 4, 1, 1), got (1, 4, 1)",
    ) == err.value.mismatched
    assert str(err.value).startswith(
        f"litgpt checkpoint {str(path)!r} does not fit the model: missing {WTE!r}; unexpected "
    )
    assert str(err.value).endswith(". Pass the model it was trained for.")


def test_a_gap_in_litgpts_layers_is_refused(tmp_path):
    def drop(state):
        for name in [name for name in state if ".h.2." in name]:
            del state[name]

    path, model = litgpt(tmp_path, drop, sizes=replace(SIZES, adapter_layers=3))

    with pytest.raises(StateError) as err:
        read_litgpt(path, model)

    assert (
        "transformer.h.2.attn.adapter_wte.weight",
        "transformer.h.2.attn.gating_factor",
    ) == err.value.missing


def test_an_empty_litgpt_file_lacks_at_least_the_top_layer(tmp_path):
    path, model = litgpt(tmp_path, lambda state: state.clear())

    with pytest.raises(StateError) as err:
        read_litgpt(path, model)

    assert (WTE, GATE) == err.value.missing


def test_layers_that_differ_in_shape_are_refused(tmp_path):
    def vary(state):
        state["transformer.h.2.attn.adapter_wte.weight"] = torch.zeros(5, SIZES.hidden)
        state["transformer.h.2.attn.gating_factor"] = torch.zeros(1)

    path, model = litgpt(tmp_path, vary)

    with pytest.raises(StateError) as err:
        read_litgpt(path, model)

    assert (
        "transformer.h.2.attn.adapter_wte.weight: expected shape (3, 24) as in the top layer, got (5, 24)",
        "transformer.h.2.attn.gating_factor: expected shape (1, 1, 4, 1) as in the top layer, got (1,)",
    ) == err.value.mismatched


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (torch.zeros(6, 24).to_sparse(), "got UnpicklingError: something that needs "),
        (torch.zeros(6, 24, device="meta"), "got UnpicklingError: something that needs "),
        (torch.zeros(6, 24, dtype=torch.complex64), "expected a dense floating-point tensor"),
    ],
    ids=["sparse", "meta", "complex"],
)
def test_tensors_of_odd_kinds_are_refused(odd, message, tmp_path):
    path, model = original(tmp_path, lambda state: state.update({QUERY: odd}))

    with pytest.raises(SurgeryError, match=message):
        read_original(path, model)


# -- models -----------------------------------------------------------------------------------


def test_a_model_that_is_not_of_transformers_is_refused(tmp_path):
    path, model = original(tmp_path)
    config = AdaptionPromptConfig(adapter_len=1, adapter_layers=1)
    adapted = AdaptionPromptModel(model, {"a": config}, "a")

    with pytest.raises(ContractError) as err:
        read_original(path, adapted)

    assert str(err.value) == (
        "Adapters are read for a model of transformers: expected a PreTrainedModel, got "
        "AdaptionPromptModel. Pass the base model; get_base_model() returns it."
    )


def test_a_model_without_attention_is_refused(tmp_path):
    path, model = original(tmp_path)
    model.model.layers = nn.ModuleList()

    with pytest.raises(NoMatchError) as err:
        read_original(path, model)

    assert str(err.value) == (
        "LlamaForCausalLM has no attention module to read an adapter for: expected modules that use "
        "transformers' attention interface. Pass a decoder of transformers 5."
    )


# -- litgpt's own deviations ------------------------------------------------------------------


def test_litgpts_deviations_are_warned_of_where_the_call_is(tmp_path):
    path, model = litgpt(tmp_path)
    model.config.attn_logit_softcapping = 50.0

    with pytest.warns(SurgeryWarning) as caught:
        read_litgpt(path, model)

    assert [__file__] == [warning.filename for warning in caught]
    assert str(caught[0].message) == (
        f"litgpt checkpoint {str(path)!r} may not act as it did in litgpt: litgpt 0.5.5 to 0.5.13 use "
        "other rows of the fused projection for the prompt's keys and values, so an adapter trained "
        "by them acts differently here; litgpt caps the logits of the prompt, which is not done "
        "here. Compare the outputs of both."
    )


def test_with_a_single_key_value_head_there_is_nothing_to_warn_of(tmp_path):
    path, model = litgpt(tmp_path, sizes=replace(GROUPED, kv_heads=1))

    config, _ = read_litgpt(path, model)

    assert 2 == config.adapter_layers


def test_other_families_are_read_for_too(tmp_path):
    """Names in the file are litgpt's for every family; FQNs are the model's."""
    path, _ = litgpt(tmp_path, sizes=replace(SIZES, layers=3))
    model = build("phi3")

    _, state = read_quietly(path, model)

    assert "model.layers.2.self_attn.adaption_prompt" in state
