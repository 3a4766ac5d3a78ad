"""Tensors that processes hold together are gathered, loaded and kept in place; here by a group of one."""

import pytest
import torch
import torch.distributed as dist
from core.edits import recipe
from core.toys import Gate, Net, Shift, example, session
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from surgery_core import (
    BoundRule,
    ContractError,
    Overlay,
    Plan,
    Rule,
    StateError,
    SwapState,
    diagnose,
    fingerprint,
    is_sharded,
    load_tensors_,
    make_overlay,
    one_writer,
    replicate_,
    reshard_,
    whole_module,
    whole_tensor,
    whole_tensors,
)


@pytest.fixture(autouse=True)
def _process_group(tmp_path):
    """Be the only process of a group."""
    where = f"file://{tmp_path / 'init'}"
    dist.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def mesh():
    return init_device_mesh("cpu", (1,))


def sharded(tensor):
    return distribute_tensor(tensor, mesh(), [Shard(0)])


def shard(model):
    return fully_shard(model, mesh=mesh())


class Louder(Overlay):
    """A toy overlay."""

    overlay_prefix = "Louder"

    def forward(self, x):
        return self.gain * super().forward(x)


def louder(base):
    return make_overlay(
        base, Louder, parameters={"gain": nn.Parameter(torch.ones(1))}, attributes={}
    )


def test_whole_tensors_gathers_what_is_sharded_and_nothing_else():
    plain = torch.arange(4.0)

    found = whole_tensors({"plain": plain, "sharded": sharded(plain)})

    assert found["plain"] is plain
    assert type(found["sharded"]) is torch.Tensor
    assert torch.equal(plain, found["sharded"])
    assert [False, True] == [is_sharded(tensor) for tensor in (plain, sharded(plain))]


def partitioned():
    """Return a parameter as DeepSpeed leaves it between calls."""
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_id, parameter.ds_shape = 3, torch.Size((2, 2))
    return parameter


def test_a_tensor_that_deepspeed_partitioned_is_refused():
    with pytest.raises(StateError) as caught:
        whole_tensor(partitioned())

    assert (
        "Tensor is partitioned by DeepSpeed (ZeRO-3): expected whole values, got none. Read it "
        "inside `deepspeed.zero.GatheredParameters`."
    ) == str(caught.value)


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.filterwarnings("ignore:When using ``NO_SHARD``:UserWarning")
def test_parameters_that_fsdp1_flattened_are_refused():
    """By itself, and of a model that was wrapped after the recipe was applied, which computes right."""
    model = Net().eval()
    edited = session(Gate(), Shift()).plan_recipe(model, recipe()).apply()
    with torch.no_grad():
        expected = model(example())
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))

    with torch.no_grad():
        with edited.disabled():
            pass
        assert torch.equal(expected, wrapped(example()))
    state = {
        name: torch.zeros(tensor.shape) for name, tensor in edited.tensors(edited.active).items()
    }
    with pytest.raises(StateError, match=r"got one that FSDP1 has flattened"):
        edited.load_(edited.active, state)
    with pytest.raises(StateError) as caught:
        whole_tensors(edited.tensors(edited.active))

    assert (
        "Tensor is flattened by FullyShardedDataParallel (FSDP1): expected whole values, got a "
        "piece. Use `fully_shard` (FSDP2)."
    ) == str(caught.value)


def test_nothing_is_loaded_into_what_deepspeed_partitioned():
    with pytest.raises(
        StateError, match=r"mismatched 'w: expected a parameter with values, got one that"
    ):
        load_tensors_({"w": partitioned()}, {"w": torch.ones(2, 2)}, subject="No fit", fix="Stop.")


def test_a_variant_that_deepspeed_does_not_know_is_refused():
    model = Net().eval()
    state = variants(model, a=False, b=False)
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape = number, parameter.shape

    with pytest.raises(ContractError, match=r"^Variant 'b' cannot enter a sharded model at 'head'"):
        state.set("b")

    assert "a" == state.active


def test_a_model_is_the_same_one_when_it_is_partitioned():
    model = nn.Linear(2, 2, bias=False)
    before = fingerprint(model)

    model.weight = partitioned()

    assert before == fingerprint(model)


def test_files_of_what_deepspeed_partitioned_are_written_by_one_process():
    with one_writer([partitioned()]) as is_writer:
        assert is_writer


def test_a_tensor_that_deepspeed_has_gathered_is_whole():
    parameter = nn.Parameter(torch.ones(2, 2))
    parameter.ds_id, parameter.ds_shape = 3, torch.Size((2, 2))

    assert whole_tensor(parameter) is parameter


def test_files_are_written_by_one_process_that_the_others_wait_for():
    with one_writer([torch.zeros(1), sharded(torch.zeros(2))]) as is_writer:
        assert is_writer
    with one_writer([torch.zeros(1)]) as is_writer:
        assert is_writer


def test_replicate_leaves_what_the_first_process_has():
    tensor, expected = torch.arange(3.0), torch.arange(3.0)
    spread = nn.Linear(2, 2, bias=False)
    spread.weight = nn.Parameter(sharded(spread.weight.detach()))

    for beside in (nn.Linear(2, 2), spread):
        replicate_(tensor, beside)

    assert torch.equal(expected, tensor)


def test_whole_module_computes_without_the_forward_that_was_put_there():
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    x = torch.randn(4, 3)
    expected = module(x)
    module[0].weight = nn.Parameter(sharded(module[0].weight.detach()))
    module[0].forward = lambda _: None

    whole = whole_module(module)

    assert torch.equal(expected, whole(x))
    assert is_sharded(module[0].weight)
    assert whole_module(module[1]) is module[1]


def test_loading_keeps_parameters_sharded():
    model = Net().eval()
    edited = session(Gate(), Shift()).plan_recipe(model, recipe()).apply()
    shard(model)
    name = edited.active
    values = {key: torch.randn(tensor.shape) for key, tensor in edited.tensors(name).items()}

    edited.load_(name, values)

    found = edited.tensors(name)
    assert all(map(is_sharded, found.values()))
    assert values.keys() == found.keys()
    assert all(torch.equal(values[key], whole) for key, whole in whole_tensors(found).items())


def test_parameters_of_the_root_are_resharded_after_a_pass():
    model = shard(Net().eval())
    with torch.no_grad():
        model(example())
    assert not any(map(is_sharded, model.parameters()))

    reshard_(model)

    assert all(map(is_sharded, model.parameters()))


def test_a_model_is_the_same_one_after_it_was_sharded():
    model = Net()
    before = fingerprint(model)

    shard(model.layers[0])
    shard(model)

    assert before == fingerprint(model)


def test_the_base_of_an_overlay_is_sharded_with_it():
    """Otherwise each process would keep it whole, and what was added could not be told from it."""
    base = nn.Linear(2, 3)
    model = nn.Sequential(louder(base))

    shard(model)

    assert all(map(is_sharded, base.parameters()))
    assert base.weight is model[0].weight
    x = torch.randn(1, 2)
    with torch.no_grad():
        expected = model(x)
        assert base.weight is model[0].weight
    reshard_(model)
    assert base.weight is model[0].weight
    assert all(map(is_sharded, base.parameters()))
    assert expected.shape == (1, 3)


@pytest.mark.parametrize("is_gathered", [False, True])
def test_an_overlay_that_was_not_there_when_its_base_was_sharded_keeps_what_it_has(is_gathered):
    """The base's parameters are gathered for another module, and freed after its pass."""
    base = nn.Linear(2, 3)
    model, other = nn.Sequential(louder(base)), louder(base)
    weight = other.weight
    shard(model)
    if is_gathered:
        with torch.no_grad():
            model(torch.randn(1, 2))
        reshard_(model)

    other.take_over()

    assert other.weight is weight
    assert not is_sharded(weight)


# -- variants -------------------------------------------------------------------------------------


def variants(model, **frozen):
    """Return a swap state with a variant for each name, which is frozen or not, the first selected."""
    state = SwapState(model)
    rule = BoundRule(rule=Rule(operation="shift", select="head"), operation=Shift())
    for name, is_frozen in frozen.items():
        state.add(name, Plan.draft(model, [rule], originals=state.originals()))
        state.variant(name)["head"].shift.requires_grad_(not is_frozen)
    state.set(next(iter(frozen)))
    return state


def test_frozen_variants_enter_a_sharded_model_and_the_sharded_one_comes_back():
    model = Net().eval()
    state = variants(model, a=False, b=True)
    shard(model)
    with torch.no_grad():
        expected = model(example())

        state.set("b")
        assert "b" == state.active
        state.set("a")

        assert torch.equal(expected, model(example()))


def test_a_trainable_variant_that_was_not_sharded_is_refused():
    model = Net().eval()
    state = variants(model, a=False, b=False)
    shard(model)
    actual = "trainable ones that each process has for itself"

    with pytest.raises(ContractError) as caught:
        state.set("b")

    assert (
        "Variant 'b' cannot enter a sharded model at 'head': expected parameters that were sharded "
        f"with it, or frozen ones, got {actual}. Make it active before the model is sharded, "
        "or freeze its parameters."
    ) == str(caught.value)
    assert ("head", actual) == (caught.value.fqn, caught.value.actual)
    assert "a" == state.active


def test_a_trainable_variant_enters_a_model_of_which_other_parts_are_sharded():
    model = Net().eval()
    state = variants(model, a=False, b=False)
    shard(model.layers[0])

    state.set("b")

    assert "b" == state.active


# -- preflight ------------------------------------------------------------------------------------


def test_a_model_that_is_spread_is_noted_once():
    model = Net()
    model.head.weight = nn.Parameter(
        distribute_tensor(model.head.weight.detach(), mesh(), [Replicate()])
    )

    assert [
        "1 module spread over processes at 'head': each process has a part of their weights. Apply "
        "in all of them; what needs whole weights is refused."
    ] == [str(found) for found in diagnose(model)]
    assert ["FSDPModule"] == [found.subject for found in diagnose(shard(Net()))]


def test_partitioned_parameters_are_refused():
    model = Net()
    model.head.weight = partitioned()

    assert [
        "1 module partitioned by DeepSpeed at 'head': their parameters are empty between calls "
        "(ZeRO-3). Load the model without `zero.Init`, and apply before `deepspeed.initialize`."
    ] == [str(found) for found in diagnose(model) if found.level == "error"]
