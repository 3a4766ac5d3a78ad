"""Damage done to valid files: to their bytes, and to what they say.

Every choice is made by a function that returns a number below the one it is given, so that Hypothesis
and a coverage-guided fuzzer draw from the same damage.
"""

import io
import json
import re
import struct
from collections.abc import Callable

import torch
from safetensors.torch import load, save

Pick = Callable[[int], int]

NAMES = (
    "",
    "x",
    "../../x",
    "/etc/passwd",
    "a\x00b",
    "\x1b]0;x\x07",
    "x" * 3000,
    "\ud800",
    "a:b",
    ".x",
)
_DEEP, _DIGITS, _HUGE = "@deep@", "@digits@", "@huge@"
_RAW = {
    _DEEP: "[" * 3000 + "]" * 3000,
    _DIGITS: "7" * 6000,
    _HUGE: "1e999",
}
"""What no writer of JSON writes, by what stands for it until the end."""

VALUES = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 10**400, 0.5, 1e308, float("nan")),
    *([], {}, [[]], [None], {"": None}, {"a": {"b": []}}, [1, "a", None]),
    *NAMES,
    *(_DEEP, _DIGITS, _HUGE, "class:x:Y", "regex:(", "{0..", "float8_e4m3fn", "cpu"),
)

_TEXTS = (
    *("", "[", "]", "{", "}", ":", "-", "'", '"', "\t", "\x00", "\x85", "\ufeff", "#", "|", ">"),
    *(
        "&a [*a, *a]",
        "*a",
        "<<: *a",
        "!!python/object/apply:os.abort []",
        "!!set {a}",
        "!!binary x",
    ),
    *("!!int x", "2024-01-01", ".nan", "0x" + "f" * 5000, "1" * 6000, "1:" * 3000 + "1", "~"),
    *(
        "${a}",
        "${env:HOME}",
        "${",
        "$$",
        "extends: x.yaml",
        "- - - -",
        "[" * 3000,
        "a." * 3000 + "a",
    ),
    *("[[a]]", "a = 1", "'''", '"""', "1979-05-27", "inf", "\\UFFFFFFFF", "x" * 3000),
)


def damaged(name: str, data: bytes, pick: Pick) -> bytes:
    """Return a file with one to three things in it changed.

    Args:
        name: Of the file; its suffix says what it holds.
        data: What it holds.
        pick: Makes the choices.
    """
    for _ in range(1 + pick(3)):
        kinds = _KINDS.get(name.rpartition(".")[2], [])
        kind = pick(1 + 3 * len(kinds))
        data = kinds[(kind - 1) // 3](data, pick) if kind else _bytes(data, pick)
    return data


def _bytes(data: bytes, pick: Pick) -> bytes:
    """Flip, cut, repeat or insert."""
    at = pick(len(data) + 1)
    what = pick(5)
    if what == 0:
        return data[:at]
    if what == 1:
        return data[:at] + bytes(pick(256) for _ in range(1 + pick(4))) + data[at:]
    if what == 2:
        end = min(len(data), at + 1 + pick(64))
        return data[:at] + data[end:]
    if what == 3:
        end = min(len(data), at + 1 + pick(64))
        return data[:end] + data[at:]
    return data[:at] + bytes([pick(256)]) + data[at + 1 :]


def _changed(value, pick: Pick):  # noqa: PLR0911 (one for each change)
    """Return plain data with one thing in it changed."""
    if isinstance(value, dict) and value and pick(6):
        key = list(value)[pick(len(value))]
        what = pick(8)
        if what == 0:
            return {name: item for name, item in value.items() if name != key}
        if what == 1:
            new = NAMES[pick(len(NAMES))]
            return {new if name == key else name: item for name, item in value.items()}
        return {**value, key: _changed(value[key], pick)}
    if isinstance(value, list) and value and pick(6):
        at = pick(len(value))
        what = pick(8)
        if what == 0:
            return value[:at] + value[at + 1 :]
        if what == 1:
            return value[: at + 1] + value[at:]
        return [*value[:at], _changed(value[at], pick), *value[at + 1 :]]
    return VALUES[pick(len(VALUES))]


def _json(data: bytes, pick: Pick) -> bytes:
    try:
        changed = _changed(json.loads(data), pick)
        text = json.dumps(changed, ensure_ascii=bool(pick(2)))
    except (ValueError, RecursionError):
        # Damaged before.
        return _bytes(data, pick)
    for stand_in, raw in _RAW.items():
        text = text.replace(f'"{stand_in}"', raw)
    return text.encode("utf-8", "surrogatepass")


def _text(data: bytes, pick: Pick) -> bytes:
    """Put odd text in the place of a word, a sign or a space."""
    text = data.decode("utf-8", "replace")
    parts = re.findall(r"\w+|\s+|[^\w\s]", text)
    if not parts:
        return _bytes(data, pick)
    parts[pick(len(parts))] = _TEXTS[pick(len(_TEXTS))]
    return "".join(parts).encode("utf-8", "surrogatepass")


_LENGTHS = (0, 1, 2**31, 2**63, 2**64 - 1)


def _header(data: bytes, pick: Pick) -> bytes:
    """Change the header of a file of safetensors, or what it says of its own length."""
    if len(data) < 8:
        return _bytes(data, pick)
    (length,) = struct.unpack("<Q", data[:8])
    if not pick(6):
        return struct.pack("<Q", _LENGTHS[pick(len(_LENGTHS))]) + data[8:]
    header = _inner(data[8 : 8 + length], pick) if pick(2) else _json(data[8 : 8 + length], pick)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _inner(header: bytes, pick: Pick) -> bytes:
    """Change the JSON of a text in a header."""
    try:
        found = json.loads(header)
        texts = found["__metadata__"]
        name = sorted(texts)[pick(len(texts))]
        texts[name] = _json(texts[name].encode(), pick).decode("utf-8", "replace")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        # Damaged before.
        return _json(header, pick)
    return json.dumps(found).encode()


_DTYPES = (
    *(torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int8, torch.int64, torch.bool, torch.complex64),
)


def _odd(tensor, pick: Pick):
    """Return another tensor: of another dtype, shape or with other values."""
    what = pick(6)
    if what == 0:
        return tensor.float().to(_DTYPES[pick(len(_DTYPES))])
    if what == 1:
        return torch.full_like(tensor, (float("nan"), float("inf"), -1e38)[pick(3)])
    if what == 2:
        return tensor.flatten()
    if what == 3:
        return tensor[..., :0]
    if what == 4:
        return torch.zeros(())
    return tensor.unsqueeze(0)


def _tensors(data: bytes, pick: Pick) -> bytes:
    """Write other tensors, well-formed."""
    try:
        tensors = load(data)
        return save(_others(tensors, pick), metadata={"format": "pt"})
    except Exception:  # noqa: BLE001 (damaged before; or names that cannot be written)
        return _bytes(data, pick)


def _others(tensors, pick: Pick):
    if not tensors:
        return {"x": torch.zeros(1)}
    key = sorted(tensors)[pick(len(tensors))]
    what = pick(4)
    if what == 0:
        return {name: tensor for name, tensor in tensors.items() if name != key}
    if what == 1:
        new = (*NAMES, f"{key}.x", key.upper(), key[1:])[pick(len(NAMES) + 3)]
        return {new if name == key else name: tensor for name, tensor in tensors.items()}
    changed = _odd(tensors[key], pick)
    return {**tensors, key: changed.contiguous() if what == 2 else changed.clone()}


MOST = 10**6
"""Values of a tensor that is changed."""


def _pickled(data: bytes, pick: Pick) -> bytes:
    """Write something else with `torch.save`."""
    try:
        tensors = torch.load(io.BytesIO(data), weights_only=True)
        inner = tensors.get("model", tensors)
        if any(tensor.numel() > MOST for tensor in inner.values()):
            # It stands for many already; what is made of it would be as large as it says.
            return _bytes(data, pick)
        what = pick(5)
        key = sorted(inner)[pick(len(inner))]
        if what == 0:
            changed = {**inner, key: VALUES[pick(len(VALUES))]}
        elif what == 1:
            changed = {**inner, key: inner[key].reshape(-1)[:1].expand(10**9)}
        elif what == 2:
            changed = {"model": inner, "x": VALUES[pick(len(VALUES))]}
        else:
            changed = _others(inner, pick)
        file = io.BytesIO()
        torch.save(changed, file, _use_new_zipfile_serialization=bool(pick(4)))
        return file.getvalue()
    except Exception:  # noqa: BLE001 (damaged before)
        return _bytes(data, pick)


_KINDS: dict[str, list[Callable[[bytes, Pick], bytes]]] = {
    "json": [_json],
    "yaml": [_text],
    "toml": [_text],
    "safetensors": [_header, _tensors],
    "pth": [_pickled],
    "bin": [_pickled],
}
