"""What hangs is ended, with whatever it started, and its output shown."""

import time

import psutil
import pytest
from distributed import launching

HANGS = """
import subprocess, sys, time
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print("started", inner.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_what_hangs_is_ended_with_what_it_started(monkeypatch):
    """As torch's launcher does, which gives its processes sessions of their own."""
    monkeypatch.setattr(launching, "LIMIT", 2)
    began = time.monotonic()

    with pytest.raises(AssertionError, match=r"Nothing came of .* in 2 s") as caught:
        launching.run(["-c", HANGS])

    assert time.monotonic() - began < 30
    pid = int(str(caught.value).rpartition("started ")[2])
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_what_fails_says_how():
    with pytest.raises(AssertionError, match="failed:\nno luck"):
        launching.run(["-c", "import sys; sys.exit('no luck')"])
