"""The tasks: pairs of a source and the one right target, drawn the same every time, without data.

Train, validation and held-out examples of a task share nothing that could be remembered: no date,
and no name.
"""

import datetime as dt
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T")

Split = Literal["train", "validation", "heldout"]

SIZES: Mapping[Split, int] = {"train": 600, "validation": 60, "heldout": 120}
SEED = 20240611

MONTHS = "January February March April May June July August September October November December"
FORMS = (
    "{day} {month} {year}",
    "{month} {day}, {year}",
    "{short} {day}, {year}",
    "{day} {short} {year}",
    "{month} {ordinal}, {year}",
    "the {ordinal} of {month} {year}",
)
FIRST_DAY, NUM_DAYS = dt.date(1950, 1, 1), 30_000
FIRST_NAMES = (
    "Anna Boris Carla David Elena Felix Grace Henry Irene Jacob Karen Lucas Maria Nadia Oscar "
    "Paula Quinn Robert Sofia Thomas Ursula Victor Wendy Xavier Yusuf Zoe Amir Bianca Diego Emma "
    "Frank Gloria Hugo Ingrid James Kevin Laura Martin Nora Oliver Peter Rosa Simon Teresa Walter"
)
LAST_NAMES = (
    "Adams Baker Clark Dixon Evans Foster Green Harris Ingram Jones King Lopez Moore Nelson Owens "
    "Parker Reed Smith Turner Vargas Walker Young Becker Costa Duarte Fischer Garcia Hansen Keller "
    "Jensen Larsen Meyer Novak Olsen Petrov Rossi Silva Tanaka Weber Allen Brown Cooper Davis Ellis"
)
SENTENCES = (
    "{name} paid ${amount}.",
    "We got ${amount} from {name}.",
    "It was {name} who gave ${amount}.",
    "{name} owes us ${amount}.",
    "The hotel charged {name} ${amount}.",
    "A bill of ${amount} went to {name}.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One example.

    Args:
        source: What the model is given, before an arrow.
        target: What is right after it, and nothing else.
    """

    source: str
    target: str


def examples(task: str, split: Split) -> list[Example]:
    """Return the examples of a split of a task, no source twice.

    Example:
        >>> examples("dates", "train")[0]
        Example(source='February 28, 1977', target='1977-02-28')
        >>> examples("payments", "heldout")[0]
        Example(source='Teresa Clark owes us $924.84.', target='Clark, T.: 924.84')
    """
    drawn = TASKS[task](random.Random(f"{SEED} {task} {split}"), split)  # noqa: S311 (nothing here is secret)
    found: dict[str, Example] = {}
    while len(found) < SIZES[split]:
        example = next(drawn)
        found[example.source] = example
    return list(found.values())


def _dates(rng: random.Random, split: Split) -> Iterator[Example]:
    """Yield dates as people write them, and as ISO 8601 does."""
    days = _parts(range(NUM_DAYS), "dates")[split]
    while True:
        day = FIRST_DAY + dt.timedelta(days=rng.choice(days))
        # %B depends on the locale.
        month = MONTHS.split()[day.month - 1]
        source = rng.choice(FORMS).format(
            day=day.day, month=month, short=month[:3], year=day.year, ordinal=_ordinal(day.day)
        )
        yield Example(source=source, target=day.isoformat())


def _payments(rng: random.Random, split: Split) -> Iterator[Example]:
    """Yield sentences about a payment, and who paid how much, as in a ledger."""
    first_names = _parts(FIRST_NAMES.split(), "first names")[split]
    last_names = _parts(LAST_NAMES.split(), "last names")[split]
    while True:
        first, last = rng.choice(first_names), rng.choice(last_names)
        amount = f"{rng.randrange(2, 1000)}.{rng.randrange(100):02d}"
        source = rng.choice(SENTENCES).format(name=f"{first} {last}", amount=amount)
        yield Example(source=source, target=f"{last}, {first[0]}.: {amount}")


def _parts(things: Sequence[T], task: str) -> dict[Split, list[T]]:
    """Deal things out to the splits, each to one."""
    order = list(things)
    random.Random(f"{SEED} {task}").shuffle(order)  # noqa: S311 (nothing here is secret)
    cut = len(order) // 5
    return {"heldout": order[:cut], "validation": order[cut : 2 * cut], "train": order[2 * cut :]}


def _ordinal(day: int) -> str:
    """Return the day of a month as 1st, 2nd, 3rd, 4th, ..."""
    ending = "th" if day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


TASKS: Mapping[str, Callable[[random.Random, Split], Iterator[Example]]] = {
    "dates": _dates,
    "payments": _payments,
}
