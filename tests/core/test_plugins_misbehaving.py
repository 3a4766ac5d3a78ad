"""Plugins that end the process, interrupt, print or hang: reported, kept from stdout, and told of."""

import importlib.metadata
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from core.test_plugins import OFFERS_GATE
from core.toys import Net
from typer.testing import CliRunner

from surgery_core import PluginError, Plugins, Rule, Session, SurgeryWarning, plugins
from surgery_core.cli import app, run

LEAVING = {
    "sys.exit()": "import sys\nsys.exit()",
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "sys.exit(2)": "import sys\nsys.exit(2)",
    "sys.exit(text)": "import sys\nsys.exit('text')",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "GeneratorExit": "raise GeneratorExit",
    "an own one": "class Own(BaseException): pass\nraise Own('x')",
    "with a cause": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    raise SystemExit(0)",
}

IN_A_HOOK = """
from core.toys import Gate
from surgery_core import hookimpl

def leave():
    {body}

@hookimpl
def {hook}({arguments}):
    leave()
    return [Gate()]
"""


def indented(name):
    return LEAVING[name].replace("\n", "\n    ")


@pytest.mark.parametrize("name", LEAVING)
def test_a_plugin_that_ends_the_process_when_it_is_imported_is_a_broken_one(name, install):
    install("leaving", LEAVING[name])
    install("toy", OFFERS_GATE)

    found = Plugins()

    assert ["gate"] == list(found.operations)
    error = found.broken["leaving"]
    assert isinstance(error, PluginError)
    assert "Plugin 'leaving' (leaving 1.0) could not be imported: " in str(error)
    assert type(error.__cause__).__name__ in str(error)


@pytest.mark.parametrize("hook", ["surgery_operations", "surgery_commands"])
@pytest.mark.parametrize("name", LEAVING)
def test_one_that_does_so_when_it_is_asked_for_what_it_offers_is_a_broken_one(name, hook, install):
    install("leaving", IN_A_HOOK.format(body=indented(name), hook=hook, arguments=""))
    install("toy", OFFERS_GATE)

    found = Plugins()

    assert ["gate"] == list(found.operations)
    assert ["leaving"] == list(found.broken)


@pytest.mark.parametrize("arguments", [["plugins", "--json"], ["schema"]])
@pytest.mark.parametrize("name", LEAVING)
def test_commands_work_beside_it(name, arguments, install):
    install("leaving", LEAVING[name])
    install("toy", OFFERS_GATE)

    result = CliRunner().invoke(app, arguments)

    assert 0 == result.exit_code
    found = json.loads(result.stdout)
    if arguments == ["schema"]:
        assert {"enum": ["gate"]} in found["$defs"]["RuleRecipe"]["properties"]["operation"][
            "anyOf"
        ]
    else:
        assert ["leaving", "toy"] == [info["name"] for info in found]
        assert "could not be imported" in found[0]["error"]


@pytest.mark.parametrize("name", LEAVING)
def test_a_plan_has_its_own_exit_status(name, install):
    install("leaving", LEAVING[name])
    install("toy", OFFERS_GATE)

    result = CliRunner().invoke(app, ["plan", "core.toys:Net", "--operation", "gate", "--json"])

    assert 2 == result.exit_code
    assert json.loads(result.stdout)["edits"]


HOOKS = {
    "surgery_load_skeleton": ("source", ["plan", "x", "--operation", "gate"]),
    "surgery_preflight": ("model", ["plan", "core.toys:Net", "--operation", "gate", "--json"]),
    "surgery_show": ("source", ["show", "x", "--json"]),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ["sys.exit()", "sys.exit(0)", "sys.exit(2)", "GeneratorExit"])
def test_a_hook_that_ends_the_process_is_an_error(name, hook, install):
    arguments, command = HOOKS[hook]
    install("leaving", IN_A_HOOK.format(body=indented(name), hook=hook, arguments=arguments))
    install("toy", OFFERS_GATE)

    result = CliRunner().invoke(app, command)

    assert (1, "") == (result.exit_code, result.stdout)
    assert result.stderr.startswith("error: ")
    kind = "GeneratorExit" if name == "GeneratorExit" else "SystemExit"
    assert kind in result.stderr


OPERATION = """
import sys
from core.toys import Gate
from surgery_core import hookimpl

class Leaving(Gate):
    name = "leaving"

    def {method}(self, *_arguments):
        sys.exit(0)

@hookimpl
def surgery_operations():
    return [Leaving()]
"""


@pytest.mark.parametrize("method", ["parse_options", "targets", "describe", "options_schema"])
def test_an_operation_that_ends_the_process_is_an_error_of_the_command(method, install):
    install("leaving", OPERATION.format(method=method))
    plan = ["plan", "core.toys:Net", "--operation", "leaving"]

    result = CliRunner().invoke(app, ["schema"] if method == "options_schema" else plan)

    assert (1, "") == (result.exit_code, result.stdout)
    assert f"error: Command was not finished: '{method}' at " in result.stderr
    assert "module_of_leaving.py:10 ended it with SystemExit(0)." in result.stderr


def test_one_that_does_so_while_it_builds_is_too_and_nothing_is_recorded(install, tmp_path):
    install("leaving", OPERATION.format(method="build"))
    recipe = tmp_path / "recipe.json"
    rule = {"operation": "leaving"}
    recipe.write_text(json.dumps({"models": {"m": {"source": "core.toys:Net", "rules": [rule]}}}))

    for command in (["apply", recipe, "--out", tmp_path / "out"], ["verify", recipe]):
        result = CliRunner().invoke(app, [*map(str, command), "--allow-code", "--json"])

        assert (1, "") == (result.exit_code, result.stdout)
        assert "ended it with SystemExit(0)" in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_observer_that_ends_the_process_is_a_warning_and_the_others_are_told(install):
    install(
        "leaving",
        IN_A_HOOK.format(body=indented("sys.exit(0)"), hook="surgery_applied", arguments="surgery"),
    )
    install("toy", OFFERS_GATE)
    session = Session()

    with pytest.warns(SurgeryWarning, match="'leaving' failed in surgery_applied: SystemExit"):
        surgery = session.plan(Net(), [Rule(operation="gate")]).apply()

    assert surgery.is_applied


PRINTING = """
import os, subprocess, sys

def shout(where):
    print(f"print {where}")
    sys.stdout.write(f"write {where}\\n")
    sys.__stdout__.write(f"dunder {where}\\n")
    os.write(1, f"descriptor {where}\\n".encode())
    subprocess.run([sys.executable, "-S", "-c", f"print('process {where}')"])

shout("import")
from core.toys import Gate
from surgery_core import hookimpl

class Loud(Gate):
    name = "loud"

    def parse_options(self, options):
        shout("parse_options")
        return super().parse_options(options)

@hookimpl
def surgery_operations():
    shout("surgery_operations")
    return [Loud()]

@hookimpl
def surgery_preflight(model):
    shout("surgery_preflight")
    return ()

import atexit
atexit.register(shout, "atexit")
"""


def surgery(*arguments, folder, body=None, **options):
    """Run the installed command in a process of its own, with a plugin."""
    code = "from surgery_core.cli import run; run()"
    installed = {point.name for point in importlib.metadata.entry_points(group="surgery_core")}
    if body is not None:
        info = folder / "bad-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[surgery_core]\nbad = bad_plugin\n")
        (folder / "bad_plugin.py").write_text(body)
    path = os.pathsep.join([str(folder), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "SURGERY_BLOCK_PLUGINS": ",".join(installed)}
    return subprocess.Popen(  # noqa: S603 (our own interpreter)
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options,
    )  # fmt: skip


@pytest.mark.slow
def test_stdout_has_the_result_alone(tmp_path):
    command = ("plan", "core.toys:Net", "--operation", "loud", "--json")

    process = surgery(*command, folder=tmp_path, body=PRINTING)
    stdout, stderr = process.communicate(timeout=120)

    assert 2 == process.returncode, stderr
    assert json.loads(stdout)["edits"]
    for how in ("print", "write", "dunder", "descriptor", "process"):
        for where in (
            "import",
            "surgery_operations",
            "surgery_preflight",
            "parse_options",
            "atexit",
        ):
            assert f"{how} {where}\n" in stderr


@pytest.mark.slow
def test_a_closed_stdout_is_no_error_of_ours(tmp_path):
    process = surgery("plugins", folder=tmp_path, body=PRINTING, preexec_fn=lambda: os.close(1))
    _, stderr = process.communicate(timeout=120)

    assert "Traceback" not in stderr.partition("print atexit")[0]


HANGING = """
import sys, time
sys.stderr.write("hanging\\n")
sys.stderr.flush()
{how}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "presses"),
    [
        ("time.sleep(600)", 1),
        ("while True: pass", 1),
        # Swallows the first, and goes on with what it did, or with being imported.
        (
            "while True:\n    try: time.sleep(600)\n    except BaseException: print('no', flush=True)",
            2,
        ),
        ("try: time.sleep(600)\nexcept BaseException: pass", 1),
    ],
)
def test_an_interrupt_ends_a_command_and_names_the_plugin_that_hangs(how, presses, tmp_path):
    process = surgery("plugins", folder=tmp_path, body=HANGING.format(how=how))
    while process.stderr.readline() != "hanging\n":
        assert process.poll() is None
    for _ in range(presses):
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)

    assert "" == stdout
    if presses == 1:
        assert 130 == process.returncode
        assert (
            "Interrupted.\nPlugin 'bad' (bad 1.0) was being loaded. Set SURGERY_BLOCK_PLUGINS=bad to "
            "leave it out.\n"
        ) == stderr
    else:
        # As a shell sees it, 130 as well.
        assert -signal.SIGINT == process.returncode


PRESSED = "import signal\nsignal.raise_signal(signal.SIGINT)"


@pytest.mark.parametrize(
    "source", [PRESSED, f"try:\n    {PRESSED.replace(chr(10), '; ')}\nexcept BaseException: pass"]
)
def test_an_interrupt_of_the_user_is_none_that_a_plugin_raises(
    source, install, monkeypatch, capsys
):
    """And one that the plugin swallowed counts."""
    install("pressed", source)
    before = signal.getsignal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        Plugins()
    sys.modules.pop("module_of_pressed", None)
    monkeypatch.setattr(sys, "argv", ["surgery", "plugins"])
    with pytest.raises(SystemExit) as left:
        run()

    (note,) = caught.value.__notes__
    assert note.startswith("Plugin 'pressed' (pressed 1.0) was being loaded. Set ")
    assert 130 == left.value.code
    assert f"Interrupted.\n{note}\n" == capsys.readouterr().err
    assert before is signal.getsignal(signal.SIGINT)


def test_interrupts_are_passed_on_by_hooks(install):
    install("toy", OFFERS_GATE)
    for hook, argument in (("surgery_preflight", "model"), ("surgery_applied", "surgery")):
        body = IN_A_HOOK.format(body="raise KeyboardInterrupt", hook=hook, arguments=argument)
        install(hook, body)
        session = Session()

        with pytest.raises(KeyboardInterrupt):
            session.plan(Net(), [Rule(operation="gate")]).apply()
        os.environ["SURGERY_BLOCK_PLUGINS"] += f",{hook}"


def test_without_a_descriptor_prints_are_kept_from_stdout_as_well(install, monkeypatch):
    def refuse(_number):
        raise OSError

    monkeypatch.setattr(os, "dup", refuse)
    install("loud", "print('loud')\n" + OFFERS_GATE)

    result = CliRunner().invoke(app, ["plugins", "--json"])

    assert ["loud"] == [info["name"] for info in json.loads(result.stdout)]
    assert "loud\n" == result.stderr


def test_which_plugin_is_being_loaded_is_said_when_it_takes_long(install, monkeypatch, caplog):
    monkeypatch.setattr(plugins, "SLOW_SECONDS", 0.05)
    install("slow", "import time\ntime.sleep(0.5)\n")
    install("toy", OFFERS_GATE)

    with caplog.at_level(logging.WARNING):
        found = Plugins()

    assert {} == found.broken
    assert [
        "Plugin 'slow' (slow 1.0) has been loading for 0.05 seconds. Set SURGERY_BLOCK_PLUGINS=slow "
        "to leave it out."
    ] == [record.getMessage() for record in caplog.records]


def test_interrupts_are_handled_as_before_once_plugins_are_loaded(install):
    install("toy", OFFERS_GATE)
    before = signal.getsignal(signal.SIGINT)
    found = []

    Plugins()
    thread = threading.Thread(target=lambda: found.append(Plugins()))
    thread.start()
    thread.join()

    assert before is signal.getsignal(signal.SIGINT)
    assert ["gate"] == list(found[0].operations)
