"""The plugin runs the contract suite of the core, over wide and narrow bases."""

import torch
from surgery_low_rank import LowRankOperation, plugin
from torch import nn

from surgery_core import Rule, Session
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
