"""Several adapters at once: their weighted sum, which is exact because each has its own softmax."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from surgery_adaption_prompt.architectures import architecture_of
from surgery_adaption_prompt.attention import AdaptedAttention, compose
from surgery_adaption_prompt.parts import GATE, PROMPT, PromptPart
from surgery_core import (
    BoundRule,
    Effects,
    Operation,
    OptionsError,
    Rule,
    Selector,
    Site,
    SurgeryError,
    TensorSpec,
    Tree,
    Where,
)

NAME = "adaption_prompt_composition"


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
        bad = [
            f"{name!r}: {weight!r}"
            for name, weight in self.weights.items()
            if isinstance(weight, bool)
            or not isinstance(weight, int | float)
            or not math.isfinite(weight)
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
        """Write it as JSON, complete or not at all."""
        target = Path(path)
        staged = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            staged.write_text(json.dumps({"weights": dict(self.weights)}, indent=2))
            staged.replace(target)
        finally:
            staged.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Composition":
        """Read what `save` wrote.

        Raises:
            SurgeryError: The file cannot be read, or is something else.
            OptionsError: The weights are invalid.
        """
        try:
            values = json.loads(Path(path).read_text())
        except (OSError, ValueError) as err:
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


def parameter_names(adapter_name: str) -> dict[str, str]:
    """Return the names an adapter's parameters have in a composition, with those it gives them.

    Example:
        >>> parameter_names("v1.0")
        {'adaption_prompt_v1%2E0': 'adaption_prompt', 'adaption_gate_v1%2E0': 'adaption_gate'}
    """
    # A dot would begin another segment of the FQN.
    key = adapter_name.replace("%", "%25").replace(".", "%2E")
    return {f"{PROMPT}_{key}": PROMPT, f"{GATE}_{key}": GATE}


class CompositionOperation(Operation[Composition]):
    """Put several adapters at once on their attention modules; not offered to sessions.

    Args:
        adapters: Modules by FQN in the base, by adapter name.
    """

    name = NAME
    summary = "Several adaption prompts at once, each with a weight."

    def __init__(self, adapters: Mapping[str, Mapping[str, AdaptedAttention]]) -> None:
        self._adapters = adapters

    def parse_options(self, options: Mapping[str, Any]) -> Composition:
        """Read the weights."""
        return Composition(options["weights"])

    def targets(self, tree: Tree, options: Composition) -> Selector:  # noqa: ARG002 (any tree)
        """Choose every module that one of the adapters is for."""
        fqns = frozenset(fqn for name in options.weights for fqn in self._adapters[name])
        return Where(lambda fqn, _: fqn in fqns, f"attention modules of {options}")

    def describe(self, site: Site, options: Composition) -> Effects:
        """Return the tensors of every adapter that is for the module."""
        own = self._parameters(site, options)
        return Effects(
            added=tuple(
                TensorSpec(
                    name=name,
                    shape=tuple(parameter.shape),
                    dtype=str(parameter.dtype).removeprefix("torch."),
                    trainable=parameter.requires_grad,
                )
                for name, parameter in own.items()
            )
        )

    def build(self, site: Site, options: Composition) -> AdaptedAttention:
        """Return the attention module of the site, wrapped for all of them."""
        parts = []
        for name, weight in options.weights.items():
            if site.fqn in self._adapters[name]:
                (part,) = self._adapters[name][site.fqn].prompts
                prompt, gate = parameter_names(name)
                parts.append(
                    PromptPart(part.config, weight=weight, prompt_name=prompt, gate_name=gate)
                )
        architecture = architecture_of(site.module, fqn=site.fqn)
        return compose(site.module, architecture, parts, self._parameters(site, options))

    def _parameters(self, site: Site, options: Composition) -> dict[str, nn.Parameter]:
        return {
            own: getattr(self._adapters[name][site.fqn], given)
            for name in options.weights
            if site.fqn in self._adapters[name]
            for own, given in parameter_names(name).items()
        }


def composition_rule(
    composition: Composition, adapters: Mapping[str, Mapping[str, AdaptedAttention]]
) -> BoundRule:
    """Return the rule that puts a composition on a model.

    Args:
        composition: Adapters and weights.
        adapters: Their modules by FQN in the base, by adapter name.
    """
    rule = Rule(operation=NAME, options={"weights": dict(composition.weights)})
    return BoundRule(rule=rule, operation=CompositionOperation(adapters))
