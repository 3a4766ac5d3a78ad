"""Time adapted models against the unadapted one and against PEFT, in one interleaved run.

Run as `python benchmarks/bench.py [--rounds N] [--out FILE]`. Every figure is a ratio of medians;
the spread is the quartiles of the ratios round by round. The model has the shape of SmolLM2-135M and
random weights: timings do not depend on the values.
"""

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import peft
import torch
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

LAYERS = 30
LENGTH = 10
SIDES = ("base", "peft", "ours")

Step = Callable[[], object]


def build(side: str, dtype: torch.dtype) -> tuple[PreTrainedModel, torch.nn.Module]:
    """Return the transformers model and what to call, for one side."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    if side == "peft":
        peft_config = peft.AdaptionPromptConfig(
            adapter_len=LENGTH, adapter_layers=LAYERS, task_type="CAUSAL_LM"
        )
        wrapped = peft.get_peft_model(model, peft_config)
        wrapped.add_adapter("other", peft_config)
    elif side == "ours":
        ours = AdaptionPromptConfig(adapter_len=LENGTH, adapter_layers=LAYERS)
        wrapped = AdaptionPromptModel(model, {"default": ours, "other": ours}, "default")
    else:
        wrapped = model
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if name.endswith("adaption_gate"):
                parameter.fill_(0.3)
    return model, wrapped


def prefill(model: torch.nn.Module, batch: int, length: int) -> Step:
    """Return a forward without a cache."""
    ids = torch.randint(3, 1000, (batch, length))

    @torch.no_grad()
    def step() -> object:
        return model(input_ids=ids, use_cache=False)

    return step


def decode(model: torch.nn.Module, batch: int, steps: int = 6) -> Step:
    """Return some greedy steps after a prefill of 32."""
    ids = torch.randint(3, 1000, (batch, 32))

    @torch.no_grad()
    def step() -> object:
        out = model(input_ids=ids, use_cache=True)
        started = time.perf_counter()
        for _ in range(steps):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        # The prefill is timed by its own row.
        return time.perf_counter() - started

    return step


def training(model: torch.nn.Module, batch: int = 4, length: int = 64) -> Step:
    """Return a forward and backward of the adapter's parameters."""
    ids = torch.randint(3, 1000, (batch, length))

    def step() -> object:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
        return None

    return step


def swap(model: torch.nn.Module) -> Step:
    """Return a hundred switches between two adapters."""

    def step() -> object:
        for _ in range(50):
            model.set_adapter("other")
            model.set_adapter("default")
        return None

    return step


def compare(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Time each side once a round, in turn, after one round that does not count."""
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    for number in range(rounds + 1):
        for side, step in steps.items():
            started = time.perf_counter()
            inner = step()
            elapsed = inner if isinstance(inner, float) else time.perf_counter() - started
            if number:
                seconds[side].append(elapsed)
    return seconds


def row(name: str, seconds: dict[str, list[float]], reference: str) -> str:
    """Write one line: milliseconds of the reference, and each other side's ratio to it."""
    cells = [f"{1000 * statistics.median(seconds[reference]):.2f} ms"]
    for side in SIDES:
        if side in seconds and side != reference:
            ratios = [a / b for a, b in zip(seconds[side], seconds[reference], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
    return f"| {name} | {' | '.join(cells)} |"


def report(rounds: int) -> Iterator[str]:
    """Run everything and yield the lines of the report."""
    yield from (
        f"Model of SmolLM2-135M's shape, K={LENGTH}, {LAYERS} of {LAYERS} layers adapted, "
        f"{torch.get_num_threads()} threads, {rounds} rounds, {platform.machine()}; "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft")),
        "",
        "| | base | PEFT / base | ours / base |",
        "|---|---|---|---|",
    )
    against_peft = ["", "| | PEFT | ours / PEFT |", "|---|---|---|"]
    for dtype in (torch.float32, torch.bfloat16):
        models = {side: build(side, dtype)[1] for side in SIDES}
        short = str(dtype).removeprefix("torch.")
        for name, make in (
            ("prefill 1x128", lambda model: prefill(model, 1, 128)),
            ("prefill 4x256", lambda model: prefill(model, 4, 256)),
            ("decode batch 1", lambda model: decode(model, 1)),
            ("decode batch 8", lambda model: decode(model, 8)),
        ):
            steps = {side: make(model) for side, model in models.items()}
            yield row(f"{short} {name}", compare(steps, rounds), "base")
        if dtype is torch.float32:
            disabled = {"base": prefill(models["base"], 1, 128)}
            models["ours"].disable_adapter_layers()
            disabled["ours"] = prefill(models["ours"], 1, 128)
            cells = row(f"{short} prefill 1x128, disabled", compare(disabled, rounds), "base")
            yield cells.replace("ms |", "ms | - |")
            models["ours"].enable_adapter_layers()
            trainings = {side: training(models[side]) for side in ("peft", "ours")}
            swaps = {side: swap(models[side]) for side in ("peft", "ours")}
            against_peft += [
                row("float32 training step 4x64", compare(trainings, rounds), "peft"),
                row("100 switches of 30 layers", compare(swaps, rounds), "peft"),
            ]
    yield from against_peft


def main() -> None:
    """Print the report, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    # transformers and peft warn about names of their own; nothing of it bears on the timings.
    warnings.simplefilter("ignore")
    lines = []
    for line in report(arguments.rounds):
        print(line, flush=True)
        lines.append(line)
    text = "\n".join(lines)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
