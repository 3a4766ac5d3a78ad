"""Models and operations that the tests of the core share; none needs more than torch."""

import torch
from torch import nn

from surgery_core import (
    ContractError,
    Effects,
    OfClass,
    Operation,
    OptionsError,
    Session,
    TensorSpec,
    Where,
    hookimpl,
)


class Block(nn.Module):
    """A residual block with a buffer."""

    def __init__(self, size=4):
        super().__init__()
        self.up = nn.Linear(size, size)
        self.norm = nn.BatchNorm1d(size)
        self.down = nn.Linear(size, size, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.norm(self.up(x))))


class Net(nn.Module):
    """Three blocks in a list, and a head."""

    def __init__(self, size=4, *, blocks=3):
        super().__init__()
        self.stem = nn.Linear(size, size)
        self.layers = nn.ModuleList(Block(size) for _ in range(blocks))
        self.head = nn.Linear(size, 2)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Twice(nn.Module):
    """One model under two names."""

    def __init__(self, model):
        super().__init__()
        self.first = model
        self.second = model

    def forward(self, x):
        return torch.cat([self.first(x), self.second(x)])


def anchor_of(module):
    """Return the first floating-point parameter of a module, or a stand-in."""
    return next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))


class Gated(nn.Module):
    """A wrapper that owns the original: its output times one plus a gate of zero."""

    def __init__(self, inner, *, gate=0.0):
        super().__init__()
        self.inner = inner
        anchor = anchor_of(inner)
        self.gate = nn.Parameter(torch.full((1,), gate, dtype=anchor.dtype, device=anchor.device))

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs) * (1 + self.gate)


class Shifted(nn.Linear):
    """A replacement that takes over the parameters of a Linear and adds a shift of zero."""

    def __init__(self, base):
        super().__init__(1, 1, device="meta")
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.shift = nn.Parameter(torch.zeros_like(base.weight[:, 0]))

    def forward(self, x):
        return super().forward(x) + self.shift


def specs(module, prefix=""):
    """Describe the state dict of a module, under a prefix."""
    return tuple(
        TensorSpec(
            name=f"{prefix}{name}",
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            trainable=tensor.requires_grad,
        )
        for name, tensor in module.state_dict(keep_vars=True).items()
    )


class ToyOperation(Operation[dict]):
    """Options are a mapping whose keys are among `known`; targets are the Linears."""

    summary = "A toy."
    known = frozenset()

    def parse_options(self, options):
        unknown = sorted(options.keys() - self.known)
        if unknown:
            msg = f"Operation {self.name!r} does not know {unknown}."
            raise OptionsError(msg)
        return dict(options)

    def targets(self, _tree, _options):
        return OfClass(nn.Linear)


class Gate(ToyOperation):
    """Wrap any module; the wrapper owns it."""

    name = "gate"
    known = frozenset({"anything", "value"})

    def targets(self, tree, options):
        if options.get("anything"):
            return Where(lambda _fqn, _module: True, "anything")
        return super().targets(tree, options)

    def describe(self, site, _options):
        dtype = str(anchor_of(site.module).dtype).removeprefix("torch.")
        after = (
            TensorSpec(name="gate", shape=(1,), dtype=dtype),
            *specs(site.module, "inner."),
        )
        before = set(site.module.state_dict())
        # Keys of a module that is wrapped already are partly the same.
        return Effects(
            added=tuple(spec for spec in after if spec.name not in before),
            removed=tuple(sorted(before - {spec.name for spec in after})),
        )

    def build(self, site, options):
        return Gated(site.module, gate=options.get("value", 0.0))


class Shift(ToyOperation):
    """Replace a Linear by one that shares its parameters."""

    name = "shift"

    def describe(self, site, _options):
        if not isinstance(site.module, nn.Linear):
            msg = f"Module at {site.fqn!r} cannot be shifted."
            raise ContractError(msg, fqn=site.fqn, expected=nn.Linear, actual=type(site.module))
        dtype = str(site.module.weight.dtype).removeprefix("torch.")
        return Effects(
            added=(TensorSpec(name="shift", shape=(site.module.out_features,), dtype=dtype),)
        )

    def build(self, site, _options):
        return Shifted(site.module)


class Fresh(ToyOperation):
    """Replace a Linear by a new one that shares nothing."""

    name = "fresh"

    def describe(self, _site, _options):
        return Effects()

    def build(self, site, _options):
        old = site.module
        kind = {"dtype": old.weight.dtype, "device": old.weight.device}
        return nn.Linear(old.in_features, old.out_features, bias=old.bias is not None, **kind)


class ToyPlugin:
    """A plugin that offers the operations given; all toys if none are."""

    def __init__(self, *operations):
        self.offered = operations or (Gate(), Shift(), Fresh())

    @hookimpl
    def surgery_operations(self):
        return self.offered


def session(*operations):
    """Return a session that knows toy operations and nothing installed."""
    return Session(plugins=[ToyPlugin(*operations)], discover=False)


def example(rows=3, size=4, dtype=torch.float32):
    """Return an input, always the same."""
    return torch.linspace(-1, 1, rows * size, dtype=dtype).unflatten(0, (rows, size))
