"""Keep what was done to a model, and do it again: in another process, or on another model."""

import hashlib
import json
import os
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import nn

from surgery_core.atomic import write_files
from surgery_core.editing import EditedModel, ModelPlan
from surgery_core.errors import RecordError, StateError, SurgeryWarning, listed
from surgery_core.model_document import RULES
from surgery_core.plan import Edit, PlanDocument, check_covered, structure
from surgery_core.recipe import ModelRecipe
from surgery_core.regular import open_regular, read_text
from surgery_core.sharded import is_partitioned, one_writer, whole_tensors
from surgery_core.shown import Shown
from surgery_core.tensor_file import pack_tensors, unpack_tensors, values_of

TENSORS_FILE = "surgery.safetensors"
"""The file that is the record."""
RECORD_FILE = "surgery.json"
"""Name of the JSON in its header. 0.1.0 wrote it as a file, which names its tensors by a digest."""
FORMAT = "surgery record"
VERSION = 2

BaseCheck = Literal["warn", "error", "ignore"]
"""What to do when a record was made of a model with the same modules and other values."""

Planner = Callable[[nn.Module, ModelRecipe], ModelPlan]
"""Plans a model's part of a recipe; see `Session.plan_recipe`."""


def _with_retyped(data: dict[str, Any]) -> dict[str, Any]:
    """Version 2 says which tensors stay under their keys with another dtype."""
    plans = {
        name: {**plan, "edits": [{"retyped": [], **edit} for edit in plan["edits"]]}
        for name, plan in data["plans"].items()
    }
    return {**data, "version": 2, "plans": plans}


MIGRATIONS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _with_retyped}
"""By version, what makes a record of the next version of one of that."""

NUM_VALUES = 64
"""How many values of each tensor of the base are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What was done to a model, as it was read from a folder.

    Args:
        folder: Where.
        recipe: What was asked for, options complete, without sources.
        plans: What came of it, by adapter, `rules` first.
        base: The model before: a line for each module and tensor.
        values: Digests of some values of the base, by FQN, where there were any.
        operations: Which distribution offered each operation.
        versions: Of the packages that made it.
        state: Tensors, by adapter and then by `fqn.name`.
    """

    folder: Path
    recipe: ModelRecipe
    plans: Mapping[str, PlanDocument]
    base: tuple[str, ...]
    values: Mapping[str, str]
    operations: Mapping[str, str | None]
    versions: Mapping[str, str]
    state: Mapping[str, Mapping[str, torch.Tensor]]


def save_record(
    edited: EditedModel,
    folder: str | os.PathLike[str],
    *,
    operations: Mapping[str, str | None],
) -> None:
    """Write a record of what was done to a model, tensors included; nothing of the base's.

    Whenever the process dies, the folder holds the record it held before, or the new one. Sharded
    tensors are gathered: every process must call this then, the first one writes, and all return when
    it has.

    Args:
        edited: The model, with the recipe applied.
        folder: Made if it is not there.
        operations: Which distribution offers each operation.

    Raises:
        StateError: A tensor has no values, or values that are not finite; nothing was written.
        DriftError: A module that was put in place is not there; same.
        ContractError: Something is merged into the base's weights; same.
    """
    edited.check_in_place()
    found = {name: edited.tensors(name) for name in edited.plan.document.documents}
    state = {
        f"{name}:{key}": tensor
        for name, tensors in found.items()
        for key, tensor in _checked(name, whole_tensors(tensors)).items()
    }
    adapters = {
        name: recipe.model_copy(update={"source": None})
        for name, recipe in edited.plan.recipe.adapters.items()
    }
    active = edited.active
    update = {
        "adapters": adapters,
        "active": dict(active) if isinstance(active, Mapping) else active,
    }
    recipe = edited.plan.recipe.model_copy(update=update)
    # Threads that are inside `activated` go on with their adapters.
    with edited.paused(for_all=False) as model:
        base, values = structure(model), _values(edited.plan)
    used = {
        edit.operation for found in edited.plan.document.documents.values() for edit in found.edits
    }
    values_only = values_of(pack_tensors(state, {}))
    data = {
        "format": FORMAT,
        "version": VERSION,
        "recipe": recipe.model_dump(mode="json", exclude_defaults=True),
        "plans": {name: asdict(found) for name, found in edited.plan.document.documents.items()},
        "base": {"structure": base, "values": values},
        "operations": {name: operations.get(name) for name in sorted(used)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "tensors": {
            "sha256": hashlib.sha256(values_only).hexdigest(),
            "bytes": len(values_only),
        },
    }
    # Prompts may be whole in processes that have heads of one model.
    held = [*edited.model.parameters(), *(one for own in found.values() for one in own.values())]
    with one_writer(held) as is_writer:
        if is_writer:
            texts = {RECORD_FILE: json.dumps(data, indent=1)}
            write_files(folder, {TENSORS_FILE: pack_tensors(state, texts)})
            # Of a record that 0.1.0 wrote; nobody reads them any more.
            for name in (RECORD_FILE, PENDING_FILE):
                with suppress(OSError):
                    (Path(folder) / name).unlink()


def is_record(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder has a record in it, of whatever version; it may be damaged."""
    return any((Path(folder) / name).is_file() for name in (TENSORS_FILE, RECORD_FILE))


def read_record(folder: str | os.PathLike[str]) -> Record:
    """Read a record; nothing in it is executed.

    Raises:
        RecordError: There is none, it is damaged, or of a later version.
    """
    found = _in_one_file(Path(folder))
    path = Path(folder) / (RECORD_FILE if found is None else TENSORS_FILE)
    try:
        data = _migrated(path, json.loads(read_text(path) if found is None else found.text))
        recipe = ModelRecipe.model_validate(data["recipe"])
        plans = {name: PlanDocument.from_mapping(found) for name, found in data["plans"].items()}
        base = tuple(map(str, data["base"]["structure"]))
        values = dict(data["base"]["values"])
        digest = str(data["tensors"]["sha256"])
        operations, versions = dict(data["operations"]), dict(data["versions"])
        _check_names(recipe, plans)
    except (FileNotFoundError, NotADirectoryError) as err:
        msg = (
            f"Folder {os.fspath(folder)!r} has no record: expected {TENSORS_FILE!r} in it. Pass a "
            "folder that a record was saved to."
        )
        raise RecordError(msg) from err
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        detail = err.errors()[0]["msg"] if isinstance(err, ValidationError) else repr(err)
        raise _damaged(path, detail) from err
    if found is not None and found.digest != digest:
        raise _damaged(path, f"values with SHA-256 {found.digest}, not {digest}")
    tensors = _tensors_of_old(Path(folder), digest) if found is None else found.tensors
    state: dict[str, dict[str, torch.Tensor]] = {name: {} for name in plans}
    for key, tensor in tensors.items():
        name, sign, own = key.partition(":")
        if not sign or name not in state:
            raise _damaged(path, f"a tensor {key!r}")
        state[name][own] = tensor
    return Record(
        folder=Path(folder),
        recipe=recipe,
        plans=plans,
        base=base,
        values=values,
        operations=operations,
        versions=versions,
        state=state,
    )


def show_record(record: Record) -> Shown:
    """Describe a record for people, a row for each adapter."""
    active = record.recipe.selected
    weights = {active: 1.0} if isinstance(active, str) else dict(active or {})
    rows = []
    for name, document in record.plans.items():
        tensors = record.state[name].values()
        operations = sorted({edit.operation for edit in document.edits})
        rows.append(
            (
                *(name, ", ".join(operations), f"{weights[name]:g}" if name in weights else "-"),
                *(str(len(document.edits)), f"{sum(t.numel() for t in tensors):,}"),
                *(
                    f"{sum(t.nbytes for t in tensors):,}",
                    ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors})),
                ),
            )
        )
    made = [f"{name}: {maker or 'by hand'}" for name, maker in record.operations.items()]
    return Shown(
        title=f"Record in {str(record.folder)!r} of {record.recipe.source or 'a model'}",
        columns=("adapter", "operation", "active", "modules", "values", "bytes", "dtypes"),
        rows=tuple(rows),
        notes=(f"Operations: {', '.join(made)}.",),
        data={
            "source": str(record.folder),
            "recipe": record.recipe.model_dump(mode="json", exclude_defaults=True),
            "operations": dict(record.operations),
            "versions": dict(record.versions),
            "adapters": {
                name: {"modules": len(found.edits), "values": found.num_parameters}
                for name, found in record.plans.items()
            },
        },
    )


def replay(
    model: nn.Module, record: Record, plan: Planner, *, base_check: BaseCheck = "warn"
) -> EditedModel:
    """Do again what a record says, on the same model as then, with the tensors as they were.

    Args:
        model: With the modules and dtypes that the recorded one had.
        record: What was read.
        plan: How to plan.
        base_check: What to do if the model's values are others.

    Raises:
        RecordError: The model is another one, which the first difference shows; or the operations
            would do something else now. The model is unchanged.
        StateError: The values are others, and `base_check` is `"error"`; same.
    """
    actual = structure(model)
    if actual != list(record.base):
        raise RecordError(_first_difference(record, actual))
    planned = plan(model, record.recipe)
    for name, found in planned.document.documents.items():
        if found.edits != record.plans[name].edits:
            made = ", ".join(str(maker) for maker in record.operations.values())
            msg = (
                f"Record {str(record.folder)!r} cannot be replayed: operations would do something "
                f"else for {name!r} now, expected {_summary(record.plans[name])}, got "
                f"{_summary(found)}. Install what it was made with: {made}."
            )
            raise RecordError(msg)
    _check_values(record, _values(planned), base_check)
    return _loaded(planned, record.state)


def rematch(model: nn.Module, record: Record, plan: Planner) -> EditedModel:
    """Do what a record says on another model: rules are matched anew, and tensors follow in order.

    For a base of another dtype, or one in which the same layers have other names.

    Args:
        model: For which the recipe makes as many edits, of the same shapes, as it did then.
        record: What was read.
        plan: How to plan.

    Raises:
        StateError: The edits are others; all are named, and the model is unchanged.
        SurgeryError: The recipe does not suit the model; same.
    """
    planned = plan(model, record.recipe)
    state: dict[str, dict[str, torch.Tensor]] = {}
    problems: list[str] = []
    for name, found in planned.document.documents.items():
        then, now = record.plans[name].edits, found.edits
        if len(then) != len(now):
            problems.append(f"{name}: expected {len(then)} edits, got {len(now)}")
            continue
        state[name] = {}
        for old, new in zip(then, now, strict=True):
            if _shapes(old) != _shapes(new):
                problems.append(f"{name}: {new.fqn} is not as {old.fqn} was")
            before = f"{old.fqn}." if old.fqn else ""
            state[name] |= {
                f"{new.fqn}.{key.removeprefix(before)}": tensor
                for key, tensor in record.state[name].items()
                if key.startswith(before)
            }
    if problems:
        msg = (
            f"Record {str(record.folder)!r} does not suit the model: {'; '.join(problems)}. Pass a "
            "model with as many layers of the same sizes."
        )
        raise StateError(msg, mismatched=problems)
    return _loaded(planned, state)


def _loaded(planned: ModelPlan, state: Mapping[str, Mapping[str, torch.Tensor]]) -> EditedModel:
    own = {} if planned.rules is None else {RULES: planned.rules[1]}
    own |= {name: adapter.plan for name, adapter in planned.adapters.items()}
    for name, found in own.items():
        check_covered(found.claims, state[name], subject=f"Tensors do not fit {name!r}")
    edited = planned.apply()
    try:
        for name, tensors in state.items():
            edited.load_(name, tensors)
    except BaseException:
        edited.revert()
        raise
    return edited


def _checked(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    bad = [
        f"{name}: {key}"
        for key, tensor in tensors.items()
        if tensor.is_meta or not bool(torch.isfinite(tensor).all())
    ]
    if bad:
        msg = (
            f"Nothing was saved: expected values that are finite, got others in {listed(bad)}. "
            "Load or train them again."
        )
        raise StateError(msg, mismatched=bad)
    return tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class _OneFile:
    """A record as it is written now: its JSON is in the header of its tensors."""

    text: str
    tensors: Mapping[str, torch.Tensor]
    digest: str


def _in_one_file(folder: Path) -> _OneFile | None:
    """Read a record; None if there is none, or one that 0.1.0 wrote.

    Raises:
        RecordError: It is damaged.
    """
    path = folder / TENSORS_FILE
    try:
        with open_regular(path) as file:
            data = file.read()
        tensors, texts = unpack_tensors(data)
    except (OSError, ValueError) as err:
        if (folder / RECORD_FILE).exists() or not path.exists():
            return None
        raise _damaged(path, repr(err)) from err
    if RECORD_FILE not in texts:
        return None
    digest = hashlib.sha256(values_of(data)).hexdigest()
    return _OneFile(text=texts[RECORD_FILE], tensors=tensors, digest=digest)


PENDING_FILE = f"{TENSORS_FILE}.new"
"""Where 0.1.0 had the tensors of a record until the record was there."""


def _tensors_of_old(folder: Path, digest: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a record that 0.1.0 wrote, also if it died before they were in place."""
    for path in (folder / TENSORS_FILE, folder / PENDING_FILE):
        try:
            with open_regular(path) as file:
                data = file.read()
            if hashlib.sha256(data).hexdigest() == digest:
                return unpack_tensors(data)[0]
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as err:
            raise _damaged(path, repr(err)) from err
    msg = (
        f"Record {str(folder)!r} has no tensors of its own: expected a file {TENSORS_FILE!r} with "
        f"SHA-256 {digest}. Restore it, or save the record again."
    )
    raise RecordError(msg)


def _damaged(path: Path, detail: str) -> RecordError:
    msg = f"Record {str(path)!r} is damaged: expected what save_record writes, got {detail}."
    return RecordError(msg)


def _check_names(recipe: ModelRecipe, plans: Mapping[str, PlanDocument]) -> None:
    """Refuse plans of other adapters than those of the recipe."""
    expected = [*([RULES] if recipe.rules else []), *recipe.adapters]
    if sorted(plans) != sorted(expected):
        msg = f"expected plans of {listed(expected)}, got those of {listed(plans)}"
        raise ValueError(msg)


def _migrated(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    if data["format"] != FORMAT or type(data["version"]) is not int:
        msg = f"format {data['format']!r}"
        raise ValueError(msg)
    if data["version"] > VERSION:
        msg = (
            f"Record {str(path)!r} is of version {data['version']}: expected at most {VERSION}. "
            "Install a later surgery-core."
        )
        raise RecordError(msg)
    while data["version"] < VERSION:
        data = MIGRATIONS[data["version"]](data)
    return data


def _values(planned: ModelPlan) -> dict[str, str]:
    """Return digests of some values of the modules that are worked on, as they were before."""
    plans = [adapter.plan for adapter in planned.adapters.values()]
    plans += [planned.rules[1]] if planned.rules is not None else []
    sites = {claim.site.fqn: claim.site.module for plan in plans for claim in plan.claims}
    found = {}
    for fqn, module in sorted(sites.items()):
        tensors = list(module.parameters())
        # Tensors of other classes, such as quantised ones, cannot be looked into everywhere.
        if all(
            type(t) in (nn.Parameter, torch.Tensor) and not t.is_meta and not is_partitioned(t)
            for t in tensors
        ):
            found[fqn] = _digest(tensors)
    return found


def _digest(tensors: Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().flatten()
        sampled = flat[:: max(1, flat.numel() // NUM_VALUES)][:NUM_VALUES]
        digest.update(sampled.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_values(record: Record, actual: Mapping[str, str], policy: BaseCheck) -> None:
    other = sorted(
        fqn for fqn, digest in record.values.items() if actual.get(fqn, digest) != digest
    )
    if policy == "ignore" or not other:
        return
    msg = (
        f"Record {str(record.folder)!r} was made of a model with other values: expected those "
        f"recorded, got others at {listed(other)}. Load the model it was made of, or pass "
        "base_check='ignore'."
    )
    if policy == "error":
        raise StateError(msg, mismatched=other)
    warnings.warn(msg, SurgeryWarning, stacklevel=4)


def _first_difference(record: Record, actual: list[str]) -> str:
    expected = list(record.base)
    number = next(
        (i for i, (old, new) in enumerate(zip(expected, actual, strict=False)) if old != new),
        min(len(expected), len(actual)),
    )
    old = expected[number] if number < len(expected) else "nothing more"
    new = actual[number] if number < len(actual) else "nothing more"
    # Tensors are indented below the line of their module.
    is_tensor = old.startswith(" ") or new.startswith(" ")
    before = expected[:number] if is_tensor else [old if number < len(expected) else new]
    fqn = next((line for line in reversed(before) if not line.startswith(" ")), ":")
    return (
        f"Record {str(record.folder)!r} is of another model: at {fqn.partition(':')[0]!r} expected "
        f"{old.strip()!r}, got {new.strip()!r}. Load the model it was made of, or rematch."
    )


def _summary(document: PlanDocument) -> str:
    return f"{len(document.edits)} modules and {document.num_parameters:,} parameters"


def _shapes(edit: Edit) -> list[tuple[str, tuple[int, ...]]]:
    return [(spec.name, spec.shape) for spec in edit.added]
