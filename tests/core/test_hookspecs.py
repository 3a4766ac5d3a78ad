"""Every hook is called when its specification says, and its answers and errors mean what it says."""

import warnings

import pytest
from core.toys import Net, ToyPlugin
from torch import nn

from surgery_core import Plugins, Rule, Session, Shown, SurgeryWarning, hookimpl


class Knows:
    def __init__(self, source):
        self.source = source
        self.__name__ = f"knows_{source}"

    @hookimpl
    def surgery_load_skeleton(self, source):
        return nn.ReLU() if source == self.source else None

    @hookimpl
    def surgery_load_model(self, source):
        if source == f"broken {self.source}":
            msg = "no weights"
            raise OSError(msg)
        return Net() if source == self.source else None

    @hookimpl
    def surgery_probe_inputs(self, model):
        return {"x": self.source} if model.of == self.source else None

    @hookimpl
    def surgery_show(self, source):
        if source != self.source:
            return None
        return Shown(title=f"seen by {self.__name__}", columns=(), rows=(), data={})


def test_skeletons_are_loaded_by_the_plugin_that_knows_the_source():
    plugins = Plugins([Knows("a"), Knows("b"), ToyPlugin()], discover=False)

    assert isinstance(plugins.load_skeleton("a"), nn.ReLU)
    assert isinstance(plugins.load_skeleton("b"), nn.ReLU)
    assert plugins.load_skeleton("c") is None
    assert [info.name for info in plugins.infos] == ["ToyPlugin", "knows_a", "knows_b"]


def test_models_are_loaded_by_the_plugin_that_knows_the_source():
    """An error of the plugin is the caller's."""
    plugins = Plugins([Knows("a"), Knows("b"), ToyPlugin()], discover=False)

    assert isinstance(plugins.load_model("a"), Net)
    assert isinstance(plugins.load_model("b"), Net)
    assert plugins.load_model("c") is None
    with pytest.raises(OSError, match="no weights"):
        plugins.load_model("broken a")


def test_models_are_called_with_what_the_plugin_that_knows_them_says():
    plugins = Plugins([Knows("a"), Knows("b"), ToyPlugin()], discover=False)
    models = [Net(), Net(), Net()]
    for model, name in zip(models, "abc", strict=True):
        model.of = name

    assert [{"x": "a"}, {"x": "b"}, None] == [plugins.probe_inputs(model) for model in models]


def test_hooks_that_nobody_implements_answer_nothing():
    plugins = Plugins([ToyPlugin()], discover=False)
    model = Net()

    assert plugins.load_skeleton("a") is None
    assert plugins.load_model("a") is None
    assert plugins.probe_inputs(model) is None
    assert plugins.show("a") is None
    assert [] == plugins.preflight(model)


def test_hooks_that_a_plugin_implements_are_listed():
    (info,) = Plugins([Knows("a")], discover=False).infos

    assert (
        "surgery_load_model",
        "surgery_load_skeleton",
        "surgery_probe_inputs",
        "surgery_show",
    ) == info.hooks


def test_sources_are_shown_by_the_plugin_that_knows_them():
    plugins = Plugins([Knows("a"), Knows("b"), ToyPlugin()], discover=False)

    assert plugins.show("a").title == "seen by knows_a"
    assert plugins.show("b").title == "seen by knows_b"
    assert plugins.show("c") is None


class Watcher:
    def __init__(self, name, seen, *, error=None):
        self.__name__ = name
        self.seen = seen
        self.error = error

    @hookimpl
    def surgery_applied(self, surgery):
        self.seen.append((self.__name__, "applied", surgery))
        if self.error is not None:
            raise self.error

    @hookimpl
    def surgery_reverted(self):
        self.seen.append((self.__name__, "reverted"))
        if self.error is not None:
            raise self.error


def test_observers_are_told_whatever_arguments_they_name():
    seen = []
    session = Session([ToyPlugin(), Watcher("watcher", seen)], discover=False)

    surgery = session.plan(Net(), [Rule(operation="gate")]).apply()
    surgery.revert()

    assert seen == [("watcher", "applied", surgery), ("watcher", "reverted")]


def test_an_observer_that_fails_is_a_warning_and_the_others_are_told():
    seen = []
    first = Watcher("first", seen, error=ValueError("no"))
    last = Watcher("last", seen, error=KeyError("no"))
    session = Session([ToyPlugin(), first, Watcher("middle", seen), last], discover=False)
    plan = session.plan(Net(), [Rule(operation="gate")])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        surgery = plan.apply()

    assert [entry[0] for entry in seen] == ["first", "middle", "last"]
    assert [str(warning.message) for warning in caught] == [
        "Plugin 'first' failed in surgery_applied: ValueError('no').",
        "Plugin 'last' failed in surgery_applied: KeyError('no').",
    ]
    assert {warning.category for warning in caught} == {SurgeryWarning}
    assert {warning.filename for warning in caught} == {__file__}
    assert surgery.is_applied
    with pytest.warns(SurgeryWarning) as reported:
        surgery.revert()
    assert [str(warning.message) for warning in reported] == [
        "Plugin 'first' failed in surgery_reverted: ValueError('no').",
        "Plugin 'last' failed in surgery_reverted: KeyError('no').",
    ]
    assert not surgery.is_applied
