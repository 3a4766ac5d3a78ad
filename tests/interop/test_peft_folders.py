"""Folders that mean something else to PEFT than to us: GPT-2, old files, and what PEFT cannot have."""

import copy
import json
import pickle

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.caches import cache_of, with_cache
from support.families import Shape, build, gpt2, open_gates_, tokens
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from surgery_adaption_prompt.architectures import architecture_of
from surgery_adaption_prompt.config import OWN_TYPE

from surgery_core import OptionsError, StateError, SurgeryError

pytestmark = [
    pytest.mark.peft,
    # peft 0.21.2 and its dependencies warn about themselves; their warnings are not ours to mend.
    pytest.mark.filterwarnings("ignore"),
]

FLOAT32 = 1e-5
EVEN = Shape(heads=4, kv_heads=2, head_dim=6)
FIELDS = {"adapter_len": 4, "adapter_layers": 2, "task_type": "CAUSAL_LM"}


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def peft_gpt2(base):
    model = peft.get_peft_model(base, peft.AdaptionPromptConfig(**FIELDS)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adaption_gate"):
                parameter.fill_(torch.rand(()).item() + 0.5)
    return model


@pytest.mark.parametrize("fields", [{}, {"scale_attn_by_inverse_layer_idx": True}])
def test_a_gpt2_folder_of_pefts_keeps_pefts_meaning(fields, tmp_path):
    base = gpt2(**fields)
    theirs = peft_gpt2(copy.deepcopy(base))
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")

    ours = AdaptionPromptModel.from_pretrained(base, tmp_path / "theirs", is_trainable=True)

    assert not ours.peft_config["default"].project_output
    assert error(logits(ours), expected) < FLOAT32
    # And back: PEFT reads what we write of it.
    ours.save_pretrained(tmp_path / "ours", for_peft=True)
    again = peft.PeftModel.from_pretrained(gpt2(**fields), tmp_path / "ours")
    assert error(logits(again), expected) < FLOAT32
    # An adapter beside it, loaded while this one is active, has the same meaning.
    ours.load_adapter(tmp_path / "theirs", "fr")
    assert not ours.peft_config["fr"].project_output


def test_an_adapter_after_the_projection_decodes_trains_and_copies(tmp_path):
    theirs = peft_gpt2(gpt2())
    theirs.save_pretrained(tmp_path)
    ours = AdaptionPromptModel.from_pretrained(gpt2(), tmp_path, is_trainable=True)
    ids = tokens()

    with torch.no_grad():
        out = ours(ids[:, :4], use_cache=True)
        rest = ours(ids[:, 4:], **with_cache(cache_of(out)), use_cache=True)
        stepwise = torch.cat([out.logits, rest.logits], dim=1)
    assert error(stepwise, logits(ours)) < FLOAT32
    assert torch.equal(logits(copy.deepcopy(ours)), logits(ours))
    theirs(input_ids=ids, labels=ids).loss.backward()
    ours(ids, labels=ids).loss.backward()
    gradients = [p.grad for name, p in theirs.named_parameters() if "adaption_gate" in name]
    for gradient, module in zip(gradients, ours.adapter_modules("default").values(), strict=True):
        assert error(module.adaption_gate.grad, gradient) < 1e-4


def test_an_untrained_adapter_after_the_projection_changes_nothing():
    base = gpt2()
    expected = logits(base)
    config = AdaptionPromptConfig(**FIELDS, project_output=False)

    assert torch.equal(expected, logits(AdaptionPromptModel(base, {"a": config}, "a")))


def test_our_gpt2_adapters_are_the_papers_and_stay_so(tmp_path):
    ours = AdaptionPromptModel(gpt2(), {"default": AdaptionPromptConfig(**FIELDS)}, "default")
    open_gates_(ours.adapter_modules("default"))
    expected = logits(ours)
    ours.save_pretrained(tmp_path)

    loaded = AdaptionPromptModel.from_pretrained(gpt2(), tmp_path)

    assert torch.equal(expected, logits(loaded))
    with pytest.raises((ValueError, KeyError), match=OWN_TYPE):
        peft.PeftModel.from_pretrained(gpt2(), tmp_path)


def test_a_gpt2_that_reorders_its_attention_is_refused():
    base = gpt2(reorder_and_upcast_attn=True)

    with pytest.raises(TypeError, match="GPT2Attention, which does more by that function's name"):
        architecture_of(base.transformer.h[0].attn, fqn="transformer.h.0.attn")


def wrapped(base=None, *, equal=False, **fields):
    """Return a model with one adapter whose gates differ from head to head, or are equal."""
    config = AdaptionPromptConfig(**FIELDS, **fields)
    model = AdaptionPromptModel(base or build(shape=EVEN, seed=1), {"default": config}, "default")
    open_gates_(model.adapter_modules("default"))
    if equal:
        with torch.no_grad():
            for layer, module in enumerate(model.adapter_modules("default").values(), start=1):
                module.adaption_gate.fill_(0.4 * layer)
    return model


SCORED = {"modules_to_save": ["lm_head"]}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: wrapped(gate="head"), "PEFT has one gate for a layer, not one for each head"),
        (lambda: wrapped(**SCORED), "PEFT saves no whole modules with adaption prompts"),
        (
            lambda: wrapped(build(shape=Shape(heads=4, kv_heads=2, head_dim=6, attention_bias=True))),
            "PEFT adds the output projection's bias a second time",
        ),
        (
            lambda: wrapped(build(shape=Shape(hidden=20, heads=4, kv_heads=2, head_dim=8))),
            "PEFT expects num_attention_heads * head_dim to be hidden_size",
        ),
        (
            lambda: wrapped(build("qwen3", EVEN)),
            "PEFT has no adaption prompts for Qwen3Attention",
        ),
        (lambda: wrapped(gpt2()), "PEFT adds GPT-2's term after the output projection"),
        (
            lambda: wrapped(project_output=False),
            "PEFT sends the term through the output projection of LlamaAttention",
        ),
    ],
)  # fmt: skip
def test_what_peft_cannot_have_is_refused_with_the_reason(make, reason, tmp_path):
    model = make()

    with pytest.raises(StateError, match="Adapter 'default' cannot be written for PEFT") as caught:
        model.save_pretrained(tmp_path, for_peft=True)

    assert (reason,) == caught.value.mismatched
    assert [] == list(tmp_path.iterdir())
    # Without that wish it is written so that PEFT does not take it for what it is not.
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert OWN_TYPE == config["peft_type"]
    with pytest.raises((ValueError, KeyError), match=OWN_TYPE):
        peft.PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("activation", ["identity", "tanh"])
@pytest.mark.parametrize("gate", ["layer", "head"])
def test_what_peft_can_have_is_said_in_its_terms(gate, activation, tmp_path):
    model = wrapped(equal=True, gate=gate, gate_activation=activation)
    expected = logits(model)

    model.save_pretrained(tmp_path, for_peft=True)

    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {(1,)} == {tuple(t.shape) for name, t in stored.items() if name.endswith("gate")}
    theirs = peft.PeftModel.from_pretrained(build(shape=EVEN, seed=1), tmp_path)
    assert error(logits(theirs), expected) < FLOAT32
    assert error(logits(theirs), logits(build(shape=EVEN, seed=1))) > 0.01
    # What is in the model has not changed.
    assert gate == model.peft_config["default"].gate
    assert torch.equal(expected, logits(model))


def test_tanh_alone_is_not_left_to_peft(tmp_path):
    wrapped(gate_activation="tanh").save_pretrained(tmp_path)

    with pytest.raises((ValueError, KeyError), match=OWN_TYPE):
        peft.PeftModel.from_pretrained(build(shape=EVEN, seed=1), tmp_path)


def test_pefts_pickled_file_is_read_as_tensors(tmp_path):
    base = build(shape=EVEN, seed=1)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.AdaptionPromptConfig(**FIELDS)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("adaption_gate"):
                parameter.fill_(0.6)
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "adapter_model.safetensors").exists()

    ours = AdaptionPromptModel.from_pretrained(base, tmp_path)

    assert error(logits(ours), logits(theirs)) < FLOAT32


class _Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_pickled_file_is_not_run(tmp_path):
    wrapped().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    bait = tmp_path / "bait"
    path = tmp_path / "adapter_model.bin"
    for write in (torch.save, lambda value, where: where.write_bytes(pickle.dumps(value))):
        write({"base_model.model.x": _Touches(bait)}, path)

        with pytest.raises(SurgeryError, match="nothing in the file was run"):
            AdaptionPromptModel.from_pretrained(build(shape=EVEN, seed=1), tmp_path)
        assert not bait.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "expected tensors by name, got list"),
        ({"a": 1}, "expected tensors by name, got something else under 'a'"),
        ({1: torch.ones(1)}, "expected tensors by name, got something else under 1"),
    ],
)
def test_a_pickled_file_of_something_else_is_refused(content, message, tmp_path):
    wrapped().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(content, tmp_path / "adapter_model.bin")

    with pytest.raises(SurgeryError, match=message):
        AdaptionPromptModel.from_pretrained(build(shape=EVEN, seed=1), tmp_path)


def test_damaged_pickled_files_are_errors_of_ours(tmp_path):
    wrapped().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    path = tmp_path / "adapter_model.bin"
    torch.save({"base_model.model.x": torch.ones(3)}, path)
    whole = path.read_bytes()
    for content in (b"", b"PK", whole[:40], whole[: len(whole) // 2], whole[10:], b"x" * 64):
        path.write_bytes(content)

        with pytest.raises(SurgeryError, match="cannot be read"):
            AdaptionPromptModel.from_pretrained(build(shape=EVEN, seed=1), tmp_path)


def test_another_methods_folder_is_refused(tmp_path):
    base = build(shape=EVEN, seed=1)
    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2)).save_pretrained(tmp_path)

    with pytest.raises(OptionsError):
        AdaptionPromptModel.from_pretrained(base, tmp_path)
