"""Patterns of graphs: every kind of operand that an input can stand for, and what no pattern can be."""

import pytest
import torch
from core.toys import example
from torch import nn
from torch.fx import symbolic_trace, wrap

from surgery_core import ContractError, GraphOperation, GraphPlan, GraphRule, NoMatchError
from surgery_core.patterns import find_pattern


def measured(value):
    """Return a number that depends on every part of an operand, its types included."""
    if isinstance(value, torch.Tensor):
        return value.double().sum().item()
    if isinstance(value, dict):
        return measured([*value.items()])
    if isinstance(value, slice):
        return measured((value.start, value.stop, value.step)) + 0.5
    if isinstance(value, list | tuple):
        return sum((i + 2) * measured(part) for i, part in enumerate(value))
    known = {None: 7.0, True: 11.0, "text": 13.0}
    return known[value] if not isinstance(value, int | float) or value is True else 3.0 * value


def shifted(x, operand, scale=1.0):
    """Return `x` moved by what an operand measures; a call of its own in graphs."""
    return x * scale + measured(operand)


wrap("shifted")


class Shifting(nn.Module):
    """A pattern of one call with two inputs, and what stands for it: the same, twice."""

    def forward(self, x, operand):
        return shifted(x, operand)


class Doubled(nn.Module):
    def forward(self, x, operand):
        return 2 * shifted(x, operand)


class Replace(GraphOperation):
    """Puts a module without tensors in the place of a pattern."""

    name = "replaced"

    def __init__(self, pattern, module):
        self._pattern, self._module = pattern, module

    def parse_options(self, _options):
        return None

    def pattern(self, _options):
        return self._pattern()

    def describe(self, _match, _options):
        return ()

    def build(self, _match, _options):
        return self._module()


def planned(model, pattern, module, **rule):
    return GraphPlan(symbolic_trace(model), [GraphRule(operation=Replace(pattern, module), **rule)])


OPERANDS = {
    "a number": lambda _x: 1.5,
    "nothing": lambda _x: None,
    "a truth value": lambda _x: True,
    "text": lambda _x: "text",
    "a value": torch.cos,
    "the other input again": lambda x: x,
    "a list of values": lambda x: [torch.cos(x), x],
    "a tuple of both": lambda x: (torch.cos(x), 2),
    "a mapping": lambda x: {"text": torch.cos(x)},
    "a slice": lambda x: slice(x.shape[0], None, 2),
    "one in another": lambda x: [{"text": (slice(None, x.shape[0]), None)}],
}


@pytest.mark.parametrize("kind", OPERANDS)
def test_an_input_of_a_pattern_stands_for_any_operand(kind):
    class Model(nn.Module):
        def forward(self, x):
            return torch.tanh(shifted(torch.sin(x), OPERANDS[kind](x)))

    x = example()
    plan = planned(Model(), Shifting, Doubled)

    surgery = plan.apply()

    expected = torch.tanh(2 * (torch.sin(x) + measured(OPERANDS[kind](x))))
    assert torch.equal(expected, plan.model(x))
    assert torch.equal(Model()(x), surgery.revert()(x))


def test_a_chain_of_matches_has_numbers_and_nodes_for_operands():
    class Add(nn.Module):
        def forward(self, x, y):
            return x + y

    class Model(nn.Module):
        def forward(self, a, b):
            return (a + b) + 1.0

    class AddTwice(nn.Module):
        def forward(self, x, y):
            return x + 2 * y

    plan = planned(Model(), Add, AddTwice, expect=2)
    plan.apply()

    assert torch.equal(torch.tensor([8.0]), plan.model(torch.tensor([2.0]), torch.tensor([2.0])))


def test_parts_of_operands_may_be_inputs_of_the_pattern():
    class Wanted(nn.Module):
        def forward(self, x, y, n):
            return shifted([x, {"text": y}], slice(None, n))[0]

    class Model(nn.Module):
        def forward(self, x):
            return shifted([x, {"text": torch.cos(x)}], slice(None, 3))[0]

    (match,) = find_pattern(symbolic_trace(Model()), Wanted())

    assert ["x", "cos", "3"] == [str(each) for each in match.inputs]


@pytest.mark.parametrize(
    ("values", "is_match"),
    [((2, 2), True), ((1, 1.0), False), ((1, True), False), ((0.0, -0.0), False)],
)
def test_an_input_that_is_used_twice_stands_for_one_and_the_same(values, is_match):
    class Wanted(nn.Module):
        def forward(self, x, n):
            return shifted(shifted(x, n), n)

    class Model(nn.Module):
        def forward(self, x):
            return shifted(shifted(x, values[0]), values[1])

    assert is_match == bool(find_pattern(symbolic_trace(Model()), Wanted()))


def test_literals_of_a_pattern_match_the_same_of_the_same_type():
    class Wanted(nn.Module):
        def forward(self, x):
            return shifted(x, 1, scale=2.0)

    def graph_of(operand, scale):
        class Model(nn.Module):
            def forward(self, x):
                return shifted(x, operand, scale=scale)

        return symbolic_trace(Model())

    assert 1 == len(find_pattern(graph_of(1, 2.0), Wanted()))
    for operand, scale in ((1.0, 2.0), (True, 2.0), (2, 2.0), (1, 2), ([1], 2.0)):
        assert [] == find_pattern(graph_of(operand, scale), Wanted())


def test_defaults_are_operands_where_torch_tells_them():
    class Wanted(nn.Module):
        def forward(self, x, y, alpha):
            return torch.ops.aten.add.Tensor(x, y, alpha=alpha)

    class Model(nn.Module):
        def forward(self, x):
            return torch.ops.aten.add.Tensor(x, other=x)

    (match,) = find_pattern(symbolic_trace(Model()), Wanted())

    assert ["x", "x", "1"] == [str(each) for each in match.inputs]


def test_an_input_that_the_match_computes_itself_is_no_match():
    class Wanted(nn.Module):
        def forward(self, x, operand):
            return shifted(torch.cos(x), operand)

    class Model(nn.Module):
        def forward(self, x):
            y = torch.cos(x)
            return shifted(y, [y])

    with pytest.raises(NoMatchError):
        planned(Model(), Wanted, Doubled)


def test_a_pattern_of_which_a_part_does_not_occur_is_no_match():
    class Wanted(nn.Module):
        def forward(self, x):
            return torch.sin(x), torch.cos(x)

    class Model(nn.Module):
        def forward(self, x):
            return torch.sin(x)

    assert [] == find_pattern(symbolic_trace(Model()), Wanted())


def test_classes_of_the_same_name_are_different_types():
    def made():
        # Only what is torch's is not traced through.
        return type("Act", (nn.ReLU,), {"__module__": "torch.nn.made"})

    one, two = made(), made()
    model = symbolic_trace(nn.Sequential(one(), two()))

    assert ["1"] == [match.fqns["0"] for match in find_pattern(model, nn.Sequential(two()))]


def unused(x, _y):
    return torch.sin(x)


def idle(x):
    torch.cos(x)
    return torch.sin(x)


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (unused, "does not use '_?y' for what it returns"),
        (idle, "does not use 'cos' for what it returns"),
        (lambda x: (torch.sin(x), x), r"returns \(sin, x\), not one value that it computes"),
        (lambda x: {"a": torch.sin(x)}, r"returns \{'a': sin\}, not one value that it computes"),
        (lambda x: (torch.sin(x),), r"returns \(sin,\), not one value that it computes"),
        (lambda _x: 1.0, "returns 1.0, not one value that it computes"),
        (lambda x: torch.sin(x) if x.sum() > 0 else x, "cannot be traced: symbolically traced"),
    ],
)
def test_patterns_that_no_module_could_stand_for_are_refused(forward, said):
    class Wanted(nn.Module):
        pass

    Wanted.forward = lambda _self, x: forward(x)
    if forward is unused:
        Wanted.forward = lambda _self, x, y: forward(x, y)

    with pytest.raises(ContractError, match=f"Pattern 'Wanted' {said}"):
        find_pattern(symbolic_trace(nn.ReLU()), Wanted())


def test_a_value_that_is_returned_twice_is_handed_out_twice():
    class Wanted(nn.Module):
        def forward(self, x):
            y = torch.sin(x)
            return y, y

    class Same(nn.Module):
        def forward(self, x):
            return torch.sin(x), torch.sin(x)

    class Model(nn.Module):
        def forward(self, x):
            return torch.sin(x) + 1

    plan = planned(Model(), Wanted, Same)
    plan.apply()

    assert torch.equal(torch.sin(example()) + 1, plan.model(example()))


class Scaled(nn.Module):
    """Multiplies by a tensor of its own."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return torch.sin(x) * self.scale


def test_tensors_of_a_pattern_match_those_of_the_same_type():
    class Buffered(Scaled):
        def __init__(self):
            nn.Module.__init__(self)
            self.register_buffer("scale", torch.full((4,), 3.0))

    model = symbolic_trace(Scaled(nn.Parameter(torch.ones(4))))

    (match,) = find_pattern(model, Scaled(nn.Parameter(torch.zeros(1))))

    # The new module does not get it: the operation finds where it is.
    assert ["scale"] == [node.target for node in match.inside if node.op == "get_attr"]
    assert [] == find_pattern(model, Buffered())
