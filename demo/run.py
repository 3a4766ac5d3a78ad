"""The demo: adapt, train, swap, disable, save, reload and revert a small language model.

Every figure it prints was measured in the run; the exit status is 1 if a check fails.
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from checks import CheckFailedError, Checks, Identity
from evaluate import Score, evaluate, generate
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from smollm2 import WheelError, cache_folder, load
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from task import read_examples, training_batch
from torch import Tensor
from train import TrainingOptions, train
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery_core import Rule, Session

HERE = Path(__file__).parent
TRAINED, UNTRAINED = "extract", "other"
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


def adapt(demo: Demo) -> AdaptionPromptModel:
    """Plan, then put two adapters on the base."""
    entries = json.loads((HERE / "adapters.json").read_text(encoding="utf-8"))
    configs = {name: AdaptionPromptConfig.from_mapping(entry) for name, entry in entries.items()}
    demo.console.rule("Plan: what would change")
    rule = Rule(operation="adaption_prompt", options=configs[TRAINED].to_mapping())
    lines = str(Session().plan(demo.base, [rule])).splitlines()
    demo.console.print(Text("\n".join([*lines[:4], "...", *lines[-2:]])), soft_wrap=True)
    demo.checks.holds(
        "planning changed no object of the model", passed=Identity.of(demo.base) == demo.identity
    )

    demo.console.rule("Apply: two adapters, gates at zero")
    model = AdaptionPromptModel(demo.base, configs, TRAINED)
    for name, config in configs.items():
        model.set_adapter(name)
        demo.console.print(
            f"{name!r}: K={config.adapter_len}, L={config.adapter_layers}, gate={config.gate!r}; "
            f"{model.trainable_summary()}",
            highlight=False,
        )
        demo.checks.same_bits(
            f"logits with {name!r} equal the base's, bit for bit",
            demo.expected,
            logits(model, demo.tokenizer),
        )
    model.set_adapter(TRAINED)
    return model


def teach(demo: Demo, model: AdaptionPromptModel) -> None:
    """Train the active adapter, and show a bar."""
    options = TrainingOptions()
    examples = read_examples("train.jsonl")
    demo.console.rule(f"Train {TRAINED!r}")
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


def measure(demo: Demo, model: AdaptionPromptModel) -> Score:
    """Measure the model on the held-out examples."""
    with demo.console.status("Replying to the held-out sentences ..."):
        return evaluate(model, demo.tokenizer, read_examples("heldout.jsonl"))


def compare(demo: Demo, before: Score, after: Score) -> None:
    """Show and check what training changed."""
    examples = read_examples("heldout.jsonl")
    demo.console.rule(f"{len(examples)} held-out sentences: other names, same prompt, greedy")
    table = Table("", "exact match", "mean loss per token")
    for who, score in (("base", before), (f"with {TRAINED!r}", after)):
        share = 100 * score.exact / len(examples)
        table.add_row(who, f"{score.exact} ({share:.1f} %)", f"{score.loss:.4f}")
    demo.console.print(table)
    replies = Table(show_lines=True)
    for title in ("sentence", "base", f"with {TRAINED!r}"):
        # Compact JSON has no spaces to break lines at.
        replies.add_column(title, overflow="fold")
    for i in range(NUM_SHOWN):
        row = (examples[i].sentence, before.replies[i], after.replies[i])
        replies.add_row(*(Text(cell) for cell in row))
    demo.console.print(replies)
    demo.checks.holds("exact match rose", passed=after.exact > before.exact)
    demo.checks.holds("mean loss fell", passed=after.loss < before.loss)


def swap(demo: Demo, model: AdaptionPromptModel) -> None:
    """Swap the adapters, and disable them."""
    demo.console.rule("Swap and disable")
    trained = logits(model, demo.tokenizer)
    demo.checks.holds(
        f"logits with the trained {TRAINED!r} differ from the base's",
        passed=not torch.equal(demo.expected, trained),
    )
    model.set_adapter(UNTRAINED)
    demo.checks.same_bits(
        f"swapped to the untrained {UNTRAINED!r}: the base's logits, bit for bit",
        demo.expected,
        logits(model, demo.tokenizer),
    )
    model.set_adapter(TRAINED)
    demo.checks.same_bits(
        f"swapped back: the logits of {TRAINED!r}, bit for bit",
        trained,
        logits(model, demo.tokenizer),
    )
    with model.disable_adapter():
        demo.checks.same_bits(
            "disabled: the base's logits, bit for bit",
            demo.expected,
            logits(model, demo.tokenizer),
        )


def save_and_reload(demo: Demo, model: AdaptionPromptModel) -> None:
    """Save the trained adapter, and use it in a fresh process on a freshly loaded base."""
    demo.console.rule("Save, and reload in a fresh process")
    sentences = [example.sentence for example in read_examples("heldout.jsonl")[:NUM_SHOWN]]
    tokens = generate(model, demo.tokenizer, sentences).tolist()
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, selected_adapters=[TRAINED])
        folder = Path(scratch) / TRAINED
        for file in sorted(folder.iterdir()):
            size = file.stat().st_size
            demo.console.print(f"{TRAINED}/{file.name}: {size:,} bytes", highlight=False)
        command = [sys.executable, str(HERE / "reload.py"), str(folder), str(NUM_SHOWN)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603 (our own script)
    demo.checks.holds("the fresh process ended well", passed=done.returncode == 0)
    reloaded = json.loads(done.stdout)
    number = sum(map(len, tokens))
    demo.checks.holds(f"the fresh process gave the same {number} tokens", passed=tokens == reloaded)


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


def main() -> int:
    """Run the demo.

    Returns:
        The exit status.
    """
    console = Console()
    began = time.perf_counter()
    torch.manual_seed(SEED)
    try:
        demo = start(console)
        model = adapt(demo)
        with model.disable_adapter():
            before = measure(demo, model)
        teach(demo, model)
        compare(demo, before, measure(demo, model))
        swap(demo, model)
        save_and_reload(demo, model)
        revert(demo, model)
    except (CheckFailedError, WheelError, subprocess.CalledProcessError) as err:
        console.print(Text(str(err), style="bold red"))
        return 1
    console.rule(f"Everything held; {time.perf_counter() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
