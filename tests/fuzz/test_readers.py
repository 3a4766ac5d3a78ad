"""Damaged files of every kind: read, or refused with an error of ours; never anything else."""

import tempfile
from pathlib import Path

import pytest
from fuzz.mutations import damaged
from fuzz.readers import READERS, check
from hypothesis import given
from hypothesis import strategies as st


def checked(name, files):
    with tempfile.TemporaryDirectory() as folder:
        return check(name, files, Path(folder))


@pytest.mark.parametrize("name", READERS)
def test_valid_files_are_read(name):
    """Otherwise the damage below would be done to what is refused anyway."""
    assert checked(name, READERS[name].files()) is None


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(name, data):
    files = dict(READERS[name].files())
    target = data.draw(st.sampled_from(sorted(files)))

    files[target] = damaged(target, files[target], lambda n: data.draw(st.integers(0, n - 1)))

    refused = checked(name, files)
    assert refused is None or str(refused)


@pytest.mark.parametrize("name", READERS)
@given(content=st.binary(max_size=100), data=st.data())
def test_arbitrary_bytes_are_read_or_refused(name, content, data):
    files = dict(READERS[name].files())
    files[data.draw(st.sampled_from(sorted(files)))] = content

    checked(name, files)
