"""Conditioned adapters beside others, on disk, compiled and recomputed, and in sessions."""

import json
from contextlib import nullcontext

import pytest
import torch
from support.families import build, open_gates_, tokens
from support.folders import without_header
from surgery_adaption_prompt import (
    AdapterStore,
    AdaptionPromptConfig,
    AdaptionPromptModel,
    adapter_state,
    conditioned,
    load_state_,
    plugin,
)
from surgery_adaption_prompt.checkpoints import expected_bytes
from surgery_adaption_prompt.config import config_schema
from surgery_adaption_prompt.parts import AttentionCall, folded_prompts
from surgery_adaption_prompt.show import show_folder

from surgery_core import ModelRecipe, OptionsError, Rule, Session, StateError, verify
from surgery_core.testing import OperationContract

FIELDS = {"adapter_len": 3, "adapter_layers": 2, "condition_size": 5, "condition_rank": 2}
CONDITIONED = AdaptionPromptConfig(gate="head", **FIELDS)
PLAIN = AdaptionPromptConfig(adapter_len=4, adapter_layers=3)
TOP = "model.layers.2.self_attn"
FEATURES, OTHERS = (torch.randn(2, 5, generator=torch.Generator().manual_seed(s)) for s in (0, 1))


def make(**configs):
    configs = configs or {"a": CONDITIONED}
    model = AdaptionPromptModel(build(seed=1), configs, "a").eval()
    for seed, name in enumerate(configs):
        open_gates_(model.adapter_modules(name), seed=seed)
    return model


def logits(model, features=FEATURES):
    with torch.no_grad():
        return model(tokens(), condition=features).logits


# -- beside others --------------------------------------------------------------------------------


def test_a_composition_adds_conditioned_and_plain_terms():
    """Weighted, of two conditioned adapters and a plain one, with the adapters' own parameters."""
    model = make(a=CONDITIONED, b=CONDITIONED, plain=PLAIN)
    weights = {"a": 0.7, "b": -0.4, "plain": 1.5}
    query = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(2))
    own = {name: model.adapter_modules(name)[TOP] for name in weights}

    def term(module):
        with torch.no_grad(), conditioned(FEATURES):
            return module.prompt_term(AttentionCall(query=query, scaling=0.3))

    expected = sum(weight * term(own[name]) for name, weight in weights.items())
    model.set_adapter(weights)
    module = model.get_base_model().get_submodule(TOP)

    assert torch.allclose(expected, term(module), atol=1e-6)
    assert not torch.allclose(expected, 1.5 * term(own["plain"]), atol=0.1)
    assert module.adaption_condition_up_a is own["a"].adaption_condition_up
    assert {"adaption_condition_up_plain"}.isdisjoint(module.state_dict())
    model(tokens(), labels=tokens(), condition=FEATURES).loss.backward()
    assert all(p.grad.any() for p in model.adapter_parameters(list(weights)))
    model.set_adapter("a")
    assert own["a"] is model.get_base_model().get_submodule(TOP)


def test_parameters_put_into_a_composition_are_the_adapters():
    """As `load_state_dict(assign=True)` does it, with new objects."""
    model = make(a=CONDITIONED, plain=PLAIN)
    model.set_adapter({"a": 1.0, "plain": 0.5})
    base = model.get_base_model()
    before = logits(model)
    base.load_state_dict({k: t + 0.1 for k, t in base.state_dict().items()}, assign=True)
    given = base.get_submodule(TOP).adaption_condition_up_a
    expected = logits(model)

    model.set_adapter("a")

    assert given is model.adapter_modules("a")[TOP].adaption_condition_up
    model.set_adapter({"a": 1.0, "plain": 0.5})
    assert torch.equal(expected, logits(model))
    assert not torch.equal(before, expected)


def test_a_whole_batch_may_use_it_while_another_is_active():
    model = make(a=CONDITIONED, plain=PLAIN)
    expected = logits(model)
    model.set_adapter("plain")

    with model.activated("a"):
        assert torch.equal(expected, logits(model))
    assert torch.equal(expected, logits_of_names(model, ["a", "a"]))


def logits_of_names(model, names):
    with torch.no_grad():
        return model(tokens(), adapter_names=names, condition=FEATURES).logits


@pytest.mark.parametrize("names", [["a", "plain"], ["plain", "a"], ["a", "__base__"], ["a", "b"]])
def test_rows_with_different_adapters_are_refused(names):
    model = make(a=CONDITIONED, b=CONDITIONED, plain=PLAIN)

    with pytest.raises(OptionsError, match="without condition_size for such rows"):
        logits_of_names(model, names)

    assert "a" == model.active_adapter
    logits(model)


def test_rows_in_buffers_are_refused_and_stay_as_they_were():
    model = make(a=CONDITIONED, plain=PLAIN)
    with model.fixed_rows(2) as rows:
        rows.assign(["plain", "__base__"])
        with torch.no_grad():
            expected = model(tokens()).logits

        with pytest.raises(OptionsError, match="has no prompt without features"):
            rows.assign(["plain", "a"])

        with torch.no_grad():
            assert torch.equal(expected, model(tokens()).logits)


def test_no_prompt_is_made_without_looking_at_features():
    """For whoever asks an adapter for keys and values that hold for every row."""
    module = make().adapter_modules("a")[TOP]
    (part,) = module.prompts

    with pytest.raises(OptionsError, match=r"no prompt without features.*got condition_size=5"):
        folded_prompts([(module, part)], AttentionCall(query=torch.ones(1, 4, 1, 8), scaling=0.3))


def test_it_is_not_merged_nor_written_as_a_sum():
    config = AdaptionPromptConfig(adapter_len=1, adapter_layers=2, condition_size=5)
    model = make(a=config)
    expected = logits(model)
    message = (
        "Merging is not possible with conditioned adapters: expected adapters without "
        "condition_size, got 'a'. Give the whole batch one adapter with set_adapter or activated."
    )

    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(OptionsError) as caught:
            call()
        assert message == str(caught.value)
    with pytest.raises(OptionsError, match="prompts depend on features"):
        model.add_weighted_adapter(["a"], [1.0], "sum")

    assert torch.equal(expected, logits(model))


# -- on disk --------------------------------------------------------------------------------------


def test_saved_and_loaded_it_computes_the_same(tmp_path):
    model = make()
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["a"])

    fresh = AdaptionPromptModel.from_pretrained(build(seed=1), tmp_path / "a", "a")

    assert torch.equal(expected, logits(fresh))
    assert (5, 2) == (fresh.peft_config["a"].condition_size, fresh.peft_config["a"].condition_rank)
    values = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert ("SURGERY_ADAPTION_PROMPT", 5) == (values["peft_type"], values["condition_size"])


def test_peft_gets_none(tmp_path):
    config = AdaptionPromptConfig(**FIELDS)
    model = AdaptionPromptModel(build(seed=1), {"a": config}, "a")

    with pytest.raises(StateError, match=r"cannot be written for PEFT: .*depend on no features"):
        model.save_pretrained(tmp_path, for_peft=True)

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(f"{TOP}.adaption_condition_up"), "missing .*adaption_condition_up"),
        (lambda s: s.update(x=torch.ones(1)), "unexpected 'x'"),
        (
            lambda s: s.update({f"{TOP}.adaption_condition_down": torch.ones(5, 2)}),
            r"adaption_condition_down: expected shape \(2, 5\), got \(5, 2\)",
        ),
        (
            lambda s: s.update({f"{TOP}.adaption_condition_up": torch.full((24, 2), torch.nan)}),
            "adaption_condition_up: values are not finite",
        ),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    model = make()
    expected = logits(model)
    modules = model.adapter_modules("a")
    state = {name: torch.ones_like(tensor) for name, tensor in adapter_state(modules).items()}
    change(state)

    with pytest.raises(StateError, match=message):
        load_state_(modules, state)

    assert torch.equal(expected, logits(model))


def test_hot_swaps_need_the_same_sizes(tmp_path):
    wider = AdaptionPromptConfig(gate="head", **{**FIELDS, "condition_size": 6})
    plain = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, gate="head")
    model = make(a=CONDITIONED, b=CONDITIONED, wider=wider, plain=plain)
    model.save_pretrained(tmp_path)
    before = logits(model)

    for name, message in (
        ("wider", r"expected shape \(2, 5\), got \(2, 6\)"),
        ("plain", "missing"),
    ):
        with pytest.raises(StateError, match=message):
            model.hotswap_adapter(tmp_path / name, "a")
        assert torch.equal(before, logits(model))
    model.hotswap_adapter(tmp_path / "b", "a")

    after = logits(model)
    model.set_adapter("b")
    assert torch.equal(logits(model), after)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_store_loads_it_and_knows_its_size(tmp_path, dtype):
    config = AdaptionPromptConfig(gate="head", dtype=dtype, **FIELDS)
    model = make(a=config)
    expected = logits(model)
    model.save_pretrained(tmp_path)

    assert model.adapter_bytes("a") == expected_bytes(tmp_path / "a")
    plain = {"default": PLAIN}
    served = AdaptionPromptModel(build(seed=1), plain, "default", store=AdapterStore(tmp_path))
    with served.eval().activated("a"):
        assert torch.equal(expected, logits(served))


def test_what_is_printed_names_the_features(tmp_path):
    model = make(a=CONDITIONED, plain=PLAIN)
    model.save_pretrained(tmp_path)

    assert "3 + f(5)" in str(model.status())
    a, plain = model.status().adapters
    assert ("3 + f(5)", 5, 2) == (a.prompt_kind, a.condition_size, a.condition_rank)
    assert ("4", None, None) == (plain.prompt_kind, plain.condition_size, plain.condition_rank)
    assert sum(p.numel() for p in model.adapter_parameters(["a"])) == a.num_parameters
    shown = show_folder(str(tmp_path))
    assert ["3 + f(5)", "4"] == [row[3] for row in shown.rows]
    assert 5 == shown.data["adapters"][0]["condition_size"]
    assert not shown.notes


def test_what_is_shown_of_a_folder_says_what_is_missing(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    path = without_header(tmp_path / "a") / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "condition_size": 6}))

    (note,) = show_folder(str(tmp_path)).notes

    assert (
        "Adapter 'a' is not what its configuration says: expected features of size 6 projected with "
        "rank 2, got 'model.layers.1.self_attn.adaption_condition_down: [2, 5]', "
        "'model.layers.2.self_attn.adaption_condition_down: [2, 5]'."
    ) == note


# -- recomputed and compiled ----------------------------------------------------------------------


@pytest.mark.parametrize("backward_in", [nullcontext, lambda: conditioned(OTHERS)])
def test_checkpointed_layers_are_recomputed_with_the_features_of_their_forward(backward_in):
    model = make().train()

    def gradients(features):
        model.zero_grad()
        loss = model(tokens(), labels=tokens(), condition=features).loss
        with backward_in():
            loss.backward()
        return torch.cat([p.grad.flatten() for p in model.adapter_parameters(["a"])])

    expected, other = gradients(FEATURES), gradients(OTHERS)
    model.activation_checkpointing_enable()

    assert torch.equal(expected, gradients(FEATURES))
    assert not torch.equal(expected, other)


@pytest.fixture
def _nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
def test_compiled_code_sees_the_features_of_each_call():
    model = make()
    expected = [logits(model), logits(model, OTHERS)]
    assert not torch.allclose(*expected, atol=1e-3)
    compiled = torch.compile(model.get_base_model(), backend="aot_eager")

    for features, wanted in zip((FEATURES, OTHERS) * 2, expected * 2, strict=True):
        with torch.no_grad(), conditioned(features):
            assert torch.allclose(wanted, compiled(tokens()).logits, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
def test_whole_graphs_and_exported_programs_are_refused_with_the_reason():
    base = make().get_base_model()

    with torch.no_grad(), conditioned(FEATURES):
        whole = torch.compile(base, fullgraph=True, backend="eager")
        with pytest.raises(Exception, match="features differ from call to call"):
            whole(tokens())
        with pytest.raises(OptionsError, match="Conditioned adapter cannot be exported"):
            torch.export.export(base, (tokens(),), {"use_cache": False})


# -- configurations and sessions ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"condition_size": 0}, "condition_size must be an integer of at least 1, got 0"),
        ({"condition_size": True}, "condition_size must be an integer of at least 1, got True"),
        ({"condition_size": 4, "condition_rank": 0}, "condition_rank must be an integer of at lea"),
        ({"condition_rank": 4}, "condition_rank=4 needs condition_size, got None"),
    ],
)
def test_sizes_are_checked(options, message):
    with pytest.raises(OptionsError, match=message):
        AdaptionPromptConfig(adapter_len=1, adapter_layers=1, **options)


def test_configurations_round_trip_and_have_a_schema():
    assert CONDITIONED == AdaptionPromptConfig.from_mapping(CONDITIONED.to_mapping())
    assert {"condition_size", "condition_rank"} <= config_schema()["properties"].keys()
    assert {"condition_size"}.isdisjoint(PLAIN.to_mapping())


def test_the_plan_says_what_apply_adds():
    session, base = Session([plugin], discover=False), build()
    plan = session.plan(base, [Rule(operation="adaption_prompt", options=CONDITIONED.to_mapping())])
    promised = {spec.name: spec.shape for spec in plan.document.edits[-1].added}

    plan.apply()

    module = base.get_submodule(TOP)
    assert promised == {name: tuple(getattr(module, name).shape) for name in promised}
    assert (2, 5) == promised["adaption_condition_down"]
    assert (24, 2) == promised["adaption_condition_up"]
    assert 4 == len(promised)


def test_conditioned_adapters_of_a_recipe_are_verified():
    """With features of each adapter's own size."""
    adapters = {
        name: {"operation": "adaption_prompt", "options": {**FIELDS, "condition_size": size}}
        for name, size in (("a", 5), ("b", 7))
    }
    recipe = ModelRecipe.model_validate({"adapters": adapters, "active": "b"})
    edited = Session([plugin], discover=False).plan_recipe(build(), recipe).apply()

    outcome = verify(edited, {"input_ids": tokens()})

    assert outcome.is_ok, outcome.render()
    assert {"ok"} == {check.status for check in outcome.checks}
    with pytest.raises(OptionsError, match="runs without features"):
        edited.model(tokens())


class TestConditionedContract(OperationContract):
    """The core's contract suite, with features handed to every pass."""

    identity_at_init = True
    # Features are looked up between graphs.
    fullgraph = False

    def session(self):
        return Session([plugin], discover=False)

    def make_model(self):
        return build()

    def rules(self):
        return [Rule(operation="adaption_prompt", options={"gate": "head", **FIELDS})]

    def run(self, model):
        with conditioned(FEATURES):
            return model(tokens()).logits
