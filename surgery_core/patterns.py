"""Where a pattern of calls occurs in a torch.fx graph, and modules chosen by what they feed."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node, symbolic_trace
from torch.fx.node import Argument, map_arg
from torch.fx.passes.utils.fuser_utils import validate_partition

from surgery_core.errors import ContractError
from surgery_core.selectors import Selector, Tree


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GraphMatch:
    """Nodes of a graph that a pattern matched.

    Args:
        modules: Modules called, by their names in the pattern.
        fqns: Their FQNs, by the same.
        nodes: Names of all nodes matched, in the order of the graph.
        inputs: What the pattern's inputs stand for, in order: nodes, numbers and other literals, or
            lists, mappings and slices of either.
        outputs: Nodes that the pattern returns, in order.
        inside: All nodes matched, in the order of the pattern.
    """

    modules: Mapping[str, nn.Module]
    fqns: Mapping[str, str]
    nodes: tuple[str, ...]
    inputs: tuple[Argument, ...] = field(repr=False)
    outputs: tuple[Node, ...] = field(repr=False)
    inside: tuple[Node, ...] = field(repr=False)


def find_pattern(model: GraphModule, pattern: nn.Module) -> list[GraphMatch]:
    """Return where a pattern occurs in a graph; nothing is changed.

    Modules match modules of the very same type, whatever their names and sizes are; functions and
    methods match themselves, and tensors of the pattern tensors of the same type. Inputs match
    anything: values that the graph computes, and numbers, lists and slices that are written in it.
    Nothing but what the pattern returns may be used outside of a match, and no two matches have a
    node in common.

    Args:
        model: With a graph.
        pattern: Computes what is looked for; its `forward` is traced, submodules as they are.

    Raises:
        ContractError: The pattern cannot be traced, has an input or a call that does not lead to
            what it returns, or returns something else than what it computes.

    Example:
        >>> class LinearThenReLU(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear, self.act = nn.Linear(1, 1), nn.ReLU()
        ...
        ...     def forward(self, x):
        ...         return self.act(self.linear(x))
        >>> model = symbolic_trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
        >>> [dict(match.fqns) for match in find_pattern(model, LinearThenReLU())]
        [{'linear': '0', 'act': '1'}]
    """
    wanted = _traced(pattern)
    typed, originals = _by_type(model)
    looked_for, own = _by_type(wanted)
    order = {node: number for number, node in enumerate(model.graph.nodes)}
    matches: list[GraphMatch] = []
    for bound in _laid(_sinks(looked_for), typed, {}):
        computed = {
            own[pn]: originals[gn]
            for pn, gn in bound.items()
            if isinstance(gn, Node) and pn.op != "placeholder"
        }
        inside = set(computed.values())
        inputs: Any = map_arg(
            [bound[pn] for pn in looked_for.find_nodes(op="placeholder")], originals.__getitem__
        )
        outputs = [computed[node] for node in _returned(wanted.graph)]
        if not (_stands_alone(inside, inputs, outputs) and validate_partition([*inside])):
            continue
        if any(inside & set(other.inside) for other in matches):
            continue
        # In the order of the pattern.
        found = {pn: computed[pn] for pn in wanted.graph.nodes if pn in computed}
        called = {str(pn.target): str(n.target) for pn, n in found.items() if n.op == "call_module"}
        matches.append(
            GraphMatch(
                modules={role: model.get_submodule(fqn) for role, fqn in called.items()},
                fqns=called,
                nodes=tuple(node.name for node in sorted(inside, key=order.__getitem__)),
                inputs=tuple(inputs),
                outputs=tuple(outputs),
                inside=tuple(found.values()),
            )
        )
    return matches


def nodes_in(operand: Argument) -> list[Node]:
    """Return the nodes of an operand: itself, or those in lists, mappings and slices."""
    found: list[Node] = []
    map_arg(operand, found.append)
    return found


class PatternSelector(Selector):
    """Modules of a graph that have a role in a pattern, for rules about single modules.

    Args:
        pattern: See `find_pattern`.
        role: Name of a module in the pattern.
    """

    def __init__(self, pattern: nn.Module, role: str) -> None:
        self.pattern, self.role = pattern, role

    def select(self, tree: Tree) -> frozenset[str]:
        """Return the FQNs of the modules called in that role.

        Raises:
            ContractError: The root of the tree has no graph.
        """
        root = tree.get("")
        if not isinstance(root, GraphModule):
            msg = (
                f"Selector {self} needs a graph: expected a GraphModule at the root, got "
                f"{type(root).__name__}. Trace the model first."
            )
            raise ContractError(msg, fqn="", expected=GraphModule, actual=type(root))
        found = find_pattern(root, self.pattern)
        return frozenset(match.fqns[self.role] for match in found if self.role in match.fqns)

    def __str__(self) -> str:
        return f"{self.role!r} in the pattern {type(self.pattern).__name__}"


def _by_type(model: GraphModule) -> tuple[Graph, dict[Node, Node]]:
    """Return a copy of a graph whose calls of modules name types, and the originals of its nodes."""
    # Targets are compared, and looked up in the module that owns the graph.
    owner = stand_in(model)
    graph = Graph(owning_module=owner)  # type: ignore[arg-type]  # only its attributes are looked at
    copies: dict[Node, Node] = {}
    for node in model.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            # Classes made in a function may have the same name.
            name = f"{type(module).__qualname__}/{id(type(module))}".replace(".", "/")
            owner._modules[name] = module  # noqa: SLF001 (same)
            copies[node].target = name
    return graph, {new: old for old, new in copies.items()}


def stand_in(model: nn.Module) -> nn.Module:
    """Return a module with the same attributes, to which modules can be added."""
    found = nn.Module()
    vars(found).update({**vars(model), "_modules": dict(model._modules)})  # noqa: SLF001 (torch's registry)
    return found


def _traced(pattern: nn.Module) -> GraphModule:
    """Trace a pattern.

    Raises:
        ContractError: See `find_pattern`.
    """
    name = type(pattern).__name__
    try:
        found = symbolic_trace(pattern)
    except Exception as err:
        msg = f"Pattern {name!r} cannot be traced: {err}. Write it without what torch.fx refuses."
        raise ContractError(msg, fqn="", expected="a graph", actual=err) from err
    returned = _returned(found.graph)
    idle = [node.name for node in found.graph.nodes if node.op != "output" and not node.users]
    problem = ""
    if not returned or any(node.op in ("placeholder", "get_attr") for node in returned):
        value = found.graph.output_node().args[0]
        problem = f"returns {value}, not one value that it computes, or several as a tuple"
    elif idle:
        problem = f"does not use {', '.join(map(repr, idle))} for what it returns"
    if problem:
        msg = f"Pattern {name!r} {problem}. Change its forward."
        raise ContractError(msg, fqn="", expected="computed values", actual=problem)
    return found


def _returned(graph: Graph) -> list[Node]:
    """Return the nodes that a pattern returns; none if it returns something else."""
    value: Any = graph.output_node().args[0]
    several = isinstance(value, list | tuple) and len(value) > 1
    values = list(value) if several else [value]
    return values if all(isinstance(each, Node) for each in values) else []


def _sinks(pattern: Graph) -> list[Node]:
    """Return the nodes of a pattern that nothing but its output uses; they lead to all the others."""
    found = dict.fromkeys(_returned(pattern))
    return [node for node in found if all(user.op == "output" for user in node.users)]


_Bound = dict[Node, Any]
"""What the nodes of a pattern stand for: nodes of the graph, and for inputs any operand."""


def _laid(sinks: Sequence[Node], graph: Graph, bound: _Bound) -> Iterator[_Bound]:
    """Yield every way to lay a pattern over a graph, whether or not others use what is inside."""
    if not sinks:
        yield bound
        return
    for node in graph.nodes:
        found = dict(bound)
        if _fits(sinks[0], node, found):
            yield from _laid(sinks[1:], graph, found)


def _fits(wanted: object, operand: object, bound: _Bound) -> bool:
    """Tell whether an operand is what a pattern wants there, and note what its nodes stand for."""

    def stands_for(pn: Node, gn: object) -> bool:
        if pn in bound:
            return _alike(bound[pn], gn, is_)
        if pn.op == "placeholder":
            bound[pn] = gn
            return True
        taken = [value for each, value in bound.items() if each.op != "placeholder"]
        if not isinstance(gn, Node) or gn in taken or not _is_same_call(pn, gn):
            return False
        bound[pn] = gn
        return _fits(_operands(pn), _operands(gn), bound)

    return _alike(wanted, operand, stands_for)


def _alike(one: Any, two: Any, of_nodes: Callable[[Any, Any], bool]) -> bool:  # noqa: ANN401 (operands)
    """Compare two operands part by part; `of_nodes` compares what has a node in the first."""
    if isinstance(one, Node):
        return of_nodes(one, two)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        pairs = list(zip(one, two, strict=False))
        return len(one) == len(two) and all(_alike(a, b, of_nodes) for a, b in pairs)
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_alike(one[k], two[k], of_nodes) for k in one)
    if isinstance(one, slice) and isinstance(two, slice):
        parts = ("start", "stop", "step")
        return all(_alike(getattr(one, p), getattr(two, p), of_nodes) for p in parts)
    # Not by `==`, for which 1, 1.0 and True, and 0.0 and -0.0, are the same.
    return type(one) is type(two) and repr(one) == repr(two)


def _is_same_call(pn: Node, gn: Node) -> bool:
    if pn.op != "get_attr" or gn.op != "get_attr":
        return (pn.op, pn.target) == (gn.op, gn.target)
    values = [attrgetter(str(node.target))(node.graph.owning_module) for node in (pn, gn)]
    return isinstance(values[0], Tensor) and type(values[0]) is type(values[1])


def _operands(node: Node) -> Any:  # noqa: ANN401 (operands)
    """Return what a node is called with; defaults included, where torch tells them."""
    if not isinstance(node.target, OpOverload):
        return node.args, node.kwargs
    schema = node.target._schema.arguments  # noqa: SLF001 (torch has no other way to them)
    given = dict(zip((each.name for each in schema), node.args, strict=False)) | node.kwargs
    return {each.name: given.get(each.name, each.default_value) for each in schema}


def _stands_alone(inside: Collection[Node], inputs: Argument, outputs: Collection[Node]) -> bool:
    """Tell whether one call can stand for nodes: nothing else needs what only they compute."""
    hidden = [node for node in inside if node not in outputs]
    return all(user in inside for node in hidden for user in node.users) and not (
        set(nodes_in(inputs)) & set(inside)
    )
