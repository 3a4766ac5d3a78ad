"""Several adapters at once: an exact sum, in any order, with weights."""

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.families import Shape, build, gpt2, open_gates_, tokens
from support.reference import reference_term
from surgery_adaption_prompt import (
    AdaptionPromptConfig,
    AdaptionPromptModel,
    Composition,
    adapter_state,
    load_state_,
)
from surgery_adaption_prompt.parts import AttentionCall

from surgery_core import OptionsError, SurgeryError, VariantError
from surgery_core.testing import InjectedError, failing_at

CONFIGS = {
    "fr": AdaptionPromptConfig(adapter_len=3, adapter_layers=2, gate="head"),
    "legal": AdaptionPromptConfig(adapter_len=5, adapter_layers=3, gate_activation="tanh"),
    "v1.0": AdaptionPromptConfig(adapter_len=1, adapter_layers=1),
}
IDS = tokens(2, 6)

weights = st.floats(-2, 2, allow_nan=False)


def make(base=None, configs=CONFIGS):
    model = AdaptionPromptModel(base or build(seed=1), configs, next(iter(configs))).eval()
    for seed, name in enumerate(configs):
        open_gates_(model.adapter_modules(name), seed=seed)
    return model


def logits(model, choice=None, ids=IDS):
    if choice is not None:
        model.set_adapter(choice)
    with torch.no_grad():
        return model(ids).logits


def error(actual, expected):
    assert torch.isfinite(actual).all()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


MODEL = make()


@given(values=st.lists(weights, min_size=3, max_size=3), data=st.data())
def test_the_order_does_not_matter(values, data):
    """To the last bit."""
    chosen = dict(zip(CONFIGS, values, strict=True))
    shuffled = dict(data.draw(st.permutations(list(chosen.items()))))

    assert torch.equal(logits(MODEL, chosen), logits(MODEL, shuffled))
    with MODEL.activated(shuffled):
        assert torch.equal(logits(MODEL, "fr"), logits(MODEL, "legal"))
        assert torch.equal(logits(MODEL), logits(MODEL, chosen))


@given(name=st.sampled_from(sorted(CONFIGS)), others=st.lists(st.sampled_from(sorted(CONFIGS))))
def test_weights_of_one_and_zero_are_the_adapter_alone(name, others):
    expected = logits(MODEL, name)

    assert torch.equal(expected, logits(MODEL, dict.fromkeys(others, 0.0) | {name: 1.0}))


def test_weights_of_zero_are_the_base():
    model = make()
    with model.disable_adapter():
        expected = logits(model)

    assert torch.equal(expected, logits(model, dict.fromkeys(CONFIGS, 0.0)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_sum_follows_the_formula(dtype):
    """At the top layer, for a query that is known: each adapter has its own softmax and gate."""
    model = make(build(seed=1, dtype=dtype))
    chosen = {"fr": 0.7, "legal": -1.3, "v1.0": 0.25}
    model.set_adapter(chosen)
    attention = model.get_base_model().model.layers[-1].self_attn
    query = torch.randn(2, 4, 3, 8, dtype=dtype)
    with torch.no_grad():
        actual = attention.prompt_term(AttentionCall(query=query, scaling=0.3))
    expected = sum(
        weight
        * reference_term(
            query.double(),
            module.adaption_prompt.detach().double()[0],
            module.adaption_gate.detach().double().expand(4),
            (attention.k_proj.weight.double(), None, attention.v_proj.weight.double(), None),
            scaling=0.3,
            activation=CONFIGS[name].gate_activation,
        )
        for name, weight in chosen.items()
        for module in [model.adapter_modules(name)["model.layers.2.self_attn"]]
    )

    limit = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 0.02}[dtype]
    assert error(actual.double(), expected.detach()) < limit


def test_gpt2s_terms_before_and_after_the_output_projection_add_up():
    configs = {
        "paper": AdaptionPromptConfig(adapter_len=3, adapter_layers=2),
        "peft": AdaptionPromptConfig(adapter_len=2, adapter_layers=1, project_output=False),
    }
    model = make(gpt2(), configs)
    top = model.get_base_model().transformer.h[-1]
    hidden = torch.randn(1, 4, 24)

    def attend(choice):
        model.set_adapter(choice)
        with torch.no_grad():
            return top.attn(hidden)[0]

    base = attend({"paper": 0.0})
    parts = {name: attend(name) - base for name in configs}
    expected = base + 0.5 * parts["paper"] + 2 * parts["peft"]
    assert error(attend({"paper": 0.5, "peft": 2.0}), expected) < 1e-5


def test_its_tensors_are_those_of_its_adapters():
    """Named in the model, trained in place, and in neither store nor copy."""
    model = make()
    model.set_adapter({"fr": 0.5, "v1.0": 2.0})
    top = model.get_base_model().model.layers[2].self_attn

    assert ("legal",) == model.swap_state.stored
    assert ("fr", "v1.0") == model.swap_state.lent
    assert ["fr", "v1.0"] == model.active_adapters == model.active_adapter
    assert Composition({"v1.0": 2, "fr": 0.5}) == model.active_composition
    named = {n for n, _ in top.named_parameters() if "adaption" in n}
    assert {
        "adaption_prompt_fr",
        "adaption_gate_fr",
        "adaption_prompt_v1%2E0",
        "adaption_gate_v1%2E0",
    } == named
    assert named <= set(top.state_dict())
    fr = model.adapter_modules("fr")["model.layers.2.self_attn"]
    assert top.get_parameter("adaption_prompt_fr") is fr.adaption_prompt
    before = {n: t.clone() for n, t in adapter_state(model.adapter_modules("fr")).items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert 2 * (2 + 1) == len(trained)
    model(IDS, labels=IDS).loss.backward()
    torch.optim.SGD(trained, lr=0.5).step()
    after = adapter_state(model.adapter_modules("fr"))
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_a_move_of_the_base_alone_reaches_its_adapters():
    model = make()
    model.set_adapter({"fr": 0.5, "legal": 2.0})
    model.get_base_model().double()
    expected = logits(model)

    assert torch.float64 is expected.dtype
    assert (
        torch.float64 is model.adapter_modules("fr")["model.layers.2.self_attn"].adaption_gate.dtype
    )
    model.set_adapter("v1.0")
    assert torch.equal(expected, logits(model, {"fr": 0.5, "legal": 2.0}))
    assert torch.float64 is logits(model, "v1.0").dtype


def test_parameters_that_are_replaced_while_it_is_active_are_its_adapters():
    """As `load_state_dict(assign=True)` does, and moves from the meta device."""
    model = make()
    model.set_adapter({"fr": 0.5, "legal": 2.0})
    base = model.get_base_model()
    state = {k: t.clone() + 0.1 if "_fr" in k else t.clone() for k, t in base.state_dict().items()}
    base.load_state_dict(state, assign=True)
    expected = logits(model)

    gate = model.adapter_modules("fr")["model.layers.2.self_attn"].adaption_gate
    assert torch.equal(gate, state["model.layers.2.self_attn.adaption_gate_fr"])
    model.set_adapter("v1.0")
    assert torch.equal(expected, logits(model, {"fr": 0.5, "legal": 2.0}))


def test_it_can_be_disabled_and_comes_back():
    model = make()
    with model.disable_adapter():
        base = logits(model)
    expected = logits(model, {"fr": 0.5, "legal": 2.0})
    model.disable_adapter_layers()

    assert torch.equal(base, logits(model))
    assert {"fr", "legal"} <= set(model.swap_state.stored)
    model.enable_adapter_layers()
    assert torch.equal(expected, logits(model))


def test_every_write_that_fails_leaves_what_was_active():
    """Fault injection at each write of the switch from one composition to another."""
    model = make()
    expected = logits(model, {"fr": 0.5, "legal": 2.0})
    state = model.swap_state
    for write in itertools.count():
        state.on_write = failing_at(write)
        try:
            model.set_adapter({"v1.0": 1.0, "fr": 0.1})
        except InjectedError:
            state.on_write = None
            assert Composition({"fr": 0.5, "legal": 2.0}) == model.active_composition
            assert ("fr", "legal") == state.lent
            assert ("v1.0",) == state.stored
            assert torch.equal(expected, logits(model))
        else:
            break
    assert 2 < write
    state.on_write = None
    assert torch.equal(expected, logits(model, {"fr": 0.5, "legal": 2.0}))


def test_nothing_of_it_is_left_after_unload():
    base = build(seed=1)
    keys, modules = list(base.state_dict()), [id(m) for m in base.modules()]
    expected = logits(base)
    model = make(base)
    model.set_adapter({"fr": 0.5, "legal": 2.0})

    assert base is model.unload()
    assert (keys, modules) == (list(base.state_dict()), [id(m) for m in base.modules()])
    assert torch.equal(expected, logits(base))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_compositions_and_threads_of_their_own(clone):
    model = make()
    expected = logits(model, {"fr": 0.5, "legal": 2.0})
    twin = clone(model)
    twin.set_adapter("v1.0")
    twin.delete_adapter("fr")

    assert torch.equal(expected, logits(model))
    with twin.activated("legal"):
        actual = logits(twin)
        assert torch.equal(expected, logits(model))
    assert torch.equal(actual, logits(model, "legal"))


def test_adapters_in_it_are_not_taken_away():
    model = make()
    model.set_adapter({"fr": 0.5, "legal": 2.0})
    message = r"Adapter 'fr' is in use by what is active \(0.5\*fr \+ 2\*legal\)"
    with pytest.raises(VariantError, match=message):
        model.delete_adapter("fr")
    with pytest.raises(VariantError, match=message):
        model.rename_adapter("fr", "de")

    model.delete_adapter("v1.0")
    model.set_adapter("legal")
    model.delete_adapter("fr")
    assert ["legal"] == list(model.peft_config)


def test_saving_and_loading_each_adapter_while_it_is_active(tmp_path):
    model = make()
    expected = logits(model, {"fr": 0.5, "legal": 2.0})
    model.save_pretrained(tmp_path)
    model.active_composition.save(tmp_path / "mix.json")
    other = AdaptionPromptModel.from_pretrained(build(seed=1), tmp_path / "fr", "fr")
    other.load_adapter(tmp_path / "legal", "legal")

    assert torch.equal(expected, logits(other.eval(), Composition.load(tmp_path / "mix.json")))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "expected adapter names with finite numbers, at least one, got none"),
        ({"fr": float("nan")}, r"got 'fr': nan\. Write"),
        ({"fr": "much"}, r"got 'fr': 'much'"),
        ({"fr": True}, r"got 'fr': True"),
        ({3: 1.0}, r"got 3: 1\.0"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(given, message):
    model = make()
    with pytest.raises(OptionsError, match=message):
        model.set_adapter(given)

    assert "fr" == model.active_adapter


def test_unknown_adapters_in_it_are_named():
    with pytest.raises(
        VariantError, match=r"Adapter 'a', 'b' does not exist: expected some of 'fr'"
    ):
        make().set_adapter({"fr": 1.0, "b": 1.0, "a": 1.0})


@pytest.mark.parametrize("text", ["{", "[1]", '{"weights": 3}', '{"weights": {}, "x": 1}'])
def test_files_that_hold_no_composition_are_refused(text, tmp_path):
    path = tmp_path / "mix.json"
    path.write_text(text)
    with pytest.raises(SurgeryError, match=r"mix\.json"):
        Composition.load(path)


# -- one adapter instead of several ------------------------------------------------------------------


def twins(**fields):
    """Return a model with adapters that have equal prompts and different gates."""
    config = AdaptionPromptConfig(
        **{"adapter_len": 3, "adapter_layers": 2, "gate": "head"} | fields
    )
    model = make(configs={"a": config, "b": config})
    state = adapter_state(model.adapter_modules("b"))
    state |= {k: t for k, t in adapter_state(model.adapter_modules("a")).items() if "prompt" in k}
    load_state_(model.adapter_modules("b"), state)
    return model


def tokens_of_one(*, bias=False, **fields):
    """Return a model with adapters of one token, over different layers."""
    configs = {
        name: AdaptionPromptConfig(adapter_len=1, adapter_layers=layers, **fields)
        for name, layers in (("a", 3), ("b", 1))
    }
    return make(build(shape=Shape(head_dim=6, attention_bias=bias), seed=1), configs)


@pytest.mark.parametrize(
    ("model", "chosen"),
    [
        (make, {"legal": -0.7}),
        (make, {"fr": 0.3}),
        (twins, {"a": 0.5, "b": -2.0}),
        (lambda: twins(gate_activation="tanh"), {"a": 0.5, "b": -2.0}),
        (tokens_of_one, {"a": 0.5, "b": -2.0}),
        (lambda: tokens_of_one(bias=True, gate_activation="tanh"), {"a": 0.5, "b": -2.0}),
    ],
    ids=[
        "one",
        "one, head",
        "equal prompts",
        "equal prompts, tanh",
        "one token",
        "one token, bias",
    ],
)
def test_a_weighted_sum_that_is_one_adapter_is_materialised(model, chosen, tmp_path):
    model = model()
    expected = logits(model, chosen)

    model.add_weighted_adapter(list(chosen), list(chosen.values()), "sum")

    assert error(logits(model, "sum"), expected) < 1e-5
    assert error(expected, logits(model, next(iter(chosen)))) > 1e-3
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "sum", "again")
    assert torch.equal(logits(model, "sum"), logits(model, "again"))


@pytest.mark.parametrize(
    ("model", "chosen", "message"),
    [
        (
            make,
            {"fr": 1, "legal": 1},
            r"at 'model\.layers\.1\.self_attn': prompts differ and have 3 and 5 tokens",
        ),
        (
            lambda: tokens_of_one(gate="head"),
            {"a": 1, "b": 1},
            r"at 'model\.layers\.2\.self_attn': prompts differ and so do the gates of their heads",
        ),
    ],
)
def test_a_weighted_sum_that_is_no_adapter_is_refused(model, chosen, message):
    model = model()
    with pytest.raises(OptionsError, match=message):
        model.add_weighted_adapter(list(chosen), list(chosen.values()), "sum")

    assert "sum" not in model.peft_config
    assert "sum" not in model.swap_state.names


def test_gates_that_add_up_to_nothing_are_refused_where_there_is_a_bias():
    model = tokens_of_one(bias=True)
    gates = [
        model.adapter_modules(n)["model.layers.2.self_attn"].adaption_gate.item() for n in "ab"
    ]
    with pytest.raises(OptionsError, match="add up to zero and the value projection has a bias"):
        model.add_weighted_adapter(["a", "b"], [1 / gates[0], -1 / gates[1]], "sum")


@pytest.mark.parametrize(("names", "values"), [(["fr"], [1, 2]), (["fr", "fr"], [1, 2])])
def test_one_weight_for_each_adapter(names, values):
    with pytest.raises(OptionsError, match="expected one weight for each, no adapter twice"):
        make().add_weighted_adapter(names, values, "sum")


# -- merged into a bias ------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "fields", [{}, {"gate": "head"}, {"gate_activation": "tanh"}, {"project_output": False}]
)
def test_one_token_merges_into_the_output_projections_bias(bias, fields):
    model = tokens_of_one(bias=bias, **fields)
    base = model.get_base_model()
    projections = [layer.self_attn.o_proj for layer in base.model.layers]
    expected = logits(model, "a")

    model.merge_adapter()

    assert error(logits(model), expected) < 1e-6
    assert not any("adaption" in name for name, _ in model.named_parameters())
    assert "a" == model.active_adapter
    assert all(
        p is not layer.self_attn.o_proj
        for p, layer in zip(projections, base.model.layers, strict=True)
    )
    model.unmerge_adapter()
    assert torch.equal(expected, logits(model))
    assert projections == [layer.self_attn.o_proj for layer in base.model.layers]


def test_a_composition_of_one_token_merges_too_and_stays_after_unload():
    model = tokens_of_one()
    expected = logits(model, {"a": 0.5, "b": -2.0})
    model.merge_adapter()
    assert error(logits(model), expected) < 1e-6
    assert ["a", "b"] == model.active_adapters
    model.unmerge_adapter()
    assert torch.equal(expected, logits(model))

    base = model.merge_and_unload()

    assert error(logits(base), expected) < 1e-6
    assert not any("adaption" in name for name in base.state_dict())


def test_what_cannot_be_merged_is_refused_and_stays():
    model = make()
    expected = logits(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            OptionsError, match=r"expected adapter_len=1, got '3'\. A longer prompt"
        ):
            call()
    with pytest.raises(VariantError, match="Model has no merged adapter"):
        model.unmerge_adapter()
    assert torch.equal(expected, logits(model))

    model.set_adapter("v1.0")
    model.disable_adapter_layers()
    with pytest.raises(
        OptionsError, match=r"merge_adapter has nothing to work on: .* got disabled"
    ):
        model.merge_adapter()
    model.enable_adapter_layers()
    model.merge_adapter()
    with pytest.raises(
        OptionsError, match=r"active adapter or composition, got one that is merged\."
    ):
        model.merge_adapter()
    with pytest.raises(VariantError, match=r"Adapter 'v1.0' is in use by what is active"):
        model.delete_adapter("v1.0")


def test_a_projection_that_is_no_linear_layer_is_not_merged():
    model = make(gpt2(), {"a": AdaptionPromptConfig(adapter_len=1, adapter_layers=1)})
    with pytest.raises(
        TypeError, match=r"at 'transformer.h.2.attn.c_proj': expected torch.nn.Linear, got Conv1D"
    ):
        model.merge_adapter()

    assert "a" == model.swap_state.active
