"""Results on disk: the samples as JSON, and tables in Markdown made from them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rows import Row, Target, quantity

Setup = Mapping[str, str]
"""What the machine and the versions are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Rows that were measured on one setup."""

    setup: Setup
    rows: tuple[Row, ...]

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read what `write` wrote."""
        found = json.loads(path.read_text())
        rows = tuple(Row.from_mapping(values) for values in found["rows"])
        return cls(setup=found["setup"], rows=rows)

    def write(self, path: Path) -> None:
        """Write the samples, and beside them the tables."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join(f"  {json.dumps(row.to_mapping())}" for row in self.rows)
        path.write_text(f'{{"setup": {json.dumps(dict(self.setup))}, "rows": [\n{rows}\n]}}\n')
        path.with_suffix(".md").write_text("\n".join(self.lines()) + "\n")

    def lines(self) -> Iterator[str]:
        """Yield the setup and a table for each kind of reference."""
        yield "; ".join(f"{name} {value}" for name, value in self.setup.items()) + "."
        yield "Ratios are medians of the ratios round by round, with their quartiles."
        for reference, header in (
            ("base", "| | base | PEFT / base | ours / base | target | rounds |"),
            ("peft", "| | PEFT | ours | base / PEFT | ours / PEFT | target | rounds |"),
            ("one", "| | one adapter | in turns / one | by row / one | target | rounds |"),
            ("none", "| | ours | rounds |"),
        ):
            found = [row for row in self.rows if row.reference == reference]
            if found:
                yield from ("", header, "|" + "---|" * (header.count("|") - 1))
                yield from map(line, found)


def line(row: Row) -> str:
    """Write a row of a table."""
    if row.note:
        return f"| {row.name} | {row.note} |"
    cells = {
        "base": (_value(row, "base"), _ratio(row, "peft"), _ratio(row, "ours")),
        "peft": (
            _value(row, "peft"),
            _value(row, "ours"),
            _ratio(row, "base"),
            _ratio(row, "ours"),
        ),
        "one": (_value(row, "one"), _ratio(row, "turns"), _ratio(row, "ours")),
        "none": (_value(row, "ours"),),
    }[row.reference]
    targets = () if row.reference == "none" else (_targets(row),)
    rounds = str(max(map(len, row.samples.values())))
    return f"| {' | '.join((row.name, *cells, *targets, rounds))} |"


def summary(rows: Iterable[Row]) -> str:
    """Say how many targets are met, and which rows miss one."""
    judged = [(row.name, row.is_met(target)) for row in rows for target in row.targets]
    missed = sorted({name for name, is_met in judged if is_met is False})
    met = sum(is_met is True for _, is_met in judged)
    end = f"; missed: {', '.join(missed)}" if missed else ""
    return f"{met} of {len(judged)} targets met{end}."


def _value(row: Row, side: str) -> str:
    value = row.value(side)
    return "-" if value is None else quantity(value, row.unit)


def _ratio(row: Row, side: str) -> str:
    found = row.ratio(side)
    if found is None:
        return "-"
    if len(row.samples[side]) == 1:
        return f"{found.median:.3f}"
    return f"{found.median:.3f} ({found.low:.3f} to {found.high:.3f})"


def _targets(row: Row) -> str:
    return ", ".join(_target(row, target) for target in row.targets) or "-"


def _target(row: Row, target: Target) -> str:
    high = f"{target.high:.2f}" if target.of == "ratio" else quantity(target.high, row.unit)
    bounds = f"{target.low:.2f} to {high}" if target.low else f"<= {high}"
    verdict = {True: "met", False: "missed", None: "not measured"}[row.is_met(target)]
    return f"{bounds}: {verdict}"
