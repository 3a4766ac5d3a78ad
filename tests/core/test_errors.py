"""Errors derive from what a caller expects, carry their facts, and are named as imported."""

import pytest

import surgery_core
from surgery_core import (
    ConflictError,
    ContractError,
    DriftError,
    NoMatchError,
    OptionsError,
    PluginError,
    SelectorError,
    StateError,
    SurgeryError,
    SurgeryWarning,
    UnknownOperationError,
    VariantError,
    listed,
)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (NoMatchError, LookupError),
        (SelectorError, ValueError),
        (ConflictError, ValueError),
        (ContractError, TypeError),
        (OptionsError, ValueError),
        (DriftError, RuntimeError),
        (VariantError, ValueError),
        (PluginError, Exception),
        (UnknownOperationError, LookupError),
        (StateError, ValueError),
    ],
)
def test_errors_derive_from_the_root_and_from_a_builtin(error, builtin):
    assert issubclass(error, SurgeryError)
    assert issubclass(error, builtin)


def test_errors_are_named_as_they_are_imported():
    errors = [value for name, value in vars(surgery_core).items() if name.endswith("Error")]

    assert len(errors) == 14
    assert {error.__module__ for error in errors} == {"surgery_core"}
    assert SurgeryWarning.__module__ == "surgery_core"
    assert issubclass(SurgeryWarning, UserWarning)


def test_no_match_error_keeps_selector_and_candidates():
    error = NoMatchError("nothing", selector="a.*", candidates=["b", "a"])

    assert str(error) == "nothing"
    assert error.selector == "a.*"
    assert error.candidates == ("b", "a")


def test_conflict_error_keeps_the_claims():
    claims = [(("gate", "a"), ("shift", "a.b"))]

    assert ConflictError("clash", claims=claims).claims == tuple(claims)


def test_contract_error_keeps_where_expected_and_actual():
    error = ContractError("broken", fqn="a.b", expected=1, actual=2)

    assert (error.fqn, error.expected, error.actual) == ("a.b", 1, 2)


def test_drift_error_sorts_its_fqns():
    assert DriftError("drift", fqns=["b", "a"]).fqns == ("a", "b")


def test_plugin_error_keeps_plugin_and_distribution():
    error = PluginError("broken", plugin="toy", distribution="toy-dist 1.0")

    assert (error.plugin, error.distribution) == ("toy", "toy-dist 1.0")
    assert PluginError("broken", plugin="toy").distribution is None


def test_state_error_sorts_all_it_names():
    error = StateError("bad", missing=["b", "a"], unexpected=["d", "c"], mismatched=["f", "e"])

    assert error.missing == ("a", "b")
    assert error.unexpected == ("c", "d")
    assert error.mismatched == ("e", "f")
    assert StateError("bad").missing == ()


@pytest.mark.parametrize(
    ("items", "most", "expected"),
    [
        ([], 5, "nothing"),
        (["b", "a"], 5, "'b', 'a'"),
        (range(5), 5, "0, 1, 2, 3, 4"),
        (range(6), 5, "0, 1, 2, 3, 4 and 1 more"),
        (iter("abc"), 1, "'a' and 2 more"),
    ],
)
def test_listed_quotes_and_cuts(items, most, expected):
    assert listed(items, most=most) == expected
