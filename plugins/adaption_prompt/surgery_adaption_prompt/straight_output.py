"""Whether what an attention function gives reaches the output projection as it is."""

import dis
import inspect
from functools import cache

from torch import nn

_RESHAPING = frozenset({"contiguous", "flatten", "reshape", "shape", "transpose", "view"})


@cache
def goes_straight(cls: type[nn.Module], projection: str) -> bool:
    """Tell whether a class's forward only reshapes what its attention function gives, then projects it.

    Some gate it (Qwen3-Next) or norm it (BitNet) in between, so that a constant added before is not
    one after. What cannot be told counts as that.

    Args:
        cls: Class of an attention module; its forward unpacks output and weights from a call.
        projection: Name of the child that comes next.
    """
    steps = list(dis.get_instructions(inspect.unwrap(cls.forward)))
    loads = [place for place, step in enumerate(steps) if step.argval == projection]
    unpacked = [place for place, step in enumerate(steps) if step.opname == "UNPACK_SEQUENCE"]
    if len(loads) != 1 or not unpacked or unpacked[0] > loads[0]:
        return False
    between = steps[max(place for place in unpacked if place < loads[0]) : loads[0]]
    names = {
        step.argval
        for step in between
        if step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL"))
    }
    # From Python 3.14 on a subscript is one of these too.
    calculates = any(step.opname == "BINARY_OP" and step.argrepr != "[]" for step in between)
    return names <= _RESHAPING and not calculates
