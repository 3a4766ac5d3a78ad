"""Prompts' keys and values are as old as the KV cache of a pass, whatever was written in between."""

import copy
import gc
import mmap
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from support.adapted import relative_error
from support.caches import cache_of, with_cache
from support.families import build, gpt2, open_gates_, tokens
from support.reference import reference_model
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import DynamicCache, StaticCache

from surgery_core import ModelRecipe, Session

A = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, gate="head")
IDS = tokens()
LAYER = "model.layers.2.self_attn"
KEYS, VALUES = f"{LAYER}.k_proj.weight", f"{LAYER}.v_proj.weight"
TOLERANCE = 2e-5
"""Relative to the largest logit: three layers of float32 rounding."""


def make(base=None, active="a"):
    model = AdaptionPromptModel(base or build(seed=1), {"a": A, "b": A}, active).eval()
    for seed, name in enumerate("ab"):
        open_gates_(model.adapter_modules(name), seed=seed)
    return model


def top(model):
    return model.get_base_model().get_submodule(LAYER)


def logits(model, ids=IDS, **arguments):
    with torch.no_grad():
        return model(ids, **arguments).logits


def expected_logits(model, name="a", changed=()):
    """Return what the float64 formula gives with the tensors that are there now.

    Args:
        model: Has the tensors.
        name: Adapter that is used.
        changed: Names of weights that act as if they were doubled.
    """
    raw = {
        key.replace("base_layer.", ""): t for key, t in model.get_base_model().state_dict().items()
    }
    base = build(seed=0, dtype=torch.float64)
    base.load_state_dict(
        {key: raw[key].double() * (2 if key in changed else 1) for key in base.state_dict()}
    )
    adapters = {
        base.get_submodule(fqn): (
            module.adaption_prompt.detach().double()[0],
            module.adaption_gate.detach().double(),
        )
        for fqn, module in model.adapter_modules(name).items()
    }
    with torch.no_grad(), reference_model(base, adapters, scaling=8**-0.5):
        return base(IDS, use_cache=False).logits


def all_ways(model):
    """Yield the logits of passes without a cache, and of passes over caches that begin empty."""
    yield logits(model, use_cache=False)
    for at in (1, 4):
        with torch.no_grad():
            out = model(IDS[:, :at])
            parts = [out.logits]
            for place in range(at, IDS.shape[1]):
                out = model(IDS[:, place : place + 1], **with_cache(cache_of(out)))
                parts.append(out.logits)
        yield torch.cat(parts, dim=1)


def check(model, name="a", changed=()):
    expected = expected_logits(model, name, changed)
    for actual in all_ways(model):
        assert relative_error(actual.double(), expected) < TOLERANCE
    return expected


# -- writes ---------------------------------------------------------------------------------------


def prompt_of(model):
    return top(model).adaption_prompt


def train(model, optimizer, **options):
    """Train with a pass without gradients between forward and backward, without leaving eval mode."""
    optimizer = optimizer(model.adapter_parameters(["a"]), lr=0.3, **options)
    loss = model(IDS, labels=IDS).loss
    logits(model)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def train_8bit(model):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    train(model, bitsandbytes.optim.AdamW8bit, min_8bit_size=1)


def train_in_backward(model):
    for parameter in model.adapter_parameters(["a"]):
        optimizer = torch.optim.SGD([parameter], lr=0.3, fused=True)

        def step(parameter, optimizer=optimizer):
            optimizer.step()
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(step)
    model(IDS, labels=IDS).loss.backward()


def swap_averages(model):
    """As evaluation with averaged weights does: their storage comes, and goes again."""
    averages = [p.detach() * 1.5 for p in model.adapter_parameters(["a"])]
    for parameter, average in zip(model.adapter_parameters(["a"]), averages, strict=True):
        parameter.data = average
    logits(model)
    for parameter, average in zip(model.adapter_parameters(["a"]), averages, strict=True):
        parameter.data = average * 2


def write_in_another_process(model):
    tensor = prompt_of(model).data.share_memory_()
    process = torch.multiprocessing.get_context("fork").Process(target=tensor.mul_, args=(3,))
    process.start()
    process.join()


def overwrite_file(model, tmp_path):
    """Map the values projection from a file, and write to the file."""
    weight = top(model).v_proj.weight
    path = tmp_path / "weight"
    path.write_bytes(weight.detach().numpy().tobytes())
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
        weight.data = torch.frombuffer(mapped, dtype=weight.dtype).view(weight.shape)
        logits(model)
        file.write((weight.detach().numpy() * 2).tobytes())


WRITES = {
    "data": lambda m: prompt_of(m).data.mul_(3),
    "data of the base": lambda m: top(m).k_proj.weight.data.mul_(3),
    "numpy": lambda m: prompt_of(m).detach().numpy().__imul__(3),
    "dlpack": lambda m: torch.from_dlpack(prompt_of(m).detach()).mul_(3),
    "set_": torch.no_grad()(lambda m: prompt_of(m).set_(torch.randn(1, 3, 24))),
    "storage": lambda m: (
        top(m)
        .adaption_gate.untyped_storage()
        .copy_(torch.tensor([3.0, 1.0, -2.0, 1.0]).untyped_storage())
    ),
    "swap_tensors": lambda m: torch.utils.swap_tensors(
        prompt_of(m), nn.Parameter(torch.randn(1, 3, 24))
    ),
    "load_state_dict": lambda m: m.load_state_dict(
        {key: t * 1.5 for key, t in m.state_dict().items()}, assign=True
    ),
    "fused AdamW": lambda m: train(m, torch.optim.AdamW, fused=True),
    "AdamW in 8 bits": train_8bit,
    "optimizer in backward": train_in_backward,
    "averages": swap_averages,
    "another process": write_in_another_process,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_of_every_kind_are_seen_by_the_next_pass(write):
    model = make()
    before = check(model)
    gc.disable()
    try:
        write(model)
        after = check(model)
    finally:
        gc.enable()

    assert relative_error(before, after) > 100 * TOLERANCE


def test_a_file_overwritten_under_a_mapped_base_is_seen(tmp_path):
    model = make()
    before = check(model)

    overwrite_file(model, tmp_path)

    assert relative_error(before, check(model)) > 100 * TOLERANCE


class Doubled(nn.Linear):
    """A linear layer of twice its weight."""

    def forward(self, x):
        """Return twice what the layer gave."""
        return 2 * super().forward(x)


def patch_forward(model):
    linear = top(model).k_proj
    linear.forward = lambda hidden: 2 * nn.Linear.forward(linear, hidden)


MODULES = {
    "class": lambda m: setattr(top(m).k_proj, "__class__", Doubled),
    "forward": patch_forward,
    "hook": lambda m: top(m).k_proj.register_forward_hook(lambda *a: 2 * a[2]),
    "pre-hook": lambda m: top(m).k_proj.register_forward_pre_hook(lambda _, a: (2 * a[0],)),
}


@pytest.mark.parametrize("change", MODULES.values(), ids=MODULES)
def test_projections_that_compute_otherwise_are_seen_by_the_next_pass(change):
    model = make()
    before = check(model)

    change(model)

    assert relative_error(before, check(model, changed=[KEYS])) > 100 * TOLERANCE


def merge_peft(base):
    config = peft.LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(base, config).merge_and_unload()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("state", ["active", "other", "disabled", "composed", "merged beside"])
def test_lora_merged_by_peft_is_seen_whatever_was_active(state):
    model = make()
    before = check(model)
    base = model.get_base_model()
    if state == "disabled":
        with model.disable_adapter():
            merge_peft(base)
    else:
        model.set_adapter({"other": "b", "composed": {"a": 0.5, "b": 1.0}}.get(state, "a"))
        merge_peft(base)
        model.set_adapter("a")

    assert relative_error(before, check(model)) > 100 * TOLERANCE


def edited(base):
    options = {"adapter_len": 3, "adapter_layers": 2, "gate": "head"}
    adapters = {name: {"operation": "adaption_prompt", "options": options} for name in "ab"}
    recipe = ModelRecipe.model_validate({"adapters": adapters, "active": "a"})
    found = Session().plan_recipe(base, recipe).apply()
    for seed, name in enumerate("ab"):
        open_gates_(found.variant(name), seed=seed)
    return found


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("state", ["disabled", "paused", "other"])
def test_writes_to_the_base_of_a_recipe_are_seen(state):
    found = edited(build(seed=1))
    base = found.model

    class Facade:
        """What the checks ask for."""

        get_base_model = staticmethod(lambda: base)
        adapter_modules = staticmethod(found.variant)
        __call__ = staticmethod(base)

    model = Facade()
    before = check(model)
    with {"disabled": found.disabled, "paused": found.paused}.get(state, found.paused)():
        merge_peft(base)
        base.get_submodule(LAYER).v_proj.weight.data.mul_(2)
    if state == "other":
        found.set_active("b")
        logits(model)
        found.set_active("a")

    assert relative_error(before, check(model)) > 100 * TOLERANCE


# -- transformed and captured code ----------------------------------------------------------------


class Scaled(nn.Module):
    """Twice a tensor."""

    def forward(self, x):
        """Return it."""
        return 2 * x


def test_parametrized_and_pruned_prompts_and_gates_work_without_gradients():
    model = make()
    parametrize.register_parametrization(top(model), "adaption_gate", Scaled())
    prune.l1_unstructured(top(model), "adaption_prompt", amount=0.5)
    expected = expected_logits(model)
    rows = logits(model, adapter_names=["a", "a"])

    assert relative_error(rows.double(), expected) < TOLERANCE
    for actual in all_ways(model):
        assert relative_error(actual.double(), expected) < TOLERANCE
    assert relative_error(expected_logits(make()), expected) > 100 * TOLERANCE


@pytest.mark.parametrize("use_cache", [False, True])
def test_stacked_adapters_are_vectorised_with_and_without_gradients(use_cache):
    model = make(build(seed=1, backend="eager"))
    own = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
    stacked = {key: torch.stack([p, 2 * p]) for key, p in own.items()}

    def run(parameters):
        arguments = ((IDS,), {"use_cache": use_cache})
        return torch.func.functional_call(model, parameters, *arguments).logits

    logits(model)
    expected = [expected_logits(model)]
    for module in model.adapter_modules("a").values():
        with torch.no_grad():
            module.adaption_prompt.mul_(2)
            module.adaption_gate.mul_(2)
    expected.append(expected_logits(model))
    with torch.no_grad():
        without = torch.vmap(run)(stacked)

    for actual in (without, torch.vmap(run)(stacked).detach()):
        for found, wanted in zip(actual, expected, strict=True):
            assert relative_error(found.double(), wanted) < TOLERANCE


def test_parameters_handed_over_act_on_a_cache_that_others_filled():
    """By `functional_call`, for a single token."""
    ids = IDS
    model = make(build(seed=1, dtype=torch.float64))
    with torch.no_grad():
        past = cache_of(model(ids[:, :-1]))
        twin = copy.deepcopy(past)
        model(ids[:, -1:], **with_cache(copy.deepcopy(past)))
        gates = {
            key: p.detach().flip(0) for key, p in model.named_parameters() if "adaption_gate" in key
        }
        actual = torch.func.functional_call(model, gates, (ids[:, -1:],), with_cache(past)).logits
        for module in model.adapter_modules("a").values():
            module.adaption_gate.copy_(module.adaption_gate.flip(0))
        base, adapters = formula(model)
        with reference_model(base, adapters, scaling=8**-0.5):
            expected = base(ids[:, -1:], **with_cache(twin)).logits

    assert relative_error(actual, expected) < 1e-12


def formula(model):
    base = build(seed=1, dtype=torch.float64)
    return base, {
        base.get_submodule(fqn): (m.adaption_prompt.detach()[0], m.adaption_gate.detach())
        for fqn, m in model.adapter_modules("a").items()
    }


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit.trace
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_traced_module_keeps_its_parameters(warm):
    model = make()

    class Logits(nn.Module):
        """The model, with a tensor as its output."""

        def __init__(self):
            super().__init__()
            self.model = model.get_base_model()

        def forward(self, ids):
            """Return the logits."""
            return self.model(ids, use_cache=False).logits

    with torch.no_grad():
        if warm:
            model(IDS)
        traced = torch.jit.trace(Logits(), IDS, check_trace=False)
        for module in model.adapter_modules("a").values():
            module.adaption_gate.mul_(-2)
        actual = traced(IDS)

    assert relative_error(actual.double(), expected_logits(model)) < TOLERANCE


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")  # of torch's forward-mode AD
def test_terms_have_the_derivatives_that_eager_attention_has():
    """Second derivatives and forward-mode ones, against finite differences of first ones."""
    model = make(build(seed=1, backend="eager", dtype=torch.float64))
    gate = top(model).adaption_gate
    own = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
    name = next(key for key in own if key.endswith(f"{LAYER}.adaption_gate"))

    def loss(value):
        arguments = ((IDS,), {"labels": IDS, "use_cache": False})
        return torch.func.functional_call(model, {**own, name: value}, *arguments).loss

    at, direction = gate.detach(), torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    step = 1e-3  # eager attention takes its softmax in float32
    slopes = [
        torch.autograd.functional.jacobian(loss, at + sign * step * direction) for sign in (1, -1)
    ]
    expected = (slopes[0] - slopes[1]) / (2 * step)
    hessian = torch.autograd.functional.hessian(loss, at)
    _, along = torch.func.jvp(loss, (at,), (direction,))
    with torch.no_grad():
        _, quietly = torch.func.jvp(loss, (at,), (direction,))

    assert torch.allclose(hessian @ direction, expected, rtol=5e-3, atol=1e-4)
    rise = (loss(at + step * direction) - loss(at - step * direction)) / (2 * step)
    assert torch.allclose(along, rise, rtol=5e-3)
    assert torch.equal(along, quietly)


# -- where they are kept --------------------------------------------------------------------------


def projections(model, run):
    """Return how often the prompt of the top layer is projected while `run` runs."""
    count = 0

    def counting(_, args):
        nonlocal count
        count += args[0].shape[:2] == (1, A.adapter_len)

    handle = top(model).k_proj.register_forward_pre_hook(counting)
    try:
        run()
    finally:
        handle.remove()
    return count


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize(
    "cache", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=["", "static"]
)
def test_the_prompt_is_projected_once_for_a_generation(length, cache):
    model, ids = make(), tokens(2, length)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "eos_token_id": None}

    for _ in range(2):
        assert 1 == projections(model, lambda: model.generate(ids, **options, **cache))


def test_nothing_is_kept_without_a_cache_nor_with_gradients():
    model = make()

    assert 3 == projections(model, lambda: [logits(model, use_cache=False) for _ in range(3)])
    past = cache_of(model(IDS[:, :3]))
    assert 2 == projections(
        model, lambda: [model(IDS[:, :1], **with_cache(past)) for _ in range(2)]
    )
    with torch.no_grad():
        past = cache_of(model(IDS[:, :3]))
        assert 0 == projections(model, lambda: model(IDS[:, :1], **with_cache(past)))
    model(IDS[:, :1], **with_cache(past))
    with torch.no_grad():
        assert 1 == projections(model, lambda: model(IDS[:, :1], **with_cache(past)))


def test_a_pass_with_gradients_that_fills_a_cache_leaves_nothing_old_in_it():
    model = make(build(seed=1, dtype=torch.float64))
    past = StaticCache(config=model.config, max_cache_len=16)
    logits(model, IDS[:, :4], **with_cache(past))
    past.reset()
    prompt_of(model).data.mul_(3)
    model(IDS[:, :1].clone(), **with_cache(past))
    actual = logits(model, IDS[:, 1:2], **with_cache(past))
    base, adapters = formula(model)
    with torch.no_grad(), reference_model(base, adapters, scaling=8**-0.5):
        expected = base(IDS[:, :2]).logits[:, 1:]

    assert relative_error(actual, expected) < 1e-12


def test_copies_of_a_cache_have_what_it_keeps_and_pickles_do_not():
    model = make()
    with torch.no_grad():
        past = cache_of(model(IDS))
        expected = model(IDS[:, :1], **with_cache(copy.deepcopy(past))).logits
        assert 0 == projections(model, lambda: model(IDS[:, :1], **with_cache(copy.deepcopy(past))))
        again = pickle.loads(pickle.dumps(past))
        assert 1 == projections(model, lambda: model(IDS[:, :1], **with_cache(again)))
        actual = model(IDS[:, :1], **with_cache(pickle.loads(pickle.dumps(past)))).logits

    assert torch.equal(expected, actual)


def test_a_model_that_was_cached_is_not_kept_alive():
    model = make()
    past = cache_of(model(IDS))
    found = weakref.ref(model.get_base_model())
    logits(model)
    logits(model, IDS[:, :1], **with_cache(past))
    del model, past
    gc.collect()

    assert found() is None


def test_caches_in_threads_do_not_mix():
    """Each thread decodes with an adapter of its own over one model, and a cache of its own."""
    model = make(build(seed=1, dtype=torch.float64))

    def decode(name):
        with torch.no_grad(), model.activated(name):
            past, parts = DynamicCache(config=model.config), []
            for place in range(IDS.shape[1]):
                out = model(IDS[:, place : place + 1], **with_cache(past))
                parts.append(out.logits)
            return torch.cat(parts, dim=1)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(decode, "abab"))

    for name, actual in zip("abab", found, strict=True):
        assert relative_error(actual, expected_logits(model, name)) < 1e-12


@pytest.mark.parametrize("kind", ["one", "rows"])
def test_gpt2_keeps_prompts_too(kind):
    base = gpt2()
    model = AdaptionPromptModel(base, {"a": A, "b": A}, "a").eval()
    for seed, name in enumerate("ab"):
        open_gates_(model.adapter_modules(name), seed=seed)
    rows = {"adapter_names": ["a", "b"]} if kind == "rows" else {}
    with torch.no_grad():
        whole = model(IDS, **rows).logits
        past = cache_of(model(IDS[:, :4], **rows))
        count = 0

        def counting(_, args):
            nonlocal count
            count += args[0].shape[1] == A.adapter_len * (2 if rows else 1)

        base.transformer.h[-1].attn.c_attn.register_forward_pre_hook(counting)
        parts = [
            model(IDS[:, at : at + 1], **with_cache(past), **rows).logits
            for at in range(4, IDS.shape[1])
        ]

    assert 0 == count
    assert torch.allclose(whole[:, 4:], torch.cat(parts, 1), atol=1e-4)
