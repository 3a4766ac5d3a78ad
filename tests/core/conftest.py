"""Distributions made on the spot, so that discovery is tested without installing anything."""

import importlib.metadata
import sys

import pytest


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that makes a distribution with one module and one entry point importable.

    Entry points that happen to be installed are blocked.
    """
    installed = {point.name for point in importlib.metadata.entry_points(group="surgery_core")}
    monkeypatch.setenv("SURGERY_BLOCK_PLUGINS", ",".join(sorted(installed)))
    monkeypatch.syspath_prepend(tmp_path)

    def write(distribution, source, *, entry_point=None, module=None, attribute=""):
        module = module or f"module_of_{distribution}"
        (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        info = tmp_path / f"{distribution}-1.0.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        target = f"{module}:{attribute}" if attribute else module
        points = f"[surgery_core]\n{entry_point or distribution} = {target}\n"
        (info / "entry_points.txt").write_text(points, encoding="utf-8")
        # setitem and delitem: whatever the test imports is gone afterwards.
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(sys.modules, module)
        return module

    return write
