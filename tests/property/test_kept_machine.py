"""A random walk over one KV cache: whoever decodes on it, and whatever was written before it began."""

import copy
from threading import Thread

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support.adapted import relative_error
from support.caches import with_cache
from support.families import Shape, build, open_gates_, scaling, tokens
from support.reference import reference_sum
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from transformers import DynamicCache, StaticCache

CONFIGS = {
    "a": AdaptionPromptConfig(adapter_len=3, adapter_layers=2, gate="head"),
    "b": AdaptionPromptConfig(adapter_len=5, adapter_layers=3, gate_activation="tanh"),
}
CHOICES = ("__base__", "a", "b", {"a": 0.7, "b": -1.3})
MAX = 40
TOLERANCE = 1e-10
"""Everything is float64."""


class CacheMachine(RuleBasedStateMachine):
    """Rows of two, with an adapter or several each, on one cache after another.

    Expected is what an unadapted float64 model computes on a cache of its own for each row, with the
    formula's terms added. Its tensors are copied when a cache begins, as is promised: a prompt's keys
    are as old as the cache.
    """

    @initialize(family=st.sampled_from(["llama", "mistral", "qwen3"]), is_static=st.booleans())
    def build(self, family, is_static):
        self.family, self.is_static = family, is_static
        self.model = AdaptionPromptModel(
            build(family, seed=1, dtype=torch.float64), CONFIGS, "a"
        ).eval()
        for seed, name in enumerate(CONFIGS):
            open_gates_(self.model.adapter_modules(name), seed=seed)
        self.number, self.latest = 0, (["a"], "set")
        self.begin()

    def begin(self):
        config = self.model.config
        self.cache = (
            StaticCache(config=config, max_cache_len=MAX)
            if self.is_static
            else DynamicCache(config=config)
        )
        self.begin_reference()

    def begin_reference(self):
        self.length = 0
        self.base = build(self.family, dtype=torch.float64)
        own = self.model.get_base_model().state_dict()
        self.base.load_state_dict({key: own[key] for key in self.base.state_dict()})
        self.terms = {
            name: {
                fqn: (
                    module.adaption_prompt.detach().double()[0].clone(),
                    activated(name, module.adaption_gate.detach().double()).expand(4).clone(),
                )
                for fqn, module in self.model.adapter_modules(name).items()
            }
            for name in CONFIGS
        }
        self.pasts = [DynamicCache(config=self.base.config) for _ in range(2)]

    def expected(self, ids, choices):
        rows = []
        for past, choice, row in zip(self.pasts, choices, ids, strict=True):
            weights = {choice: 1.0} if isinstance(choice, str) else choice
            terms = {}
            for name, weight in weights.items():
                for fqn, (prompt, gates) in self.terms.get(name, {}).items():
                    module = self.base.get_submodule(fqn)
                    terms.setdefault(module, []).append((prompt, weight * gates))
            factor = scaling(self.family, Shape())
            with torch.no_grad(), reference_sum(self.base, terms, scaling=factor):
                rows.append(self.base(row[None], **with_cache(past)).logits)
        return torch.cat(rows)

    @precondition(lambda self: self.length < MAX - 3)
    @rule(
        number=st.sampled_from([1, 1, 1, 2, 3]),
        choices=st.lists(st.sampled_from(CHOICES), min_size=1, max_size=2),
        how=st.sampled_from(["set", "rows", "thread"]),
    )
    def go_on(self, number, choices, how):
        self.number, self.latest = self.number + 1, (choices, how)
        ids = tokens(2, number, seed=self.number)
        self.length += number
        each = choices if len(choices) == 2 else choices * 2
        if how == "set" and each[0] == each[1]:
            actual = self.as_active(ids, each[0])
        elif how == "thread":
            found = []
            thread = Thread(target=lambda: found.append(self.as_rows(ids, choices)))
            thread.start()
            thread.join()
            (actual,) = found
        else:
            actual = self.as_rows(ids, choices)

        assert relative_error(actual, self.expected(ids, each)) < TOLERANCE

    def as_active(self, ids, choice):
        with torch.no_grad():
            if choice == "__base__":
                with self.model.disable_adapter():
                    return self.model(ids, **with_cache(self.cache)).logits
            self.model.set_adapter(choice)
            return self.model(ids, **with_cache(self.cache)).logits

    def as_rows(self, ids, choices):
        with torch.no_grad(), self.model.activated(choices if len(choices) == 2 else choices[0]):
            return self.model(ids, **with_cache(self.cache)).logits

    @rule()
    def copy_the_cache(self):
        self.cache, self.pasts = copy.deepcopy((self.cache, self.pasts))

    @rule(
        writes=st.lists(
            st.tuples(
                st.sampled_from(["prompt", "gate", "k_proj", "v_proj"]),
                st.sampled_from([0, 1, 2]),
                st.sampled_from(sorted(CONFIGS)),
            ),
            max_size=2,
        ),
        reset=st.booleans(),
    )
    def write_and_begin_anew(self, writes, reset):
        """Through `.data`, which PyTorch does not count."""
        for what, layer, name in writes:
            fqn = f"model.layers.{layer}.self_attn"
            module = self.model.adapter_modules(name).get(fqn)
            if what.endswith("proj"):
                owner = self.model.get_base_model().get_submodule(f"{fqn}.{what}")
                owner.weight.data.mul_(-1.1)
            elif module is not None:
                getattr(module, f"adaption_{what}").data.mul_(-0.9)
        if reset:
            self.cache.reset()
            self.begin_reference()
        else:
            self.begin()
        self.go_on(1, *self.latest)


def activated(name, gate):
    return torch.tanh(gate) if CONFIGS[name].gate_activation == "tanh" else gate


TestCacheMachine = CacheMachine.TestCase
