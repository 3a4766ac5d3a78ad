"""Prompts that depend on features of each row: the formula, who gets which features, and refusals."""

import asyncio
import copy
import pickle
import threading

import pytest
import torch
from support.drawn import logits_in_one, logits_stepwise
from support.families import Shape, build, gpt2, open_gates_, scaling, tokens
from support.reference import reference_model
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel, conditioned

from surgery_core import OptionsError

SIZE = 5
CONDITIONED = AdaptionPromptConfig(
    adapter_len=3, adapter_layers=2, gate="head", condition_size=SIZE, condition_rank=2
)
PLAIN = AdaptionPromptConfig(adapter_len=4, adapter_layers=3)
OWN = ("adaption_prompt", "adaption_gate", "adaption_condition_down", "adaption_condition_up")


def features(rows=2, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, SIZE, generator=generator).to(dtype)


def make(base=None, config=CONDITIONED, **others):
    """Return a model whose adapter "a" is conditioned and active."""
    model = AdaptionPromptModel(base or build(seed=1), {"a": config, **others}, "a").eval()
    for seed, name in enumerate(model.peft_config):
        open_gates_(model.adapter_modules(name), seed=seed)
    return model


def reference_logits(base, own, ids, given, factor, activation="identity"):
    """Return the logits by the formula, row by row, each with a prompt of its own.

    `own` has the adapter's four tensors by FQN, in the order of `OWN`; `given` each row's features.
    """
    rows = []
    for row in range(len(ids)):
        adapters = {}
        for fqn, (prompt, gate, down, up) in own.items():
            attention = base.get_submodule(fqn)
            heads = attention.config.num_attention_heads
            shift = torch.stack([up[i] @ (down @ given[row]) for i in range(len(up))])
            adapters[attention] = prompt[0] + shift, gate.expand(heads)
        with reference_model(base, adapters, scaling=factor, activation=activation):
            rows.append(base(ids[row : row + 1], use_cache=False).logits)
    return torch.cat(rows)


def own_tensors(model, name="a"):
    return {
        fqn: [getattr(module, name).detach().double().clone() for name in OWN]
        for fqn, module in model.adapter_modules(name).items()
    }


def error(actual, expected):
    assert torch.isfinite(actual).all()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("activation", ["identity", "tanh"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "gpt2"])
def test_each_row_follows_the_formula(family, activation):
    """In float64 against the slow reference: grouped heads, fused projections, biases, scalings."""

    def base():
        return gpt2().double() if family == "gpt2" else build(family, dtype=torch.float64, seed=1)

    config = AdaptionPromptConfig(
        adapter_len=3,
        adapter_layers=2,
        gate="head",
        gate_activation=activation,
        condition_size=SIZE,
        condition_rank=2,
    )
    model = make(base(), config)
    ids, given = tokens(3), features(3, dtype=torch.float64)
    factor = 6**-0.5 if family == "gpt2" else scaling(family, Shape())

    with torch.no_grad():
        actual = model(ids, condition=given, use_cache=False).logits
        expected = reference_logits(base(), own_tensors(model), ids, given, factor, activation)
        swapped = model(ids, condition=given.flip(0), use_cache=False).logits

    assert error(actual, expected) < 1e-12
    assert error(swapped, expected) > 1e-3


@pytest.mark.parametrize("gate", ["layer", "head"])
def test_gradients_follow_the_formula(gate):
    """Of all four tensors and of the features, in training mode."""
    config = AdaptionPromptConfig(
        adapter_len=3, adapter_layers=2, gate=gate, condition_size=SIZE, condition_rank=2
    )
    model = make(build(dtype=torch.float64, seed=1), config).train()
    given = features(dtype=torch.float64).requires_grad_()
    own = {fqn: [t.requires_grad_() for t in found] for fqn, found in own_tensors(model).items()}
    theirs = features(dtype=torch.float64).requires_grad_()
    weights = torch.randn(2, 7, 40, dtype=torch.float64)

    (model(tokens(), condition=given).logits * weights).sum().backward()
    base = build(dtype=torch.float64, seed=1).train()
    expected = reference_logits(base, own, tokens(), theirs, 8**-0.5)
    (expected * weights).sum().backward()

    assert error(given.grad, theirs.grad) < 1e-11
    for fqn, module in model.adapter_modules("a").items():
        for name, tensor in zip(OWN, own[fqn], strict=True):
            assert tensor.grad.any()
            assert error(getattr(module, name).grad, tensor.grad) < 1e-11, name


def test_at_first_only_the_gate_gets_a_gradient():
    model = AdaptionPromptModel(build(seed=1), {"a": CONDITIONED}, "a").train()

    model(tokens(), labels=tokens(), condition=features()).loss.backward()

    for module in model.adapter_modules("a").values():
        assert [False, True, False, False] == [bool(getattr(module, n).grad.any()) for n in OWN]


def test_features_of_zero_are_the_plain_prompt():
    plain = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, gate="head")
    model = make(build(dtype=torch.float64, seed=1), plain=plain)
    with torch.no_grad():
        for fqn, module in model.adapter_modules("plain").items():
            own = model.adapter_modules("a")[fqn]
            module.adaption_prompt.copy_(own.adaption_prompt)
            module.adaption_gate.copy_(own.adaption_gate)
        actual = model(tokens(), condition=torch.zeros(2, SIZE)).logits
        model.set_adapter("plain")
        expected = model(tokens()).logits

    assert error(actual, expected) < 1e-14


def test_a_bfloat16_base_with_a_float32_adapter():
    model = make(build(dtype=torch.bfloat16, seed=1))
    exact = make(build(dtype=torch.bfloat16, seed=1).double(), CONDITIONED)
    with torch.no_grad():
        for fqn, module in model.adapter_modules("a").items():
            for name in OWN:
                assert torch.float32 is getattr(module, name).dtype
                getattr(exact.adapter_modules("a")[fqn], name).copy_(getattr(module, name))
        actual = model(tokens(), condition=features()).logits
        expected = exact(tokens(), condition=features()).logits
        without = exact(tokens(), condition=torch.zeros(2, SIZE)).logits

    assert torch.bfloat16 is actual.dtype
    assert error(actual.double(), expected) < 0.03
    assert error(without, expected) > 0.06


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_may_have_any_floating_dtype(dtype):
    model, given = make(), features().to(dtype)
    with torch.no_grad():
        expected = model(tokens(), condition=given.float()).logits

        assert torch.equal(expected, model(tokens(), condition=given).logits)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_decoding_with_a_cache_gives_the_same(backend):
    model = make(build(backend=backend, dtype=torch.float64, seed=1))
    ids = tokens()
    with torch.no_grad(), conditioned(features()):
        expected = logits_in_one(model, ids, torch.ones_like(ids))

        assert error(logits_stepwise(model, ids, torch.ones_like(ids)), expected) < 1e-13


def test_features_go_to_rows_in_succession():
    """A batch of n times as many rows is laid out as beam search does it."""
    model, ids = make(build(dtype=torch.float64, seed=1)), tokens(6)
    with torch.no_grad():
        actual = model(ids, condition=features(2)).logits
        expected = model(ids, condition=features(2).repeat_interleave(3, dim=0)).logits

    assert torch.equal(expected, actual)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}]
)
def test_generation_gives_each_row_its_features(options):
    model, ids, given = make(build(dtype=torch.float64, seed=1)), tokens(2, 5), 3 * features()
    fixed = {"max_new_tokens": 6, "attention_mask": torch.ones(2, 5, dtype=torch.long), **options}

    def generate(features):
        torch.manual_seed(0)
        return model.generate(ids, condition=features, **fixed)

    actual, other = generate(given), generate(given.flip(0))

    assert not torch.equal(actual, other)
    per = len(actual) // 2
    for row in range(2):
        of_row = given[row : row + 1].expand(2, -1)
        at = slice(row * per, (row + 1) * per)
        assert torch.equal(generate(of_row)[at], actual[at])


def test_threads_and_tasks_have_features_of_their_own():
    model, barrier = make(), threading.Barrier(2, timeout=20)
    expected, found = {}, {}
    with torch.no_grad():
        for seed in range(2):
            expected[seed] = model(tokens(), condition=features(seed=seed)).logits
    assert not torch.equal(expected[0], expected[1])

    def thread(seed):
        with torch.no_grad(), conditioned(features(seed=seed)):
            barrier.wait()
            found[seed] = model(tokens()).logits
            barrier.wait()

    threads = [threading.Thread(target=thread, args=(seed,)) for seed in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert all(torch.equal(expected[seed], found[seed]) for seed in range(2))

    async def task(seed):
        with conditioned(features(seed=seed)):
            await asyncio.sleep(0)
            return model(tokens()).logits

    async def both():
        return await asyncio.gather(task(0), task(1))

    # Not in the tasks: whether there are gradients is a thread's, not a task's.
    with torch.no_grad():
        of_tasks = asyncio.run(both())
    assert all(torch.equal(expected[seed], one) for seed, one in enumerate(of_tasks))


def test_contexts_nest_and_end():
    model = make()
    with torch.no_grad():
        expected = model(tokens(), condition=features(seed=1)).logits
        with conditioned(features()):
            with conditioned(features(seed=1)):
                inner = model(tokens()).logits
            outer = model(tokens()).logits

    assert torch.equal(expected, inner)
    assert not torch.equal(inner, outer)
    with pytest.raises(OptionsError, match="runs without features"):
        model(tokens())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            None,
            "Conditioned adapter runs without features: expected some of shape (rows, 5), got none. "
            "Pass condition= to the model or run it in `with conditioned(features):`; rows without "
            "any get zeros.",
        ),
        (
            torch.ones(2, 4),
            "Features do not fit the adapter: expected condition_size=5 for each row, got 4. Pass "
            "features of the kind that the adapter was trained with.",
        ),
        (
            torch.ones(3, 5),
            "Features do not fit the batch: expected 2 rows, or a number that divides it, got 3. "
            "Pass one row of features for each row of the batch.",
        ),
        (
            torch.ones(2, 5, dtype=torch.long),
            "Features are invalid: expected a floating-point tensor (rows, condition_size) with at "
            "least one row, got int64 of shape (2, 5). Pass one row of features for each row of the "
            "batch.",
        ),
        (
            torch.ones(5),
            "Features are invalid: expected a floating-point tensor (rows, condition_size) with at "
            "least one row, got float32 of shape (5,). Pass one row of features for each row of the "
            "batch.",
        ),
        (
            torch.ones(0, 5),
            "Features are invalid: expected a floating-point tensor (rows, condition_size) with at "
            "least one row, got float32 of shape (0, 5). Pass one row of features for each row of "
            "the batch.",
        ),
        (
            [[1.0] * 5],
            "Features are invalid: expected a floating-point tensor (rows, condition_size) with at "
            "least one row, got list. Pass one row of features for each row of the batch.",
        ),
    ],
)
def test_features_that_do_not_fit_are_refused(given, message):
    """By argument, before anything runs, and by context."""
    model = make()
    ran = []
    model.get_base_model().model.embed_tokens.register_forward_hook(lambda *_: ran.append(True))

    with pytest.raises(OptionsError) as caught:
        model(tokens(), condition=given)

    assert message == str(caught.value)
    assert ran == [True] * (given is None)
    if given is not None:
        with pytest.raises(OptionsError) as caught, conditioned(given):
            model.get_base_model()(tokens())
        assert message == str(caught.value)


def test_features_that_nobody_takes_are_refused():
    """Given as an argument, they would be ignored without a word."""
    model = make(plain=PLAIN)
    message = (
        "condition has no effect: expected an adapter with condition_size that is active, got none. "
        "Activate one, or leave condition out."
    )
    ran = []
    model.get_base_model().model.embed_tokens.register_forward_hook(lambda *_: ran.append(True))

    def refused(**arguments):
        for call in (model, model.generate):
            with pytest.raises(OptionsError) as caught:
                call(tokens(), condition=features(), **arguments)
            assert message == str(caught.value)

    refused(adapter_names=["plain", "plain"])
    with model.activated("plain"):
        refused()
    with model.disable_adapter():
        refused()
    with model.fixed_rows(2):
        refused()
    model.set_adapter("plain")
    refused()
    assert not ran
    # Others use the model in the same context.
    with conditioned(features()):
        model(tokens())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("choice", ["a", {"a": 0.5, "plain": 2.0}])
def test_copies_are_conditioned_too(duplicate, choice):
    model = make(plain=PLAIN)
    model.set_adapter(choice)
    with torch.no_grad():
        expected = model(tokens(), condition=features()).logits

        assert torch.equal(expected, duplicate(model)(tokens(), condition=features()).logits)
