"""Rows about adapters as things: switch, add, load and save, on a model too small to matter."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from measure import Samples, Step, clock, interleaved
from models import Models, Setting, Shape, Side, config_of
from rows import Case, Target
from torch import nn

LAYERS = 30
TINY = Setting(
    shape=Shape(hidden=64, intermediate=128, num_heads=4, num_kv_heads=2, vocabulary=256),
    sides=("peft", "ours"),
)
NUM_SWITCHES = 40
NUM_ADDED = 10
PEFT_STORED = 100
"""PEFT stores no more than this: adding 10,000 takes it minutes."""

Make = Callable[[Side, nn.Module], Step]


def switch(side: Side, model: nn.Module, stored: int) -> Step:
    """Return switches between the first and the last of the stored adapters; seconds of one."""
    for number in range(len(model.peft_config), stored):
        model.add_adapter(f"{number}", config_of(side, LAYERS))
    names = (f"{stored - 1}", "default")

    def step() -> float:
        started = clock()
        for number in range(NUM_SWITCHES):
            model.set_adapter(names[number % 2])
        return (clock() - started) / NUM_SWITCHES

    return step


def add(side: Side, model: nn.Module) -> Step:
    """Return additions of untrained adapters; seconds of one. They are deleted again."""
    config = config_of(side, LAYERS)

    def step() -> float:
        started = clock()
        for number in range(NUM_ADDED):
            model.add_adapter(f"added-{number}", config)
        elapsed = clock() - started
        for number in range(NUM_ADDED):
            model.delete_adapter(f"added-{number}")
        return elapsed / NUM_ADDED

    return step


def load(model: nn.Module, folder: Path) -> Step:
    """Return loads of an adapter from the folder its own side wrote; seconds of one."""
    model.save_pretrained(folder)

    def step() -> float:
        started = clock()
        for number in range(NUM_ADDED):
            model.load_adapter(folder, f"loaded-{number}")
        elapsed = clock() - started
        for number in range(NUM_ADDED):
            model.delete_adapter(f"loaded-{number}")
        return elapsed / NUM_ADDED

    return step


def save(model: nn.Module, folder: Path) -> Step:
    """Return writing one adapter's folder again and again; seconds of one."""

    def step() -> float:
        started = clock()
        for _ in range(NUM_ADDED):
            model.save_pretrained(folder, selected_adapters=["default"])
        return (clock() - started) / NUM_ADDED

    return step


def case(name: str, make: Make, *targets: Target) -> Case:
    """Return a row of PEFT and ours on fresh models."""

    def measure(models: Models, rounds: int) -> Samples:
        # Adapters that another row added are no part of this one.
        models.forget()
        steps = {side: make(side, model) for side, model in models.of(TINY).items()}
        try:
            return interleaved(steps, rounds)
        finally:
            models.forget()

    return Case(name=name, reference="peft", measure=measure, targets=targets)


def cases(folder: Path) -> Iterator[Case]:
    """Yield the rows; `folder` takes what they write."""
    half = Target(high=0.5)
    for stored in (2, 100):
        yield case(
            f"switch 30 layers, {stored} stored",
            lambda side, model, stored=stored: switch(side, model, stored),
            half,
        )
    yield case(
        f"switch 30 layers, 10,000 stored (PEFT {PEFT_STORED})",
        lambda side, model: switch(side, model, PEFT_STORED if side == "peft" else 10_000),
        half,
    )
    yield case("add an adapter", add, Target(high=1.0), Target(high=0.003, of="value"))
    yield case("load an adapter", lambda side, model: load(model, folder / side))
    yield case("save an adapter", lambda side, model: save(model, folder / side))


def temporary() -> tempfile.TemporaryDirectory[str]:
    """Return a folder for what the rows write."""
    return tempfile.TemporaryDirectory(prefix="surgery-bench-")
