"""Plugins are found, loaded whole or not at all, and a broken one is reported and not fatal."""

import importlib.metadata

import pytest
from core.toys import Fresh, Gate, Net, Shift, ToyPlugin

from surgery_core import (
    Operation,
    PluginError,
    PluginInfo,
    Plugins,
    Rule,
    Session,
    UnknownOperationError,
    hookimpl,
)
from surgery_core.plugins import _distribution

OFFERS_GATE = """
from core.toys import Gate
from surgery_core import hookimpl

@hookimpl
def surgery_operations():
    return [Gate()]
"""

OFFERS_NOTHING = "NAME = 'nothing'\n"

MISSPELT = """
from surgery_core import hookimpl

@hookimpl
def surgery_operation():
    return []
"""

DEFAULTED = """
from surgery_core import hookimpl

@hookimpl
def surgery_applied(surgery=None):
    pass
"""


ARGUMENTATIVE = """
from surgery_core import hookimpl

@hookimpl
def surgery_applied(surgery):
    raise AssertionError(surgery)

@hookimpl
def surgery_reverted(surgery, extra):
    pass
"""


def refusal(*plugins):
    with pytest.raises(PluginError) as caught:
        Plugins(plugins, discover=False)
    return caught.value


def test_without_plugins_there_is_nothing():
    plugins = Plugins(discover=False)

    assert plugins.infos == ()
    assert plugins.operations == {}
    assert plugins.broken == {}
    assert plugins.load_skeleton("anything") is None
    assert plugins.show("anything") is None


def test_a_plugin_passed_is_loaded():
    plugins = Plugins([ToyPlugin()], discover=False)

    assert list(plugins.operations) == ["fresh", "gate", "shift"]
    assert isinstance(plugins.operation("gate"), Gate)
    assert plugins.infos == (
        PluginInfo(
            name="ToyPlugin",
            distribution=None,
            hooks=("surgery_operations",),
            operations=("fresh", "gate", "shift"),
            error=None,
        ),
    )


def test_loading_changes_no_other_manager():
    Plugins([ToyPlugin()], discover=False)

    assert Plugins(discover=False).operations == {}


def test_an_unknown_operation_names_those_there_are():
    plugins = Plugins([ToyPlugin(Gate(), Shift())], discover=False)

    with pytest.raises(UnknownOperationError) as caught:
        plugins.operation("gates")

    assert str(caught.value) == (
        "Operation 'gates' is unknown: expected one of 'gate', 'shift'. Install the plugin that "
        "offers it, or pass the plugin to Session."
    )
    assert caught.value.__cause__ is None


def test_an_entry_point_is_loaded(install):
    install("toy", OFFERS_GATE)

    plugins = Plugins()

    assert list(plugins.operations) == ["gate"]
    assert plugins.broken == {}
    assert plugins.infos == (
        PluginInfo(
            name="toy",
            distribution="toy 1.0",
            hooks=("surgery_operations",),
            operations=("gate",),
            error=None,
        ),
    )


def test_discovery_can_be_left_out(install):
    install("toy", OFFERS_GATE)

    assert Plugins(discover=False).infos == ()


def test_an_entry_point_can_name_an_object(install):
    install("toy", "from core.toys import ToyPlugin\nplugin = ToyPlugin()\n", attribute="plugin")

    assert list(Plugins().operations) == ["fresh", "gate", "shift"]


def test_a_plugin_passed_and_found_is_loaded_once(install):
    module = install("toy", OFFERS_GATE)
    plugin = importlib.import_module(module)

    plugins = Plugins([plugin])

    assert [(info.name, info.distribution) for info in plugins.infos] == [(module, None)]


@pytest.mark.parametrize("value", ["toy", " other , toy "])
def test_plugins_are_blocked_by_name(install, monkeypatch, value):
    install("toy", "raise RuntimeError('never imported')")
    monkeypatch.setenv("SURGERY_BLOCK_PLUGINS", value + "," + blocked_already())

    plugins = Plugins()

    assert plugins.infos == ()
    assert plugins.broken == {}


def blocked_already():
    points = importlib.metadata.entry_points(group="surgery_core")
    return ",".join(point.name for point in points if point.name != "toy")


def test_a_plugin_that_cannot_be_imported_is_reported(install):
    install("broken", "import no_such_package_here")
    install("toy", OFFERS_GATE)

    plugins = Plugins()

    message = (
        "Plugin 'broken' (broken 1.0) could not be imported: ModuleNotFoundError(\"No module named "
        "'no_such_package_here'\")."
    )
    assert list(plugins.operations) == ["gate"]
    assert list(plugins.broken) == ["broken"]
    error = plugins.broken["broken"]
    assert str(error) == message
    assert isinstance(error, PluginError)
    assert isinstance(error.__cause__, ModuleNotFoundError)
    assert (error.plugin, error.distribution) == ("broken", "broken 1.0")
    assert plugins.infos[0] == PluginInfo(
        name="broken", distribution="broken 1.0", hooks=(), operations=(), error=message
    )
    assert plugins.infos[1].name == "toy"


def test_an_operation_that_a_broken_plugin_may_offer_raises_with_the_cause(install):
    install("broken", "1 / 0")

    plugins = Plugins()
    with pytest.raises(UnknownOperationError) as caught:
        plugins.operation("gate")

    assert str(caught.value) == (
        "Operation 'gate' is unknown: expected one of nothing. Plugins that failed to load: "
        "'broken'; see `surgery plugins`."
    )
    assert caught.value.__cause__ is plugins.broken["broken"]
    assert isinstance(caught.value.__cause__.__cause__, ZeroDivisionError)


def test_a_misspelt_hook_is_refused(install):
    install("misspelt", MISSPELT)
    install("toy", OFFERS_GATE)

    plugins = Plugins()

    error = plugins.broken["misspelt"]
    assert str(error).startswith(
        "Plugin 'misspelt' (misspelt 1.0) breaks the contract: unknown hook 'surgery_operation' "
        "in plugin"
    )
    assert list(plugins.operations) == ["gate"]


def test_a_default_for_an_argument_is_refused(install):
    install("defaulted", DEFAULTED)

    error = Plugins().broken["defaulted"]

    assert str(error) == (
        "Plugin 'defaulted' (defaulted 1.0) breaks the contract: surgery_applied gives a default "
        "to 'surgery', so pluggy would never pass it. Remove the default."
    )


class Argumentative:
    """The first hook is fine, the second is not: the first must not stay registered."""

    @hookimpl
    def surgery_applied(self, surgery):
        raise AssertionError(surgery)

    @hookimpl
    def surgery_reverted(self, surgery, extra):
        raise AssertionError(surgery, extra)


def test_an_argument_that_the_hook_does_not_have_is_refused():
    error = refusal(Argumentative())

    assert str(error).startswith(
        "Plugin 'Argumentative' breaks the contract: Plugin 'Argumentative' for hook "
        "'surgery_reverted'"
    )
    assert "{'extra'} are declared in the hookimpl but can not be found in the hookspec" in str(
        error
    )
    assert (error.plugin, error.distribution) == ("Argumentative", None)


def test_a_refused_plugin_leaves_no_hook_behind(install):
    install("argumentative", ARGUMENTATIVE)
    install("toy", OFFERS_GATE)
    session = Session()

    session.plan(Net(), [Rule(operation="gate")]).apply().revert()

    assert list(session.plugins.broken) == ["argumentative"]


def test_two_distributions_with_one_operation_are_both_named(install):
    install("first", OFFERS_GATE)
    install("second", OFFERS_GATE)

    plugins = Plugins()

    (broken,) = plugins.broken
    other = {"first": "second", "second": "first"}[broken]
    assert str(plugins.broken[broken]) == (
        f"Plugin '{broken}' ({broken} 1.0) breaks the contract: operation 'gate' is offered by "
        f"'{other}' ({other} 1.0) and by '{broken}' ({broken} 1.0). Block one of them with "
        "SURGERY_BLOCK_PLUGINS."
    )
    assert list(plugins.operations) == ["gate"]


def test_two_distributions_with_one_plugin_name_are_both_shown(install):
    install("first", OFFERS_GATE, entry_point="same")
    install("second", OFFERS_NOTHING, entry_point="same")

    plugins = Plugins()

    loaded, refused = plugins.infos
    (error,) = plugins.broken.values()
    assert {loaded.distribution, refused.distribution} == {"first 1.0", "second 1.0"}
    assert loaded.error is None
    assert refused.error == str(error)
    assert str(error) == (
        f"Plugin 'same' ({refused.distribution}) is not loaded: a plugin of that name is, from "
        f"{loaded.distribution}. Uninstall or leave out one of them."
    )
    assert list(plugins.broken) == [f"same ({refused.distribution})"]


def test_a_plugin_passed_keeps_its_name_from_one_found(install):
    install("toy", OFFERS_GATE, entry_point="ToyPlugin")

    plugins = Plugins([ToyPlugin(Shift())])

    assert list(plugins.operations) == ["shift"]
    assert str(plugins.broken["ToyPlugin (toy 1.0)"]) == (
        "Plugin 'ToyPlugin' (toy 1.0) is not loaded: a plugin of that name is, from this session. "
        "Uninstall or leave out one of them."
    )


def test_one_operation_twice_in_a_plugin_is_refused():
    assert str(refusal(ToyPlugin(Gate(), Gate()))) == (
        "Plugin 'ToyPlugin' breaks the contract: operation 'gate' is offered by 'ToyPlugin' and "
        "by 'ToyPlugin'. Block one of them with SURGERY_BLOCK_PLUGINS."
    )


def test_an_answer_that_is_no_operation_is_refused():
    assert str(refusal(ToyPlugin("gate"))) == (
        "Plugin 'ToyPlugin' breaks the contract: surgery_operations returned 'gate': expected an "
        "Operation."
    )


def test_a_plugin_passed_twice_is_refused():
    plugin = ToyPlugin()

    assert str(refusal(plugin, plugin)).startswith(
        "Plugin 'ToyPlugin' breaks the contract: Plugin name already registered: ToyPlugin="
    )


def test_the_facade_shows_operations_sorted():
    plugins = Plugins([ToyPlugin(Shift(), Fresh())], discover=False)

    assert list(plugins.operations) == ["fresh", "shift"]
    assert all(isinstance(offered, Operation) for offered in plugins.operations.values())


def test_an_entry_point_without_a_distribution_has_no_owner():
    point = importlib.metadata.EntryPoint("toy", "toys", "surgery_core")

    assert _distribution(point) is None
