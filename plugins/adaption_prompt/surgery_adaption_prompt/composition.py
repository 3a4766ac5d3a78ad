"""Several adapters at once: their weighted sum, which is exact because each has its own softmax."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery_adaption_prompt.architectures import architecture_of
from surgery_adaption_prompt.attention import AdaptedAttention, compose
from surgery_adaption_prompt.parts import GATE, PROMPT, PromptPart
from surgery_core import (
    Composed,
    OptionsError,
    Site,
    SurgeryError,
    WeightedSum,
    composed_names,
    read_text,
    write_files,
)


@dataclass(frozen=True, slots=True)
class Composition:
    """Adapters that are active at once, each with a weight on its term.

    The sum does not depend on the order, to the last bit: compositions are kept sorted by name.

    Args:
        weights: Factor on each adapter's term by its name, dimensionless, finite; may be negative.

    Raises:
        OptionsError: There is no adapter, or a weight is no finite number.

    Example:
        >>> print(Composition({"legal": 0.3, "fr": 0.7}))
        0.7*fr + 0.3*legal
    """

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        # What is given may be anything, whatever its type says.
        given: object = self.weights
        if not isinstance(given, Mapping):
            msg = (
                f"{given!r:.80} does not say which adapters are active together: expected names with "
                "weights. Write {'fr': 1.0, 'legal': 1.0}, for example."
            )
            raise OptionsError(msg)
        bad = [
            f"{name!r}: {weight!r}"
            for name, weight in self.weights.items()
            if isinstance(weight, bool)
            or not isinstance(weight, int | float)
            or not _is_finite(weight)
            or not isinstance(name, str)
        ]
        if bad or not self.weights:
            msg = (
                "Composition is invalid: expected adapter names with finite numbers, at least one, "
                f"got {', '.join(bad) or 'none'}. Write {{'fr': 0.7, 'legal': 0.3}}, for example."
            )
            raise OptionsError(msg)
        ordered = {name: float(self.weights[name]) for name in sorted(self.weights)}
        object.__setattr__(self, "weights", ordered)

    def __str__(self) -> str:
        return " + ".join(f"{weight:g}*{name}" for name, weight in self.weights.items())

    def __hash__(self) -> int:
        return hash(tuple(self.weights.items()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, complete or not at all.

        Raises:
            OSError: It could not be written; what was there before still is.
        """
        data = json.dumps({"weights": dict(self.weights)}, indent=2).encode()
        write_files(Path(path).parent, {Path(path).name: data}, durable=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Composition":
        """Read what `save` wrote.

        Raises:
            SurgeryError: The file cannot be read, or is something else.
            OptionsError: The weights are invalid.
        """
        try:
            values = json.loads(read_text(path))
        except (OSError, ValueError, RecursionError) as err:
            msg = f"Composition {str(path)!r} cannot be read: {err}. Pass a file that save wrote."
            raise SurgeryError(msg) from err
        if not (
            isinstance(values, dict)
            and set(values) == {"weights"}
            and isinstance(values["weights"], dict)
        ):
            msg = (
                f"{str(path)!r} is no composition: expected a JSON object with 'weights', got "
                f"{values!r:.80}."
            )
            raise SurgeryError(msg)
        return cls(values["weights"])


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        # JSON has integers that no float can be.
        return False


class PromptSum(WeightedSum[AdaptedAttention]):
    """Put several adapters at once on their attention modules; not offered to sessions."""

    name = "adaption_prompt_composition"
    summary = "Several adaption prompts at once, each with a weight."
    keeps_children = True
    # Of every adapter; conditioned ones have more.
    parameters = (PROMPT, GATE)

    def join(
        self, site: Site, modules: Mapping[str, AdaptedAttention], weights: Mapping[str, float]
    ) -> AdaptedAttention:
        """Return the attention module of the site, wrapped for all of them."""
        parts = []
        for name, module in modules.items():
            (part,) = module.prompts
            names = tuple(composed_names(name, part.names))
            parts.append(PromptPart(part.config, weight=weights[name], names=names))
        architecture = architecture_of(site.module, fqn=site.fqn)
        return compose(site.module, architecture, parts, self.borrowed(modules))

    def names_of(self, module: AdaptedAttention) -> tuple[str, ...]:
        """Return the names of an adapter's parameters, of which conditioned ones have more."""
        (part,) = module.prompts
        return part.names


def composed_adapters(
    composition: Composition, adapters: Mapping[str, Mapping[str, AdaptedAttention]]
) -> Composed:
    """Return what puts a composition on a model.

    Args:
        composition: Adapters and weights.
        adapters: Their modules by FQN in the base, by adapter name.
    """
    return PromptSum(adapters).composed(composition.weights)
