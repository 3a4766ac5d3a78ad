"""The wrapper: shares everything with the base, changes nothing of it, survives copies."""

import copy
import pickle

import pytest
import torch
from support.families import Shape, build, open_gates_, tokens
from surgery_adaption_prompt import AdaptedAttention, AdaptionPromptConfig, AdaptionPromptModel
from surgery_adaption_prompt.architectures import enable_checkpointing
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

CONFIG = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, gate="head")


@pytest.fixture
def base():
    return build(shape=Shape(attention_bias=True))


@pytest.fixture
def adapted(base):
    model = AdaptionPromptModel(base, {"default": CONFIG}, "default")
    open_gates_(model.adapter_modules("default"))
    return model


def first(adapted):
    return adapted.get_base_model().model.layers[1].self_attn


def test_base_fqns_stay_and_two_are_added(base):
    before = list(base.state_dict())

    AdaptionPromptModel(base, {"default": CONFIG}, "default")

    added = {
        f"model.layers.{layer}.self_attn.adaption_{name}"
        for layer in (1, 2)
        for name in ("prompt", "gate")
    }
    assert added == set(base.state_dict()) - set(before)
    assert before == [key for key in base.state_dict() if key not in added]


def test_the_wrapper_is_a_base_attention_and_shows_its_attributes(adapted):
    module = first(adapted)

    assert isinstance(module, AdaptedAttention)
    assert isinstance(module, LlamaAttention)
    assert "AdaptedLlamaAttention" == type(module).__name__
    assert 1 == module.layer_idx
    assert module.q_proj is module.base_attention.q_proj


def test_modules_of_one_class_have_one_class(adapted):
    modules = list(adapted.adapter_modules("default").values())

    assert type(modules[0]) is type(modules[1])


def test_nothing_is_set_on_the_base_attention(base):
    attention = base.model.layers[2].self_attn
    before = dict(vars(attention))

    model = AdaptionPromptModel(base, {"default": CONFIG}, "default")
    model(tokens())

    assert before.keys() == vars(attention).keys()
    assert all(before[name] is value for name, value in vars(attention).items())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same_and_share_nothing(adapted, duplicate):
    ids = tokens()
    expected = adapted(ids).logits

    other = duplicate(adapted)

    assert torch.equal(expected, other(ids).logits)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(expected, adapted(ids).logits)
    other.unload()
    assert LlamaAttention is type(first(other))


def test_a_copy_swaps_on_its_own(adapted):
    ids = tokens()
    adapted.add_adapter("fr", CONFIG)
    open_gates_(adapted.adapter_modules("fr"), seed=5)
    expected = adapted(ids).logits

    other = copy.deepcopy(adapted)
    other.set_adapter("fr")
    fr = other(ids).logits

    assert not torch.equal(expected, fr)
    assert torch.equal(expected, adapted(ids).logits)
    adapted.set_adapter("fr")
    assert torch.equal(fr, adapted(ids).logits)


def test_a_change_of_backend_reaches_adapted_modules(adapted):
    """Weights come from every layer, adapted or not, and logits stay what they are."""
    ids = tokens()
    expected = adapted(ids).logits
    model = adapted.get_base_model()

    model.set_attn_implementation("eager")
    out = model(ids, output_attentions=True)

    assert 3 == len(out.attentions)
    assert all(weights.shape == (2, 4, 7, 7) for weights in out.attentions)
    assert torch.allclose(expected, out.logits, atol=1e-5)
    assert "eager" == model.config._attn_implementation


def test_attentions_first_asked_for_while_adapted_are_there_afterwards(base):
    """Transformers puts its recording hooks in place once; they are not lost with the wrapper."""
    base.set_attn_implementation("eager")
    ids = tokens()
    model = AdaptionPromptModel(base, {"default": CONFIG}, "default")
    with torch.no_grad():
        adapted = model(ids, output_attentions=True).attentions
        plain = model.unload()(ids, output_attentions=True).attentions

    assert (3, 3) == (len(adapted), len(plain))
    assert torch.equal(plain[0], adapted[0])


def test_replacing_a_projection_while_adapted_lasts(base):
    """What LoRA or a quantiser does to `q_proj` is seen by the wrapper, and by the base later."""
    ids = tokens()
    model = AdaptionPromptModel(base, {"default": CONFIG}, "default")
    before = model(ids).logits
    module = base.get_submodule("model.layers.2.self_attn")

    module.q_proj = nn.Linear(24, 32)
    after = model(ids).logits
    model.unload()

    assert not torch.equal(before, after)
    assert torch.equal(after, base(ids).logits)


def test_hooks_fire_once_and_stay(base):
    attention = base.model.layers[2].self_attn
    calls = []
    handle = attention.register_forward_hook(lambda *_: calls.append("before"))
    model = AdaptionPromptModel(base, {"default": CONFIG}, "default")
    base.model.layers[2].self_attn.register_forward_hook(lambda *_: calls.append("while"))
    ids = tokens()

    model(ids)
    assert ["before", "while"] == calls
    model.unload()
    base(ids)
    assert ["before", "while"] * 2 == calls
    handle.remove()
    base(ids)
    assert ["before", "while"] * 2 + ["while"] == calls


def test_the_mode_set_while_adapted_or_disabled_holds(adapted):
    base = adapted.get_base_model()
    attention = first(adapted).base_attention

    adapted.train()
    assert attention.training
    with adapted.disable_adapter():
        adapted.eval()
    assert not first(adapted).training
    adapted.train()
    adapted.unload()

    assert all(module.training for module in base.modules())


@pytest.mark.slow
def test_the_adapted_model_compiles_without_graph_breaks(adapted):
    ids = tokens()
    with torch.no_grad():
        expected = adapted(ids).logits

        torch._dynamo.reset()
        compiled = torch.compile(adapted.get_base_model(), fullgraph=True, backend="aot_eager")
        actual = compiled(ids).logits

    assert torch.allclose(expected, actual, atol=1e-5)


def test_prompt_gradient_is_zero_at_first_and_the_gates_is_not(base):
    model = AdaptionPromptModel(base, {"default": CONFIG}, "default")
    ids = tokens()

    model(ids, labels=ids).loss.backward()

    for module in model.adapter_modules("default").values():
        assert torch.isfinite(module.adaption_gate.grad).all()
        assert (module.adaption_gate.grad != 0).all()
        assert (module.adaption_prompt.grad == 0).all()
    own = {id(p) for m in model.adapter_modules("default").values() for p in (m.adaption_prompt, m.adaption_gate)}  # fmt: skip
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


def test_an_optimizer_step_shows_in_the_next_forward(adapted):
    """Nothing of the adapter is kept from one training step to the next."""
    ids = tokens()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(4):
        loss = adapted(ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    assert losses == sorted(losses, reverse=True)
    assert 4 == len(set(losses))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(adapted, use_reentrant):
    ids = tokens()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    adapted.train()
    adapted(ids, labels=ids).loss.backward()
    expected = [p.grad.clone() for p in trained]
    base = adapted.get_base_model()
    base.enable_input_require_grads()
    enable_checkpointing(base, {"use_reentrant": use_reentrant})
    adapted.zero_grad()

    adapted(ids, labels=ids).loss.backward()

    for left, right in zip(expected, trained, strict=True):
        assert torch.allclose(left, right.grad, atol=1e-6)


def test_autocast_runs_and_zero_gates_stay_exact(base):
    ids = tokens()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = base(ids).logits
        model = AdaptionPromptModel(base, {"default": CONFIG}, "default")
        untrained = model(ids).logits
        open_gates_(model.adapter_modules("default"))
        opened = model(ids).logits

    assert torch.equal(expected, untrained)
    assert expected.dtype is opened.dtype
    assert not torch.equal(expected, opened)
