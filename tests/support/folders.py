"""Folders with adapters and records as other programs and releases write them, made of ours."""

import hashlib
import json

from safetensors import safe_open
from safetensors.torch import load_file, save_file


def header_of(path):
    """Return the metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def rewrite(path, change=None, metadata=None):
    """Write the tensors in a file anew, changed, without what stands in the header but for `metadata`."""
    tensors = load_file(path)
    if change is not None:
        change(tensors)
    save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})


def without_header(folder):
    """Have an adapter's folder as PEFT and 0.1.0 write it: the configuration is in a file alone."""
    rewrite(folder / "adapter_model.safetensors")
    return folder


def change_text(path, name, change):
    """Change the JSON of a name in the header of a safetensors file, and the file of that name."""
    data = json.loads(header_of(path)[name])
    change(data)
    text = json.dumps(data)
    rewrite(path, metadata={**header_of(path), name: text})
    if path.with_name(name).exists():
        path.with_name(name).write_text(text)


def as_two_files(folder):
    """Have a record as 0.1.0 wrote it: a file of JSON that names the other by its digest."""
    path = folder / "surgery.safetensors"
    data = json.loads(header_of(path)["surgery.json"])
    rewrite(path)
    data["tensors"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "surgery.json").write_text(json.dumps(data, indent=1))
    return folder
