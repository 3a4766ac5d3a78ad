"""Compare methods on tasks: `run` adds what is missing to a file of results, `report` shows them.

`--only` takes a glob of run names; what their learning rates depend on is run as well.
"""

import argparse
import multiprocessing
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from fnmatch import fnmatch
from pathlib import Path

from runs import (
    FULL,
    QUICK,
    Plan,
    Result,
    Run,
    chosen_rates,
    execute,
    final_runs,
    missing,
    needed_searches,
    read_results,
    search_runs,
    setup,
)

RESULTS = Path(__file__).parents[1] / "results" / "quality.jsonl"


class StudyError(Exception):
    """The study cannot go on."""


def main(given: Sequence[str] | None = None) -> int:
    """Do what a command line says.

    Args:
        given: Its arguments; None for those of this process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("list", "run", "report"))
    parser.add_argument("--only", default="*", metavar="GLOB", help="runs to do")
    parser.add_argument("--quick", action="store_true", help="a tiny model and hardly a step")
    parser.add_argument("--processes", type=int, default=2, help="at once, with a thread each")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of results")
    arguments = parser.parse_args(given)
    if arguments.processes < 1:
        parser.error("--processes must be at least 1.")
    if arguments.quick and arguments.results == RESULTS:
        parser.error("--quick needs --results: what it finds means nothing.")
    plan = QUICK if arguments.quick else FULL
    try:
        if arguments.command == "list":
            print("\n".join(run.name for run in chosen(plan, arguments.only)))
        elif arguments.command == "run":
            run_missing(plan, arguments.only, arguments.results, arguments.processes)
        else:
            show(plan, arguments.results)
    except StudyError as err:
        print(err, file=sys.stderr)
        return 1
    return 0


def chosen(plan: Plan, only: str) -> list[Run]:
    """Return the runs whose names match, searches first; the final ones without their rates.

    Raises:
        StudyError: There is none.
    """
    runs = [run for run in (*search_runs(plan), *final_runs(plan, {})) if fnmatch(run.name, only)]
    if not runs:
        msg = f"--only {only!r} matches no run; `list` prints their names."
        raise StudyError(msg)
    return runs


def run_missing(plan: Plan, only: str, path: Path, processes: int) -> None:
    """Do what has no result yet, and add a line for each as soon as there is one.

    Raises:
        StudyError: The file has results of another setup.
    """
    wanted = chosen(plan, only)
    now, results = setup(plan), read_results(path)
    for result in results:
        if differs := [key for key in now if result.setup.get(key) != now[key]]:
            msg = (
                f"{path} has results of another setup ({', '.join(differs)}): run all again into "
                "another file."
            )
            raise StudyError(msg)
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = {run.name for run in needed_searches(wanted, plan)}
    names = {run.name for run in wanted}
    searches = [run for run in search_runs(plan) if run.name in names | needed]
    results += _do(missing(searches, results), plan, path, processes)
    finals = [run for run in final_runs(plan, chosen_rates(results, plan)) if run.name in names]
    _do(missing(finals, results), plan, path, processes)


def show(plan: Plan, path: Path) -> None:
    """Print the report, and write it and its picture beside the results.

    Raises:
        StudyError: There are no results.
    """
    # matplotlib is needed here only.
    import picture  # noqa: PLC0415
    import report  # noqa: PLC0415

    results = read_results(path)
    if not results:
        msg = f"{path} has no results: `run` first."
        raise StudyError(msg)
    text = report.report(results, plan)
    print(text)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    picture.draw(results, path.with_suffix(".svg"))


def _do(runs: Iterable[Run], plan: Plan, path: Path, processes: int) -> list[Result]:
    """Do runs, and write their results in the order in which they end."""
    todo = list(runs)
    results = []
    for result in _in_processes(todo, plan, processes):
        results.append(result)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{result.line()}\n")
        print(
            f"{len(results)}/{len(todo)} {result.run.name}: {result.exact} of "
            f"{result.num_examples}, loss {result.loss:.3f}, {result.seconds:.0f} s",
            flush=True,
        )
    return results


def _in_processes(runs: Sequence[Run], plan: Plan, processes: int) -> Iterator[Result]:
    if processes == 1:
        for run in runs:
            yield _quiet(run, plan)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [pool.submit(_quiet, run, plan) for run in runs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _quiet(run: Run, plan: Plan) -> Result:
    # transformers and peft warn about names of their own; nothing of it bears on the results.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return execute(run, plan)


if __name__ == "__main__":
    raise SystemExit(main())
