"""The demo: adapt, train, swap, disable, save, reload and revert a small language model.

Every figure it prints was measured in the run; the exit status is 1 if a check fails.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from checks import Identity
from evaluate import Score, evaluate, generate
from rich.console import Console
from rich.table import Table
from rich.text import Text
from steps import HERE, NUM_SHOWN, Demo, logits, read_configs, revert, run_demo, start, teach
from surgery_adaption_prompt import AdaptionPromptModel
from task import read_examples
from train import TrainingOptions

from surgery_core import Rule, Session

TRAINED, UNTRAINED = "extract", "other"


def adapt(demo: Demo) -> AdaptionPromptModel:
    """Plan, then put two adapters on the base."""
    configs = read_configs()
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


def steps(console: Console) -> None:
    """Run the steps one after the other."""
    demo = start(console)
    model = adapt(demo)
    with model.disable_adapter():
        before = measure(demo, model)
    teach(demo, model, TRAINED, read_examples("train.jsonl"), TrainingOptions())
    compare(demo, before, measure(demo, model))
    swap(demo, model)
    save_and_reload(demo, model)
    revert(demo, model)


if __name__ == "__main__":
    sys.exit(run_demo(steps))
