"""A random walk over edits of the base's weights while adapters come and go.

What the base's weights must be is kept in a dictionary of plain tensors, and what the model must
compute comes from a model that is built anew from it.
"""

import copy
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.families import build, tokens
from torch import nn

from surgery_core import ModelRecipe, Session

NAMES = "xyz"
CHOICES = [*NAMES, {"x": 1.0, "y": 0.5}, {"x": -0.5, "y": 1.0, "z": 0.25}]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}
SCALING = 2.0
places = st.sampled_from([0, 1])
choices = st.sampled_from(CHOICES)
seeds = st.integers(0, 99)


class Two(nn.Module):
    """Two layers, one after the other."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def low_rank_of(own, x, y):
    return y + SCALING * (x @ own["lora_A"].T @ own["lora_B"].T)


def scale_shift_of(own, _, y):
    return own["adapter_scale"] * (y + own["adapter_bias"])


class Linears:
    """A model whose outputs the formulas of the adapters give.

    Args:
        rule: What an adapter is.
        formula: From an adapter's tensors, the input and the output of a layer, its output instead.
    """

    fqns = ("first", "second")
    x = torch.linspace(-1, 1, 6).view(2, 1, 3)

    def __init__(self, rule, formula):
        self.rule = rule
        self.formula = formula
        self.pristine = Two()

    def run(self, model, dtype):
        return model(self.x.to(dtype))

    def expected(self, weights, adapters, choice, dtype):
        found = self.x.to(dtype)
        for fqn in self.fqns:
            x = found if fqn == "first" else torch.tanh(found)
            y = x @ weights[f"{fqn}.weight"].T + weights[f"{fqn}.bias"]
            found = y
            for name, factor in weights_of(choice).items():
                own = {
                    key.removeprefix(f"{fqn}."): tensor.to(dtype)
                    for key, tensor in adapters[name].items()
                    if key.startswith(fqn)
                }
                found = found + factor * (self.formula(own, x, y) - y)
        return found


class Prompts:
    """A transformer with adaption prompts, compared with one that is made from the tensors."""

    fqns = ("model.layers.1.self_attn.k_proj", "model.layers.2.self_attn.v_proj")
    rule: ClassVar = {
        "operation": "adaption_prompt",
        "options": {"adapter_len": 2, "adapter_layers": 2, "gate": "head"},
    }

    def __init__(self):
        self.pristine = build()
        self.ids = tokens(2, 3)

    def run(self, model, dtype):
        del dtype
        return model(self.ids).logits

    def expected(self, weights, adapters, choice, dtype):
        model = copy.deepcopy(self.pristine).to(dtype)
        model.load_state_dict(weights)
        names = list(weights_of(choice))
        if names:
            edited = applied(model, self.rule, names)
            for name in names:
                edited.load_(name, adapters[name])
            edited.set_active(choice)
        return self.run(model, dtype)


KINDS = {
    "low_rank": Linears(
        {"operation": "low_rank", "options": {"r": 2, "lora_alpha": 2 * SCALING}}, low_rank_of
    ),
    "scale_shift": Linears({"operation": "scale_shift"}, scale_shift_of),
    "adaption_prompt": Prompts(),
}


def applied(model, rule, names=NAMES):
    recipe = {"adapters": dict.fromkeys(names, rule), "active": names[0]}
    return Session().plan_recipe(model, ModelRecipe.model_validate(recipe)).apply()


def weights_of(choice):
    if choice is None or choice == "__base__":
        return {}
    return {choice: 1.0} if isinstance(choice, str) else choice


def drawn(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype) / 2


@dataclass
class Cell:
    """A tensor of the base; tied ones are one cell."""

    tensor: torch.Tensor


class BaseEdits(RuleBasedStateMachine):
    """One model, the tensors its base must have, and those its adapters must have."""

    kind: str

    def __init__(self):
        super().__init__()
        self.of = KINDS[self.kind]
        self.fqns = self.of.fqns
        self.model = copy.deepcopy(self.of.pristine)
        self.cells = {key: Cell(value.clone()) for key, value in self.model.state_dict().items()}
        self.edited = applied(self.model, self.of.rule)
        self.adapters = {}
        for number, name in enumerate(NAMES):
            own = self.edited.tensors(name)
            self.adapters[name] = {
                key: drawn(tensor.shape, 100 * number + at)
                for at, (key, tensor) in enumerate(own.items())
            }
            self.edited.load_(name, self.adapters[name])
        self.dtype = torch.float32
        self.choice = "x"
        self.stack = ExitStack()
        self.contexts = []

    @property
    def weights(self):
        return {key: cell.tensor for key, cell in self.cells.items()}

    @property
    def shown(self):
        """What the model computes now: inner contexts win, and disabling is not undone by others."""
        if "base" in self.contexts:
            return None
        return next((c for c in reversed(self.contexts) if c != "base"), self.choice)

    # -- adapters -----------------------------------------------------------------------------------

    @precondition(lambda self: not self.contexts)
    @rule(choice=choices)
    def select(self, choice):
        self.edited.set_active(choice)
        self.choice = choice

    @precondition(lambda self: not self.contexts)
    @rule(way=st.sampled_from(["disabled", "paused"]))
    def take_out(self, way):
        self.stack.enter_context(getattr(self.edited, way)())
        self.contexts.append("base")

    @precondition(lambda self: not self.contexts and self.kind != "scale_shift")
    @rule(choice=choices)
    def use_in_this_thread(self, choice):
        self.stack.enter_context(self.edited.activated([choice]))
        self.contexts.append(choice)

    @precondition(lambda self: not self.contexts and self.kind != "scale_shift")
    @rule(first=choices)
    def use_for_rows(self, first):
        self.stack.enter_context(self.edited.activated([first, "__base__"]))
        self.contexts.append((first, "__base__"))

    @precondition(lambda self: self.contexts)
    @rule()
    def leave(self):
        self.stack.close()
        self.contexts.clear()

    # -- the base -----------------------------------------------------------------------------------

    def layer(self, place):
        return self.model.get_submodule(self.fqns[place])

    def new(self, place, seed, *, is_same_object):
        """Return new values for a weight, and note what has them."""
        key = f"{self.fqns[place]}.weight"
        tensor = drawn(self.cells[key].tensor.shape, seed, self.dtype)
        if is_same_object:
            self.cells[key].tensor = tensor
        else:
            self.cells[key] = Cell(tensor)
        return tensor.clone()

    @rule(place=places, seed=seeds)
    def put_a_parameter(self, place, seed):
        tensor = self.new(place, seed, is_same_object=False)
        self.layer(place).weight = nn.Parameter(tensor, requires_grad=False)

    @rule(place=places, seed=seeds)
    def write_to_a_table(self, place, seed):
        tensor = self.new(place, seed, is_same_object=False)
        self.layer(place)._parameters["weight"] = nn.Parameter(tensor)

    @rule(place=places, seed=seeds)
    def delete_and_register(self, place, seed):
        layer = self.layer(place)
        del layer.weight
        layer.register_parameter(
            "weight", nn.Parameter(self.new(place, seed, is_same_object=False))
        )

    @rule(place=places, seed=seeds)
    def put_data(self, place, seed):
        self.layer(place).weight.data = self.new(place, seed, is_same_object=True)

    @rule(place=places, seed=seeds)
    def swap_tensors(self, place, seed):
        other = nn.Parameter(self.new(place, seed, is_same_object=True))
        torch.utils.swap_tensors(self.layer(place).weight, other)

    @rule(seed=seeds, is_assigned=st.booleans())
    def load(self, seed, is_assigned):
        state = {
            f"{self.fqns[place]}.weight": self.new(
                place, seed + place, is_same_object=not is_assigned
            )
            for place in (0, 1)
        }
        self.model.load_state_dict(state, strict=False, assign=is_assigned)

    @rule()
    def tie(self):
        self.layer(0).weight = self.layer(1).weight
        first, second = (f"{fqn}.weight" for fqn in self.fqns)
        self.cells[first] = self.cells[second]

    @rule(place=places, seed=seeds)
    def empty_and_fill(self, place, seed):
        """By way of the meta device, where parameters become other objects."""
        layer = self.layer(place)
        values = {key: value.clone() for key, value in layer.state_dict().items()}
        values["weight"] = self.new(place, seed, is_same_object=False)
        layer.to("meta").to_empty(device="cpu")
        layer.load_state_dict(values)

    @rule(
        dtype=st.sampled_from([torch.float32, torch.float64]),
        how=st.sampled_from(["plain", "overwrite", "swap"]),
    )
    def move(self, dtype, how):
        future = torch.__future__
        future.set_overwrite_module_params_on_conversion(how == "overwrite")
        future.set_swap_module_params_on_conversion(how == "swap")
        try:
            self.model.to(dtype)
        finally:
            future.set_overwrite_module_params_on_conversion(False)
            future.set_swap_module_params_on_conversion(False)
        if how == "overwrite" and dtype is not self.dtype:
            # Parameters that were one are two then.
            self.cells = {key: Cell(cell.tensor) for key, cell in self.cells.items()}
        for cell in self.cells.values():
            cell.tensor = cell.tensor.to(dtype)
        self.dtype = dtype

    # -- what always holds --------------------------------------------------------------------------

    def expected(self, choice):
        return self.of.expected(self.weights, self.adapters, choice, self.dtype)

    @invariant()
    def the_weights_are_the_bases(self):
        actual = self.model.state_dict()
        for key, expected in self.weights.items():
            assert expected.dtype is actual[key].dtype, key
            assert torch.equal(expected, actual[key]), key

    @invariant()
    @torch.no_grad()
    def it_computes_as_one_that_was_never_edited(self):
        actual, shown = self.of.run(self.model, self.dtype), self.shown
        of_rows = shown if isinstance(shown, tuple) else (shown, shown)
        # What a thread or a row was given before a move is computed in the dtype it had then.
        limit = TOLERANCE[torch.float32 if self.contexts else self.dtype]
        for row, choice in enumerate(of_rows):
            expected = self.expected(choice)[row]
            assert (expected - actual[row]).abs().max() <= limit

    def teardown(self):
        self.stack.close()
        self.edited.revert()
        assert self.weights.keys() == self.model.state_dict().keys()
        self.the_weights_are_the_bases()
        assert not any("lora" in key or "adap" in key for key in self.model.state_dict())


EXAMPLES = {"low_rank": 20, "scale_shift": 20, "adaption_prompt": 4}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bases_weights_stay_the_bases(kind):
    machine = type("Machine", (BaseEdits,), {"kind": kind})
    factor = settings.default.max_examples // 40
    run = machine.TestCase()
    run.settings = settings(max_examples=EXAMPLES[kind] * factor, stateful_step_count=14)
    run.runTest()
