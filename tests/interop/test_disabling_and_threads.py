"""Disabling wins over rows and threads; what runs in another thread never gets another adapter."""

import asyncio
import copy
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from support.families import build, open_gates_, tokens
from support.threads import inside
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from torch.utils.checkpoint import checkpoint

from surgery_core import ModelRecipe, Session, VariantError

IDS, ROWS = tokens(2, 6), ["a", "b"]
LENGTHS = {"a": 3, "b": 5}


class Prompts:
    """The model of prompts, and what a base rebuilt from its tensors gives."""

    def __init__(self):
        self.plain = build(seed=1)
        configs = {
            n: AdaptionPromptConfig(adapter_len=length, adapter_layers=3, gate="head")
            for n, length in LENGTHS.items()
        }
        self.face = AdaptionPromptModel(copy.deepcopy(self.plain), configs, "a").eval()
        for seed, name in enumerate(configs):
            open_gates_(self.face.adapter_modules(name), seed=seed)
        self.model, self.disabled = self.face, self.face.disable_adapter
        self.parameters = self.face.adapter_parameters


class Terms:
    """The same with low-rank terms by a recipe."""

    def __init__(self):
        self.plain = build(seed=1)
        one = {
            "operation": "low_rank",
            "options": {"r": 2, "target_modules": ["q_proj", "up_proj"]},
        }
        recipe = ModelRecipe.model_validate({"adapters": {"a": one, "b": one}, "active": "a"})
        self.face = Session().plan_recipe(copy.deepcopy(self.plain), recipe).apply()
        generator = torch.Generator().manual_seed(0)
        for name in ROWS:
            for tensor in self.face.tensors(name).values():
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
        self.model, self.disabled = self.face.model, self.face.disabled
        self.parameters = self.face.added_parameters


@pytest.fixture(params=[Prompts, Terms])
def made(request):
    return request.param()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def alone(made):
    """Return what the base and each active adapter give, when no code is in a block."""
    found = {"__base__": logits(made.plain)}
    for name in ROWS:
        getattr(made.face, "set_adapter", getattr(made.face, "set_active", None))(name)
        found[name] = logits(made.model)
    getattr(made.face, "set_adapter", getattr(made.face, "set_active", None))("a")
    assert 3 == len({tuple(x.flatten().tolist()) for x in found.values()})
    return found


# -- disabling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["b", ROWS, {"a": 0.5, "b": 2.0}], ids=str)
@pytest.mark.parametrize("is_first", [True, False], ids=["disabled first", "activated first"])
def test_the_base_computes_wherever_adapters_are_disabled(made, choice, is_first):
    """Bit for bit, and the adapters come back."""
    expected = logits(made.plain)
    with made.face.activated(choice):
        inner = logits(made.model)
    contexts = [made.disabled(), made.face.activated(choice)]
    with ExitStack() as stack:
        for context in contexts if is_first else reversed(contexts):
            stack.enter_context(context)
        assert torch.equal(expected, logits(made.model))
    with made.face.activated(choice):
        assert torch.equal(inner, logits(made.model))
    assert not torch.equal(expected, inner)


def test_names_for_rows_of_a_call_are_no_exception():
    made = Prompts()
    made.face.disable_adapter_layers()
    with torch.no_grad():
        assert torch.equal(logits(made.plain), made.model(IDS, adapter_names=ROWS).logits)
        expected = made.plain.generate(IDS, max_new_tokens=3, do_sample=False)
        actual = made.model.generate(IDS, max_new_tokens=3, do_sample=False, adapter_names=ROWS)
        assert torch.equal(expected, actual)
    made.face.enable_adapter_layers()
    with torch.no_grad():
        assert not torch.equal(expected, made.model(IDS, adapter_names=ROWS).logits)


def test_a_paused_recipe_gives_rows_the_base():
    made = Terms()
    for contexts in (
        (made.face.paused(), made.face.activated(ROWS)),
        (made.face.activated(ROWS), made.face.paused()),
    ):
        with contexts[0], contexts[1]:
            assert torch.equal(logits(made.plain), logits(made.model))


def test_disabling_is_for_threads_inside_activated_too(made):
    """Those that entered before, and those that enter then; each gets its adapter back."""
    expected = alone(made)
    with inside(made.face.activated("b")) as call:
        assert torch.equal(expected["b"], call(logits, made.model))
        with made.disabled():
            assert torch.equal(expected["__base__"], call(logits, made.model))
            with inside(made.face.activated(ROWS)) as other:
                assert torch.equal(expected["__base__"], other(logits, made.model))
        assert torch.equal(expected["b"], call(logits, made.model))


def test_blocks_of_several_threads_disable_until_the_last_has_ended(made):
    expected = alone(made)
    first, second = made.disabled(), made.disabled()
    with inside(first):
        second.__enter__()
        assert torch.equal(expected["__base__"], logits(made.model))
    assert torch.equal(expected["__base__"], logits(made.model))
    second.__exit__(None, None, None)
    assert torch.equal(expected["a"], logits(made.model))


@pytest.mark.parametrize("was_disabled", [True, False])
def test_checkpointing_recomputes_what_the_forward_ran_with(made, was_disabled):
    """Whether adapters are disabled by then or not."""
    hidden = torch.randn(2, 6, made.plain.config.hidden_size, requires_grad=True)

    def run(x):
        base = getattr(made.face, "get_base_model", lambda: made.model)()
        return base(inputs_embeds=x).logits

    def gradients(forward):
        hidden.grad = None
        for parameter in made.parameters(ROWS):
            parameter.grad = None
        with ExitStack() as stack:
            if was_disabled:
                stack.enter_context(made.disabled())
            with made.face.activated(ROWS):
                out = forward(hidden).square().sum()
        with ExitStack() as stack:
            if not was_disabled:
                stack.enter_context(made.disabled())
            out.backward()
        return [hidden.grad, *(parameter.grad for parameter in made.parameters(ROWS))]

    contexts = made.face.recompute_contexts
    expected = gradients(run)
    actual = gradients(lambda x: checkpoint(run, x, use_reentrant=False, context_fn=contexts))
    assert was_disabled == all(found is None for found in expected[1:])
    assert expected[0].any()
    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_saving_a_record_disturbs_no_block(tmp_path):
    made = Terms()
    expected, stop, wrong = alone(made)["b"], threading.Event(), []

    def use():
        with made.face.activated("b"):
            while not stop.is_set():
                if not torch.equal(expected, logits(made.model)):
                    wrong.append(1)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(use)
        for number in range(3):
            Session().save(made.face, tmp_path / str(number))
        stop.set()
        running.result()
    assert not wrong


# -- other threads -------------------------------------------------------------------------------------


def in_a_thread_started_inside(model, block):
    found = queue.Queue()

    def run():
        try:
            found.put(logits(model))
        except Exception as err:  # noqa: BLE001 (handed on)
            found.put(err)

    with block:
        threading.Thread(target=run).start()
        result = found.get(timeout=30)
    if isinstance(result, Exception):
        raise result
    return result


def in_a_thread_that_runs_on(model, block):
    """As streamers have it: the block has ended when the model runs."""
    start, found = threading.Event(), queue.Queue()

    def run():
        start.wait(30)
        try:
            found.put(logits(model))
        except Exception as err:  # noqa: BLE001 (handed on)
            found.put(err)

    with block:
        threading.Thread(target=run, daemon=True).start()
    start.set()
    result = found.get(timeout=30)
    if isinstance(result, Exception):
        raise result
    return result


def in_an_executor_made_inside(model, block):
    with block, ThreadPoolExecutor(1) as pool:
        return pool.submit(logits, model).result()


def in_an_executor_that_was_there(model, block):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        with block:
            return pool.submit(logits, model).result()


def in_a_loops_executor(model, block):
    async def run():
        with block:
            return await asyncio.get_running_loop().run_in_executor(None, logits, model)

    return asyncio.run(run())


def in_replicas(model, block):
    """What `nn.DataParallel` does with several devices."""
    with block, ThreadPoolExecutor(1) as pool:
        replicas = [module._replicate_for_data_parallel() for module in model.modules()]
        assert replicas
        return pool.submit(logits, model).result()


@pytest.mark.parametrize(
    "way",
    [
        in_a_thread_started_inside,
        in_a_thread_that_runs_on,
        in_an_executor_made_inside,
        in_an_executor_that_was_there,
        in_a_loops_executor,
        in_replicas,
    ],
)
def test_threads_that_have_not_entered_are_refused(made, way):
    """They would get the active adapter, where the code that they work for uses another."""
    with pytest.raises(VariantError, match=r"and has not entered it: .* Enter activated\(\.\.\.\)"):
        way(made.model, made.face.activated("b"))
    assert torch.equal(alone(made)["a"], logits(made.model))


def test_tasks_and_threads_that_python_gives_the_context_follow(made):
    expected = alone(made)

    async def run():
        with made.face.activated("b"):
            thread = asyncio.to_thread(logits, made.model)
            task = asyncio.create_task(asyncio.sleep(0, logits(made.model)))
            return await thread, await task

    for found in asyncio.run(run()):
        assert torch.equal(expected["b"], found)


def test_a_thread_that_enters_its_own_block_is_not_refused(made):
    expected = alone(made)

    def enter(choice):
        with made.face.activated(choice):
            return logits(made.model)

    with made.face.activated("b"), ThreadPoolExecutor(1) as pool:
        for choice in ("a", "__base__", "b"):
            assert torch.equal(expected[choice], pool.submit(enter, choice).result())


def test_the_main_thread_and_other_tasks_of_a_thread_get_the_active_adapter(made):
    expected = alone(made)

    async def use():
        with made.face.activated("b"):
            await asyncio.sleep(0.01)
            return logits(made.model)

    async def both():
        using = asyncio.create_task(use())
        await asyncio.sleep(0)
        return logits(made.model), await using

    with inside(made.face.activated("b")) as call:
        assert torch.equal(expected["a"], logits(made.model))
        assert torch.equal(expected["b"], call(logits, made.model))
    active, used = asyncio.run(both())
    assert torch.equal(expected["a"], active)
    assert torch.equal(expected["b"], used)


@pytest.mark.slow
def test_continuous_batching_inside_a_block_fails_with_our_error():
    """Its thread is its own; each request says why it has no tokens."""
    transformers = pytest.importorskip("transformers")
    made = Terms()
    sizes = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    greedy = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1)

    def generate():
        inputs = [[5, 6, 7, 8], [9, 10, 11]]
        options = {"generation_config": greedy, "continuous_batching_config": sizes}
        return list(made.model.generate_batch(inputs, **options).values())

    assert all(2 == len(found.generated_tokens) for found in generate())
    with made.face.activated("b"):
        refused = generate()
    assert 2 == len(refused)
    for found in refused:
        assert [] == found.generated_tokens
        assert "has not entered it" in found.error
