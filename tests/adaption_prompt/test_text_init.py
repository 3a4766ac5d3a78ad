"""Prompts that start from a text are what the attention modules see of it."""

import pytest
import torch
from support.families import CLASSES, build, open_gates_, tokens
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel, prompts_from_text

from surgery_core import OptionsError
from surgery_core.testing import snapshot


def tokenizer(text):
    """Number the words: word lengths, plus three."""
    return {"input_ids": [3 + len(word) for word in text.split()]}


CONFIG = AdaptionPromptConfig(adapter_len=5, adapter_layers=2, init_from_text="a bb ccc")


def inputs(base, text, fqn):
    """Return what an attention module of the base is given for a text."""
    seen = []
    handle = base.get_submodule(fqn).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("hidden_states", (*args, None)[0])),
        with_kwargs=True,
    )
    with torch.no_grad():
        base(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", CLASSES)
def test_prompts_are_the_hidden_states_of_the_text(family):
    base = build(family, seed=1)
    fqns = [f"model.layers.{layer}.self_attn" for layer in (1, 2)]
    expected = {fqn: inputs(base, "a bb ccc", fqn) for fqn in fqns}

    model = AdaptionPromptModel(base, {"a": CONFIG}, "a", tokenizer=tokenizer)

    for fqn, module in model.adapter_modules("a").items():
        # Three tokens in five places: the first two again.
        assert torch.equal(expected[fqn][:, [0, 1, 2, 0, 1]], module.adaption_prompt)
        assert not module.adaption_gate.any()


def test_untrained_still_equals_the_base():
    base = build(seed=1)
    with torch.no_grad():
        expected = base(tokens()).logits
        model = AdaptionPromptModel(base, {"a": CONFIG}, "a", tokenizer=tokenizer)
        assert torch.equal(expected, model(tokens()).logits)


def test_the_active_adapter_has_no_part_in_it():
    """Nor do modes and hooks change, though the base runs in eval mode."""
    base = build(seed=1)
    plain = AdaptionPromptModel(build(seed=1), {"a": CONFIG}, "a", tokenizer=tokenizer)
    other = AdaptionPromptConfig(adapter_len=3, adapter_layers=3)
    model = AdaptionPromptModel(base, {"b": other}, "b")
    open_gates_(model.adapter_modules("b"))
    model.train()
    base.model.norm.eval()
    before = snapshot(base)

    model.add_adapter("a", CONFIG, tokenizer=tokenizer)

    assert before == snapshot(base)
    for fqn, module in plain.adapter_modules("a").items():
        found = model.adapter_modules("a")[fqn]
        assert torch.equal(module.adaption_prompt, found.adaption_prompt)


@pytest.mark.parametrize(("text", "count"), [("", 0), ("a b c d e f", 6)])
def test_too_many_tokens_or_none_are_refused(text, count):
    model = AdaptionPromptModel(
        build(), {"a": AdaptionPromptConfig(adapter_len=5, adapter_layers=1)}, "a"
    )
    config = AdaptionPromptConfig(adapter_len=5, adapter_layers=1, init_from_text=text)

    with pytest.raises(OptionsError) as caught:
        model.add_adapter("b", config, tokenizer=tokenizer)

    assert str(caught.value) == (
        f"init_from_text must have between 1 and 5 tokens (adapter_len), got {count}. Shorten the "
        "text, or raise adapter_len."
    )
    assert ["a"] == list(model.peft_config)
    assert ("a",) == model.swap_state.names


def test_a_missing_tokenizer_is_an_error():
    with pytest.raises(OptionsError, match="expected the base's tokenizer, got none"):
        AdaptionPromptModel(build(), {"a": CONFIG}, "a")


def test_a_saved_adapter_needs_no_tokenizer(tmp_path):
    model = AdaptionPromptModel(build(seed=1), {"default": CONFIG}, "default", tokenizer=tokenizer)
    open_gates_(model.adapter_modules("default"))
    with torch.no_grad():
        expected = model(tokens()).logits
    model.save_pretrained(tmp_path)

    loaded = AdaptionPromptModel.from_pretrained(build(seed=1), tmp_path)

    with torch.no_grad():
        assert torch.equal(expected, loaded(tokens()).logits)
    assert "a bb ccc" == loaded.peft_config["default"].init_from_text
    loaded.load_adapter(tmp_path, "again")


def test_the_prompts_alone():
    base = build(seed=1)
    model = AdaptionPromptModel(
        base, {"a": AdaptionPromptConfig(adapter_len=2, adapter_layers=1)}, "a"
    )
    modules = model.adapter_modules("a")

    with model.disable_adapter():
        prompts = prompts_from_text(base, modules, "hello world", tokenizer)

    assert ["model.layers.2.self_attn.adaption_prompt"] == list(prompts)
