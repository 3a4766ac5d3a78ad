"""Start two processes on this machine, with gloo and one thread each, as users start them."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
EXAMPLES = ROOT / "docs/examples/distributed"
PROCESSES = 2
LIMIT = 240
"""Seconds until what hangs is ended; alone on a machine a launch takes about fifteen."""


def launch(script: Path, *args: object, config: Path | None = None) -> str:
    """Run a script in two processes and return what they printed.

    Args:
        script: The file.
        *args: Its arguments.
        config: For `accelerate launch`; without one torch's own launcher is used.

    Raises:
        AssertionError: It failed, or took too long; with the end of what it printed.
    """
    if config is None:
        module = ["torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    else:
        module = ["accelerate.commands.launch", "--config_file", str(config)]
        module += ["--main_process_port", "0"]
    return run(["-m", *module, str(script), *map(str, args)])


def run(command: list[str]) -> str:
    """Run Python with arguments, and return what it printed; see `launch`."""
    settings = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # accelerate looks for GPUs otherwise, also where a configuration says that there are none.
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        # What is there besides: a library that is installed elsewhere.
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.Popen(  # noqa: S603 (scripts of our own)
        [sys.executable, *command],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        end(process.pid)
        output, _ = process.communicate()
        msg = f"Nothing came of {command} in {LIMIT} s:\n{output[-3000:]}"
        raise AssertionError(msg) from None
    if process.returncode != 0:
        msg = f"{command} failed:\n{output[-6000:]}"
        raise AssertionError(msg)
    return output


def end(pid: int) -> None:
    """Kill a launcher and what it started, which has sessions of its own and holds its output open."""
    launcher = psutil.Process(pid)
    for process in (*launcher.children(recursive=True), launcher):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@dataclass(frozen=True)
class Outcome:
    """What the processes of a launch handed over.

    Args:
        facts: Of each process.
        tensors: Of each process, by `name:key`.
    """

    facts: tuple[dict, ...]
    tensors: tuple[dict, ...]

    @classmethod
    def of(cls, folder):
        stems = [Path(folder) / f"rank{rank}" for rank in range(PROCESSES)]
        return cls(
            tuple(json.loads(stem.with_suffix(".json").read_text()) for stem in stems),
            tuple(load_file(stem.with_suffix(".safetensors")) for stem in stems),
        )

    def group(self, name):
        """Return the tensors of the first process that were kept under a name."""
        return {
            key.partition(":")[2]: tensor
            for key, tensor in self.tensors[0].items()
            if key.partition(":")[0] == name
        }

    def assert_same(self):
        """Check that all processes have the very same tensors."""
        for other in self.tensors[1:]:
            assert self.tensors[0].keys() == other.keys()
            for key, tensor in self.tensors[0].items():
                assert torch.equal(tensor, other[key]), key


def assert_near(expected, actual, tolerance):
    """Check tensors by name: same names, shapes, dtypes, and values up to an absolute tolerance."""
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert tensor.dtype is actual[name].dtype
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=tolerance, msg=name)


def assert_same_folders(expected, actual, tolerance):
    """Check folders of adapters: the same files, the same configuration, tensors that are near."""
    assert sorted(p.name for p in expected.iterdir()) == sorted(p.name for p in actual.iterdir())
    ours, theirs = ((where / "adapter_config.json").read_text() for where in (expected, actual))
    assert ours == theirs
    assert_near(
        *(load_file(where / "adapter_model.safetensors") for where in (expected, actual)), tolerance
    )
