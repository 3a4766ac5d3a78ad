"""Damaged files of every kind: read, or refused with an error of ours; never anything else."""

import collections
import tempfile
from pathlib import Path

import pytest
from fuzz.mutations import damaged
from fuzz.readers import READERS, check
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.faults


@pytest.fixture
def checked(record_property):
    """Return what has a reader check files, and count what came of it."""
    outcomes = collections.defaultdict(collections.Counter)

    def checked(name, files):
        with tempfile.TemporaryDirectory() as folder:
            refused = check(name, files, Path(folder))
        outcomes[name]["read" if refused is None else "refused"] += 1
        return refused

    yield checked
    record_property("damaged files", {name: dict(counts) for name, counts in outcomes.items()})


@pytest.mark.parametrize("name", READERS)
def test_valid_files_are_read(name):
    """Otherwise the damage below would be done to what is refused anyway."""
    with tempfile.TemporaryDirectory() as folder:
        assert check(name, READERS[name].files(), Path(folder)) is None


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name, checked):
    @given(data=st.data())
    def files_are_damaged(data):
        files = dict(READERS[name].files())
        target = data.draw(st.sampled_from(sorted(files)))

        files[target] = damaged(target, files[target], lambda n: data.draw(st.integers(0, n - 1)))

        refused = checked(name, files)
        assert refused is None or str(refused)

    files_are_damaged()


@pytest.mark.parametrize("name", READERS)
def test_arbitrary_bytes_are_read_or_refused(name, checked):
    @given(content=st.binary(max_size=100), data=st.data())
    def files_are_others(content, data):
        files = dict(READERS[name].files())
        files[data.draw(st.sampled_from(sorted(files)))] = content

        checked(name, files)

    files_are_others()
