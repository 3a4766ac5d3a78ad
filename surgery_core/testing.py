"""Is an operation well behaved: the contract suite that every plugin author runs, and its tools.

Derive a class whose name starts with `Test` from `OperationContract` in a test file; pytest runs it.
"""

import copy
import pickle
import random
import unittest
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.nn.modules.module import register_module_parameter_registration_hook

from surgery_core.contract_steps import edited_fqns, join, must_raise, register_hooks
from surgery_core.errors import DriftError, OptionsError, listed
from surgery_core.operation import Rule
from surgery_core.plan import PlanDocument, fingerprint
from surgery_core.recipe import ModelRecipe, RuleRecipe
from surgery_core.session import Session
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
from surgery_core.surgery import Plan, Surgery
from surgery_core.tensors import owned_tensors
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


class OperationContract(ABC):
    """What every operation keeps; derive a class named `Test...` and say what to try it on.

    Override `make_model`, `rules` and `run`; and `session`, when the plugin is not installed. The
    suite seeds torch's random numbers before each call of `make_model` and `run`, and runs the model
    in evaluation mode.

    Attributes:
        identity_at_init: Whether the model computes the same, bit for bit, right after `apply`.
    """

    identity_at_init: bool = True

    @abstractmethod
    def make_model(self) -> nn.Module:
        """Return a new model, small enough to run many times."""

    @abstractmethod
    def rules(self) -> Sequence[Rule]:
        """Return rules that use the operation; claim more than one module if it can."""

    @abstractmethod
    def run(self, model: nn.Module) -> Tensor | tuple[Tensor, ...]:
        """Run the model on an input that is always the same, with gradients if it can train."""

    def session(self) -> Session:
        """Return a session that knows the operation."""
        return Session()

    def make_aliased_model(self) -> nn.Module | None:
        """Return a model in which every module the rules claim has two FQNs; None if there is none."""
        return None

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
        specs = {}
        for edit in surgery.plan.document.edits:
            for fqn in (edit.fqn, *edit.aliases):
                for name in edit.removed:
                    del expected[join(fqn, name)]
                specs.update({join(fqn, spec.name): spec for spec in edit.added})

        assert set(after) == {*expected, *specs}, "Keys of the state dict are not as declared."
        fqns = tuple(edited_fqns(surgery))
        for key in expected:
            # An operation that computes something else may put another tensor under the same key.
            if self.identity_at_init or not is_below(key, fqns):
                assert frozen(after[key]) == before[key], f"The value of {key!r} changed."
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

    def test_copies_of_the_applied_model_compute_the_same(self) -> None:
        """`copy.deepcopy` and `pickle` of the applied model give models with equal outputs."""
        surgery = self._plan(self._model()).apply()
        expected = self._outputs(surgery.model)
        pickled = pickle.loads(pickle.dumps(surgery.model))  # noqa: S301 (made in this very line)

        assert self._outputs(copy.deepcopy(surgery.model)) == expected, "deepcopy differs."
        assert self._outputs(pickled) == expected, "pickle differs."

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

    def test_a_model_without_values_is_changed_without_any(self) -> None:
        """On the meta device, what is added is there too; reverting gives the same model back."""
        model = self._model().to("meta")
        before = snapshot(model)
        surgery = self._plan(model).apply()
        added = [
            key
            for item in surgery.replacements
            # A module without tensors does not say where it is.
            if item.site.module.state_dict()
            for key, tensor in owned_tensors(item.site.module, item.module).items()
            if not tensor.is_meta
        ]

        assert not added, f"Tensors have values although the model has none: {listed(added)}."
        surgery.revert()
        assert_unchanged(before, model, subject="Apply and revert on the meta device")

    def test_a_traced_model_is_changed_like_any_other(self) -> None:
        """On a torch.fx graph that calls the targets, outputs are those of the model itself."""
        model = self._model()
        try:
            traced = symbolic_trace(model)
        except Exception as err:
            msg = f"torch.fx cannot trace the model: {err}"
            raise unittest.SkipTest(msg) from err
        # Tracing leaves out what the graph does not use, and `run` may look at it.
        vars(traced).update({k: v for k, v in vars(model).items() if k not in vars(traced)})
        called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
        if not {claim.site.fqn for claim in self._plan(model).claims} <= called:
            msg = "the graph does not call the targets, but what is inside them"
            raise unittest.SkipTest(msg)
        before, graph = snapshot(traced), traced.graph
        with torch.random.fork_rng():
            torch.manual_seed(0)
            expected = self._outputs(self._plan(self._model()).apply().model)
            torch.manual_seed(0)
            surgery = self._plan(traced).apply()

        assert self._outputs(surgery.model) == expected, "The traced model computes otherwise."
        surgery.revert()
        assert traced.graph is graph, "Another graph is left behind."
        assert_unchanged(before, traced, subject="Apply and revert on a graph")

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

    def test_a_record_of_it_computes_the_same(self) -> None:
        """The rules in a recipe, saved, and done again on an equal model, give equal outputs."""
        selectors = [s for rule in self.rules() for s in (rule.select, rule.exclude)]
        if not all(selector is None or isinstance(selector, str) for selector in selectors):
            msg = "rules() has selectors that are no text, which recipes cannot hold"
            raise unittest.SkipTest(msg)
        rules = tuple(RuleRecipe(**asdict(rule)) for rule in self.rules())
        session, model = self.session(), self._model()
        before = snapshot(model)
        edited = session.plan_recipe(model, ModelRecipe(rules=rules)).apply()
        expected = self._outputs(edited.model)
        with TemporaryDirectory() as folder:
            session.save(edited, folder)
            edited.revert()
            assert_unchanged(before, model, subject="A recipe that was saved and reverted")
            again = session.load(self._model(), folder, base_check="error")

        assert self._outputs(again.model) == expected, "A replayed record computes something else."

    def _model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            # In training, a mere run would change running statistics.
            return self.make_model().eval()

    def _plan(self, model: nn.Module) -> Plan:
        return self.session().plan(model, self.rules())

    def _run(self, model: nn.Module) -> tuple[Tensor, ...]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            output = self.run(model)
        return output if isinstance(output, tuple) else (output,)

    def _outputs(self, model: nn.Module) -> list[TensorValue]:
        return [TensorValue(tensor.detach().clone()) for tensor in self._run(model)]

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
