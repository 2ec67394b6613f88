"""One system of the benchmark, in a process of its own.

    python -m bench.system SYSTEM LOAD LIBRARY [CGROUP]

In the picture: __main__.py starts one for each row and round. The files that a system makes are in
$TMPDIR, without a name.

Interface: LOAD is a Load as JSON, LIBRARY is workload.c's, CGROUP a folder to enter first. Prints
one line of JSON: "patterns" has the figures of each pattern, "pager" those of EDM's processes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path

PATTERNS = ("seq write", "seq read", "random read", "random write", "zipf", "strided")
EDM, EDM_4 = "EDM", "EDM, 4 threads"
OVER_MPI = {"EDM over MPI, 1 DMS": 1, "EDM over MPI, 2 DMS": 2}  # how many DMSs it has
SWAP, SWAP_4, MAPPED = "swap", "swap, 4 threads", "mapped file"
POLL, SPIN = "C floor, poll", "C floor, spin"
SYSTEMS = (EDM, *OVER_MPI, EDM_4, SWAP, SWAP_4, MAPPED, POLL, SPIN)
LARGEST_SCAN = 131072  # pages that are read in order, at most
IDLE = 5  # seconds without a page fault, in which the pager's CPU time is measured


@dataclasses.dataclass(frozen=True)
class Load:
    """What every system has to do."""

    size: int  # MiB of memory
    resident: int  # MiB of it that may be resident
    random: int  # accesses of a random pattern, at most
    limit: float  # seconds of a pattern, at most

    @property
    def pages(self) -> int:
        return self.size * 256


class Result(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("accesses", "nanoseconds", "longest", "wrong")]


class Workload:
    """workload.c, built as a library at path."""

    def __init__(self, system: str, load: Load, path: str) -> None:
        self._system, self._load, self._lib = system, load, ctypes.CDLL(path)
        u64, pointer, integer = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int
        arguments = (integer, integer, pointer, pointer, u64, u64, u64, pointer)
        self._lib.pattern.argtypes = arguments
        self._lib.floor_open.argtypes, self._lib.floor_open.restype = (u64, integer), pointer
        self._lib.floor_forget.argtypes = (u64,)
        self._lib.floor_faults.restype = u64

    def floor_faults(self) -> int:
        """How many faults the floor has resolved so far."""
        return self._lib.floor_faults()

    def open_floor(self) -> int:
        """The address of memory whose faults a thread in C answers."""
        base = self._lib.floor_open(self._load.pages, self._system == SPIN)
        if not base:
            sys.exit("the floor could not be opened")
        return base

    def forget(self, pattern: str) -> None:
        """Let the floor's pages leave before a pattern, as many as the limit on the others asks."""
        sequential = pattern in ("seq write", "seq read")
        self._lib.floor_forget(0 if sequential else self._load.size // self._load.resident)

    def measure(
        self,
        base: int,
        before: Callable[[str], object] = lambda pattern: None,
        faults: Callable[[], int] = lambda: 0,
    ) -> dict:
        """Run every pattern on the memory at base, and before(pattern) before each. faults: how many
        pages have come so far because one was missing, where the system tells."""
        load, threads = self._load, 4 if "4 threads" in self._system else 1
        versions = (ctypes.c_uint32 * load.pages)()
        most = {
            "seq write": load.pages, "seq read": min(load.pages, LARGEST_SCAN),
            "random read": load.random, "random write": load.random, "zipf": 3 * load.random,
            "strided": min(load.pages // 7, load.random),
        }  # fmt: skip
        found = {}
        for number, pattern in enumerate(PATTERNS):
            # Everything must be written once, as the other patterns read it; those may be cut off.
            whole = pattern == "seq write" and "floor" not in self._system
            limit = 10**12 if whole else int(load.limit * 1e9)
            before(pattern)
            r, faults_before = Result(), faults()
            busy, stolen = core_seconds()
            self._lib.pattern(number, threads, base, versions, load.pages, most[pattern], limit,
                              ctypes.byref(r))  # fmt: skip
            busy_then, stolen_then = core_seconds()
            if r.wrong:
                sys.exit(f"{self._system}: {pattern}: {r.wrong} words are wrong")
            found[pattern] = {
                "us": r.nanoseconds / r.accesses / 1e3,
                "fault_us": r.nanoseconds / max(1, faults() - faults_before) / 1e3,
                "seconds": r.nanoseconds / 1e9,
                "longest_ms": r.longest / 1e6,
                "stolen_ms": (stolen_then - stolen) * 1e3,
                "busy": busy_then - busy,
            }
        return found


def core_seconds() -> tuple[float, float]:
    """(busy, stolen) seconds of all cores so far: proc(5), /proc/stat. Stolen: the hypervisor has
    given the core to others."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    ticks = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / ticks, steal / ticks


def cpu_seconds(pids: Collection[int]) -> float:
    """Seconds of a core that these processes have taken: the clocks of clock_getcpuclockid(3)."""
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


def memory_bytes(pids: Collection[int]) -> int:
    """Bytes of anonymous and shared memory of these processes. What two share counts twice."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        total += sum(int(status[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))
    return total


def run_kernel(load: Load, workload: Workload, in_file: bool, cgroup: str) -> dict:
    """Anonymous memory or a mapped file, in a cgroup that allows so much of it."""
    if in_file:
        with tempfile.TemporaryFile() as file:
            file.truncate(load.size << 20)
            memory = mmap.mmap(file.fileno(), load.size << 20)
    else:
        memory = mmap.mmap(-1, load.size << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    Path(cgroup, "cgroup.procs").write_text(str(os.getpid()))
    return {"patterns": workload.measure(ctypes.addressof(ctypes.c_char.from_buffer(memory)))}


def run_edm(system: str, load: Load, workload: Workload) -> None:
    import edm

    def app(space: edm.Space) -> None:
        area = space.mmap(load.size << 20)
        base = ctypes.addressof(ctypes.c_char.from_buffer(area))

        def faults() -> int:
            figures = space.figures()
            return figures["faults_first_access"] + figures["faults_refetch"]

        if system == EDM:
            figures = space.figures()
            pids = {figures[key] for key in ("pager_pid", "lpet_pid")}
            found = measure_pager(pids, lambda: workload.measure(base, faults=faults))
        else:
            found = {"patterns": workload.measure(base)}
        print(json.dumps(found), flush=True)

    edm.run(app, edm.Config(high_threshold=load.resident * 256, dms=OVER_MPI.get(system)))


def measure_pager(pids: Collection[int], measure: Callable[[], dict]) -> dict:
    """What measure finds, and what EDM's processes take: memory, and CPU time when idle."""
    at_start = memory_bytes(pids)
    patterns = measure()
    at_end = memory_bytes(pids)
    time.sleep(1)  # LPET may be at work still
    before = cpu_seconds(pids)
    time.sleep(IDLE)
    idle = (cpu_seconds(pids) - before) / IDLE
    return {
        "patterns": patterns,
        "pager": {"at_start": at_start, "at_end": at_end, "idle_percent": 100 * idle},
    }


def main(system: str, load: str, library: str, cgroup: str = "") -> None:
    todo = Load(**json.loads(load))
    workload = Workload(system, todo, library)
    if system.startswith("EDM"):
        run_edm(system, todo, workload)
    elif cgroup:
        print(json.dumps(run_kernel(todo, workload, system == MAPPED, cgroup)))
    else:
        base = workload.open_floor()
        found = workload.measure(base, workload.forget, workload.floor_faults)
        print(json.dumps({"patterns": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
