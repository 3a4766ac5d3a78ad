"""What would change: rules bound to operations, checked against a model without touching it."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from surgery_core.errors import ConflictError, ContractError, NoMatchError, StateError, listed
from surgery_core.operation import BoundRule, Effects, Operation, Selectors, TensorSpec
from surgery_core.selectors import Selector, Tree, closest, parse_selector
from surgery_core.sharded import unsharded_class, whole_shape
from surgery_core.slots import Site, SlotIndex


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Claim:
    """A site and the operation that wants it."""

    rule: int
    operation: Operation[Any]
    options: Any
    site: Site
    effects: Effects


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """One line of a plan, as plain data."""

    rule: int
    operation: str
    fqn: str
    aliases: tuple[str, ...]
    module: str
    added: tuple[TensorSpec, ...]
    removed: tuple[str, ...]
    retyped: tuple[TensorSpec, ...] = ()

    @property
    def num_parameters(self) -> int:
        """How many values the edit adds; copies under the base's keys do not count."""
        return sum(_numel(spec.shape) for spec in self.added)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDocument:
    """A plan as plain data: compared with `==`, printed, and kept as JSON.

    Args:
        fingerprint: Structural fingerprint of the model the plan was made for.
        edits: In the order of the rules, then of the tree.
    """

    fingerprint: str
    edits: tuple[Edit, ...]

    @property
    def num_parameters(self) -> int:
        """How many values the plan adds to the model."""
        return sum(edit.num_parameters for edit in self.edits)

    def to_json(self) -> str:
        """Write as JSON, sorted and indented by two."""
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "PlanDocument":
        """Read what `to_json` wrote; the result equals the document written.

        Raises:
            ContractError: The text is not a plan.
        """
        try:
            return cls.from_mapping(json.loads(text))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as err:
            msg = f"Text is not a plan: expected what PlanDocument.to_json() writes, got {err!r}."
            raise ContractError(msg, fqn="", expected="a plan", actual=text[:80]) from err

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> "PlanDocument":
        """Build from what `dataclasses.asdict` and JSON make of a document.

        Raises:
            KeyError: The mapping is something else; or a `TypeError`.
        """
        found = _of(data["fingerprint"], str)
        return cls(fingerprint=found, edits=tuple(map(_edit, _of(data["edits"], list | tuple))))

    def render(self) -> str:
        """Write as a table for people, with totals in the last line."""
        if not self.edits:
            return "No changes."
        rows = [
            (
                edit.fqn or "(root)",
                edit.module.rpartition(".")[2],
                edit.operation,
                describe_added(edit.added, edit.removed, edit.retyped),
            )
            for edit in self.edits
        ]
        header = ("module", "class", "operation", "adds")
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [header, tuple("-" * width for width in widths), *rows]
        ]
        modules = "1 module" if len(rows) == 1 else f"{len(rows)} modules"
        lines.append(f"Plan: {modules} replaced, {self.num_parameters:,} parameters added.")
        return "\n".join(lines)


def draft(
    model: nn.Module,
    rules: Sequence[BoundRule],
    *,
    originals: Mapping[int, nn.Module] | None = None,
) -> tuple[list[Claim], PlanDocument]:
    """Work out what the rules would do; the model, its tensors and the random state stay as they are.

    Args:
        model: The model to plan for.
        rules: In order; overlaps between them are errors.
        originals: See `SlotIndex`.

    Returns:
        The claims, bound to live sites, and the same as plain data.

    Raises:
        NoMatchError: A rule, or an exclusion, matches nothing.
        ConflictError: Two claims overlap.
        ContractError: A module does not suit its operation, or a rule's `expect` is not met.
        OptionsError: An operation refuses its options.
    """
    index = SlotIndex(model, originals=originals)
    claims: list[Claim] = []
    for number, bound in enumerate(rules):
        claims += _claims_of(number, bound, index)
    _check_conflicts(claims)
    edits = tuple(
        Edit(
            rule=claim.rule,
            operation=claim.operation.name,
            fqn=claim.site.fqn,
            aliases=claim.site.fqns[1:],
            module=_class_name(claim.site.module),
            added=claim.effects.added,
            removed=claim.effects.removed,
            retyped=claim.effects.retyped,
        )
        for claim in claims
    )
    return claims, PlanDocument(fingerprint=_digest(index.modules), edits=edits)


def fingerprint(model: nn.Module) -> str:
    """Return a structural fingerprint: FQNs, classes, and names, shapes and dtypes of tensors.

    Values, devices and training flags do not count.

    Example:
        >>> fingerprint(nn.Linear(2, 3)) == fingerprint(nn.Linear(2, 3))
        True
        >>> fingerprint(nn.Linear(2, 3)) == fingerprint(nn.Linear(3, 2))
        False
    """
    return _digest(SlotIndex(model).modules)


def _claims_of(number: int, bound: BoundRule, index: SlotIndex) -> list[Claim]:
    rule, operation, tree = bound.rule, bound.operation, index.modules
    options = operation.parse_options(rule.options)
    subject = f"Rule {number} ({operation.name!r}):"
    chosen = _targets_of(subject, bound, options, tree)
    if rule.exclude is not None:
        ids: set[int] = set()
        for excluded in _as_selectors(rule.exclude):
            # An alias excludes the module by every name it has.
            found_ids = {id(tree[fqn]) for fqn in excluded.select(tree)}
            if not rule.optional and not any(id(tree[fqn]) in found_ids for fqn in chosen):
                _raise_no_match(f"{subject} exclude", excluded, tree)
            ids |= found_ids
        chosen = frozenset(fqn for fqn in chosen if id(tree[fqn]) not in ids)
    sites = {id(tree[fqn]): index.site(fqn) for fqn in tree if fqn in chosen}
    is_met = len(sites) == rule.expect if rule.expect is not None else bool(sites)
    # An optional rule may claim nothing, whatever it expects.
    if not is_met and (sites or not rule.optional):
        expected = "at least 1" if rule.expect is None else rule.expect
        msg = (
            f"Rule {number} ({operation.name!r}) expected {expected} modules, got {len(sites)}: "
            f"{listed(site.fqn for site in sites.values())}. Change the selector or `expect`."
        )
        raise ContractError(msg, fqn="", expected=expected, actual=len(sites))
    return [
        Claim(
            rule=number,
            operation=operation,
            options=options,
            site=site,
            effects=operation.describe(site, options),
        )
        for site in sites.values()
    ]


def _targets_of(subject: str, bound: BoundRule, options: Any, tree: Tree) -> frozenset[str]:  # noqa: ANN401 (the operation's)
    """Return the targets among what a rule selects; each of its selectors has to have one."""
    rule, offered = bound.rule, tree
    selected: dict[Selector, frozenset[str]] = {}
    if rule.select is not None:
        for selector in _as_selectors(rule.select):
            selected[selector] = selector.select(tree)
            if not selected[selector] and not rule.optional:
                _raise_no_match(f"{subject} selector", selector, tree)
        fqns = frozenset[str]().union(*selected.values())
        offered = {fqn: module for fqn, module in tree.items() if fqn in fqns}
        if not offered:
            return fqns
    targets = bound.operation.targets(offered, options)
    chosen = targets.select(offered)
    if not chosen and not rule.optional:
        _raise_no_match(f"{subject} target", targets, offered)
    for selector, found in selected.items():
        # One without effect would be missed silently among the others.
        if not found & chosen and not rule.optional:
            msg = (
                f"{subject} selector {str(selector)!r} matches {listed(sorted(found))}: expected a "
                f"target of the operation among them, got none. Its targets are {targets}. Leave "
                "the selector out, or mark the rule as optional."
            )
            raise NoMatchError(msg, selector=str(selector), candidates=sorted(chosen))
    return chosen


def _as_selectors(value: Selectors) -> list[Selector]:
    """Return the selectors of a rule, parsed where they are text."""
    several = [value] if isinstance(value, str | Selector) else value
    return [parse_selector(each) if isinstance(each, str) else each for each in several]


def _raise_no_match(subject: str, selector: Selector, tree: Tree) -> None:
    near = closest(str(selector), tree)
    hint = f" Closest FQN: {listed(near)}." if near else ""
    msg = (
        f"{subject} {str(selector)!r} matched none of {len(tree)} submodules.{hint} "
        "Fix the pattern, or mark the rule as optional."
    )
    raise NoMatchError(msg, selector=str(selector), candidates=near)


def _check_conflicts(claims: Iterable[Claim]) -> None:
    """Refuse claims on one module, and on a module inside one whose children do not stay."""
    owner: dict[str, Claim] = {}
    clashes: list[tuple[Claim, str, Claim, str]] = []
    for claim in claims:
        # `owner` holds every alias, so one clash per claim is reported by its first FQN.
        found = next((owner[fqn] for fqn in claim.site.fqns if fqn in owner), None)
        if found is not None:
            clashes.append((found, found.site.fqn, claim, claim.site.fqn))
        for fqn in claim.site.fqns:
            owner.setdefault(fqn, claim)
    clashes += [
        (owner[ancestor], ancestor, claim, fqn)
        for fqn, claim in owner.items()
        for ancestor in _ancestors(fqn)
        if ancestor in owner
        and owner[ancestor].site is not claim.site
        and not owner[ancestor].operation.keeps_children
    ]
    _raise_conflicts(clashes)


def check_beneath(first: Iterable[Claim], later: Iterable[Claim]) -> None:
    """Refuse to claim modules that are replaced before, and modules inside those.

    The other way round is fine: what is applied later may contain what was replaced before.

    Args:
        first: Applied first, and reverted last.
        later: Applied when those are, for the model as it is without them.

    Raises:
        ConflictError: All are named.
    """
    owner = {fqn: claim for claim in first for fqn in claim.site.fqns}
    _raise_conflicts(
        [
            (owner[above], above, claim, fqn)
            for claim in later
            for fqn in claim.site.fqns
            for above in (fqn, *_ancestors(fqn))
            if above in owner
        ]
    )


def _raise_conflicts(clashes: Sequence[tuple[Claim, str, Claim, str]]) -> None:
    if not clashes:
        return
    lines = [
        f"{a.operation.name!r} (rule {a.rule}) claims {a_fqn or '(root)'!r} and "
        f"{b.operation.name!r} (rule {b.rule}) claims {b_fqn or '(root)'!r}"
        for a, a_fqn, b, b_fqn in clashes[:MAX_CLASHES]
    ]
    more = len(clashes) - len(lines)
    msg = (
        f"Operations conflict: {'; '.join(lines)}{f'; and {more} more' if more else ''}. "
        "Narrow their selectors so that they are disjoint."
    )
    pairs = [
        ((a.operation.name, a_fqn), (b.operation.name, b_fqn)) for a, a_fqn, b, b_fqn in clashes
    ]
    raise ConflictError(msg, claims=pairs)


MAX_CLASHES = 5
"""How many conflicts an error message spells out."""


def check_covered(claims: Iterable[Claim], state: Mapping[str, Tensor], *, subject: str) -> None:
    """Refuse to make room for more values than there are to load.

    What files say of themselves is not believed: a few bytes could ask for terabytes.

    Args:
        claims: Of which the replacements are not built yet.
        state: What would be loaded into them, by `fqn.name`.
        subject: How the error begins.

    Raises:
        StateError: There are fewer values; what is missing or of another shape is named.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    kept: set[str] = set()
    expected = 0
    for claim in claims:
        added = {f"{claim.site.fqn}.{s.name}".removeprefix("."): s for s in claim.effects.added}
        shapes |= {key: spec.shape for key, spec in added.items()}
        expected += sum(_numel(spec.shape) for spec in added.values())
        if claim.effects.removed:
            # They may be among those added, under other names.
            own = claim.site.module.state_dict(keep_vars=True)
            expected -= sum(own[key].numel() for key in claim.effects.removed if key in own)
            kept |= added.keys()
    brought = sum(tensor.numel() for tensor in state.values())
    if expected <= brought:
        return
    missing = sorted(shapes.keys() - state.keys() - kept)
    mismatched = [
        f"{key}: expected shape {shape}, got {tuple(state[key].shape)}"
        for key, shape in sorted(shapes.items())
        if key in state and tuple(state[key].shape) != shape
    ]
    msg = (
        f"{subject}: missing {listed(missing)}; mismatched {listed(mismatched)}; expected "
        f"{expected:,} values, got {brought:,}. Use the options and the model that they were saved "
        "with."
    )
    raise StateError(msg, missing=missing, mismatched=mismatched)


def _ancestors(fqn: str) -> Iterable[str]:
    """Yield every proper prefix of an FQN, the root last."""
    while fqn:
        fqn = fqn.rpartition(".")[0]
        yield fqn


def structure(model: nn.Module) -> list[str]:
    """Return what a fingerprint is of: a line for each module, and for each of its tensors.

    Example:
        >>> structure(nn.Linear(2, 3, bias=False))
        [':torch.nn.modules.linear.Linear', ' p:weight:(3, 2):torch.float32']
    """
    return _structure(SlotIndex(model).modules)


def _structure(modules: Tree) -> list[str]:
    lines = []
    for fqn, module in modules.items():
        lines.append(f"{fqn}:{_class_name(module)}")
        for kind, tensors in (("p", module._parameters), ("b", module._buffers)):  # noqa: SLF001 (own tensors only, in torch's registry)
            lines += [
                f" {kind}:{name}:{whole_shape(tensor)}:{tensor.dtype}"
                for name, tensor in tensors.items()
                if tensor is not None
            ]
    return lines


def _digest(modules: Tree) -> str:
    return hashlib.sha256("\n".join(_structure(modules)).encode()).hexdigest()


def _class_name(module: nn.Module) -> str:
    # A model is the same one after `fully_shard`, which gives modules classes made at run time.
    cls = unsharded_class(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def _edit(data: Mapping[str, Any]) -> Edit:
    found = Edit(
        **{
            **data,
            "aliases": _items(data["aliases"], str),
            "removed": _items(data["removed"], str),
            "added": _specs(data["added"]),
            "retyped": _specs(data["retyped"]),
        }
    )
    _of(found.rule, int)
    _items((found.operation, found.fqn, found.module), str)
    return found


def _specs(data: object) -> tuple[TensorSpec, ...]:
    found = tuple(
        TensorSpec(**{**spec, "shape": _items(spec["shape"], int)})
        for spec in _items(data, Mapping)
    )
    for spec in found:
        _items((spec.name, spec.dtype), str)
        _of(spec.trainable, bool)
        if any(not 0 <= size < MAX_SIZE for size in spec.shape):
            msg = f"expected sizes from 0 to {MAX_SIZE}, got others in {spec.name!r}"
            raise ValueError(msg)
    return found


MAX_SIZE = 2**63
"""Sizes of tensors are below it, and numbers that Python refuses to write are above."""


def _of(value: Any, kind: Any) -> Any:  # noqa: ANN401 (plain data)
    """Return a value if it is of a type, or of one of several."""
    if not isinstance(value, kind):
        msg = f"expected {kind}, got {value!r:.80}"
        raise TypeError(msg)
    return value


def _items(values: object, kind: type) -> tuple[Any, ...]:
    """Return the items of a list, if they are all of a type."""
    return tuple(_of(value, kind) for value in _of(values, list | tuple))


def describe_added(
    added: Sequence[TensorSpec],
    removed: Sequence[str] = (),
    retyped: Sequence[TensorSpec] = (),
) -> str:
    """Write what an edit does to the state dict."""
    parts = [f"{spec.name} {list(spec.shape)} {spec.dtype}" for spec in added]
    parts += [f"-{name}" for name in removed]
    parts += [f"{spec.name} {list(spec.shape)} as {spec.dtype}" for spec in retyped]
    return ", ".join(parts) or "no tensors"


def _numel(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
