"""What was measured while training: losses and gates by step."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

GATE = "gate "
"""Prefix of a gate's entry among what is logged for a step."""

LOSS, VALIDATION = "loss", "eval_loss"


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Losses and gates of a training.

    Args:
        losses: `(step, mean cross-entropy of the answers' tokens in nats)` of each step's batch.
        validation: Same, of the validation examples.
        gates: `(step, mean of the magnitudes)` by the name of each gate.
    """

    losses: tuple[tuple[int, float], ...] = ()
    validation: tuple[tuple[int, float], ...] = ()
    gates: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)

    @classmethod
    def of_log(cls, entries: Iterable[Mapping[str, Any]]) -> Self:
        """Collect what was logged, in which each step comes once for losses and for validation.

        Example:
            >>> log = [{"loss": 2.0, "gate g": 0.5, "step": 1}, {"eval_loss": 3.0, "step": 1}]
            >>> History.of_log(log)
            History(losses=((1, 2.0),), validation=((1, 3.0),), gates={'g': ((1, 0.5),)})
        """
        losses, validation = [], []
        gates: dict[str, list[tuple[int, float]]] = {}
        for entry in entries:
            step = int(entry["step"])
            if LOSS in entry:
                losses.append((step, float(entry[LOSS])))
            if VALIDATION in entry:
                validation.append((step, float(entry[VALIDATION])))
            for key, value in entry.items():
                if key.startswith(GATE):
                    gates.setdefault(key.removeprefix(GATE), []).append((step, float(value)))
        return cls(
            losses=tuple(losses),
            validation=tuple(validation),
            gates={name: tuple(values) for name, values in gates.items()},
        )

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the first lowest measurement; None without any."""
        return min(self.validation, key=lambda item: item[1], default=None)

    def is_exhausted(self, patience: int | None) -> bool:
        """Tell whether so many measurements in a row brought no new lowest loss.

        Args:
            patience: How many; None means that it never ends.
        """
        if patience is None or self.best is None:
            return False
        since = [step for step, _ in self.validation if step > self.best[0]]
        return len(since) >= patience

    @property
    def is_finite(self) -> bool:
        """Whether every loss is a number."""
        return all(math.isfinite(loss) for _, loss in (*self.losses, *self.validation))
