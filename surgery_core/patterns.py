"""Where a pattern of calls occurs in a torch.fx graph, and modules chosen by what they feed."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.fx import Graph, GraphModule, Node, symbolic_trace
from torch.fx.passes.utils.matcher_utils import InternalMatch, SubgraphMatcher

from surgery_core.errors import ContractError
from surgery_core.selectors import Selector, Tree


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GraphMatch:
    """Nodes of a graph that a pattern matched.

    Args:
        modules: Modules called, by their names in the pattern.
        fqns: Their FQNs, by the same.
        nodes: Names of all nodes matched, in the order of the graph.
    """

    modules: Mapping[str, nn.Module]
    fqns: Mapping[str, str]
    nodes: tuple[str, ...]
    inputs: tuple[Node, ...] = field(repr=False)
    outputs: tuple[Node, ...] = field(repr=False)
    inside: tuple[Node, ...] = field(repr=False)


def find_pattern(model: GraphModule, pattern: nn.Module) -> list[GraphMatch]:
    """Return where a pattern occurs in a graph; nothing is changed.

    Modules match modules of the very same type, whatever their names and sizes are; functions and
    methods match themselves; inputs match anything. Nothing but what the pattern returns may be used
    outside of a match, and no two matches have a node in common.

    Args:
        model: With a graph.
        pattern: Computes what is looked for; its `forward` is traced, submodules as they are.

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
    wanted = symbolic_trace(pattern)
    typed, originals = _by_type(model)
    looked_for, own = _by_type(wanted)
    placeholders = [node for node in looked_for.nodes if node.op == "placeholder"]
    returned = looked_for.output_node().all_input_nodes
    order = {node: number for number, node in enumerate(model.graph.nodes)}

    def described(match: InternalMatch) -> GraphMatch:
        # In the order of the pattern.
        found = {
            pn: originals[match.nodes_map[pn]]
            for pn in looked_for.nodes
            if match.nodes_map.get(pn) in originals
        }
        inside = [n for pn, n in found.items() if pn.op not in ("placeholder", "output")]
        called = {
            str(own[pn].target): str(n.target) for pn, n in found.items() if pn.op == "call_module"
        }
        return GraphMatch(
            modules={role: model.get_submodule(fqn) for role, fqn in called.items()},
            fqns=called,
            nodes=tuple(node.name for node in sorted(inside, key=order.__getitem__)),
            inputs=tuple(found[node] for node in placeholders),
            outputs=tuple(found[node] for node in returned),
            inside=tuple(inside),
        )

    return [described(match) for match in SubgraphMatcher(looked_for).match(typed)]


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
    # The matcher compares targets, and looks them up in the module that owns the graph.
    owner = stand_in(model)
    graph = Graph(owning_module=owner)  # type: ignore[arg-type]  # only its attributes are looked at
    copies: dict[Node, Node] = {}
    for node in model.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            name = f"{type(module).__module__}.{type(module).__qualname__}".replace(".", "/")
            owner._modules[name] = module  # noqa: SLF001 (same)
            copies[node].target = name
    return graph, {new: old for old, new in copies.items()}


def stand_in(model: nn.Module) -> nn.Module:
    """Return a module with the same attributes, to which modules can be added."""
    found = nn.Module()
    vars(found).update({**vars(model), "_modules": dict(model._modules)})  # noqa: SLF001 (torch's registry)
    return found
