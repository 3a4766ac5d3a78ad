"""Write the demo's data: sentences about payments, and what is to be extracted from them.

Run without arguments it writes `data/train.jsonl` and `data/heldout.jsonl` again, byte for byte. The
two share sentence templates, but no sentence, first name or last name.
"""

import datetime as dt
import json
import random
from collections.abc import Sequence
from pathlib import Path

DATA = Path(__file__).parent / "data"
SEED = 20240305
NUM_TRAIN = 600
NUM_HELDOUT = 120

FIRST_NAMES = (
    "Anna Boris Carla David Elena Felix Grace Henry Irene Jacob Karen Lucas Maria Nadia Oscar "
    "Paula Quinn Robert Sofia Thomas Ursula Victor Wendy Xavier Yusuf Zoe Amir Bianca Diego Emma "
    "Frank Gloria Hugo Ingrid James Kevin Laura Martin Nora Oliver Peter Rosa Simon Teresa Walter "
    "Alice Bruno Clara Daniel Esther George Hannah Ivan Julia Leo Monica Nathan Olga Pablo Rita"
)
LAST_NAMES = (
    "Adams Baker Clark Dixon Evans Foster Green Harris Ingram Jones King Lopez Moore Nelson Owens "
    "Parker Reed Smith Turner Vargas Walker Young Becker Costa Duarte Fischer Garcia Hansen Ito "
    "Jensen Keller Larsen Meyer Novak Olsen Petrov Rossi Silva Tanaka Weber Allen Brown Cooper "
    "Davis Ellis Ford Gray Hill Irwin Kelly Lewis Miller Norris Price Roberts Scott Taylor Wood"
)
NUM_HELDOUT_NAMES = 15

TEMPLATES = (
    "{name} paid {amount} on {date}.",
    "On {date}, {name} paid {amount} for the repairs.",
    "We received {amount} from {name} on {date}.",
    "The invoice of {date} over {amount} was settled by {name}.",
    "Please refund {amount} to {name}, who cancelled on {date}.",
    "{name} owes us {amount} since {date}.",
    "A transfer of {amount} reached {name} on {date}.",
    "{date}: {name} bought a bicycle for {amount}.",
    "For the concert on {date}, {name} spent {amount}.",
    "It was {name} who donated {amount} on {date}.",
    "By {date} the rent of {amount} is due from {name}.",
    "The hotel charged {name} {amount} on {date}.",
    "Invoice {number}: {name}, {amount}, payable by {date}.",
    "Order {number} from {date} was shipped to {name} after a payment of {amount}.",
    "In room {number}, {name} lost {amount} at cards on {date}.",
    "Receipt {number} says that on {date} a total of {amount} came from {name}.",
)
AMOUNTS = ("${}", "{} dollars", "{} euros", "EUR {}")
# %B depends on the locale; the names are spelled out below.
DATES = ("{day} {month} {year}", "{month} {day}, {year}", "{short} {day}, {year}", "{iso}")
MONTHS = "January February March April May June July August September October November December"


def draw(rng: random.Random, first: Sequence[str], last: Sequence[str]) -> dict[str, str]:
    """Draw one example.

    Args:
        rng: Where chance comes from.
        first: First names to choose from.
        last: Last names to choose from.

    Returns:
        `sentence`, and the `answer`: compact JSON with an ISO date and an amount of two decimals.
    """
    name = f"{rng.choice(first)} {rng.choice(last)}"
    day = dt.date(2015, 1, 1) + dt.timedelta(days=rng.randrange(3650))
    whole = rng.choice((rng.randrange(2, 100), rng.randrange(100, 1000)))
    amount = f"{whole}.{rng.randrange(100):02d}"
    month = MONTHS.split()[day.month - 1]
    date = rng.choice(DATES).format(
        day=day.day, month=month, short=month[:3], year=day.year, iso=day.isoformat()
    )
    sentence = rng.choice(TEMPLATES).format(
        name=name,
        date=date,
        amount=rng.choice(AMOUNTS).format(amount),
        number=rng.randrange(100, 10000),
    )
    # Written by hand, since json.dumps drops the second decimal of 120.50.
    answer = f'{{"name":"{name}","date":"{day.isoformat()}","amount":{amount}}}'
    return {"sentence": sentence, "answer": answer}


def make() -> dict[str, str]:
    """Return the contents of the two files by file name."""
    rng = random.Random(SEED)  # noqa: S311 (nothing here is secret)
    first, last = FIRST_NAMES.split(), LAST_NAMES.split()
    rng.shuffle(first)
    rng.shuffle(last)
    cut = NUM_HELDOUT_NAMES
    files = {}
    for file, size, names in (
        ("train.jsonl", NUM_TRAIN, (first[cut:], last[cut:])),
        ("heldout.jsonl", NUM_HELDOUT, (first[:cut], last[:cut])),
    ):
        # By sentence, so that none comes twice.
        examples: dict[str, dict[str, str]] = {}
        while len(examples) < size:
            example = draw(rng, *names)
            examples[example["sentence"]] = example
        files[file] = "".join(f"{json.dumps(example)}\n" for example in examples.values())
    return files


def main() -> None:
    """Write both files."""
    DATA.mkdir(exist_ok=True)
    for file, text in make().items():
        (DATA / file).write_text(text, encoding="ascii", newline="\n")
        print(f"{DATA / file}: {text.count(chr(10))} examples")


if __name__ == "__main__":
    main()
