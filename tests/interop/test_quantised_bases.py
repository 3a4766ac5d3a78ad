"""Over a quantised base, keys and values of the prompt come from its modules, never from weights."""

from importlib import import_module

import numpy as np
import pytest
import torch
from support.adapted import (
    FLOAT32,
    adapt,
    build,
    flip_gates_,
    reference_logits,
    relative_error,
)
from support.families import VOCAB, Shape, tokens
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

SHAPE = Shape(hidden=64, head_dim=16)
"""Quantisation goes by groups of 32 input features, or 64."""

BFLOAT16 = 0.04
"""Relative to the largest logit: a rounding to 8 bits in each of some twenty steps."""

# Four-bit layers on the CPU must give a multiple of 32 features, which the MLPs here do not.
SKIPPED = ["lm_head", "embed_out", r".*\.mlp\."]

INT8_ACTIVATIONS = 0.05
"""Relative to the largest logit: bitsandbytes rounds each input of a linear layer to 8 bits too."""

noisy = pytest.mark.filterwarnings("ignore")
"""For libraries that warn about torch, and about kernels they do not have."""


def logits(model, ids):
    return model(ids, use_cache=False).logits


def linears(model):
    """Return the linear layers that are quantised: all but the head."""
    return {
        fqn: module
        for fqn, module in model.named_modules()
        if hasattr(module, "in_features") and "lm_head" not in fqn
    }


def dequantised(quantised, family):
    """Return a float64 model that computes with the values a quantised one stands for.

    They are found by what each layer answers to unit vectors, whatever its weight looks like.
    """
    exact = build(family, SHAPE, dtype=torch.float64)
    with torch.no_grad():
        for fqn, module in linears(quantised).items():
            unit = torch.eye(module.in_features, dtype=quantised.dtype)
            zero = module(torch.zeros_like(unit)).double()
            weight = (module(unit).double() - zero).T
            exact.get_submodule(fqn).weight.copy_(weight)
    return exact


def check(quantised, base, *, tolerance, family="llama", trains=True):
    """Hold a quantised model to the reference: untrained, open, disabled, and its gradients.

    That the base is quantised is checked too: it does not give the logits it was built to give.

    Args:
        quantised: Not adapted yet, or adapted with open gates.
        base: The same values in float64, not adapted.
        tolerance: Relative to the largest logit.
        family: Of both.
        trains: Whether the quantised layers let gradients through.
    """
    ids = tokens(2, 9)
    original = build(family, SHAPE, dtype=torch.float64)
    if not isinstance(quantised, AdaptionPromptModel):
        with torch.no_grad():
            unadapted = logits(quantised.requires_grad_(False), ids)
            config = AdaptionPromptConfig(adapter_len=4, adapter_layers=3, gate="head")
            untrained = AdaptionPromptModel(quantised, {"a": config}, "a")
            assert torch.equal(unadapted, logits(untrained, ids))
            untrained.unload()
        quantised = adapt(quantised)
        with torch.no_grad(), quantised.disable_adapter():
            assert torch.equal(unadapted, logits(quantised, ids))
    expected = reference_logits(quantised, base, ids, family=family, shape=SHAPE)
    exact = reference_logits(quantised, original, ids, family=family, shape=SHAPE)
    with torch.no_grad():
        actual = logits(quantised, ids)

    assert relative_error(actual, expected) < tolerance
    assert relative_error(expected, exact) > 1e-3
    if trains:
        logits(quantised, ids).float().logsumexp(-1).sum().backward()
        for module in quantised.adapter_modules("default").values():
            for parameter in (module.adaption_prompt, module.adaption_gate):
                assert torch.float32 is parameter.dtype
                assert torch.isfinite(parameter.grad).all()
                assert parameter.grad.any()
    flip_gates_(quantised)
    with torch.no_grad():
        assert relative_error(logits(quantised, ids), expected) > 2 * tolerance


# -- any quantisation -----------------------------------------------------------------------------


class Codes(nn.Module):
    """A linear layer of int8 codes, as GPTQ and AWQ have them: buffers, no `weight`, no parameter."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("offset", None if linear.bias is None else linear.bias.detach())

    def forward(self, hidden):
        weight = self.codes.to(hidden.dtype) * self.scale
        return nn.functional.linear(hidden, weight, self.offset)


def into_codes_(model):
    for fqn, module in linears(model).items():
        model.set_submodule(fqn, Codes(module))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "gpt_neox"])
def test_a_base_without_weights_agrees_with_the_formula(family):
    quantised = build(family, SHAPE)
    into_codes_(quantised)

    check(quantised, dequantised(quantised, family), tolerance=FLOAT32, family=family)


def test_a_base_whose_weights_are_replaced_under_the_adapter_agrees_with_the_formula():
    model = build("llama", SHAPE)
    adapted = adapt(model)
    with torch.no_grad():
        # What is kept from this pass must not outlive the weights.
        logits(adapted, tokens())
    into_codes_(model)

    check(adapted, dequantised(model, "llama"), tolerance=FLOAT32)


# -- torchao --------------------------------------------------------------------------------------


def torchao_config(kind):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    if kind == "int8":
        return quantization.Int8WeightOnlyConfig()
    if kind == "int4":
        granularity = import_module("torchao.quantization.granularity").PerGroup(16)
        return quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity)
    # The layout that torchao has for the CPU, which cannot be turned back into numbers.
    name = "torchao.prototype.quantization.int4"
    return pytest.importorskip(name).PrototypeInt4WeightOnlyConfig(group_size=32)


@noisy
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)], ids=str
)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["int8", "int4", "int4 packed"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_torchao_weights_agree_with_the_formula(family, kind, when, dtype, tolerance):
    """Quantised before the base is adapted, or under the adapter."""
    config = torchao_config(kind)
    quantize_ = import_module("torchao.quantization").quantize_
    model = build(family, SHAPE, dtype=dtype)
    chosen = set(linears(model))
    if kind == "int4 packed":
        chosen = {fqn for fqn in chosen if linears(model)[fqn].in_features % 32 == 0}
    adapted = adapt(model) if when == "after" else model
    with torch.no_grad():
        # What is kept from this pass must not outlive the weights.
        logits(adapted, tokens())

    quantize_(model, config, filter_fn=lambda _, fqn: fqn in chosen)

    check(
        adapted,
        dequantised(model, family),
        tolerance=tolerance,
        family=family,
        # torch has no derivative for the packed layout.
        trains=kind != "int4 packed",
    )


@noisy
def test_a_model_loaded_with_torchao_agrees_with_the_formula(tmp_path):
    config = TorchAoConfig(torchao_config("int8"), modules_to_not_convert=["lm_head"])
    build("llama", SHAPE).save_pretrained(tmp_path)

    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32
    ).eval()

    assert "Int8Tensor" == type(model.model.layers[0].self_attn.k_proj.weight).__name__
    check(model, dequantised(model, "llama"), tolerance=FLOAT32)


# -- bitsandbytes ---------------------------------------------------------------------------------


BITSANDBYTES = {
    "8bit": ("Linear8bitLt", {"load_in_8bit": True}),
    "4bit": (
        "Linear4bit",
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.float32,
        },
    ),
}


@noisy
@pytest.mark.parametrize(
    ("bits", "mode", "tolerance"),
    [
        ("8bit", "eval", INT8_ACTIVATIONS),
        ("4bit", "train", FLOAT32),
        # On processors with bfloat16 it multiplies in it when nothing trains, whatever it was
        # told, and lets no gradient through from then on.
        ("4bit", "eval", BFLOAT16),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_a_model_loaded_with_bitsandbytes_agrees_with_the_formula(
    family, bits, mode, tolerance, tmp_path
):
    """On the CPU; the wheel brings code for it."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    build(family, SHAPE).save_pretrained(tmp_path)
    name, options = BITSANDBYTES[bits]
    config = BitsAndBytesConfig(**options, llm_int8_skip_modules=SKIPPED)

    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32, device_map="cpu"
    ).train(mode == "train")

    assert {name} == {type(m).__name__ for fqn, m in linears(model).items() if "mlp" not in fqn}
    check(
        model,
        dequantised(model, family),
        tolerance=tolerance,
        family=family,
        trains=(bits, mode) != ("4bit", "eval"),
    )


# -- GGUF -----------------------------------------------------------------------------------------

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(model, path):
    """Write a Llama to a GGUF file, with about four bits for each weight."""
    gguf = import_module("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCAB)
    for key, tensor in model.state_dict().items():
        name = key.removesuffix(".weight")
        if name not in GGUF_NAMES:
            _, _, layer, inner = name.split(".", 3)
            name = f"blk.{layer}.{GGUF_NAMES[inner]}.weight"
        else:
            name = f"{GGUF_NAMES[name]}.weight"
        values = tensor.numpy().astype(np.float32)
        if values.ndim == 1 or values.shape[1] % 32:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_model_loaded_from_gguf_agrees_with_the_formula(tmp_path):
    original = build("llama", SHAPE)
    write_gguf(original, tmp_path / "model.gguf")

    model, base = (
        AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="model.gguf", dtype=torch.float32
        ).eval()
        for _ in range(2)
    )

    change = model.model.layers[0].self_attn.v_proj.weight
    change = (change - original.model.layers[0].self_attn.v_proj.weight).abs().max()
    assert 0.001 < change < 0.1
    check(model, base.double(), tolerance=FLOAT32)
