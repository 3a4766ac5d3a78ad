"""Compiled and exported models, hot swaps without recompilation, and how far gradients go."""

import pytest
import torch
from support.caches import with_cache
from support.families import build, open_gates_, tokens
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel, adapter_state
from transformers import StaticCache

from surgery_core import OptionsError, StateError

A = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, gate="head")
IDS = tokens()

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    # Of transformers' own collector of outputs.
    "ignore:While compiling, we found certain side effects:UserWarning",
)


class Counting:
    """A backend for `torch.compile` that counts graphs and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def model():
    model = AdaptionPromptModel(build(seed=1), {"a": A, "b": A}, "a").eval()
    for seed, name in enumerate("ab"):
        open_gates_(model.adapter_modules(name), seed=seed)
    return model


def close(actual, expected):
    return bool((actual - expected).abs().max() < 1e-5 * expected.abs().max())


@pytest.mark.slow
def test_a_hundred_switches_compile_nothing_anew(model):
    """One graph without a break serves both adapters, and eager calls between them."""
    backend = Counting()
    base = model.get_base_model()
    compiled = torch.compile(base, fullgraph=True, backend=backend)
    with torch.no_grad():
        expected = {}
        for name in "ab":
            model.set_adapter(name)
            expected[name] = base(IDS).logits
        assert not close(expected["a"], expected["b"])
        for count in range(100):
            name = "ab"[count % 2]
            model.set_adapter(name)
            assert close(compiled(IDS).logits, expected[name])

    assert 1 == backend.graphs


@pytest.mark.slow
def test_decoding_with_a_static_cache_is_two_graphs(model):
    backend = Counting()
    base = model.get_base_model()
    compiled = torch.compile(base, fullgraph=True, backend=backend)

    def decoded(call):
        cache = StaticCache(config=base.config, max_cache_len=16)
        parts = [call(IDS[:, :3], **with_cache(cache), use_cache=True).logits]
        for at in range(3, IDS.shape[1]):
            out = call(IDS[:, at : at + 1], **with_cache(cache), use_cache=True)
            parts.append(out.logits)
        return torch.cat(parts, dim=1)

    with torch.no_grad():
        for name in "abab":
            model.set_adapter(name)
            assert close(decoded(compiled), base(IDS).logits)

    # The prefill and the steps after it.
    assert 2 == backend.graphs


@pytest.mark.slow
def test_hot_swaps_compile_nothing_anew_and_keep_every_parameter(model, tmp_path):
    model.save_pretrained(tmp_path)
    backend = Counting()
    base = model.get_base_model()
    compiled = torch.compile(base, fullgraph=True, backend=backend)
    parameters = [id(parameter) for parameter in base.parameters()]
    with torch.no_grad():
        expected = {}
        for name in "ab":
            model.set_adapter(name)
            expected[name] = base(IDS).logits
        model.set_adapter("a")
        for count in range(100):
            name = "ba"[count % 2]
            model.hotswap_adapter(tmp_path / name, "a")
            assert close(compiled(IDS).logits, expected[name])
            assert torch.equal(base(IDS).logits, expected[name])

    assert 1 == backend.graphs
    assert parameters == [id(parameter) for parameter in base.parameters()]


def test_an_inactive_adapter_is_hot_swapped_too(model, tmp_path):
    model.save_pretrained(tmp_path)

    model.hotswap_adapter(tmp_path / "a", "b")

    first, second = (adapter_state(model.adapter_modules(name)) for name in "ab")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert "a" == model.active_adapter


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"adapter_len": 4}, StateError, "mismatched"),
        ({"adapter_layers": 3}, StateError, "unexpected"),
        ({"gate_activation": "tanh"}, OptionsError, "expected the same 'gate_activation'"),
        ({"gate": "layer"}, OptionsError, "expected the same 'gate', got 'layer'"),
    ],
)
def test_what_cannot_take_an_adapters_place_changes_nothing(
    model, fields, error, message, tmp_path
):
    other = AdaptionPromptConfig(**{"adapter_len": 3, "adapter_layers": 2, "gate": "head"} | fields)
    model.add_adapter("c", other)
    model.save_pretrained(tmp_path)
    before = {k: t.clone() for k, t in adapter_state(model.adapter_modules("a")).items()}

    with pytest.raises(error, match=message):
        model.hotswap_adapter(tmp_path / "c", "a")

    after = adapter_state(model.adapter_modules("a"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert A == model.peft_config["a"]


@pytest.mark.slow
def test_training_compiles_whole(model):
    expected = model(IDS, labels=IDS).loss
    expected.backward()
    gate = model.get_base_model().model.layers[-1].self_attn.adaption_gate
    gradient, gate.grad = gate.grad, None
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")

    compiled(IDS, labels=IDS).loss.backward()

    assert close(gate.grad, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_agrees(model, strict):
    base = model.get_base_model()
    with torch.no_grad():
        program = torch.export.export(base, (IDS,), {"use_cache": False}, strict=strict)
        actual = program.module()(tokens(seed=5), use_cache=False).logits

        assert close(actual, base(tokens(seed=5), use_cache=False).logits)
    names = set(program.state_dict)
    assert "model.layers.2.self_attn.adaption_prompt" in names


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_gradients_stop_at_the_first_adapted_layer(model, is_checkpointed):
    """The layers below it are not differentiated, nor is the input of the first adapted one."""
    base = model.get_base_model()
    model.train()
    if is_checkpointed:
        model.activation_checkpointing_enable()
    seen = {}
    for layer, module in enumerate(base.model.layers):
        module.register_forward_hook(
            lambda _, args, output, layer=layer: seen.update(
                {layer: (args[0].requires_grad, output.requires_grad)}
            )
        )

    model(IDS, labels=IDS).loss.backward()

    assert {0: (False, False), 1: (False, True), 2: (True, True)} == seen
    for module in model.adapter_modules("a").values():
        assert module.adaption_gate.grad.any()
        assert module.adaption_prompt.grad.any()


def test_reentrant_checkpointing_keeps_its_inputs_gradient(model):
    """It computes gradients only where an input has one."""
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": True})

    model(IDS, labels=IDS).loss.backward()

    assert all(m.adaption_gate.grad.any() for m in model.adapter_modules("a").values())


def test_checkpointing_changes_no_gradient(model):
    grads = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.activation_checkpointing_enable()
        model.train()
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        modules = model.adapter_modules("a").values()
        grads.append(torch.cat([m.adaption_prompt.grad.flatten() for m in modules]))

    assert grads[0].any()
    assert torch.equal(*grads)


def test_little_is_kept_for_the_gradient_of_a_prompt(model):
    """Beside what the base keeps: queries, the term, and a number for each query."""

    def kept(run):
        storages = {}

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            run()
        return sum(storages.values())

    ids = tokens(4, 32)
    base = model.get_base_model()
    adapted = kept(lambda: base(ids, use_cache=False))
    with model.disable_adapter():
        hidden = base.model.embed_tokens(ids).detach().requires_grad_()
        plain = kept(lambda: base(inputs_embeds=hidden, use_cache=False))
    # Query and term of two layers, float32, with room for keys, values and the log-sum-exp.
    width = base.config.num_attention_heads * base.config.head_dim
    assert adapted - plain < 2 * 3 * ids.numel() * width * 4
