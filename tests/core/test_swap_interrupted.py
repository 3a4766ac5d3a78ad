"""An interrupt at any line of a switch leaves model and swap state as before it, or as after it."""

import sys

import pytest
from core.test_swap_loans import with_borrower

from surgery_core import transaction
from surgery_core.swap import SwapState

WRITER = transaction.Transaction.replace_all.__code__
FILES = {sys.modules[name].__file__ for name in (SwapState.__module__, transaction.__name__)}


def interrupting_at(line, is_traced):
    """Return a trace function that does what Ctrl-C does, at the given line of what is traced."""
    seen = 0

    def trace_line(_frame, event, _arg):
        nonlocal seen
        if event == "line":
            seen += 1
            if seen == line:
                raise KeyboardInterrupt
        return trace_line

    return lambda frame, _event, _arg: trace_line if is_traced(frame.f_code) else None


def interrupted(call, line, is_traced):
    """Call with an interrupt, and tell whether it came before the call was through."""
    tracer = sys.gettrace()
    sys.settrace(interrupting_at(line, is_traced))
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(tracer)
    return False


def facts(model, swap):
    names = {name: [id(m) for m in swap.variant(name).values()] for name in swap.names}
    return [id(m) for m in model.modules()], swap.active, set(swap.stored), set(swap.lent), names


STEPS = {
    "set": (lambda swap: swap.set("b"), lambda swap: swap.set("a")),
    "set borrower": (lambda swap: swap.set("sum"), lambda swap: swap.set("a")),
    "disable": (SwapState.disable, SwapState.enable),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "is_traced",
    [lambda code: code is WRITER, lambda code: code.co_filename in FILES],
    ids=["writes", "all"],
)
def test_an_interrupted_switch_has_happened_whole_or_not_at_all(step, is_traced):
    forth, back = STEPS[step]
    model, swap = with_borrower()
    swap.set("a")
    before = facts(model, swap)
    forth(swap)
    after = facts(model, swap)
    back(swap)
    line = 1

    while interrupted(lambda: forth(swap), line, is_traced):
        found = facts(model, swap)
        assert found in (before, after), line
        if found == after:
            back(swap)
        line += 1

    assert line > 5
    assert after == facts(model, swap)
