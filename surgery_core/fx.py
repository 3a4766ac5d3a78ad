"""The same verbs on torch.fx graphs: several nodes made one, planned, applied, and taken back."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from operator import getitem
from typing import Any, Generic, TypeVar

from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from surgery_core.errors import ConflictError, ContractError, NoMatchError, SurgeryError, listed
from surgery_core.operation import TensorSpec
from surgery_core.patterns import GraphMatch, find_pattern, nodes_in, stand_in
from surgery_core.plan import describe_added
from surgery_core.selectors import Selector
from surgery_core.shown import format_table
from surgery_core.slots import Slot, SlotKind, check_holds
from surgery_core.tensors import owned_tensors
from surgery_core.transaction import OnWrite, Transaction

OptionsT = TypeVar("OptionsT")


class GraphOperation(ABC, Generic[OptionsT]):
    """What replaces several nodes of a graph by one module.

    Planning calls `parse_options`, `pattern` and `describe`, which must not change the model. Applying
    calls `build`, for every match, before the first write.
    """

    name: str
    """How plans and errors name the operation; fresh modules are called after it."""

    @abstractmethod
    def parse_options(self, options: Mapping[str, Any]) -> OptionsT:
        """Validate what a rule gives.

        Raises:
            OptionsError: An option is unknown, missing or out of range.
        """

    @abstractmethod
    def pattern(self, options: OptionsT) -> nn.Module:
        """Return what to look for; see `find_pattern`."""

    @abstractmethod
    def describe(self, match: GraphMatch, options: OptionsT) -> tuple[TensorSpec, ...]:
        """Return the tensors that the new module has and the matched ones have not.

        Raises:
            ContractError: These modules do not suit the operation.
        """

    @abstractmethod
    def build(self, match: GraphMatch, options: OptionsT) -> nn.Module:
        """Return a module that takes what the pattern takes, and returns what it returns.

        Raises:
            SurgeryError: It cannot be built; nothing has been written then.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRule:
    """A graph operation, and with which options; see `Rule`.

    Args:
        operation: The operation.
        options: Passed to it.
        select: Which modules must be in a match; None means any.
        expect: How many matches there must be; None means at least one.
        optional: Allow none.
    """

    operation: GraphOperation[Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    select: Selector | None = None
    expect: int | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphEdit:
    """One line of a graph's plan, as plain data.

    Args:
        rule: Number of the rule, from 0.
        operation: Its operation.
        nodes: Names of the nodes that one call stands for afterwards.
        replaced: FQNs of the modules that are called no more there; they stay in the model.
        fqn: Where the new module will be; not taken by anything.
        added: Its own tensors.
    """

    rule: int
    operation: str
    nodes: tuple[str, ...]
    replaced: tuple[str, ...]
    fqn: str
    added: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphDocument:
    """A graph's plan as plain data."""

    edits: tuple[GraphEdit, ...]

    def to_mapping(self) -> dict[str, Any]:
        """Return plain mappings, lists and scalars."""
        return asdict(self)

    def render(self) -> str:
        """Write as a table for people."""
        if not self.edits:
            return "No changes."
        rows = [
            (", ".join(edit.nodes), edit.operation, edit.fqn, describe_added(edit.added))
            for edit in self.edits
        ]
        return format_table(("nodes", "operation", "become", "adds"), rows)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Claim:
    rule: GraphRule
    options: Any
    match: GraphMatch
    edit: GraphEdit


class GraphPlan:
    """A plan bound to a live graph: nothing has been changed yet.

    Args:
        model: The model planned for.
        rules: In order; overlaps between them are errors.

    Raises:
        NoMatchError: The pattern of a rule occurs nowhere.
        ConflictError: Two matches have a node in common.
        ContractError: The model has no graph, `expect` is not met, or modules do not suit.
        OptionsError: An operation refuses its options.
    """

    def __init__(self, model: nn.Module, rules: Sequence[GraphRule]) -> None:
        if not isinstance(model, GraphModule):
            msg = (
                f"Model has no graph: expected a GraphModule, got {type(model).__name__}. Trace it "
                "first, for example with torch.fx.symbolic_trace."
            )
            raise ContractError(msg, fqn="", expected=GraphModule, actual=type(model))
        self.model = model
        self._graph, self._code = model.graph, str(model.graph)
        taken = set(vars(model)) | {fqn.partition(".")[0] for fqn, _ in model.named_modules()}
        taken |= {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        self._claims = [
            claim for number, rule in enumerate(rules) for claim in self._of(number, rule, taken)
        ]
        _check_conflicts(self._claims)
        self.document = GraphDocument(edits=tuple(claim.edit for claim in self._claims))

    def __str__(self) -> str:
        return self.document.render()

    def apply(self, *, on_write: OnWrite | None = None) -> "GraphSurgery":
        """Replace everything, or change nothing and raise.

        Args:
            on_write: Told of every write before it happens; an error it raises rolls all back.

        Raises:
            DriftError: The graph changed since the plan was made.
            ContractError: A module does not have the tensors its operation described, or nodes
                between those of a match depend on it.
        """
        self._check_holds()
        modules = [_build(claim) for claim in self._claims]
        graph = _rewritten(self.model, dict(zip(self._claims, modules, strict=True)))
        self._check_holds()
        with Transaction(on_write=on_write) as transaction:
            for claim, module in zip(self._claims, modules, strict=True):
                fqn = claim.edit.fqn
                transaction.replace(Slot(self.model, SlotKind.CHILD, fqn, fqn), None, module)
            transaction.replace(_graph_slot(self.model), self._graph, graph)
        return GraphSurgery(self, modules, transaction)

    def _check_holds(self) -> None:
        is_same = str(self.model.graph) == self._code
        check_holds(
            [(_graph_slot(self.model), self._graph if is_same else None)],
            subject="Model planned for",
            fix="Plan again.",
        )

    def _of(self, number: int, rule: GraphRule, taken: set[str]) -> Iterator[_Claim]:
        operation = rule.operation
        options = operation.parse_options(rule.options)
        pattern = operation.pattern(options)
        found = find_pattern(self.model, pattern)
        if rule.select is not None:
            chosen = rule.select.select(dict(self.model.named_modules(remove_duplicate=False)))
            found = [match for match in found if chosen & set(match.fqns.values())]
        what = f"Rule {number} ({operation.name!r})"
        if not found and not rule.optional:
            msg = (
                f"{what}: pattern {type(pattern).__name__!r} matched none of "
                f"{len(self.model.graph.nodes)} nodes. Fix the pattern, or mark the rule as optional."
            )
            raise NoMatchError(msg, selector=type(pattern).__name__, candidates=())
        if rule.expect is not None and found and len(found) != rule.expect:
            msg = f"{what} expected {rule.expect} matches, got {len(found)}. Change `expect`."
            raise ContractError(msg, fqn="", expected=rule.expect, actual=len(found))
        for match in found:
            edit = GraphEdit(
                rule=number,
                operation=operation.name,
                nodes=match.nodes,
                replaced=tuple(sorted(match.fqns.values())),
                fqn=_fresh(operation.name, taken),
                added=operation.describe(match, options),
            )
            yield _Claim(rule=rule, options=options, match=match, edit=edit)


class GraphSurgery:
    """An applied graph plan, and the way back.

    Invariant: after `revert` the model has the very graph it had, and no module more.

    Args:
        plan: What was applied.
        modules: What was put in, in the order of the edits.
        transaction: That did it.
    """

    def __init__(
        self, plan: GraphPlan, modules: Sequence[nn.Module], transaction: Transaction
    ) -> None:
        self.plan, self.modules, self.is_applied = plan, tuple(modules), True
        self._transaction = transaction

    @property
    def model(self) -> GraphModule:
        """The model, which is the one planned for."""
        return self.plan.model

    def revert(self, *, on_write: OnWrite | None = None) -> GraphModule:
        """Put the graph back and take the new modules out, or change nothing and raise.

        Args:
            on_write: As for `GraphPlan.apply`.

        Raises:
            DriftError: Somebody replaced the graph or a module that was put in.
            SurgeryError: It has been reverted already.
        """
        if not self.is_applied:
            msg = "Surgery is reverted already: expected an applied surgery. Apply a plan again."
            raise SurgeryError(msg)
        self._transaction.undo(
            subject="Graph under surgery",
            fix="Revert what was applied later first, or put back what is named.",
            on_write=on_write,
        )
        self.is_applied = False
        return self.plan.model


def _graph_slot(model: GraphModule) -> Slot:
    return Slot(model, SlotKind.GRAPH, "graph", "graph")


def _fresh(name: str, taken: set[str]) -> str:
    """Return a name that nothing in the model has, and take it."""
    number = 0
    while f"{name}_{number}" in taken:
        number += 1
    taken.add(f"{name}_{number}")
    return f"{name}_{number}"


def _check_conflicts(claims: Sequence[_Claim]) -> None:
    owner: dict[Node, _Claim] = {}
    clashes = []
    for claim in claims:
        for node in claim.match.inside:
            if node in owner:
                clashes.append((owner[node], claim, node.name))
            owner.setdefault(node, claim)
    if clashes:
        names = [
            f"{a.edit.operation!r} (rule {a.edit.rule}) and {b.edit.operation!r} (rule "
            f"{b.edit.rule}) at {node!r}"
            for a, b, node in clashes
        ]
        msg = f"Graph operations conflict: {'; '.join(names[:5])}. Narrow one of the rules."
        pairs = [((a.edit.operation, n), (b.edit.operation, n)) for a, b, n in clashes]
        raise ConflictError(msg, claims=pairs)


def _build(claim: _Claim) -> nn.Module:
    module = claim.rule.operation.build(claim.match, claim.options)
    before = nn.ModuleList(claim.match.modules.values())
    found = {TensorSpec.of(*item) for item in owned_tensors(before, module).items()}
    if found != set(claim.edit.added):
        msg = (
            f"Operation {claim.edit.operation!r} broke its contract at {claim.edit.nodes[0]!r}: "
            f"expected {listed(claim.edit.added)}, got {listed(sorted(found, key=str))}. Make "
            "`describe` and `build` agree."
        )
        raise ContractError(msg, fqn=claim.edit.fqn, expected=claim.edit.added, actual=found)
    return module


def _rewritten(model: GraphModule, modules: Mapping[_Claim, nn.Module]) -> Graph:
    """Return a new graph in which each match is one call; model and graph are not changed."""
    owner = stand_in(model)
    for claim, module in modules.items():
        owner.add_module(claim.edit.fqn, module)
    old = model.graph
    graph = Graph(owning_module=owner, tracer_cls=old._tracer_cls)  # type: ignore[arg-type]  # noqa: SLF001 (what torch's own copy passes)
    graph._codegen = copy.deepcopy(old._codegen)  # noqa: SLF001 (same)
    emitter = _Emitter(graph, {node: claim for claim in modules for node in claim.match.inside})
    for node in old.nodes:
        emitter.emit(node)
    graph.lint()
    return graph


class _Emitter:
    """Copies nodes, each after what it depends on; a match becomes one call."""

    def __init__(self, graph: Graph, owner: Mapping[Node, _Claim]) -> None:
        self._graph, self._owner = graph, owner
        self._done: dict[Node, Node] = {}
        # Matches that were begun; those that are not finished yet wait for their inputs.
        self._begun: set[_Claim] = set()
        self._finished: set[_Claim] = set()

    def emit(self, node: Node) -> None:
        """Copy a node and what it depends on, unless that has been done."""
        claim = self._owner.get(node)
        if claim is not None:
            self._emit_match(claim)
        elif node not in self._done:
            for used in node.all_input_nodes:
                self.emit(used)
            self._done[node] = self._graph.node_copy(node, self._done.__getitem__)

    def _emit_match(self, claim: _Claim) -> None:
        if claim in self._finished:
            return
        if claim in self._begun:
            msg = (
                f"Operation {claim.edit.operation!r} cannot replace {listed(claim.edit.nodes)} by "
                "one call: expected inputs that are there before it, got one that depends on what "
                "it returns. Narrow the pattern."
            )
            raise ContractError(msg, fqn=claim.edit.fqn, expected="no cycle", actual="a cycle")
        self._begun.add(claim)
        for used in nodes_in(claim.match.inputs):
            self.emit(used)
        inputs: Any = map_arg(claim.match.inputs, self._done.__getitem__)
        new = self._graph.call_module(claim.edit.fqn, inputs)
        outputs = claim.match.outputs
        # What is known of a value, where it was computed included, is known of its successor.
        new.meta = dict(outputs[-1].meta)
        if len(outputs) == 1:
            self._done[outputs[0]] = new
        else:
            for number, old in enumerate(outputs):
                part = self._graph.call_function(getitem, (new, number))
                part.meta = dict(old.meta)
                self._done[old] = part
        self._finished.add(claim)
