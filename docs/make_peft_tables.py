"""Write the tables about PEFT and about file formats from the tests: run as `make docs-tables`."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
INTEROP = ROOT / "tests" / "interop"
DEVIATIONS = INTEROP / "test_deviations.py"
NUM_DEVIATIONS = 24

DEVIATIONS_HEADER = """\
# Where PEFT 0.21.2 deviates

Known defects of PEFT's adaption prompts, and what holds here instead.
Each line is one test in `tests/interop/test_deviations.py`: the same code runs on both libraries, passes here, and must fail on PEFT (a strict xfail).
Made by `make docs-tables` from the docstrings there.

| # | here | in PEFT | test |
|---|---|---|---|
"""

FORMATS_HEADER = """\
# Formats

Files that adapters come in, and what each direction is tested against.
Made by `make docs-tables`; every test named is one that runs.

PEFT's folders and ours are read by `AdaptionPromptModel.from_pretrained` and `load_adapter`.
`read_llama_adapter` and `read_litgpt` return a configuration and tensors for `add_adapter(name, config, tensors)`.
No pickle is unpacked: `.bin`, `.pth` and `.adapter` files are read with `weights_only=True`, and may hold tensors only.

litgpt 0.5.5 and later does not compute its own formula unless the model has a single key-value head: it splits its fused projection in the order of older releases.
`read_litgpt` follows the formula, and warns where that matters.

## What a saved adapter is

| file | what it holds |
|---|---|
| `adapter_model.safetensors` | everything: the tensors under PEFT's names, and in the header, by file name, the text of each of the other files |
| `adapter_config.json` | the configuration, for PEFT and for people |
| `base_fingerprint.json` | what the base answered to a probe, for people; not in LoRA folders |

Renaming the first file saves the adapter, so it cannot be mixed with the configuration of another save.
Where a header has these texts, they are what is read, whatever the files next to it say: to change an adapter's configuration, load it and save it again.
Folders of PEFT and of 0.1.0 have none in the header; their files are read, and if somebody saves to such a folder while it is read, that is an error.
The same adapter is saved as the same bytes; parameters that layers share are written once for each of them, as PEFT does.

A record is `surgery.safetensors` alone, with its JSON in the header under `surgery.json`.

`safetensors.safe_open(path, "pt").metadata()` returns the texts of either.

## Tested

| format | direction | tensors in the test are made by | test |
|---|---|---|---|
"""

FORMATS = (
    # (format, direction, whose tensors, file, test)
    ("PEFT folder, `.safetensors`", "in", "PEFT 0.21.2", "test_peft.py",
     "test_a_peft_folder_gives_pefts_logits"),
    ("PEFT folder, `.safetensors`", "out", "ours, run by PEFT 0.21.2", "test_peft.py",
     "test_peft_loads_our_folder_and_gives_our_logits"),
    ("PEFT folder, several adapters in subfolders", "in", "PEFT 0.21.2", "test_peft.py",
     "test_state_of_an_adapter_loaded_from_peft_is_pefts"),
    ("PEFT folder, `.bin`", "in", "PEFT 0.21.2, `safe_serialization=False`",
     "test_peft_folders.py", "test_pefts_pickled_file_is_read_as_tensors"),
    ("PEFT folder of GPT-2: term not projected", "in and out", "PEFT 0.21.2",
     "test_peft_folders.py", "test_a_gpt2_folder_of_pefts_keeps_pefts_meaning"),
    ("PEFT folder, gate activation and equal head gates folded in (`for_peft=True`)", "out",
     "ours, run by PEFT 0.21.2", "test_peft_folders.py",
     "test_what_peft_can_have_is_said_in_its_terms"),
    ("PEFT folder, gates that differ by head, whole modules, other families", "out: refused",
     "ours", "test_peft_folders.py", "test_what_peft_cannot_have_is_refused_with_the_reason"),
    ("our folder: PEFT's, with fields of ours", "in and out", "ours", "../e2e/test_fresh_process.py",
     "test_train_save_and_reload_in_a_fresh_process"),
    ("LLaMA-Adapter V1 `.pth`, gates `(1, H, 1, 1)` or `(1,)`", "in",
     "the formulas, in the original layout", "test_importers.py", "test_llama_adapters_file_gives_llama_adapters_logits"),
    ("litgpt `.adapter`, gates `(1, 1, H, 1)`, `(1, H, 1, 1)` or `(1,)`", "in",
     "litgpt's formula, in both its layouts", "test_importers.py", "test_litgpts_file_gives_litgpts_logits"),
)  # fmt: skip
"""What is read and written, and the test that shows it."""


def deviations() -> str:
    """Return the page about deviations; every number has a test or a reason why not.

    Raises:
        ValueError: A number is missing, or is there twice.
    """
    tree = ast.parse(DEVIATIONS.read_text(encoding="utf-8"))
    rows: dict[int, str] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and (number := _number(node)) is not None:
            ours, _, theirs = (ast.get_docstring(node) or "").partition("\n\n")
            # A number that is there twice leaves the count short, and is noticed below.
            rows[number] = f"| {number} | {_line(ours)} | {_line(theirs)} | `{node.name}` |"
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NOT_APPLICABLE":
            for number, reason in ast.literal_eval(node.value).items():
                rows[number] = f"| {number} | not applicable: {_line(reason)} | | |"
    if sorted(rows) != list(range(1, NUM_DEVIATIONS + 1)):
        msg = f"Deviations are incomplete: expected 1 to {NUM_DEVIATIONS}, got {sorted(rows)}."
        raise ValueError(msg)
    return DEVIATIONS_HEADER + "\n".join(rows[number] for number in sorted(rows)) + "\n"


def formats() -> str:
    """Return the page about formats.

    Raises:
        ValueError: A test named does not exist.
    """
    lines = []
    for name, direction, origin, file, test in FORMATS:
        path = (INTEROP / file).resolve()
        if not re.search(rf"^def {test}\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            msg = f"Formats name a test that does not exist: {test} in {path}."
            raise ValueError(msg)
        where = path.relative_to(ROOT).as_posix()
        lines.append(f"| {name} | {direction} | {origin} | `{where}::{test}` |")
    return FORMATS_HEADER + "\n".join(lines) + "\n"


def _number(node: ast.FunctionDef) -> int | None:
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "deviation":
            number: int = ast.literal_eval(decorator.args[0])
            return number
    return None


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    """Write both pages."""
    for name, page in (("peft-deviations.md", deviations()), ("formats.md", formats())):
        (REFERENCE / name).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
