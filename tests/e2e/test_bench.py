"""The benchmark runs, writes what it prints, and replaces only the rows it was asked for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "benchmarks" / "bench.py"


def bench(*arguments):
    return subprocess.run(  # noqa: S603 (our own script)
        # A GPU has other rows and another file.
        [sys.executable, BENCH, "--rounds", "1", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
    )


def tables(text):
    """Return the rows of Markdown tables by name."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: rest for name, *rest in cells if name}


@pytest.mark.slow
def test_a_row_is_printed_and_written(tmp_path):
    found = bench("--only", "switch 30 layers, 2 stored", "--out-dir", str(tmp_path))

    assert 0 == found.returncode, found.stderr
    written = (tmp_path / "cpu.md").read_text()
    assert written in found.stdout
    (row,) = tables(written).values()
    peft, ours, base, ratio, target, rounds = row
    assert peft.endswith("s")
    assert ours.endswith("s")
    assert "-" == base
    median, low, _, high = ratio.replace("(", "").replace(")", "").split()
    assert 0 < float(low) <= float(median) <= float(high)
    assert target in {"<= 0.50: met", "<= 0.50: missed"}
    assert "3" == rounds


@pytest.mark.slow
def test_rows_measured_again_replace_their_own_lines_only(tmp_path):
    bench("--only", "switch 30 layers, 2 stored", "--out-dir", str(tmp_path))
    before = json.loads((tmp_path / "cpu.json").read_text())

    found = bench("--only", "cold import*", "--out-dir", str(tmp_path))

    assert 0 == found.returncode, found.stderr
    after = json.loads((tmp_path / "cpu.json").read_text())
    assert before["setup"] == after["setup"]
    assert before["rows"] == after["rows"][:-1]
    assert "cold import surgery_core" == after["rows"][-1]["name"]


@pytest.mark.slow
def test_rows_of_another_setup_are_not_mixed(tmp_path):
    (tmp_path / "cpu.json").write_text('{"setup": {"device": "another"}, "rows": []}')

    found = bench("--only", "cold import*", "--out-dir", str(tmp_path))

    assert 2 == found.returncode
    assert found.stderr.splitlines()[-1].endswith(
        "cpu.json is of another setup: measure all rows, or write elsewhere."
    )


@pytest.mark.slow
def test_a_glob_that_matches_nothing_is_refused():
    found = bench("--only", "nothing*")

    assert 2 == found.returncode
    assert found.stderr.splitlines()[-1].endswith(
        "--only 'nothing*' matches no row; --list prints their names."
    )
