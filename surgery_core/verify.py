"""Did it hold: what a recipe promised of a model, checked on the model as it is."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery_core.conditions import require_kind
from surgery_core.editing import EditedModel
from surgery_core.errors import OptionsError, listed
from surgery_core.model_document import RULES, Choice, names_in
from surgery_core.shown import format_table
from surgery_core.snapshots import snapshot
from surgery_core.surgery import Plan

Tier = Literal["structure", "identity", "revert", "gradients", "compile", "export"]
Status = Literal["ok", "failed", "skipped"]
Inputs = Mapping[str, Any] | Sequence[Any]
"""Arguments of a call of the model, by name or in order."""

DEFAULT_TIERS: tuple[Tier, ...] = ("structure", "identity", "revert", "gradients")
ALL_TIERS: tuple[Tier, ...] = (*DEFAULT_TIERS, "compile", "export")
COMPILED_TOLERANCE = 1e-3
"""Relative to the largest value: compiled code rounds otherwise, by less than this in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The outcome of one check.

    Args:
        tier: What kind of check.
        subject: An adapter, `rules`, or `model`.
        status: How it ended.
        detail: What was found.
    """

    tier: Tier
    subject: str
    status: Status
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The outcomes of all checks, in order."""

    checks: tuple[Check, ...]

    @property
    def is_ok(self) -> bool:
        """Whether no check failed; skipped ones do not count."""
        return all(check.status != "failed" for check in self.checks)

    def to_mapping(self) -> dict[str, Any]:
        """Return plain mappings, lists and scalars."""
        return {"is_ok": self.is_ok, "checks": [asdict(check) for check in self.checks]}

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return tier, subject, status and detail of each check, for a table."""
        return [(check.tier, check.subject, check.status, check.detail) for check in self.checks]

    def render(self) -> str:
        """Write as a table for people."""
        return format_table(("check", "of", "outcome", "detail"), self.rows())


def verify(
    edited: EditedModel,
    inputs: Inputs | None = None,
    *,
    tiers: Sequence[Tier] = DEFAULT_TIERS,
) -> Verification:
    """Check a model with a recipe applied; the model is afterwards as it was before.

    - `structure`: modules are where the plan said, and the state dict has the keys it promised.
    - `identity`: an adapter that has its first values, and rules, leave every output as it is
      without them, bit for bit.
    - `revert`: taken back, the model has the same objects, flags and hooks as before, and no
      attribute more; and computes the same, bit for bit.
    - `gradients`: what is promised to be trained gets finite gradients, and nothing else gets any.
    - `compile`: `torch.compile(fullgraph=True)` computes the same, up to rounding.
    - `export`: so does `torch.export`.

    Args:
        edited: The model.
        inputs: Arguments of a call; without them, checks that run the model are skipped.
        tiers: Which checks, in this order.

    Raises:
        OptionsError: There is no such tier.
        SurgeryError: The model cannot be switched or taken back.
    """
    fix = "Give what ModelPlan.apply or Session.load returned."
    require_kind(edited, EditedModel, what="Edited model", fix=fix)
    require_kind(tiers, (list, tuple), what="Tiers", fix="Give a list of names.")
    unknown = sorted(set(tiers) - set(ALL_TIERS))
    if unknown:
        msg = f"Tiers {listed(unknown)} are unknown: expected some of {listed(ALL_TIERS, most=6)}."
        raise OptionsError(msg)
    found: list[Check] = []
    active, was_enabled = edited.active, edited.swap_state.is_enabled
    names = edited.plan.document.documents
    kept = {name: _copies(edited.tensors(name)) for name in names}
    rules = [edited.plan.rules[1]] if edited.plan.rules is not None else []
    try:
        with _probing(rules):
            for tier in tiers:
                found += _TIERS[tier](edited, inputs)
    finally:
        # Operations may count calls, or keep statistics.
        for name, tensors in kept.items():
            _put_back_(edited.tensors(name), tensors)
        if active is not None:
            edited.set_active(active)
            if not was_enabled:
                edited.swap_state.disable()
    return Verification(checks=tuple(found))


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


def _put_back_(tensors: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for key, tensor in tensors.items():
            # Not written to without need: what others keep of a tensor counts writes.
            if not tensor.is_meta and not torch.equal(tensor, kept[key]):
                tensor.copy_(kept[key])


def _structure(edited: EditedModel, inputs: Inputs | None) -> Iterator[Check]:
    del inputs
    if edited.surgery is not None:
        wrong = [
            slot.fqn
            for item in edited.surgery.replacements
            for slot in item.site.slots
            if slot.get() is not item.module
        ]
        num = len(edited.surgery.replacements)
        yield _check("structure", RULES, wrong, f"{num} modules in their places")
    with edited.disabled():
        without = set(edited.model.state_dict())
    for name, adapter in edited.plan.adapters.items():
        edited.set_active(name)
        edited.swap_state.enable()
        edits = adapter.plan.document.edits
        modules = edited.swap_state.variant(name)
        wrong = [
            slot.fqn
            for fqn, module in modules.items()
            for slot in edited.swap_state.sites[fqn].slots
            if slot.get() is not module
        ]
        wrong += sorted({edit.fqn for edit in edits} ^ modules.keys())
        promised = {
            f"{fqn}.{s.name}" for e in edits for fqn in (e.fqn, *e.aliases) for s in e.added
        }
        removed = {
            f"{fqn}.{key}" for e in edits for fqn in (e.fqn, *e.aliases) for key in e.removed
        }
        wrong += sorted((without | promised) - removed ^ set(edited.model.state_dict()))
        num = sum(edit.num_parameters for edit in edits)
        yield _check("structure", name, wrong, f"{len(edits)} modules, {num:,} values added")


def _identity(edited: EditedModel, inputs: Inputs | None) -> Iterator[Check]:
    if inputs is None:
        yield _skipped("identity", "model", "no inputs to run it with")
        return
    with _quiet(edited.plan.model), edited.paused() as base:
        expected = _outputs(base, inputs)
    if edited.surgery is not None:
        with edited.disabled():
            found = _compared("identity", RULES, expected, edited.model, inputs)
            yield _as_loaded(found, {RULES} & edited.loaded)
    with edited.disabled():
        expected = _outputs(edited.model, inputs)
    for choice in _choices(edited):
        names = {*names_in(choice)}
        with _activated(edited, choice):
            found = _compared("identity", _named(choice), expected, edited.model, inputs)
            yield _as_loaded(found, names & edited.loaded)


def _as_loaded(found: Check, loaded: Collection[str]) -> Check:
    """Do not expect of values that were saved what is promised of first ones."""
    if not loaded or found.status == "ok":
        return found
    return _skipped(found.tier, found.subject, f"values were loaded: {found.detail}")


def _revert(edited: EditedModel, inputs: Inputs | None) -> Iterator[Check]:
    with edited.paused() as base:
        later = snapshot(base, values=False)
        first = None if inputs is None else _outputs(base, inputs)
    differences = edited.before.differences(later) if edited.before is not None else []
    yield _check(
        *("revert", "model", differences),
        f"{len(later.modules)} modules and {len(later.tensors)} tensors are the same objects",
    )
    if inputs is not None and first is not None:
        with edited.paused() as base:
            yield _compared("revert", "model", first, base, inputs)


def _gradients(edited: EditedModel, inputs: Inputs | None) -> Iterator[Check]:
    if inputs is None:
        yield _skipped("gradients", "model", "no inputs to run it with")
        return
    for choice in _choices_or_none(edited):
        names = [*([RULES] if edited.surgery is not None else [])]
        names += names_in(choice)
        with _activated(edited, choice):
            promised = {id(parameter) for parameter in edited.added_parameters(names)}
            found = dict(edited.model.named_parameters())
            gradients = _differentiated(edited.model, found, inputs)
        wrong = []
        for name, parameter in found.items():
            grad, is_promised = gradients[name], id(parameter) in promised
            if is_promised and grad is None:
                wrong.append(f"{name} gets none")
            elif grad is not None and not bool(torch.isfinite(grad).all()):
                wrong.append(f"{name} is not finite")
            elif grad is not None and edited.plan.recipe.freeze and not is_promised:
                wrong.append(f"{name} is not to be trained")
        absent = promised - {id(parameter) for parameter in found.values()}
        wrong += [f"{len(absent)} parameters are not in the model"] if absent else []
        what = f"{len(promised)} parameters get finite gradients"
        yield _check("gradients", _named(choice) if choice is not None else RULES, wrong, what)


def _differentiated(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], inputs: Inputs
) -> dict[str, Tensor | None]:
    """Return the gradients of a loss by name; those that were there are there again afterwards."""
    kept = {name: parameter.grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.grad = None
        with _quiet(model), torch.enable_grad():
            loss = sum(out.float().square().mean() for out in _floats(_call(model, inputs)))
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        return {name: parameter.grad for name, parameter in parameters.items()}
    finally:
        for name, parameter in parameters.items():
            parameter.grad = kept[name]


def _compile(edited: EditedModel, inputs: Inputs | None) -> Iterator[Check]:
    def compiled(model: nn.Module) -> Callable[..., Any]:
        torch.compiler.reset()
        return torch.compile(model, fullgraph=True)

    yield from _transformed("compile", edited, inputs, compiled)


def _export(edited: EditedModel, inputs: Inputs | None) -> Iterator[Check]:
    def exported(model: nn.Module) -> Callable[..., Any]:
        args, kwargs = _arguments(inputs or ())
        program = torch.export.export(model, args, kwargs, strict=False)
        run: Callable[..., Any] = program.module()
        return run

    yield from _transformed("export", edited, inputs, exported)


def _transformed(
    tier: Tier,
    edited: EditedModel,
    inputs: Inputs | None,
    transform: Callable[[nn.Module], Callable[..., Any]],
) -> Iterator[Check]:
    if inputs is None:
        yield _skipped(tier, "model", "no inputs to run it with")
        return
    for choice in _choices_or_none(edited):
        subject = RULES if choice is None else _named(choice)
        with _activated(edited, choice), _quiet(edited.model), torch.no_grad():
            expected = list(_floats(_call(edited.model, inputs)))
            try:
                args, kwargs = _arguments(inputs)
                actual = list(_floats(transform(edited.model)(*args, **kwargs)))
            except Exception as err:  # noqa: BLE001 (whatever a compiler raises is the finding)
                yield _check(
                    tier, subject, [f"{type(err).__name__}: {' '.join(str(err).split())[:200]}"], ""
                )
                continue
        errors = [
            float((old - new).abs().max() / old.abs().max().clamp_min(1e-12))
            for old, new in zip(expected, actual, strict=False)
        ]
        worst = max(errors, default=0.0)
        wrong = [f"differs by {worst:.1e}"] if not worst <= COMPILED_TOLERANCE else []
        wrong += ["other outputs"] if len(expected) != len(actual) else []
        yield _check(tier, subject, wrong, f"differs by at most {worst:.1e}")


_TIERS: Mapping[str, Callable[[EditedModel, Inputs | None], Iterator[Check]]] = {
    "structure": _structure,
    "identity": _identity,
    "revert": _revert,
    "gradients": _gradients,
    "compile": _compile,
    "export": _export,
}


def _choices(edited: EditedModel) -> list[Choice]:
    """Return every adapter, and what is active if that is several."""
    active = edited.plan.recipe.selected
    return [*edited.plan.adapters, *([active] if isinstance(active, Mapping) else [])]


def _choices_or_none(edited: EditedModel) -> list[Choice | None]:
    """Return the same; None, which stands for the rules alone, where there are no adapters."""
    return [*_choices(edited)] or [None]


def _named(choice: Choice) -> str:
    if isinstance(choice, str):
        return choice
    return " + ".join(f"{weight:g} {name}" for name, weight in choice.items())


@contextmanager
def _activated(edited: EditedModel, choice: Choice | None) -> Iterator[None]:
    if choice is not None:
        edited.set_active(choice)
        edited.swap_state.enable()
    with _probing(edited.plan.adapters[name].plan for name in names_in(choice)):
        yield


@contextmanager
def _probing(plans: Iterable[Plan]) -> Iterator[None]:
    """Give the operations of plans what they need beside a model's inputs."""
    with ExitStack() as stack:
        for plan in plans:
            for claim in {claim.rule: claim for claim in plan.claims}.values():
                stack.enter_context(claim.operation.probing(claim.options))
        yield


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while, and keep the random state."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=[]):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})


def _call(model: nn.Module, inputs: Inputs) -> Any:  # noqa: ANN401 (whatever a model returns)
    args, kwargs = _arguments(inputs)
    return model(*args, **kwargs)


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with _quiet(model), torch.no_grad():
        return [tensor.clone() for tensor in _tensors(_call(model, inputs))]


def _compared(
    tier: Tier, subject: str, expected: list[Tensor], model: nn.Module, inputs: Inputs
) -> Check:
    actual = _outputs(model, inputs)
    wrong = [
        f"output {i} differs by {float((old.double() - new.double()).abs().max()):.1e}"
        for i, (old, new) in enumerate(zip(expected, actual, strict=False))
        if not torch.equal(old, new)
    ]
    wrong += ["other outputs"] if len(expected) != len(actual) else []
    num = sum(tensor.numel() for tensor in expected)
    return _check(tier, subject, wrong, f"{num:,} output values are equal bit for bit")


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors in whatever a model returns, except caches, which have no order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _floats(value: object) -> Iterator[Tensor]:
    return (tensor for tensor in _tensors(value) if tensor.is_floating_point())


def _check(tier: Tier, subject: str, wrong: Sequence[str], detail: str) -> Check:
    return Check(
        tier=tier,
        subject=subject,
        status="failed" if wrong else "ok",
        detail=listed(wrong) if wrong else detail,
    )


def _skipped(tier: Tier, subject: str, reason: str) -> Check:
    return Check(tier=tier, subject=subject, status="skipped", detail=reason)
