"""What one model of a recipe would become, as plain data and as a table."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from surgery_core.plan import PlanDocument, describe_added
from surgery_core.shown import format_table

Choice = str | Mapping[str, float]
"""An adapter, or several with weights."""

RULES = "rules"
"""Stands for what is applied for good, where adapters go by their names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDocument:
    """What one model of a recipe would become, as plain data.

    Args:
        rules: What would be applied for good; None where there are no rules.
        adapters: What each adapter would do, by name.
        active: Which of them would be in the model, or several with weights.
    """

    rules: PlanDocument | None
    adapters: Mapping[str, PlanDocument]
    active: str | Mapping[str, float] | None

    @property
    def num_edits(self) -> int:
        """How many modules would be replaced, over all adapters."""
        return sum(len(found.edits) for found in self.documents.values())

    @property
    def documents(self) -> dict[str, PlanDocument]:
        """All of it by name, `rules` first."""
        own = {} if self.rules is None else {RULES: self.rules}
        return {**own, **self.adapters}

    def render(self) -> str:
        """Write as a table for people: a line for modules that are changed alike."""
        rows = [
            (f"{name} *" if name in names_in(self.active) else name, *line)
            for name, document in self.documents.items()
            for line in _lines(document)
        ]
        table = format_table(("what", "operation", "modules", "class", "adds to each"), rows)
        total = sum(found.num_parameters for found in self.documents.values())
        modules = "1 module" if self.num_edits == 1 else f"{self.num_edits} modules"
        last = f"Plan: {modules} replaced, {total:,} parameters added"
        if len(self.documents) > 1:
            kept = [RULES, *names_in(self.active)]
            at_once = sum(self.documents[n].num_parameters for n in kept if n in self.documents)
            last += f", {at_once:,} of them in the model at once"
        note = "\n* is active" if self.active is not None else ""
        return f"{table}{note}\n{last}."

    def to_mapping(self) -> dict[str, Any]:
        """Return plain mappings, lists and scalars."""
        return {
            "rules": None if self.rules is None else asdict(self.rules),
            "adapters": {name: asdict(found) for name, found in self.adapters.items()},
            "active": dict(self.active) if isinstance(self.active, Mapping) else self.active,
        }


def names_in(choice: Choice | None) -> list[str]:
    """Return the names of the adapters that a choice is of."""
    return [] if choice is None else [choice] if isinstance(choice, str) else list(choice)


def _lines(document: PlanDocument) -> Iterator[tuple[str, str, str, str]]:
    """Yield operation, modules, class and what is added, for edits that differ in their place."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for edit in document.edits:
        pattern = _NUMBER.sub("*", edit.fqn)
        added = describe_added(edit.added, edit.removed, edit.retyped)
        groups.setdefault((edit.operation, pattern, edit.module, added), []).append(edit.fqn)
    for (operation, pattern, module, added), fqns in groups.items():
        where = fqns[0] or "(root)"
        if len(fqns) > 1:
            numbers = [list(map(int, _NUMBER.findall(fqn))) for fqn in fqns]
            where = f"{_ranged(pattern, numbers)} ({len(fqns)})"
        yield operation, where, module.rpartition(".")[2], added
    if not groups:
        # What is optional may do nothing, which is to be seen.
        yield "-", "none", "-", "-"


def _ranged(pattern: str, numbers: Sequence[Sequence[int]]) -> str:
    """Write the numbers in place of the stars, the first to the last of each."""
    for column in zip(*numbers, strict=True):
        low, high = min(column), max(column)
        text = str(low) if low == high else f"{{{low}..{high}}}"
        pattern = pattern.replace("*", text, 1)
    return pattern


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A segment of an FQN that is a number."""
