"""A random walk over everything that can happen to a store, against a plain model of it."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.stores import VALUES, FakeHost, PlainStore, filled, write
from surgery_adaption_prompt.checkpoints import WEIGHTS_FILE
from surgery_adaption_prompt.store import AdapterStore

from surgery_core import VariantError

names = st.sampled_from(list(VALUES))


class StoreMachine(RuleBasedStateMachine):
    """Everything that can happen to a store, against a list of names and plain sums."""

    @initialize(budget=st.none() | st.integers(0, 4 * 14))
    def start(self, budget):
        self.files = tempfile.TemporaryDirectory()
        self.folder = filled(Path(self.files.name))
        self.host = FakeHost()
        self.store = AdapterStore(self.folder, max_bytes=budget)
        self.plain = PlainStore(
            budget, on_disk=lambda name: 4 * VALUES[name], in_model=self.host.adapter_bytes
        )
        # The same set: what is broken for the host is so for the plain model.
        self.plain.broken = self.host.broken
        self.by_hand, self.pinned = set(), set()

    def teardown(self):
        self.files.cleanup()

    @property
    def staying(self):
        return {*self.pinned, *self.host.used}

    @rule(wanted=st.lists(names, max_size=4, unique=True))
    def ensure(self, wanted):
        protected = {*wanted, *self.staying, *self.by_hand} & {*self.host.peft_config}
        self.host.calls.clear()
        error = self.plain.ask(wanted, present={*self.host.peft_config}, staying=self.staying)
        if error is not None:
            with pytest.raises(error):
                self.store.ensure(self.host, wanted)
        else:
            self.store.ensure(self.host, wanted)
            assert {*wanted} <= {*self.host.peft_config}
            has_loaded = any(call[0] == "load" for call in self.host.calls)
            if has_loaded and self.plain.budget is not None:
                assert self.store.counters.num_bytes <= self.plain.budget
        deleted = {call[1] for call in self.host.calls if call[0] == "delete"}
        assert not deleted & protected

    @rule(name=names)
    def evict(self, name):
        if name in self.plain.order and name not in self.staying:
            self.store.evict(name)
            self.plain.evict([name])
        else:
            with pytest.raises(VariantError, match="cannot be evicted"):
                self.store.evict(name)

    @rule()
    def clear(self):
        stay = [name for name in self.plain.order if name in self.staying]
        assert tuple(sorted(stay)) == self.store.clear()
        self.plain.evict([name for name in self.plain.order if name not in stay])

    @rule(name=names)
    def pin_or_unpin(self, name):
        (self.store.unpin if name in self.pinned else self.store.pin)(name)
        self.pinned ^= {name}

    @rule(name=names)
    def use_or_stop_using(self, name):
        if name in self.host.used:
            self.host.used.remove(name)
        elif name in self.host.peft_config:
            # As the model does with whatever it is about to use.
            self.ensure([name])
            self.host.used.add(name)
            self.host.follow(name)

    @rule(name=names)
    def put_back_what_is_in_use(self, name):
        """The base may have moved while it was disabled."""
        if name in self.host.used:
            self.host.follow(name)

    @rule(name=names)
    def break_or_mend_loading(self, name):
        self.host.broken ^= {name}

    @rule(name=names)
    def damage_or_repair_the_file(self, name):
        path = self.folder / name / WEIGHTS_FILE
        if name in self.plain.damaged:
            write(self.folder, name)
        else:
            path.write_bytes(path.read_bytes()[:-2])
        self.plain.damaged ^= {name}

    @rule(name=names)
    def add_or_hotswap_by_hand(self, name):
        self.host.add(name)
        self.plain.forget([name])
        self.by_hand.add(name)

    @rule(name=names)
    def delete_by_hand(self, name):
        self.host.peft_config.pop(name, None)
        self.host.used.discard(name)
        self.plain.forget([name])
        self.by_hand.discard(name)

    @rule(width=st.sampled_from([2, 4, 8]), is_base_alone=st.booleans())
    def move_to_another_dtype(self, width, is_base_alone):
        self.host.move(width, is_base_alone=is_base_alone)

    @invariant()
    def everything_is_where_it_should_be(self):
        assert tuple(self.plain.order) == self.store.loaded
        assert {*self.plain.order, *self.by_hand} == {*self.host.peft_config}
        assert not {*self.plain.order} & self.by_hand
        assert self.plain.counters == self.store.counters


TestStore = StoreMachine.TestCase
TestStore.pytestmark = [pytest.mark.slow]
