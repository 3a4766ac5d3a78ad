"""How a step is timed, in turn with others, and how much memory it takes."""

import gc
import time
from collections.abc import Callable, Mapping

import torch

Step = Callable[[], float | None]
"""Something to time; returns seconds where only a part of it counts."""

Samples = dict[str, list[float]]
"""What was measured by side, one value a round."""

SHORT = 1.5
"""Seconds; where one round of all sides takes less, there are three times as many."""


def clock() -> float:
    """Return the time in seconds after what was queued on the device is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(step: Step) -> float:
    """Return what a step says it took, or what it took."""
    started = clock()
    inner = step()
    return clock() - started if inner is None else inner


def interleaved(steps: Mapping[str, Step], rounds: int) -> Samples:
    """Time each side once a round, each time in another order, after a round that does not count."""
    sides = list(steps)
    samples: Samples = {side: [] for side in sides}
    gc.collect()
    # As in timeit: whose turn it is when the collector runs is chance.
    gc.disable()
    try:
        if sum(seconds(steps[side]) for side in sides) < SHORT:
            rounds *= 3
        for number in range(rounds):
            first = number % len(sides)
            for side in sides[first:] + sides[:first]:
                samples[side].append(seconds(steps[side]))
    finally:
        gc.enable()
    return samples


def peak_bytes(step: Step) -> int:
    """Return how much more tensor memory is allocated at the worst moment of a step than before it.

    On a CPU these are the allocator's own events, so what a kernel needs meanwhile counts as well;
    tensors on the meta device do not.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
