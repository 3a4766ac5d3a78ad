"""PEFT 0.21.2 as an oracle: same numbers, same folders; where it deviates, a strict xfail says so."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.families import Shape, build, open_gates_, tokens
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel, adapter_state

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.peft,
    # peft 0.21.2 and its dependencies warn about themselves; their warnings are not ours to mend.
    pytest.mark.filterwarnings("ignore"),
]

FLOAT32 = 1e-5
"""Relative to the largest logit: we add before `o_proj`, PEFT after it, so roundings differ."""

EVEN = Shape(heads=4, kv_heads=2, head_dim=6)
SHAPES = [
    EVEN,
    Shape(heads=4, kv_heads=4, head_dim=6),
    Shape(heads=6, kv_heads=1, head_dim=4),
    Shape(heads=6, kv_heads=3, head_dim=4, layers=4),
]
"""Grouped, multi-head and multi-query attention; heads * head_dim is the hidden size, since PEFT's
head arithmetic fails otherwise."""


def peft_model(base, *, length=5, layers=2, seed=0, name="default"):
    """Wrap a model with PEFT, gates open and different in each layer."""
    config = peft.AdaptionPromptConfig(
        adapter_len=length, adapter_layers=layers, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config, adapter_name=name).eval()
    open_peft_gates_(model, seed)
    return model


def open_peft_gates_(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("adaption_gate"):
                parameter.copy_(torch.rand(1) + 0.5)


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_a_peft_folder_gives_pefts_logits(family, shape, padded, tmp_path):
    base = build(family, shape, seed=1)
    ids = tokens(2, 8)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3] = 0
    theirs = peft_model(copy.deepcopy(base), layers=shape.layers - 1)
    with torch.no_grad():
        plain = base(ids, attention_mask=mask).logits
        expected = theirs(input_ids=ids, attention_mask=mask).logits
    theirs.save_pretrained(tmp_path)

    ours = AdaptionPromptModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        actual = ours(ids, attention_mask=mask).logits

    assert relative_error(expected[mask.bool()], plain[mask.bool()]) > 0.01
    assert relative_error(actual[mask.bool()], expected[mask.bool()]) < FLOAT32


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_peft_loads_our_folder_and_gives_our_logits(family, tmp_path):
    base = build(family, EVEN, seed=1)
    ids = tokens()
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    ours = AdaptionPromptModel(copy.deepcopy(base), {"default": config, "fr": config}, "default")
    for seed, name in enumerate(("default", "fr")):
        open_gates_(ours.adapter_modules(name), seed=seed)
    ours.save_pretrained(tmp_path)

    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    theirs.load_adapter(tmp_path / "fr", "fr")

    for name in ("default", "fr"):
        ours.set_adapter(name)
        theirs.set_adapter(name)
        with torch.no_grad():
            expected, actual = ours(ids).logits, theirs(input_ids=ids).logits
        assert relative_error(actual, expected) < FLOAT32


def test_folders_have_the_same_files_keys_and_fields(tmp_path):
    base = build(shape=EVEN, seed=1)
    theirs = peft_model(copy.deepcopy(base))
    theirs.save_pretrained(tmp_path / "theirs")
    AdaptionPromptModel.from_pretrained(base, tmp_path / "theirs").save_pretrained(
        tmp_path / "ours"
    )

    expected = load_file(tmp_path / "theirs/adapter_model.safetensors")
    actual = load_file(tmp_path / "ours/adapter_model.safetensors")
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name])
    fields = [
        json.loads((tmp_path / side / "adapter_config.json").read_text())
        for side in ("theirs", "ours")
    ]
    # PEFT fills in the attention modules' name, and stamps its own version.
    assert fields[0].pop("peft_version") == peft.__version__
    assert fields[0] == fields[1]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_gradients_agree(family, tmp_path):
    """One step from the same adapter gives the same gradients for prompts and gates."""
    base = build(family, EVEN, seed=1)
    ids = tokens()
    theirs = peft_model(copy.deepcopy(base))
    theirs.save_pretrained(tmp_path)
    ours = AdaptionPromptModel.from_pretrained(base, tmp_path, is_trainable=True)

    theirs(input_ids=ids, labels=ids).loss.backward()
    ours(ids, labels=ids).loss.backward()

    expected = {
        key.removeprefix("base_model.model."): parameter.grad
        for key, parameter in theirs.named_parameters()
        if "adaption_" in key
    }
    actual = {
        f"{fqn}.{name}": getattr(module, name).grad
        for fqn, module in ours.adapter_modules("default").items()
        for name in ("adaption_prompt", "adaption_gate")
    }
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        assert relative_error(actual[name], gradient) < 1e-4


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="PEFT 0.21.2 adds o_proj's bias twice (tuners/adaption_prompt/layer.py, forward)",
)
def test_peft_untrained_equals_the_base_with_an_attention_bias():
    base = build(shape=replace(EVEN, attention_bias=True), seed=1)
    ids = tokens()
    with torch.no_grad():
        expected = base(ids).logits
        config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
        actual = peft.get_peft_model(base, config)(input_ids=ids).logits

    assert relative_error(actual, expected) < FLOAT32


@pytest.mark.xfail(
    strict=True,
    raises=RuntimeError,
    reason="PEFT 0.21.2 takes hidden_size / kv width for the number of query groups",
)
def test_peft_runs_where_the_heads_are_not_the_hidden_size():
    base = build(shape=Shape(hidden=20, heads=4, kv_heads=2, head_dim=8), seed=1)

    peft_model(base)(input_ids=tokens())


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="PEFT 0.21.2 keeps inactive adapters in a plain dictionary, which .to() does not reach",
)
def test_peft_inactive_adapters_follow_the_model():
    theirs = peft_model(build(shape=EVEN, seed=1))
    config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=3, task_type="CAUSAL_LM")
    theirs.add_adapter("fr", config)

    theirs.to(torch.bfloat16).set_adapter("fr")

    assert {torch.bfloat16} == {
        parameter.dtype for name, parameter in theirs.named_parameters() if "adaption_" in name
    }


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="PEFT 0.21.2 wraps the attention as a child, which renames every key below it",
)
def test_peft_keeps_the_bases_keys():
    base = build(shape=EVEN, seed=1)
    before = set(base.state_dict())

    peft_model(base)

    assert before <= set(base.state_dict())


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="PEFT 0.21.2 takes the active adapter out before it knows that the new one can be made",
)
def test_peft_keeps_the_active_adapter_when_adding_another_fails():
    theirs = peft_model(build(shape=EVEN, seed=1))
    ids = tokens()
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        config = peft.AdaptionPromptConfig(
            adapter_len=3, adapter_layers=1, target_modules="mlp", task_type="CAUSAL_LM"
        )
        with pytest.raises(AttributeError):
            theirs.add_adapter("fr", config)
        actual = theirs(input_ids=ids).logits

    assert torch.equal(expected, actual)


def test_ours_keeps_the_active_adapter_when_adding_another_fails():
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=1)
    ours = AdaptionPromptModel(build(shape=EVEN, seed=1), {"default": config}, "default")
    open_gates_(ours.adapter_modules("default"))
    ids = tokens()
    with torch.no_grad():
        expected = ours(ids).logits
        with pytest.raises(LookupError, match="target_modules 'mlp' names no attention module"):
            ours.add_adapter("fr", replace(config, target_modules="mlp"))
        actual = ours(ids).logits

    assert torch.equal(expected, actual)


def test_ours_holds_where_peft_deviates(tmp_path):
    """Both cases above, with the adapter open: equal to what the same adapter gives in float64."""
    shape = Shape(hidden=20, heads=4, kv_heads=2, head_dim=8, attention_bias=True)
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=2)
    ids = tokens()
    results = []
    for dtype in (torch.float32, torch.float64):
        model = AdaptionPromptModel(
            build(shape=shape, dtype=dtype, seed=1), {"default": config}, "default"
        )
        if results:
            model.unload()
            model = AdaptionPromptModel.from_pretrained(model.get_base_model(), tmp_path)
        else:
            open_gates_(model.adapter_modules("default"))
            model.save_pretrained(tmp_path)
        with torch.no_grad():
            results.append(model(ids).logits.double())

    assert relative_error(*results) < FLOAT32


def test_state_of_an_adapter_loaded_from_peft_is_pefts(tmp_path):
    """Two adapters in one PEFT model, saved with one of them active, keep their own tensors."""
    theirs = peft_model(build(shape=EVEN, seed=1))
    theirs.add_adapter(
        "fr", peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=3, task_type="CAUSAL_LM")
    )
    theirs.set_adapter("fr")
    open_peft_gates_(theirs, seed=7)
    theirs.save_pretrained(tmp_path)

    ours = AdaptionPromptModel.from_pretrained(build(shape=EVEN, seed=1), tmp_path)
    ours.load_adapter(tmp_path / "fr", "fr")

    lengths = {
        name: {module.adaption_prompt.shape[1] for module in ours.adapter_modules(name).values()}
        for name in ("default", "fr")
    }
    assert lengths == {"default": {5}, "fr": {3}}
    stored = load_file(tmp_path / "fr/adapter_model.safetensors")
    for name, tensor in adapter_state(ours.adapter_modules("fr")).items():
        assert torch.equal(stored[f"base_model.model.{name}"], tensor)
