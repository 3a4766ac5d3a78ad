"""A random walk over everything that can happen to adapters, against a plain model of it."""

import copy
import tempfile
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.families import build, open_gates_, tokens
from surgery_adaption_prompt import (
    AdaptionPromptConfig,
    AdaptionPromptModel,
    adapter_state,
    load_state_,
)

NAMES = ("default", "fr", "legal", "médical", "e")
LAYERS = 3
IDS = tokens(2, 5)
PRISTINE = {dtype: build(dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}

names = st.sampled_from(NAMES)
dtypes = st.sampled_from(list(PRISTINE))
configs = st.builds(
    AdaptionPromptConfig,
    adapter_len=st.integers(1, 4),
    adapter_layers=st.integers(1, LAYERS),
    gate=st.sampled_from(["layer", "head"]),
    gate_activation=st.sampled_from(["identity", "tanh"]),
)


@dataclass
class Expected:
    """What an adapter should be: its tensors, and the base's dtype when it last left the model."""

    config: AdaptionPromptConfig
    state: dict
    base_dtype: torch.dtype
    modules: dict = field(default_factory=dict)

    def cast(self, dtype):
        self.state = {name: tensor.to(dtype) for name, tensor in self.state.items()}


def copied(modules):
    return {name: tensor.clone() for name, tensor in adapter_state(modules).items()}


class AdaptersMachine(RuleBasedStateMachine):
    """Adapters of different layers, lengths and gates come, go, train and move."""

    def __init__(self):
        super().__init__()
        self.base = copy.deepcopy(PRISTINE[torch.float32])
        self.attentions = [layer.self_attn for layer in self.base.model.layers]
        self.attributes = [set(vars(module)) for module in self.base.modules()]
        self.keys = list(self.base.state_dict())
        self.dtype = torch.float32
        start = {
            name: AdaptionPromptConfig(adapter_len=length, adapter_layers=layers)
            for name, length, layers in (("default", 2, 1), ("fr", 3, 3), ("legal", 1, 2))
        }
        self.model = AdaptionPromptModel(self.base, start, "default")
        self.expected = {}
        self.selected = "default"
        self.is_enabled = True
        for seed, (name, config) in enumerate(start.items()):
            self.record(name, config, seed)

    def record(self, name, config, seed):
        """Open the gates of a new adapter, so that it shows, and note what it is."""
        modules = self.model.adapter_modules(name)
        if seed is not None:
            open_gates_(modules, seed=seed)
        self.expected[name] = Expected(config, copied(modules), self.dtype, modules)

    def activates(self, name):
        """Note that an adapter enters the model: it follows where the base went meanwhile."""
        adapter = self.expected[name]
        if adapter.base_dtype is not self.dtype:
            adapter.cast(self.dtype)
            adapter.base_dtype = self.dtype

    def leaves(self, name):
        self.expected[name].base_dtype = self.dtype

    @property
    def active(self):
        return self.selected if self.is_enabled else None

    @rule(name=names, config=configs, seed=st.integers(0, 5))
    def add(self, name, config, seed):
        if name in self.expected:
            with pytest.raises(ValueError, match="is taken"):
                self.model.add_adapter(name, config)
            return
        self.model.add_adapter(name, config)
        self.record(name, config, seed)
        if self.selected is None:
            self.selected = name

    @rule(name=names)
    def set(self, name):
        if name not in self.expected:
            with pytest.raises(ValueError, match="does not exist"):
                self.model.set_adapter(name)
            return
        self.model.set_adapter(name)
        if self.is_enabled and name != self.selected:
            if self.selected is not None:
                self.leaves(self.selected)
            self.activates(name)
        self.selected = name

    @rule()
    def enable(self):
        self.model.enable_adapter_layers()
        if not self.is_enabled and self.selected is not None:
            self.activates(self.selected)
        self.is_enabled = True

    @rule()
    def disable(self):
        self.model.disable_adapter_layers()
        if self.active is not None:
            self.leaves(self.active)
        self.is_enabled = False

    @rule()
    def look_at_the_base_for_a_while(self):
        with self.model.disable_adapter(), self.model.disable_adapter(), torch.no_grad():
            assert torch.equal(PRISTINE[self.dtype](IDS).logits, self.model(IDS).logits)

    @rule(name=names)
    def delete(self, name):
        if name not in self.expected:
            with pytest.raises(ValueError, match="does not exist"):
                self.model.delete_adapter(name)
            return
        self.model.delete_adapter(name)
        del self.expected[name]
        if name == self.selected:
            self.selected = next(iter(self.expected), None)
            if self.active is not None:
                self.activates(self.active)

    @rule(name=names, new_name=names)
    def rename(self, name, new_name):
        if name not in self.expected or new_name in self.expected:
            with pytest.raises(ValueError, match=r"does not exist|is taken"):
                self.model.rename_adapter(name, new_name)
            return
        self.model.rename_adapter(name, new_name)
        self.expected = {
            new_name if key == name else key: value for key, value in self.expected.items()
        }
        self.selected = new_name if self.selected == name else self.selected

    @rule(name=names, new_name=names)
    def save_and_load(self, name, new_name):
        """What is saved, active or not, comes back equal under another name."""
        if name not in self.expected or new_name in self.expected:
            return
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            sub = folder if name == "default" else f"{folder}/{name}"
            self.model.load_adapter(sub, new_name, is_trainable=True)
        loaded = copied(self.model.adapter_modules(new_name))
        for key, tensor in self.expected[name].state.items():
            assert torch.equal(tensor.float(), loaded[key].float())
        self.record(new_name, self.expected[name].config, None)

    @rule(dtype=dtypes)
    def move_all(self, dtype):
        self.model.to(dtype)
        self.dtype = dtype
        for adapter in self.expected.values():
            adapter.cast(dtype)
            adapter.base_dtype = dtype
        self.check_base()

    @rule(dtype=dtypes)
    def move_the_base_alone(self, dtype):
        """Adapters outside the model follow when they are next put in."""
        self.base.to(dtype)
        self.dtype = dtype
        if self.active is not None:
            self.expected[self.active].cast(dtype)
            self.expected[self.active].base_dtype = dtype
        self.check_base()

    def check_base(self):
        # Rounding to bfloat16 cannot be taken back: start the base over from where it was.
        pristine = PRISTINE[self.dtype]
        own = [dict(self.base.named_parameters()), dict(self.base.named_buffers())]
        given = [dict(pristine.named_parameters()), dict(pristine.named_buffers())]
        with torch.no_grad():
            for mine, theirs in zip(own, given, strict=True):
                for name, tensor in theirs.items():
                    assert mine[name].dtype is tensor.dtype
                    mine[name].copy_(tensor)

    @precondition(lambda self: self.active is not None)
    @rule(seed=st.integers(0, 5))
    def train_step(self, seed):
        """One step changes the active adapter and nothing else."""
        modules = self.model.adapter_modules(self.active)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        assert len(trained) == 2 * len(modules)
        optimizer = torch.optim.SGD(trained, lr=0.05)
        ids = tokens(2, 5, seed=seed)
        self.model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        before, after = self.expected[self.active].state, copied(modules)
        assert any(not torch.equal(before[key], after[key]) for key in before)
        self.expected[self.active].state = after

    @invariant()
    def the_active_adapter_is_not_in_the_store(self):
        swap = self.model.swap_state
        assert swap.active == self.active
        assert self.active not in swap.stored
        assert {*swap.stored, self.active} - {None} == set(self.expected)

    @invariant()
    def every_slot_holds_the_very_object(self):
        modules = self.expected[self.active].modules if self.active is not None else {}
        for number, layer in enumerate(self.base.model.layers):
            fqn = f"model.layers.{number}.self_attn"
            assert layer.self_attn is modules.get(fqn, self.attentions[number])

    @invariant()
    def every_adapter_keeps_its_objects_and_tensors(self):
        for name, adapter in self.expected.items():
            modules = self.model.adapter_modules(name)
            assert {fqn: id(module) for fqn, module in modules.items()} == {
                fqn: id(module) for fqn, module in adapter.modules.items()
            }
            for key, tensor in adapter_state(modules).items():
                assert tensor.dtype is adapter.state[key].dtype
                assert torch.equal(adapter.state[key], tensor)

    @invariant()
    def logits_are_those_of_the_active_adapter_alone(self):
        """A model that has never known another adapter gives the same logits."""
        alone = copy.deepcopy(PRISTINE[self.dtype])
        if self.active is not None:
            adapter = self.expected[self.active]
            alone = AdaptionPromptModel(alone, {"only": adapter.config}, "only")
            for module in alone.adapter_modules("only").values():
                dtype = next(iter(adapter.state.values())).dtype
                module.adaption_prompt.data = module.adaption_prompt.data.to(dtype)
                module.adaption_gate.data = module.adaption_gate.data.to(dtype)
            load_state_(alone.adapter_modules("only"), adapter.state)
        with torch.no_grad():
            assert torch.equal(alone(IDS).logits, self.model(IDS).logits)

    def teardown(self):
        """Whatever happened, unloading leaves no residue."""
        self.model.unload()
        assert [layer.self_attn for layer in self.base.model.layers] == self.attentions
        assert list(self.base.state_dict()) == self.keys
        assert [set(vars(module)) for module in self.base.modules()] == self.attributes
        assert all(parameter.requires_grad for parameter in self.base.parameters())
        with torch.no_grad():
            assert torch.equal(PRISTINE[self.dtype](IDS).logits, self.base(IDS).logits)


TestAdapters = AdaptersMachine.TestCase
TestAdapters.settings = settings(stateful_step_count=30)
TestAdapters.pytestmark = [pytest.mark.slow]
