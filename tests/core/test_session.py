"""A session plans with its own plugins, and applies for the length of a block."""

import threading

import pytest
from core.toys import Gated, Net, Shift, ToyPlugin, session

from surgery_core import (
    DriftError,
    OptionsError,
    Rule,
    Session,
    SwapState,
    UnknownOperationError,
)
from surgery_core.testing import InjectedError, assert_unchanged, snapshot

GATES = [Rule(operation="gate")]


def test_a_plan_needs_rules():
    with pytest.raises(OptionsError) as caught:
        session().plan(Net(), [])

    assert str(caught.value) == ("Rules are empty: expected at least one rule. Name an operation.")


def test_a_rule_names_an_operation_of_the_session():
    with pytest.raises(UnknownOperationError, match=r"\AOperation 'gate' is unknown: "):
        session(Shift()).plan(Net(), GATES)


def test_sessions_share_nothing():
    one = Session([ToyPlugin()], discover=False)
    two = Session(discover=False)

    assert one.plugins.operations
    assert not two.plugins.operations


def test_applied_reverts_at_the_end():
    model = Net()
    before = snapshot(model)

    with session().applied(model, GATES) as surgery:
        assert isinstance(model.head, Gated)
        assert surgery.is_applied

    assert not surgery.is_applied
    assert_unchanged(before, model, subject="The block")


def test_applied_reverts_after_an_error():
    model = Net()
    before = snapshot(model)

    with pytest.raises(InjectedError), session().applied(model, GATES):
        raise InjectedError

    assert_unchanged(before, model, subject="The block")


def test_applied_leaves_a_surgery_alone_that_the_block_reverted():
    model = Net()
    before = snapshot(model)

    with session().applied(model, GATES) as surgery:
        surgery.revert()

    assert_unchanged(before, model, subject="The block")


def test_applied_blocks_nest():
    model = Net()
    before = snapshot(model)

    with (
        session().applied(model, [Rule(operation="gate", select="head")]),
        session().applied(model, [Rule(operation="shift", select="head.inner")]),
    ):
        assert isinstance(model.head.inner.shift, object)

    assert_unchanged(before, model, subject="Two blocks")


def test_drift_within_a_block_is_an_error_at_its_end():
    model = Net()

    with (
        pytest.raises(DriftError, match="drifted at 'head'"),
        session().applied(model, GATES) as surgery,
    ):
        model.head = Net()

    assert surgery.is_applied


def test_planning_beneath_a_swap_state_looks_through_its_variant():
    model = Net()
    swap = SwapState(model)
    base = session().plan(model, GATES)
    swap.add("one", base)
    swap.set("one")

    beneath = session().plan(model, GATES, beneath=swap)
    on_top = session().plan(model, [Rule(operation="shift")])

    assert beneath.document == base.document
    assert on_top.document.edits[0].fqn == "stem.inner"


def test_sessions_in_threads_do_not_interact():
    documents, expected = [], session().plan(Net(), GATES).document

    def work():
        for _ in range(5):
            model = Net()
            with session().applied(model, GATES) as surgery:
                documents.append(surgery.plan.document)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert documents == [expected] * 20
