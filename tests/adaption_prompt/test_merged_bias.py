"""Prompts of one token merged: they follow what changes, are saved whole or not at all, and stay finite."""

import copy

import pytest
import torch
from support.families import WITH_ATTENTION_BIAS, Shape, build, open_gates_, tokens
from support.tiny import tiny_model
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from transformers import AutoModelForCausalLM

from surgery_core import ContractError, StateError

CONFIG = AdaptionPromptConfig(adapter_len=1, adapter_layers=2, gate="head")
CONFIG_OF_ONE = AdaptionPromptConfig(adapter_len=1, adapter_layers=1)
IDS = tokens(2, 6)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def make(family="llama", seed=1, *, config=CONFIG, dtype=torch.float32, **fields):
    base = build(family, Shape(**fields), seed=seed, dtype=dtype)
    model = AdaptionPromptModel(base, {"a": config, "b": config}, "a").eval()
    for seed_of_gates, name in enumerate("ab"):
        open_gates_(model.adapter_modules(name), seed=seed_of_gates)
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def formula(model, weights):
    """Return the logits of a plain float64 model whose output projections have the terms as biases.

    With one token the softmax is 1: the term of head h is `g_h * v` of its key-value head.
    """
    shape = Shape()
    plain = build("llama", shape, dtype=torch.float64)
    own = {k: t for k, t in model.get_base_model().state_dict().items() if "adaption" not in k}
    plain.load_state_dict({k: t.double() for k, t in own.items()})
    for name, weight in weights.items():
        for fqn, module in model.adapter_modules(name).items():
            attention = plain.get_submodule(fqn)
            gates = module.adaption_gate.detach().double().expand(shape.heads) * weight
            values = attention.v_proj.weight @ module.adaption_prompt.detach().double()[0, 0]
            heads = values.view(shape.kv_heads, -1).repeat_interleave(2, 0) * gates[:, None]
            term = attention.o_proj.weight @ heads.flatten()
            old = attention.o_proj.bias
            attention.o_proj.bias = torch.nn.Parameter(term if old is None else old + term)
    return logits(plain)


def close(actual, expected, limit=2e-5):
    assert torch.isfinite(actual).all()
    return bool((actual.double() - expected).abs().max() <= limit * expected.abs().max())


def attention_of(model):
    return model.get_base_model().model.layers[2].self_attn


def load_other_base(model):
    other = build(seed=5).state_dict()
    model.get_base_model().load_state_dict(other, strict=False)


def hot_swap(model, tmp_path):
    other = make(seed=1)
    open_gates_(other.adapter_modules("a"), seed=9, size=2.0)
    other.save_pretrained(tmp_path, selected_adapters=["a"])
    model.hotswap_adapter(tmp_path / "a", "a")


def trained(model):
    """One step of a fused optimizer, which PyTorch does not count as a write."""
    parameters = [
        p for m in model.adapter_modules("a").values() for p in m.prompt_parameters().values()
    ]
    optimizer = torch.optim.AdamW(parameters, lr=0.5, fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


CHANGES = {
    "hot swap": hot_swap,
    "gate": lambda m, _: gate_of(m).data.mul_(-3),
    "prompt": lambda m, _: prompt_of(m).data.add_(0.5),
    "a numpy view of the prompt": lambda m, _: prompt_of(m).detach().numpy().__iadd__(0.5),
    "value projection": lambda m, _: attention_of(m).v_proj.weight.data.mul_(2),
    "output projection": lambda m, _: attention_of(m).o_proj.weight.data.mul_(2),
    "another output projection parameter": lambda m, _: setattr(
        attention_of(m).o_proj, "weight", torch.nn.Parameter(torch.randn(24, 32))
    ),
    "another base": lambda m, _: load_other_base(m),
    "fused optimizer": lambda m, _: trained(m),
    "double": lambda m, _: m.double(),
    "the base alone, double": lambda m, _: m.get_base_model().double(),
}


def gate_of(model):
    return model.adapter_modules("a")["model.layers.2.self_attn"].adaption_gate


def prompt_of(model):
    return model.adapter_modules("a")["model.layers.2.self_attn"].adaption_prompt


@pytest.mark.parametrize("choice", ["a", {"a": 0.5, "b": -2.0}], ids=["one", "composition"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_merged_follows_what_changes(change, choice, tmp_path):
    """Expected of a plain model with the biases written out."""
    model = make()
    weights = {"a": 1.0} if choice == "a" else choice
    model.set_adapter(choice)
    model.merge_adapter()
    before = formula(model, weights)
    assert close(logits(model), before)

    CHANGES[change](model, tmp_path)

    assert close(logits(model), formula(model, weights))
    assert "double" in change or not close(logits(model), before, 1e-3)
    model.unmerge_adapter()
    assert close(logits(model), formula(model, weights))


def test_a_copy_of_a_merged_model_stands_alone():
    model = make()
    model.merge_adapter()
    expected, twin = logits(model), copy.deepcopy(model)

    gate_of(model).data.mul_(-3)

    assert torch.equal(expected, logits(twin))
    assert not close(logits(model), expected.double(), 1e-3)
    assert not {k for k in twin.state_dict() if "adaption" in k or k.endswith("o_proj.bias")}


@pytest.mark.parametrize(
    ("family", "biased"),
    [(family, False) for family in sorted(WITH_ATTENTION_BIAS)] + [("llama", True)],
)
def test_a_merged_model_is_saved_with_its_adapter(family, biased, tmp_path):
    model = make(family, attention_bias=biased)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert close(logits(merged), expected)

    merged.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)

    assert torch.equal(logits(merged), logits(loaded.eval()))
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


@pytest.mark.parametrize("family", ["mistral", "phi3", "qwen2"])
def test_a_merged_model_without_room_for_the_biases_is_not_saved(family, tmp_path):
    model = make(family)
    expected = logits(model)

    merged = model.merge_and_unload()

    assert close(logits(merged), expected)
    for save in (
        lambda: merged.save_pretrained(tmp_path / "new"),
        lambda: merged.save_pretrained(tmp_path / "new", state_dict=merged.state_dict()),
        lambda: copy.deepcopy(merged).save_pretrained(tmp_path / "new"),
        lambda: merged.push_to_hub("someone/something"),
    ):
        with pytest.raises(StateError) as caught:
            save()
    assert not (tmp_path / "new").exists()
    assert str(caught.value) == (
        f"{type(merged).__name__} with a merged adapter is not saved: from_pretrained would drop "
        "the biases of 'model.layers.1.self_attn.o_proj', 'model.layers.2.self_attn.o_proj', and "
        "the adapter with them, since no setting of the configuration makes room for them. Save "
        "the adapter with save_pretrained before merging, and load it with "
        "AdaptionPromptModel.from_pretrained; or keep the model's state_dict() yourself."
    )


@pytest.mark.parametrize("model_type", ["bitnet", "qwen3_next"])
def test_an_output_that_is_gated_or_normed_before_its_projection_is_not_merged(model_type):
    model = AdaptionPromptModel(tiny_model(model_type), {"a": CONFIG_OF_ONE}, "a")
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ContractError, match=r"goes to 'o_proj' as it is, got .* gates or norms"
        ):
            call()
    assert "a" == model.swap_state.active


@pytest.mark.parametrize("value", [float("nan"), 1e9], ids=["nan", "overflow"])
@pytest.mark.parametrize("is_final", [False, True], ids=["merge_adapter", "merge_and_unload"])
def test_biases_that_are_not_finite_are_refused(value, is_final):
    model = make(dtype=torch.float16)
    gate_of(model).data[1] = value
    before = model.get_base_model().state_dict()
    setting = model.get_base_model().config.attention_bias

    with pytest.raises(StateError, match=r"^Nothing was merged: the bias of .*layers\.2\."):
        model.merge_and_unload() if is_final else model.merge_adapter()

    after = model.get_base_model().state_dict()
    assert before.keys() == after.keys()
    assert all(before[key].data_ptr() == after[key].data_ptr() for key in before)
    assert "a" == model.swap_state.active
    assert setting is model.get_base_model().config.attention_bias
