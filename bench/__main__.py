"""python -m bench: every system in turn, several times; tables of medians, and a chart.

`python -m bench programs` is another benchmark, of whole programs: programs.py.

Needs a C compiler; for the kernel's swap and the mapped file, root and memory cgroups.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from bench.chart import bar_chart
from bench.surroundings import available, memory_cgroup, swap_file, warm
from bench.system import (
    EDM,
    MAPPED,
    OVER_MPI,
    POLL,
    SPIN,
    SWAP,
    SWAP_4,
    SYSTEMS,
    Load,
    core_seconds,
)
from bench.table import machine, medians, section
from edm.doctor import find_mpirun

HERE = Path(__file__).parent
SIZES = ((512, 128), (6144, 1536))  # MiB of memory, and of it resident
KILLED = 5  # tries: in a small cgroup the kernel may find no page that can leave at once, and kills
STARTS = 7  # of the program of ten lines, with EDM and without
PROGRAM = """
import math
def is_prime(n):
    for divisor in range(2, math.isqrt(n) + 1):
        if n % divisor == 0:
            return False
    return n > 1
primes = [n for n in range(1000) if is_prime(n)]
assert len(primes) == 168
assert primes[-1] == 997
"""


# ---------------------------------------------------------------- running a system


def run_once(system: str, load: Load, folder: Path) -> dict:
    """One run of one system: what bench/system.py prints."""
    described = json.dumps(dataclasses.asdict(load))
    words = [sys.executable, "-m", "bench.system", system, described, folder / "workload.so"]
    environment = {
        **os.environ, "TMPDIR": str(folder),
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        if system in OVER_MPI:
            words = [find_mpirun(), "-n", str(OVER_MPI[system] + 1), *words]
        elif system in (SWAP, SWAP_4, MAPPED):
            own = (1 << 20) + 4 * load.pages  # the process's own memory, with the versions
            words.append(stack.enter_context(memory_cgroup((load.resident << 20) + own)))
        if system in (SWAP, SWAP_4):
            stack.enter_context(swap_file(folder / f"swap-{load.size}", load.size + 64))
        for _ in range(KILLED):
            ended = subprocess.run(
                words, env=environment, cwd=HERE.parent, stdout=subprocess.PIPE, timeout=300,
                check=False,
            )  # fmt: skip
            if ended.returncode != -signal.SIGKILL or system not in (SWAP, SWAP_4):
                break
            print(f"{system}: killed by the kernel; once more", file=sys.stderr)
    ended.check_returncode()
    return json.loads(ended.stdout)


def why_not(system: str, size: int, folder: Path) -> str:
    """Why a system can't be run here with size MiB; "" if it can."""
    if system in (SWAP, SWAP_4, MAPPED) and os.geteuid():
        return "needs root, for a memory cgroup"
    if system in (SWAP, SWAP_4) and not shutil.which("swapon"):
        return "there is no swapon"
    if system in OVER_MPI and not find_mpirun():
        return "there is no mpirun"
    needed = 2 * size + 1024  # the swap file stays; the floor has each page twice
    what, free = "disk in /var/tmp", shutil.disk_usage(folder).free >> 20
    if system in (POLL, SPIN):
        what, free = "memory", available()
    return f"needs {needed} MiB of {what}, {free} are free" if free < needed else ""


def start_up(folder: Path) -> float:
    """Seconds that a program of ten lines takes longer with EDM: medians, in turn."""
    plain = [sys.executable, "-c", PROGRAM]
    edm = [sys.executable, "-m", "edm", "run", "--resident", "64M", "-c", PROGRAM]
    taken: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * STARTS):
        with_edm = number % 2 == 1
        began = time.perf_counter()
        subprocess.run(edm if with_edm else plain, cwd=folder, check=True)
        taken[with_edm].append(time.perf_counter() - began)
    return median(taken[True]) - median(taken[False])


# ---------------------------------------------------------------- the command


def measure(
    load: Load, systems: list[str], rounds: int, folder: Path
) -> tuple[dict[str, list[dict]], str]:
    """Every system in turn, rounds times: {system: its runs}, and what the neighbours took."""
    found: dict[str, list[dict]] = {system: [] for system in systems}
    at_start, began, (_, stolen) = os.getloadavg()[0], time.monotonic(), core_seconds()
    for number in range(rounds):
        for system, runs in found.items():
            run_began = time.monotonic()
            warm(4 * load.size)
            runs.append(run_once(system, load, folder))
            taken = time.monotonic() - run_began
            print(f"{load.size} MiB, round {number + 1}: {system}: {taken:.1f} s", file=sys.stderr)
    of_all = (time.monotonic() - began) * (os.cpu_count() or 1)
    share = 100 * (core_seconds()[1] - stolen) / of_all
    return found, f"load average {at_start:.2f} at the start, steal {share:.1f} %"


def main() -> None:
    if sys.argv[1:2] == ["programs"]:
        from bench import programs  # needs NumPy

        return programs.main(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    sizes = ", then ".join(f"{size} and {resident}" for size, resident in SIZES)
    parser.add_argument("--size", type=int, help=f"MiB of memory ({sizes} resident)")
    parser.add_argument("--resident", type=int, help="MiB of it resident (a quarter of --size)")
    parser.add_argument("--random", type=int, default=30000, help="random accesses (30000)")
    parser.add_argument("--limit", type=float, default=3, help="seconds a pattern at most (3)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each system (3)")
    parser.add_argument("--only", action="append", choices=SYSTEMS, help="this system (repeat)")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="a folder")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # cleaning up
    chosen = ((args.size, args.resident or args.size // 4),) if args.size else SIZES
    wanted = args.only or SYSTEMS
    sections, raw, charted = [], {}, None
    with tempfile.TemporaryDirectory(prefix="edm-bench-", dir="/var/tmp") as name:
        folder = Path(name)
        subprocess.run(
            ["cc", "-O2", "-shared", "-fPIC", "-o", folder / "workload.so", HERE / "workload.c",
             "-lm", "-lpthread"], check=True,
        )  # fmt: skip
        started = start_up(folder) if EDM in wanted else 0.0
        for size, resident in chosen:
            load = Load(size, resident, args.random, args.limit)
            skipped = {s: why for s in wanted if (why := why_not(s, size, folder))}
            systems = [system for system in wanted if system not in skipped]
            found, neighbours = measure(load, systems, args.rounds, folder)
            (folder / f"swap-{size}").unlink(missing_ok=True)
            middle = {system: medians(runs) for system, runs in found.items()}
            sections.append(section(load, args.rounds, middle, skipped, neighbours, started))
            raw[size] = found
            charted = charted or {system: m["us"] for system, m in middle.items()}
    args.output.mkdir(exist_ok=True)
    (args.output / "raw.json").write_text(json.dumps(raw, indent=1))
    (args.output / "table.md").write_text("\n".join(sections))
    print("\n".join(sections))
    if charted:
        (args.output / "chart.svg").write_text(bar_chart(charted, machine()))


if __name__ == "__main__":
    main()
