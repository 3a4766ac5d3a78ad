"""What is given wrongly by habit, or by mistake, is an error of this package that says what to pass."""

from pathlib import Path

import pytest
import torch
from support.families import build, tokens
from surgery_adaption_prompt import (
    AdapterStore,
    AdaptionPromptConfig,
    AdaptionPromptModel,
    Composition,
    conditioned,
    get_peft_model,
)

from surgery_core import SurgeryError

CONFIG = AdaptionPromptConfig(adapter_len=3, adapter_layers=2)
IDS = tokens(1, 4)
STRANGE = (None, 5, 2.5, b"a", ["a"], {"a"}, object(), True, float("nan"))
"""Of no type that a name has; a list and a set cannot be looked up."""


@pytest.fixture(scope="module")
def model():
    return AdaptionPromptModel(build(), {"a": CONFIG, "b": CONFIG}, "a").eval()


NAMES = {
    "add_adapter": lambda m, name: m.add_adapter(name, CONFIG),
    "delete_adapter": lambda m, name: m.delete_adapter(name),
    "rename_adapter": lambda m, name: m.rename_adapter(name, "c"),
    "rename_adapter, new": lambda m, name: m.rename_adapter("a", name),
    "adapter_modules": lambda m, name: m.adapter_modules(name),
    "saved_modules": lambda m, name: m.saved_modules(name),
    "adapter_parameters": lambda m, name: m.adapter_parameters([name]),
    "adapter_parameters, whole": lambda m, name: m.adapter_parameters(
        name if name != ["a"] else "a"
    ),
    "plot_gates": lambda m, name: m.plot_gates(name),
    "load_adapter": lambda m, name: m.load_adapter(saved(m), name),
    "hotswap_adapter": lambda m, name: m.hotswap_adapter(saved(m), name),
    "add_weighted_adapter": lambda m, name: m.add_weighted_adapter([name], [1.0], "c"),
    "add_weighted_adapter, new": lambda m, name: m.add_weighted_adapter(["a"], [1.0], name),
    "save_pretrained": lambda m, name: m.save_pretrained("unused", selected_adapters=[name]),
    "set_adapter": lambda m, name: m.set_adapter(name),
    "activated": lambda m, name: m.activated([name]).__enter__(),
    "adapter_names": lambda m, name: m(IDS, adapter_names=[name]),
    "fixed_rows": lambda m, name: assigned(m, [name]),
    "get_peft_model": lambda _, name: get_peft_model(build(), CONFIG, name),
    "AdaptionPromptModel": lambda _, name: AdaptionPromptModel(build(), {"a": CONFIG}, name),
    "from_pretrained": lambda m, name: AdaptionPromptModel.from_pretrained(build(), saved(m), name),
}


def saved(model):
    """Return a folder with an adapter, written once."""
    return getattr(model, "_folder", "nowhere")


@pytest.fixture(autouse=True, scope="module")
def _saved_once(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    model.save_pretrained(folder)
    model._folder = folder / "a"


def assigned(model, names):
    with model.fixed_rows(2) as rows:
        rows.assign(names)


def refused(call):
    """Check that a call ends in an error that says what to do, and not in an accident."""
    with pytest.raises(SurgeryError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".")
    assert " object has no attribute" not in text


@pytest.mark.parametrize("call", NAMES)
def test_names_that_are_not_names(call, model):
    for name in STRANGE:
        refused(lambda name=name: NAMES[call](model, name))
    assert ["a", "b"] == list(model.peft_config)
    assert "a" == model.active_adapter
    assert not model.sharing.is_in_force


CONFIGS = {
    "none": None,
    "values": {"adapter_len": 3, "adapter_layers": 2},
    "by name": {"default": CONFIG},
    "class": AdaptionPromptConfig,
    "text": "default",
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_configurations_that_are_none(config, model):
    for call in (
        lambda: get_peft_model(build(), config),
        lambda: AdaptionPromptModel(build(), {"default": config}, "default"),
        lambda: model.add_adapter("c", config),
    ):
        refused(call)


@pytest.mark.peft
def test_a_configuration_of_pefts_is_told_from_ours(model):
    peft = pytest.importorskip("peft")
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2)
    for call in (lambda: get_peft_model(build(), config), lambda: model.add_adapter("c", config)):
        with pytest.raises(SurgeryError) as caught:
            call()
        assert (
            "is a peft.tuners.adaption_prompt.config.AdaptionPromptConfig: expected "
            "surgery_adaption_prompt.AdaptionPromptConfig. Make one with the same arguments"
        ) in str(caught.value)


OTHERS = {
    "model, text": lambda _: get_peft_model("gpt2", CONFIG),
    "model, none": lambda _: AdaptionPromptModel(None, {"a": CONFIG}, "a"),
    "from_pretrained, text": lambda m: AdaptionPromptModel.from_pretrained("gpt2", saved(m)),
    "configs, one": lambda _: AdaptionPromptModel(build(), CONFIG, "default"),
    "configs, list": lambda _: AdaptionPromptModel(build(), [CONFIG], "default"),
    "configs, none": lambda _: AdaptionPromptModel(build(), None, "default"),
    "set_adapter, list": lambda m: m.set_adapter(["a", "b"]),
    "set_adapter, weights as text": lambda m: m.set_adapter({"a": "1.0"}),
    "set_adapter, weights none": lambda m: m.set_adapter({"a": None}),
    "set_adapter, too large": lambda m: m.set_adapter({"a": 10**400}),
    "activated, none": lambda m: m.activated(None).__enter__(),
    "activated, number": lambda m: m.activated(3).__enter__(),
    "activated, generator": lambda m: m.activated(name for name in "ab").__enter__(),
    "rows, nested": lambda m: m(IDS, adapter_names=[["a", "b"]]),
    "rows, generator": lambda m: m(IDS, adapter_names=(name for name in "a")),
    "rows, bytes": lambda m: m(IDS, adapter_names=b"a"),
    "generate, nested": lambda m: m.generate(IDS, adapter_names=[["a"]], max_new_tokens=1),
    "condition, list": lambda m: m(IDS, condition=[[1.0]]),
    "condition, text": lambda _: conditioned("features").__enter__(),
    "condition, integers": lambda _: conditioned(torch.ones(1, 2, dtype=torch.int64)).__enter__(),
    "fixed_rows, float": lambda m: m.fixed_rows(2.0).__enter__(),
    "fixed_rows, bool": lambda m: m.fixed_rows(True).__enter__(),
    "fixed_rows, text": lambda m: m.fixed_rows("2").__enter__(),
    "fixed_rows, none": lambda m: m.fixed_rows(None).__enter__(),
    "fixed_rows, length": lambda m: m.fixed_rows(2, adapter_len=1.5).__enter__(),
    "assign, text": lambda m: assigned(m, "a"),
    "assign, none": lambda m: assigned(m, None),
    "assign, generator": lambda m: assigned(m, (name for name in "a")),
    "weighted, generators": lambda m: m.add_weighted_adapter((n for n in "a"), iter([1.0]), "c"),
    "weighted, text": lambda m: m.add_weighted_adapter("ab", [1.0, 2.0], "c"),
    "weighted, weights as text": lambda m: m.add_weighted_adapter(["a"], ["1"], "c"),
    "weighted, weights one text": lambda m: m.add_weighted_adapter(["a"], "1", "c"),
    "weighted, weights none": lambda m: m.add_weighted_adapter(["a"], None, "c"),
    "state, list": lambda m: m.add_adapter("c", CONFIG, [torch.ones(1)]),
    "state, values": lambda m: m.add_adapter("c", CONFIG, {"k": [1.0]}),
    "save, none": lambda m: m.save_pretrained(None),
    "save, empty": lambda m: m.save_pretrained(""),
    "save, names as text": lambda m: m.save_pretrained("unused", selected_adapters="ab"),
    "load, none": lambda m: m.load_adapter(None, "c"),
    "load, base_check": lambda m: m.load_adapter(saved(m), "c", base_check="loudly"),
    "hotswap, none": lambda m: m.hotswap_adapter(None, "a"),
    "hotswap, base_check": lambda m: m.hotswap_adapter(saved(m), "a", base_check=None),
    "from_pretrained, none": lambda _: AdaptionPromptModel.from_pretrained(build(), None),
    "store, none": lambda _: AdapterStore(None),
    "store, number": lambda _: AdapterStore(3),
    "store, pinned": lambda m: AdapterStore(saved(m).parent, pinned="ab"),
    "store, pinned number": lambda m: AdapterStore(saved(m).parent, pinned=[1]),
    "store, base_check": lambda m: AdapterStore(saved(m).parent, base_check=True),
    "store, ensure": lambda m: AdapterStore(saved(m).parent).ensure(m, [1]),
    "composition, list": lambda _: Composition(["a"]),
    "composition, none": lambda _: Composition(None),
    "mapping, list": lambda _: AdaptionPromptConfig.from_mapping(["adapter_len"]),
    "mapping, keys": lambda _: AdaptionPromptConfig.from_mapping({1: 2}),
    "task_type": lambda _: AdaptionPromptConfig(
        adapter_len=1, adapter_layers=1, task_type="seq_cls"
    ),
    "task_type, number": lambda _: AdaptionPromptConfig(
        adapter_len=1, adapter_layers=1, task_type=1
    ),
    "task_type, list": lambda _: AdaptionPromptConfig(
        adapter_len=1, adapter_layers=1, task_type=[]
    ),
}


@pytest.mark.parametrize("call", OTHERS)
def test_arguments_of_the_wrong_type(call, model):
    refused(lambda: OTHERS[call](model))
    assert ["a", "b"] == list(model.peft_config)
    assert "a" == model.active_adapter
    assert not Path("unused").exists()


def test_the_task_types_there_are_are_listed():
    with pytest.raises(SurgeryError) as caught:
        AdaptionPromptConfig(adapter_len=1, adapter_layers=1, task_type="seq_cls")

    assert str(caught.value) == (
        "AdaptionPromptConfig is invalid: task_type must be one of 'CAUSAL_LM', "
        "'FEATURE_EXTRACTION', 'QUESTION_ANS', 'SEQ_2_SEQ_LM', 'SEQ_CLS', 'TOKEN_CLS', None, got "
        "'seq_cls'."
    )
