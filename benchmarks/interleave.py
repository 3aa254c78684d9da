"""Paired timings of training loops that take turns, step by step, in one process: noise disturbs all alike."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

Loop = Callable[[Callable[[], None]], None]
"""A training loop. It calls the function it is given after every step."""


def interleave(loops: dict[str, Loop], warm_up: int = 5) -> dict[str, list[float]]:
    """Run the loops in threads of which one at a time moves, by one step; seconds per step and loop, in turns.

    All loops must take the same number of steps. The first `warm_up` steps are left out.
    """
    names = list(loops)
    turns = {name: threading.Semaphore(0) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    errors: list[BaseException] = []

    def drive(name: str) -> None:
        following = names[(names.index(name) + 1) % len(names)]
        started = 0.0

        def step_done() -> None:
            nonlocal started
            times[name].append(time.perf_counter() - started)
            turns[following].release()
            turns[name].acquire()
            started = time.perf_counter()

        turns[name].acquire()
        started = time.perf_counter()
        try:
            loops[name](step_done)
        except BaseException as error:
            errors.append(error)
        finally:
            turns[following].release()

    threads = [threading.Thread(target=drive, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    turns[names[0]].release()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return {name: values[warm_up:] for name, values in times.items()}


def ratio(times: dict[str, list[float]], of: str, to: str) -> tuple[float, float, float]:
    """Median of the paired ratios of/to, and the interval of the median (95 %, by order statistics)."""
    pairs = sorted(a / b for a, b in zip(times[of], times[to], strict=True))
    half = 0.98 * len(pairs) ** 0.5  # 1.96 sqrt(n) / 2
    low, high = max(0, int(len(pairs) / 2 - half)), min(len(pairs) - 1, int(len(pairs) / 2 + half))
    return statistics.median(pairs), pairs[low], pairs[high]
