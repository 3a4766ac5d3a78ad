"""Is an operation well behaved: the contract suite that every plugin author runs, and its tools.

Derive a class whose name starts with `Test` from `OperationContract` in a test file; pytest runs it.
"""

import random
import unittest
import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from surgery_core.contract_forms import FormsContract
from surgery_core.contract_steps import as_dtype, edited_fqns, join, must_raise, register_hooks
from surgery_core.errors import DriftError, OptionsError, listed
from surgery_core.operation import Rule
from surgery_core.plan import PlanDocument, fingerprint
from surgery_core.slots import Slot, SlotKind
from surgery_core.snapshots import (
    Snapshot,
    TensorValue,
    assert_unchanged,
    frozen,
    is_below,
    same_tensor,
    snapshot,
)
from surgery_core.surgery import Surgery
from surgery_core.transaction import OnWrite

__all__ = [
    "InjectedError",
    "OperationContract",
    "Snapshot",
    "TensorValue",
    "assert_unchanged",
    "failing_at",
    "same_tensor",
    "snapshot",
]


class InjectedError(Exception):
    """Raised by `failing_at`; nothing else raises it."""


def failing_at(number: int) -> OnWrite:
    """Return an `on_write` that raises `InjectedError` instead of the write of that number, from 0."""

    def on_write(count: int, target: Slot | nn.Parameter) -> None:
        if count == number:
            where = target.fqn if isinstance(target, Slot) else "a parameter"
            msg = f"Write {number} at {where!r} fails on purpose."
            raise InjectedError(msg)

    return on_write


class OperationContract(FormsContract):
    """What every operation keeps; derive a class named `Test...` and say what to try it on.

    Override `make_model`, `rules` and `run`; and `session`, when the plugin is not installed. The
    suite seeds torch's random numbers before each call of `make_model` and `run`, and runs the model
    in evaluation mode. What it checks:

    - planning changes nothing, and gives equal documents each time;
    - applying changes what the plan names, and the state dict as it says;
    - a failure at any write of `apply` or `revert` leaves everything as it was, and so does a drift;
    - reverting brings back the same objects, hooks, modes and values;
    - modules with several names, tied parameters, models without values and torch.fx graphs;
    - copies, pickles, replayed records and compiled models compute the same.

    Attributes:
        identity_at_init: Whether the model computes the same, bit for bit, right after `apply`.
        fullgraph: Whether `torch.compile` makes one graph of `run`, before and after `apply`.
    """

    def test_planning_changes_nothing(self) -> None:
        """Planning leaves the model, random numbers and everything else as they were."""
        model, session = self._model(), self.session()
        before, structure = snapshot(model), fingerprint(model)
        torch_state, python_state = torch.get_rng_state(), random.getstate()
        registered: list[str] = []

        def note(module: nn.Module, name: str, _: object) -> None:
            registered.append(f"{type(module).__name__}.{name}")

        handle = register_module_parameter_registration_hook(note)
        try:
            session.plan(model, self.rules())
        finally:
            handle.remove()

        assert_unchanged(before, model, subject="Planning")
        assert fingerprint(model) == structure, "Planning changed the fingerprint."
        assert torch.equal(torch_state, torch.get_rng_state()), "Planning drew random numbers."
        assert python_state == random.getstate(), "Planning drew random numbers from `random`."
        assert not registered, f"Planning made parameters: {listed(registered)}."

    def test_planning_twice_gives_equal_documents(self) -> None:
        """A plan depends on the model and the rules alone."""
        model, session = self._model(), self.session()
        first = session.plan(model, self.rules()).document
        second = session.plan(model, self.rules()).document
        elsewhere = self.session().plan(self._model(), self.rules()).document

        assert first == second, "Planning twice gave different documents."
        assert first == elsewhere, "Planning for an equal model gave another document."

    def test_the_document_survives_json(self) -> None:
        """A plan written as JSON reads back equal."""
        document = self._plan(self._model()).document

        assert document.edits, "The rules claim nothing."
        assert PlanDocument.from_json(document.to_json()) == document

    def test_unknown_options_are_refused(self) -> None:
        """An option nobody knows is an error, not silence."""
        rule = self.rules()[0]
        options = {**rule.options, "no_such_option_": 1}
        misspelt = Rule(operation=rule.operation, select=rule.select, options=options)

        with must_raise(OptionsError, "An unknown option"):
            self.session().plan(self._model(), [misspelt])

    def test_apply_changes_only_the_modules_named(self) -> None:
        """What is not at or below an FQN of an edit keeps its identity, mode, hooks and values."""
        model = self._model()
        before = snapshot(model)
        surgery = self._plan(model).apply()
        fqns = edited_fqns(surgery)

        for fqn in fqns:
            new = surgery.model.get_submodule(fqn)
            assert id(new) != dict(before.modules)[fqn], f"Nothing was replaced at {fqn!r}."
        differences = before.outside(fqns).differences(snapshot(surgery.model).outside(fqns))
        # Attributes that hold a target outside the registry hold its replacement now.
        holders = tuple(
            f":{slot.attribute or slot.key} differs"
            for item in surgery.replacements
            for slot in item.site.slots
            if slot.kind in {SlotKind.ATTRIBUTE, SlotKind.ITEM}
        )
        differences = [line for line in differences if not line.endswith(holders)]
        assert not differences, f"Applying changed more than it named: {listed(differences)}."

    def test_apply_has_the_declared_effects(self) -> None:
        """The state dict gains and loses exactly what the plan says, and keeps what it had."""
        model = self._model()
        before = {key: frozen(value) for key, value in model.state_dict().items()}
        surgery = self._plan(model).apply()
        after = surgery.model.state_dict(keep_vars=True)
        expected = dict.fromkeys(before)
        specs, retyped = {}, set()
        for edit in surgery.plan.document.edits:
            for fqn in (edit.fqn, *edit.aliases):
                for name in edit.removed:
                    del expected[join(fqn, name)]
                specs.update({join(fqn, s.name): s for s in (*edit.added, *edit.retyped)})
                retyped |= {join(fqn, spec.name) for spec in edit.retyped}

        assert set(after) == {*expected, *specs}, "Keys of the state dict are not as declared."
        fqns = tuple(edited_fqns(surgery))
        for key in expected:
            # An operation that computes something else may put another tensor under the same key.
            if self.identity_at_init or not is_below(key, fqns):
                kept = as_dtype(before[key], after[key].dtype) if key in retyped else before[key]
                assert frozen(after[key]) == kept, f"The value of {key!r} changed."
        for key, spec in specs.items():
            found = after[key]
            actual = (tuple(found.shape), str(found.dtype), found.requires_grad)
            declared = (spec.shape, f"torch.{spec.dtype}", spec.trainable)
            assert actual == declared, f"{key!r}: declared {declared}, got {actual}."

    def test_output_at_init_is_as_declared(self) -> None:
        """The output is bit-equal right after `apply`, if `identity_at_init`."""
        model = self._model()
        expected = self._outputs(model)
        actual = self._outputs(self._plan(model).apply().model)

        if self.identity_at_init:
            assert expected == actual, "The output at init is not that of the base model."

    def test_revert_restores_the_same_objects(self) -> None:
        """After `revert` the model holds the objects, names, order, values and outputs of before."""
        model = self._model()
        before, expected = snapshot(model), self._outputs(model)
        surgery = self._plan(model).apply()
        self._outputs(surgery.model)

        restored = surgery.revert()

        assert restored is model, "Revert returned another root."
        assert_unchanged(before, model, subject="Apply and revert")
        assert self._outputs(model) == expected, "The output after revert is not what it was."

    def test_a_fault_at_any_write_of_apply_changes_nothing(self) -> None:
        """Whichever write fails, `apply` leaves the model as it was."""
        model = self._model()
        plan, before = self._plan(model), snapshot(model)
        number_of_writes = sum(len(claim.site.slots) for claim in plan.claims)

        for number in range(number_of_writes):
            with must_raise(InjectedError, f"Write {number} of apply"):
                plan.apply(on_write=failing_at(number))
            assert_unchanged(before, model, subject=f"Apply that failed at write {number}")

        plan.apply(on_write=failing_at(number_of_writes)).revert()
        assert_unchanged(before, model, subject="Apply and revert after failures")

    def test_a_fault_at_any_write_of_revert_changes_nothing(self) -> None:
        """Whichever write fails, `revert` leaves the surgery applied, and can be called again."""
        model = self._model()
        before = snapshot(model)
        surgery = self._plan(model).apply()
        applied = snapshot(surgery.model)
        number_of_writes = sum(len(item.site.slots) for item in surgery.replacements)

        for number in range(number_of_writes):
            with must_raise(InjectedError, f"Write {number} of revert"):
                surgery.revert(on_write=failing_at(number))
            assert surgery.is_applied, "A revert that failed calls itself reverted."
            assert_unchanged(applied, surgery.model, subject=f"Revert that failed at {number}")

        surgery.revert(on_write=failing_at(number_of_writes))
        assert_unchanged(before, model, subject="Revert after failures")

    def test_drift_stops_revert(self) -> None:
        """When somebody else replaced a module, `revert` says so and touches nothing."""
        model = self._model()
        before = snapshot(model)
        surgery = self._plan(model).apply()
        for item in surgery.replacements:
            slot = item.site.slots[-1]
            slot.put(nn.Identity())
            drifted = snapshot(surgery.model)
            with must_raise(DriftError, "A module replaced by somebody else"):
                surgery.revert()
            assert_unchanged(drifted, surgery.model, subject="Revert that found drift")
            slot.put(item.module)

        surgery.revert()
        assert_unchanged(before, model, subject="Revert after drift")

    def test_hooks_survive_apply_and_revert(self) -> None:
        """Hooks of every kind on the targets fire as often as before, while applied and after."""
        model = self._model()
        plan = self._plan(model)
        calls: Counter[str] = Counter()
        for claim in plan.claims:
            register_hooks(claim.site.module, calls)
        expected = self._calls(model, calls)

        surgery = plan.apply()
        applied = self._calls(surgery.model, calls)
        reverted = self._calls(surgery.revert(), calls)

        fired = {kind: applied[kind] for kind in expected}
        assert fired == expected, f"Hooks while applied: expected {expected}, got {fired}."
        assert reverted == expected, f"Hooks after revert: expected {expected}, got {reverted}."

    def test_hook_handles_work_while_applied(self) -> None:
        """A handle from before `apply` removes its hook while applied, and for good."""
        self._check_handles(lambda surgery: surgery.model)

    def test_hook_handles_work_after_revert(self) -> None:
        """A handle from before `apply` removes its hook after `revert`."""
        self._check_handles(lambda surgery: surgery.revert())

    def test_a_hook_registered_while_applied_survives_revert(self) -> None:
        """What a user hooks on to a replacement is on the original after `revert`."""
        model = self._model()
        calls: Counter[str] = Counter()
        surgery = self._plan(model).apply()
        for fqn in edited_fqns(surgery):
            register_hooks(surgery.model.get_submodule(fqn), calls)
        while_applied = self._calls(surgery.model, calls)

        after = self._calls(surgery.revert(), calls)

        assert while_applied["forward"], "A forward hook on the replacement never fired."
        for kind in ("forward", "forward_pre", "forward_with_kwargs", "state_dict"):
            assert after[kind] == while_applied[kind], f"Hook {kind!r} was lost by revert."

    def test_a_mode_set_while_applied_is_kept_by_revert(self) -> None:
        """`train()` and `eval()` while applied leave the modes they would leave without surgery."""
        for mode in (True, False):
            model = self._model()
            model.train(mode)
            expected = snapshot(model).modes
            model.train(not mode)
            surgery = self._plan(model).apply()

            surgery.model.train(mode)
            for item in surgery.replacements:
                assert item.module.training is mode, f"{item.site.fqn!r} ignores train({mode})."

            actual = snapshot(surgery.revert()).modes
            assert actual == expected, f"Modes after revert are not those of train({mode})."

    def test_aliases_are_replaced_together(self) -> None:
        """A module with two FQNs gets one replacement, at both."""
        model = self.make_aliased_model()
        if model is None:
            msg = "make_aliased_model() gives no model"
            raise unittest.SkipTest(msg)
        before = snapshot(model)
        surgery = self._plan(model).apply()

        for edit in surgery.plan.document.edits:
            found = {id(surgery.model.get_submodule(fqn)) for fqn in (edit.fqn, *edit.aliases)}
            assert edit.aliases, f"{edit.fqn!r} has no alias: see make_aliased_model()."
            assert len(found) == 1, f"Aliases of {edit.fqn!r} hold different modules."

        surgery.revert()
        assert_unchanged(before, model, subject="Apply and revert of aliased modules")

    def test_ties_are_reported_and_there_again_after_revert(self) -> None:
        """A parameter that is elsewhere too stays the same object there, or the report says so."""
        model = self._model()
        targets = [claim.site for claim in self._plan(model).claims if claim.site.fqn]
        tied = next((p for site in targets for p in site.module.parameters()), None)
        if tied is None:
            msg = "no target below the root has a parameter"
            raise unittest.SkipTest(msg)
        model.register_parameter("tied_elsewhere_", tied)
        before = snapshot(model)
        surgery = self._plan(model).apply()
        inside = {id(p) for item in surgery.replacements for p in item.module.parameters()}
        reported = {fqn for i in surgery.replacements for fqn in i.carry_over.ties_broken}

        is_kept = id(tied) in inside
        assert is_kept or "tied_elsewhere_" in reported, "A tie was broken and not reported."
        surgery.revert()
        assert_unchanged(before, model, subject="Apply and revert of a tied parameter")

    def test_a_block_with_applied_restores_after_an_error(self) -> None:
        """`with session.applied(...)` reverts when the block raises."""
        model = self._model()
        before = snapshot(model)

        with (
            must_raise(InjectedError, "The block"),
            self.session().applied(model, self.rules()) as surgery,
        ):
            self._outputs(surgery.model)
            failing_at(0)(0, nn.Parameter(torch.zeros(1)))

        assert_unchanged(before, model, subject="A block that failed")

    def _calls(self, model: nn.Module, calls: Counter[str]) -> Counter[str]:
        """Use a model in every way that makes hooks fire, and return which did."""
        calls.clear()
        with warnings.catch_warnings():
            # Torch warns of backward hooks on modules whose inputs need no gradients.
            warnings.simplefilter("ignore")
            trained = [tensor.sum() for tensor in self._run(model) if tensor.requires_grad]
            if trained:
                torch.stack(trained).sum().backward()  # type: ignore[no-untyped-call]
            model.load_state_dict(model.state_dict())
        return Counter(calls)

    def _check_handles(self, step: Callable[[Surgery], nn.Module]) -> None:
        model = self._model()
        plan = self._plan(model)
        calls: Counter[str] = Counter()
        handles = [h for claim in plan.claims for h in register_hooks(claim.site.module, calls)]
        surgery = plan.apply()
        used = step(surgery)

        for handle in handles:
            handle.remove()

        left = self._calls(used, calls)
        assert not left, f"Hooks fire although their handles removed them: {dict(left)}."
        if surgery.is_applied:
            left = self._calls(surgery.revert(), calls)
            assert not left, f"Hooks removed while applied are back after revert: {dict(left)}."
