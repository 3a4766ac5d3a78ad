"""A plugin from outside the repository: built, installed elsewhere, found, and used from a recipe."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

from surgery_core import read_record

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs/examples/surgery-activation-probe"
TUTORIAL = ROOT / "docs/tutorials/write-a-plugin.md"
SURGERY = Path(sysconfig.get_path("scripts")) / "surgery"
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")

pytestmark = pytest.mark.slow


@dataclass
class Environment:
    """A virtual environment that sees what is installed in the running one, and a folder to work in."""

    folder: Path
    work: Path

    @property
    def python(self):
        return self.folder / "bin" / "python"

    def run(self, *arguments):
        # A plugin that is not needed takes seconds to be imported.
        blocked = {**os.environ, "SURGERY_BLOCK_PLUGINS": "adaption_prompt"}
        return subprocess.run(  # noqa: S603 (our own interpreter and arguments)
            [self.python, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.work,
            env=blocked,
        )

    def surgery(self, *arguments, status=0):
        done = self.run(SURGERY, *arguments)
        assert done.returncode == status, done.stdout + done.stderr
        return done


def make_environment(folder):
    venv.create(folder / "venv", with_pip=False)
    made = Environment(folder=folder / "venv", work=folder / "work")
    (site_packages,) = made.folder.glob("lib/python*/site-packages")
    seen = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # Not their paths alone: what is installed to be edited is found by files in them.
    lines = [f"import site; site.addsitedir({path!r})\n" for path in sorted(seen)]
    (site_packages / "running.pth").write_text("".join(lines))
    shutil.copytree(EXAMPLE / "example", made.work)
    return made


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """Return an environment that does not have the plugin."""
    return make_environment(tmp_path_factory.mktemp("without"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return an environment in which the plugin's wheel is installed."""
    folder = tmp_path_factory.mktemp("installed")
    made = make_environment(folder)
    shutil.copytree(EXAMPLE, folder / "source")
    build = ("wheel", "--no-deps", "--wheel-dir", folder, folder / "source")
    subprocess.run([*PIP, *build], check=True)  # noqa: S603 (our own source)
    (wheel,) = folder.glob("*.whl")
    install = ("--python", made.python, "install", "--no-deps", "--no-index", wheel)
    subprocess.run([*PIP, *install], check=True)  # noqa: S603 (same)
    return made


def test_the_plugin_is_found_with_its_distribution(installed):
    infos = json.loads(installed.surgery("plugins", "--json").stdout)

    # What else is installed in the running environment is found too.
    (info,) = [found for found in infos if found["name"] == "activation_probe"]
    assert info == {
        "name": "activation_probe",
        "distribution": "surgery-activation-probe 0.1.0",
        "hooks": ["surgery_operations", "surgery_probe_inputs"],
        "operations": ["activation_probe"],
        "error": None,
        "commands": [],
    }


def test_a_recipe_is_planned_applied_verified_and_recorded(installed):
    """What is recorded are the statistics of the calls that verified the model."""
    planned = installed.surgery("plan", "recipe.yaml", "--allow-code", status=2)
    applied = installed.surgery(
        "apply", "recipe.yaml", "--out", "records", "--allow-code", "--json"
    )
    verified = installed.surgery("verify", "records", "--allow-code", "--json")

    assert planned.stdout.strip() in TUTORIAL.read_text()
    for answer in (json.loads(applied.stdout), json.loads(verified.stdout)):
        (found,) = answer["models"].values()
        checks = found.get("verification", found)["checks"]
        assert {"ok"} == {check["status"] for check in checks}
        assert {"structure", "identity", "revert", "gradients"} == {c["tier"] for c in checks}
    record = read_record(installed.work / "records" / "tiny")
    assert record.operations == {"activation_probe": "surgery-activation-probe 0.1.0"}
    shapes = {
        **{f"rules: layers.{i}.act": () for i in range(2)},
        **{f"blocks: layers.{i}.down": (4,) for i in range(2)},
        "head: head": (),
    }
    state = {f"{name}: {key}": t for name, own in record.state.items() for key, t in own.items()}
    assert len(state) == 3 * len(shapes)
    for place, shape in shapes.items():
        count, mean, largest = (
            state[f"{place}.activation_probe.{name}"] for name in ("count", "mean_abs", "max_abs")
        )
        assert mean.shape == largest.shape == shape
        # Verifying ran the model, and put back what was counted.
        assert count == 0
        assert not mean.any()
        assert not largest.any()


def test_its_own_tests_pass_with_the_wheel(installed):
    """In the folder that the wheel was built of, and with the package from the wheel."""
    shutil.copytree(EXAMPLE / "tests", installed.work / "tests", dirs_exist_ok=True)
    options = ("-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", installed.work)

    done = installed.run("-m", "pytest", *options, "tests")

    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_without_the_plugin_the_recipe_names_what_is_missing(without):
    done = without.surgery("plan", "recipe.yaml", "--allow-code", status=1)

    error, where = done.stderr.splitlines()
    assert error.startswith("error: Operation 'activation_probe' is unknown: expected one of ")
    assert error.endswith("Install the plugin that offers it, or pass the plugin to Session.")
    assert where.startswith("  in recipe.yaml:6: models.tiny.rules")
