"""The memory of a server's processes while it is asked. Needs numpy only: benchmark machines import it too."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import numpy as np

from tests.triton.processes import MIB, rss_mib, stub_processes

#: Of the requests: before that a process still meets lengths and batch sizes for the first time.
WARM_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Memory:
    """Resident memory of one process.

    Attributes:
        warm_mib: median over the first tenth of the time after the warm-up.
        end_mib: median over the last tenth.
        slope_bytes: least squares over the time after the warm-up, in bytes per request that the server answered.
    """

    warm_mib: float
    end_mib: float
    slope_bytes: float


class MemoryWatch:
    """Looks at every process of a server a few times a second, in a thread of its own.

    Args:
        server: process id of tritonserver, with all its models loaded.
        done: how many requests have been answered so far.
        interval: seconds between two looks.
    """

    def __init__(self, server: int, done: Callable[[], int], interval: float = 0.25) -> None:
        self._pids = {"tritonserver": server}
        self._pids |= {f"stub of {model}": pid for model, pid in sorted(stub_processes(server).items())}
        self._done, self._interval, self._over = done, interval, threading.Event()
        self._seen: list[tuple[int, list[float]]] = []
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.wait(self._interval):
            self._seen.append((self._done(), [rss_mib(pid) for pid in self._pids.values()]))

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()

    def found(self, requests: int) -> dict[str, Memory]:
        """Of each process; `requests` in all decide what is warm-up."""
        warm = [(done, values) for done, values in self._seen if done >= requests * WARM_SHARE]
        done = np.array([each for each, _ in warm], np.float64)
        tenth = max(1, len(warm) // 10)
        memory = {}
        for index, process in enumerate(self._pids):
            values = np.array([each[index] for _, each in warm])
            slope = float(np.polyfit(done, values * MIB, 1)[0])
            warm_mib, end_mib = float(np.median(values[:tenth])), float(np.median(values[-tenth:]))
            memory[process] = Memory(round(warm_mib, 2), round(end_mib, 2), round(slope, 1))
        return memory
