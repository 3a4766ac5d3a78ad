"""Is an applied model as good as any: copied, traced, compiled, without values, from a record."""

import copy
import pickle
import unittest
from collections.abc import Mapping
from dataclasses import asdict
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.fx import symbolic_trace

from surgery_core.contract_base import Backend, ContractBase
from surgery_core.contract_compiled import (
    CountingBackend,
    differing,
    disturb_,
    nothing_compiled,
    results_of,
)
from surgery_core.errors import listed
from surgery_core.recipe import ModelRecipe, RuleRecipe
from surgery_core.snapshots import TensorValue, assert_unchanged, snapshot
from surgery_core.surgery import Surgery
from surgery_core.tensors import owned_tensors


class FormsContract(ContractBase):
    """The part of the contract suite about what else is done with a model that was changed."""

    def test_copies_of_the_applied_model_compute_the_same(self) -> None:
        """`copy.deepcopy` and `pickle` of the applied model give models with equal outputs."""
        surgery = self._plan(self._model()).apply()
        expected = self._outputs(surgery.model)
        pickled = pickle.loads(pickle.dumps(surgery.model))  # noqa: S301 (made in this very line)

        assert self._outputs(copy.deepcopy(surgery.model)) == expected, "deepcopy differs."
        assert self._outputs(pickled) == expected, "pickle differs."

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

    def test_compiled_it_computes_the_same(self) -> None:
        """Compiled, outputs, gradients and what is written are the same, bit for bit."""
        self._check_compiled(CountingBackend(), is_exact=True)

    def test_compiled_with_its_gradients_it_computes_the_same(self) -> None:
        """Compiled together with the backward pass, the same are close."""
        self._check_compiled("aot_eager", is_exact=False)

    def test_what_was_compiled_before_follows_apply_and_revert(self) -> None:
        """A model compiled before computes what it is to while applied, and the base's after it.

        Not while the root is replaced: then what was compiled is not the model any more.
        """
        with nothing_compiled():
            model, backend = self._model(), CountingBackend()
            compiled = self._compiled(model, backend)
            base = self._results(model)
            first = self._compiled_results(model, compiled, "Before apply")
            assert backend.graphs, "run() calls nothing of the model that make_compiled() gave."
            steps = [("Before apply", base, first)]
            surgery = self._disturbed(model)
            if surgery.model is model:
                expected = self._results(model)
                actual = self._compiled_results(model, compiled, "After apply")
                steps.append(("After apply", expected, actual))
            surgery.revert()
            actual = self._compiled_results(model, compiled, "After revert")
            steps.append(("After revert", base, actual))
            again = self._compiled(model, CountingBackend())
            actual = self._compiled_results(model, again, "After revert")
            steps.append(("Compiled again after revert", base, actual))

        for when, expected, actual in steps:
            wrong = differing(expected, actual)
            assert not wrong, f"{when}, compiled code gives others: {listed(wrong)}."

    def test_targets_compiled_in_place_are_replaced(self) -> None:
        """Where `compile()` of a target was called, the replacement runs, not compiled code of it."""
        with nothing_compiled():
            surgery = self._disturbed(self._model())
            expected = self._outputs(surgery.model)
            model = self._model()
            for claim in self._plan(model).claims:
                claim.site.module.compile(backend=CountingBackend())
            before, base = snapshot(model), self._outputs(model)
            surgery = self._disturbed(model)
            actual = self._outputs(surgery.model)
            surgery.revert()

            assert expected == actual, "Compiled code of a target runs in place of its replacement."
            assert_unchanged(before, model, subject="Apply and revert of what was compiled")
            assert self._outputs(model) == base, "The output after revert is not what it was."

    def _check_compiled(self, backend: Backend, *, is_exact: bool) -> None:
        with nothing_compiled():
            surgery = self._disturbed(self._model())
            expected = self._results(surgery.model)
            compiled = self._compiled(surgery.model, backend)
            actual = self._compiled_results(surgery.model, compiled, "After apply")

        wrong = differing(expected, actual, is_exact=is_exact)
        assert not wrong, f"Compiled, the applied model gives others: {listed(wrong)}."

    def _disturbed(self, model: nn.Module) -> Surgery:
        """Apply, and give what was added values that have an effect."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            surgery = self._plan(model).apply()
        disturb_(surgery)
        return surgery

    def _compiled(self, model: nn.Module, backend: Backend) -> nn.Module:
        compiled = self.make_compiled(model, backend)
        if compiled is None:
            msg = "make_compiled() gives no model"
            raise unittest.SkipTest(msg)
        return compiled

    def _results(self, model: nn.Module) -> Mapping[str, TensorValue | None]:
        with torch.compiler.set_stance("force_eager"):
            return results_of(model, lambda: self._run(model))

    def _compiled_results(
        self, model: nn.Module, compiled: nn.Module, when: str
    ) -> Mapping[str, TensorValue | None]:
        try:
            return results_of(model, lambda: self._run(compiled))
        except Exception as err:
            msg = (
                f"{when}, the model does not run compiled: {' '.join(str(err).split()):.300}. Where "
                "it need not be one graph, set `fullgraph = False`."
            )
            raise AssertionError(msg) from err
