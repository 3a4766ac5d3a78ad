"""What a random walk over many adapters starts from, its tools, and what is checked at each step."""

import copy
import random
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from hypothesis.stateful import RuleBasedStateMachine, invariant
from surgery_adaption_prompt import (
    AdaptedAttention,
    AdapterStore,
    AdaptionPromptConfig,
    AdaptionPromptModel,
    Composition,
)

from support.families import build, open_gates_, tokens
from support.plain_adapters import (
    BASE,
    LIMITS,
    Adapter,
    FreshModels,
    PlainAdapters,
    Tensors,
    weights_of,
)
from support.stores import PlainStore
from surgery_core import VariantError
from surgery_core.testing import InjectedError, failing_at

NAMES = ("default", "e", "fr", "legal", "médical", "v1.0", "50%")
DISK = {
    "d1": AdaptionPromptConfig(adapter_len=1, adapter_layers=1),
    "d2": AdaptionPromptConfig(adapter_len=2, adapter_layers=2, gate="head"),
    "d3": AdaptionPromptConfig(adapter_len=3, adapter_layers=3, gate_activation="tanh"),
}
NOBODY = "nobody"
BUDGET = 1000
"""In bytes: in float32 room for one of the larger adapters on disk and the least one."""
LAYERS, ROWS = 3, 2
FQNS = [f"model.layers.{number}.self_attn" for number in range(LAYERS)]
IDS = tokens(ROWS, 4)
PRISTINE = {dtype: build(dtype=dtype) for dtype in LIMITS}
FRESH = FreshModels(PRISTINE, IDS)


def quoted(name):
    """Return how an adapter is called in the names of parameters, which have no dots."""
    return name.replace("%", "%25").replace(".", "%2E")


def drawn(code):
    """Return random numbers that a code stands for."""
    return random.Random(code)  # noqa: S311 (no secrets)


def drawn_config(draw):
    return AdaptionPromptConfig(
        adapter_len=draw.choice([1, 1, 2, 3, 4]),
        adapter_layers=draw.randint(1, LAYERS),
        gate=draw.choice(["layer", "head"]),
        gate_activation=draw.choice(["identity", "tanh"]),
    )


def saved(folder):
    """Write the adapters on disk, and return their tensors by name."""
    model = AdaptionPromptModel(copy.deepcopy(PRISTINE[torch.float32]), DISK, "d1")
    for seed, name in enumerate(DISK):
        open_gates_(model.adapter_modules(name), seed=seed + 10)
    model.save_pretrained(folder)
    return {n: Tensors.of(config, model.adapter_modules(n)) for n, config in DISK.items()}


class AdaptersWalk(RuleBasedStateMachine):
    """A model, a plain model of it, and threads; rules are for a class that derives from this one."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()
        self.files = ExitStack()
        folder = self.files.enter_context(tempfile.TemporaryDirectory())
        self.base = copy.deepcopy(PRISTINE[torch.float32])
        self.originals = {fqn: self.base.get_submodule(fqn) for fqn in FQNS}
        self.projections = {fqn: module.o_proj for fqn, module in self.originals.items()}
        self.parameters = [(name, id(tensor)) for name, tensor in self.base.named_parameters()]
        self.attributes = [set(vars(module)) for module in self.base.modules()]
        self.keys = list(self.base.state_dict())
        # The first place is this thread, the others are threads that live as long as the walk.
        pools = [self.files.enter_context(ThreadPoolExecutor(1)) for _ in range(2)]
        self.runners = [lambda call: call(), *(lambda c, p=p: p.submit(c).result() for p in pools)]
        for run in self.runners:
            run(int)
        self.contexts = [[] for _ in self.runners]
        on_disk = saved(folder)
        sizes = {n: sum(t.numel() for t in at.state.values()) for n, at in on_disk.items()}
        store = PlainStore(
            BUDGET,
            on_disk=lambda name: 4 * sizes[name],
            in_model=lambda name: self.dtype_of(name).itemsize * sizes[name],
        )
        self.plain = PlainAdapters(store, on_disk, [[] for _ in self.runners])
        start = {
            name: AdaptionPromptConfig(adapter_len=length, adapter_layers=layers)
            for name, length, layers in (("default", 1, 2), ("fr", 3, 3), ("legal", 1, 1))
        }
        self.model = AdaptionPromptModel(
            self.base, start, "default", store=AdapterStore(folder, max_bytes=BUDGET)
        ).eval()
        self.rows = self.rows_context = self.fault = None
        for seed, (name, config) in enumerate(start.items()):
            self.note_new(name, config, seed)

    # -- tools ------------------------------------------------------------------------------------

    def happens(self, what):
        """Count it, to see that a walk gets everywhere."""
        self.seen[what] += 1

    def note_new(self, name, config, seed):
        """Open the gates of a new adapter, so that it shows, and note what it is."""
        modules = self.model.adapter_modules(name)
        open_gates_(modules, seed=seed)
        self.plain.add(name, Adapter(Tensors.of(config, modules), self.plain.dtype))

    def dtype_of(self, name):
        """Return what an adapter has, or will have once it is loaded."""
        known = self.plain.known.get(name)
        return self.plain.dtype if known is None else known.tensors.dtype

    def attempt(self, call, what):
        """Do something with the fault that is armed, and tell whether it happened."""
        if self.fault is not None:
            self.model.swap_state.on_write = failing_at(self.fault)
        try:
            call()
        except InjectedError:
            self.fault = None
            self.happens(f"a fault: {what}")
            return False
        finally:
            self.model.swap_state.on_write = None
        self.happens(what)
        return True

    def refused(self, error, call):
        self.happens(f"refused: {error.__name__}")
        with pytest.raises(error):
            call()

    def asks(self, names, call):
        """Ask the store for names; tell whether it has them all, and that it refuses otherwise."""
        before = list(self.plain.store.order)
        error = self.plain.ask(names)
        if error is not None:
            self.refused(error, call)
        elif set(self.plain.store.order) - set(before):
            self.happens("loaded from disk")
        if set(before) - set(self.plain.store.order):
            self.happens("evicted to make room")
        return error is None

    def logits(self, place, **options):
        """Return what the model computes in a thread."""

        def run():
            with torch.no_grad():
                return self.model(IDS, **options).logits

        return self.runners[place](run)

    def is_refused(self, place):
        """Tell whether a thread in no context meets a module that asks what it uses."""
        are_there = any(isinstance(module, AdaptedAttention) for module in self.base.modules())
        return are_there and self.plain.may_work_for_another(place)

    def short_names(self):
        """Return the names of adapters of one token."""
        known = self.plain.known
        return [name for name in known if known[name].tensors.config.adapter_len == 1]

    def drawn_free_name(self, draw):
        """Return a name that is not taken, mostly."""
        free = [name for name in (*NAMES, "d1") if name not in self.plain.known]
        return draw.choice(free if free and draw.random() < 0.8 else NAMES)

    def drawn_name(self, draw):
        return draw.choice([*self.plain.known, *self.plain.known, *DISK, NOBODY])

    def drawn_composition(self, draw):
        names = sorted({*self.plain.known, *DISK})
        chosen = draw.sample(names, min(draw.choice([1, 2, 2, 3]), len(names)))
        chosen += [NOBODY] * (draw.random() < 0.05)
        return Composition({n: draw.choice([0, 1, -0.5, draw.uniform(-2, 2)]) for n in chosen})

    def drawn_choice(self, draw):
        kind = draw.random()
        if kind < 0.2:
            return BASE
        return self.drawn_name(draw) if kind < 0.6 else self.drawn_composition(draw)

    def drawn_place(self, draw):
        return draw.randrange(len(self.runners))

    def leave(self, place):
        """End the innermost context of a thread."""
        context = self.contexts[place].pop()
        self.runners[place](lambda: context.__exit__(None, None, None))
        self.plain.stacks[place].pop()

    def leave_all(self):
        for place, contexts in enumerate(self.contexts):
            while contexts:
                self.leave(place)

    def close(self):
        """End the context of fixed rows; what was active before is so again, if they still are."""
        rows = self.plain.rows
        if rows.is_in_force:
            assert self.plain.ask(weights_of(rows.before)) is None
        self.rows_context.__exit__(None, None, None)
        if rows.is_in_force:
            self.plain.select(rows.before)
        self.plain.rows = self.rows = self.rows_context = None

    # -- what always holds ----------------------------------------------------------------------------

    @invariant()
    def everything_is_as_expected(self):
        for name, adapter in self.plain.known.items():
            # Those that the store has loaded since.
            adapter.modules = adapter.modules or self.model.adapter_modules(name)
        self.names_are_those_expected()
        self.what_is_active_or_lent_is_not_in_the_store()
        self.slots_hold_what_they_should()
        self.every_adapter_keeps_its_objects_and_tensors()
        self.everybody_computes_with_what_they_use()

    def names_are_those_expected(self):
        plain, model, swap = self.plain, self.model, self.model.swap_state
        selected = sorted(weights_of(plain.selected))
        assert [*plain.known] == [*model.peft_config]
        assert selected == model.active_adapters
        if isinstance(plain.selected, Composition):
            assert selected == model.active_adapter
            assert plain.selected == model.active_composition
        else:
            assert plain.selected == model.active_adapter
            assert model.active_composition is None
        assert plain.is_enabled == swap.is_enabled
        assert plain.in_use == {name for name in plain.known if model.is_in_use(name)}
        assert set(plain.known) == {n for n in swap.names if not n.startswith("derived/")}
        assert tuple(plain.store.order) == model.store.loaded
        assert plain.store.counters == model.store.counters

    def what_is_active_or_lent_is_not_in_the_store(self):
        swap, active = self.model.swap_state, self.plain.active
        is_single = self.plain.variant is not None
        assert sorted(swap.lent) == ([] if is_single else sorted(active))
        assert set(self.plain.known) - set(active) <= set(swap.stored)
        assert not set(active) & set(swap.stored)
        assert swap.active not in swap.stored
        derived = [name for name in swap.names if name.startswith("derived/")]
        is_derived = self.plain.variant is None and self.plain.selected is not None
        assert len(derived) == is_derived
        assert self.plain.is_shared == self.model.sharing.is_in_force

    def slots_hold_what_they_should(self):
        plain, keys = self.plain, set(self.keys)
        listening = {fqn for name in plain.used for fqn in plain.known[name].modules}
        of_rows = plain.rows.fqns if plain.kind == "rows" and plain.is_enabled else ()
        merged = {
            fqn
            for name in weights_of(plain.selected)
            for fqn in plain.known[name].modules
            if plain.kind == "merged" and plain.is_enabled
        }
        for fqn, original in self.originals.items():
            module, projection = self.base.get_submodule(fqn), original.o_proj
            adapters = {n: plain.known[n] for n in plain.active if fqn in plain.known[n].modules}
            own = dict(module.named_parameters(recurse=False))
            expected = {}
            if plain.variant in adapters:
                assert module is adapters[plain.variant].modules[fqn]
            elif not adapters and fqn not in listening and fqn not in of_rows:
                assert module is original
            else:
                assert module.base_attention is original
                assert len(module.parts) == (1 if fqn in of_rows else len(adapters))
            for name, adapter in adapters.items():
                # As the adapter's own module has them, whatever they are called here.
                suffix = "" if name == plain.variant else f"_{quoted(name)}"
                theirs = self.model.adapter_modules(name)[fqn]
                expected[f"adaption_prompt{suffix}"] = theirs.adaption_prompt
                expected[f"adaption_gate{suffix}"] = theirs.adaption_gate
                assert own[f"adaption_gate{suffix}"].requires_grad is adapter.is_trainable
            assert {key: id(p) for key, p in own.items()} == {
                key: id(p) for key, p in expected.items()
            }
            keys |= {f"{fqn}.{key}" for key in expected}
            assert (projection is self.projections[fqn]) == (fqn not in merged)
            assert projection.weight is self.projections[fqn].weight
        assert keys == set(self.base.state_dict())

    def every_adapter_keeps_its_objects_and_tensors(self):
        for name, adapter in self.plain.known.items():
            modules = self.model.adapter_modules(name)
            assert list(modules) == list(adapter.modules)
            assert all(modules[fqn] is module for fqn, module in adapter.modules.items())
            actual = Tensors.of(adapter.tensors.config, modules).state
            for key, tensor in adapter.tensors.state.items():
                assert tensor.dtype is actual[key].dtype, (name, key)
                assert torch.equal(tensor, actual[key]), (name, key)

    def everybody_computes_with_what_they_use(self):
        """As models that have never known another adapter."""
        for place in range(len(self.runners)):
            if self.is_refused(place):
                self.refused(VariantError, lambda place=place: self.logits(place))
                continue
            FRESH.check(self.plain.view(place), self.plain.dtype, self.logits(place))

    def teardown(self):
        """Whatever happened, unloading leaves no residue."""
        with self.files:
            if self.rows_context is not None:
                self.close()
            self.leave_all()
            self.model.unload()
            assert all(self.base.get_submodule(fqn) is at for fqn, at in self.originals.items())
            assert all(at.o_proj is self.projections[fqn] for fqn, at in self.originals.items())
            assert self.keys == list(self.base.state_dict())
            assert self.parameters == [(name, id(t)) for name, t in self.base.named_parameters()]
            assert self.attributes == [set(vars(module)) for module in self.base.modules()]
            assert all(parameter.requires_grad for parameter in self.base.parameters())
            pristine = PRISTINE[self.plain.dtype].state_dict()
            for key, tensor in self.base.state_dict().items():
                assert torch.equal(pristine[key], tensor)
