"""One test for each known defect of PEFT 0.21.2's adaption prompts, run on ours and on PEFT.

The same code runs on both, since the names are the same; PEFT's run is a strict xfail. The table in
`docs/reference/peft-deviations.md` is made of the docstrings here.
"""

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.families import Shape, build, gpt2, tokens
from support.reference import reference_model
from surgery_adaption_prompt import (
    AdaptionPromptConfig,
    AdaptionPromptModel,
    get_peft_model,
    load_state_,
)
from torch import nn

from surgery_core import OptionsError, StateError, SurgeryError

pytestmark = [
    pytest.mark.peft,
    # peft 0.21.2 and its dependencies warn about themselves; their warnings are not ours to mend.
    pytest.mark.filterwarnings("ignore"),
]

SHAPE = Shape(heads=4, kv_heads=2, head_dim=6)
FLOAT32 = 1e-5
NOT_RAISED = pytest.fail.Exception
"""What `pytest.raises` raises when nothing was raised."""

OURS = SimpleNamespace(
    Config=AdaptionPromptConfig,
    get_peft_model=get_peft_model,
    from_pretrained=AdaptionPromptModel.from_pretrained,
    load_into=lambda model, name, state: load_state_(model.adapter_modules(name), state),
)
PEFT = SimpleNamespace(
    Config=peft.AdaptionPromptConfig,
    get_peft_model=peft.get_peft_model,
    from_pretrained=peft.PeftModel.from_pretrained,
    load_into=lambda model, name, state: peft.set_peft_model_state_dict(
        model, {f"base_model.model.{key}": t for key, t in state.items()}, adapter_name=name
    ),
)

NOT_APPLICABLE = {
    9: "`save_pretrained` takes no `state_dict`: each adapter is saved from its own tensors.",
    16: "Both return the base's attention weights; the refusal that PEFT misspells would be wrong. "
    "`tests/interop/test_backends.py` compares them.",
}


def deviation(number, *, raises=AssertionError):  # noqa: ARG001 (read by docs/make_tables.py)
    """Run a test on ours, where it passes, and on PEFT, where it must fail."""
    fails = pytest.mark.xfail(strict=True, raises=raises, reason="PEFT 0.21.2")
    return pytest.mark.parametrize(
        "side", [pytest.param(OURS, id="ours"), pytest.param(PEFT, id="peft", marks=fails)]
    )


def config(side, **fields):
    return side.Config(**{"adapter_len": 4, "adapter_layers": 2, "task_type": "CAUSAL_LM"} | fields)


def adapt(side, base=None, *, name="default", **fields):
    """Put one adapter with open gates on a model."""
    model = side.get_peft_model(base or build(shape=SHAPE, seed=1), config(side, **fields), name)
    open_(model)
    return model.eval()


def open_(model, value=0.7):
    """Open the gates of the adapter that is in the model."""
    with torch.no_grad():
        for parameter in ours_in(model, "adaption_gate").values():
            parameter.fill_(value)


def ours_in(model, ending="adaption_"):
    """Return the parameters in the model that an adapter added."""
    return {name: p for name, p in model.named_parameters() if ending in name.rpartition(".")[2]}


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=tokens() if ids is None else ids).logits


def error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@deviation(1)
def test_an_untrained_adapter_leaves_a_biased_output_projection_alone(side):
    """An untrained adapter equals the base where `o_proj` has a bias.

    PEFT adds the bias twice.
    """
    base = build(shape=Shape(heads=4, kv_heads=2, head_dim=6, attention_bias=True), seed=1)
    expected = logits(base)

    actual = logits(side.get_peft_model(base, config(side)))

    assert error(actual, expected) < FLOAT32


@deviation(2)
def test_gpt2_follows_the_formula(side):
    """On GPT-2 the prompt's term goes through the output projection, as in the paper.

    PEFT adds it after that. Folders that PEFT wrote for GPT-2 keep PEFT's meaning here.
    """
    base = gpt2().double()
    reference = copy.deepcopy(base)
    model = adapt(side, base, dtype="float64") if side is OURS else adapt(side, base)
    actual = logits(model)

    prompts = [p[0] for p in ours_in(model, "adaption_prompt").values()]
    attentions = [block.attn for block in reference.transformer.h[-2:]]
    gates = torch.full((4,), 0.7, dtype=torch.float64)
    adapters = {a: (p.detach(), gates) for a, p in zip(attentions, prompts, strict=True)}
    with reference_model(reference, adapters, scaling=6**-0.5):
        expected = logits(reference)

    assert error(actual, expected) < FLOAT32


@deviation(3, raises=RuntimeError)
def test_heads_need_not_add_up_to_the_hidden_size(side):
    """Models whose heads are wider or narrower than the hidden size are adapted.

    PEFT takes `k_proj`'s input over its output for the number of query groups and fails.
    """
    base = build(shape=Shape(hidden=20, heads=4, kv_heads=2, head_dim=8), seed=1)
    expected = logits(base)

    assert error(logits(adapt(side, base)), expected) > FLOAT32


@deviation(4, raises=TypeError)
def test_gates_can_differ_from_head_to_head(side):
    """`gate="head"` gives each head a gate, as the paper and LLaMA-Adapter have it.

    PEFT has one for a layer.
    """
    model = adapt(side, gate="head")

    assert {(4,)} == {tuple(p.shape) for p in ours_in(model, "adaption_gate").values()}


@deviation(5, raises=AttributeError)
def test_an_adapter_is_loaded_to_be_trained(side, tmp_path):
    """`load_adapter(..., is_trainable=True)` loads an adapter and keeps it trainable.

    PEFT raises AttributeError.
    """
    adapt(side).save_pretrained(tmp_path)
    model = adapt(side, name="other")

    model.load_adapter(tmp_path, "default", is_trainable=True)

    model.set_adapter("default")
    assert all(parameter.requires_grad for parameter in ours_in(model).values())


@deviation(6)
def test_a_loaded_adapter_is_frozen(side, tmp_path):
    """An adapter loaded for inference is frozen, and nothing else is.

    PEFT looks for the adapter's name in parameter names, where it never is.
    """
    adapt(side).save_pretrained(tmp_path)

    model = side.from_pretrained(build(shape=SHAPE, seed=1), tmp_path)

    assert not any(parameter.requires_grad for parameter in ours_in(model).values())


@deviation(7)
def test_inactive_adapters_follow_the_model(side):
    """Adapters that are not in the model follow its `.to()`, `.half()` and `.cuda()`.

    PEFT keeps them in a plain dictionary.
    """
    model = adapt(side)
    model.add_adapter("fr", config(side))

    model.to(torch.float64).set_adapter("fr")

    assert {torch.float64} == {parameter.dtype for parameter in ours_in(model).values()}


@deviation(8)
def test_saving_while_disabled_saves_the_adapter(side, tmp_path):
    """`save_pretrained` inside `disable_adapter()` writes the adapter.

    PEFT writes an empty file without a word.
    """
    model = adapt(side)
    with model.disable_adapter():
        model.save_pretrained(tmp_path)

    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 4


@deviation(10)
def test_adapters_by_row_are_not_ignored(side):
    """`adapter_names=[...]` gives each row of a batch an adapter of its own, or none.

    PEFT drops the argument and runs every row on the active adapter.
    """
    base = build(shape=SHAPE, seed=1)
    expected = logits(base)
    model = adapt(side, base)
    adapted = logits(model)

    with torch.no_grad():
        actual = model(input_ids=tokens(), adapter_names=["__base__", "default"]).logits

    assert torch.equal(expected[0], actual[0])
    assert error(actual[1], adapted[1]) < FLOAT32


@deviation(11)
def test_a_state_is_loaded_into_the_adapter_named(side):
    """Tensors loaded for an inactive adapter go into that adapter.

    PEFT's `set_peft_model_state_dict` writes them into the active one.
    """
    model = adapt(side)
    model.add_adapter("fr", config(side))
    expected = logits(model)
    fqns = [f"model.layers.{layer}.self_attn" for layer in (1, 2)]
    state = {f"{fqn}.adaption_prompt": torch.ones(1, 4, 24) for fqn in fqns}
    state |= {f"{fqn}.adaption_gate": torch.ones(1) for fqn in fqns}

    side.load_into(model, "fr", state)

    assert torch.equal(expected, logits(model))
    model.set_adapter("fr")
    assert all(bool((p == 1).all()) for p in ours_in(model).values())


@deviation(12, raises=NOT_RAISED)
def test_missing_tensors_are_reported(side, tmp_path):
    """A file that lacks tensors is refused, with all of them named.

    PEFT keeps the random ones.
    """
    adapt(side).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    state.pop("base_model.model.model.layers.2.self_attn.adaption_prompt")
    save_file(state, path, metadata={"format": "pt"})

    with pytest.raises((StateError, RuntimeError), match=r"model\.layers\.2.*adaption_prompt"):
        side.from_pretrained(build(shape=SHAPE, seed=1), tmp_path)


@deviation(13)
def test_an_adapter_that_cannot_be_added_changes_nothing(side):
    """If adding an adapter fails, the active one stays and the model computes what it did.

    PEFT has taken the active one out by then, and wrapped some modules.
    """
    model = adapt(side)
    expected = logits(model)

    with pytest.raises((SurgeryError, AttributeError)):
        model.add_adapter("fr", config(side, target_modules="mlp"))

    assert torch.equal(expected, logits(model))


@deviation(14, raises=NOT_RAISED)
def test_no_layers_are_not_all_layers(side):
    """`adapter_layers=0` is refused.

    PEFT adapts every layer.
    """
    with pytest.raises((OptionsError, ValueError)):
        adapt(side, adapter_layers=0)


@deviation(15)
def test_adapters_of_half_precision_models_are_float32(side):
    """Prompts and gates are float32 over a bfloat16 base, unless asked otherwise.

    PEFT creates them in bfloat16.
    """
    model = adapt(side, build(shape=SHAPE, seed=1, dtype=torch.bfloat16))

    assert {torch.float32} == {parameter.dtype for parameter in ours_in(model).values()}


@deviation(17, raises=TypeError)
def test_adapted_attention_is_called_as_the_base_is(side):
    """An adapted attention takes positional arguments and has the attributes of the base's.

    PEFT's takes keywords only, and hides `q_proj`, `layer_idx` and the rest.
    """
    base = build(shape=SHAPE, seed=1)
    hidden = torch.randn(2, 5, 24)
    positions = base.model.rotary_emb(hidden, torch.arange(5)[None])
    attention = adapt(side, base).get_base_model().model.layers[2].self_attn

    output, _ = attention(hidden, positions, None)

    assert output.shape == hidden.shape
    assert (attention.layer_idx, attention.q_proj.out_features) == (2, 24)


@deviation(18)
def test_the_bases_keys_stay(side):
    """Every key of the base's state dict stays while an adapter is in it, and `unload` removes it.

    PEFT renames `self_attn.q_proj` to `self_attn.model.q_proj`, and cannot unload.
    """
    base = build(shape=SHAPE, seed=1)
    before, expected = base.state_dict(), logits(base)

    model = adapt(side, base)

    assert before.keys() <= base.state_dict().keys()
    assert base is model.unload()
    assert list(before) == list(base.state_dict())
    assert torch.equal(expected, logits(base))


@deviation(19)
def test_a_classification_head_is_trained_and_saved(side, tmp_path):
    """With `task_type="SEQ_CLS"` the head is trained, saved and loaded with the adapter.

    PEFT leaves it frozen and does not save it.
    """

    def base():
        torch.manual_seed(0)
        sizes = build(shape=SHAPE).config.to_dict()
        settings = transformers.LlamaConfig(**{**sizes, "num_labels": 3, "architectures": None})
        return transformers.LlamaForSequenceClassification(settings).eval()

    model = adapt(side, base(), task_type="SEQ_CLS")
    head = {name: p for name, p in model.named_parameters() if ".score." in name}
    assert any(parameter.requires_grad for parameter in head.values())
    with torch.no_grad():
        for parameter in head.values():
            parameter.add_(1)
    expected = logits(model)
    model.save_pretrained(tmp_path)

    assert torch.equal(expected, logits(side.from_pretrained(base(), tmp_path)))


@deviation(20, raises=NOT_RAISED)
def test_a_base_that_changed_underneath_is_noticed(side):
    """If an attention module was replaced while the adapter was out, putting it back raises.

    PEFT puts the module it saw first back, silently.
    """
    base = build(shape=SHAPE, seed=1)
    model = adapt(side, base)
    context = model.disable_adapter()
    context.__enter__()
    base.model.layers[2].self_attn = build(shape=SHAPE, seed=2).model.layers[2].self_attn

    with pytest.raises(RuntimeError, match="drifted"):
        context.__exit__(None, None, None)


@deviation(21)
def test_no_adapter_is_active_after_the_last_was_deleted(side):
    """After the last adapter is deleted none is active, and the model is the base.

    PEFT's `active_adapter` names an adapter without a configuration.
    """
    model = adapt(side)

    model.delete_adapter("default")

    assert model.active_adapter is None


@deviation(22)
def test_names_of_adapters_may_be_names_of_modules(side, tmp_path):
    """An adapter may be called like a part of an FQN, `self_attn` for example.

    PEFT strips that part from the keys it saves.
    """
    name = "self_attn"
    model = adapt(side, name=name)
    expected = logits(model)
    model.save_pretrained(tmp_path)

    loaded = side.from_pretrained(build(shape=SHAPE, seed=1), tmp_path / name, name)

    assert torch.equal(expected, logits(loaded))


@deviation(23)
def test_nothing_is_projected_twice(side):
    """Each adapted layer runs `q_proj` and `o_proj` once, `k_proj` and `v_proj` once more for the prompt.

    PEFT runs each of the first two twice, and `v_proj` three times.
    """
    model = adapt(side, adapter_layers=1)
    calls = []
    for name, module in model.named_modules():
        if name.endswith("_proj") and ".layers.2." in name and isinstance(module, nn.Linear):
            last = name.rpartition(".")[2]
            module.register_forward_hook(lambda *_, last=last: calls.append(last))

    logits(model)

    attention = sorted(call for call in calls if call[1] == "_" and call[0] in "qkvo")
    assert ["k_proj"] * 2 + ["o_proj", "q_proj"] + ["v_proj"] * 2 == attention


class PackedLinear(nn.Module):
    """A quantised layer as GPTQ and AWQ have them: only buffers, and no `weight`."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scales", scale)

    def forward(self, hidden):
        return hidden @ (self.qweight.to(hidden.dtype) * self.scales.to(hidden.dtype)).T


@deviation(24, raises=(AttributeError, StopIteration))
def test_projections_need_no_weight(side):
    """Projections without a `weight`, as GPTQ and AWQ have them, are used as they are.

    PEFT reads `q_proj.weight.dtype`.
    """
    base = build(shape=SHAPE, seed=1)
    for layer in base.model.layers:
        for name, linear in list(layer.self_attn.named_children()):
            setattr(layer.self_attn, name, PackedLinear(linear))
    expected = logits(base)

    model = side.get_peft_model(base, config(side))

    assert torch.equal(expected, logits(model))
    open_(model)
    assert error(logits(model), expected) > FLOAT32
