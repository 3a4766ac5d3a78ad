"""How two recipes or records differ."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from surgery_core.documents import describe_place
from surgery_core.recipe import Recipe
from surgery_core.record import Record

Sign = Literal["+", "-", "~"]

ABSENT = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that differs.

    Args:
        sign: It is new (`+`), gone (`-`) or another (`~`).
        place: Where it is, in the recipe or among the tensors.
        before: As text.
        after: As text.
    """

    sign: Sign
    place: str
    before: str
    after: str


def differences(
    before: Recipe,
    after: Recipe,
    records: Mapping[str, Record] | None = None,
    later_records: Mapping[str, Record] | None = None,
) -> list[Difference]:
    """Return how two recipes differ, and the tensors of their records where both have one.

    Args:
        before: A recipe.
        after: Another.
        records: Of the first, by model.
        later_records: Of the other.

    Example:
        >>> rule = {"operation": "low_rank", "options": {"r": 8}}
        >>> before = Recipe.model_validate({"models": {"chat": {"rules": [rule]}}})
        >>> rule = {"operation": "low_rank", "options": {"r": 16}}
        >>> after = Recipe.model_validate({"models": {"chat": {"rules": [rule]}}})
        >>> [(found.place, found.before, found.after) for found in differences(before, after)]
        [('models.chat.rules[0].options.r', '8', '16')]
    """
    old, new = _flat(before), _flat(after)
    found = [_difference(describe_place(p), old, new, p) for p in {**old, **new}]
    later = later_records or {}
    for name, record in (records or {}).items():
        if name in later:
            found += _tensors(name, record, later[name])
    return [item for item in found if item is not None]


def _flat(recipe: Recipe) -> dict[tuple[str | int, ...], str]:
    """Return every value of a recipe by its place, as text."""

    def walk(value: Any, place: tuple[str | int, ...]) -> Iterator[tuple[Any, str]]:  # noqa: ANN401 (plain data)
        if isinstance(value, dict) and value:
            for key, item in value.items():
                yield from walk(item, (*place, key))
        elif isinstance(value, list) and value:
            for number, item in enumerate(value):
                yield from walk(item, (*place, number))
        else:
            yield place, repr(value)

    # A single adapter is active, whether that is said or not.
    parts = {
        name: part.model_copy(update={"active": part.selected})
        for name, part in recipe.models.items()
    }
    whole = recipe.model_copy(update={"models": parts})
    return dict(walk(whole.model_dump(mode="json", exclude_defaults=True), ()))


def _difference(
    place: str, old: Mapping[Any, str], new: Mapping[Any, str], key: object
) -> Difference | None:
    before, after = old.get(key, ABSENT), new.get(key, ABSENT)
    if before == after:
        return None
    sign: Sign = "+" if key not in old else "-" if key not in new else "~"
    return Difference(sign=sign, place=place, before=before, after=after)


def _tensors(name: str, before: Record, after: Record) -> Iterator[Difference | None]:
    old, new = _described(before), _described(after)
    for key in {**old, **new}:
        what = f"{name}: {key[0]}: {key[1]}"
        yield _difference(what, old, new, key)
        if key in old and key in new and old[key] == new[key]:
            first, second = before.state[key[0]][key[1]], after.state[key[0]][key[1]]
            if not torch.equal(first, second):
                norms = [f"norm {float(tensor.double().norm()):.4g}" for tensor in (first, second)]
                most = float((first.double() - second.double()).abs().max())
                then = f"{norms[1]}, differs by at most {most:.1e}"
                yield Difference(sign="~", place=what, before=norms[0], after=then)


def _described(record: Record) -> dict[tuple[str, str], str]:
    """Return shape and dtype of every tensor, by adapter and key."""
    return {
        (name, key): f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        for name, state in record.state.items()
        for key, tensor in state.items()
    }
