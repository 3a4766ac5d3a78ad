"""What of a gate a process uses whose heads are not all; with two processes in `tests/distributed`."""

import pytest
import torch
import torch.distributed as dist
from support.families import build, tokens
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from surgery_adaption_prompt.architectures import architecture_of
from surgery_adaption_prompt.spread_heads import own_part
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from surgery_core import ContractError, is_sharded


@pytest.fixture(autouse=True)
def _process_group(tmp_path):
    """Be the only process of a group."""
    where = f"file://{tmp_path / 'init'}"
    dist.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def spread(tensor, shape=(1,)):
    placements = [Shard(0)] * len(shape)
    return nn.Parameter(distribute_tensor(tensor, init_device_mesh("cpu", shape), placements))


@pytest.mark.parametrize("length", [1, 4])
def test_a_gate_is_used_and_trained(length):
    gate = torch.arange(1.0, length + 1, dtype=torch.float64).requires_grad_()

    found = own_part(gate, [spread(torch.zeros(4, 2))], heads=4, total=4)

    assert torch.equal(gate, found)
    (found * torch.arange(1.0, length + 1)).sum().backward()
    assert torch.equal(torch.arange(1.0, length + 1, dtype=torch.float64), gate.grad)
    assert torch.autograd.gradcheck(
        lambda given: own_part(given, [spread(torch.zeros(4, 2))], heads=4, total=4), gate
    )


def test_heads_that_are_not_in_equal_blocks_have_no_part():
    """Where nothing says which processes there are, or those with other heads are not all of them."""
    gate, spread_twice = torch.zeros(4), spread(torch.zeros(4, 2), (1, 1))

    assert own_part(gate, [torch.zeros(4, 2)], heads=4, total=4) is None
    assert own_part(gate, [spread(torch.zeros(4, 2))], heads=2, total=4) is None
    assert own_part(gate, [spread_twice], heads=4, total=4) is None


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_heads_that_cannot_be_told_apart_are_refused(family):
    """A query with fewer heads than there are, for which no projection is spread, or a fused one is."""
    attention = build(family).model.layers[0].self_attn
    architecture = architecture_of(attention, fqn="x")
    gate = torch.zeros(4)

    assert architecture.own_gate(attention, gate, heads=4) is gate
    with pytest.raises(ContractError) as caught:
        architecture.own_gate(attention, gate, heads=2)

    assert (
        f"Operation 'adaption_prompt' cannot work at {type(attention).__name__!r}: expected equal "
        "parts of 4 heads in each process, of separate projections, got 2 here. Spread the model "
        "over a number of processes that divides its heads."
    ) == str(caught.value)


def test_an_adapter_of_a_sharded_model_is_saved_and_loaded(tmp_path):
    """As one of a model that is not, the record of its base included."""
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=2)
    models = [AdaptionPromptModel(build(), {"default": config}, "default") for _ in range(2)]
    mesh = init_device_mesh("cpu", (1,))
    expected = [p.detach().clone() for p in models[0].adapter_parameters(["default"])]
    for layer in models[0].model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(models[0], mesh=mesh)
    with torch.no_grad():
        logits = models[0](tokens(2, 7)).logits

    models[0].save_pretrained(tmp_path)
    models[1].hotswap_adapter(tmp_path, "default", base_check="error")
    models[0].hotswap_adapter(tmp_path, "default", base_check="error")

    assert all(map(is_sharded, models[0].adapter_parameters(["default"])))
    for model in models:
        found = [
            p.full_tensor() if is_sharded(p) else p for p in model.adapter_parameters(["default"])
        ]
        assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    with torch.no_grad():
        assert torch.equal(logits, models[1](tokens(2, 7)).logits)


@pytest.mark.parametrize("what", ["merge_adapter", "fixed_rows"])
def test_what_needs_whole_weights_is_refused(what):
    config = AdaptionPromptConfig(adapter_len=1, adapter_layers=1)
    adapted = AdaptionPromptModel(build(), {"default": config}, "default")
    attention = adapted.model.model.layers[2].self_attn
    attention.o_proj.weight = spread(attention.o_proj.weight.detach())
    calls = {
        "merge_adapter": adapted.merge_adapter,
        "fixed_rows": lambda: adapted.fixed_rows(1).__enter__(),
    }

    with pytest.raises(
        ContractError, match=r"expected whole weights, got some that are spread over"
    ):
        calls[what]()


def test_a_trainable_adapter_does_not_enter_a_model_that_was_sharded_as_a_whole():
    """Also where only the object around the base knows."""
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=2)
    adapted = AdaptionPromptModel(build(), {"default": config, "other": config}, "default")
    fully_shard(adapted, mesh=init_device_mesh("cpu", (1,)))
    with torch.no_grad():
        adapted(tokens(2, 7))

    with pytest.raises(ContractError, match=r"^Variant 'other' cannot enter a sharded model at"):
        adapted.set_adapter("other")

    assert "default" == adapted.active_adapter
    assert all(map(is_sharded, adapted.adapter_parameters(["default"])))
