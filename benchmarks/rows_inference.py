"""Rows about running a model: prefill and decoding, eager and compiled, and without the adapter."""

from collections.abc import Iterator
from functools import cache, partial

import torch
from measure import Samples, Step, clock, interleaved
from models import Models, Setting, Shape
from rows import Case, SkippedError, Target
from torch import nn
from transformers import StaticCache

PROMPT_TOKENS = 32
NUM_STEPS = 6
COMPILED_LAYERS = 6

FLOAT32 = (Target(high=1.03),)
BFLOAT16 = (Target(high=1.10),)
SAME = (Target(low=0.98, high=1.02),)


def tokens(model: nn.Module, batch: int, length: int) -> torch.Tensor:
    """Return some tokens where the model is; which ones does not matter."""
    return torch.randint(3, 1000, (batch, length), device=model.device)


def prefill(model: nn.Module, batch: int, length: int) -> Step:
    """Return a forward without a cache, with the logits of every position."""
    ids = tokens(model, batch, length)

    @torch.no_grad()
    def step() -> None:
        model(input_ids=ids, use_cache=False)

    return step


def decode(model: nn.Module, batch: int) -> Step:
    """Return greedy steps after a prefill that is not timed."""
    ids = tokens(model, batch, PROMPT_TOKENS)

    @torch.no_grad()
    def step() -> float:
        out = model(input_ids=ids, use_cache=True)
        started = clock()
        for _ in range(NUM_STEPS):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        return clock() - started

    return step


def static_decode(model: nn.Module, compiled: nn.Module, batch: int) -> Step:
    """Return steps into a static cache that the eager model has filled."""
    ids = tokens(model, batch, PROMPT_TOKENS)
    cache = StaticCache(config=model.config, max_cache_len=PROMPT_TOKENS + NUM_STEPS)

    @torch.no_grad()
    def step() -> float:
        cache.reset()
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        started = clock()
        for _ in range(NUM_STEPS):
            token = out.logits[:, -1:].argmax(-1)
            out = compiled(input_ids=token, past_key_values=cache, use_cache=True)
        return clock() - started

    return step


@cache
def why_not_compiled() -> str | None:
    """Return why nothing can be compiled here; None if it can."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1))
    except Exception as error:  # noqa: BLE001 (a missing compiler is reported in many ways)
        return f"not compiled here: {type(error).__name__}"
    return None


def eager(make: str, setting: Setting, batch: int, length: int) -> Case:
    """Return a row of the three sides, not compiled."""

    def measure(models: Models, rounds: int) -> Samples:
        made = partial(prefill, length=length) if make == "prefill" else decode
        steps = {side: made(model, batch=batch) for side, model in models.of(setting).items()}
        return interleaved(steps, rounds)

    size = f"{batch}x{length}" if make == "prefill" else f"batch {batch}"
    short = str(setting.dtype).removeprefix("torch.")
    targets = BFLOAT16 if setting.dtype is torch.bfloat16 else FLOAT32
    return Case(
        name=f"{short} {make} {size}",
        reference="base",
        measure=measure,
        targets=targets if setting.device == "cpu" else (),
    )


def compiled(make: str, setting: Setting, batch: int, length: int) -> Case:
    """Return a row of the three sides, compiled; a side that cannot be is left out."""

    def measure(models: Models, rounds: int) -> Samples:
        reason = why_not_compiled()
        if reason is not None:
            raise SkippedError(reason)
        steps = {}
        for side, model in models.of(setting).items():
            torch.compiler.reset()
            fast = torch.compile(model, dynamic=False)
            step = (
                prefill(fast, batch, length)
                if make == "prefill"
                else static_decode(model, fast, batch)
            )
            try:
                step()
            except torch._dynamo.exc.TorchDynamoException:  # noqa: SLF001 (its only name)
                continue
            steps[side] = step
        return interleaved(steps, rounds)

    size = f"{batch}x{length}" if make == "prefill" else f"batch {batch}, static cache"
    short = str(setting.dtype).removeprefix("torch.")
    return Case(
        name=f"{short} compiled {make} {size}, {COMPILED_LAYERS} layers",
        reference="base",
        measure=measure,
    )


def without_adapter(setting: Setting, *, is_reverted: bool) -> Case:
    """Return a row of our model without its adapter's modules, for a while or for good."""

    def measure(models: Models, rounds: int) -> Samples:
        found = models.of(setting)
        ours = found["ours"]
        if is_reverted:
            # What is left is a base: no other row may take it for ours.
            models.forget()
            ours = ours.unload()
        else:
            ours.disable_adapter_layers()
        try:
            steps = {"base": prefill(found["base"], 1, 128), "ours": prefill(ours, 1, 128)}
            return interleaved(steps, rounds)
        finally:
            if not is_reverted:
                ours.enable_adapter_layers()

    name = "reverted" if is_reverted else "disabled"
    short = str(setting.dtype).removeprefix("torch.")
    return Case(
        name=f"{short} prefill 1x128, {name}", reference="base", measure=measure, targets=SAME
    )


def cases(device: str) -> Iterator[Case]:
    """Yield the rows for a device."""
    small = Shape(num_layers=COMPILED_LAYERS)
    if device == "cuda":
        setting = Setting(dtype=torch.bfloat16, device=device)
        for batch in (1, 8, 64):
            yield eager("prefill", setting, batch, 128)
            yield eager("decode", setting, batch, 0)
        yield without_adapter(setting, is_reverted=False)
        yield without_adapter(setting, is_reverted=True)
        setting = Setting(
            shape=small, dtype=torch.bfloat16, device=device, adapter_layers=COMPILED_LAYERS
        )
        for batch in (1, 8, 64):
            yield compiled("prefill", setting, batch, 128)
            yield compiled("decode", setting, batch, 0)
        return
    for dtype in (torch.float32, torch.bfloat16):
        setting = Setting(dtype=dtype)
        for batch, length in ((1, 128), (4, 256), (1, 2048)):
            yield eager("prefill", setting, batch, length)
        for batch in (1, 8, 32):
            yield eager("decode", setting, batch, 0)
        if dtype is torch.float32:
            yield without_adapter(setting, is_reverted=False)
            yield without_adapter(setting, is_reverted=True)
    setting = Setting(shape=small, adapter_layers=COMPILED_LAYERS)
    yield compiled("prefill", setting, 1, 128)
    yield compiled("decode", setting, 1, 0)
