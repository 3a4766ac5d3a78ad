"""What is run: which method on which task, with which rate and seed; and what came of it."""

import hashlib
import json
import math
import platform
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from bases import load, name
from methods import ABLATIONS, METHODS, SEARCHED, build
from tasks import TASKS, Split, examples
from training import score, train

PACKAGES = ("torch", "transformers", "peft", "surgery-core", "surgery-adaption-prompt")
SOURCES = ("bases.py", "methods.py", "tasks.py", "training.py")
"""Files that say what a result is a result of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is run.

    Args:
        is_quick: With the tiny model.
        rates: Learning rates tried, for every method of `SEARCHED` on every task.
        seeds: Of the runs that count; the first is also that of the search.
        steps: By task.
        batch_sizes: By task.
        sizes: How many examples of a split are used.
        ablated: Tasks on which the ablations are done.
    """

    is_quick: bool
    rates: Sequence[float]
    seeds: Sequence[int]
    steps: Mapping[str, int]
    batch_sizes: Mapping[str, int]
    sizes: Mapping[Split, int]
    ablated: Sequence[str]


FULL = Plan(
    is_quick=False,
    rates=(0.005, 0.02, 0.08),
    seeds=(0, 1, 2),
    steps={"dates": 48, "payments": 36},
    batch_sizes={"dates": 8, "payments": 8},
    sizes={"train": 600, "validation": 60, "heldout": 120},
    ablated=("payments",),
)
QUICK = Plan(
    is_quick=True,
    rates=(0.003, 0.01),
    seeds=(0, 1),
    steps={"dates": 2, "payments": 2},
    batch_sizes={"dates": 4, "payments": 4},
    sizes={"train": 16, "validation": 8, "heldout": 8},
    ablated=("dates", "payments"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training, and its measurement.

    Args:
        stage: "search" is measured on the validation split, "final" on the held-out one.
        task: Key of the task.
        method: Key of the method.
        rate: Learning rate; None where nothing is trained.
        seed: For what is random at first, and the order of the examples; None for the same reason.
    """

    stage: Literal["search", "final"]
    task: str
    method: str
    rate: float | None
    seed: int | None

    @property
    def name(self) -> str:
        """What `--only` is compared with; a final run has its name before its rate is known."""
        last = self.rate if self.stage == "search" else self.seed
        what = f"{self.stage} {self.task} {self.method}"
        return what if last is None else f"{what} {last}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a run.

    Args:
        run: The run.
        exact: How many answers are right.
        num_examples: Of how many.
        loss: Mean cross-entropy of the answers' tokens, in nats.
        parameters: How many values were trained.
        losses: Of the batch of every step, before the step, in nats.
        seconds: All that the run took, loading included.
        setup: Machine, versions, model and a digest of the code.
    """

    run: Run
    exact: int
    num_examples: int
    loss: float
    parameters: int
    losses: tuple[float, ...]
    seconds: float
    setup: Mapping[str, str]

    def line(self) -> str:
        """Return one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> "Result":
        """Read what `line` wrote."""
        found: dict[str, Any] = json.loads(line)
        return cls(
            **found | {"run": Run(**found["run"]), "losses": tuple(found["losses"])},
        )


def search_runs(plan: Plan) -> list[Run]:
    """Return the runs that choose learning rates."""
    return [
        Run(stage="search", task=task, method=method, rate=rate, seed=plan.seeds[0])
        for task in TASKS
        for method in SEARCHED
        for rate in plan.rates
    ]


def final_runs(plan: Plan, rates: Mapping[tuple[str, str], float]) -> list[Run]:
    """Return the runs that count, seed by seed.

    Args:
        plan: How much is run.
        rates: What `chosen_rates` returned; where there is none yet the rate is nan.
    """
    runs = []
    for seed in plan.seeds:
        for task in TASKS:
            for key, method in METHODS.items():
                if key in ABLATIONS and task not in plan.ablated:
                    continue
                if method.kind != "base":
                    searched = method.searched_as or key
                    rate = rates.get((task, searched), math.nan)
                    runs.append(_final(task, key, rate, seed))
                elif seed == plan.seeds[0]:
                    # Nothing about it is random.
                    runs.append(_final(task, key, None, None))
    return runs


def chosen_rates(results: Iterable[Result], plan: Plan) -> dict[tuple[str, str], float]:
    """Return by task and method the rate with the lowest validation loss, where all were tried."""
    tried: dict[tuple[str, str], dict[float, float]] = {}
    for result in results:
        run = result.run
        if run.stage == "search" and run.rate is not None and run.rate in plan.rates:
            # nan would win or lose by chance.
            loss = float("inf") if math.isnan(result.loss) else result.loss
            tried.setdefault((run.task, run.method), {})[run.rate] = loss
    return {
        key: min(losses, key=losses.__getitem__)
        for key, losses in tried.items()
        if len(losses) == len(plan.rates)
    }


def needed_searches(runs: Iterable[Run], plan: Plan) -> list[Run]:
    """Return the searches that choose the rates of final runs."""
    needed = {
        (run.task, METHODS[run.method].searched_as or run.method)
        for run in runs
        if run.stage == "final"
    }
    return [run for run in search_runs(plan) if (run.task, run.method) in needed]


def execute(run: Run, plan: Plan) -> Result:
    """Do a run, with one thread, so that its numbers do not depend on how many there are."""
    began = time.perf_counter()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    method = METHODS[run.method]
    base = load(is_quick=plan.is_quick)
    model = build(method, base.model, run.seed or 0)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    learned = examples(run.task, "train")[: plan.sizes["train"]]
    losses = []
    if run.rate is not None and run.seed is not None:
        losses = train(
            model,
            base.encode,
            learned,
            steps=plan.steps[run.task],
            batch_size=plan.batch_sizes[run.task],
            rate=run.rate,
            seed=run.seed,
        )
    split: Split = "validation" if run.stage == "search" else "heldout"
    measured = examples(run.task, split)[: plan.sizes[split]]
    found = score(model, base.encode, measured, learned[: method.num_shown])
    return Result(
        run=run,
        exact=found.exact,
        num_examples=len(measured),
        loss=round(found.loss, 5),
        parameters=parameters,
        losses=tuple(round(loss, 5) for loss in losses),
        seconds=round(time.perf_counter() - began, 2),
        setup=setup(plan),
    )


def setup(plan: Plan) -> dict[str, str]:
    """Return what results depend on besides their run."""
    code = b"".join((Path(__file__).parent / file).read_bytes() for file in SOURCES)
    return {
        "device": _processor(),
        "Python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "model": name(is_quick=plan.is_quick),
        "steps": _listed(plan.steps),
        "batch sizes": _listed(plan.batch_sizes),
        "examples": _listed(plan.sizes),
        "code": hashlib.sha256(code).hexdigest()[:12],
    }


def read_results(path: Path) -> list[Result]:
    """Return what a file holds; nothing if there is none."""
    if not path.exists():
        return []
    return [Result.from_line(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _final(task: str, method: str, rate: float | None, seed: int | None) -> Run:
    return Run(stage="final", task=task, method=method, rate=rate, seed=seed)


def _listed(numbers: Mapping[Any, int]) -> str:
    return ", ".join(f"{key} {number}" for key, number in numbers.items())


def _processor() -> str:
    """Return its name and the instructions that torch uses: names alone are shared by several kinds."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def missing(runs: Iterable[Run], results: Iterable[Result]) -> Iterator[Run]:
    """Yield the runs that have no result yet."""
    done = {result.run for result in results}
    return (run for run in runs if run not in done)
