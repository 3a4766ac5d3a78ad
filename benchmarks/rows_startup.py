"""Rows about what comes before a model runs: planning for a large one, and starting Python."""

import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import peft
import torch
from measure import Samples, Step, clock, interleaved, peak_bytes
from models import LENGTH, Models, Shape, peft_config
from rows import Case, Target
from transformers import LlamaForCausalLM

from surgery_core import Rule, Session

LARGE = Shape(
    num_layers=80,
    hidden=8192,
    intermediate=28672,
    num_heads=64,
    num_kv_heads=8,
    vocabulary=128256,
    is_tied=False,
)


def on_meta() -> LlamaForCausalLM:
    """Return a model of a 70B Llama's shape that has no values."""
    with torch.device("meta"):
        return LlamaForCausalLM(LARGE.config())


def plan_and_apply() -> Step:
    """Return planning and applying as a caller would, from finding the plugins on."""
    model = on_meta()
    options = {"adapter_len": LENGTH, "adapter_layers": LARGE.num_layers}

    def step() -> float:
        started = clock()
        rule = Rule(operation="adaption_prompt", options=options)
        surgery = Session().plan(model, [rule]).apply()
        elapsed = clock() - started
        surgery.revert()
        return elapsed

    return step


def wrap_with_peft() -> Step:
    """Return PEFT's wrapping, of a new model each time because it cannot be undone."""

    def step() -> float:
        model = on_meta()
        started = clock()
        peft.get_peft_model(model, peft_config(LARGE.num_layers))
        return clock() - started

    return step


def timed(_: Models, rounds: int) -> Samples:
    """Time both sides on the large model."""
    return interleaved({"peft": wrap_with_peft(), "ours": plan_and_apply()}, rounds)


def allocated(_: Models, rounds: int) -> Samples:  # noqa: ARG001 (a case's signature)
    """Measure what both sides allocate besides tensors on the meta device."""
    steps = {"peft": wrap_with_peft(), "ours": plan_and_apply()}
    return {side: [float(peak_bytes(step))] for side, step in steps.items()}


def cold(name: str, command: Sequence[str]) -> Case:
    """Return a row of a command in a process of its own."""

    def measure(_: Models, rounds: int) -> Samples:
        def step() -> None:
            subprocess.run(command, check=True, capture_output=True)  # noqa: S603 (our own command)

        return interleaved({"ours": step}, rounds)

    return Case(name=name, reference="none", measure=measure)


def cases() -> Iterator[Case]:
    """Yield the rows."""
    large = "80 layers on meta"
    yield Case(
        name=f"plan and apply, {large}",
        reference="peft",
        measure=timed,
        targets=(Target(high=0.15, of="value"),),
    )
    yield Case(
        name=f"plan and apply, {large}: memory",
        reference="peft",
        measure=allocated,
        # Drawing on the meta device makes scalars of 8 bytes on the CPU; a tensor with values is more.
        targets=(Target(high=1024.0, of="value"),),
        unit="bytes",
    )
    yield cold("cold import surgery_core", [sys.executable, "-c", "import surgery_core"])
    script = Path(sysconfig.get_path("scripts")) / "surgery"
    yield cold("cold surgery --help", [str(script), "--help"])
