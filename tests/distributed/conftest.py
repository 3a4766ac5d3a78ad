"""The example's base and data, and what one process makes of them."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from distributed.launching import EXAMPLES, run
from support.families import Shape, build, tokens


@dataclass(frozen=True)
class Example:
    """What the scripts of the manual get, and what one of them gave in one process.

    Args:
        folder: Has `base`, `tokens.pt`, and the adapter in `alone`.
        losses: Of each step.
    """

    folder: Path
    losses: list[float]

    def arguments(self, output):
        return self.folder / "base", self.folder / "tokens.pt", self.folder / output


def losses_of(printed):
    """Return the losses that a script printed once; another process may have written behind one."""
    found = re.findall(r"loss (\d+\.\d{9})", printed)
    assert 3 == len(found)
    return [float(loss) for loss in found]


@pytest.fixture(scope="session")
def losses():
    return losses_of


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("example")
    build("llama", Shape(layers=3)).save_pretrained(folder / "base")
    torch.save(tokens(12, 9), folder / "tokens.pt")
    example = Example(folder, [])
    words = [EXAMPLES / "train.py", *example.arguments("alone"), "--batch-size", "4"]
    return Example(folder, losses_of(run([*map(str, words)])))
