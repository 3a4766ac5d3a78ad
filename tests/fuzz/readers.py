"""Every entry point that reads a file or folder which somebody else may have written."""

import functools
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import surgery_low_rank.plugin
import surgery_scale_shift.plugin
import torch
from core.edits import edited
from core.toys import Net, session
from pydantic import BaseModel, ConfigDict
from support.families import build, open_gates_
from support.folders import as_two_files, without_header
from support.foreign import OriginalLlama
from support.importing import SIZES, litgpt, original, read_original, read_quietly
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel, Composition
from surgery_adaption_prompt.checkpoints import expected_bytes
from surgery_adaption_prompt.show import show_folder
from torch import nn

from surgery_core import (
    ModelRecipe,
    PlanDocument,
    Session,
    SurgeryError,
    SurgeryWarning,
    dump_recipe,
    load_recipe,
    load_settings,
    read_record,
)
from surgery_core.record import show_record
from surgery_core.testing import assert_unchanged, snapshot

Files = dict[str, bytes]

RECIPE_YAML = b"""
extends: base.yaml
variables:
  rank: 4
  path: ${rank}/adapters
models:
  chat:
    source: ./model
    rules:
      - {operation: shift, select: "layers.{-2..}.down", expect: 2, options: {r: '${rank}'}}
    adapters:
      fr: &fr {operation: gate, select: ["layers.*.up", "regex:.*up$"], exclude: head}
      legal: {<<: *fr, optional: true, source: '${path}'}
    active: {fr: 0.5, legal: 2}
"""
RECIPE_TOML = b"""
version = 1
[variables]
rank = 4
[models.chat]
source = "./model"
active = "fr"
[[models.chat.rules]]
operation = "shift"
options = { r = "${rank}", x = [1, 2.5, true] }
[models.chat.adapters.fr]
operation = "gate"
select = "layers.*.up"
"""
RECIPE_JSON = b"""{"version": 1, "models": {"chat": {"freeze": false, "rules": [
{"operation": "shift", "select": "head", "options": {"a": [1, {"b": null}]}, "expect": 1}],
"adapters": {"fr": {"rules": [{"operation": "gate"}]}}, "active": "fr"}}}"""
BASE = b"models: {chat: {freeze: false, rules: [{operation: gate}]}}\n"
PLAN_OF = [{"operation": "gate", "select": "layers.*.up"}]


class Settings(BaseModel):
    """As a plugin's."""

    model_config = ConfigDict(extra="forbid", strict=True)
    steps: int
    rate: float = 0.1
    data: dict[str, str] = {}


@dataclass(frozen=True)
class Reader:
    """One way in.

    Args:
        files: Returns valid files, the first of which is passed on if a file is read.
        read: Reads the folder they are in, with a model if it needs one.
        make: Returns that model.
    """

    files: Callable[[], Files]
    read: Callable[[Path, nn.Module | None], object]
    make: Callable[[], nn.Module] | None = None


def _contents(folder: Path) -> Files:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _written(write: Callable[[Path], object]) -> Callable[[], Files]:
    """Return a function that returns what another writes to a folder, which it does once."""

    @functools.cache
    def files() -> Files:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            return _contents(Path(folder))

    return files


@functools.cache
def toy() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@functools.cache
def llama() -> nn.Module:
    return build()


@functools.cache
def original_llama() -> nn.Module:
    return OriginalLlama(SIZES).to_transformers()


@functools.cache
def adapted() -> AdaptionPromptModel:
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=2)
    return AdaptionPromptModel(build(), {"own": config}, "own")


def both() -> nn.Module:
    """Return the base that takes an adapter beside its own, and the one that takes its first."""
    return nn.ModuleList([adapted().get_base_model(), llama()])


def _recipe(name: str) -> Callable[[Path, object], object]:
    def read(folder: Path, _model: object) -> object:
        recipe = load_recipe(folder / name)
        for part in recipe.models.values():
            if part.source is not None:
                recipe.resolved(part.source)
        return dump_recipe(recipe)

    return read


def _plan(folder: Path, _model: object) -> object:
    # The caller reads the file.
    return PlanDocument.from_json((folder / "plan.json").read_text("utf-8", "replace")).render()


def _plan_text() -> Files:
    plan = edited(Net().eval()).plan.document.documents["wide"]
    return {"plan.json": plan.to_json().encode()}


def _record(folder: Path, model: nn.Module | None) -> object:
    show_record(read_record(folder))
    session().load(model, folder).revert()
    return session().load(model, folder, on_other_model="rematch").revert()


def _save_record(folder: Path) -> None:
    session().save(edited(Net().eval()), folder)


def _save_adapter(folder: Path) -> None:
    fields = {"adapter_len": 3, "adapter_layers": 2, "gate": "head"}
    saved = AdaptionPromptModel(build(), {"default": AdaptionPromptConfig(**fields)}, "default")
    open_gates_(saved.adapter_modules("default"))
    saved.save_pretrained(folder)


def _in_files(
    write: Callable[[Path], object], change: Callable[[Path], object]
) -> Callable[[], Files]:
    """Return a reader's files as other programs and releases write them: JSON is not in a header."""
    return _written(lambda folder: (write(folder), change(folder)))


def _save_adapter_bin(folder: Path) -> None:
    _save_adapter(folder)
    from safetensors.torch import load_file  # noqa: PLC0415 (only here)

    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def _adapter(folder: Path, _model: object) -> object:
    """Everything that reads such a folder; what one refuses, others may be able to show."""
    errors = []
    for read in (
        lambda: show_folder(str(folder)),
        lambda: expected_bytes(folder),
        lambda: adapted().load_adapter(folder, "read"),
        lambda: AdaptionPromptModel.from_pretrained(llama(), folder).unload(),
    ):
        try:
            read()
        except SurgeryError as err:
            errors.append(err)
        finally:
            if "read" in adapted().peft_config:
                adapted().delete_adapter("read")
    if errors:
        raise errors[0]
    return None


LOW_RANK = Session([surgery_low_rank.plugin], discover=False)
SCALE_SHIFT = Session([surgery_scale_shift.plugin], discover=False)


def _save_low_rank(folder: Path) -> None:
    adapter = {"operation": "low_rank", "select": "layers.*.up", "options": {"r": 2}}
    recipe = ModelRecipe.model_validate({"adapters": {"a": adapter}})
    found = LOW_RANK.plan_recipe(Net().eval(), recipe).apply()
    LOW_RANK.export(found, "a", folder)


def _record_low_rank(folder: Path) -> None:
    adapter = {"operation": "low_rank", "select": "layers.*.up", "options": {"r": 2}}
    recipe = ModelRecipe.model_validate({"adapters": {"a": adapter}})
    LOW_RANK.save(LOW_RANK.plan_recipe(Net().eval(), recipe).apply(), folder)


def _low_rank(folder: Path, model: nn.Module | None) -> object:
    adapter = {"operation": "low_rank", "source": str(folder)}
    recipe = ModelRecipe.model_validate({"adapters": {"a": adapter}})
    return LOW_RANK.plan_recipe(model, recipe).apply().revert()


def _save_scales(folder: Path) -> None:
    state = {}
    for name in ("stem", "layers.0.up"):
        state[f"{name}.adapter_scale"] = torch.rand(4)
        state[f"{name}.adapter_bias"] = torch.rand(4)
    torch.save({"model": state}, folder / "a.pth")


def _scales(folder: Path, model: nn.Module | None) -> object:
    adapter = {
        "operation": "scale_shift",
        "select": "regex:stem|layers.0.up",
        "source": str(folder / "a.pth"),
    }
    recipe = ModelRecipe.model_validate({"adapters": {"a": adapter}})
    return SCALE_SHIFT.plan_recipe(model, recipe).apply().revert()


READERS = {
    "recipe.yaml": Reader(
        lambda: {"recipe.yaml": RECIPE_YAML, "base.yaml": BASE}, _recipe("recipe.yaml")
    ),
    "recipe.toml": Reader(lambda: {"recipe.toml": RECIPE_TOML}, _recipe("recipe.toml")),
    "recipe.json": Reader(lambda: {"recipe.json": RECIPE_JSON}, _recipe("recipe.json")),
    "settings": Reader(
        lambda: {"settings.yaml": b"steps: 3\nrate: 1e-3\ndata: {train: a.jsonl}\n"},
        lambda folder, _: load_settings(folder / "settings.yaml", Settings),
    ),
    "plan": Reader(_plan_text, _plan),
    "record": Reader(_in_files(_save_record, as_two_files), _record, toy),
    "record in one file": Reader(_written(_save_record), _record, toy),
    "composition": Reader(
        _written(lambda folder: Composition({"fr": 0.7, "legal": 1}).save(folder / "c.json")),
        lambda folder, _: Composition.load(folder / "c.json"),
    ),
    "adapter": Reader(_in_files(_save_adapter, without_header), _adapter, both),
    "adapter in one file": Reader(
        _in_files(_save_adapter, lambda folder: [p.unlink() for p in folder.glob("*.json")]),
        _adapter,
        both,
    ),
    "adapter.bin": Reader(_written(_save_adapter_bin), _adapter, both),
    "low_rank": Reader(_in_files(_save_low_rank, without_header), _low_rank, toy),
    "low_rank in one file": Reader(_written(_save_low_rank), _low_rank, toy),
    "low_rank_record": Reader(
        _in_files(_record_low_rank, as_two_files),
        lambda folder, model: LOW_RANK.load(model, folder).revert(),
        toy,
    ),
    "scale_shift": Reader(_written(_save_scales), _scales, toy),
    "llama_adapter": Reader(
        _written(original),
        lambda folder, model: read_original(folder / "adapter.pth", model),
        original_llama,
    ),
    "litgpt": Reader(
        _written(lambda folder: litgpt(folder)[0].rename(folder / "a.pth")),
        lambda folder, model: read_quietly(folder / "a.pth", model),
        original_llama,
    ),
}


def check(name: str, files: Files, folder: Path) -> SurgeryError | None:
    """Read files, and check what must hold whatever they are.

    Args:
        name: Of the reader.
        files: What they hold, by name.
        folder: Empty; they are written to it.

    Returns:
        The error they are refused with; None if they are read.

    Raises:
        AssertionError: The model or the folder is not as it was.
        Exception: Whatever is no error of this package's: the finding.
    """
    reader = READERS[name]
    for path, data in files.items():
        (folder / path).write_bytes(data)
    model = None if reader.make is None else reader.make()
    before = None if model is None else snapshot(model)
    refused = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurgeryWarning)
        try:
            reader.read(folder, model)
        except SurgeryError as err:
            refused = err
    if model is not None and before is not None:
        assert_unchanged(before, model, subject=f"Reading {name}")
    assert files == _contents(folder), f"Reading {name} wrote to its folder."
    return refused
