"""A model with three variants whose sites overlap, for the tests of swap states."""

from core.toys import Gated, Net, session

from surgery_core import Rule, SwapState


def gates(select, value=0.0, *, anything=False):
    return Rule(operation="gate", select=select, options={"value": value, "anything": anything})


def plan(swap, model, *rules):
    return session().plan(model, rules, beneath=swap)


def three_variants(model=None, **options):
    """Return a model with variants over sites that overlap, one of them around the others."""
    model = model or Net().eval()
    swap = SwapState(model, **options)
    swap.add("a", plan(swap, model, gates("layers.0.up", 1.0), gates("head", 1.0)))
    swap.add("b", plan(swap, model, gates("head", 2.0), gates("stem", 2.0)))
    swap.add("c", plan(swap, model, gates("layers.0", 3.0, anything=True)))
    return model, swap


def state_of(swap):
    """Return what a transition that fails must not change."""
    return (swap.selected, swap.active, swap.is_enabled, swap.stored, swap.names)


def gate_values(model):
    return {fqn: m.gate.item() for fqn, m in model.named_modules() if isinstance(m, Gated)}
