"""Rows of a batch with adapters of their own: each as that adapter alone, base rows bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.families import build, gpt2, open_gates_, tokens
from support.reference import reference_model
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel

from surgery_core import OptionsError, VariantError

CONFIGS = {
    "fr": AdaptionPromptConfig(adapter_len=3, adapter_layers=2, gate="head"),
    "legal": AdaptionPromptConfig(adapter_len=5, adapter_layers=3, gate_activation="tanh"),
    "short": AdaptionPromptConfig(adapter_len=1, adapter_layers=1),
    "same": AdaptionPromptConfig(adapter_len=3, adapter_layers=2),
}
BASE = "__base__"
CHOICES = (*CONFIGS, BASE)
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 0.02, torch.float16: 4e-3}
"""Relative to the largest logit: a batched attention rounds otherwise than one of a single row."""

LONG = 33
"""Queries enough that rows are computed adapter by adapter."""

rows = st.lists(st.sampled_from(CHOICES), min_size=1, max_size=6)


def make(base=None, **configs):
    base = base or build(seed=1)
    configs = configs or CONFIGS
    model = AdaptionPromptModel(base, configs, next(iter(configs))).eval()
    for seed, name in enumerate(configs):
        open_gates_(model.adapter_modules(name), seed=seed)
    return model


def alone(model, name, ids, **inputs):
    """Return the logits of the model with one adapter, or none, in it."""
    with torch.no_grad():
        if name == BASE:
            with model.disable_adapter():
                return model(ids, **inputs).logits
        before = model.active_composition or model.active_adapter
        model.set_adapter(name)
        found = model(ids, **inputs).logits
        model.set_adapter(before)
        return found


def error(actual, expected):
    assert torch.isfinite(actual).all()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def check_rows(model, names, ids, **inputs):
    with torch.no_grad():
        actual = model(ids, adapter_names=names, **inputs).logits
    for row, name in enumerate(names):
        expected = alone(model, name, ids, **inputs)[row]
        if name == BASE:
            assert torch.equal(expected, actual[row])
        assert error(actual[row], expected) <= TOLERANCE[actual.dtype], name
    return actual


MODEL = make()


@given(names=rows, length=st.sampled_from([1, 2, 5, LONG]), active=st.sampled_from(sorted(CONFIGS)))
def test_each_row_is_as_its_adapter_alone(names, length, active):
    """Whatever is active, and whichever layers, lengths and gates the adapters have."""
    MODEL.set_adapter(active)
    modules = [layer.self_attn for layer in MODEL.get_base_model().model.layers]

    check_rows(MODEL, names, tokens(len(names), length))

    assert active == MODEL.active_adapter
    assert modules == [layer.self_attn for layer in MODEL.get_base_model().model.layers]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_rows_in_other_dtypes_and_families(dtype, family):
    model = make(build(family, dtype=dtype, seed=1))

    check_rows(model, ["fr", BASE, "legal", "short"], tokens(4, 9))
    check_rows(model, ["fr", BASE, "legal", "fr"], tokens(4, LONG))


def test_rows_follow_the_formula():
    """In float64 against the reference that is written from the paper."""
    model = make(build(seed=1, dtype=torch.float64))
    names = ["fr", "same", "fr"]
    with torch.no_grad():
        actual = model(tokens(3), adapter_names=names).logits
    for row, name in enumerate(names):
        modules = model.adapter_modules(name)
        base = build(seed=1, dtype=torch.float64)
        adapters = {
            base.get_submodule(fqn): (
                module.adaption_prompt.detach().double()[0],
                module.adaption_gate.detach().double().expand(4),
            )
            for fqn, module in modules.items()
        }
        with torch.no_grad(), reference_model(base, adapters, scaling=8**-0.5):
            expected = base(tokens(3)).logits
        assert error(actual[row], expected[row]) < 1e-12


def test_rows_with_padding():
    ids, mask = tokens(3, 6), torch.ones(3, 6, dtype=torch.long)
    mask[1, :2] = 0

    check_rows(make(), ["legal", "fr", BASE], ids, attention_mask=mask)


def test_rows_of_gpt2_before_and_after_the_output_projection():
    """Folders of PEFT's for GPT-2 add their term after it."""
    model = make(
        gpt2(),
        paper=AdaptionPromptConfig(adapter_len=3, adapter_layers=2),
        peft=AdaptionPromptConfig(adapter_len=2, adapter_layers=3, project_output=False),
    )

    check_rows(model, ["paper", "peft", BASE, "peft"], tokens(4))


def test_a_row_may_be_a_composition():
    model = make()
    mix = {"fr": 0.7, "legal": -0.4}
    with torch.no_grad():
        actual = model(tokens(3), adapter_names=["same", mix, BASE]).logits

    model.set_adapter(mix)
    with torch.no_grad():
        expected = model(tokens(3)).logits
    assert error(actual[1], expected[1]) < 1e-6
    assert error(actual[0], alone(model, "same", tokens(3))[0]) < 1e-6
    assert torch.equal(actual[2], alone(model, BASE, tokens(3))[2])


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}]
)
def test_generation_gives_each_prompt_its_adapter(options):
    """With a cache, beams and several samples for each prompt."""
    model, ids, names = make(), tokens(3, 5), ["legal", BASE, "fr"]
    arguments = {
        "attention_mask": torch.ones(1, 5, dtype=torch.long),
        "max_new_tokens": 6,
        **options,
    }
    torch.manual_seed(0)
    arguments["attention_mask"] = torch.ones(3, 5, dtype=torch.long)
    actual = model.generate(ids, adapter_names=names, **arguments)
    for row, name in enumerate(names):
        torch.manual_seed(0)
        with model.disable_adapter() if name == BASE else model.activated(name):
            expected = model.generate(ids, **arguments)
        per = len(actual) // 3
        assert torch.equal(
            actual[row * per : (row + 1) * per], expected[row * per : (row + 1) * per]
        )


def test_an_untrained_adapter_changes_no_bit_of_any_row():
    model = AdaptionPromptModel(build(seed=1), CONFIGS, "fr").eval()
    with torch.no_grad():
        actual = model(tokens(4), adapter_names=list(CONFIGS)).logits

    assert torch.equal(alone(model, BASE, tokens(4)), actual)


@pytest.mark.parametrize("length", [7, LONG])
def test_gradients_of_each_row_go_to_its_adapter(length):
    """As the sum of what each adapter alone gets from its row."""
    model, ids, names = make(), tokens(3, length), ["fr", "legal", BASE]
    parameters = model.adapter_parameters(["fr", "legal"])
    assert 2 * (2 + 3) == len(parameters)
    model(ids, adapter_names=names).logits.square().sum().backward()
    actual = [parameter.grad for parameter in parameters]
    model.zero_grad()
    for parameter in parameters:
        parameter.grad = None
    for row, name in enumerate(names[:2]):
        model.set_adapter(name)
        model(ids).logits[row].square().sum().backward()

    assert all(gradient.any() for gradient in actual)
    for gradient, parameter in zip(actual, parameters, strict=True):
        assert error(gradient, parameter.grad) < 1e-4
    assert all(parameter.grad is None for parameter in model.adapter_parameters(["same", "short"]))


def test_a_step_that_trains_rows_shows_at_once():
    model, names = make(), ["fr", "legal"]
    before = check_rows(model, names, tokens(2))
    optimizer = torch.optim.AdamW(model.adapter_parameters(names), lr=0.1, fused=True)
    model(tokens(2), labels=tokens(2), adapter_names=names).loss.backward()
    optimizer.step()

    assert error(check_rows(model, names, tokens(2)), before) > 1e-3


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.adapter_modules("legal")["model.layers.0.self_attn"].adaption_gate.data.mul_(3),
        lambda m: m.get_base_model().model.layers[2].self_attn.v_proj.weight.mul_(2),
        lambda m: m.to(torch.float64),
    ],
    ids=["a gate", "the base", "the dtype"],
)
def test_what_rows_keep_from_one_step_to_the_next_is_never_stale(change):
    model = make()
    with torch.no_grad(), model.activated(["fr", "legal"]):
        before = model(tokens(2)).logits
        assert torch.equal(before, model(tokens(2)).logits)
        # A write that PyTorch counts, unlike one through `.data`.
        change(model)
        for module in model.adapter_modules("legal").values():
            module.adaption_gate.add_(0)
        after = model(tokens(2)).logits

    assert error(after.float(), before) > 1e-4 or after.dtype is torch.float64
    check_rows(model, ["fr", "legal"], tokens(2))
    with torch.no_grad():
        again = model(tokens(2), adapter_names=["fr", "legal"]).logits
    assert torch.equal(again, after)


@pytest.mark.parametrize(
    ("names", "kind", "message"),
    [
        (["fr"], OptionsError, r"has 1 names for a batch of 2: expected one for each row"),
        (["fr"] * 4, OptionsError, r"has 4 names for a batch of 2: expected one for each row"),
        (["fr", "nobody"], VariantError, r"Adapter 'nobody' does not exist: expected some of"),
        ("fr", OptionsError, r"adapter_names is invalid: expected a list with a name for each"),
        ([], OptionsError, r"has 0 names for a batch of 2"),
    ],
)
def test_wrong_names_are_refused_and_nothing_changes(names, kind, message):
    model = make()
    before = alone(model, "fr", tokens(2))
    for call in (model, model.generate):
        with pytest.raises(kind, match=message):
            call(tokens(2), adapter_names=names)

    assert not model.sharing.is_in_force
    assert torch.equal(before, alone(model, "fr", tokens(2)))


def test_names_without_an_input_to_count_are_refused():
    with pytest.raises(OptionsError, match="no input_ids, inputs or inputs_embeds"):
        make()(attention_mask=torch.ones(2, 3), adapter_names=["fr", "fr"])


def test_a_batch_that_is_no_multiple_of_the_rows_is_refused():
    model = make()
    with model.activated(["fr", "legal"]), pytest.raises(OptionsError, match="Batch has 3 rows"):
        model(tokens(3))


def test_adapters_with_a_head_of_their_own_have_no_rows():
    model = make()
    model.add_adapter(
        "head", AdaptionPromptConfig(adapter_len=2, adapter_layers=1, modules_to_save=["lm_head"])
    )
    with pytest.raises(OptionsError, match="'head' cannot be used beside others: expected prompts"):
        model(tokens(2), adapter_names=["fr", "head"])


def test_adapters_that_skip_the_projection_of_a_llama_have_no_rows():
    model = make()
    model.add_adapter(
        "raw", AdaptionPromptConfig(adapter_len=2, adapter_layers=1, project_output=False)
    )
    with pytest.raises(
        OptionsError, match=r"'raw' cannot be used beside others: expected project_output"
    ):
        model(tokens(2), adapter_names=["fr", "raw"])
