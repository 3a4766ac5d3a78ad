"""Small files that ask for much are refused before they get it, within a limit on memory."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.faults]

LIMIT = 300_000_000
"""Bytes of address space beyond those of the imports; most of these files ask for a hundred times that."""

READ = """
import resource
import sys
import tempfile
from pathlib import Path

from fuzz.bombs import bombs
from fuzz.readers import READERS, check

# What is made once: models, and valid files, of which some of the bombs are made.
for name, reader in READERS.items():
    with tempfile.TemporaryDirectory() as folder:
        assert check(name, reader.files(), Path(folder)) is None
found = list(bombs())
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for title, name, files in found:
    with tempfile.TemporaryDirectory() as folder:
        try:
            refused = check(name, files, Path(folder))
        except BaseException as err:
            print("FOUND", title, type(err).__name__, str(err)[:200])
            continue
        assert refused is not None, title
        print("refused", name, title, str(refused)[:100].encode())
print("read", len(found))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="how much is taken, Linux tells")
def test_small_files_that_ask_for_much_are_refused_within_a_limit(record_property):
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-W", "ignore", "-c", READ, str(LIMIT)]

    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)  # noqa: S603 (our own interpreter and code)

    assert done.returncode == 0, done.stderr[-3000:]
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert found == []
    refused = Counter(line.split()[1] for line in done.stdout.splitlines()[:-1])
    record_property("files that ask for much", {k: {"refused": n} for k, n in refused.items()})
    assert done.stdout.splitlines()[-1] == f"read {refused.total()}"
