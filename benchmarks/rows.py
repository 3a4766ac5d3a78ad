"""What a row is: a name, how it is measured, what was measured, and what was aimed at."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from measure import Samples
from models import Models

Unit = Literal["s", "bytes"]
Reference = Literal["base", "peft", "one", "none"]

UNITS: Mapping[Unit, tuple[tuple[float, str], ...]] = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")),
    "bytes": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes")),
}


class SkippedError(Exception):
    """A row cannot be measured here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Bounds on the median of our ratio to the reference, or of our own value.

    Args:
        low: Least value that is right.
        high: Greatest value that is right.
        of: A ratio (dimensionless), or what was measured (seconds or bytes).
    """

    low: float = 0.0
    high: float
    of: Literal["ratio", "value"] = "ratio"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A row that can be measured.

    Args:
        name: What `--only` matches.
        reference: The side that the others are divided by; `none` gives our values alone.
        measure: Takes the models and the number of rounds; raises SkippedError where it cannot.
        targets: What is aimed at.
        unit: Of what is measured.
    """

    name: str
    reference: Reference
    measure: Callable[[Models, int], Samples]
    targets: tuple[Target, ...] = ()
    unit: Unit = "s"

    def row(self, models: Models, rounds: int) -> "Row":
        """Measure."""
        samples, note = {}, ""
        try:
            samples = self.measure(models, rounds)
        except SkippedError as skipped:
            note = str(skipped)
        return Row(
            name=self.name,
            reference=self.reference,
            unit=self.unit,
            samples=samples,
            targets=self.targets,
            note=note,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Quartiles:
    """Three numbers that say where a sample lies."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Quartiles":
        """Return the quartiles of at least one value."""
        if len(values) == 1:
            return cls(low=values[0], median=values[0], high=values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low=low, median=median, high=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row that was measured."""

    name: str
    reference: Reference
    unit: Unit
    samples: Samples
    targets: tuple[Target, ...] = ()
    note: str = ""

    def value(self, side: str) -> float | None:
        """Return the median of what was measured; None if that side was not."""
        return statistics.median(self.samples[side]) if self.samples.get(side) else None

    def ratio(self, side: str) -> Quartiles | None:
        """Return the quartiles of the ratios to the reference, round by round."""
        over = self.samples.get(self.reference)
        if not over or not all(over) or not self.samples.get(side):
            return None
        return Quartiles.of([a / b for a, b in zip(self.samples[side], over, strict=True)])

    def is_met(self, target: Target) -> bool | None:
        """Tell whether a target is met; None if what it is about was not measured."""
        ratio = self.ratio("ours")
        found = self.value("ours") if target.of == "value" else ratio and ratio.median
        return None if found is None else target.low <= found <= target.high

    def to_mapping(self) -> dict[str, Any]:
        """Return it for JSON."""
        samples = {
            side: [float(f"{value:.6g}") for value in values]
            for side, values in self.samples.items()
        }
        return {**asdict(self), "samples": samples}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "Row":
        """Return what `to_mapping` was called on, to six digits."""
        targets = tuple(Target(**target) for target in values["targets"])
        return cls(**{**values, "targets": targets})


def quantity(value: float, unit: Unit) -> str:
    """Write a value with the largest unit that leaves at least 1 before the point."""
    scales = UNITS[unit]
    scale, name = next((found for found in scales if value >= found[0]), scales[-1])
    digits = 0 if name == "bytes" else 2
    return f"{value / scale:.{digits}f} {name}"
