"""Measure adapted models against the unadapted one and against PEFT, all in this process.

`--only` takes a glob of row names; with `--out-dir` those rows replace the ones found there.
"""

import argparse
import importlib
import importlib.util
import platform
import re
import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

import rows_composition
import rows_inference
import rows_management
import rows_startup
import rows_training
import torch
from models import LENGTH, Models
from report import Results, Setup, line, summary
from rows import Case

PACKAGES = ("torch", "transformers", "peft")


def processor() -> str:
    """Return the name of the processor."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def setup(device: str) -> Setup:
    """Return what the results depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "Python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "model": f"SmolLM2-135M's shape, random weights, K={LENGTH}, 30 of 30 layers unless said",
    }


def file_name(device: str) -> str:
    """Return `cpu`, or the name of the GPU without its memory's."""
    if device == "cpu":
        return device
    name = re.sub(r"[ -](\d+ ?GB|HBM\w*|SXM\d?|PCIe)", "", torch.cuda.get_device_name())
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def all_cases(device: str, folder: Path) -> Iterator[Case]:
    """Yield every row for a device; what a GPU does not change is measured without one."""
    yield from rows_inference.cases(device)
    yield from rows_composition.cases(device)
    yield from rows_training.cases(device)
    if device == "cpu":
        yield from rows_management.cases(folder)
        yield from rows_startup.cases()


def main() -> None:
    """Print the tables, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="three times as many if short")
    parser.add_argument("--only", default="*", metavar="GLOB", help="rows to measure")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--out-dir", type=Path, help="where to write; nowhere if not given")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1.")
    # transformers and peft warn about names of their own; nothing of it bears on the timings.
    warnings.simplefilter("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with rows_management.temporary() as folder:
        cases = list(all_cases(device, Path(folder)))
        chosen = [case for case in cases if fnmatch(case.name, arguments.only)]
        if arguments.list:
            print("\n".join(case.name for case in chosen))
            return
        if not chosen:
            parser.error(f"--only {arguments.only!r} matches no row; --list prints their names.")
        found = setup(device)
        path = arguments.out_dir and arguments.out_dir / f"{file_name(device)}.json"
        kept = {}
        if path and path.exists() and len(chosen) < len(cases):
            before = Results.read(path)
            if before.setup != found:
                parser.error(f"{path} is of another setup: measure all rows, or write elsewhere.")
            kept = {row.name: row for row in before.rows}
        models = Models()
        for case in chosen:
            row = case.row(models, arguments.rounds)
            kept[case.name] = row
            print(line(row), flush=True)
    results = Results(
        setup=found, rows=tuple(kept[case.name] for case in cases if case.name in kept)
    )
    print("", *results.lines(), "", summary(results.rows), sep="\n")
    if path:
        results.write(path)
        draw(results, path.with_suffix(".svg"))


def draw(results: Results, path: Path) -> None:
    """Draw the ratios, if matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"No matplotlib: {path} was not drawn.")
        return
    importlib.import_module("plot").draw(results.rows, path, results.setup["device"])


if __name__ == "__main__":
    main()
