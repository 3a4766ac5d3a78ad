"""Rows about training: seconds and memory of a forward and backward, ours against PEFT's."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from measure import Samples, Step, interleaved, peak_bytes
from models import Models, Setting
from rows import Case, Target
from torch import nn

BATCH, LENGTH = 4, 64
TIME = (Target(high=0.80),)


def training(model: nn.Module) -> Step:
    """Return a forward and backward of the adapter's parameters; gradients are dropped."""
    ids = torch.randint(3, 1000, (BATCH, LENGTH), device=model.device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    return step


@contextmanager
def differentiated(base: nn.Module, layers: int) -> Iterator[None]:
    """Let gradients of the base begin where the adapted layers do: the least that training can cost."""
    base.requires_grad_(requires_grad=False)
    below = [base.model.embed_tokens, *base.model.layers][-layers - 1]
    handle = below.register_forward_hook(lambda _, __, output: output.detach().requires_grad_())
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def in_training(models: dict[str, nn.Module], *, is_checkpointed: bool) -> Iterator[None]:
    """Set the mode, and checkpointing, for a while."""
    for model in models.values():
        model.train()
        if is_checkpointed:
            model.activation_checkpointing_enable()
    try:
        yield
    finally:
        for model in models.values():
            model.eval()
            if is_checkpointed:
                model.activation_checkpointing_disable()


def case(setting: Setting, *, is_checkpointed: bool, is_memory: bool) -> Case:
    """Return a row of PEFT, ours, and the base without anything to train."""

    def measure(models: Models, rounds: int) -> Samples:
        found = models.of(setting)
        with (
            differentiated(found["base"], setting.adapter_layers),
            in_training(found, is_checkpointed=is_checkpointed),
        ):
            steps = {side: training(model) for side, model in found.items()}
            if not is_memory:
                return interleaved(steps, rounds)
            for step in steps.values():
                step()
            return {side: [float(peak_bytes(step))] for side, step in steps.items()}

    what = "peak memory" if is_memory else "step"
    checkpointed = ", checkpointed" if is_checkpointed else ""
    return Case(
        name=f"training {what} {BATCH}x{LENGTH}, L={setting.adapter_layers}{checkpointed}",
        reference="peft",
        measure=measure,
        targets=() if is_memory or setting.device != "cpu" else TIME,
        unit="bytes" if is_memory else "s",
    )


def cases(device: str) -> Iterator[Case]:
    """Yield the rows for a device."""
    for layers in (30, 8):
        setting = Setting(device=device, adapter_layers=layers)
        for is_memory in (False, True):
            for is_checkpointed in (False, True):
                yield case(setting, is_checkpointed=is_checkpointed, is_memory=is_memory)
