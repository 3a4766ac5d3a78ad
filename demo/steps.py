"""The steps that both demos have: start, train an adapter, and take everything out again."""

import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from checks import CheckFailedError, Checks, Identity
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from smollm2 import WheelError, cache_folder, load
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from task import Example, read_examples, training_batch
from torch import Tensor
from train import TrainingOptions, train
from transformers import PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).parent
NUM_SHOWN = 4
SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What the steps share.

    Args:
        console: Where to print.
        checks: How to check.
        base: The base model.
        tokenizer: Its tokenizer.
        expected: Logits of the base on some chats, before anything was done to it.
        identity: What the base was made of then.
    """

    console: Console
    checks: Checks
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    expected: Tensor
    identity: Identity


def run_demo(steps: Callable[[Console], None]) -> int:
    """Run a demo, and say how it ended.

    Returns:
        The exit status.
    """
    console = Console()
    began = time.perf_counter()
    torch.manual_seed(SEED)
    try:
        steps(console)
    except (CheckFailedError, WheelError, subprocess.CalledProcessError) as err:
        console.print(Text(str(err), style="bold red"))
        return 1
    console.rule(f"Everything held; {time.perf_counter() - began:.0f} s in all")
    return 0


def start(console: Console) -> Demo:
    """Load the base, and take down what it computes and what it is made of."""
    console.rule("Base model")
    began = time.perf_counter()
    base, tokenizer = load()
    seconds = time.perf_counter() - began
    values = sum(parameter.numel() for parameter in base.parameters())
    console.print(
        f"SmolLM2-135M-Instruct, {values:,} parameters, {base.dtype}, ready after {seconds:.1f} s "
        f"(kept in {cache_folder()})\nPython {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} threads",
        highlight=False,
    )
    return Demo(
        console=console,
        checks=Checks(console),
        base=base,
        tokenizer=tokenizer,
        expected=logits(base, tokenizer),
        identity=Identity.of(base),
    )


def read_configs() -> dict[str, AdaptionPromptConfig]:
    """Read the configurations in `adapters.json`, by adapter name."""
    entries = json.loads((HERE / "adapters.json").read_text(encoding="utf-8"))
    return {name: AdaptionPromptConfig.from_mapping(entry) for name, entry in entries.items()}


@torch.inference_mode()
def logits(
    model: PreTrainedModel | AdaptionPromptModel, tokenizer: PreTrainedTokenizerBase
) -> Tensor:
    """Return the logits of some chats, `(batch, length, vocabulary)`."""
    batch = training_batch(tokenizer, read_examples("heldout.jsonl")[:NUM_SHOWN])
    found: Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits
    return found


def teach(
    demo: Demo,
    model: AdaptionPromptModel,
    name: str,
    examples: Sequence[Example],
    options: TrainingOptions,
) -> None:
    """Train the active adapter, called `name`, and show a bar."""
    demo.console.rule(f"Train {name!r}")
    demo.console.print(str(options), highlight=False)
    columns = (
        TextColumn("loss {task.fields[loss]:.4f}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    began = time.perf_counter()
    with Progress(*columns, console=demo.console) as progress:
        bar = progress.add_task("train", total=options.steps, loss=float("nan"))
        train(
            model,
            demo.tokenizer,
            examples,
            options,
            on_step=lambda loss: progress.update(bar, advance=1, loss=loss),
        )
    seconds = time.perf_counter() - began
    demo.console.print(
        f"{options.steps} steps of {options.batch_size} of the {len(examples)} examples "
        f"in {seconds:.0f} s",
        highlight=False,
    )


def revert(demo: Demo, model: AdaptionPromptModel) -> None:
    """Take everything out again."""
    demo.console.rule("Revert")
    base = model.unload()
    demo.checks.holds("unload() returns the very model", passed=base is demo.base)
    found = Identity.of(base)
    demo.checks.holds(
        f"the same {len(found.modules)} module and {len(found.tensors)} tensor objects",
        passed=(found.modules, found.tensors) == (demo.identity.modules, demo.identity.tensors),
    )
    demo.checks.holds(
        f"the same {len(found.keys)} state dict keys in the same order",
        passed=found.keys == demo.identity.keys,
    )
    demo.checks.holds(
        f"the same {len(found.trainable)} trainable parameters",
        passed=found.trainable == demo.identity.trainable,
    )
    demo.checks.same_bits(
        "the same logits, bit for bit", demo.expected, logits(base, demo.tokenizer)
    )
