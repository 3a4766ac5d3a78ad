"""Keys and values kept from one pass to the next are never those of before a change."""

import copy

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.families import build, gpt2, open_gates_, tokens
from surgery_adaption_prompt import (
    AdaptedAttention,
    AdaptionPromptConfig,
    AdaptionPromptModel,
    adapter_state,
    load_state_,
)
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

A = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, gate="head")
IDS = tokens()


def make(base=None):
    model = AdaptionPromptModel(base or build(seed=1), {"a": A, "b": A}, "a").eval()
    for seed, name in enumerate("ab"):
        open_gates_(model.adapter_modules(name), seed=seed)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def top(model):
    return model.get_base_model().model.layers[-1].self_attn


def is_baked(model):
    return top(model).parts[0].kept is not None


def noise_(tensor):
    with torch.no_grad():
        tensor.add_(torch.randn(tensor.shape), alpha=0.5)


def step(model, optimizer, **options):
    """Train for a step, without leaving eval mode."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer(trained, lr=0.3, **options)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def with_lora(model):
    config = peft.LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model.get_base_model())


def replace_parameter(model):
    linear = top(model).v_proj
    linear.weight = nn.Parameter(torch.randn_like(linear.weight), requires_grad=False)


def replace_child(model):
    top(model).k_proj = nn.Linear(24, top(model).k_proj.out_features, bias=False)


def patch_forward(model):
    linear = top(model).k_proj
    linear.forward = lambda hidden: 2 * nn.Linear.forward(linear, hidden)


def load_base(model):
    base = model.get_base_model()
    state = {name: tensor + 0.2 for name, tensor in base.state_dict().items() if "k_proj" in name}
    base.load_state_dict(state, strict=False)


def data_there_and_back(model):
    """Two assignments, after which new storage may lie where the first lay."""
    prompt = top(model).adaption_prompt
    for _ in range(2):
        prompt.data = torch.randn_like(prompt)


CHANGES = {
    "prompt in place": lambda m: noise_(top(m).adaption_prompt),
    "gate in place": lambda m: noise_(top(m).adaption_gate),
    "key weights in place": lambda m: noise_(top(m).k_proj.weight),
    "value weights in place": lambda m: noise_(top(m).v_proj.weight),
    "adapter loaded": lambda m: load_state_(
        m.adapter_modules("a"), {k: t + 1 for k, t in adapter_state(m.adapter_modules("a")).items()}
    ),
    "base loaded": load_base,
    "SGD": lambda m: step(m, torch.optim.SGD),
    "AdamW": lambda m: step(m, torch.optim.AdamW, foreach=True),
    "fused AdamW": lambda m: step(m, torch.optim.AdamW, fused=True),
    "float64 and back": lambda m: (noise_(top(m).adaption_gate), m.double(), logits(m), m.float()),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "base alone to bfloat16": lambda m: m.get_base_model().to(torch.bfloat16),
    "data assigned": data_there_and_back,
    "parameter replaced": replace_parameter,
    "projection replaced": replace_child,
    "projection patched": patch_forward,
    "hook on a projection": lambda m: top(m).k_proj.register_forward_hook(lambda *a: 2 * a[2]),
    "hook before a projection": lambda m: top(m).v_proj.register_forward_pre_hook(
        lambda _, a: (2 * a[0],)
    ),
    "parametrized": lambda m: nn.utils.parametrizations.weight_norm(top(m).k_proj),
    "LoRA on keys and values": with_lora,
    "another adapter": lambda m: m.set_adapter("b"),
    "another adapter and back": lambda m: (
        m.set_adapter("b"),
        noise_(m.adapter_modules("a")["model.layers.2.self_attn"].adaption_gate),
        m.set_adapter("a"),
    ),
    "changed while out": lambda m: (
        m.disable_adapter_layers(),
        noise_(m.get_base_model().model.layers[-1].self_attn.k_proj.weight),
        m.enable_adapter_layers(),
    ),
    "trained in training mode": lambda m: (
        m.train(),
        step(m, torch.optim.AdamW, fused=True),
        m.eval(),
    ),
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_nothing_stale_is_used_after_a_change(change):
    model = make()
    before = logits(model)
    assert is_baked(model)

    change(model)

    # A copy has nothing baked.
    fresh = copy.deepcopy(model)
    assert top(fresh).parts[0].kept is None
    expected = logits(fresh)
    assert not torch.equal(before, expected)
    assert torch.equal(expected, logits(model))
    assert torch.equal(expected, logits(model))


@given(names=st.lists(st.sampled_from(sorted(set(CHANGES) - {"parametrized"})), max_size=6))
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*already found.*:UserWarning")
def test_nothing_stale_is_used_after_any_changes(names):
    model = make()
    for name in names:
        logits(model)
        # Some changes exclude each other: a projection that LoRA wraps has no weight to replace.
        try:
            CHANGES[name](model)
        except (AttributeError, RuntimeError):
            return
        assert torch.equal(logits(copy.deepcopy(model)), logits(model)), name


def test_a_hook_for_all_modules_is_noticed():
    model = make()
    logits(model)
    handle = register_module_forward_hook(
        lambda module, _, output: 2 * output if module is top(model).k_proj else None
    )
    try:
        assert not is_baked(copy.deepcopy(model))
        with torch.no_grad():
            actual = model(IDS).logits
        assert not is_baked(model)
    finally:
        handle.remove()
    assert not torch.equal(actual, logits(model))


def projections_of(model, run):
    """Return how often the prompt of the top layer is projected while `run` runs."""
    counts = []
    project = type(top(model).architecture).project

    def counting(self, attention, prompt, *, head_dim):
        counts.append(attention)
        return project(self, attention, prompt, head_dim=head_dim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(top(model).architecture), "project", counting)
        run()
    return sum(attention is top(model) for attention in counts)


def test_the_prompt_is_projected_once_for_many_passes():
    model = make()

    assert 1 == projections_of(model, lambda: [logits(model) for _ in range(4)])
    assert 0 == projections_of(
        model, lambda: model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4)
    )


def test_an_adapter_that_comes_back_is_projected_once():
    """The base may have been written to meanwhile in ways that PyTorch does not count."""
    model = make()
    logits(model)
    model.set_adapter("b")
    logits(model)
    model.set_adapter("a")

    assert 1 == projections_of(model, lambda: [logits(model) for _ in range(3)])


@pytest.mark.parametrize(
    "run",
    [
        lambda m: m(IDS),
        lambda m: logits(m.train()),
        torch.autocast("cpu", dtype=torch.bfloat16)(logits),
    ],
    ids=["with gradients", "in training", "under autocast"],
)
def test_otherwise_it_is_projected_every_time(run):
    model = make()

    assert 3 == projections_of(model, lambda: [run(model) for _ in range(3)])
    assert not is_baked(model)


def test_a_base_that_trains_is_not_baked():
    model = make()
    model.get_base_model().requires_grad_(True)

    assert 2 == projections_of(model, lambda: [logits(model) for _ in range(2)])


def test_parameters_made_in_inference_mode_are_not_baked():
    with torch.inference_mode():
        model = make()
        assert 2 == projections_of(model, lambda: [logits(model) for _ in range(2)])


def test_inference_mode_may_bake_for_later():
    model = make()
    with torch.inference_mode():
        expected = model(IDS).logits.clone()

    assert is_baked(model)
    assert torch.equal(expected, logits(model))
    model(IDS, labels=IDS).loss.backward()
    assert top(model).adaption_gate.grad.any()


def test_gates_too_large_for_the_values_are_not_folded_in():
    """A value of 4 times a gate of 6e4 is not finite in float16; the term may be."""
    base = build(seed=1, dtype=torch.float16)
    model = make(base)
    with torch.no_grad():
        top(model).adaption_gate.fill_(6e4)

    with torch.no_grad():
        model(IDS)

    assert not is_baked(model)


def test_gpt2_is_baked_too():
    base = gpt2()
    model = AdaptionPromptModel(base, {"a": A}, "a")
    open_gates_(model.adapter_modules("a"))
    trained = model(IDS).logits

    assert torch.allclose(trained, logits(model), atol=1e-5)
    attention = base.transformer.h[-1].attn
    assert isinstance(attention, AdaptedAttention)
    assert attention.parts[0].kept is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 5])
def test_baked_and_computed_agree(dtype, length):
    """One token goes another way than several; rows differ."""
    ids = tokens(3, length)
    model = make(build(seed=1, dtype=dtype))
    computed = model(ids).logits.detach()
    with torch.no_grad():
        baked = model(ids).logits

    assert is_baked(model)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 0.05)
    assert (computed - baked).abs().max() <= tolerance * computed.abs().max()
