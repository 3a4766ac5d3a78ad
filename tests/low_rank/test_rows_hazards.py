"""Low-rank adapters by row, thread and task: what must not mix, what is refused, what is left behind."""

import asyncio
import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import pytest
import torch
from support.threads import Turns, inside
from surgery_low_rank import LowRankLinear, merge_, plugin
from torch import nn

from surgery_core import ContractError, DriftError, ModelRecipe, Session, VariantError
from surgery_core.testing import InjectedError, assert_unchanged, failing_at, snapshot

SELECT = {"a": "0", "b": None, "last": "2"}
"""Adapters for one layer, for all, and for the other layer."""
BASE = "__base__"
MIX = {"a": 0.5, "b": -2.0}
CHOICES = (BASE, "a", "b", "last", MIX, ["b", BASE, "a"], [MIX, "last", "last"])
X = torch.linspace(-2, 2, 24).unflatten(0, (3, 2, 4))


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False))


def edit(model=None, active="a"):
    adapters = {
        name: {"operation": "low_rank", "select": select, "options": {"r": number + 1}}
        for number, (name, select) in enumerate(SELECT.items())
    }
    recipe = ModelRecipe.model_validate({"adapters": adapters, "active": active})
    edited = Session([plugin], discover=False).plan_recipe(model or net(), recipe).apply()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in edited.adapters:
            for tensor in edited.tensors(name).values():
                tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))
    return edited


@pytest.fixture
def edited():
    return edit()


@torch.no_grad()
def output(edited):
    return edited.model(X)


def expected_outputs(edited):
    """Return what each choice gives when nothing else goes on, as text by choice."""
    found = {}
    for choice in CHOICES:
        with edited.activated(choice):
            found[str(choice)] = output(edited)
    assert len(CHOICES) == len({tuple(x.flatten().tolist()) for x in found.values()})
    return found


def test_a_context_leaves_the_very_objects_of_before(edited):
    """While it lasts there are layers that listen, where the active adapter has none."""
    before, expected, modules = snapshot(edited.model), output(edited), list(edited.model)
    keys = list(edited.model.state_dict())

    with edited.activated(["last", "a", BASE]):
        listener = edited.model[2]
        assert isinstance(listener, LowRankLinear)
        assert listener.weight is modules[2].weight
        assert keys == list(edited.model.state_dict())
        output(edited)

    assert all(old is new for old, new in zip(modules, edited.model, strict=True))
    assert_unchanged(before, edited.model, subject="A context")
    assert torch.equal(expected, output(edited))


def test_contexts_nest_and_errors_end_them(edited):
    expected, before = expected_outputs(edited), output(edited)
    with edited.activated("b"):
        with suppress(InjectedError), edited.activated(["b", BASE, "a"]):
            assert torch.equal(expected["['b', '__base__', 'a']"], output(edited))
            raise InjectedError
        with edited.activated(BASE):
            assert torch.equal(expected[BASE], output(edited))
        assert torch.equal(expected["b"], output(edited))
    assert torch.equal(before, output(edited))
    assert not edited.sharing.is_in_force


def test_what_is_active_may_change_meanwhile(edited):
    """The context keeps its rows; the main thread gets what is active."""
    expected = expected_outputs(edited)

    rows = ["b", BASE, "a"]
    with inside(edited.activated(rows)) as call, ExitStack() as stack:
        for change, choice in (
            (lambda: edited.set_active("last"), "last"),
            (lambda: edited.set_active(MIX), MIX),
            (lambda: stack.enter_context(edited.disabled()), BASE),
            (lambda: edited.set_active("b"), BASE),
            (stack.close, "b"),
        ):
            change()
            kept = BASE if choice == BASE else rows
            assert torch.equal(expected[str(kept)], call(output, edited)), choice
            assert torch.equal(expected[str(choice)], output(edited)), choice
    assert "b" == edited.active


@pytest.mark.slow
def test_threads_never_mix(edited):
    """Under load, with one that switches the active adapter all the while."""
    expected = expected_outputs(edited)
    running, switches, turns = [True], [], Turns()

    def run(choice):
        for _ in range(60):
            with turns.shared(), edited.activated(choice):
                for _ in range(2):
                    assert torch.equal(expected[str(choice)], output(edited)), choice

    def switch():
        while running:
            for choice in ("last", MIX, "b", "a"):
                edited.set_active(choice)
                switches.append(choice)
            with turns.alone(), edited.disabled(), edited.activated("b"):
                assert torch.equal(expected[BASE], output(edited))

    with ThreadPoolExecutor(len(CHOICES) + 1) as pool:
        switching = pool.submit(switch)
        try:
            for future in [pool.submit(run, choice) for choice in CHOICES]:
                future.result()
        finally:
            running.clear()
        switching.result()

    assert 4 < len(switches)
    assert not edited.sharing.is_in_force
    assert torch.equal(expected["a"], output(edited))


def test_tasks_of_one_thread_never_mix(edited):
    expected = expected_outputs(edited)

    async def run(choice):
        for _ in range(3):
            with edited.activated(choice):
                await asyncio.sleep(0)
                assert torch.equal(expected[str(choice)], output(edited))

    async def run_all():
        await asyncio.gather(*(run(choice) for choice in CHOICES))

    asyncio.run(run_all())


def test_two_models_in_one_context_do_not_mix(edited):
    other = edit(active="last")
    plain = output(other)
    with edited.activated("b"):
        assert torch.equal(plain, output(other))
        inside = output(edited)
        with other.activated(BASE):
            assert torch.equal(inside, output(edited))
            assert not torch.equal(plain, output(other))


def test_reverting_is_refused_while_an_adapter_is_used():
    model = net()
    before = snapshot(model)
    edited = edit(model)
    expected = expected_outputs(edited)["b"]

    with edited.activated(["b", BASE, BASE]):
        with pytest.raises(VariantError, match="Adapter 'b' is in use by a thread or task"):
            edited.revert()
        assert torch.equal(expected[0], output(edited)[0])
    edited.revert()

    assert_unchanged(before, model, subject="Contexts and revert")


def test_unknown_names_are_refused_and_nothing_is_used(edited):
    before = output(edited)
    with (
        pytest.raises(VariantError, match=r"Adapter 'nobody' does not exist: expected some of 'a'"),
        edited.activated(["a", "nobody"]),
    ):
        pytest.fail("never entered")

    assert not edited.sharing.is_in_force
    assert torch.equal(before, output(edited))


def test_a_module_replaced_meanwhile_is_noticed_and_nothing_is_used(edited):
    original = edited.model[2]
    edited.model[2] = nn.Identity()
    with pytest.raises(DriftError, match="drifted at '2'"), edited.activated("last"):
        pytest.fail("never entered")

    assert not edited.sharing.is_in_force
    edited.model[2] = original
    with edited.activated("last"):
        assert isinstance(edited.model[2], LowRankLinear)


def test_a_context_that_cannot_be_left_cleanly_leaves_a_model_that_computes_right(edited):
    expected = output(edited)
    context = edited.activated("last")
    context.__enter__()
    edited.swap_state.on_write = failing_at(0)
    with pytest.raises(InjectedError):
        context.__exit__(None, None, None)
    edited.swap_state.on_write = None

    assert not edited.sharing.is_in_force
    assert torch.equal(expected, output(edited))
    assert [nn.Linear, nn.Tanh, nn.Linear] == [type(module) for module in edited.revert()]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.load_state_dict({n: t + 1 for n, t in m.state_dict().items()}, assign=True),
        lambda m: setattr(m[2], "weight", nn.Parameter(m[2].weight + 1)),
        lambda m: m.double(),
    ],
    ids=["loaded", "set", "moved"],
)
def test_a_listener_has_the_weights_that_the_base_has_now(edited, change):
    """Also if it was used before those were replaced."""
    with edited.activated(["last", BASE, BASE]):
        output(edited)
    change(edited.model)
    x = X.to(edited.model[0].weight.dtype)
    with torch.no_grad():
        with edited.disabled():
            expected = edited.model(x)
        with edited.activated(["last", BASE, BASE]):
            actual = edited.model(x)

    assert torch.equal(expected[1:], actual[1:])
    assert not torch.allclose(expected[0], actual[0])


def test_hooks_of_the_base_fire_in_listeners(edited):
    calls = []
    handle = edited.model[2].register_forward_hook(lambda *_: calls.append(1))
    with edited.activated("last"):
        output(edited)
        assert [1] == calls
        handle.remove()
        output(edited)
    assert [1] == calls


# -- merged layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["a", "b", "last", BASE, ["last", BASE, BASE]], ids=str)
def test_nothing_is_used_by_row_or_thread_while_the_active_adapter_is_merged(edited, choice):
    """Its terms are in the weights that everybody has, also if others are for other layers."""
    merge = merge_(edited)
    merged = output(edited)
    with (
        pytest.raises(ContractError, match=r"'a' cannot be active .* got a merged layer at '0'"),
        edited.activated(choice),
    ):
        pytest.fail("never entered")

    assert not edited.sharing.is_in_force
    assert torch.equal(merged, output(edited))
    merge.unmerge()
    with edited.activated(choice):
        output(edited)


@pytest.mark.parametrize("active", ["b", "last"])
def test_what_was_merged_and_is_not_active_is_refused_where_it_is(edited, active):
    """There the active adapter has the weight of before, and others have not."""
    merge = merge_(edited)
    edited.set_active(active)

    for choice in ("a", "b", MIX, *([BASE, "last"] if active == "b" else [])):
        with pytest.raises(ContractError, match="merged"), edited.activated(choice):
            pytest.fail("never entered")

    assert not edited.sharing.is_in_force
    merge.unmerge()
    with edited.activated("a"):
        output(edited)


@pytest.mark.parametrize("choice", ["last", [BASE, "last", BASE]], ids=str)
def test_adapters_for_other_layers_stand_on_the_merged_base(edited, choice):
    """As they do when they are active, and as without any adapter."""
    merge_(edited)
    edited.set_active("last")
    expected = output(edited)
    with edited.disabled():
        base = output(edited)
    with edited.activated(choice):
        actual = output(edited)

    assert torch.equal(expected[1], actual[1])
    if choice != "last":
        assert torch.equal(base[0], actual[0])


@pytest.mark.parametrize("choice", ["a", "last", BASE, [BASE, "last", "a"]], ids=str)
def test_merging_is_refused_while_something_is_used(edited, choice):
    """Also at layers for which nothing is used."""
    before = snapshot(edited.model)
    with edited.activated(choice):
        for target in (edited, edited.variant("a"), edited.variant("last")):
            with pytest.raises(ContractError, match="one that rows or threads use other variants"):
                merge_(target)
    assert_unchanged(before, edited.model, subject="Refused merges")
    merge_(edited)


def test_a_merged_adapter_is_not_made_active_beside_others(edited):
    merge_(edited)
    edited.set_active("last")
    with (
        edited.activated("last"),
        pytest.raises(ContractError, match="'a' cannot be active while threads or rows"),
    ):
        edited.set_active("a")
    assert "last" == edited.active


# -- copies, compiled code, others' modules ------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_made_in_a_context_are_nobodys(edited, copied):
    """They compute what the active adapter gives, wherever they are called."""
    expected = output(edited)
    with edited.activated(["last", "b", BASE]):
        twin = copied(edited.model)
        assert isinstance(twin[2], LowRankLinear)
        assert all(module.sharing is None for module in (twin[0], twin[2]))
        with torch.no_grad():
            assert torch.equal(expected, twin(X))

    with torch.no_grad():
        assert torch.equal(expected, twin(X))


class Counting:
    """A backend for `torch.compile` that counts graphs and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def _nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_code_leaves_the_graph_in_a_context_and_has_one_outside(edited):
    backend = Counting()
    compiled = torch.compile(edited.model, backend=backend)
    expected = expected_outputs(edited)
    with torch.no_grad():
        assert torch.equal(expected["a"], compiled(X))
        assert 1 == backend.graphs
        for choice in CHOICES:
            with edited.activated(choice):
                torch.testing.assert_close(compiled(X), expected[str(choice)], msg=str(choice))
        assert 1 < backend.graphs
        assert torch.equal(expected["a"], compiled(X))


@pytest.mark.slow
@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("choice", ["b", "last", BASE, ["b", BASE, "a"]], ids=str)
def test_code_compiled_whole_refuses_to_run_in_a_context(edited, choice):
    backend = Counting()
    compiled = torch.compile(edited.model, backend=backend, fullgraph=True)
    expected = output(edited)
    with torch.no_grad():
        assert torch.equal(expected, compiled(X))
        with (
            edited.activated(choice),
            pytest.raises(Exception, match="it would not see which variants a thread uses"),
        ):
            compiled(X)
        assert torch.equal(expected, compiled(X))
    assert 1 == backend.graphs


def test_layers_that_are_not_called_stay_as_they_are():
    """What attention modules of PyTorch read for themselves is no adapter's, and no row's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4))
    adapters = {n: {"operation": "low_rank", "select": "1", "options": {"r": 2}} for n in "ab"}
    recipe = ModelRecipe.model_validate({"adapters": adapters, "active": "a"})
    edited = Session([plugin], discover=False).plan_recipe(model, recipe).apply()
    attention, projection = model[0], model[0].out_proj

    with edited.activated(["b", BASE, BASE]):
        assert attention is model[0]
        assert projection is model[0].out_proj
        with torch.no_grad():
            found, _ = model[0](X, X, X)
            assert found.shape == model[1](found).shape
