"""The plugin runs the contract suite of the core, for both operations, both forms, and narrow bases."""

import torch
from surgery_scale_shift import ScaleShiftOperation, TunedNormOperation, plugin
from torch import nn

from surgery_core import Rule, Session
from surgery_core.testing import OperationContract


class Block(nn.Module):
    """Two linear layers, one without a bias, and norms of three kinds."""

    def __init__(self, size=6):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.up = nn.Linear(size, 2 * size, bias=False)
        self.middle_norm = nn.RMSNorm(2 * size)
        self.down = nn.Linear(2 * size, size)
        self.last = nn.BatchNorm1d(size)

    def forward(self, x):
        return x + self.last(self.down(torch.relu(self.middle_norm(self.up(self.norm(x))))))


class Pair(nn.Module):
    """One block under two names."""

    def __init__(self):
        super().__init__()
        self.first = self.second = Block()

    def forward(self, x):
        return self.second(self.first(x))


class _Contract(OperationContract):
    """What all the cases below share."""

    operation = "scale_shift"
    options = ()
    dtype = torch.float32

    def session(self):
        return Session([plugin], discover=False)

    def make_model(self):
        return nn.Sequential(Block(), Block(), nn.Linear(6, 3)).to(self.dtype)

    def make_aliased_model(self):
        return Pair().to(self.dtype)

    def rules(self):
        return [Rule(operation=self.operation, options=dict(self.options))]

    def run(self, model):
        return model(torch.linspace(-1, 1, 24, dtype=self.dtype).unflatten(0, (4, 6)))


class TestPaperForm(_Contract):
    """A scale and a bias on the output."""


class TestChatForm(_Contract):
    """A scale on the input, a bias on the output."""

    options = (("form", "chat65b"),)


class TestNarrowBase(_Contract):
    """Parameters in float32 around layers in bfloat16."""

    dtype = torch.bfloat16


class TestFrozen(_Contract):
    """Parameters that are not trained."""

    options = (("is_trainable", False),)


class TestNorms(_Contract):
    """Norms of every kind torch has here, running statistics included."""

    operation = "tuned_norm"


class TestNormsOfANarrowBase(_Contract):
    """Copies in float32 of norms in bfloat16."""

    operation = "tuned_norm"
    dtype = torch.bfloat16


class TestWideNorms(_Contract):
    """Copies kept in float64, which the state dict shows."""

    operation = "tuned_norm"
    options = (("dtype", "float64"),)


class TestSelectedNorm(_Contract):
    """A module that is chosen by the rule."""

    operation = "tuned_norm"

    def rules(self):
        options = {"modules": "selected"}
        return [Rule(operation="tuned_norm", select="**.up", options=options)]


def test_the_operations_are_offered_by_name():
    session = Session([plugin], discover=False)

    assert isinstance(session.plugins.operation("scale_shift"), ScaleShiftOperation)
    assert isinstance(session.plugins.operation("tuned_norm"), TunedNormOperation)


def test_the_installed_plugin_is_found():
    """Discovery makes the operations nameable, under the distribution's name."""
    infos = {info.name: info for info in Session().plugins.infos}

    info = infos["scale_shift"]
    assert info.error is None
    assert ("scale_shift", "tuned_norm") == info.operations
    assert info.distribution.startswith("surgery-scale-shift ")
    assert ("surgery_operations",) == tuple(info.hooks)
