"""Folders in PEFT's format: what is read and written, and which ones are refused with which words."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from surgery_low_rank import plugin
from torch import nn

from surgery_core import ModelRecipe, NoMatchError, OptionsError, Session, StateError, SurgeryError

CONFIG = {
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "bias": "none",
    "r": 2,
    "lora_alpha": 3,
    "lora_dropout": 0.0,
    "target_modules": ["q"],
    "rank_pattern": {},
    "use_dora": False,
    "inference_mode": True,
}
X = torch.linspace(-1, 1, 12).unflatten(0, (3, 4))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.q(x) * self.v(x))


def net():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def state(fqns=("0.q", "1.q")):
    generator = torch.Generator().manual_seed(2)
    return {
        f"base_model.model.{fqn}.lora_{which}.weight": torch.randn(shape, generator=generator)
        for fqn in fqns
        for which, shape in (("A", (2, 4)), ("B", (4, 2)))
    }


def write(folder, tensors=None, **fields):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **fields}))
    save_file(state() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return str(folder)


def session():
    return Session([plugin], discover=False)


def plan(source, **fields):
    adapters = {"a": {"operation": "low_rank", "source": source, **fields}}
    return session().plan_recipe(net(), ModelRecipe.model_validate({"adapters": adapters}))


def test_a_folder_gives_what_its_tensors_say(tmp_path):
    edited = plan(write(tmp_path)).apply()
    tensors = state()

    layer = edited.model[1].q
    a, b = (tensors[f"base_model.model.1.q.lora_{which}.weight"] for which in "AB")
    assert torch.equal(a, layer.lora_A)
    assert torch.equal(b, layer.lora_B)
    expected = layer.overlay_base(X) + 1.5 * (X @ a.T @ b.T)
    torch.testing.assert_close(layer(X), expected)
    assert {"0.q", "1.q"} == edited.variant("a").keys()
    assert not edited.added_parameters()


def test_options_beside_a_source_go_before_those_saved(tmp_path):
    options = {"inference_mode": False, "dtype": "float64", "lora_alpha": 1}

    edited = plan(write(tmp_path), options=options).apply()

    assert 4 == len(edited.added_parameters())
    assert {torch.float64} == {tensor.dtype for tensor in edited.tensors("a").values()}
    assert 0.5 == edited.model[0].q.low_rank_parts[0].scaling


@pytest.mark.parametrize(
    ("names", "fqns", "expected"),
    [
        (["q"], ("0.q", "1.q"), ["q"]),
        (["v", "q"], ("0.q", "0.v", "1.q", "1.v"), ["q", "v"]),
        # Excluded or chosen in a way that the tensors alone tell.
        (["q"], ("1.q",), ["1.q"]),
        (r".*\.[qv]", ("0.q", "1.v"), ["0.q", "1.v"]),
        (["q", "no_such"], ("0.q", "1.q"), ["0.q", "1.q"]),
    ],
)
def test_layers_are_those_that_have_tensors(tmp_path, names, fqns, expected):
    found = plan(write(tmp_path, state(fqns), target_modules=names))

    assert expected == found.recipe.adapters["a"].options["target_modules"]
    assert set(fqns) == {edit.fqn for edit in found.adapters["a"].plan.document.edits}


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("use_dora", True, "use_dora is True"),
        ("rank_pattern", {"q": 4}, "rank_pattern is {'q': 4}"),
        ("alpha_pattern", {"q": 4}, "alpha_pattern is {'q': 4}"),
        ("bias", "all", "bias is 'all'"),
        ("bias", "lora_only", "bias is 'lora_only'"),
        ("lora_bias", True, "lora_bias is True"),
        ("modules_to_save", ["norm"], "modules_to_save is ['norm']"),
        ("layers_to_transform", [1], "layers_to_transform is [1]"),
        ("layer_replication", [[0, 1]], "layer_replication is [[0, 1]]"),
        ("fan_in_fan_out", True, "fan_in_fan_out is True"),
        ("init_lora_weights", "pissa", "init_lora_weights is 'pissa'"),
        ("trainable_token_indices", [1], "trainable_token_indices is [1]"),
        ("target_parameters", ["w"], "target_parameters is ['w']"),
        ("use_qalora", True, "use_qalora is True"),
        ("of_the_future", "yes", "of_the_future is 'yes'"),
    ],
)
def test_what_would_compute_something_else_is_refused(tmp_path, field, value, said):
    with pytest.raises(SurgeryError) as caught:
        plan(write(tmp_path, **{field: value}))

    assert str(caught.value) == (
        f"LoRA folder {str(tmp_path)!r} computes something else than this plugin: {said}. Use PEFT "
        "for it, or save it without that."
    )


def test_all_reasons_are_named(tmp_path):
    with pytest.raises(SurgeryError, match="plugin: use_dora is True; bias is 'all'"):
        plan(write(tmp_path, use_dora=True, bias="all"))


@pytest.mark.parametrize("kind", ["ADALORA", "ADAPTION_PROMPT", None])
def test_other_tuners_are_refused(tmp_path, kind):
    with pytest.raises(
        SurgeryError, match=f"is not of LoRA: expected peft_type 'LORA', got {kind!r}"
    ):
        plan(write(tmp_path, peft_type=kind))


@pytest.mark.parametrize("content", ["{", "[]", "1"])
def test_a_damaged_configuration_is_refused(tmp_path, content):
    write(tmp_path)
    (tmp_path / "adapter_config.json").write_text(content)

    with pytest.raises(
        SurgeryError, match=r"adapter_config\.json' (cannot be read|is not of LoRA)"
    ):
        plan(str(tmp_path))


def test_a_folder_without_tensors_is_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()

    with pytest.raises(SurgeryError, match="with safe_serialization"):
        plan(str(tmp_path))


def test_a_folder_without_a_configuration_is_not_known(tmp_path):
    with pytest.raises(OptionsError, match="'low_rank' cannot read"):
        plan(str(tmp_path))


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.emb.lora_embedding_A",
        "base_model.model.0.q.lora_magnitude_vector",
        "0.q.lora_A.weight",
        "base_model.model.0.q.lora_A.default.weight",
    ],
)
def test_tensors_of_other_kinds_are_refused(tmp_path, key):
    source = write(tmp_path, {**state(), key: torch.zeros(2)})

    with pytest.raises(StateError, match="is not of linear layers alone") as caught:
        plan(source)

    assert (key,) == caught.value.unexpected


@pytest.mark.parametrize("name", ["0.v.base_layer.weight", "0.norm.weight"])
def test_weights_of_the_base_are_no_matter_if_the_model_has_them(tmp_path, name):
    """PEFT adds those of a head or an embedding that has matrices, and would put them in place."""
    own = net().state_dict()[name.replace(".base_layer", "")]

    plan(write(tmp_path / "same", {**state(), f"base_model.model.{name}": own.clone()}))
    with pytest.raises(StateError, match="is not of linear layers alone"):
        plan(write(tmp_path / "other", {**state(), f"base_model.model.{name}": own + 1}))


@pytest.mark.parametrize("fqn", ["2.q", "0.norm"])
def test_a_model_without_the_layers_is_refused(tmp_path, fqn):
    with pytest.raises(StateError, match=f"is not for this model: .* Sequential, got '{fqn}'"):
        plan(write(tmp_path, state(("0.q", fqn))))


def test_tensors_of_other_shapes_are_refused(tmp_path):
    with pytest.raises(StateError, match=r"expected shape \(3, 4\), got \(2, 4\)"):
        plan(write(tmp_path, r=3)).apply()


def test_invalid_values_are_refused(tmp_path):
    with pytest.raises(OptionsError, match="lora_alpha must be a finite number, got 'x'"):
        plan(write(tmp_path, lora_alpha="x"))


def test_what_is_exported_is_what_was_read(tmp_path):
    edited = plan(write(tmp_path / "first", use_rslora=True, lora_dropout=0.25)).apply()
    expected = edited.model(X)

    session().export(edited, "a", tmp_path / "second")

    old, new = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second")
    )
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert {"lora_alpha": 3, "r": 2, "use_rslora": True, "lora_dropout": 0.25} == {
        name: config[name] for name in ("lora_alpha", "r", "use_rslora", "lora_dropout")
    }
    assert ["0.q", "1.q"] == config["target_modules"]
    assert torch.equal(expected, plan(str(tmp_path / "second")).apply().model(X))
    assert {"adapter_config.json", "adapter_model.safetensors"} == {
        path.name for path in (tmp_path / "second").iterdir()
    }


def test_values_that_are_not_finite_are_not_written(tmp_path):
    edited = plan(write(tmp_path / "first")).apply()
    with torch.no_grad():
        edited.model[1].q.lora_B[0, 0] = torch.nan

    with pytest.raises(StateError, match=r"finite, got others in 'base_model.model.1.q.lora_B"):
        session().export(edited, "a", tmp_path / "second")

    assert not (tmp_path / "second").exists()


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer["q"](x))
        return x


class Two(Tower):
    """Has layers whose names end with those of its own."""

    def __init__(self):
        super().__init__()
        self.talker = Tower()

    def forward(self, x):
        return self.talker(super().forward(x))


def two():
    torch.manual_seed(1)
    return Two().eval()


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("select", ["layers.*.q", "talker.layers.*.q", "layers.0.q"])
def test_layers_whose_names_end_each_other_are_told_apart(tmp_path, select):
    """By us, by PEFT, and in a record of what was read."""
    import peft  # noqa: PLC0415 (only here)

    rule = {"operation": "low_rank", "select": select, "options": {"r": 2, "lora_alpha": 3}}
    recipe = ModelRecipe.model_validate({"adapters": {"a": rule}})
    edited = session().plan_recipe(two(), recipe).apply()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in edited.tensors("a").values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    folder, plain = tmp_path / "exported", two()
    with torch.no_grad():
        for fqn in edited.variant("a"):
            a, b = (edited.tensors("a")[f"{fqn}.lora_{which}"] for which in "AB")
            plain.get_submodule(fqn).weight.add_(1.5 * b @ a)
    expected = plain(X)

    session().export(edited, "a", folder)

    source = {"adapters": {"a": {"operation": "low_rank", "source": str(folder)}}}
    again = session().plan_recipe(two(), ModelRecipe.model_validate(source)).apply()
    torch.testing.assert_close(again.model(X), expected)
    session().save(again, tmp_path / "record")
    replayed = session().load(two(), tmp_path / "record")
    assert edited.variant("a").keys() == replayed.variant("a").keys()
    assert torch.equal(again.model(X), replayed.model(X))
    theirs = peft.PeftModel.from_pretrained(two(), folder).eval()
    torch.testing.assert_close(theirs(X), expected)


def test_layers_that_share_a_matrix_are_exported_and_recorded(tmp_path):
    rule = {"operation": "low_rank", "options": {"r": 2, "target_modules": ["q"]}}
    recipe = ModelRecipe.model_validate({"adapters": {"a": rule}})
    edited = session().plan_recipe(net(), recipe).apply()
    edited.model[1].q.lora_A = edited.model[0].q.lora_A
    with torch.no_grad():
        for number, tensor in enumerate(edited.tensors("a").values()):
            tensor.fill_(0.25 + number)
    expected = edited.model(X)

    session().export(edited, "a", tmp_path / "folder")
    session().save(edited, tmp_path / "record")

    assert torch.equal(expected, plan(str(tmp_path / "folder")).apply().model(X))
    assert torch.equal(expected, session().load(net(), tmp_path / "record").model(X))


def test_whole_names_begin_with_a_sign():
    rule = {"operation": "low_rank", "options": {"target_modules": ["^layers.0.q", "1.q"]}}
    found = session().plan_recipe(two(), ModelRecipe.model_validate({"adapters": {"a": rule}}))

    fqns = {edit.fqn for edit in found.adapters["a"].plan.document.edits}

    assert {"layers.0.q", "layers.1.q", "talker.layers.1.q"} == fqns
    rule["options"]["target_modules"] = ["^0.q"]
    with pytest.raises(NoMatchError, match=r"target_modules '\^0.q'"):
        session().plan_recipe(two(), ModelRecipe.model_validate({"adapters": {"a": rule}}))


@pytest.mark.parametrize(("value", "dtype"), [(1e300, "float64"), (1e38, "float32")])
def test_values_that_are_too_large_for_the_base_are_refused_at_load(tmp_path, value, dtype):
    tensors = {key: tensor.to(getattr(torch, dtype)) for key, tensor in state().items()}
    tensors["base_model.model.1.q.lora_B.weight"][2, 1] = value
    adapters = {"a": {"operation": "low_rank", "source": write(tmp_path, tensors)}}
    base = net().half() if dtype == "float32" else net()
    planned = session().plan_recipe(base, ModelRecipe.model_validate({"adapters": adapters}))

    with pytest.raises(StateError, match=r"1.q.lora_B: values are not finite in torch\.float"):
        planned.apply()
