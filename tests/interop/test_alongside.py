"""Prompts beside what others put on the same model: LoRA, hooks and transformers' recordings."""

import peft
import pytest
import torch
from packaging.version import Version
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from support.adapted import CONFIG, FLOAT32, adapt, build, flip_gates_, reference, relative_error
from support.families import Shape, open_gates_, scaling, tokens
from support.reference import reference_model
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from torch.utils._pytree import tree_map
from transformers.integrations.peft import MIN_PEFT_VERSION

from surgery_core import SurgeryWarning

IDS = tokens()
ALL, QUERIES = ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_proj", "o_proj")
"""With LoRA on the second alone, a prompt's keys and values are kept from pass to pass."""

LORA = {"r": 2, "lora_alpha": 3, "init_lora_weights": False}
GRADIENT = 2e-4
"""Relative to the largest of a tensor: ten times the error of what gradients come from."""

pytestmark = [
    # PEFT asks transformers by an old name.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # PEFT remarks on a second adapter that is injected without its wrapper.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    # torch remarks that the attention is called with keywords, which backward hooks do not see.
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]


class Lora:
    """LoRA on a base, put there in one of three ways, with an adapter `x`."""

    def __init__(self, way, base, targets=ALL):
        self.way, self.base, self.model, self.targets = way, base, base, list(targets)
        self.add("x")

    def add(self, name):
        config = peft.LoraConfig(**LORA, target_modules=self.targets)
        if self.way == "injected":
            peft.inject_adapter_in_model(config, self.base, adapter_name=name)
        elif self.way == "transformers":
            self.base.add_adapter(config, name)
        elif self.model is self.base:
            self.model = peft.get_peft_model(self.base, config, adapter_name=name)
            assert self.model.get_base_model() is self.base
        else:
            self.model.add_adapter(name, config)

    def layers(self):
        return {n: m for n, m in self.base.named_modules() if isinstance(m, LoraLayer)}

    def choose(self, name):
        """Make an adapter the active one; None disables all."""
        verb = "enable" if name else "disable"
        if self.way == "injected":
            for layer in self.layers().values():
                layer.enable_adapters(name is not None)
                layer.set_adapter(name or [])
        elif self.way == "transformers":
            getattr(self.base, f"{verb}_adapters")()
        else:
            getattr(self.model.base_model, f"{verb}_adapter_layers")()
        if name and self.way != "injected":
            self.model.set_adapter(name)


every_way = pytest.mark.parametrize(
    "way",
    [
        "injected",
        "wrapped",
        pytest.param(
            "transformers",
            marks=pytest.mark.skipif(
                Version(peft.__version__) < Version(MIN_PEFT_VERSION),
                reason=f"transformers wants PEFT {MIN_PEFT_VERSION} or later",
            ),
        ),
    ],
)
either_order = pytest.mark.parametrize("order", ["before ours", "after ours"])


def adapt_twice(base):
    """Return ours with an active adapter `default` and another, gates open."""
    ours = adapt(base)
    ours.add_adapter("other", AdaptionPromptConfig(**{**CONFIG, "adapter_len": 3}))
    open_gates_(ours.adapter_modules("other"), seed=9)
    return ours


def both(way, order, targets=ALL):
    """Return a base, LoRA and ours on it."""
    base = build()
    ours = adapt_twice(base) if order == "after ours" else None
    lora = Lora(way, base, targets)
    return base, lora, ours or adapt_twice(base)


def run(model, *, trains=False):
    """Return logits; keys and values of prompts are computed anew if it `trains`."""
    with torch.set_grad_enabled(trains):
        return model(IDS, use_cache=False).logits.detach()


def part(model, kind):
    return {name: tensor for name, tensor in model.state_dict().items() if kind in name}


def doubles(ours, lora, prompts="default", adapter="x"):
    """Return float64 copies by FQN: of a prompt and its gate, and of LoRA's A and B; None is zero."""
    modules, layers, x = ours.adapter_modules(prompts or "default"), lora.layers(), adapter or "x"
    pairs = {n: (m.adaption_prompt, m.adaption_gate * bool(prompts)) for n, m in modules.items()}
    matrices = {
        n: (m.lora_A[x].weight, m.lora_B[x].weight * bool(adapter)) for n, m in layers.items()
    }
    return [
        {fqn: [t.detach().double().requires_grad_() for t in two] for fqn, two in found.items()}
        for found in (pairs, matrices)
    ]


def formula(prompts, matrices, **arguments):
    """Run the float64 reference, LoRA's products added to the weights of the projections."""
    base = build(dtype=torch.float64).requires_grad_(False)
    weights = {
        f"{fqn}.weight": base.get_submodule(fqn).weight + LORA["lora_alpha"] / LORA["r"] * b @ a
        for fqn, (a, b) in matrices.items()
    }
    tensors = {base.get_submodule(fqn): (p[0], gate) for fqn, (p, gate) in prompts.items()}
    with reference_model(base, tensors, scaling=scaling("llama", Shape())):
        return torch.func.functional_call(base, weights, IDS, {"use_cache": False, **arguments})


@pytest.mark.peft
@pytest.mark.parametrize("targets", [ALL, QUERIES], ids=["all", "queries"])
@either_order
@every_way
def test_every_choice_of_both_agrees_with_the_formula(way, order, targets):
    """Of two adapters each or none, however one got there, through each of the models."""
    base, lora, ours = both(way, order, targets)
    lora.add("y")
    # Models that only ever had one of the two.
    lora_only, ours_only = Lora(way, build(), targets).base, adapt(build()).get_base_model()
    for model, kind in ((lora_only, "lora_"), (ours_only, "adaption_")):
        model.load_state_dict(part(base, kind), strict=False)
    seen, choices = {}, [(p, a) for p in ("default", "other", None) for a in ("x", "y", None)]

    for prompts, adapter in choices + choices[::-2]:
        lora.choose(adapter)
        ours.set_adapter(prompts or "default")
        ours.enable_adapter_layers() if prompts else ours.disable_adapter_layers()
        results = run(base), run(base, trains=True)
        assert all(torch.equal(results[0], run(model)) for model in (ours, lora.model))
        if (prompts, adapter) in seen:
            assert all(map(torch.equal, seen[prompts, adapter], results))
            continue
        expected = formula(*doubles(ours, lora, prompts, adapter)).logits
        assert all(relative_error(result, expected) < FLOAT32 for result in results)
        assert all(relative_error(other, expected) > 50 * FLOAT32 for other, _ in seen.values())
        seen[prompts, adapter] = results

    assert torch.equal(run(lora_only), seen[None, "x"][0])
    assert torch.equal(run(build()), seen[None, None][0])
    assert torch.equal(run(ours_only, trains=True), seen["default", None][1])
    # Keys that pass through LoRA, even disabled, are computed anew: roundings in another order.
    assert targets is ALL or torch.equal(run(ours_only), seen["default", None][0])
    flip_gates_(ours)
    flipped = formula(*doubles(ours, lora)).logits
    assert relative_error(seen["default", "x"][0], flipped) > 50 * FLOAT32


@pytest.mark.peft
@either_order
@every_way
def test_both_train_at_once_with_the_gradients_of_the_formula(way, order):
    """Whichever comes second freezes the first; set trainable again, both train and nothing else."""
    base, lora, ours = both(way, order)
    parameters = dict(base.named_parameters())
    theirs, own = part(base, "lora_").keys(), part(base, "adaption_").keys()
    trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert (own if order == "before ours" else theirs) == trainable
    lora.choose("x")
    for name in own:
        parameters[name].requires_grad_(True)
    prompts, matrices = doubles(ours, lora)
    formula(prompts, matrices, labels=IDS).loss.backward()

    ours(IDS, labels=IDS, use_cache=False).loss.backward()

    names = [f"{fqn}.adaption_{name}" for fqn in prompts for name in ("prompt", "gate")]
    names += [f"{fqn}.lora_{name}.x.weight" for fqn in matrices for name in "AB"]
    expected = [tensor.grad for two in (*prompts.values(), *matrices.values()) for tensor in two]
    trained = {name: p for name, p in parameters.items() if p.grad is not None}
    assert theirs | own == set(names) == trained.keys()
    for name, gradient in zip(names, expected, strict=True):
        error = (trained[name].grad - gradient).abs().max()
        assert error < GRADIENT * gradient.abs().max(), name
    torch.optim.SGD(trained.values(), lr=0.1).step()
    assert relative_error(run(base), formula(*doubles(ours, lora)).logits) < FLOAT32


@pytest.mark.peft
@either_order
@every_way
def test_each_saves_its_own_tensors_only(way, order, tmp_path):
    base, lora, ours = both(way, order)
    expected, again = run(base), build()
    prefix = "base_model.model." if way == "wrapped" else ""
    theirs = {prefix + n.replace(".x.", "."): t for n, t in part(base, "lora_").items()}

    ours.save_pretrained(tmp_path)
    saved = peft.get_peft_model_state_dict(lora.model, adapter_name="x")

    assert theirs.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in theirs.items())
    own = {f"base_model.model.{name}" for name in part(base, "adaption_")}
    assert own == load_file(tmp_path / "adapter_model.safetensors").keys()
    # Ours was made over theirs, which its record of the base tells.
    with pytest.warns(SurgeryWarning, match="trained for another base"):
        AdaptionPromptModel.from_pretrained(again, tmp_path).unload()
    Lora(way, again)
    again.load_state_dict(part(base, "lora_"), strict=False)
    assert torch.equal(expected, run(AdaptionPromptModel.from_pretrained(again, tmp_path)))


@pytest.mark.peft
@pytest.mark.parametrize("ours_is_first", [False, True])
@either_order
@every_way
def test_what_leaves_first_leaves_the_other_as_it_was(way, order, ours_is_first):
    base, lora, ours = both(way, order)
    with ours.disable_adapter():
        theirs, modules, keys = run(base), list(base.named_modules()), list(base.state_dict())

    if ours_is_first:
        assert base is ours.unload()
        assert torch.equal(theirs, run(base))
        assert modules == list(base.named_modules())
        assert keys == list(base.state_dict())
        trainable = {name for name, p in base.named_parameters() if p.requires_grad}
        assert part(base, "lora_").keys() == trainable
    # What is injected without a wrapper cannot be removed.
    if way != "injected":
        lora.choose(None)
        expected = run(base, trains=True)
        lora.choose("x")
        base.delete_adapter("x") if way == "transformers" else lora.model.unload()
        assert torch.equal(expected, run(base, trains=True))
        ours.unload()
        assert torch.equal(run(build()), run(base))
        assert not part(base, "adaption_") | part(base, "lora_")


@pytest.mark.peft
@pytest.mark.parametrize("where", ["active", "stored", "disabled"])
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@either_order
def test_merged_lora_holds_for_prompts_used_before(order, merge, where):
    """A prompt was used with the old weights, was somewhere meanwhile, and is used with the new."""
    base = build()
    lora = Lora("wrapped", base) if order == "before ours" else None
    ours = adapt_twice(base)
    run(base)
    if where != "active":
        ours.set_adapter("other") if where == "stored" else ours.disable_adapter_layers()

    lora = lora or Lora("wrapped", base)
    expected = formula(*doubles(ours, lora)).logits
    getattr(lora.model, merge)()
    ours.set_adapter("default")
    ours.enable_adapter_layers()

    assert relative_error(run(base), expected) < FLOAT32


HOOKS = {
    "after": ("forward_hook", {}),
    "after, first": ("forward_hook", {"prepend": True}),
    "after, always": ("forward_hook", {"always_call": True, "with_kwargs": True}),
    "before": ("forward_pre_hook", {}),
    "before, first": ("forward_pre_hook", {"prepend": True, "with_kwargs": True}),
    "backward": ("full_backward_hook", {}),
    "before backward": ("full_backward_pre_hook", {}),
}
every_hook = pytest.mark.parametrize("hook", HOOKS)
PLACES = {
    "layer": lambda base, *_: base.model.layers[1],
    "query": lambda base, *_: base.model.layers[1].self_attn.q_proj,
    "attention": lambda base, *_: base.model.layers[1].self_attn,
    "attention held since before": lambda _, held, __: held,
    "attention of a stored adapter": lambda _, held, ours: (
        [*ours.adapter_modules(ours.swap_state.stored[0]).values()][-1] if ours else held
    ),
}
NUM_STATES = 6
TWO = Shape(layers=2)


def life(base, *, opens=True):
    """Bring a base to each state there is, and yield our two adapters where they are on it."""
    yield None
    config = AdaptionPromptConfig(**CONFIG)
    ours = AdaptionPromptModel(base, {"a": config, "b": config}, "a")
    for seed, name in enumerate("ab" if opens else ""):
        open_gates_(ours.adapter_modules(name), seed=seed)
    yield ours
    for step in ("set_adapter", "disable_adapter_layers", "enable_adapter_layers"):
        getattr(ours, step)(*(["b"] if step == "set_adapter" else []))
        yield ours
    ours.unload()
    yield None


def there_and_back(base):
    """Return logits, and the gradient of their squares for the embeddings."""
    embeddings = torch.arange(240, dtype=base.dtype).sin().view(2, 5, 24).requires_grad_()
    logits = base(inputs_embeds=embeddings, use_cache=False).logits
    logits.square().mean().backward()
    return logits.detach(), embeddings.grad


@pytest.mark.parametrize("place", PLACES)
@every_hook
def test_hooks_fire_once_in_a_pass_until_they_are_removed(hook, place):
    """Registered in each state, one of them removed in each state after that."""
    (method, options), calls = HOOKS[hook], []
    for start in range(NUM_STATES):
        base, handles = build(shape=TWO), {}
        held = base.model.layers[1].self_attn
        for state, ours in enumerate(life(base)):
            if state == start:
                register = getattr(PLACES[place](base, held, ours), f"register_{method}")
                for number in range(start, NUM_STATES):
                    handles[number] = register(lambda *_, n=number: calls.append(n), **options)
            calls.clear()
            there_and_back(base)
            assert list(handles) == sorted(calls), (start, state)
            if "always_call" in options:
                failing = held.o_proj.register_forward_pre_hook(lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    run(base)
                failing.remove()
                assert 2 * len(handles) == len(calls), (start, state)
            if handles:
                handles.pop(state).remove()


def change(module, hook):
    """Register two hooks that change every number they can, and whose order matters."""
    method, options = HOOKS[hook]
    results = {"full_backward_hook": slice(1, 2), "forward_pre_hook": slice(1, 3)}

    def act(by, *given):
        given = given[results.get(method, slice(-1, None))]
        new = tree_map(lambda v: by * v + 0.1 if isinstance(v, torch.Tensor) else v, given)
        return new if len(new) > 1 else new[0]

    register = getattr(module, f"register_{method}")
    return [register(lambda *given, by=by: act(by, *given), **options) for by in (0.5, 2)]


@pytest.mark.parametrize("place", ["layer", "query", "attention"])
@pytest.mark.parametrize("when", ["before ours", "while active"])
@every_hook
def test_what_hooks_change_is_changed_in_the_formula(hook, when, place):
    base, double = build(shape=TWO), build(shape=TWO, dtype=torch.float64)
    handles = change(PLACES[place](base), hook) if when == "before ours" else []
    ours = adapt(base)
    handles = handles or change(PLACES[place](base), hook)
    with reference(ours, double), torch.enable_grad():
        plain = there_and_back(double)
        change(PLACES[place](double), hook)
        expected = there_and_back(double)

    actual = there_and_back(base)
    for handle in handles:
        handle.remove()
    for results, references in ((actual, expected), (there_and_back(base), plain)):
        assert relative_error(results[0], references[0]) < FLOAT32
        assert relative_error(results[1], references[1]) < GRADIENT
    # The attention is called with keywords, which these two are not given.
    if (hook, place) not in {("before", "attention"), ("backward", "attention")}:
        assert max(map(relative_error, plain, expected)) > 0.01


@pytest.mark.parametrize("start", range(NUM_STATES))
def test_recordings_under_closed_gates_are_the_bases(start):
    """From each state on: transformers puts its hooks in place when first asked for a recording."""
    options = {"output_attentions": True, "output_hidden_states": True, "use_cache": False}
    base, twin = (build(shape=TWO, backend="eager") for _ in "ab")
    expected = twin(IDS, **options)
    for state, _ in enumerate(life(base, opens=False)):
        if state >= start:
            actual = base(IDS, **options)
            for kind, count in (("attentions", 2), ("hidden_states", 3)):
                assert count == len(actual[kind])
                assert all(map(torch.equal, expected[kind], actual[kind]))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_recorded_hidden_states_agree_with_the_formula(backend):
    options = {"output_hidden_states": True, "use_cache": False}
    ours = adapt(build(backend=backend))
    with reference(ours, build(dtype=torch.float64)) as model, torch.no_grad():
        expected = model(IDS, **options).hidden_states
        actual = ours(IDS, **options).hidden_states
    assert all(relative_error(*two) < FLOAT32 for two in zip(actual, expected, strict=True))
