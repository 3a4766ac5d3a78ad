"""Chooses and counts what is fuzzed and failed on purpose: `pytest -p fuzz.tally`, as in `make fuzz`.

Tests that are marked `faults` say what they did with `record_property`, by the names of `KINDS`. Writes
that are made to fail are counted here; of the other tests those are chosen which can make one fail.
"""

from collections import defaultdict

import pytest

from surgery_core.testing import InjectedError

FAILED_WRITES = "writes to a model that failed"
KINDS = {
    "damaged files": ("read", "refused"),
    "files that ask for much": ("read", "refused"),
    "damaged files on the command line": ("done", "refused"),
    FAILED_WRITES: ("injected",),
    "operations on the disk that failed": ("injected",),
    "processes killed with SIGKILL": ("killed",),
    "actions of several threads": ("done", "refused"),
}
"""What is counted, each with the outcomes there may be."""


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Tally(), "tally")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = [item for item in items if is_about_faults(item)]
    left_out = set(items) - set(chosen)
    config.hook.pytest_deselected(items=[*left_out])
    items[:] = chosen


def is_about_faults(item: pytest.Item) -> bool:
    """Return whether a test is marked, its module has `failing_at`, or it is such a contract test."""
    return (
        item.get_closest_marker("faults") is not None
        or "failing_at" in vars(item.module)
        or item.originalname.startswith("test_a_fault_at_any_write_of_")
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Count the faults that a test injects into the writes of the core's transaction."""
    count = 0

    def counted(self: InjectedError, *args: object) -> None:
        nonlocal count
        count += 1
        Exception.__init__(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InjectedError, "__init__", counted)
        try:
            return (yield)
        finally:
            if count:
                where = item.nodeid.partition("::")[0].removeprefix("tests/")
                item.user_properties.append((FAILED_WRITES, {where: {"injected": count}}))


class Tally:
    """Sums what tests say, and prints it at the end."""

    def __init__(self) -> None:
        self.counts = {kind: defaultdict(lambda: defaultdict(int)) for kind in KINDS}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "teardown":
            return
        for kind, subjects in report.user_properties:
            for subject, outcomes in subjects.items():
                for outcome, count in outcomes.items():
                    assert outcome in KINDS[kind], (report.nodeid, kind, outcome)
                    self.counts[kind][subject][outcome] += count

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("fuzz and faults")
        for kind, subjects in self.counts.items():
            terminalreporter.write_line("")
            for line in table(kind, KINDS[kind], subjects):
                terminalreporter.write_line(line)


def table(kind: str, outcomes: tuple[str, ...], subjects: dict[str, dict[str, int]]) -> list[str]:
    """Return the lines of a table of counts, with their sums at the end."""
    rows = {name: [found.get(o, 0) for o in outcomes] for name, found in sorted(subjects.items())}
    rows["all"] = [sum(row[i] for row in rows.values()) for i in range(len(outcomes))]
    width = max(len(name) for name in (kind, *rows))
    lines = [f"{kind:<{width}}" + "".join(f"  {outcome:>9}" for outcome in outcomes)]
    return lines + [
        f"{name:<{width}}" + "".join(f"  {count:>9,}" for count in row)
        for name, row in rows.items()
    ]
