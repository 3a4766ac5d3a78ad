"""On graphs: modules chosen by what they feed, several nodes made one, and all of it taken back."""

import copy
import operator
import pickle

import pytest
import torch
from core.test_testing import ToyContract
from core.toys import Fresh, Gated, Net, Shift, example, session
from torch import nn
from torch.fx import symbolic_trace

from surgery_core import (
    ConflictError,
    ContractError,
    DriftError,
    Exact,
    NoMatchError,
    OptionsError,
    Rule,
    SurgeryError,
    TensorSpec,
)
from surgery_core.fx import (
    GraphOperation,
    GraphPlan,
    GraphRule,
)
from surgery_core.patterns import PatternSelector, find_pattern
from surgery_core.testing import InjectedError, assert_unchanged, failing_at, snapshot


class TestGateOnGraphs(ToyContract):
    """Rules about single modules keep the whole contract on a traced model."""

    def make_model(self):
        return symbolic_trace(Net())

    def make_aliased_model(self):
        return None


class TestShiftOnGraphs(TestGateOnGraphs):
    """The same, with a replacement that shares parameters."""

    operation = Shift


class TestFreshOnGraphs(TestGateOnGraphs):
    """The same, with one that shares nothing."""

    operation = Fresh
    identity_at_init = False


class UpThenNorm(nn.Module):
    """What the toy blocks begin with."""

    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Linear(1, 1), nn.BatchNorm1d(1)

    def forward(self, x):
        return torch.relu(self.norm(self.up(x)))


class Fused(nn.Module):
    """Calls the modules it replaces, times one plus a gate."""

    def __init__(self, match, gate):
        super().__init__()
        self.up, self.norm = match.modules["up"], match.modules["norm"]
        self.gate = nn.Parameter(torch.full((1,), gate))

    def forward(self, x):
        return torch.relu(self.norm(self.up(x))) * (1 + self.gate)


class Fuse(GraphOperation):
    name = "fused"

    def parse_options(self, options):
        if set(options) - {"gate"}:
            msg = f"Operation 'fused' does not know {sorted(options)}."
            raise OptionsError(msg)
        return options.get("gate", 0.0)

    def pattern(self, _options):
        return UpThenNorm()

    def describe(self, _match, _options):
        return (TensorSpec(name="gate", shape=(1,), dtype="float32"),)

    def build(self, match, options):
        return Fused(match, options)


class Projections(nn.Module):
    """Queries, keys and values of one input; a function of the queries before the keys."""

    def __init__(self, size=4):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(size, size) for _ in range(3))

    def forward(self, x):
        q = torch.tanh(self.q(x))
        return torch.softmax(q @ self.k(x).T, -1) @ self.v(x)


class Triple(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(1, 1) for _ in range(3))

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x)


class Packed(nn.Module):
    """One matrix product for three."""

    def __init__(self, match):
        super().__init__()
        found = [match.modules[name] for name in "qkv"]
        self.weight = nn.Parameter(torch.cat([m.weight.detach() for m in found]))
        self.bias = nn.Parameter(torch.cat([m.bias.detach() for m in found]))

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias).chunk(3, dim=-1)


class Pack(Fuse):
    name = "packed"

    def pattern(self, _options):
        return Triple()

    def describe(self, match, _options):
        size = sum(module.out_features for module in match.modules.values())
        width = match.modules["q"].in_features
        return (
            TensorSpec(name="weight", shape=(size, width), dtype="float32"),
            TensorSpec(name="bias", shape=(size,), dtype="float32"),
        )

    def build(self, match, _options):
        return Packed(match)


def traced(model=None):
    return symbolic_trace((Net() if model is None else model).eval())


FUSE = GraphRule(operation=Fuse())


def test_patterns_match_by_the_type_of_a_module_and_not_by_its_name():
    found = find_pattern(traced(), UpThenNorm())

    assert [f"layers.{i}.up" for i in range(3)] == [match.fqns["up"] for match in found]
    assert ("layers_0_up", "layers_0_norm", "relu") == found[0].nodes
    assert [] == find_pattern(traced(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), UpThenNorm())


def test_a_subclass_is_another_type():
    class Mine(nn.Linear):
        pass

    model = Net()
    model.layers[1].up = Mine(4, 4)

    assert ["layers.0.up", "layers.2.up"] == [
        match.fqns["up"] for match in find_pattern(traced(model), UpThenNorm())
    ]


def test_what_is_used_elsewhere_is_no_match():
    class Leaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            y = self.norm(self.up(x))
            return torch.relu(y) + y

    assert [] == find_pattern(traced(Leaky()), UpThenNorm())


def test_a_rule_about_single_modules_can_select_by_what_they_feed():
    model = traced()
    expected = model(example())
    select = PatternSelector(UpThenNorm(), "up")

    surgery = session().plan(model, [Rule(operation="gate", select=select)]).apply()

    assert [f"layers.{i}.up" for i in range(3)] == [i.site.fqn for i in surgery.replacements]
    assert (
        isinstance(model.layers[0].up, Gated) if isinstance(model.layers, nn.ModuleList) else True
    )
    assert torch.equal(expected, model(example()))
    with pytest.raises(
        ContractError, match="Selector 'up' in the pattern UpThenNorm needs a graph"
    ):
        session().plan(Net(), [Rule(operation="gate", select=select)])


def test_planning_changes_nothing_and_is_shown():
    model = traced()
    before, code = snapshot(model), str(model.graph)

    plan = GraphPlan(model, [FUSE])

    assert_unchanged(before, model, subject="Planning")
    assert code == str(model.graph)
    assert ["fused_0", "fused_1", "fused_2"] == [edit.fqn for edit in plan.document.edits]
    lines = str(plan).splitlines()
    assert "layers_0_up, layers_0_norm, relu    fused      fused_0  gate [1] float32" == lines[2]
    assert ("layers.0.norm", "layers.0.up") == plan.document.edits[0].replaced
    assert "No changes." == str(
        GraphPlan(traced(nn.Tanh()), [GraphRule(operation=Fuse(), optional=True)])
    )


def test_applying_is_exact_and_reverting_gives_back_the_very_graph():
    model = traced()
    before, graph, expected = snapshot(model), model.graph, model(example())

    surgery = GraphPlan(model, [FUSE]).apply()

    assert torch.equal(expected, model(example()))
    called = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
    assert 3 == sum(name.startswith("fused_") for name in called)
    assert not any(name.endswith(".up") for name in called)
    assert set(dict(before.state)) < set(model.state_dict())
    assert surgery.revert() is model
    assert graph is model.graph
    assert_unchanged(before, model, subject="Applying and reverting")
    assert torch.equal(expected, model(example()))
    with pytest.raises(SurgeryError, match="Surgery is reverted already"):
        surgery.revert()


def test_a_gate_that_is_open_shows_and_gets_a_gradient():
    model = traced()
    expected = model(example())

    surgery = GraphPlan(model, [GraphRule(operation=Fuse(), options={"gate": 0.5})]).apply()

    assert not torch.allclose(expected, model(example()))
    model(example()).sum().backward()
    assert all(module.gate.grad is not None for module in surgery.modules)


def test_a_fault_at_any_write_leaves_the_original_graph():
    model = traced()
    before, graph, code = snapshot(model), model.graph, str(model.graph)
    for number in range(4):
        with pytest.raises(InjectedError):
            GraphPlan(model, [FUSE]).apply(on_write=failing_at(number))
        assert graph is model.graph
        assert code == str(graph)
        assert_unchanged(before, model, subject=f"A fault at write {number}")
    surgery = GraphPlan(model, [FUSE]).apply(on_write=failing_at(4))
    applied = snapshot(model)
    for number in range(4):
        with pytest.raises(InjectedError):
            surgery.revert(on_write=failing_at(number))
        assert_unchanged(applied, model, subject=f"A fault at write {number} of revert")
    surgery.revert()
    assert graph is model.graph


def test_meta_and_stack_traces_are_kept():
    model = traced()
    for node in model.graph.nodes:
        node.meta["stack_trace"] = f"where {node.name} was"
        node.meta["val"] = node.name

    GraphPlan(model, [FUSE]).apply()

    new = {str(n.target): n for n in model.graph.nodes if n.op == "call_module"}
    assert "where relu was" == new["fused_0"].stack_trace
    assert "relu_1" == new["fused_1"].meta["val"]
    assert "where stem was" == new["stem"].stack_trace


def test_names_that_are_taken_are_left_alone():
    model = traced()
    mine = model.fused_0 = nn.Linear(1, 1)
    model.register_buffer("fused_1", torch.zeros(1))
    model.fused_2 = "a plain attribute"

    surgery = GraphPlan(model, [FUSE]).apply()

    assert ["fused_3", "fused_4", "fused_5"] == [e.fqn for e in surgery.plan.document.edits]
    surgery.revert()
    assert mine is model.fused_0
    assert "a plain attribute" == model.fused_2


def test_several_outputs_become_one_call_where_all_inputs_are_there():
    model = traced(Projections())
    expected = model(example())

    surgery = GraphPlan(model, [GraphRule(operation=Pack(), expect=1)]).apply()

    assert torch.allclose(expected, model(example()), atol=1e-6)
    assert 3 == sum(node.target is operator.getitem for node in model.graph.nodes)
    assert ("k", "q", "v") == surgery.plan.document.edits[0].replaced
    surgery.revert()
    assert torch.equal(expected, model(example()))


class Crossed(nn.Module):
    """Each of two pairs needs what the other returns."""

    def __init__(self):
        super().__init__()
        self.a1, self.a2 = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b1, self.b2 = nn.Hardtanh(), nn.Hardtanh()

    def forward(self, x):
        first, second = self.a1(x), self.a2(x)
        return self.b1(torch.tanh(second)) + self.b2(torch.tanh(first))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(1, 1), nn.Hardtanh()

    def forward(self, x, y):
        return self.a(x), self.b(y)


class Pair(Fuse):
    name = "pair"

    def pattern(self, _options):
        return Two()

    def describe(self, _match, _options):
        return ()

    def build(self, _match, _options):
        return nn.Identity()


def test_matches_that_need_what_each_other_return_are_refused_and_nothing_changes():
    model = traced(Crossed())
    before, graph = snapshot(model), model.graph
    plan = GraphPlan(model, [GraphRule(operation=Pair())])

    with pytest.raises(ContractError, match="got one that depends on what it returns"):
        plan.apply()
    assert graph is model.graph
    assert_unchanged(before, model, subject="A refusal")


def test_rules_that_overlap_conflict():
    with pytest.raises(
        ConflictError, match=r"Graph operations conflict: 'fused' \(rule 0\) and"
    ) as e:
        GraphPlan(traced(), [FUSE, GraphRule(operation=Fuse())])

    assert 9 == len(e.value.claims)


def test_rules_are_narrowed_and_counted():
    rule = GraphRule(operation=Fuse(), select=Exact("layers.1.norm"), expect=1)
    assert [("layers.1.norm", "layers.1.up")] == [
        edit.replaced for edit in GraphPlan(traced(), [rule]).document.edits
    ]
    with pytest.raises(ContractError, match=r"Rule 0 \('fused'\) expected 2 matches, got 3"):
        GraphPlan(traced(), [GraphRule(operation=Fuse(), expect=2)])
    with pytest.raises(NoMatchError, match="pattern 'UpThenNorm' matched none of 3 nodes"):
        GraphPlan(traced(nn.Tanh()), [FUSE])
    with pytest.raises(OptionsError, match=r"does not know \['gait'\]"):
        GraphPlan(traced(), [GraphRule(operation=Fuse(), options={"gait": 1})])
    with pytest.raises(ContractError, match="Model has no graph: expected a GraphModule, got Net"):
        GraphPlan(Net(), [FUSE])


def test_a_module_that_is_not_as_described_is_refused_before_any_write():
    class Lies(Fuse):
        def describe(self, _match, _options):
            return (TensorSpec(name="gate", shape=(2,), dtype="float32"),)

    model = traced()
    before = snapshot(model)
    with pytest.raises(ContractError, match="Make `describe` and `build` agree"):
        GraphPlan(model, [GraphRule(operation=Lies())]).apply()
    assert_unchanged(before, model, subject="A lie")


def test_a_graph_that_changed_since_is_drift():
    model = traced()
    plan = GraphPlan(model, [FUSE])
    node = next(node for node in model.graph.nodes if node.name == "relu")
    node.target = torch.tanh
    with pytest.raises(DriftError, match="Model planned for drifted at 'graph'"):
        plan.apply()
    node.target = torch.relu
    surgery = plan.apply()
    kept, model.graph = model.graph, copy.deepcopy(model).graph
    with pytest.raises(DriftError, match="Graph under surgery drifted at 'graph'"):
        surgery.revert()
    model.graph = kept
    surgery.revert()


# torch's own.
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")
def test_rewritten_graphs_can_be_copied_pickled_and_exported():
    model = traced()
    GraphPlan(model, [FUSE]).apply()
    expected = model(example())

    assert torch.equal(expected, copy.deepcopy(model)(example()))
    assert torch.equal(expected, pickle.loads(pickle.dumps(model))(example()))
    program = torch.export.export(model, (example(),), strict=False)
    assert torch.equal(expected, program.module()(example()))


# torch's own.
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")
def test_modules_of_an_exported_program_are_planned_applied_and_reverted():
    """`unflatten` gives the modules back under their FQNs."""
    program = torch.export.export(Net().eval(), (example(),), strict=False)
    model = torch.export.unflatten(program)
    before, expected = snapshot(model), model(example())

    rule = Rule(operation="gate", select="head", options={"anything": True})
    surgery = session().plan(model, [rule]).apply()

    assert torch.equal(expected, model(example()))
    with torch.no_grad():
        surgery.replacements[0].module.gate.fill_(1.0)
    assert torch.equal(2 * expected, model(example()))
    surgery.revert()
    assert_unchanged(before, model, subject="Applying and reverting")
