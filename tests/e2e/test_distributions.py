"""What is given away: wheels and sdists of every distribution, built here and installed elsewhere."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT, *sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))]
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")

pytestmark = pytest.mark.slow


def run(*arguments, cwd=ROOT, env=None):
    done = subprocess.run(  # noqa: S603 (our own interpreter and arguments)
        arguments, capture_output=True, text=True, check=False, cwd=cwd, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@dataclass(frozen=True)
class Built:
    """A distribution's project table, its sdist, and its wheels of the sdist and of the tree."""

    folder: Path
    project: dict
    sdist: Path
    wheel: Path
    wheel_of_tree: Path

    @property
    def package(self):
        return self.project["name"].replace("-", "_")

    @property
    def version(self):
        text = (self.folder / self.package / "__init__.py").read_text()
        return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]

    @property
    def info(self):
        return f"{self.package}-{self.version}.dist-info"


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build each distribution with what is installed: nothing is fetched."""
    found = []
    for folder in FOLDERS:
        out = tmp_path_factory.mktemp("built")
        build = (sys.executable, "-m", "build", "--no-isolation")
        run(*build, "--outdir", out / "sdist", folder)
        run(*build, "--wheel", "--outdir", out / "tree", folder)
        (sdist,), (wheel,) = out.glob("sdist/*.tar.gz"), out.glob("sdist/*.whl")
        (wheel_of_tree,) = out.glob("tree/*.whl")
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        found.append(Built(folder, project, sdist, wheel, wheel_of_tree))
    return found


def test_metadata_are_those_of_the_project(built):
    for one in built:
        files = contents(one.wheel)
        metadata = message_from_string(files[f"{one.info}/METADATA"].decode())

        assert one.project["name"] == metadata["Name"]
        assert one.version == metadata["Version"]
        assert ">=3.11" == metadata["Requires-Python"]
        assert "Apache-2.0" == metadata["License-Expression"]
        assert metadata.get_payload().startswith("# surgery")
        assert "Root-Is-Purelib: true" in files[f"{one.info}/WHEEL"].decode()


def test_versions_go_together(built):
    """Plugins ask for a core that has what they were written for."""
    assert 1 == len({one.version for one in built})
    for one in built[1:]:
        (core,) = [name for name in one.project["dependencies"] if name.startswith("surgery-core")]
        assert f"surgery-core>={'.'.join(one.version.split('.')[:2])}" == core


def test_a_wheel_has_the_package_and_nothing_else(built):
    """Every file of the package, the marker of types and the license among it; no tests, no caches."""
    for one in built:
        files = contents(one.wheel)
        package = one.folder / one.package
        sources = {
            path.relative_to(one.folder).as_posix()
            for path in package.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        metadata = {name for name in files if name.startswith(f"{one.info}/")}

        assert f"{one.package}/py.typed" in sources
        assert sources == set(files) - metadata
        assert (ROOT / "LICENSE").read_bytes() == files[f"{one.info}/licenses/LICENSE"]
        # One license file for each project, since a wheel is built from its folder alone.
        assert (ROOT / "LICENSE").read_text() == (one.folder / "LICENSE").read_text()


def test_an_sdist_has_what_its_wheel_is_built_from(built):
    for one in built:
        with tarfile.open(one.sdist) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        package = {name for name in contents(one.wheel) if name.startswith(f"{one.package}/")}

        beside = names - package
        assert package <= names
        assert {"LICENSE", "PKG-INFO", "README.md", "pyproject.toml"} == beside - {".gitignore"}


def test_wheels_of_sdist_and_tree_are_the_same(built):
    for one in built:
        assert contents(one.wheel_of_tree) == contents(one.wheel)


def test_twine_finds_nothing_to_say(built):
    files = [path for one in built for path in (one.sdist, one.wheel)]

    run(sys.executable, "-m", "twine", "check", "--strict", *files)


@pytest.fixture(scope="module")
def elsewhere(built, tmp_path_factory):
    """Return the interpreter of an environment with the wheels, and the folder they are in.

    What they need is that of the running environment; what is installed there to be edited is not
    seen, since files that lead to it are read for site folders alone.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv/bin/python"
    (site_packages,) = folder.glob("venv/lib/python*/site-packages")
    seen = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "running.pth").write_text("\n".join(sorted(seen)))
    wheels = [one.wheel for one in built]
    run(*PIP, "--python", python, "install", "--no-deps", "--no-index", *wheels)
    return python, site_packages


def test_installed_wheels_are_imported_and_found(built, elsewhere, tmp_path):
    python, site_packages = elsewhere
    look = """if True:
        import importlib, importlib.metadata, json, sys
        print(json.dumps({name: [importlib.import_module(name).__file__, importlib.metadata.version(name)]
                          for name in sys.argv[1:]}))
    """
    packages = [one.package for one in built]

    found = json.loads(run(python, "-I", "-c", look, *packages, cwd=tmp_path))
    expected = {
        one.package: [str(site_packages / one.package / "__init__.py"), one.version]
        for one in built
    }
    assert expected == found


def test_installed_plugins_offer_their_operations(built, elsewhere, tmp_path):
    python, _ = elsewhere
    surgery = python.parent / "surgery"

    infos = json.loads(run(surgery, "plugins", "--json", cwd=tmp_path, env=_plain_environment()))

    found = {info["distribution"]: info for info in infos}
    for one in built[1:]:
        info = found[f"{one.project['name']} {one.version}"]
        assert info["error"] is None
        assert info["name"] in one.project["entry-points"]["surgery_core"]
    assert {"adaption_prompt", "low_rank", "scale_shift"} <= {
        operation for info in infos for operation in info["operations"]
    }


def test_an_installed_operation_changes_a_model_and_takes_it_back(elsewhere, tmp_path):
    """With the wheels alone: the folder it runs in has no sources."""
    python, site_packages = elsewhere
    example = """if True:
        import torch
        from torch import nn
        import surgery_core
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        before, inputs = model[1], torch.ones(1, 4)
        expected = model(inputs)
        rule = surgery_core.Rule(operation="low_rank", select="1", options={"r": 2})
        surgery = surgery_core.Session().plan(model, [rule]).apply()
        assert model[1] is not before and torch.equal(expected, model(inputs))
        surgery.revert()
        assert model[1] is before
        print(surgery_core.__file__)
    """

    printed = run(python, "-I", "-c", example, cwd=tmp_path, env=_plain_environment())

    assert str(site_packages / "surgery_core/__init__.py") == printed.strip()


def _plain_environment():
    """Return this process's environment without what leads Python to sources."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
