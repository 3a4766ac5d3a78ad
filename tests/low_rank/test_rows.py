"""Rows of a batch with low-rank adapters of their own: the formula's numbers, each as alone, trained."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.families import build, tokens
from surgery_low_rank import plugin
from surgery_low_rank.rows import LONG
from torch import nn
from torch.utils.checkpoint import checkpoint

from surgery_core import ModelRecipe, OptionsError, Session

OPTIONS = {
    "a": {"r": 2, "lora_alpha": 3},
    "b": {"r": 2, "lora_alpha": 0.7, "use_rslora": True},
    "wide": {"r": 2, "lora_alpha": 5, "dtype": "float64"},
    "big": {"r": 4, "lora_alpha": -2},
    "first": {"r": 3, "lora_alpha": 2},
}
"""Two that are stacked for short inputs, one of another dtype, one of another rank, one for one layer."""
SELECT = {"first": "0"}
MIX = {"a": 0.7, "b": -1.5}
BASE = "__base__"
CHOICES = (*OPTIONS, BASE, MIX)
IN, OUT = 4, 5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative to the largest output; bfloat16 has eight bits, and two layers of it follow each other."""

rows = st.lists(st.sampled_from(CHOICES), min_size=1, max_size=6)


def net():
    return nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN, bias=False))


def edit(model=None, active="a", options=None):
    options = options or OPTIONS
    adapters = {
        name: {"operation": "low_rank", "select": SELECT.get(name), "options": found}
        for name, found in options.items()
    }
    recipe = ModelRecipe.model_validate({"adapters": adapters, "active": active})
    edited = Session([plugin], discover=False).plan_recipe(model or net(), recipe).apply()
    fill_(edited)
    return edited


def fill_(edited):
    """Give every matrix values of its own."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in edited.adapters:
            for tensor in edited.tensors(name).values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))


def batch(num_rows, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_rows, *shape, IN, generator=generator).to(dtype)


def alone(edited, choice, x):
    """Return what a choice gives when it is the active one."""
    with torch.no_grad():
        if choice == BASE:
            with edited.disabled():
                return edited.model(x)
        before = edited.active
        edited.set_active(choice)
        found = edited.model(x)
        edited.set_active(before)
        return found


def formula(edited, choice, x):
    """Compute a row in float64, as the formula says, with the weights of the base."""
    weights = {BASE: {}}.get(choice, {choice: 1.0}) if isinstance(choice, str) else choice
    found = x.double()
    for fqn in "02":
        base = edited.swap_state.sites[fqn].module
        weight = base.weight.detach().double()
        for name, factor in weights.items():
            tensors = edited.tensors(name)
            if f"{fqn}.lora_A" in tensors:
                options = OPTIONS[name]
                root = math.sqrt(options["r"]) if options.get("use_rslora") else options["r"]
                product = tensors[f"{fqn}.lora_B"].double() @ tensors[f"{fqn}.lora_A"].double()
                weight = weight + factor * options["lora_alpha"] / root * product
        found = found @ weight.T.detach() + (base.bias.detach().double() if fqn == "0" else 0)
        found = found.tanh() if fqn == "0" else found
    return found


def error(actual, expected):
    assert torch.isfinite(actual).all()
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max()).item()


def check_rows(edited, choices, x, *, repeats=1):
    with torch.no_grad(), edited.activated(choices):
        actual = edited.model(x)
    for row, choice in enumerate(choices):
        at = slice(row * repeats, (row + 1) * repeats)
        expected = alone(edited, choice, x)[at]
        if choice == BASE:
            assert torch.equal(expected, actual[at])
        assert error(actual[at], expected) <= TOLERANCE[x.dtype], choice
    return actual


EDITED = edit()


@given(
    choices=rows,
    length=st.sampled_from([(1,), (2,), (LONG,), (2, 3), (0,)]),
    repeats=st.integers(1, 3),
    active=st.sampled_from(sorted(OPTIONS)),
)
def test_each_row_is_as_its_adapter_alone(choices, length, repeats, active):
    """Whatever is active, and whichever layers, ranks, dtypes and factors the adapters have."""
    EDITED.set_active(active)
    modules = list(EDITED.model)
    x = batch(len(choices) * repeats, *length)

    if x.numel():
        check_rows(EDITED, choices, x, repeats=repeats)
    else:
        with EDITED.activated(choices):
            assert x.shape == EDITED.model(x).shape

    assert active == EDITED.active
    assert modules == list(EDITED.model)


@pytest.mark.parametrize("length", [1, 3, LONG])
@pytest.mark.parametrize("base_dtype", [torch.float64, torch.float32])
def test_rows_follow_the_formula(length, base_dtype):
    edited = edit(net().to(base_dtype))
    x = batch(len(CHOICES), length, dtype=base_dtype)

    with torch.no_grad(), edited.activated(CHOICES):
        actual = edited.model(x)

    found = [formula(edited, choice, x[row]) for row, choice in enumerate(CHOICES)]
    for row, expected in enumerate(found):
        assert error(actual[row], expected) < TOLERANCE[base_dtype]
    # So that no row could pass for another.
    others = torch.stack([formula(edited, choice, x[0]) for choice in CHOICES])
    distances = torch.cdist(others.flatten(1), others.flatten(1)) + torch.eye(len(CHOICES))
    assert 1e-2 < distances.min()


def test_rows_computed_one_after_the_other_equal_their_adapter_bit_for_bit():
    x = batch(4, LONG)
    with torch.no_grad(), EDITED.activated(["a", "big", BASE, MIX]):
        actual = EDITED.model(x)

    for row, choice in enumerate(["a", "big", BASE, MIX]):
        assert torch.equal(alone(EDITED, choice, x[row : row + 1])[0], actual[row])


def test_many_rows_of_few_adapters():
    """They are not stacked, since that would copy the matrices for each."""
    check_rows(EDITED, ["a", "b", BASE] * 5, batch(15, 1))


def test_rows_in_bfloat16_have_float32_matrices_and_are_rounded_once():
    edited = edit(net().bfloat16(), options={"a": OPTIONS["a"], "b": OPTIONS["b"]})
    assert edited.variant("a")["0"].lora_A.dtype is torch.float32

    for length in (1, LONG):
        actual = check_rows(edited, ["b", BASE, "a"], batch(3, length, dtype=torch.bfloat16))
        assert actual.dtype is torch.bfloat16


def test_rows_under_autocast():
    x = batch(3, 2)
    choices = ["b", BASE, "a"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with EDITED.activated(choices):
            actual = EDITED.model(x)
        for row, choice in enumerate(choices):
            assert error(actual[row], alone(EDITED, choice, x)[row]) < 3e-2
    assert actual.dtype is torch.bfloat16


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("length", [1, LONG])
@pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
def test_what_is_not_finite_in_one_adapter_stays_in_its_rows(bad, length, matrix):
    edited = edit()
    # Of the last layer: no tanh comes after it.
    getattr(edited.variant("b")["2"], matrix).data[0, 0] = bad
    x = batch(3, length)
    with torch.no_grad(), edited.activated(["a", "b", BASE]):
        actual = edited.model(x)

    assert not torch.isfinite(actual[1]).all()
    assert error(actual[0], alone(edited, "a", x)[0]) < 1e-5
    assert torch.equal(alone(edited, BASE, x)[2], actual[2])


def test_equal_rows_are_one_choice():
    """So that they may be of any number, and of inputs without an axis for tokens."""
    x = batch(5)
    with torch.no_grad(), EDITED.activated([MIX, dict(MIX)]):
        actual = EDITED.model(x)

    assert torch.equal(alone(EDITED, MIX, x), actual)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_one_choice_is_the_active_one_bit_for_bit(choice):
    x = batch(3)
    with torch.no_grad(), EDITED.activated(choice):
        actual = EDITED.model(x)

    assert torch.equal(alone(EDITED, choice, x), actual)


def test_untrained_adapters_change_no_bit_of_any_row():
    edited = edit()
    for name in OPTIONS:
        for module in edited.variant(name).values():
            module.lora_B.data.zero_()
    for length in (1, LONG):
        x = batch(len(CHOICES), length)
        with torch.no_grad(), edited.activated(CHOICES):
            assert torch.equal(alone(edited, BASE, x), edited.model(x))


@pytest.mark.filterwarnings("ignore")
def test_rows_over_a_quantised_layer():
    """Of bitsandbytes, in four bits."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32)
    edited = edit(nn.Sequential(layer).to("cpu"), options={n: OPTIONS[n] for n in ("a", "b")})
    x = torch.randn(3, 2, 64)

    check_rows(edited, ["b", BASE, "a"], x)

    assert edited.revert()[0] is layer


# -- generation ----------------------------------------------------------------------------------------


@pytest.fixture
def llama():
    options = {"target_modules": ["q_proj", "v_proj", "o_proj", "up_proj"]}
    found = {name: {**OPTIONS[name], **options} for name in ("a", "b", "big")}
    edited = edit(build(seed=1), options=found)
    with torch.no_grad():
        for name in found:
            for tensor in edited.tensors(name).values():
                tensor.mul_(0.3)
    return edited


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}],
    ids=["greedy", "beams", "samples"],
)
def test_generation_gives_each_prompt_its_adapter(llama, options):
    """With a cache: the tokens of each choice alone."""
    ids, choices = tokens(4, 5), ["b", BASE, "big", {"a": 0.5, "b": -1.0}]
    options = {"max_new_tokens": 6, "attention_mask": torch.ones_like(ids), **options}
    options = {"do_sample": False, **options}

    def generate():
        torch.manual_seed(0)
        return llama.model.generate(ids, **options).unflatten(0, (4, -1))

    with llama.activated(choices):
        actual = generate()

    found = []
    for row, choice in enumerate(choices):
        with llama.activated(choice):
            found.append(generate())
        assert torch.equal(found[-1][row], actual[row])
    assert any(not torch.equal(found[0], other) for other in found[1:])


# -- training ------------------------------------------------------------------------------------------


def gradients(edited, run):
    """Return the gradients of every adapter's tensors, by adapter."""
    for name in edited.adapters:
        for tensor in edited.tensors(name).values():
            tensor.grad = None
    run()
    return {name: [t.grad for t in edited.tensors(name).values()] for name in edited.adapters}


@pytest.mark.parametrize("length", [2, LONG])
@pytest.mark.parametrize("is_training", [True, False])
def test_gradients_of_each_row_go_to_its_adapters_alone(length, is_training):
    """As the sum of what each choice gets from its row when it is active."""
    edited = edit(net().double())
    edited.model.train(is_training)
    choices = ["a", MIX, BASE, "b", "a"]
    x = batch(5, length, dtype=torch.float64).requires_grad_()

    def by_rows():
        with edited.activated(choices):
            out = edited.model(x)
        # Outside of the context.
        out.square().sum().backward()

    def separately():
        for row, choice in enumerate(choices):
            if choice == BASE:
                continue
            edited.set_active(choice)
            edited.model(x[row : row + 1]).square().sum().backward()
        with edited.disabled():
            edited.model(x[2:3]).square().sum().backward()

    actual, x_actual = gradients(edited, by_rows), x.grad
    x.grad = None
    expected = gradients(edited, separately)

    torch.testing.assert_close(x_actual, x.grad, rtol=1e-10, atol=1e-10)
    for name in ("a", "b"):
        assert all(found.any() for found in actual[name])
        # Matrices in float32 sum in that dtype.
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-4)
    for name in ("wide", "big", "first"):
        assert all(found is None for found in actual[name])


def test_a_pass_for_inference_leaves_a_context_that_trains():
    edited = edit()
    x = batch(3, 2)
    with edited.activated(["a", BASE, "b"]):
        with torch.inference_mode():
            expected = edited.model(x)
        actual = edited.model(x)
        actual.sum().backward()

    assert torch.equal(expected, actual)
    assert edited.variant("b")["0"].lora_B.grad.any()


def test_a_step_shows_at_once_in_a_context():
    """Nothing of the matrices is kept, also if an optimizer's writes are not counted."""
    edited = edit()
    x = batch(2, 1)
    with edited.activated(["a", "b"]):
        before = edited.model(x)
        optimizer = torch.optim.AdamW(edited.added_parameters(["a"]), lr=0.1, fused=True)
        before.square().sum().backward()
        optimizer.step()
        after = edited.model(x)

    assert not torch.allclose(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert error(after[0], alone(edited, "a", x)[0]) < 1e-5


def test_dropout_is_each_adapters_own_and_in_training_alone():
    dropped = {**OPTIONS["a"], "lora_dropout": 0.5}
    edited = edit(options={"a": dropped, "b": OPTIONS["b"]})
    x = batch(3, 2)
    plain = check_rows(edited.model.eval() and edited, ["b", "a", BASE], x)
    edited.model.train()

    with torch.no_grad(), edited.activated(["b", "a", BASE]):
        first, second = edited.model(x), edited.model(x)

    assert error(first[0], plain[0]) < 1e-5
    assert not torch.allclose(first[1], plain[1])
    assert not torch.allclose(first[1], second[1])
    assert torch.equal(first[2], plain[2])


def test_dropout_is_on_the_terms_input():
    """The same features are dropped as in the adapter alone, from the same seed."""
    edited = edit(options={"a": {**OPTIONS["a"], "lora_dropout": 0.5}})
    edited.model.train()
    x = batch(2, 3)
    torch.manual_seed(3)
    with torch.no_grad(), edited.activated([BASE, "a"]):
        actual = edited.model(x)[1]
    torch.manual_seed(3)
    with torch.no_grad():
        expected = edited.model(x[1:])[0]

    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("active", ["b", {"a": 2.0, "big": 1.0}], ids=["one", "several"])
@pytest.mark.parametrize("choices", [["a", MIX, BASE], "big", BASE], ids=str)
def test_checkpointing_recomputes_with_the_adapters_of_the_forward(choices, active):
    """Although the backward pass is outside of the context, and something else is active by then."""
    edited = edit(net().double())
    x = batch(3, 2, dtype=torch.float64).requires_grad_()

    def run(forward):
        def step():
            edited.set_active("first")
            with edited.activated(choices):
                out = forward(x)
            edited.set_active(active)
            with edited.activated("wide"):
                out.square().sum().backward()

        return gradients(edited, step)

    def checkpointed(x):
        contexts = edited.recompute_contexts
        return checkpoint(edited.model, x, use_reentrant=False, context_fn=contexts)

    expected = run(edited.model)
    actual = run(checkpointed)

    assert any(g is not None for found in expected.values() for g in found) == (choices != BASE)
    for name, found in expected.items():
        for mine, theirs in zip(actual[name], found, strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(theirs, mine)
    assert not edited.sharing.is_in_force


def test_checkpointing_recomputes_with_what_was_active():
    edited = edit(net().double())
    x = batch(2, 2, dtype=torch.float64).requires_grad_()

    def run(forward):
        def step():
            edited.set_active("a")
            first = forward(x).square().sum()
            edited.set_active(MIX)
            second = forward(x).square().sum()
            with edited.disabled():
                (first + second).backward()

        return gradients(edited, step)

    expected = run(edited.model)
    actual = run(
        lambda x: checkpoint(
            edited.model, x, use_reentrant=False, context_fn=edited.recompute_contexts
        )
    )

    for name in ("a", "b"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)


# -- inputs that are refused ---------------------------------------------------------------------------


def test_an_input_of_two_axes_is_refused_for_rows():
    """Its first axis may count the tokens of all rows; with one choice that does not matter."""
    x = batch(4)
    with EDITED.activated(["a", "b"]), pytest.raises(OptionsError) as caught:
        EDITED.model(x)

    assert str(caught.value) == (
        "Linear layer '0' got an input of shape (4, 4) for rows with variants of their own: expected "
        "(batch, ..., in_features) with at least three axes, since the first of two may count tokens. "
        "Give the whole batch one variant."
    )
    assert not EDITED.sharing.is_in_force


def test_a_batch_that_is_no_multiple_of_the_rows_is_refused():
    with (
        EDITED.activated(["a", "b"]),
        pytest.raises(OptionsError, match=r"layer '0' got a batch of 3 rows: expected 2, one for"),
    ):
        EDITED.model(batch(3, 2))


def test_rows_must_be_named():
    with pytest.raises(OptionsError, match="has no rows"), EDITED.activated([]):
        pytest.fail("never entered")
