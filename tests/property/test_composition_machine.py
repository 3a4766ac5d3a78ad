"""A random walk over everything that several adapters can do at once, against a plain model."""

import copy
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from support.adapters_change import AdaptersChange, bare, codes
from support.adapters_walk import FRESH, IDS, LAYERS, NOBODY, ROWS, drawn
from support.plain_adapters import BASE, names_of, weights_of
from surgery_adaption_prompt import AdaptionPromptConfig, Composition

from surgery_core import OptionsError, SurgeryError, VariantError


class CompositionMachine(AdaptersChange):
    """Adapters are active alone and together, for everybody, for threads, and for rows."""

    # -- what is active -----------------------------------------------------------------------------

    def set_active(self, choice):
        def set_it():
            self.model.set_adapter(choice)

        if self.asks(weights_of(choice), set_it):
            if not isinstance(choice, str):
                self.plain.follow(weights_of(choice))
            what = "set one" if isinstance(choice, str) else "set several"
            self.plain.try_to_select(choice)
            if self.attempt(set_it, what):
                self.plain.select(choice)

    @rule(code=codes)
    def set_one(self, code):
        self.set_active(self.drawn_name(drawn(code)))

    @rule(code=codes)
    def set_several(self, code):
        self.set_active(self.drawn_composition(drawn(code)))

    @rule()
    def enable(self):
        self.plain.try_to_enable()
        if self.attempt(self.model.enable_adapter_layers, "enable"):
            self.plain.enable()

    @rule()
    def disable(self):
        if self.attempt(self.model.disable_adapter_layers, "disable"):
            self.plain.is_enabled = False

    @rule()
    def look_at_the_base_for_a_while(self):
        with self.model.disable_adapter(), self.model.disable_adapter() as model:
            for place in range(len(self.runners)):
                assert torch.equal(FRESH.base[self.plain.dtype], self.logits(place))
            status = model.status()
            assert not status.active
            assert names_of([self.plain.selected]) == sorted(status.selected)
            assert [*self.plain.known] == [adapter.name for adapter in status.adapters]

    @rule(code=codes)
    def merge(self, code):
        """What is active, or something that can be merged; not while a thread has its own."""
        draw = drawn(code)
        if draw.random() < 0.6:
            self.leave_all()
        known, short = self.plain.known, self.short_names()
        if short and draw.random() < 0.8:
            chosen = draw.sample(short, draw.randint(1, len(short)))
            self.enable()
            self.set_active(Composition({name: draw.uniform(-2, 2) for name in chosen}))
        lengths = {known[n].tensors.config.adapter_len for n in weights_of(self.plain.selected)}
        can_merge = self.plain.is_enabled and self.plain.kind == "plain" and lengths == {1}
        if not can_merge or self.plain.is_shared:
            self.refused(OptionsError, self.model.merge_adapter)
        elif self.attempt(self.model.merge_adapter, "merge"):
            self.plain.merge()

    @precondition(lambda self: self.plain.kind == "merged")
    @rule()
    def unmerge(self):
        choice = self.plain.selected
        if self.asks(weights_of(choice), self.model.unmerge_adapter):
            if not isinstance(choice, str):
                self.plain.follow(weights_of(choice))
            self.plain.try_to_select(choice)
            if self.attempt(self.model.unmerge_adapter, "unmerge"):
                self.plain.select(choice)

    # -- what threads use, and rows -----------------------------------------------------------------

    @rule(code=codes)
    def enter(self, code):
        """One choice, or one for each row, in this thread or in one of the others."""
        draw = drawn(code)
        place = self.drawn_place(draw)
        if len(self.plain.stacks[place]) > 1:
            return
        choices = tuple(self.drawn_choice(draw) for _ in range(draw.choice([1, 1, ROWS])))
        context = self.model.activated(bare(choices))
        note(f"place {place} enters {choices}")

        def enter():
            self.runners[place](context.__enter__)

        if self.asks(names_of(choices), enter):
            if self.plain.kind == "merged":
                self.refused(OptionsError, enter)
                return
            self.plain.follow(names_of(choices))
            if self.attempt(enter, f"enter in thread {place}"):
                self.contexts[place].append(context)
                self.plain.stacks[place].append(choices)

    @precondition(lambda self: self.plain.is_shared)
    @rule(code=codes)
    def leave_a_context(self, code):
        self.leave(drawn(code).choice([p for p, stack in enumerate(self.contexts) if stack]))
        self.happens("leave")

    @rule(code=codes)
    def forward_with_names(self, code):
        draw = drawn(code)
        place = self.drawn_place(draw)
        num_rows = draw.choice([ROWS, ROWS, ROWS, 1, 3])
        choices = tuple(self.drawn_choice(draw) for _ in range(num_rows))

        def forward():
            return self.logits(place, adapter_names=choices)

        if num_rows != ROWS:
            self.refused(OptionsError, forward)
        elif self.asks(names_of(choices), forward):
            if self.plain.kind == "merged":
                self.refused(OptionsError, forward)
                return
            self.plain.follow(names_of(choices))
            stack = self.plain.stacks[place]
            stack.append(choices)
            view = self.plain.view(place)
            stack.pop()
            FRESH.check(view, self.plain.dtype, forward())
            self.happens("forward with names")

    @precondition(lambda self: self.plain.rows is None or self.plain.rows.is_in_force)
    @rule(code=codes)
    def open_rows(self, code):
        draw = drawn(code)
        if draw.random() < 0.5:
            self.enable()
        max_rows = draw.choice([ROWS, ROWS, ROWS + 1, 0])
        adapter_len = draw.choice([None, None, 4, 2, 1])
        context = self.model.fixed_rows(max_rows, adapter_len=adapter_len)
        if not self.plain.is_enabled or not self.plain.known or self.plain.kind != "plain":
            self.refused(OptionsError, context.__enter__)
            return
        self.plain.follow(self.plain.known)
        if not max_rows:
            self.refused(OptionsError, context.__enter__)
            return

        def enter():
            self.rows = context.__enter__()

        if self.attempt(enter, "open rows"):
            self.rows_context = context
            self.plain.open_rows(max_rows, adapter_len)
            self.assign_some(draw)

    @precondition(lambda self: self.plain.rows is not None)
    @rule(code=codes)
    def assign(self, code):
        self.assign_some(drawn(code))

    def assign_some(self, draw):
        rows = self.plain.rows
        all_tensors = {**self.plain.on_disk, **self.plain.tensors(self.plain.known)}
        # Each of the numbers that there is room for divides that of the batch.
        num_rows = draw.choice([0, 1, 2, 2, 2, 2, 2, 4])
        names = [draw.choice([*all_tensors, BASE]) for _ in range(num_rows)]
        names += [NOBODY] * (draw.random() < 0.05)

        def assign():
            self.rows.assign(names)

        if not 0 < len(names) <= rows.max_rows or not rows.is_in_force:
            self.refused(OptionsError, assign)
        elif self.asks(names_of(names), assign):
            self.plain.follow(names_of(names))
            lengths = [all_tensors[name].config.adapter_len for name in names_of(names)]
            are_known = all(all_tensors[name].fqns <= rows.fqns for name in names_of(names))
            if max(lengths, default=0) > rows.length or not are_known:
                self.refused(OptionsError, assign)
                return
            assign()
            self.plain.assign(names)
            self.happens("assign")

    @precondition(lambda self: self.plain.rows is not None)
    @rule()
    def close_rows(self):
        self.happens("close rows")
        self.close()

    # -- faults, refusals and copies ------------------------------------------------------------------

    @rule(number=st.integers(0, 3))
    def arm_a_fault(self, number):
        """The next switch fails at that write, and must leave everything as it was."""
        self.fault = number

    @rule(code=codes)
    def refuse(self, code):
        draw, model = drawn(code), self.model
        name = next(iter(self.plain.known), NOBODY)
        calls = [
            (OptionsError, lambda: model.set_adapter({})),
            (OptionsError, lambda: model.set_adapter({name: float("nan")})),
            (VariantError, lambda: model.set_adapter({name: 1.0, NOBODY: 1.0})),
            (VariantError, lambda: model.set_adapter(BASE)),
            (OptionsError, model.activated([]).__enter__),
            (OptionsError, lambda: model(IDS, adapter_names=name)),
            (OptionsError, lambda: model(IDS, adapter_names=[])),
            (VariantError, lambda: model(IDS, adapter_names=[name, NOBODY])),
            (VariantError, lambda: model.adapter_modules(NOBODY)),
            (OptionsError, lambda: model.add_weighted_adapter([name], [1.0, 2.0], "new")),
            (SurgeryError, lambda: model.load_adapter("/nowhere", "new")),
            (
                OptionsError,
                lambda: model.add_adapter(
                    "new", AdaptionPromptConfig(adapter_len=1, adapter_layers=LAYERS + 1)
                ),
            ),
        ]
        self.refused(*draw.choice(calls))
        if self.plain.used:
            self.refused(VariantError, model.unload)
        if self.plain.kind != "merged":
            self.refused(VariantError, model.unmerge_adapter)

    @rule(code=codes)
    def copy_the_model(self, code):
        """The copy computes the same, and whatever becomes of it is nothing to the model."""
        twin = copy.deepcopy(self.model)
        self.happens("copy the model")
        with torch.no_grad():
            FRESH.check(self.plain.view(None), self.plain.dtype, twin(IDS).logits)
        if self.plain.known:
            draw = drawn(code)
            twin.set_adapter({draw.choice(list(self.plain.known)): 0.5})
            twin.disable_adapter_layers()
        base = twin.unload()
        assert self.keys == list(base.state_dict())
        with torch.no_grad():
            assert torch.equal(FRESH.base[self.plain.dtype], base(IDS).logits)


class ThousandSteps(CompositionMachine):
    """The same, with every rule in every walk."""

    seen_by_any: ClassVar[set] = set()

    def __init__(self):
        super().__init__()
        # Hypothesis's own choice leaves out some of the rules in each walk.
        usual = self._rules_strategy
        self._rules_strategy = (
            st.sampled_from(usual.rules)
            .filter(usual.is_valid)
            .flatmap(lambda rule: st.tuples(st.just(rule), st.fixed_dictionaries(rule.arguments)))
        )

    def teardown(self):
        self.seen_by_any.update(self.seen)
        super().teardown()


TestComposition = CompositionMachine.TestCase
TestComposition.settings = settings(stateful_step_count=30)
TestComposition.pytestmark = [pytest.mark.slow, pytest.mark.faults]


class TestThousandSteps(ThousandSteps.TestCase):
    """The first of two walks is Hypothesis's simplest, which does one thing over and over."""

    settings = settings(
        max_examples=2,
        stateful_step_count=1000,
        suppress_health_check=[HealthCheck.large_base_example, HealthCheck.too_slow],
    )
    pytestmark: ClassVar = [pytest.mark.slow, pytest.mark.faults]

    def runTest(self):  # noqa: N802 (unittest's name)
        super().runTest()

        assert {
            *("add", "add a twin", "a sum that is no adapter", "delete", "rename"),
            *("save and load", "edit in place", "put another parameter there"),
            *("move all", "move the base alone"),
            *("set one", "set several", "enable", "disable", "merge", "unmerge"),
            *(f"{what} in thread {place}" for what in ("enter", "train") for place in range(3)),
            *("leave", "forward with names", "open rows", "assign", "close rows"),
            *("loaded from disk", "evicted to make room", "evict by hand", "copy the model"),
            *("a fault: set several", "refused: StoreError"),
        } <= ThousandSteps.seen_by_any
