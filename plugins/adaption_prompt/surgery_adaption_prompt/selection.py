"""From names, weights and rows to the terms they stand for."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from surgery_adaption_prompt.attention import AdaptedAttention
from surgery_adaption_prompt.composition import Composition
from surgery_adaption_prompt.folders import BASE
from surgery_adaption_prompt.rows import Entry, SharedTerms
from surgery_core import OptionsError, SwapState, VariantError, listed

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selected:
    """Adapters that were looked up.

    Args:
        names: The adapters.
        rows: By FQN, for each row the adapters whose terms are added.
    """

    names: frozenset[str]
    rows: Mapping[str, Sequence[Sequence[Entry]]]

    def terms(self) -> SharedTerms:
        """Return what attention modules are asked for."""
        by_site = {}
        for chosen in self.rows.values():
            attention = next(at for row in chosen for at, _ in row)
            are_equal = all(row == chosen[0] for row in chosen)
            by_site[id(attention.base_attention)] = chosen[:1] if are_equal else chosen
        return SharedTerms(by_site)


def select(swap_state: SwapState, known: Collection[str], choices: Sequence[Choice]) -> Selected:
    """Look up the adapters of some rows.

    Args:
        swap_state: Has their modules.
        known: Names of the adapters there are.
        choices: What each row gets; one choice stands for a whole batch.

    Raises:
        OptionsError: There is no choice, or an adapter cannot share a batch with others.
        VariantError: There is no such adapter.
    """
    if not choices:
        msg = f"Selection has no rows: expected an adapter name or {BASE!r} for each row, got none."
        raise OptionsError(msg)
    compositions = [weights_of(choice) for choice in choices]
    names = frozenset(name for found in compositions for name in found)
    require_adapters(names, known)
    modules = {name: prompt_modules(name, swap_state) for name in names}
    for name, found in modules.items():
        _require_place(name, found)
    entries: dict[tuple[str, float, str], Entry] = {}

    def entry(name: str, weight: float, fqn: str) -> Entry:
        module = modules[name][fqn]
        (part,) = module.prompts
        # One part for each adapter and weight, which is how rows that get the same are found.
        return entries.setdefault((name, weight, fqn), (module, part.weighted(weight)))

    fqns = sorted({fqn for found in modules.values() for fqn in found})
    return Selected(
        names=names,
        rows={
            fqn: [
                [entry(n, weight, fqn) for n, weight in found.items() if fqn in modules[n]]
                for found in compositions
            ]
            for fqn in fqns
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


def _require_place(name: str, modules: Mapping[str, AdaptedAttention]) -> None:
    """Refuse an adapter that adds its terms where modules of others would not ask for them."""
    for fqn, module in modules.items():
        (part,) = module.prompts
        if not part.config.project_output and not module.architecture.may_skip_projection(module):
            msg = (
                f"Adapter {name!r} cannot be used beside others: expected project_output=True at "
                f"{fqn!r} for {type(module.base_attention).__name__}. Use set_adapter."
            )
            raise OptionsError(msg)


def require_adapters(names: Collection[str], known: Collection[str]) -> None:
    """Refuse names of adapters that there are not.

    Raises:
        VariantError: There are such names; all are named.
    """
    unknown = sorted(name for name in names if name not in known)
    if unknown:
        msg = f"Adapter {listed(unknown)} does not exist: expected some of {listed(sorted(known))}."
        raise VariantError(msg)


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


def weights_of(choice: Choice) -> Mapping[str, float]:
    """Return the weights of the adapters that a choice stands for; none for the base."""
    if isinstance(choice, str):
        return {} if choice == BASE else {choice: 1.0}
    return (choice if isinstance(choice, Composition) else Composition(choice)).weights
