"""Rows about a batch whose rows have adapters of their own: against one adapter, in turns, and PEFT."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import peft
import torch
from measure import Samples, Step, clock, interleaved
from models import LENGTH, Models, Setting, build, our_config
from rows import Case, Target
from rows_inference import PROMPT_TOKENS
from surgery_adaption_prompt import AdaptionPromptConfig, AdaptionPromptModel
from torch import nn

from surgery_core import EditedModel, ModelRecipe, Session

NUM_ADAPTERS = 8
SHORTER = 6
"""Tokens of every second adapter's prompts, so that rows are padded."""
PREFILL_TOKENS = 128
NUM_STEPS = 32
"""As many as a short answer has tokens: the first step gathers what the others use."""
# Throughput of at least 0.95 of that with one adapter.
TARGET = (Target(high=1 / 0.95),)


def with_adapters(model: AdaptionPromptModel) -> Sequence[str]:
    """Add what is missing of the adapters, with open gates; return their names."""
    names = ["default", *(f"row-{number}" for number in range(1, NUM_ADAPTERS))]
    for number, name in enumerate(names):
        if name not in model.peft_config:
            config = our_config(30)
            if number % 2:
                config = AdaptionPromptConfig(adapter_len=SHORTER, adapter_layers=30)
            model.add_adapter(name, config)
            with torch.no_grad():
                for module in model.adapter_modules(name).values():
                    module.adaption_gate.fill_(0.1 + 0.05 * number)
    return names


def prefill(model: AdaptionPromptModel, rows: Sequence[str] | None, ids: torch.Tensor) -> None:
    """Run a forward over whole sequences."""
    model(input_ids=ids, use_cache=False, adapter_names=rows)


def decode(model: AdaptionPromptModel, rows: Sequence[str] | None, ids: torch.Tensor) -> float:
    """Run greedy steps after a prefill; seconds of the steps."""
    with nullcontext() if rows is None else model.activated(rows):
        out = model(input_ids=ids, use_cache=True)
        started = clock()
        for _ in range(NUM_STEPS):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        return clock() - started


def case(setting: Setting, make: str) -> Case:
    """Return a row of a batch with eight adapters, with one, and one row after the other."""
    run = prefill if make == "prefill" else decode
    length = PREFILL_TOKENS if make == "prefill" else PROMPT_TOKENS

    def measure(models: Models, rounds: int) -> Samples:
        model = models.of(setting)["ours"]
        names = with_adapters(model)
        ids = torch.randint(3, 1000, (NUM_ADAPTERS, length), device=setting.device)

        @torch.no_grad()
        def one() -> float | None:
            model.set_adapter(names[0])
            return run(model, None, ids)

        @torch.no_grad()
        def turns() -> float | None:
            seconds = []
            for row, name in enumerate(names):
                model.set_adapter(name)
                seconds.append(run(model, None, ids[row : row + 1]))
            return None if None in seconds else sum(seconds)

        @torch.no_grad()
        def ours() -> float | None:
            return run(model, names, ids)

        steps: dict[str, Step] = {"one": one, "turns": turns, "ours": ours}
        try:
            return interleaved(steps, rounds)
        finally:
            model.set_adapter(names[0])

    short = str(setting.dtype).removeprefix("torch.")
    size = f"{NUM_ADAPTERS}x{PREFILL_TOKENS}" if make == "prefill" else f"batch {NUM_ADAPTERS}"
    return Case(
        name=f"{short} {make} {size}, {NUM_ADAPTERS} adapters, K={LENGTH} and {SHORTER}",
        reference="one",
        measure=measure,
        targets=TARGET if setting.device == "cpu" else (),
    )


RANK = 8
TARGETS = ["q_proj", "v_proj"]


def with_terms(setting: Setting) -> tuple[EditedModel, peft.PeftModel, list[str]]:
    """Return a model with low-rank adapters, PEFT's with the same values, and their names."""
    names = [f"row-{number}" for number in range(NUM_ADAPTERS)]
    options = {"r": RANK, "target_modules": TARGETS}
    adapters = {name: {"operation": "low_rank", "options": options} for name in names}
    recipe = ModelRecipe.model_validate({"adapters": adapters, "active": names[0]})
    edited = Session().plan_recipe(build("base", setting), recipe).apply()
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)
    theirs = peft.get_peft_model(build("base", setting), config, adapter_name=names[0]).eval()
    for name in names[1:]:
        theirs.add_adapter(name, config)
    tables = dict(theirs.named_parameters())
    with torch.no_grad():
        for name in names:
            for key, tensor in edited.tensors(name).items():
                nn.init.normal_(tensor, std=0.02)
                tables[f"base_model.model.{key}.{name}.weight"].copy_(tensor)
    return edited, theirs, names


def terms_case(setting: Setting, make: str) -> Case:
    """Return a row of a batch with eight low-rank adapters, ours and PEFT's, and with one of ours."""
    length = PREFILL_TOKENS if make == "prefill" else 1

    def measure(models: Models, rounds: int) -> Samples:
        # They would not fit beside these on small machines.
        models.forget()
        edited, theirs, names = with_terms(setting)
        ids = torch.randint(3, 1000, (NUM_ADAPTERS, length), device=setting.device)

        @torch.no_grad()
        def one() -> None:
            edited.model(input_ids=ids, use_cache=False)

        @torch.no_grad()
        def mixed() -> None:
            theirs(input_ids=ids, use_cache=False, adapter_names=names)

        @torch.no_grad()
        def ours() -> None:
            with edited.activated(names):
                edited.model(input_ids=ids, use_cache=False)

        steps: dict[str, Step] = {"one": one, "peft": mixed, "ours": ours}
        return interleaved(steps, rounds)

    short = str(setting.dtype).removeprefix("torch.")
    size = f"{NUM_ADAPTERS}x{length}"
    return Case(
        name=f"{short} low-rank {make} {size}, {NUM_ADAPTERS} adapters, r={RANK}",
        reference="one",
        measure=measure,
    )


def cases(device: str) -> Iterator[Case]:
    """Yield the rows for a device."""
    dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,)
    for dtype in dtypes:
        for make in ("prefill", "decode"):
            yield case(Setting(dtype=dtype, device=device), make)
    for dtype in dtypes:
        for make in ("prefill", "one token"):
            yield terms_case(Setting(dtype=dtype, device=device), make)
