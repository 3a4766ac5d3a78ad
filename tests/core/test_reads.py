"""Which code reads the parameters of a layer, on owners written in every way."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional

from surgery_core.reads import reads_parameters


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)


def through(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def unnamed(function):
    def inner(self, x):
        return function(self, x)

    return inner


def helper(owner, x):
    return functional.linear(x, owner.inner.weight)


class Reads(Owner):
    def forward(self, x):
        return functional.linear(x, self.inner.weight, self.inner.bias)


class ReadsTheBias(Owner):
    def forward(self, x):
        return self.inner(x) - self.inner.bias


class ReadsInAMethod(Owner):
    def forward(self, x):
        return self.slowly(x) if x.is_cpu else self.inner(x)

    def slowly(self, x):
        return self.inner.weight @ x.mT


class ReadsDecorated(Owner):
    @through
    def forward(self, x):
        return x @ self.inner.weight


class ReadsUnderADecorator(Owner):
    @unnamed
    def forward(self, x):
        return x @ self.inner.weight


class ReadsByALocalName(Owner):
    def forward(self, x):
        layer = self.inner
        return x @ layer.weight


class ReadsInAFunction(Owner):
    def forward(self, x):
        return helper(self, x)


class ReadsInALoop(Owner):
    def forward(self, x):
        return sum(row @ self.inner.weight for row in x)


class ReadsInItsBase(Reads):
    def forward(self, x):
        return super().forward(x)


class ReadsInAProperty(Owner):
    @property
    def turned(self):
        return self.inner.weight.T

    def forward(self, x):
        return x @ self.turned


class Calls(Owner):
    def forward(self, x):
        return self.inner(x)


class Asks(Owner):
    def forward(self, x):
        if isinstance(self.inner.weight, torch.Tensor) and self.inner.bias is not None:
            x = x.to(self.inner.weight.dtype).to(self.inner.weight.device)
        return self.inner(x).view(-1, self.inner.weight.shape[0])


class Initialises(Owner):
    def reset_parameters(self):
        nn.init.zeros_(self.inner.weight)

    def forward(self, x):
        return self.inner(x)


class ReadsAnother(Owner):
    def forward(self, x):
        return self.inner(x) @ self.other.weight


READING = [
    Reads,
    ReadsTheBias,
    ReadsInAMethod,
    ReadsDecorated,
    ReadsUnderADecorator,
    ReadsByALocalName,
    ReadsInAFunction,
    ReadsInALoop,
    ReadsInItsBase,
    ReadsInAProperty,
    nn.MultiheadAttention,
]


@pytest.mark.parametrize("owner", READING)
def test_code_that_computes_with_a_parameter_is_found(owner):
    name = "out_proj" if owner is nn.MultiheadAttention else "inner"
    assert reads_parameters(owner, name, ["weight", "bias"])


@pytest.mark.parametrize("owner", [Calls, Asks, Initialises, ReadsAnother, nn.Sequential, Owner])
def test_code_that_calls_or_asks_alone_is_not(owner):
    assert not reads_parameters(owner, "inner", ["weight", "bias"])
