"""Small files that ask for much: what each is, and how it is read."""

import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterator

import torch
from fuzz.readers import READERS, Files

DEEP = b"[" * 100_000
MANY = 10**10
"""Values, of which a model of this size would take all memory there is."""


class Call:
    """Calls something when it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def deflated(data: bytes) -> bytes:
    """Return an archive that holds the same in less."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as before,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as after,
    ):
        for info in before.infolist():
            after.writestr(info.filename, before.read(info))
    return file.getvalue()


def edited(files: Files, name: str, **changes: object) -> Files:
    """Return files of which one, of JSON, has other values."""
    return {**files, name: json.dumps({**json.loads(files[name]), **changes}).encode()}


def record_of(rank: int) -> Files:
    """Return a record of low-rank terms that says of itself to be of another rank."""
    files = READERS["low_rank_record"].files()
    data = json.loads(files["surgery.json"])
    data["recipe"]["adapters"]["a"]["options"]["r"] = rank
    for edit in data["plans"]["a"]["edits"]:
        for spec in edit["added"]:
            spec["shape"] = [rank if size == 2 else size for size in spec["shape"]]
    return {**files, "surgery.json": json.dumps(data).encode()}


LAUGHS = "\n".join(
    ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]
)
MERGES = "\n".join(
    ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 40))]
)
VARIABLES = "\n".join(
    ["variables:", "  a0: xxxxxxxxxx"]
    + [f"  a{i}: '{f'${{a{i - 1}}}' * 10}'" for i in range(1, 12)]
    + ["models: {m: {rules: [{operation: '${a11}'}]}}"]
)


def bombs() -> Iterator[tuple[str, str, Files]]:
    """Yield a name, the reader, and files that it must refuse."""
    for name in ("recipe.yaml", "recipe.toml", "recipe.json"):
        yield f"nested {name}", name, {name: DEEP}
    yield "aliases", "recipe.yaml", {"recipe.yaml": LAUGHS.encode()}
    yield "merged aliases", "recipe.yaml", {"recipe.yaml": MERGES.encode()}
    yield "variables", "recipe.yaml", {"recipe.yaml": VARIABLES.encode()}
    yield "digits", "recipe.yaml", {"recipe.yaml": b"version: 0x" + b"f" * 50_000}
    dotted = ".".join("a" * 20_000).encode()
    yield "dotted key", "recipe.toml", {"recipe.toml": dotted + b" = 1"}
    yield "dotted table", "recipe.toml", {"recipe.toml": b"[" + dotted + b"]"}
    doubling = {f"{i}.yaml": f"extends: [{i + 1}.yaml, {i + 1}.yaml]".encode() for i in range(40)}
    yield (
        "recipes that double",
        "recipe.yaml",
        {**doubling, "recipe.yaml": b"extends: 0.yaml", "40.yaml": b"models: {}"},
    )
    yield "nested plan", "plan", {"plan.json": DEEP}
    yield "nested composition", "composition", {"c.json": b'{"weights": ' + DEEP}
    huge = b'{"weights": {"a": 1' + b"0" * 4000 + b"}}"
    yield "huge weight", "composition", {"c.json": huge}

    adapter = READERS["adapter"].files()
    config, weights = "adapter_config.json", "adapter_model.safetensors"
    yield "nested configuration", "adapter", {**adapter, config: DEEP}
    yield "long prompts", "adapter", edited(adapter, config, adapter_len=MANY)
    yield "longer prompts", "adapter", edited(adapter, config, adapter_len=10**30)
    yield "wide features", "adapter", edited(adapter, config, condition_size=MANY)
    rank = {"condition_size": 4, "condition_rank": MANY}
    yield "high rank of features", "adapter", edited(adapter, config, **rank)
    yield "narrow dtype", "adapter", edited(adapter, config, dtype="float8_e4m3fn")
    yield "nested base", "adapter", {**adapter, "base_fingerprint.json": DEEP}
    huge = b'{"format": 1, "answers": {"a": [1' + b"0" * 4000 + b"]}}"
    yield "huge answer", "adapter", {**adapter, "base_fingerprint.json": huge}
    for length in (2**40, 2**63, 2**64 - 1):
        data = struct.pack("<Q", length) + adapter[weights][8:]
        yield f"header of {length} bytes", "adapter", {**adapter, weights: data}
    header = struct.pack("<Q", len(DEEP)) + DEEP
    yield "nested header", "adapter", {**adapter, weights: header}

    yield "nested record", "record", {**READERS["record"].files(), "surgery.json": DEEP}
    yield "record of a high rank", "low_rank_record", record_of(MANY)
    low = READERS["low_rank"].files()
    yield "high rank", "low_rank", edited(low, config, r=MANY)
    yield "rank of any size", "low_rank", edited(low, config, r=10**30)
    yield "nested low-rank configuration", "low_rank", {**low, config: DEEP}

    for name, file in (
        ("llama_adapter", "adapter.pth"),
        ("litgpt", "a.pth"),
        ("scale_shift", "a.pth"),
        ("adapter.bin", "adapter_model.bin"),
    ):
        files = READERS[name].files()
        tensors = torch.load(io.BytesIO(files[file]), weights_only=True)
        tensors = tensors.get("model", tensors)
        key = min(tensors)
        row = tensors[key].reshape(-1)[:1]
        yield (
            f"{name}: one value for many",
            name,
            {**files, file: saved({**tensors, key: row.expand(MANY)})},
        )
        sparse = torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), row, (MANY,))
        yield f"{name}: sparse", name, {**files, file: saved({**tensors, key: sparse})}
        for function in (bytearray, torch.Tensor):
            data = saved({**tensors, key: Call(function, MANY)})
            yield f"{name}: {function.__name__}", name, {**files, file: data}
        zeros = {**tensors, key: torch.zeros(2_000_000)}
        yield f"{name}: deflated", name, {**files, file: deflated(saved(zeros))}
