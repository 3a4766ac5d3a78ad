"""A chapter of the demo: two trained adapters at once, by row, by thread, by weight and from disk.

Every figure it prints was measured in the run; the exit status is 1 if a check fails.
"""

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import surname
import task
import torch
from evaluate import batches, generate, generate_all, without_end
from rich.console import Console
from rich.table import Table
from rich.text import Text
from smollm2 import load
from steps import NUM_SHOWN, Demo, logits, read_configs, revert, run_demo, start, teach
from surgery_adaption_prompt import (
    AdapterStore,
    AdaptionPromptConfig,
    AdaptionPromptModel,
    Composition,
    StoreError,
)
from task import Example, read_examples
from train import TrainingOptions

EXTRACT, SURNAME, BASE = "extract", "surname", "__base__"
ROWS = (EXTRACT, SURNAME, BASE)
"""What rows of a mixed batch get, in turn."""
STEPS = {EXTRACT: 40, SURNAME: 30}
NUM_TIMED = 12

Replies = dict[str, list[list[int]]]
"""Tokens of the replies to the held-out sentences, by who replied alone."""


def main(console: Console) -> None:
    """Run the steps one after the other."""
    demo = start(console)
    model = train_both(demo)
    replies = compare(demo, model)
    show_rows(demo, model)
    mix_rows(demo, model, replies)
    time_ways(demo, model)
    run_threads(demo, model, replies)
    add_up(demo, model)
    serve(demo, model)
    console.rule("Status")
    model.set_adapter(EXTRACT)
    console.print(Text(str(model.status())), soft_wrap=True)
    revert(demo, model)


def heldout(name: str) -> list[Example]:
    """Return the held-out examples of an adapter's task; the base has that of `extract`."""
    examples = read_examples("heldout.jsonl")
    return [surname.surname_first(example) for example in examples] if name == SURNAME else examples


def are_exact(demo: Demo, name: str, replies: Sequence[Sequence[int]]) -> list[bool]:
    """Return which replies to the held-out sentences are right for an adapter's task."""
    measure = surname.is_exact if name == SURNAME else task.is_exact
    return [
        measure(text(demo, tokens), example.answer)
        for tokens, example in zip(replies, heldout(name), strict=True)
    ]


def text(demo: Demo, tokens: Sequence[int]) -> str:
    """Return what tokens say."""
    return str(demo.tokenizer.decode(tokens, skip_special_tokens=True))


@contextmanager
def alone(model: AdaptionPromptModel, name: str) -> Iterator[None]:
    """Have one adapter in the model, or none."""
    if name == BASE:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(name)
        yield


def train_both(demo: Demo) -> AdaptionPromptModel:
    """Train the two adapters, one after the other."""
    configs = {
        EXTRACT: read_configs()[EXTRACT],
        SURNAME: AdaptionPromptConfig(adapter_len=8, adapter_layers=16, gate="head"),
    }
    examples = read_examples("train.jsonl")
    answers = {EXTRACT: examples, SURNAME: [surname.surname_first(e) for e in examples]}
    model = AdaptionPromptModel(demo.base, configs, EXTRACT)
    for name in configs:
        model.set_adapter(name)
        teach(demo, model, name, answers[name], TrainingOptions(steps=STEPS[name]))
    return model


def compare(demo: Demo, model: AdaptionPromptModel) -> Replies:
    """Show and check what each adapter learned."""
    sentences = [example.sentence for example in heldout(BASE)]
    demo.console.rule(f"{len(sentences)} held-out sentences: other names, greedy")
    replies = {}
    with demo.console.status("Replying to the held-out sentences ..."):
        for name in ROWS:
            with alone(model, name):
                replies[name] = generate_all(model, demo.tokenizer, sentences)
        with alone(model, BASE):
            asked = generate_all(model, demo.tokenizer, sentences, prompt=surname.asking_prompt)
    exact = {name: sum(are_exact(demo, name, replies[name])) for name in ROWS}
    guessed = sum(are_exact(demo, SURNAME, replies[BASE]))
    told = sum(are_exact(demo, SURNAME, asked))
    table = Table("", "the prompt asks for", "right is", "exact match")
    for row, count in (
        (("base", "JSON", "the JSON"), exact[BASE]),
        ((f"with {EXTRACT!r}", "JSON", "the JSON"), exact[EXTRACT]),
        (("base", "JSON", "Last name, First name"), guessed),
        (("base, told the task", "Last name, First name", "Last name, First name"), told),
        ((f"with {SURNAME!r}", "JSON", "Last name, First name"), exact[SURNAME]),
    ):
        table.add_row(*row, f"{count} ({100 * count / len(sentences):.1f} %)")
    demo.console.print(table)
    demo.console.print(
        "Both adapters were trained on one prompt, which asks for JSON: what comes back is up to "
        "the adapter.\nTheir sizes and steps were chosen with an eye on the same sentences; one "
        "seed."
    )
    demo.checks.holds(f"{EXTRACT!r} beats the base", passed=exact[EXTRACT] > exact[BASE])
    demo.checks.holds(
        f"{SURNAME!r} beats the base, even one that is told the task",
        passed=exact[SURNAME] > max(told, guessed),
    )
    return replies


def show_rows(demo: Demo, model: AdaptionPromptModel) -> None:
    """Show one batch in which each row has an adapter of its own, and check its logits."""
    demo.console.rule("One batch: the same prompts, an adapter for each row")
    sentences = [e.sentence for e in heldout(BASE)[:NUM_SHOWN] for _ in ROWS]
    names = [*ROWS] * NUM_SHOWN
    tokens = generate(model, demo.tokenizer, sentences, adapter_names=names)
    table = Table()
    for title in ("sentence", "adapter", "reply"):
        # Compact JSON has no spaces to break lines at.
        table.add_column(title, overflow="fold")
    for index, (sentence, name, row) in enumerate(zip(sentences, names, tokens, strict=True)):
        shown = sentence if index % len(ROWS) == 0 else ""
        reply = text(demo, without_end(row, demo.tokenizer))
        is_last = index % len(ROWS) == len(ROWS) - 1
        table.add_row(*(Text(cell) for cell in (shown, name, reply)), end_section=is_last)
    demo.console.print(table)

    names = [EXTRACT, BASE, SURNAME, BASE]
    with model.activated(names):
        found = logits(model, demo.tokenizer)
    for row, name in enumerate(names):
        if name == BASE:
            demo.checks.same_bits(
                f"one forward of {names}: the logits of row {row} are the base's, bit for bit",
                demo.expected[row],
                found[row],
            )
        else:
            with alone(model, name):
                expected = logits(model, demo.tokenizer)[row]
            off = ((found[row] - expected).abs().max() / expected.abs().max()).item()
            demo.checks.holds(
                f"row {row} has the logits of {name!r} alone, up to rounding ({off:.0e} of the "
                "largest)",
                passed=off < 1e-4,  # noqa: PLR2004 (far above rounding, far below another adapter)
            )


def mix_rows(demo: Demo, model: AdaptionPromptModel, replies: Replies) -> None:
    """Reply to all held-out sentences in mixed batches, and compare with each adapter alone."""
    sentences = [example.sentence for example in heldout(BASE)]
    names = [ROWS[index % len(ROWS)] for index in range(len(sentences))]
    demo.console.rule(f"All {len(sentences)} held-out sentences, adapters in turn")
    with demo.console.status("Replying to the held-out sentences ..."):
        mixed = generate_all(model, demo.tokenizer, sentences, adapter_names=names)
    table = Table("adapter", "rows", "exact match in mixed batches", "exact match alone, same rows")
    for name in ROWS:
        rows = [index for index, chosen in enumerate(names) if chosen == name]
        counts = [
            sum(exact[index] for index in rows)
            for exact in (are_exact(demo, name, mixed), are_exact(demo, name, replies[name]))
        ]
        table.add_row(name, str(len(rows)), *map(str, counts))
    demo.console.print(table)
    for name in ROWS:
        rows = [index for index, chosen in enumerate(names) if chosen == name]
        demo.checks.holds(
            f"{len(rows)} rows with {name!r}: the same {sum(len(mixed[i]) for i in rows)} tokens "
            "as it gives alone in these batches",
            passed=all(mixed[index] == replies[name][index] for index in rows),
        )


def time_ways(demo: Demo, model: AdaptionPromptModel) -> None:
    """Measure how fast rows with different adapters are replied to, in three ways."""
    sentences = [example.sentence for example in heldout(BASE)[:NUM_TIMED]]
    names = [ROWS[index % len(ROWS)] for index in range(NUM_TIMED)]
    demo.console.rule(f"How fast: {NUM_TIMED} sentences, adapters in turn")

    def reply(chosen: Sequence[int], **given: Sequence[str]) -> int:
        tokens = generate(model, demo.tokenizer, [sentences[i] for i in chosen], **given)
        return sum(len(without_end(row, demo.tokenizer)) for row in tokens)

    def swapping(groups: Sequence[Sequence[int]]) -> int:
        number = 0
        for chosen in groups:
            with alone(model, names[chosen[0]]):
                number += reply(chosen)
        return number

    ways: dict[str, Callable[[], int]] = {
        "one by one, swapped for each": lambda: swapping([[i] for i in range(NUM_TIMED)]),
        "sorted by adapter, a batch for each": lambda: swapping(
            [range(first, NUM_TIMED, len(ROWS)) for first in range(len(ROWS))]
        ),
        "one mixed batch": lambda: reply(range(NUM_TIMED), adapter_names=names),
    }
    table = Table("", "tokens", "seconds", "tokens per second", "ratio")
    slowest = 0.0
    for way, run in ways.items():
        began = time.perf_counter()
        number = run()
        seconds = time.perf_counter() - began
        slowest = slowest or number / seconds
        cells = (f"{seconds:.1f}", f"{number / seconds:.1f}", f"{number / seconds / slowest:.2f}")
        table.add_row(way, str(number), *cells)
    demo.console.print(table)
    demo.console.print("Measured once; not checked.")


def run_threads(demo: Demo, model: AdaptionPromptModel, replies: Replies) -> None:
    """Generate in two threads at the same time, each with an adapter of its own."""
    demo.console.rule("Two threads over one base")
    everything = [example.sentence for example in heldout(BASE)]
    # One of the batches that were replied to before.
    chosen = next(batches(everything))
    sentences = [everything[index] for index in chosen]
    ready = threading.Barrier(2, timeout=60)

    def reply(name: str) -> tuple[list[list[int]], float, float]:
        with model.activated(name):
            ready.wait()
            began = time.perf_counter()
            tokens = generate_all(model, demo.tokenizer, sentences)
        return tokens, began, time.perf_counter()

    names = (EXTRACT, SURNAME)
    with model.disable_adapter(), ThreadPoolExecutor(len(names)) as pool:
        found = dict(zip(names, pool.map(reply, names), strict=True))
    both = min(end for *_, end in found.values()) - max(began for _, began, _ in found.values())
    for name, (tokens, began, end) in found.items():
        demo.console.print(
            f"{name!r}: {len(tokens)} replies in {end - began:.1f} s", highlight=False
        )
        demo.checks.holds(
            f"the thread with {name!r} gave its own {sum(map(len, tokens))} tokens",
            passed=tokens == [replies[name][index] for index in chosen],
        )
    demo.checks.holds(f"they ran at the same time for {both:.1f} s", passed=both > 0)


def add_up(demo: Demo, model: AdaptionPromptModel) -> None:
    """Activate both adapters with weights."""
    demo.console.rule("Both at once, with weights")

    def weighted(weights: dict[str, float]) -> torch.Tensor:
        model.set_adapter(weights)
        return logits(model, demo.tokenizer)

    with alone(model, EXTRACT):
        expected = logits(model, demo.tokenizer)
    demo.checks.same_bits(
        f"{Composition({EXTRACT: 1, SURNAME: 0})}: the logits of {EXTRACT!r}, bit for bit",
        expected,
        weighted({EXTRACT: 1, SURNAME: 0}),
    )
    demo.checks.same_bits(
        f"{Composition({EXTRACT: 0.7, SURNAME: 0.3})}: the same bits in either order",
        weighted({EXTRACT: 0.7, SURNAME: 0.3}),
        weighted({SURNAME: 0.3, EXTRACT: 0.7}),
    )
    model.set_adapter({EXTRACT: 0.5, SURNAME: 0.5})
    sentences = [example.sentence for example in heldout(BASE)[:NUM_SHOWN]]
    table = Table("sentence", f"{model.active_composition}", show_lines=True)
    for sentence, row in zip(sentences, generate(model, demo.tokenizer, sentences), strict=True):
        table.add_row(Text(sentence), Text(text(demo, without_end(row, demo.tokenizer))))
    demo.console.print(table)
    demo.console.print("Nobody trained this mixture; it is shown for what it is.")


def serve(demo: Demo, model: AdaptionPromptModel) -> None:
    """Load the adapters from a folder when they are asked for, into a model with room for one."""
    demo.console.rule("From a folder, with room for one of the two")
    sentences = [example.sentence for example in heldout(BASE)[:NUM_SHOWN]]
    expected = {}
    for name in (EXTRACT, SURNAME):
        model.set_adapter(name)
        expected[name] = generate(model, demo.tokenizer, sentences)
    sizes = {name: model.adapter_bytes(name) for name in expected}
    budget = max(sizes.values())
    demo.console.print(
        f"{', '.join(f'{name!r}: {size:,} bytes' for name, size in sizes.items())}; "
        f"max_bytes={budget:,}",
        highlight=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        store = AdapterStore(folder, max_bytes=budget)
        # A model has at least one adapter: this one, untrained, stays out of use.
        idle = {"idle": AdaptionPromptConfig(adapter_len=1, adapter_layers=1)}
        served = AdaptionPromptModel(load()[0], idle, "idle", store=store)
        table = Table("asked for", "hits", "misses", "evictions", "loaded", "bytes")
        same, most = [], 0
        for name in (EXTRACT, SURNAME, SURNAME, EXTRACT):
            with served.activated(name):
                tokens = generate(served, demo.tokenizer, sentences)
            same.append(torch.equal(expected[name], tokens))
            done = store.counters
            most = max(most, done.num_bytes)
            counts = (done.hits, done.misses, done.evictions)
            table.add_row(name, *map(str, counts), ", ".join(store.loaded), f"{done.num_bytes:,}")
        demo.console.print(table)
        demo.checks.holds(
            f"{len(same)} times the same tokens as from memory, on a freshly loaded base",
            passed=all(same),
        )
        demo.checks.holds(
            "1 hit, 3 misses, 2 evictions, never more bytes than allowed",
            passed=counts == (1, 3, 2) and most <= budget,
        )
        try:
            generate(served, demo.tokenizer, sentences[:2], adapter_names=[EXTRACT, SURNAME])
        except StoreError as err:
            refusal = str(err).replace(folder, "FOLDER")
        else:
            refusal = ""
        demo.console.print(Text(refusal))
        demo.checks.holds("both in one batch do not fit, and are refused", passed=bool(refusal))


if __name__ == "__main__":
    sys.exit(run_demo(main))
