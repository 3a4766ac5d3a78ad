"""Operations that each break one promise; the contract suite must find every one."""

import copy
import random
from dataclasses import replace
from typing import ClassVar

import torch
from core.toys import Block, Fresh, Gate, Gated, Shift, Shifted
from torch import nn

from surgery_core import Effects


class MutatesInTargets(Gate):
    def targets(self, tree, options):
        tree["head"].visited = True
        return super().targets(tree, options)


class MutatesInDescribe(Gate):
    def describe(self, site, options):
        site.module.weight.requires_grad_(requires_grad=False)
        return super().describe(site, options)


class DrawsRandomNumbers(Gate):
    def describe(self, site, options):
        torch.rand(1)
        return super().describe(site, options)


class DrawsFromPython(Gate):
    def describe(self, site, options):
        random.random()  # noqa: S311 (no secret)
        return super().describe(site, options)


class MakesParameters(Gate):
    def describe(self, site, options):
        nn.Linear(2, 2, device="meta")
        return super().describe(site, options)


class ChangesItsMind(Gate):
    calls: ClassVar[list[int]] = []

    def describe(self, site, options):
        self.calls.append(1)
        found = super().describe(site, options)
        # A plan asks for 8 modules: every other plan is another way round.
        return replace(found, added=found.added[:: 1 if (len(self.calls) - 1) // 8 % 2 else -1])


class TakesAnyOption(Gate):
    def parse_options(self, options):
        return dict(options)


class LiesAboutKeys(Shift):
    def describe(self, _site, _options):
        return Effects()


class LiesAboutShapes(Shift):
    def describe(self, site, options):
        (spec,) = super().describe(site, options).added
        return Effects(added=(replace(spec, shape=(*spec.shape, 1)),))


class ChangesValues(Shift):
    def build(self, site, _options):
        with torch.no_grad():
            site.module.weight.mul_(2)
        return Shifted(site.module)


class WritesElsewhere(Fresh):
    """Puts the model's other modules into training while it builds."""

    def targets(self, tree, options):
        self.bystander = tree.get("layers.0.norm")
        return super().targets(tree, options)

    def build(self, site, options):
        if self.bystander is not None:
            self.bystander.training = True
        return super().build(site, options)


class LeavesResidue(Gate):
    def build(self, site, options):
        site.module.was_built = True
        return super().build(site, options)


class SharesHooksOfWhatItCalls(Gate):
    """Hooks are on the wrapper and on the original, which the wrapper calls: they fire twice."""

    def build(self, site, options):
        new = super().build(site, options)
        new._forward_hooks = site.module._forward_hooks
        return new


class CallsAround(Gated):
    """Holds the original and computes what it would without calling it."""

    def forward(self, x):
        return nn.functional.linear(x, self.inner.weight, self.inner.bias) * (1 + self.gate)


class LosesHooks(Gate):
    def build(self, site, _options):
        return CallsAround(site.module)


class OwnTables(Gated):
    """Gives the hooks of the original to the wrapper for good."""


class MovesHooks(Gate):
    def build(self, site, _options):
        new = OwnTables(site.module)
        new._forward_hooks.update(site.module._forward_hooks)
        site.module._forward_hooks.clear()
        return new


class Stubborn(Gated):
    def train(self, mode=True):  # noqa: ARG002 (torch's signature)
        return self


class IgnoresModes(Gate):
    def build(self, site, _options):
        return Stubborn(site.module)


class CopiesBadly(Gated):
    def __deepcopy__(self, memo):
        return Gated(self.inner, gate=1.0)


class DiffersWhenCopied(Gate):
    def build(self, site, _options):
        return CopiesBadly(site.module)


class PicklesBadly(Gated):
    def __reduce__(self):
        return Gated, (self.inner,), {**self.__dict__, "_parameters": {"gate": self.gate + 1}}


class DiffersWhenPickled(Gate):
    def build(self, site, _options):
        return PicklesBadly(site.module)


class IsNoIdentity(Gate):
    def build(self, site, _options):
        return Gated(site.module, gate=1e-6)


class Numbered(Gated):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) + self.number


class KeepsValuesElsewhere(Gate):
    """What it computes depends on a number that is in no state dict."""

    count = 0

    def build(self, site, _options):
        new = Numbered(site.module)
        KeepsValuesElsewhere.count += 1
        new.number = KeepsValuesElsewhere.count
        return new


class OnAnotherDevice(Gate):
    """Takes the CPU for granted."""

    def build(self, site, _options):
        new = Gated(site.module)
        new.gate = nn.Parameter(torch.zeros(1))
        return new


class AsksItsParent(Gate):
    """What it does depends on the class of the module that holds its target."""

    def build(self, site, _options):
        is_block = isinstance(site.slots[0].container, Block)
        return Gated(site.module, gate=0.5 if is_block else 0.0)


class TakesParametersAway(Gate):
    """Gives the original parameters of its own."""

    def build(self, site, options):
        site.module.weight = nn.Parameter(site.module.weight.detach().clone())
        return super().build(site, options)


class BrokenWhenCompiled(Gated):
    def forward(self, x):
        found = super().forward(x)
        return found + 1e-6 if torch.compiler.is_compiling() else found


class ComputesOtherwiseWhenCompiled(Gate):
    def build(self, site, _options):
        return BrokenWhenCompiled(site.module)


class LeftOutWhenCompiled(Gated):
    def forward(self, x):
        return self.inner(x) if torch.compiler.is_compiling() else super().forward(x)


class ForgetsItsGateWhenCompiled(Gate):
    """Has no effect when compiled, which an untrained gate has not either."""

    def build(self, site, _options):
        return LeftOutWhenCompiled(site.module)


class CutOffWhenCompiled(Gated):
    def forward(self, x):
        gate = self.gate.detach() if torch.compiler.is_compiling() else self.gate
        return self.inner(x) * (1 + gate)


class IsNotTrainedWhenCompiled(Gate):
    def build(self, site, _options):
        return CutOffWhenCompiled(site.module)


class CountsCalls(Gated):
    def __init__(self, inner):
        super().__init__(inner)
        self.register_buffer("count", torch.zeros((), device=self.gate.device), persistent=False)

    def forward(self, x):
        if not torch.compiler.is_compiling():
            self.count.add_(1)
        return super().forward(x)


class CountsOnlyWhatIsNotCompiled(Gate):
    def build(self, site, _options):
        return CountsCalls(site.module)


class Breaking(Gated):
    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x)


class BreaksTheGraph(Gate):
    def build(self, site, _options):
        return Breaking(site.module)


class WorksByHook(Fresh):
    """Does its work in a hook on a copy of the base: compiled code is not made anew for hooks."""

    def build(self, site, _options):
        new = copy.deepcopy(site.module)
        new.register_forward_hook(lambda _module, _args, output: output * 2)
        return new


class LeavesAHook(Fresh):
    """Changes what the base computes, where it is compiled anew."""

    def build(self, site, options):
        site.module.register_forward_hook(
            lambda _module, _args, output: output + 1 if torch.compiler.is_compiling() else None
        )
        return super().build(site, options)


class RunsCompiledCodeOfTheBase(Shift):
    """Takes over all that the base has, compiled code included."""

    def build(self, site, options):
        new = super().build(site, options)
        new._compiled_call_impl = site.module._compiled_call_impl
        return new
