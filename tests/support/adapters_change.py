"""Rules of a random walk over many adapters: they come and go, change, and move."""

import tempfile
from dataclasses import replace

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from surgery_adaption_prompt import Composition
from torch import nn

from support.adapters_walk import (
    DISK,
    FQNS,
    FRESH,
    NAMES,
    NOBODY,
    ROWS,
    AdaptersWalk,
    drawn,
    drawn_config,
    quoted,
)
from support.families import tokens
from support.plain_adapters import BASE, LIMITS, Adapter, Tensors, names_of, weights_of
from surgery_core import OptionsError, VariantError

codes = st.integers(0, 255)
"""What a rule does exactly. A byte, so that Hypothesis has enough of them for a thousand steps."""
dtypes = st.sampled_from(list(LIMITS))


def bare(choices):
    """Write one choice for the whole batch without a list, which is how people write it."""
    return list(choices) if len(choices) > 1 else choices[0]


def is_one_adapter(parts):
    """Tell whether a weighted sum is an adapter's term: see `materialised`."""
    if len(parts) == 1:
        return True
    for fqn in FQNS:
        here = [(found, weight) for found, weight in parts if fqn in found.fqns]
        prompts = [found.state[f"{fqn}.adaption_prompt"].double() for found, _ in here]
        if all(torch.equal(prompt, prompts[0]) for prompt in prompts):
            continue
        are_uniform = [
            weight == 0 or len(set(found.state[f"{fqn}.adaption_gate"].tolist())) == 1
            for found, weight in here
        ]
        if not all(are_uniform) or any(prompt.shape[1] > 1 for prompt in prompts):
            return False
    return True


class AdaptersChange(AdaptersWalk):
    """Adapters come and go, change, and move, whatever is active."""

    # -- adapters come and go -----------------------------------------------------------------------

    @rule(code=codes)
    def add(self, code):
        """A new one, or one with the prompts of another and gates of its own."""
        draw = drawn(code)
        name, config = self.drawn_free_name(draw), drawn_config(draw)
        if name in self.plain.known:
            self.refused(VariantError, lambda: self.model.add_adapter(name, config))
            return
        twins = sorted(set(self.plain.known)) if draw.random() < 0.5 else []
        if twins:
            twin = self.plain.known[draw.choice(twins)].tensors
            config, state = twin.config, twin.state
            self.model.add_adapter(name, config, state)
        else:
            self.model.add_adapter(name, config)
        self.note_new(name, config, code)
        self.happens("add a twin" if twins else "add")

    @rule(code=codes)
    def delete(self, code):
        name = self.drawn_name(drawn(code))
        if name not in self.plain.known or self.is_shared(name):
            self.refused(VariantError, lambda: self.model.delete_adapter(name))
        else:
            self.plain.try_to_delete(name)
            if self.attempt(lambda: self.model.delete_adapter(name), "delete"):
                self.plain.delete(name)

    def is_shared(self, name):
        """Tell whether an adapter is used by a thread or rows, or part of what is active."""
        is_part = self.plain.variant is None and name in weights_of(self.plain.selected)
        return is_part or name in self.plain.used | self.plain.assigned

    @rule(code=codes)
    def rename(self, code):
        draw = drawn(code)
        idle = [name for name in self.plain.known if not self.is_shared(name)]
        name, new_name = draw.choice([*idle, self.drawn_name(draw)]), self.drawn_free_name(draw)
        new_name = draw.choice([new_name, new_name, new_name, draw.choice(["../x", "", BASE])])
        is_bad = new_name in {*self.plain.known, BASE, "../x", ""} or name not in self.plain.known
        if is_bad or self.is_shared(name):
            self.refused(VariantError, lambda: self.model.rename_adapter(name, new_name))
            return
        self.model.rename_adapter(name, new_name)
        self.plain.rename(name, new_name)
        self.happens("rename")

    @rule(code=codes)
    def save_and_load(self, code):
        """What is saved, active or not, comes back equal under another name."""
        draw = drawn(code)
        free = [name for name in NAMES if name not in self.plain.known]
        name = draw.choice([*self.plain.known, NOBODY])
        with tempfile.TemporaryDirectory() as folder:
            if name == NOBODY:
                self.refused(
                    VariantError,
                    lambda: self.model.save_pretrained(folder, selected_adapters=[name]),
                )
                return
            self.model.save_pretrained(folder, selected_adapters=[name])
            sub = folder if name == "default" else f"{folder}/{name}"
            if not free:
                self.refused(VariantError, lambda: self.model.load_adapter(sub, name))
                return
            self.model.load_adapter(sub, free[0], is_trainable=True, base_check="error")
        saved_tensors = self.plain.known[name].tensors.cast(self.plain.dtype)
        self.plain.add(free[0], Adapter(saved_tensors, self.plain.dtype))
        self.happens("save and load")

    @rule(code=codes)
    def add_weighted(self, code):
        """Where the sum is an adapter's, it computes as the composition; elsewhere it is refused."""
        draw = drawn(code)
        choice, name = self.drawn_composition(draw), self.drawn_free_name(draw)
        short = [
            n for n in self.short_names() if self.plain.known[n].tensors.config.gate == "layer"
        ]
        if len(short) > 1 and draw.random() < 0.6:
            choice = Composition({n: draw.uniform(-2, 2) for n in draw.sample(short, 2)})
        weights = weights_of(choice)

        def add():
            self.model.add_weighted_adapter(list(weights), list(weights.values()), name)

        if not self.asks(weights, add):
            return
        self.plain.follow(weights)
        parts = [(self.plain.known[n].tensors, weight) for n, weight in weights.items()]
        if not is_one_adapter(parts):
            self.happens("a sum that is no adapter")
            self.refused(OptionsError, add)
        elif name in self.plain.known:
            self.refused(VariantError, add)
        else:
            add()
            adapter = Adapter(
                Tensors.of(
                    replace(self.model.peft_config[name], inference_mode=False),
                    self.model.adapter_modules(name),
                ),
                self.plain.dtype,
                is_trainable=any(self.plain.known[n].is_trainable for n in weights),
            )
            expected = FRESH.logits(self.plain.dtype, self.plain.tensors(weights), choice)
            actual = FRESH.logits(self.plain.dtype, {name: adapter.tensors}, name)
            # The prompts are added before the projection: more is rounded than elsewhere.
            limit = 30 * LIMITS[self.plain.dtype]
            assert (expected - actual).abs().max() <= limit * expected.abs().max()
            self.plain.add(name, adapter)
            self.happens("add a sum" if len(parts) > 1 else "add a multiple")

    @rule(code=codes)
    def evict(self, code):
        """One adapter, or whatever may go."""
        store, draw = self.plain.store, drawn(code)
        going = [name for name in store.order if name not in self.plain.in_use]
        name = draw.choice([*DISK, *going])
        if draw.random() < 0.2:
            self.evict_by_hand(going)
        elif name in going:
            self.evict_by_hand([name])
        else:
            self.refused(VariantError, lambda: self.model.store.evict(name))

    def evict_by_hand(self, names):
        store = self.plain.store
        if len(names) == 1:
            self.model.store.evict(names[0])
        else:
            assert sorted(set(store.order) - set(names)) == list(self.model.store.clear())
        store.evict(names)
        for name in names:
            del self.plain.known[name]
            self.happens("evict by hand")

    # -- values change, and dtypes --------------------------------------------------------------------

    @rule(code=codes)
    def train_step(self, code):
        """One step does to the adapters in use what it does to them in a fresh model."""
        draw = drawn(code)
        place = self.drawn_place(draw)
        choices = self.plain.choices(place)
        known = self.plain.known
        names = [name for name in names_of(choices) if known[name].is_trainable]
        if not names:
            return
        ids, before = tokens(ROWS, 4, seed=code % 6), self.plain.tensors(names_of(choices))
        fresh = FRESH.build(self.plain.dtype, before, None)

        def train(model, **options):
            # PyTorch does not count what a fused one writes.
            is_fused = code % 2 == 0
            optimizer = torch.optim.SGD(model.adapter_parameters(names), lr=0.05, fused=is_fused)
            model(ids, labels=ids, **options).loss.backward()
            optimizer.step()
            for parameter in model.adapter_parameters(known if model is self.model else names):
                parameter.grad = None

        if self.is_refused(place):
            self.refused(VariantError, lambda: self.runners[place](lambda: train(self.model)))
            return
        self.runners[place](lambda: train(self.model))
        with fresh.activated(bare(choices)):
            train(fresh)
        for name in names:
            config, modules = before[name].config, self.model.adapter_modules(name)
            after = Tensors.of(config, modules)
            expected = Tensors.of(config, fresh.adapter_modules(name))
            for key, tensor in expected.state.items():
                limit = 100 * LIMITS[self.plain.view(place).dtype]
                assert (tensor - after.state[key]).abs().max() <= limit * (1 + tensor.abs().max())
            known[name].tensors = after
        self.happens(f"train in thread {place}")
        if len(choices) == 1 and isinstance(choices[0], str):
            old, new = before[names[0]].state, known[names[0]].tensors.state
            assert not all(torch.equal(old[key], new[key]) for key in old)

    @precondition(lambda self: self.plain.known)
    @rule(code=codes)
    def edit(self, code):
        """In place; or another parameter is put there, as loading with `assign=True` does."""
        draw = drawn(code)
        name = draw.choice([*self.plain.known, *list(self.plain.active) * 3])
        adapter = self.plain.known[name]
        key, factor = draw.choice(list(adapter.tensors.state)), draw.choice([0.5, 1.5, -1.0])
        fqn, _, own = key.rpartition(".")
        if name in self.plain.active and draw.random() < 0.5:
            module = self.base.get_submodule(fqn)
            place = own if name == self.plain.variant else f"{own}_{quoted(name)}"
            old = getattr(module, place)
            new = nn.Parameter(old.detach() * factor, requires_grad=old.requires_grad)
            setattr(module, place, new)
            self.happens("put another parameter there")
        else:
            with torch.no_grad():
                getattr(self.model.adapter_modules(name)[fqn], own).mul_(factor)
            self.happens("edit in place")
        adapter.tensors = adapter.tensors.multiplied(key, factor)

    @rule(dtype=dtypes)
    def move_all(self, dtype):
        self.model.to(dtype)
        self.happens("move all" if dtype is not self.plain.dtype else "move to nowhere")
        self.plain.move(dtype, is_base_alone=False)

    @rule()
    def move_the_base_alone(self):
        """Adapters outside the model follow when they are next used."""
        (dtype,) = LIMITS.keys() - {self.plain.dtype}
        self.base.to(dtype)
        self.happens("move the base alone")
        self.plain.move(dtype, is_base_alone=True)
