"""Choices of adapters: their names and weights, and the rows of a batch that each is for."""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite

from surgery_core.errors import OptionsError, VariantError, listed
from surgery_core.operation import BASE


def require_names(names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names of adapters that there are not.

    Raises:
        VariantError: There are such names; all are named.
    """
    there = set(known)
    unknown = sorted(name for name in names if name not in there)
    if unknown:
        msg = f"Adapter {listed(unknown)} does not exist: expected some of {listed(sorted(there))}."
        raise VariantError(msg)


def weights_of(choice: str | Mapping[str, float]) -> dict[str, float]:
    """Return the weights of the variants that a choice stands for; none for `BASE`.

    Raises:
        OptionsError: It is neither a name nor names with weights, or a weight is not a finite number.

    Example:
        >>> weights_of("fr"), weights_of({"fr": 1, "legal": 0.5}), weights_of(BASE)
        ({'fr': 1.0}, {'fr': 1.0, 'legal': 0.5}, {})
    """
    if isinstance(choice, str):
        return {} if choice == BASE else {choice: 1.0}
    if not isinstance(choice, Mapping) or not all(isinstance(name, str) for name in choice):
        msg = (
            "A choice of adapters is a name, or a mapping of names to weights such as "
            f'{{"a": 1.0, "b": 0.5}}, got {choice!r}. Give either; a list is for the rows of a batch, '
            "in activated()."
        )
        raise OptionsError(msg)
    bad = [
        f"{name!r}: {weight!r}"
        for name, weight in choice.items()
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not isfinite(weight)
    ]
    if bad:
        msg = f"Weights of variants must be finite numbers, got {', '.join(bad)}. Fix them."
        raise OptionsError(msg)
    return {name: float(weight) for name, weight in choice.items()}


def repeats_of(batch: int, num_rows: int) -> int:
    """Return how many rows of a batch each row that was named stands for, in succession.

    Raises:
        OptionsError: The batch has another number of rows.

    Example:
        >>> repeats_of(6, 2)
        3
    """
    if batch % num_rows:
        msg = (
            f"Batch has {batch} rows: expected {num_rows}, one for each adapter name, or a multiple "
            "of that. Name one adapter for each row."
        )
        raise OptionsError(msg)
    return batch // num_rows


def rows_at(places: Sequence[int], place: int, repeats: int) -> slice | list[int]:
    """Return the rows of a batch at a place; a slice, which copies nothing, if they are neighbours.

    Args:
        places: Of the rows that were named; one of them is `place`.
        place: Any number.
        repeats: How many rows in succession each of those stands for.

    Example:
        >>> rows_at([0, 1, 1], 1, repeats=2), rows_at([1, 0, 1], 1, repeats=1)
        (slice(2, 6, None), [0, 2])
    """
    found = [row for row, at in enumerate(places) if at == place]
    if found[-1] - found[0] == len(found) - 1:
        return slice(found[0] * repeats, (found[-1] + 1) * repeats)
    return [row * repeats + again for row in found for again in range(repeats)]
