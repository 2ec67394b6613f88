"""Where the pager's time goes: its functions, timed from outside, in a run of its own.

The library has no timers on the path of a fault; this wraps the functions that are the stages, in
the pager process, before its threads start. Each call costs a microsecond or two more for it, and
a stage includes what its thread waits for the GIL and for a core.
"""

from __future__ import annotations

import importlib
import mmap
import threading
import time
from collections.abc import Callable

# thread, stage, class in edm's modules, methods. What a stage calls of another counts there only.
STAGES = (
    ("DM-Handler", "read messages", "uffd_ctypes.Userfaultfd", ("read_faults",)),
    ("DM-Handler", "wait for room", "dm_handler.DmHandler", ("_make_room",)),
    ("DM-Handler", "DMS round trip", "mpi_client.MpiClient", ("ask_get", "answer_get")),
    ("DM-Handler", "install", "uffd_ctypes.Userfaultfd", ("copy", "zeropage")),
    ("DM-Handler", "bookkeeping", "dm_handler.DmHandler", ("_resolve",)),
    ("LPET", "which pages", "lspt.LSPT", ("next_candidates", "passed")),
    ("LPET", "mark idle", "page_idle.UnmapTracker", ("mark",)),
    ("LPET", "write-protect, read", "lpet.Lpet", ("_read_protected",)),
    ("LPET", "send, wait for ack", "mpi_client.MpiClient", ("ask_evict", "answer_evict")),
    ("LPET", "punch out", "lpet.Lpet", ("_drop",)),
    ("LPET", "bookkeeping", "lpet.Lpet", ("_evict_until_low_threshold",)),
)


class Stages:
    """Made before the fork: the times are in memory that application and pager share."""

    def __init__(self) -> None:
        self._seconds = memoryview(mmap.mmap(-1, 8 * len(STAGES))).cast("d")
        self._open: dict[int, list[float]] = {}  # of each thread's open calls: time of inner stages

    def install(self) -> None:
        """Wrap the stages' functions, in the pager."""
        for number, (_, _, place, methods) in enumerate(STAGES):
            module, name = place.split(".")
            owner = getattr(importlib.import_module(f"edm.{module}"), name)
            for method in methods:
                setattr(owner, method, self._timed(number, getattr(owner, method)))

    def _timed(self, number: int, call: Callable) -> Callable:
        def timed(*args: object, **kwargs: object) -> object:
            inner = self._open.setdefault(threading.get_ident(), [])
            inner.append(0.0)
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent = time.perf_counter() - began
                self._seconds[number] += spent - inner.pop()
                if inner:
                    inner[-1] += spent

        return timed

    def seconds(self) -> list[float]:
        """Of each of STAGES, so far."""
        return self._seconds.tolist()


def stage_table(patterns: dict[str, dict]) -> str:
    """The stages of each pattern, from {pattern: {"seconds": of each stage, "figures": counts}}."""
    lines = ["| | " + " | ".join(patterns) + " |", "|---" * (len(patterns) + 1) + "|"]
    for number, (thread, stage, _, _) in enumerate(STAGES):
        cells = []
        for found in patterns.values():
            figures = found["figures"]
            names = ("faults_",) if thread == "DM-Handler" else ("evicted_",)
            count = sum(v for k, v in figures.items() if k.startswith(names))
            cells.append(f"{1e6 * found['seconds'][number] / count:.1f}" if count else "")
        lines.append(f"| {thread}: {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
