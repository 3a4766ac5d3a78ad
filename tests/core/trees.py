"""Random module trees: shared modules, every container, plain holders and odd names."""

import torch
from core.toys import Gate, session
from hypothesis import strategies as st
from torch import nn

from surgery_core import Rule, SlotIndex, Where

SIZE = 3

NAMES = [
    "a",
    "b",
    "ab",
    "0",
    "1",
    "10",
    "weird name",
    "x-y",
    "a*",
    "{0}",
    "[a]",
    "class",
    "\u00e4",
]
"""None is an attribute of `nn.Module`; all are names that `add_module` takes."""

KINDS = ["node", "sequential", "list", "dict"]


class Node(nn.Module):
    """Adds up what its children compute, one after the other."""

    def forward(self, x):
        for child in self.children_called():
            x = x + called(child, x)
        return x

    def children_called(self):
        # Not children(): that skips a module the second time.
        return [child for child in self._modules.values() if child is not None]


def called(module, x):
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        for child in module._modules.values():
            x = called(child, x)
        return x
    return module(x)


leaves = st.one_of(
    st.tuples(st.just("shared"), st.integers(0, 2)),
    st.tuples(st.just("new"), st.sampled_from([0, 1, 2])),
)


@st.composite
def branches(draw, children):
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    return (
        draw(st.sampled_from(KINDS)),
        [(name, draw(children)) for name in names],
        draw(st.sampled_from(["", "attribute", "list", "dict"])),
    )


specifications = st.recursive(leaves, branches, max_leaves=8)


def leaf(number):
    return [
        lambda: nn.Linear(SIZE, SIZE),
        lambda: nn.LayerNorm(SIZE),
        lambda: nn.Sequential(nn.Linear(SIZE, SIZE, bias=False), nn.Tanh()),
    ][number]()


def build(specification, shared):
    kind, content, *rest = specification
    if kind == "shared":
        return shared[content]
    if kind == "new":
        return leaf(content)
    children = [(name, build(child, shared)) for name, child in content]
    if kind == "sequential" and not any(
        isinstance(child, nn.ModuleList | nn.ModuleDict) for _, child in children
    ):
        return nn.Sequential(*(child for _, child in children))
    if kind == "list":
        return nn.ModuleList(child for _, child in children)
    module = nn.ModuleDict() if kind == "dict" else Node()
    for name, child in children:
        module.add_module(name, child)
    hold(module, rest[0], children[-1][1])
    return module


def hold(module, how, child):
    """Make a module hold a child outside the registry too."""
    if how == "attribute":
        vars(module)["shortcut"] = child
    elif how == "list":
        vars(module)["held"] = [None, child]
    elif how == "dict":
        vars(module)["held"] = {"child": child, 0: "no module"}


@st.composite
def models(draw):
    """Draw a model that maps `(rows, SIZE)` to the same; equal draws are equal models."""
    torch.manual_seed(draw(st.integers(0, 9)))
    shared = [leaf(number) for number in range(3)]
    root = Node()
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    for name in names:
        root.add_module(name, build(draw(specifications), shared))
    return root.eval()


def can_be_replaced(module):
    """Return whether a wrapper of the module can be called."""
    return not isinstance(module, nn.ModuleList | nn.ModuleDict)


def disjoint(draw, model, taken=()):
    """Draw modules of a model, by FQN, of which none is inside another or inside one taken."""
    index = SlotIndex(model)
    candidates = [fqn for fqn, module in index.modules.items() if can_be_replaced(module)]
    chosen = []
    for fqn in draw(st.lists(st.sampled_from(candidates), max_size=5, unique=True)):
        others = [index.site(other) for other in (*taken, *chosen)]
        if not any(overlap(index.site(fqn), other) for other in others):
            chosen.append(fqn)
    return chosen


def overlap(one, other):
    return any(inside(a, b) or inside(b, a) for a in one.fqns for b in other.fqns)


def inside(fqn, parent):
    return not parent or fqn == parent or fqn.startswith(f"{parent}.")


def plan(model, fqns, operation="gate", *, beneath=None, **options):
    """Plan an operation for exactly the modules at some FQNs."""
    chosen = frozenset(fqns)
    rule = Rule(
        operation=operation,
        select=Where(lambda fqn, _: fqn in chosen, "the modules drawn"),
        options={"anything": True, **options} if operation == "gate" else options,
        optional=True,
    )
    return session(Gate()).plan(model, [rule], beneath=beneath)
