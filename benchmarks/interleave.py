"""Paired timings of training loops that take turns, step by step, in one process: noise disturbs all alike."""

from __future__ import annotations

import ctypes
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable

Loop = Callable[[Callable[[], None]], None]
"""A training loop. It calls the function it is given after every step."""


def _one_heap() -> None:
    """Let all threads allocate from one heap that keeps what is freed.

    glibc gives each thread a heap of its own and hands freed memory back to the system, so that a step in a thread
    would pay for page faults (tens of thousands in a Hessian step) that belong to the threads and not to the step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
        for option, value in ((m_arena_max, 1), (m_mmap_max, 0), (m_trim_threshold, 2**31 - 1)):
            mallopt(option, value)


class _Driven:
    """A loop in its own thread that advances one step on request."""

    def __init__(self, loop: Loop, clock: Callable[[], float]):
        self.clock = clock
        self.seconds: list[float] = []
        self.error: BaseException | None = None
        self.finished = False
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._run, args=(loop,), daemon=True).start()

    def step(self) -> None:
        started = self.clock()
        self._go.release()
        self._done.acquire()
        if not self.finished:
            self.seconds.append(self.clock() - started)

    def _run(self, loop: Loop) -> None:
        self._go.acquire()
        try:
            loop(self._pause)
        except BaseException as error:
            self.error = error
        self.finished = True
        self._done.release()

    def _pause(self) -> None:
        self._done.release()
        self._go.acquire()


def interleave(
    loops: dict[str, Loop], warm_up: int = 5, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds per step of each loop, where every round steps each loop once, in a new random order.

    The order matters: what ran before leaves caches and the allocator warm or cold for what comes next. All loops must
    take the same number of steps. The first `warm_up` rounds are left out. `time.process_time` as the clock
    counts the CPU time of this process, which other work on the machine disturbs less.
    """
    _one_heap()
    driven = {name: _Driven(loop, clock) for name, loop in loops.items()}
    order, shuffler = list(driven), random.Random(0)
    while not any(one.finished for one in driven.values()):
        shuffler.shuffle(order)
        for name in order:
            driven[name].step()
            if error := driven[name].error:
                raise error
    rounds = min(len(one.seconds) for one in driven.values())
    return {name: one.seconds[warm_up:rounds] for name, one in driven.items()}


def ratio(times: dict[str, list[float]], of: str, to: str) -> tuple[float, float, float]:
    """Median of the paired ratios of/to, and the interval of the median (95 %, by order statistics)."""
    pairs = sorted(a / b for a, b in zip(times[of], times[to], strict=True))
    half = 0.98 * len(pairs) ** 0.5  # 1.96 sqrt(n) / 2
    low, high = max(0, int(len(pairs) / 2 - half)), min(len(pairs) - 1, int(len(pairs) / 2 + half))
    return statistics.median(pairs), pairs[low], pairs[high]
