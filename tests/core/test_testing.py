"""The contract suite passes good operations and, for every way to be bad, fails."""

import unittest

import pytest
import torch
from core.bad_toys import (
    AsksItsParent,
    BreaksTheGraph,
    ChangesItsMind,
    ChangesValues,
    ComputesOtherwiseWhenCompiled,
    CountsOnlyWhatIsNotCompiled,
    DiffersWhenCopied,
    DiffersWhenPickled,
    DrawsFromPython,
    DrawsRandomNumbers,
    ForgetsItsGateWhenCompiled,
    IgnoresModes,
    IsNoIdentity,
    IsNotTrainedWhenCompiled,
    KeepsValuesElsewhere,
    LeavesAHook,
    LeavesResidue,
    LiesAboutKeys,
    LiesAboutShapes,
    LosesHooks,
    MakesParameters,
    MovesHooks,
    MutatesInDescribe,
    MutatesInTargets,
    OnAnotherDevice,
    RunsCompiledCodeOfTheBase,
    SharesHooksOfWhatItCalls,
    TakesAnyOption,
    TakesParametersAway,
    WorksByHook,
    WritesElsewhere,
)
from core.toys import (
    Fresh,
    Gate,
    Net,
    Shift,
    Twice,
    example,
    session,
)
from torch import nn

from surgery_core import OfClass, Rule
from surgery_core.testing import (
    InjectedError,
    OperationContract,
    failing_at,
)


class ToyContract(OperationContract):
    operation = Gate
    select: str | None = None

    def make_model(self):
        return Net()

    def make_aliased_model(self):
        return Twice(Net())

    def rules(self):
        return [Rule(operation=self.operation.name, select=self.select)]

    def run(self, model):
        return model(example())

    def session(self):
        return session(self.operation())


class TestGate(ToyContract):
    """A wrapper that owns the original."""


class TestShift(ToyContract):
    """A replacement that shares the parameters of the original."""

    operation = Shift


class TestFresh(ToyContract):
    """A replacement that shares nothing."""

    operation = Fresh
    identity_at_init = False


class TestRoot(ToyContract):
    """The root is replaced."""

    def make_model(self):
        return nn.Linear(4, 4)

    def make_aliased_model(self):
        return None


class TestHolders(ToyContract):
    """Targets are held outside the registry too, and the model returns a tuple."""

    def make_model(self):
        model = Net()
        model.heads = [model.head, (1, model.stem)]
        model.by_name = {"up": model.layers[0].up}
        model.layers[0].__dict__["shortcut"] = model.layers[0].down
        return model

    def run(self, model):
        return model(example()), model.heads[0](example())


class TestWithoutGradients(ToyContract):
    """No output needs gradients, so no backward hook can fire."""

    def run(self, model):
        with torch.no_grad():
            return model(example())


def test_the_suite_asks_for_installed_plugins_by_default(install):
    install("toy", "from core.toys import ToyPlugin\nplugin = ToyPlugin()\n", attribute="plugin")

    found = OperationContract.session(TestGate())

    assert list(found.plugins.operations) == ["fresh", "gate", "shift"]


def test_the_suite_needs_no_model_with_aliases():
    assert OperationContract.make_aliased_model(TestGate()) is None
    with pytest.raises(unittest.SkipTest, match=r"\Amake_aliased_model\(\) gives no model\Z"):
        TestRoot().test_aliases_are_replaced_together()


def failing(operation, *names, **attributes):
    """Run the whole suite, or some tests, on an operation and return the names of those that fail."""
    contract = type("Contract", (ToyContract,), {"operation": operation, **attributes})
    found = set()
    for name in [f"test_{name}" for name in names] or dir(contract):
        if name.startswith("test_"):
            try:
                getattr(contract(), name)()
            except Exception:  # noqa: BLE001 (an error of any kind fails a test)
                found.add(name.removeprefix("test_"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("operation", [Gate, Shift, Fresh])
def test_a_good_operation_passes(operation):
    assert failing(operation, identity_at_init=operation is not Fresh) == set()


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (MutatesInTargets, "planning_changes_nothing"),
        (MutatesInDescribe, "planning_changes_nothing"),
        (DrawsRandomNumbers, "planning_changes_nothing"),
        (DrawsFromPython, "planning_changes_nothing"),
        (MakesParameters, "planning_changes_nothing"),
        (ChangesItsMind, "planning_twice_gives_equal_documents"),
        (TakesAnyOption, "unknown_options_are_refused"),
        (LiesAboutKeys, "apply_has_the_declared_effects"),
        (LiesAboutShapes, "apply_has_the_declared_effects"),
        (ChangesValues, "apply_has_the_declared_effects"),
        (ChangesValues, "revert_restores_the_same_objects"),
        (ChangesValues, "a_fault_at_any_write_of_apply_changes_nothing"),
        (WritesElsewhere, "apply_changes_only_the_modules_named"),
        (LeavesResidue, "revert_restores_the_same_objects"),
        (LeavesResidue, "drift_stops_revert"),
        (LeavesResidue, "aliases_are_replaced_together"),
        (LeavesResidue, "a_block_with_applied_restores_after_an_error"),
        (SharesHooksOfWhatItCalls, "hooks_survive_apply_and_revert"),
        (LosesHooks, "hooks_survive_apply_and_revert"),
        (MovesHooks, "hook_handles_work_while_applied"),
        (IgnoresModes, "a_mode_set_while_applied_is_kept_by_revert"),
        (DiffersWhenCopied, "copies_of_the_applied_model_compute_the_same"),
        (DiffersWhenPickled, "copies_of_the_applied_model_compute_the_same"),
        (IsNoIdentity, "output_at_init_is_as_declared"),
        (AsksItsParent, "a_traced_model_is_changed_like_any_other"),
        (OnAnotherDevice, "a_model_without_values_is_changed_without_any"),
        (TakesParametersAway, "ties_are_reported_and_there_again_after_revert"),
        (KeepsValuesElsewhere, "a_record_of_it_computes_the_same"),
        (LeavesResidue, "a_record_of_it_computes_the_same"),
        (ComputesOtherwiseWhenCompiled, "compiled_it_computes_the_same"),
        (ForgetsItsGateWhenCompiled, "compiled_it_computes_the_same"),
        (ForgetsItsGateWhenCompiled, "compiled_with_its_gradients_it_computes_the_same"),
        (IsNotTrainedWhenCompiled, "compiled_it_computes_the_same"),
        (IsNotTrainedWhenCompiled, "compiled_with_its_gradients_it_computes_the_same"),
        (CountsOnlyWhatIsNotCompiled, "compiled_it_computes_the_same"),
        (BreaksTheGraph, "compiled_it_computes_the_same"),
        (BreaksTheGraph, "what_was_compiled_before_follows_apply_and_revert"),
        (RunsCompiledCodeOfTheBase, "targets_compiled_in_place_are_replaced"),
    ],
)
def test_a_bad_operation_fails(operation, expected):
    assert {expected} == failing(operation, expected)


@pytest.mark.parametrize(
    ("operation", "when"),
    [
        (WorksByHook, "After apply"),
        (ChangesValues, "After revert"),
        (LeavesAHook, "Compiled again after revert"),
    ],
)
def test_compiled_code_that_does_not_follow_fails_the_suite(operation, when):
    contract = type("Contract", (ToyContract,), {"operation": operation})

    with pytest.raises(AssertionError, match=rf"\A{when}, compiled code gives others: "):
        contract().test_what_was_compiled_before_follows_apply_and_revert()


def test_the_suite_keeps_no_record_of_selectors_that_are_no_text():
    rules = [Rule(operation="gate", select=OfClass(nn.Linear))]
    contract = type("Contract", (ToyContract,), {"rules": lambda _self: rules})

    with pytest.raises(unittest.SkipTest, match="selectors that are no text"):
        contract().test_a_record_of_it_computes_the_same()


def test_a_broken_graph_is_a_fault_unless_one_graph_is_not_promised():
    name = "compiled_it_computes_the_same"
    contract = type("Contract", (ToyContract,), {"operation": BreaksTheGraph})

    with pytest.raises(AssertionError) as caught:
        contract().test_compiled_it_computes_the_same()

    assert str(caught.value).startswith("After apply, the model does not run compiled: Call to ")
    assert str(caught.value).endswith("it need not be one graph, set `fullgraph = False`.")
    assert set() == failing(BreaksTheGraph, name, fullgraph=False)


def test_a_model_that_cannot_be_compiled_is_not():
    contract = type("Contract", (ToyContract,), {"make_compiled": lambda *_: None})

    with pytest.raises(unittest.SkipTest, match=r"\Amake_compiled\(\) gives no model\Z"):
        contract().test_compiled_it_computes_the_same()


def test_a_suite_that_runs_something_else_than_what_was_compiled_fails():
    """Then nothing would be compared."""
    contract = type("Contract", (ToyContract,), {"make_compiled": lambda _self, model, _: model})

    with pytest.raises(AssertionError, match=r"\Arun\(\) calls nothing of the model that"):
        contract().test_what_was_compiled_before_follows_apply_and_revert()


def test_a_suite_may_compile_in_place():
    def make_compiled(_self, model, backend):
        model.compile(backend=backend)
        return model

    name = "compiled_it_computes_the_same"
    before = "what_was_compiled_before_follows_apply_and_revert"
    assert set() == failing(Gate, name, before, make_compiled=make_compiled)
    assert {name} == failing(ComputesOtherwiseWhenCompiled, name, make_compiled=make_compiled)


def test_a_suite_whose_rules_claim_nothing_fails():
    rules = [Rule(operation="gate", select="zzz", optional=True)]

    name = "the_document_survives_json"
    assert {name} == failing(Gate, name, rules=lambda _self: rules)


@pytest.mark.slow
def test_a_suite_whose_aliased_model_has_no_aliases_fails():
    found = failing(Gate, make_aliased_model=lambda _self: Net())

    assert found == {"aliases_are_replaced_together"}


def test_faults_are_injected_at_one_write():
    on_write = failing_at(1)

    on_write(0, nn.Parameter(torch.zeros(1)))
    with pytest.raises(InjectedError) as caught:
        on_write(1, nn.Parameter(torch.zeros(1)))

    assert str(caught.value) == "Write 1 at 'a parameter' fails on purpose."
