"""Plan, apply and revert changes to the modules of a PyTorch model, with operations from plugins."""

from surgery_core.atomic import write_files, write_folders
from surgery_core.carry import CarryOver
from surgery_core.choices import repeats_of, require_names, rows_at, weights_of
from surgery_core.composing import WeightedSum, composed_names, finite_weights, modules_of
from surgery_core.editing import EditedModel, ModelPlan
from surgery_core.errors import (
    ConflictError,
    ContractError,
    DriftError,
    NoMatchError,
    OptionsError,
    PluginError,
    PreflightError,
    RecipeError,
    RecordError,
    SelectorError,
    StateError,
    SurgeryError,
    SurgeryWarning,
    UnknownOperationError,
    VariantError,
    listed,
)
from surgery_core.forwards import check_forward, check_linear, dispatch_again, is_dispatched
from surgery_core.fx import (
    GraphDocument,
    GraphEdit,
    GraphOperation,
    GraphPlan,
    GraphRule,
    GraphSurgery,
)
from surgery_core.hookspecs import hookimpl
from surgery_core.model_document import ModelDocument
from surgery_core.names import can_name_folder, name_problem
from surgery_core.operation import (
    BASE,
    BoundRule,
    Composed,
    Effects,
    Operation,
    Rule,
    Saved,
    TensorSpec,
    WeightedModule,
    WeightedVariant,
)
from surgery_core.overlay import Overlay, make_overlay, replacement_device
from surgery_core.patterns import GraphMatch, PatternSelector, find_pattern
from surgery_core.pickled import load_pickled
from surgery_core.plan import Edit, PlanDocument, fingerprint
from surgery_core.plugins import PluginInfo, Plugins
from surgery_core.preflight import Diagnostic, check_preflight, diagnose, execution_device
from surgery_core.recipe import ModelRecipe, Recipe, dump_recipe, load_recipe
from surgery_core.record import Record, read_record
from surgery_core.regular import read_text
from surgery_core.selection import Selection, Shareable, select
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
from surgery_core.session import Session, load
from surgery_core.settings import load_settings
from surgery_core.sharded import (
    is_sharded,
    one_writer,
    replicate_,
    reshard_,
    whole_module,
    whole_tensor,
    whole_tensors,
)
from surgery_core.sharing import Sharing
from surgery_core.shown import Shown, format_table
from surgery_core.slots import Site, Slot, SlotIndex
from surgery_core.surgery import Plan, Replacement, Surgery
from surgery_core.swap import Loans, SwapState
from surgery_core.tensor_file import (
    TensorFile,
    file_stamp,
    pack_tensors,
    read_tensor_file,
    read_tensor_header,
    tensor_files,
)
from surgery_core.tensors import load_tensors_
from surgery_core.transaction import OnWrite, Transaction, parameter_places
from surgery_core.verify import Check, Verification, verify

__version__ = "0.1.0"

__all__ = [
    "BASE",
    "BoundRule",
    "CarryOver",
    "Check",
    "Composed",
    "ConflictError",
    "ContractError",
    "Diagnostic",
    "DriftError",
    "Edit",
    "EditedModel",
    "Effects",
    "Exact",
    "Glob",
    "GraphDocument",
    "GraphEdit",
    "GraphMatch",
    "GraphOperation",
    "GraphPlan",
    "GraphRule",
    "GraphSurgery",
    "Loans",
    "ModelDocument",
    "ModelPlan",
    "ModelRecipe",
    "NoMatchError",
    "OfClass",
    "OnWrite",
    "Operation",
    "OptionsError",
    "Overlay",
    "PatternSelector",
    "Plan",
    "PlanDocument",
    "PluginError",
    "PluginInfo",
    "Plugins",
    "PreflightError",
    "Recipe",
    "RecipeError",
    "Record",
    "RecordError",
    "Regex",
    "Replacement",
    "Rule",
    "Saved",
    "Selection",
    "Selector",
    "SelectorError",
    "Session",
    "Shareable",
    "Sharing",
    "Shown",
    "Site",
    "Slot",
    "SlotIndex",
    "StateError",
    "Surgery",
    "SurgeryError",
    "SurgeryWarning",
    "SwapState",
    "TensorFile",
    "TensorSpec",
    "Transaction",
    "Tree",
    "UnknownOperationError",
    "VariantError",
    "Verification",
    "WeightedModule",
    "WeightedSum",
    "WeightedVariant",
    "Where",
    "can_name_folder",
    "check_forward",
    "check_linear",
    "check_preflight",
    "composed_names",
    "diagnose",
    "dispatch_again",
    "dump_recipe",
    "execution_device",
    "file_stamp",
    "find_pattern",
    "fingerprint",
    "finite_weights",
    "format_table",
    "hookimpl",
    "is_dispatched",
    "is_sharded",
    "listed",
    "load",
    "load_pickled",
    "load_recipe",
    "load_settings",
    "load_tensors_",
    "make_overlay",
    "modules_of",
    "name_problem",
    "one_writer",
    "pack_tensors",
    "parameter_places",
    "parse_selector",
    "read_record",
    "read_tensor_file",
    "read_tensor_header",
    "read_text",
    "repeats_of",
    "replacement_device",
    "replicate_",
    "require_names",
    "reshard_",
    "rows_at",
    "select",
    "tensor_files",
    "verify",
    "weights_of",
    "whole_module",
    "whole_tensor",
    "whole_tensors",
    "write_files",
    "write_folders",
]
