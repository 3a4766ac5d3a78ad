"""Plan, apply and revert changes to the modules of a PyTorch model, with operations from plugins."""

from surgery_core.carry import CarryOver
from surgery_core.errors import (
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
from surgery_core.hookspecs import hookimpl
from surgery_core.plan import (
    BoundRule,
    Edit,
    Effects,
    Operation,
    PlanDocument,
    Rule,
    TensorSpec,
    fingerprint,
)
from surgery_core.plugins import PluginInfo, Plugins
from surgery_core.selectors import (
    Exact,
    Glob,
    OfClass,
    Regex,
    Selector,
    Tree,
    Where,
    parse_selector,
)
from surgery_core.session import Session
from surgery_core.shown import Shown, format_table
from surgery_core.slots import Site, Slot, SlotIndex
from surgery_core.surgery import Plan, Replacement, Surgery
from surgery_core.swap import Loans, SwapState
from surgery_core.transaction import OnWrite, Transaction

__version__ = "0.1.0.dev0"

__all__ = [
    "BoundRule",
    "CarryOver",
    "ConflictError",
    "ContractError",
    "DriftError",
    "Edit",
    "Effects",
    "Exact",
    "Glob",
    "Loans",
    "NoMatchError",
    "OfClass",
    "OnWrite",
    "Operation",
    "OptionsError",
    "Plan",
    "PlanDocument",
    "PluginError",
    "PluginInfo",
    "Plugins",
    "Regex",
    "Replacement",
    "Rule",
    "Selector",
    "SelectorError",
    "Session",
    "Shown",
    "Site",
    "Slot",
    "SlotIndex",
    "StateError",
    "Surgery",
    "SurgeryError",
    "SurgeryWarning",
    "SwapState",
    "TensorSpec",
    "Transaction",
    "Tree",
    "UnknownOperationError",
    "VariantError",
    "Where",
    "fingerprint",
    "format_table",
    "hookimpl",
    "listed",
    "parse_selector",
]
