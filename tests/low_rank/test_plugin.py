"""The plugin runs the contract suite of the core, over wide and narrow bases."""

import pytest
import torch
from surgery_low_rank import LowRankOperation, plugin
from torch import nn

from surgery_core import ContractError, Rule, Session
from surgery_core.testing import OperationContract


class Block(nn.Module):
    """Two linear layers, one without a bias."""

    def __init__(self, size=6):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.up = nn.Linear(size, 2 * size, bias=False)
        self.down = nn.Linear(2 * size, size)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Pair(nn.Module):
    """One block under two names."""

    def __init__(self):
        super().__init__()
        self.first = self.second = Block()

    def forward(self, x):
        return self.second(self.first(x))


class _Contract(OperationContract):
    """What all the cases below share."""

    options = (("r", 2), ("lora_alpha", 16))
    dtype = torch.float32

    def session(self):
        return Session([plugin], discover=False)

    def make_model(self):
        return nn.Sequential(Block(), Block(), nn.Linear(6, 3)).to(self.dtype)

    def make_aliased_model(self):
        return Pair().to(self.dtype)

    def rules(self):
        return [Rule(operation="low_rank", options=dict(self.options))]

    def run(self, model):
        return model(torch.linspace(-1, 1, 24, dtype=self.dtype).unflatten(0, (4, 6)))


class TestDefault(_Contract):
    """Every linear layer."""


class TestNarrowBase(_Contract):
    """Matrices in float32 beside layers in bfloat16."""

    dtype = torch.bfloat16


class TestNamed(_Contract):
    """Layers chosen by name, with dropout and the other factor."""

    options = (("target_modules", ("up",)), ("use_rslora", True), ("lora_dropout", 0.3))


class TestForInference(_Contract):
    """Matrices that are not trained."""

    options = (("inference_mode", True),)


def test_the_operation_is_offered_by_name():
    session = Session([plugin], discover=False)

    assert isinstance(session.plugins.operation("low_rank"), LowRankOperation)


def test_the_installed_plugin_is_found():
    """Discovery makes the operation nameable, under the distribution's name."""
    infos = {info.name: info for info in Session().plugins.infos}

    info = infos["low_rank"]
    assert info.error is None
    assert ("low_rank",) == info.operations
    assert info.distribution.startswith("surgery-low-rank ")
    assert ("surgery_operations",) == tuple(info.hooks)


class ReadsWeight(nn.Module):
    """As Mamba's mixer: one layer is called, of the other the weight is read."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.called(x) @ self.read.weight.T


def test_a_layer_whose_owner_reads_its_weight_is_refused():
    """What was added would be trained for nothing, and merging would change the model."""
    model = nn.Sequential(ReadsWeight())
    with pytest.raises(ContractError) as caught:
        Session([plugin], discover=False).plan(model, [Rule(operation="low_rank")])
    assert str(caught.value) == (
        "Operation 'low_rank' cannot work at '0.read': expected a layer that is called, got one "
        "whose weight ReadsWeight reads. Exclude it: what was added would be passed over."
    )
    rule = Rule(operation="low_rank", exclude="**.read")
    assert ["0.called"] == [
        edit.fqn for edit in Session([plugin], discover=False).plan(model, [rule]).document.edits
    ]


@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba", "Jamba"])
def test_state_space_models_keep_what_they_read(kind):
    """Their mixers read the weight of `dt_proj`; T5 asks `wo` for its dtype alone."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 8}
    if kind == "Jamba":
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 2}
        sizes |= {"mamba_d_state": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
        sizes |= {"use_mamba_kernels": False}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    rule = Rule(operation="low_rank", options={"target_modules": ["dt_proj"]})
    with pytest.raises(ContractError, match=f"one whose weight {kind}\\w*Mixer reads"):
        Session([plugin], discover=False).plan(model, [rule])
    rule = Rule(operation="low_rank", options={"target_modules": ["in_proj"]})
    assert Session([plugin], discover=False).plan(model, [rule]).document.edits


def test_a_layer_that_is_asked_for_its_dtype_is_none_of_them():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 8, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    with torch.device("meta"):
        model = transformers.T5EncoderModel(transformers.T5Config(**sizes))
    rule = Rule(operation="low_rank", options={"target_modules": ["wo"]})
    assert 1 == len(Session([plugin], discover=False).plan(model, [rule]).document.edits)
