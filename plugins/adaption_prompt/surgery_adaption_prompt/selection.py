"""From names, weights and rows to the terms they stand for."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from surgery_adaption_prompt.attention import AdaptedAttention
from surgery_adaption_prompt.composition import Composition
from surgery_adaption_prompt.operation import AdaptionPromptOperation
from surgery_core import (
    BASE,
    OptionsError,
    Selection,
    SwapState,
    listed,
    require_names,
    select,
)

COMPOSED, MERGED, ROWS = "derived/composed", "derived/merged", "derived/rows"
"""Variants made of adapters; no adapter's name has a separator."""

Choice = str | Mapping[str, float] | Composition
"""What one row, or a whole batch, gets: an adapter, several with weights, or `"__base__"`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Derived:
    """A variant that is made of adapters.

    Args:
        kind: One of the names above.
        variant: Its name in the swap state.
        choice: What it computes; for rows, what was active before.
    """

    kind: str
    variant: str
    choice: Choice


def select_adapters(
    swap_state: SwapState, known: Collection[str], choices: Sequence[Choice]
) -> Selection:
    """Look up the adapters of some rows.

    Args:
        swap_state: Has their modules.
        known: Names of the adapters there are.
        choices: What each row gets; one choice stands for a whole batch.

    Raises:
        OptionsError: There is no choice, or an adapter cannot share a batch with others.
        VariantError: There is no such adapter.
    """
    weights = [weights_of(choice) for choice in choices]
    names = sorted({name for found in weights for name in found})
    require_names(names, known)
    operation = AdaptionPromptOperation()
    return select(
        weights,
        {
            name: {fqn: (operation, m) for fqn, m in prompt_modules(name, swap_state).items()}
            for name in names
        },
    )


def prompt_modules(name: str, swap_state: SwapState) -> dict[str, AdaptedAttention]:
    """Return the attention modules of an adapter that may be active beside others, by FQN.

    Raises:
        OptionsError: It has modules saved whole.
    """
    found = swap_state.caught_up(name)
    modules = {fqn: m for fqn, m in found.items() if isinstance(m, AdaptedAttention)}
    if len(modules) < len(found):
        msg = (
            f"Adapter {name!r} cannot be used beside others: expected prompts only, got "
            f"modules_to_save at {listed(sorted(found.keys() - modules.keys()))}. Use set_adapter."
        )
        raise OptionsError(msg)
    return modules


def check_num_rows(adapter_names: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse names that are not one for each row of a model's input.

    Raises:
        OptionsError: They are no list, or not as many as rows, or no input is found.
    """
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        msg = (
            f"adapter_names is invalid: expected a list with a name for each row, got "
            f"{adapter_names!r}."
        )
        raise OptionsError(msg)
    inputs = [*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds"))]
    sizes = [found.shape[0] for found in inputs if isinstance(found, Tensor)]
    if sizes[:1] != [len(adapter_names)]:
        rows = f"a batch of {sizes[0]}" if sizes else "no input_ids, inputs or inputs_embeds"
        msg = (
            f"adapter_names has {len(adapter_names)} names for {rows}: expected one for each row. "
            f"Write {BASE!r} for rows that no adapter shall change."
        )
        raise OptionsError(msg)


def choices_of(adapters: Choice | Sequence[Choice]) -> Sequence[Choice]:
    """Return the choice for a whole batch, or those for each row, as a list.

    Raises:
        OptionsError: It is neither.
    """
    if isinstance(adapters, str | Mapping | Composition):
        return [adapters]
    given: object = adapters
    if isinstance(given, bytes) or not isinstance(given, Sequence):
        msg = (
            f"adapters is {adapters!r:.80}: expected an adapter's name, names with weights, or a list "
            "with one of them for each row. Write 'fr', {'fr': 0.7, 'legal': 0.3} or ['fr', 'legal']."
        )
        raise OptionsError(msg)
    return adapters


def weights_of(choice: Choice) -> Mapping[str, float]:
    """Return the weights of the adapters that a choice stands for; none for the base.

    Raises:
        OptionsError: It is not a choice, or a weight is not a finite number.
    """
    if isinstance(choice, str):
        return {} if choice == BASE else {choice: 1.0}
    return (choice if isinstance(choice, Composition) else Composition(choice)).weights
