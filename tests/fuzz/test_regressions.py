"""What fuzzing found, each as the smallest file that showed it, with what is said of it now."""

import json
import struct

import pytest
import torch
from fuzz.readers import LOW_RANK, READERS, build, check
from safetensors.torch import load, save
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from surgery_adaption_prompt.show import show_folder
from typer.testing import CliRunner

from surgery_core import ModelRecipe, OptionsError, SurgeryError, load_pickled, load_recipe
from surgery_core.cli import app

DEEP = b"[" * 100_000
RULES = "models: {{m: {{source: {source}, rules: [{{operation: x, expect: {expect}}}]}}}}"


def plan(**changes):
    """Return a plan of which one edit has other values."""
    (data,) = READERS["plan"].files().values()
    found = json.loads(data)
    found["edits"][0] |= changes
    return json.dumps(found).encode()


def replaced(reader, name, **changes):
    """Return a reader's files, one of them with other values."""
    files = READERS[reader].files()
    return {**files, name: json.dumps({**json.loads(files[name]), **changes}).encode()}


CONFIG = "adapter_config.json"
FOUND = {
    "digits that Python does not write": (
        "recipe.yaml",
        {"recipe.yaml": RULES.format(source="x", expect="0x" + "f" * 5000).encode()},
        "expect: expected a whole number of at most 64 bits, got one of 20000. Change it.",
    ),
    "the same in TOML": (
        "recipe.toml",
        {"recipe.toml": b"version = 0x" + b"f" * 5000},
        "version: expected a whole number of at most 64 bits, got one of 20000. Change it.",
    ),
    "a null character in a source": (
        "recipe.yaml",
        {"recipe.yaml": RULES.format(source='"./a\\0"', expect=1).encode()},
        "models.m.source: expected a source without null characters, got './a\\x00'",
    ),
    "a long chain of recipes": (
        "recipe.yaml",
        {
            "recipe.yaml": b"extends: 0.yaml",
            **{f"{i}.yaml": f"extends: {i + 1}.yaml".encode() for i in range(1200)},
        },
        "extends more than 50 files, the next being ",
    ),
    "variables that multiply": (
        "recipe.yaml",
        {
            "recipe.yaml": (
                f"variables: {{a: {'x' * 1000}, b: '{'${a}' * 1000}', c: '${{b}}${{b}}'}}"
            ).encode()
        },
        "variables.c: variables give more than 1,000,000 characters. Use fewer.",
    ),
    "a plan nested deeply": ("plan", {"plan.json": DEEP}, "Text is not a plan: expected what "),
    "a plan with a number for a class": (
        "plan",
        {"plan.json": plan(module=1)},
        "Text is not a plan: expected what PlanDocument.to_json() writes, got TypeError(",
    ),
    "a plan with text for a shape": (
        "plan",
        {"plan.json": plan(added=[{"name": "a", "shape": "xyz", "dtype": "float32"}])},
        "Text is not a plan: expected what PlanDocument.to_json() writes, got TypeError(",
    ),
    "a plan with digits for a size": (
        "plan",
        {"plan.json": plan(added=[{"name": "a", "shape": [10**4000] * 2, "dtype": "float32"}])},
        "got ValueError(\"expected sizes from 0 to 9223372036854775808, got others in 'a'\")",
    ),
    "a composition nested deeply": ("composition", {"c.json": DEEP}, "cannot be read: maximum rec"),
    "a weight that is no float": (
        "composition",
        {"c.json": b'{"weights": {"a": 1' + b"0" * 400 + b"}}"},
        "Composition is invalid: expected adapter names with finite numbers",
    ),
    "a record nested deeply": (
        "record",
        {**READERS["record"].files(), "surgery.json": DEEP},
        "is damaged: expected what save_record writes, got RecursionError(",
    ),
    "an adapter nested deeply": (
        "adapter",
        {**READERS["adapter"].files(), CONFIG: DEEP},
        "has no readable adapter_config.json: maximum recursion depth exceeded",
    ),
    "prompts longer than the tensors": (
        "adapter",
        replaced("adapter", CONFIG, adapter_len=10**12),
        "is not what its configuration says: mismatched adaption_prompt: expected at least "
        "1,000,000,000,000 values in a layer, got at most 72. Restore both files, or save it again.",
    ),
    "features that the tensors are not for": (
        "adapter",
        replaced("adapter", CONFIG, condition_size=10**12),
        "adaption_condition_down: expected at least 16,000,000,000,000 values in a layer, got at "
        "most 0; adaption_condition_up: expected at least 16 values in a layer, got at most 0.",
    ),
    "a dtype too narrow to compute with": (
        "adapter",
        replaced("adapter", CONFIG, dtype="float8_e4m3fn"),
        "dtype must name a floating-point torch dtype of at least 16 bits, got 'float8_e4m3fn'.",
    ),
    "a record of the base nested deeply": (
        "adapter",
        {**READERS["adapter"].files(), "base_fingerprint.json": DEEP},
        "is no record of a base: expected format 1, got maximum recursion depth exceeded",
    ),
    "an answer of the base that is no float": (
        "adapter",
        {
            **READERS["adapter"].files(),
            "base_fingerprint.json": b'{"format": 1, "answers": {"a": [1' + b"0" * 400 + b"]}}",
        },
        "is no record of a base: expected format 1, got int too large to convert to float",
    ),
    "a factor that is no float": (
        "low_rank",
        replaced("low_rank", CONFIG, lora_alpha=10**400),
        "Operation 'low_rank' has invalid options: lora_alpha must be a finite number, got 1000",
    ),
    "a rank above that of the tensors": (
        "low_rank",
        replaced("low_rank", CONFIG, r=10**30),
        "Tensors do not fit 'a': missing nothing; mismatched 'layers.0.up.lora_A: expected shape "
        f"({10**30}, 4), got (2, 4)'",
    ),
}
"""The reader, its files, and what the error says."""


@pytest.mark.parametrize("title", FOUND)
def test_it_is_refused(title, tmp_path):
    reader, files, message = FOUND[title]

    refused = check(reader, files, tmp_path)

    assert refused is not None
    assert message in str(refused)


def test_plans_of_other_adapters_than_the_recipes_are_refused(tmp_path):
    files = READERS["record"].files()
    data = json.loads(files["surgery.json"])
    data["plans"]["other"] = data["plans"].pop("narrow")

    refused = check("record", {**files, "surgery.json": json.dumps(data).encode()}, tmp_path)

    assert "got those of 'rules', 'wide', 'shift', 'other'" in str(refused)


@pytest.mark.parametrize("size", [2**60, 2**70, 10**400])
def test_sizes_in_options_that_no_tensor_has_are_refused(size):
    """They come from whoever calls, so nothing is there to compare them with."""
    llama, toy = build(), READERS["low_rank"].make()
    rule = {"operation": "low_rank", "select": "layers.*.up", "options": {"r": size}}
    recipe = ModelRecipe.model_validate({"adapters": {"a": rule}})

    for fields in ({"adapter_len": size}, {"adapter_len": 1, "condition_size": size}):
        config = AdaptionPromptConfig(adapter_layers=1, **fields)
        with pytest.raises(OptionsError, match="more values than a tensor can have"):
            AdaptionPromptModel(llama, {"a": config}, "a")
    with pytest.raises(OptionsError, match=r"asks for 'lora_A', 'lora_B' at 'layers\.0\.up'"):
        LOW_RANK.plan_recipe(toy, recipe).apply()


SIZES = {
    "no values along a size that overflows": ([0, 2**63], "F32", b""),
    "no values, of sizes whose product overflows": ([0, 2**62, 2**62], "F32", b""),
    "a product that overflows": ([2**63, 2**63], "F32", b""),
    "a size of more than 64 bits": ([2**70], "F32", b""),
    "a negative size": ([-1], "F32", b""),
    "many sizes": ([1] * 100_000, "F32", b"0000"),
    "a dtype that torch has not": ([2], "F4", b"0"),
}


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("name", ["adapter", "low_rank", "record"])
def test_sizes_in_a_header_that_overflow_are_refused(name, case, tmp_path):
    shape, dtype, data = SIZES[case]
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}
    header = json.dumps({"base_model.model.layers.0.up.lora_A.weight": entry}).encode()
    files = dict(READERS[name].files())
    (target,) = (key for key in files if key.endswith(".safetensors"))
    files[target] = len(header).to_bytes(8, "little") + header + data

    assert check(name, files, tmp_path) is not None


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_tensors_of_any_dtype_are_shown(dtype, tmp_path):
    files = READERS["adapter"].files()
    tensors = load(files["adapter_model.safetensors"])
    key = next(name for name in tensors if name.endswith("adaption_prompt"))
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    other = {**tensors, key: tensors[key].to(dtype)}
    (tmp_path / "adapter_model.safetensors").write_bytes(save(other))

    assert str(dtype).removeprefix("torch.") in show_folder(str(tmp_path)).rows[0][7]


def test_gates_that_are_no_numbers_are_refused_where_they_would_be_shown(tmp_path):
    files = READERS["adapter"].files()
    tensors = load(files["adapter_model.safetensors"])
    other = {name: tensor.to(torch.complex64) for name, tensor in tensors.items()}
    files = {**files, "adapter_model.safetensors": save(other)}

    assert "is no adapter: expected real numbers, got" in str(check("adapter", files, tmp_path))


def test_a_terminal_is_not_told_what_names_in_a_file_say(tmp_path):
    files = READERS["adapter"].files()
    values = {**json.loads(files[CONFIG]), "base_model_name_or_path": "\x1b]0;owned\x07\x1b[2J"}
    for name, data in {**files, CONFIG: json.dumps(values).encode()}.items():
        (tmp_path / name).write_bytes(data)

    result = CliRunner().invoke(app, ["show", str(tmp_path)])

    assert result.exit_code == 0, result.stderr
    assert "\\x1b]0;owned\\x07" in result.stdout
    assert "\x1b" not in result.stdout


def test_a_record_in_a_folder_of_any_name_is_read_or_refused(tmp_path):
    folder = tmp_path / "a:b"
    folder.mkdir()
    for name, data in READERS["record"].files().items():
        (folder / name).write_bytes(data)

    result = CliRunner().invoke(app, ["diff", str(tmp_path), str(tmp_path)])

    assert result.exit_code == 1
    assert "models.a:b: expected a name that a folder can have" in result.stderr


def test_a_long_key_of_toml_is_refused_before_it_is_read(tmp_path):
    """Since tomllib notes each of its beginnings, which together take the square."""
    (tmp_path / "recipe.toml").write_text(".".join(["a"] * 60) + " = 1")
    with pytest.raises(ValueError, match="values are nested deeper than 50"):
        load_recipe(tmp_path / "recipe.toml")
    (tmp_path / "recipe.toml").write_text('a = "' + ".".join(["a"] * 40) + '"')
    with pytest.raises(ValueError, match="unknown key 'a'"):
        load_recipe(tmp_path / "recipe.toml")


def test_one_value_that_stands_for_many_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(10**9)}, tmp_path / "a.pth")

    with pytest.raises(SurgeryError) as caught:
        load_pickled(tmp_path / "a.pth", subject="Checkpoint")

    size = (tmp_path / "a.pth").stat().st_size
    assert (
        f"Checkpoint is no adapter: expected tensors no larger than the file, {size:,} bytes, got "
        "others under 'a'. Save them whole, with `contiguous`."
    ) == str(caught.value)


def test_a_header_that_promises_more_than_there_is_is_refused(tmp_path):
    files = READERS["adapter"].files()
    name = "adapter_model.safetensors"
    for length in (2**40, 2**63, 2**64 - 1):
        data = struct.pack("<Q", length) + files[name][8:]
        assert f"has no readable {name}" in str(check("adapter", {**files, name: data}, tmp_path))
