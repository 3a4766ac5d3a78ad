"""The results as Markdown: what was searched, tables with the spread over seeds, and who wins."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from methods import ABLATIONS, COMPARED, METHODS, SEARCHED
from runs import Plan, Result, chosen_rates, final_runs, missing, search_runs
from tasks import TASKS

PAIRS = (
    ("ours", "base"),
    ("ours", "base-shown"),
    ("ours", "peft"),
    ("ours", "peft-lora"),
    *((key, "ours") for key in ABLATIONS),
)
"""Who is compared with whom."""

KNOBS: Mapping[str, Mapping[str, str]] = {
    "gates before training": {"0": "ours", "N(0, 1)": "random-1"},
    "gate": {"per layer": "ours", "per head": "head"},
    "L": {"10": "L10", "20": "ours", "30": "L30"},
    "K": {"5": "K5", "10": "ours", "20": "K20"},
}
"""By what can be chosen, its values, and who has them."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Values of one thing, a seed each.

    Example:
        >>> print(Spread((1.0, 3.0, 2.0)))
        2.000 (1.000 to 3.000)
    """

    values: tuple[float, ...]
    form: str = ".3f"

    @property
    def mean(self) -> float:
        """The mean."""
        return sum(self.values) / len(self.values)

    @property
    def low(self) -> float:
        """The least."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The greatest."""
        return max(self.values)

    def __str__(self) -> str:
        text = f"{self.mean:{self.form}}"
        if len(self.values) > 1:
            text += f" ({self.low:{self.form}} to {self.high:{self.form}})"
        return text


def percent(results: Iterable[Result]) -> Spread:
    """Return exact match in percent."""
    return Spread(tuple(100 * r.exact / r.num_examples for r in results), ".1f")


def losses(results: Iterable[Result]) -> Spread:
    """Return losses in nats per token."""
    return Spread(tuple(r.loss for r in results))


def finals(results: Iterable[Result], task: str, method: str) -> list[Result]:
    """Return the final results of a method on a task, by seed."""
    found = [
        r for r in results if (r.run.stage, r.run.task, r.run.method) == ("final", task, method)
    ]
    return sorted(found, key=lambda r: r.run.seed or 0)


def report(results: Sequence[Result], plan: Plan) -> str:
    """Return everything."""
    rates = chosen_rates(results, plan)
    planned = [*search_runs(plan), *final_runs(plan, rates)]
    known = [r for r in results if r.run in planned]
    left = list(missing(planned, known))
    lines = ["# Quality: exact match and loss by method", ""]
    lines += [f"- {key}: {value}" for key, value in known[0].setup.items()]
    seconds = sum(r.seconds for r in known)
    searching = sum(r.seconds for r in known if r.run.stage == "search")
    tried = ", ".join(f"{rate:g}" for rate in plan.rates)
    lines.append(f"- seeds: {', '.join(map(str, plan.seeds))}; learning rates tried: {tried}")
    lines.append(
        f"- {len(known)} runs with one thread each, {seconds:.0f} s in all, of which "
        f"{searching:.0f} s for the search of learning rates; {len(left)} runs are missing; "
        f"{len(results) - len(known)} results are of no run of the plan"
    )
    for task in TASKS:
        lines += ["", f"## Task `{task}`", "", *_table(known, task)]
    lines += ["", "## Who is better", "", *comparisons(known)]
    lines += ["", "## What to choose", "", *choices(known, plan)]
    lines += ["", "## Learning rates", "", *_search_table(known, plan)]
    return "\n".join(lines) + "\n"


def comparisons(results: Sequence[Result]) -> Iterator[str]:
    """Yield a line for each pair and task: whether one is better for every seed of both."""
    yield (
        "*Better* means that its worst seed is better than the other's best; otherwise the two are "
        "*within the spread*. Differences are of the means; points are percentage points."
    )
    yield ""
    yield "| compared | task | exact match | loss |"
    yield "|---|---|---|---|"
    for one, other in PAIRS:
        for task in TASKS:
            mine, theirs = finals(results, task, one), finals(results, task, other)
            if mine and theirs:
                exact = _verdict(percent(mine), percent(theirs), one, other, sign=1)
                loss = _verdict(losses(mine), losses(theirs), one, other, sign=-1)
                titles = f"{METHODS[one].title} against {METHODS[other].title}"
                yield f"| {titles} | {task} | {exact} | {loss} |"


def choices(results: Sequence[Result], plan: Plan) -> Iterator[str]:
    """Yield a line for each value of each thing that can be chosen: means over tasks and seeds."""
    tasks = ", ".join(f"`{task}`" for task in plan.ablated)
    yield f"Means over seeds, of {tasks}; the best of each choice in bold."
    yield ""
    yield "| choice | value | trained parameters | exact match, % | loss, nats |"
    yield "|---|---|---|---|---|"
    for knob, values in KNOBS.items():
        rows = []
        for value, key in values.items():
            found = [finals(results, task, key) for task in plan.ablated]
            if all(found):
                exact = Spread(tuple(percent(f).mean for f in found), ".1f").mean
                loss = Spread(tuple(losses(f).mean for f in found)).mean
                rows.append((value, found[0][0].parameters, exact, loss))
        for value, parameters, exact, loss in rows:
            cells = (
                _bold(f"{exact:.1f}", is_best=exact == max(row[2] for row in rows)),
                _bold(f"{loss:.3f}", is_best=loss == min(row[3] for row in rows)),
            )
            yield f"| {knob} | {value} | {parameters:,} | {' | '.join(cells)} |"


def _bold(text: str, *, is_best: bool) -> str:
    return f"**{text}**" if is_best else text


def _verdict(mine: Spread, theirs: Spread, one: str, other: str, *, sign: int) -> str:
    """Say who is better, where greater values are, or less with a sign of -1."""
    difference = mine.mean - theirs.mean
    unit = "points" if sign > 0 else "nats"
    shown = f"{difference:+{mine.form}} {unit}"
    for first, second, winner in ((mine, theirs, one), (theirs, mine, other)):
        is_above = first.low > second.high
        is_below = first.high < second.low
        if is_above if sign > 0 else is_below:
            return f"{shown}: {METHODS[winner].title} is better"
    return f"{shown}: within the spread"


def _table(results: Sequence[Result], task: str) -> Iterator[str]:
    yield "| | trained parameters | rate | exact match, % | loss, nats | loss of the first batch | seconds |"
    yield "|---|---|---|---|---|---|---|"
    for key in (*COMPARED, *ABLATIONS):
        found = finals(results, task, key)
        if not found:
            continue
        first = found[0]
        rate = "-" if first.run.rate is None else f"{first.run.rate:g}"
        begins = str(Spread(tuple(r.losses[0] for r in found), ".2f")) if first.losses else "-"
        seconds = Spread(tuple(r.seconds for r in found), ".0f")
        yield (
            f"| {METHODS[key].title} | {first.parameters:,} | {rate} | {percent(found)} | "
            f"{losses(found)} | {begins} | {seconds.mean:.0f} |"
        )


def _search_table(results: Sequence[Result], plan: Plan) -> Iterator[str]:
    """Yield validation losses by rate, and a warning where the best rate is the first or last."""
    rates = chosen_rates(results, plan)
    yield "Loss on the validation split, nats (exact match, %); the chosen rate in bold."
    yield ""
    yield f"| | task | {' | '.join(f'{rate:g}' for rate in plan.rates)} | |"
    yield "|---" * (len(plan.rates) + 3) + "|"
    for task in TASKS:
        for method in SEARCHED:
            chosen = rates.get((task, method))
            cells = []
            for rate in plan.rates:
                wanted = ("search", task, method, rate)
                found = [
                    r
                    for r in results
                    if (r.run.stage, r.run.task, r.run.method, r.run.rate) == wanted
                ]
                text = f"{losses(found)} ({percent(found)})" if found else "-"
                cells.append(_bold(text, is_best=bool(found) and rate == chosen))
            note = "at the edge" if chosen in (min(plan.rates), max(plan.rates)) else ""
            yield f"| {METHODS[method].title} | {task} | {' | '.join(cells)} | {note} |"
