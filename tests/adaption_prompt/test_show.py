"""`surgery show` of adapter folders: ours, PEFT's, several, and what is odd about them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import Shape, build
from support.folders import without_header
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel, plugin
from surgery_adaption_prompt.show import show_folder
from typer.testing import CliRunner

from surgery_core import Plugins, StateError, SurgeryError
from surgery_core.cli import app

LEGAL = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, gate="head", gate_activation="tanh")
FRENCH = AdaptionPromptConfig(adapter_len=5, adapter_layers=1, base_model_name_or_path="some/base")
LAYER_1, LAYER_2 = "model.layers.1.self_attn", "model.layers.2.self_attn"
GATES = {LAYER_1: [0.5, -0.25, 0.125, 1.5], LAYER_2: [-0.75, 2.0, -0.0625, 0.375]}
COLUMNS = [
    *("adapter", "type", "layers", "K", "gate", "parameters", "bytes", "dtypes", "mean |gate|"),
    *("max |gate|", "base model"),
]


def save(folder, **configs):
    """Save adapters of a model that PEFT can have, with known gates."""
    shape = Shape(head_dim=6)
    model = AdaptionPromptModel(build(shape=shape), configs, next(iter(configs)))
    with torch.no_grad():
        for name, config in configs.items():
            for fqn, module in model.adapter_modules(name).items():
                values = GATES[fqn] if config.gate == "head" else [-0.3125]
                module.adaption_gate.copy_(torch.tensor(values))
    model.save_pretrained(folder)


@pytest.fixture
def folder(tmp_path):
    """Two adapters of PEFT's kind and of ours, as `save_pretrained` writes them."""
    save(tmp_path, default=FRENCH, legal=LEGAL)
    return tmp_path


def rewrite(folder, change):
    """Change the tensors in a folder."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def reconfigure(folder, **values):
    """Change the configuration in a folder."""
    path = without_header(folder) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_each_adapter_is_a_row_that_of_the_folder_itself_first(folder):
    shown = show_folder(str(folder))

    assert f"Adaption prompts in {str(folder)!r}" == shown.title
    assert COLUMNS == list(shown.columns)
    assert shown.rows == (
        (
            *("default", "ADAPTION_PROMPT", "1", "5", "layer", "121", "484", "float32"),
            *("0.312", "0.312", "some/base"),
        ),
        (
            *("legal", "SURGERY_ADAPTION_PROMPT", "2", "3", "head, tanh", "152", "608"),
            *("float32", "0.47", "0.964", "-"),
        ),
    )
    assert () == shown.notes


def test_the_data_has_the_gates_by_layer_and_head(folder):
    data = json.loads(json.dumps(show_folder(str(folder)).data))

    french, legal = data["adapters"]
    assert {
        "name": "default",
        "peft_type": "ADAPTION_PROMPT",
        "base_model_name_or_path": "some/base",
        "adapter_len": 5,
        "adapter_layers": 1,
        "gate": "layer",
        "gate_activation": "identity",
        "condition_size": None,
        "condition_rank": None,
        "num_parameters": 121,
        "num_bytes": 484,
        "dtypes": ["float32"],
        "mean_gate_magnitude": 0.3125,
        "max_gate_magnitude": 0.3125,
        "gates": {LAYER_2: [-0.3125]},
    } == french
    assert GATES.keys() == legal["gates"].keys()
    for fqn, values in GATES.items():
        expected = torch.tanh(torch.tensor(values)).tolist()
        assert pytest.approx(expected) == legal["gates"][fqn]
    assert legal["base_model_name_or_path"] is None
    assert (str(folder), []) == (data["source"], data["notes"])


def test_a_folder_with_adapters_in_subfolders_only(tmp_path):
    save(tmp_path, zulu=FRENCH, legal=LEGAL)

    shown = show_folder(str(tmp_path))

    assert ["legal", "zulu"] == [row[0] for row in shown.rows]


def test_a_subfolder_on_its_own_is_a_folder(folder):
    (row,) = show_folder(str(folder / "legal")).rows

    assert ("default", "SURGERY_ADAPTION_PROMPT", "2", "3", "head, tanh") == row[:5]


@pytest.mark.peft
@pytest.mark.slow  # imports PEFT
@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_a_folder_that_peft_wrote(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(build(shape=Shape(head_dim=6)), config)
    with torch.no_grad():
        gates = [p for name, p in model.named_parameters() if name.endswith("adaption_gate")]
        for gate, value in zip(gates, (0.5, -0.125), strict=True):
            gate.fill_(value)
    model.save_pretrained(tmp_path)

    shown = show_folder(str(tmp_path))

    (row,) = shown.rows
    assert ("default", "ADAPTION_PROMPT", "2", "4", "layer", "194", "776") == row[:7]
    assert ("0.312", "0.5") == row[8:10]
    assert {LAYER_1: [0.5], LAYER_2: [-0.125]} == shown.data["adapters"][0]["gates"]
    assert () == shown.notes


@pytest.mark.parametrize("kind", ["LORA", None])
def test_other_methods_are_left_to_other_plugins(folder, kind):
    reconfigure(folder, peft_type=kind, r=8)

    assert show_folder(str(folder / "legal")) is not None
    shown = show_folder(str(folder))
    assert ["legal"] == [row[0] for row in shown.rows]
    assert ("Adapters of other methods are left out: 'default'.",) == shown.notes
    assert list(shown.notes) == shown.data["notes"]
    reconfigure(folder / "legal", peft_type=kind)
    assert show_folder(str(folder)) is None


def test_a_configuration_that_is_no_object_is_left_to_other_plugins(tmp_path):
    (tmp_path / "adapter_config.json").write_text("[1]")

    assert show_folder(str(tmp_path)) is None


@pytest.mark.parametrize("source", ["", "no/such/folder", "adapter_config.json"])
def test_what_is_no_folder_with_adapters_is_left_to_other_plugins(folder, monkeypatch, source):
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()

    assert show_folder(source or str(folder / "empty")) is None


def test_hidden_folders_are_not_looked_into(folder):
    (folder / "legal").rename(folder / ".legal")

    assert ["default"] == [row[0] for row in show_folder(str(folder)).rows]


def test_a_damaged_configuration_is_an_error(folder):
    (without_header(folder / "legal") / "adapter_config.json").write_text("{")

    with pytest.raises(SurgeryError) as caught:
        show_folder(str(folder))

    assert str(caught.value) == (
        f"Adapter folder {str(folder / 'legal')!r} has no readable adapter_config.json: Expecting "
        "property name enclosed in double quotes: line 1 column 2 (char 1). Pass a folder that "
        "save_pretrained wrote."
    )


def test_keys_that_are_no_adapters_are_an_error(folder):
    rewrite(folder, lambda tensors: tensors.update(strange=torch.zeros(1)))

    with pytest.raises(StateError, match=r"is no adapter: expected keys that begin with"):
        show_folder(str(folder))


GATE = f"base_model.model.{LAYER_1}.adaption_gate"
PROMPT = f"base_model.model.{LAYER_1}.adaption_prompt"


def note(prompts, gates):
    return (
        "Adapter 'default' is not what its configuration says: expected prompts of 3 tokens and "
        f"gates in 2 layers, got prompts {prompts} and gates in {gates}."
    )


BOTH = f"'{LAYER_1}', '{LAYER_2}'"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda t: t.pop(GATE),
            note(f"'{LAYER_1}: [1, 3, 24]', '{LAYER_2}: [1, 3, 24]'", f"'{LAYER_2}'"),
        ),
        (lambda t: t.pop(PROMPT), note(f"'{LAYER_2}: [1, 3, 24]'", BOTH)),
        (
            lambda t: (t.pop(PROMPT), t.pop(GATE)),
            note(f"'{LAYER_2}: [1, 3, 24]'", f"'{LAYER_2}'"),
        ),
        (
            lambda t: t.update({PROMPT: torch.zeros(1, 4, 24)}),
            note(f"'{LAYER_1}: [1, 4, 24]', '{LAYER_2}: [1, 3, 24]'", BOTH),
        ),
        (
            lambda t: t.update({PROMPT: torch.zeros(())}),
            note(f"'{LAYER_1}: []', '{LAYER_2}: [1, 3, 24]'", BOTH),
        ),
    ],
)
def test_tensors_that_do_not_fit_the_configuration_are_noted(tmp_path, change, expected):
    save(tmp_path, default=LEGAL)
    rewrite(tmp_path, change)

    assert (expected,) == show_folder(str(tmp_path)).notes


def test_values_that_are_not_finite_are_noted_and_none_in_the_data(tmp_path):
    save(tmp_path, default=LEGAL)
    rewrite(tmp_path, lambda tensors: tensors[GATE][2:].fill_(float("nan")))

    shown = show_folder(str(tmp_path))

    assert (
        f"Adapter 'default' has values that are not finite in '{LAYER_1}.adaption_gate'.",
    ) == shown.notes
    assert ("nan", "nan") == shown.rows[0][8:10]
    (adapter,) = json.loads(json.dumps(shown.data, allow_nan=False))["adapters"]
    assert [None, None] == adapter["gates"][LAYER_1][2:]
    assert adapter["max_gate_magnitude"] is None


def test_modules_saved_whole_count(tmp_path):
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, modules_to_save=["lm_head"])
    save(tmp_path, default=config)

    shown = show_folder(str(tmp_path))

    assert f"{2 * (3 * 24 + 1) + 40 * 24:,}" == shown.rows[0][5]
    assert () == shown.notes


def test_a_folder_without_tensors_is_an_error(folder):
    (folder / "adapter_model.safetensors").unlink()

    with pytest.raises(SurgeryError, match=r"has no readable adapter_model\.safetensors"):
        show_folder(str(folder))


def test_the_plugin_answers_for_such_folders(folder):
    plugins = Plugins([plugin], discover=False)

    assert show_folder(str(folder)) == plugins.show(str(folder))
    assert plugins.show(str(folder / "nothing")) is None


def test_the_command_prints_a_row_for_each_adapter(folder):
    result = CliRunner().invoke(app, ["show", str(folder)])

    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines()]
    assert 0 == result.exit_code
    assert [list(row) for row in show_folder(str(folder)).rows] == [row for row in rows if row]


def test_the_command_prints_the_gates_as_json(folder):
    result = CliRunner().invoke(app, ["show", str(folder), "--json"])

    assert show_folder(str(folder)).data == json.loads(result.stdout)
