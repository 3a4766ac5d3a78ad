"""The plugin runs the contract suite of the core, in every family and both kinds of gate."""

import pytest
import torch
from support.contracts import SlowToCompile
from support.families import CLASSES, Shape, build, tokens
from surgery_adaption_prompt import AdaptionPromptOperation, plugin
from torch import nn

from surgery_core import Rule, Session, fingerprint


class _AdaptionPromptContract(SlowToCompile):
    """What all the cases below share."""

    identity_at_init = True
    family = "llama"
    gate = "layer"

    def session(self):
        return Session([plugin], discover=False)

    def make_model(self):
        return build(self.family, Shape(attention_bias=True))

    def make_aliased_model(self):
        model = self.make_model()
        return nn.ModuleDict({"first": model, "second": model})

    def rules(self):
        options = {"adapter_len": 3, "adapter_layers": 2, "gate": self.gate}
        return [Rule(operation="adaption_prompt", options=options)]

    def run(self, model):
        return model(tokens()).logits


class TestLayerGates(_AdaptionPromptContract):
    """One gate a layer."""


class TestHeadGates(_AdaptionPromptContract):
    """One gate a head, in a family with a query norm and its own scale."""

    family = "gemma3"
    gate = "head"


class TestFusedProjection(_AdaptionPromptContract):
    """Keys and values from a fused projection."""

    family = "phi3"


def test_the_operation_is_offered_by_name():
    session = Session([plugin], discover=False)

    assert isinstance(session.plugins.operation("adaption_prompt"), AdaptionPromptOperation)


def test_the_installed_plugin_is_found():
    """Discovery makes the operation nameable, under the distribution's name."""
    infos = {info.name: info for info in Session().plugins.infos}

    info = infos["adaption_prompt"]
    assert info.error is None
    assert ("adaption_prompt", "trainable_copy") == info.operations
    assert info.distribution.startswith("surgery-adaption-prompt ")
    assert {
        "surgery_load_model",
        "surgery_load_skeleton",
        "surgery_operations",
        "surgery_probe_inputs",
        "surgery_show",
    } == set(info.hooks)


@pytest.mark.parametrize("family", CLASSES)
def test_a_folder_is_planned_without_its_weights(tmp_path, family):
    build(family).config.save_pretrained(tmp_path)

    model = Session([plugin], discover=False).plugins.load_skeleton(str(tmp_path))

    assert all(parameter.is_meta for parameter in model.parameters())
    assert CLASSES[family][1] == type(model).__name__


@pytest.mark.parametrize("family", CLASSES)
def test_a_folder_is_loaded_and_can_be_run(tmp_path, family):
    """What is loaded is what was saved, and the plugin knows how to call it."""
    saved = build(family)
    saved.save_pretrained(tmp_path)
    plugins = Session([plugin], discover=False).plugins

    model = plugins.load_model(str(tmp_path))
    inputs = plugins.probe_inputs(model)

    assert CLASSES[family][1] == type(model).__name__
    with torch.no_grad():
        assert torch.equal(saved(**inputs).logits, model(**inputs).logits)
    assert fingerprint(model) == fingerprint(plugins.load_skeleton(str(tmp_path)))


def test_another_source_is_left_to_other_plugins(tmp_path):
    plugins = Session([plugin], discover=False).plugins

    assert plugins.load_skeleton(str(tmp_path)) is None
    assert plugins.load_model(str(tmp_path)) is None
    assert plugins.probe_inputs(nn.Linear(2, 2)) is None
