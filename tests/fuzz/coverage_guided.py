"""Feed readers damaged files, steered by coverage: `make fuzz`, or `coverage_guided.py SECONDS [READER...]`.

Not part of the tests: atheris is needed, which has wheels for some versions of Python alone. Each
reader has a process of its own; an input that shows something is kept in `build/fuzz`. What is found
goes into `test_regressions.py`.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))
os.environ["HF_HUB_OFFLINE"] = "1"

INSTRUMENTED = (
    *("surgery_core", "surgery_adaption_prompt", "surgery_low_rank", "surgery_scale_shift"),
    *("yaml", "tomllib"),
)
FOUND = TESTS.parent / "build" / "fuzz"
ONE = "--one"

with atheris.instrument_imports(include=list(INSTRUMENTED)):
    from fuzz.mutations import damaged
    from fuzz.readers import READERS, check


def run_each(seconds: int, names: list[str]) -> int:
    """Fuzz readers one after the other, with a line for each; return how many showed something."""
    FOUND.mkdir(parents=True, exist_ok=True)
    show("files, steered by coverage", "given", "edges", "found")
    total, bad = 0, 0
    for name in names or READERS:
        options = (f"-max_total_time={seconds}", "-max_len=4096", "-len_control=0", "-timeout=60")
        kept = f"-artifact_prefix={FOUND}/{name}-"
        command = [sys.executable, __file__, ONE, name, *options, kept, "-print_final_stats=1"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 (this file)
        given = last_number(r"number_of_executed_units: *(\d+)", done.stderr)
        edges = last_number(r"cov: (\d+)", done.stderr)
        is_bad = done.returncode != 0
        show(name, f"{given:,}", f"{edges:,}", int(is_bad))
        if is_bad:
            print(done.stdout[-5000:], done.stderr[-5000:], sep="\n", flush=True)  # noqa: T201 (a program)
        total, bad = total + given, bad + is_bad
    show("all", f"{total:,}", "", bad)
    return bad


def last_number(pattern: str, text: str) -> int:
    """Return the last of the numbers in a text; 0 if there is none, as when a process broke off."""
    return int((re.findall(pattern, text) or [0])[-1])


def show(*cells: object) -> None:
    first, *others = cells
    print(f"{first:<26}" + "".join(f"  {other!s:>9}" for other in others), flush=True)  # noqa: T201 (a program)


def run_one(name: str, options: list[str]) -> None:
    """Fuzz one reader until the time is up, or until something is found."""
    valid = READERS[name].files()

    def one_input(data: bytes) -> None:
        provider = atheris.FuzzedDataProvider(data)
        files = dict(valid)
        target = sorted(files)[provider.ConsumeIntInRange(0, len(files) - 1)]
        if provider.ConsumeBool():
            files[target] = damaged(
                target, files[target], lambda n: provider.ConsumeIntInRange(0, n - 1)
            )
        else:
            files[target] = provider.ConsumeBytes(provider.remaining_bytes())
        with tempfile.TemporaryDirectory() as folder:
            check(name, files, Path(folder))

    with tempfile.TemporaryDirectory() as folder:
        assert check(name, valid, Path(folder)) is None
    atheris.Setup([sys.argv[0], *options], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1] == ONE:
        run_one(sys.argv[2], sys.argv[3:])
    sys.exit(run_each(int(sys.argv[1]), sys.argv[2:]))
