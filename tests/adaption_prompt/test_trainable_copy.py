"""`trainable_copy`, and adapters that bring a module of their own (`modules_to_save`)."""

from dataclasses import replace

import pytest
import torch
import transformers
from support.contracts import SlowToCompile
from support.families import build, open_gates_, randomize_, tokens
from surgery_adaption_prompt import (
    AdaptionPromptConfig,
    AdaptionPromptModel,
    adapter_state,
    load_state_,
)
from torch import nn

from surgery_core import NoMatchError, OptionsError, Rule, Session
from surgery_core.testing import assert_unchanged, snapshot


def classifier():
    config = transformers.LlamaConfig(**{**build().config.to_dict(), "num_labels": 3})
    model = transformers.LlamaForSequenceClassification(config).eval()
    randomize_(model, 1)
    return model


class TestContract(SlowToCompile):
    """The suite of the core, with a head."""

    def make_model(self):
        return classifier()

    def make_aliased_model(self):
        model = classifier()
        return nn.ModuleDict({"first": model, "second": model})

    def rules(self):
        return [Rule(operation="trainable_copy", options={"modules": ["score", "norm"]})]

    def run(self, model):
        return model(input_ids=tokens()).logits


HEAD = AdaptionPromptConfig(adapter_len=2, adapter_layers=1, modules_to_save=["score"])
AUTO = AdaptionPromptConfig(adapter_len=2, adapter_layers=2, task_type="SEQ_CLS")
BARE = AdaptionPromptConfig(adapter_len=2, adapter_layers=2)


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens()).logits


@pytest.fixture
def base():
    return classifier()


@pytest.fixture
def model(base):
    """Two adapters with heads of their own, and one without; all of them trained."""
    model = AdaptionPromptModel(base, {"a": HEAD, "b": AUTO, "c": BARE}, "a")
    for seed, name in enumerate("abc"):
        open_gates_(model.adapter_modules(name), seed=seed)
    with torch.no_grad():
        for name in "ab":
            model.saved_modules(name)["score"].weight.mul_(ord(name))
    return model


def test_an_untrained_head_changes_nothing(base):
    expected = logits(base)

    model = AdaptionPromptModel(base, {"a": HEAD}, "a")

    assert torch.equal(expected, logits(model))
    assert model.get_base_model().score.weight.requires_grad


def test_each_adapter_has_its_own_head(base, model):
    original = model.swap_state.originals()
    assert ["score"] == list(model.saved_modules("a")) == list(model.saved_modules("b"))
    assert {} == model.saved_modules("c")
    assert base.score is model.saved_modules("a")["score"]
    model.set_adapter("b")
    assert base.score is model.saved_modules("b")["score"]
    model.set_adapter("c")
    assert id(base.score) not in original
    assert not base.score.weight.requires_grad


def test_unloading_gives_the_base_its_head_back():
    base = classifier()
    before, expected = snapshot(base), logits(base)
    model = AdaptionPromptModel(base, {"a": HEAD}, "a")
    with torch.no_grad():
        base.score.weight.zero_()

    model.unload()

    assert before == snapshot(base)
    assert torch.equal(expected, logits(base))


def test_heads_are_saved_and_loaded(model, tmp_path):
    expected = {}
    for name in "abc":
        model.set_adapter(name)
        expected[name] = logits(model)
    model.save_pretrained(tmp_path)

    loaded = AdaptionPromptModel.from_pretrained(classifier(), tmp_path / "a", "a")
    loaded.load_adapter(tmp_path / "b", "b", is_trainable=True)
    loaded.load_adapter(tmp_path / "c", "c")

    for name, values in expected.items():
        loaded.set_adapter(name)
        assert torch.equal(values, logits(loaded))
    assert not loaded.saved_modules("a")["score"].weight.requires_grad
    assert loaded.saved_modules("b")["score"].weight.requires_grad


def test_heads_follow_the_model(model):
    model.to(torch.bfloat16)

    for name in "ab":
        model.set_adapter(name)
        assert torch.bfloat16 is model.get_base_model().score.weight.dtype
    model.unload()
    assert torch.bfloat16 is model.model.score.weight.dtype


def test_a_tied_head_is_copied_and_the_embedding_stays():
    base = build(seed=1)
    base.lm_head.weight = base.model.embed_tokens.weight
    expected = logits(base)
    config = AdaptionPromptConfig(adapter_len=2, adapter_layers=1, modules_to_save=["lm_head"])

    model = AdaptionPromptModel(base, {"a": config}, "a")

    assert torch.equal(expected, logits(model))
    assert base.lm_head.weight is not base.model.embed_tokens.weight
    assert not base.model.embed_tokens.weight.requires_grad
    model.unload()
    assert base.lm_head.weight is base.model.embed_tokens.weight


def test_names_of_nothing_are_refused(base):
    config = AdaptionPromptConfig(adapter_len=2, adapter_layers=1, modules_to_save=["scores"])

    with pytest.raises(NoMatchError) as caught:
        AdaptionPromptModel(base, {"a": config}, "a")

    assert str(caught.value).startswith(
        "Operation 'trainable_copy' found no module named 'scores' among "
    )
    assert base.score.weight.requires_grad


def test_a_module_inside_adapted_attention_is_trained_with_it():
    """The prompt's keys come from the copy, as the tokens' do, and from the original without it."""
    base = build(seed=1)
    before, expected = snapshot(base), logits(base)
    config = AdaptionPromptConfig(adapter_len=2, adapter_layers=1, modules_to_save=["k_proj"])
    model = AdaptionPromptModel(base, {"a": config}, "a")
    assert torch.equal(expected, logits(model))

    open_gates_(model.adapter_modules("a"), seed=3)
    opened = logits(model)
    with torch.no_grad():
        for copied in model.saved_modules("a").values():
            copied.weight.mul_(1.5)
    other = build(seed=1)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.self_attn.k_proj.weight.mul_(1.5)
    alone = AdaptionPromptModel(other, {"a": replace(config, modules_to_save=None)}, "a")
    load_state_(
        alone.adapter_modules("a"),
        adapter_state(model.adapter_modules("a")),
    )

    assert not torch.allclose(opened, logits(model), atol=1e-3)
    assert torch.equal(logits(alone), logits(model))
    model.unload()
    assert_unchanged(before, base, subject="Adding, training and unloading")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modules": []},
        {"modules": "score"},
        {"modules": [1]},
        {"modules": ["score"], "is_trainable": 1},
        {"modules": ["score"], "module": ["score"]},
    ],
)
def test_invalid_options_are_refused(base, options):
    with pytest.raises(OptionsError, match="'trainable_copy' has invalid options"):
        Session().plan(base, [Rule(operation="trainable_copy", options=options)])


@pytest.mark.parametrize("field", [{"modules_to_save": ["score"]}, {"init_from_text": "a"}])
def test_a_rule_says_what_it_cannot_do(base, field):
    options = {"adapter_len": 2, "adapter_layers": 1, **field}

    with pytest.raises(OptionsError, match="adapts attention modules only"):
        Session().plan(base, [Rule(operation="adaption_prompt", options=options)])
