"""python -m bench: every system in turn, several times; a table of medians, and a chart.

Needs a C compiler; for the kernel's swap and the mapped file, root and memory cgroups.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.chart import bar_chart
from bench.stages import stage_table
from bench.system import FLOORS, PATTERNS

HERE = Path(__file__).parent
EDM = "EDM"
ORIGINALS_WAY = "EDM, original's way"
SLOW_PART = 4  # it takes so long that it gets a quarter of the memory, and of the resident memory
SYSTEMS = (EDM, "EDM, disk in /dev/shm", "swap", "mapped file", *FLOORS, ORIGINALS_WAY)


def build(folder: Path) -> Path:
    library = folder / "workload.so"
    source = HERE / "workload.c"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-lm", "-lpthread"],
                   check=True)  # fmt: skip
    return library


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    """A cgroup whose processes may have limit bytes; version 1 or 2, whichever there is."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    parent, setting = (v1, "memory.limit_in_bytes") if v1.is_dir() else (v2, "memory.max")
    group = parent / f"edm-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / setting).write_text(str(limit))
        yield group
    finally:
        deadline = time.monotonic() + 10
        while True:  # a process that has just ended still counts for a moment
            try:
                group.rmdir()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


@contextlib.contextmanager
def swap_file(folder: Path, size: int) -> Iterator[None]:
    path = folder / "swap"
    with open(path, "wb") as file:
        os.chmod(path, 0o600)
        file.writelines(bytes(1 << 20) for _ in range(size >> 20))
    try:
        subprocess.run(["mkswap", path], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["swapon", path], check=True)
        try:
            yield
        finally:
            subprocess.run(["swapoff", path], check=True)
    finally:
        path.unlink()


def command(system: str, args: argparse.Namespace, library: Path, folder: Path) -> list[object]:
    """What runs one system once, but for its cgroup."""
    part = SLOW_PART if system == ORIGINALS_WAY else 1
    python = [
        sys.executable, "-m", "bench.system", system, "--library", library,
        "--size", args.size // part, "--resident", args.resident // part,
        "--random", args.random, "--limit", args.limit,
    ]  # fmt: skip
    if not system.startswith(EDM):
        return [*python, "--disk", folder / "mapped"]
    own = Path(sys.prefix) / "bin" / "mpirun"
    mpirun = own if own.exists() else "mpirun"
    disk = Path("/dev/shm") if "shm" in system else folder
    return [mpirun, "-n", 2, *python, "--disk", disk / f"edm-bench-{os.getpid()}"]


def run_once(
    system: str, args: argparse.Namespace, library: Path, folder: Path, *more: str
) -> dict:
    """One run of one system: its results, those of its processes together."""
    words = [*command(system, args, library, folder), *more]
    with contextlib.ExitStack() as stack:
        if system in ("swap", "mapped file"):
            group = stack.enter_context(memory_cgroup((args.resident << 20) + (1 << 20)))
            words += ["--cgroup", group]
            if system == "swap":
                stack.enter_context(swap_file(folder, (args.size + 64) << 20))
        environment = {
            **os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }  # fmt: skip
        ended = subprocess.run(
            [str(word) for word in words], env=environment, cwd=HERE.parent, text=True,
            stdout=subprocess.PIPE, timeout=300, check=True,
        )  # fmt: skip
    for path in (folder / "mapped", *folder.glob("edm-bench-*"),
                 *Path("/dev/shm").glob(f"edm-bench-{os.getpid()}*")):  # fmt: skip
        path.unlink(missing_ok=True)
    result: dict = {"cpu": {}}
    for text in ended.stdout.split("RESULT ")[1:]:  # two ranks' lines may come as one
        part, _ = json.JSONDecoder().raw_decode(text)
        result["cpu"] |= part.pop("cpu")
        result |= part
    return result


def warm(size: int) -> None:
    """Touch and free size MiB: a hypervisor may have taken free memory back, and giving it again
    costs a page many times as much as the kernel's own work (14 µs for 3 were seen)."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    memory = mmap.mmap(-1, size << 20, flags=flags)
    memory.close()


def why_not(system: str) -> str:
    """Why a system can't be run here; "" if it can."""
    if system not in ("swap", "mapped file"):
        return ""
    if os.geteuid():
        return "needs root, for a memory cgroup"
    if system == "swap" and not shutil.which("swapon"):
        return "there is no swapon"
    return ""


def medians(runs: list[dict]) -> dict:
    return {
        pattern: {
            key: statistics.median(run["patterns"][pattern][key] for run in runs)
            for key in ("us", "longest_ms", "stolen_ms")
        }
        for pattern in PATTERNS
    }


def machine() -> str:
    with open("/proc/cpuinfo") as file:
        models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return (
        f"{os.cpu_count()} cores ({models[0] if models else platform.machine()}), "
        f"Linux {platform.release()}, Python {platform.python_version()}"
    )


def table(
    args: argparse.Namespace,
    found: dict[str, list[dict]],
    skipped: dict[str, str],
    stages: dict[str, dict],
) -> str:
    middle = {system: medians(runs) for system, runs in found.items()}
    lines = [
        f"{args.size} MiB of memory, {args.resident} MiB of it resident; medians, in turn, of",
        f"{args.rounds} runs of each; {machine()}; {time.strftime('%Y-%m-%d')}.",
        "",
        "µs an access (a whole page in the sequential patterns, one word of a page in the others);",
        f"in brackets, how many times as fast EDM is. The original's way: a 1/{SLOW_PART} of all sizes.",
        "",
        "| | " + " | ".join(PATTERNS) + " |",
        "|---" * (len(PATTERNS) + 1) + "|",
    ]
    for system, patterns in middle.items():
        cells = []
        for pattern in PATTERNS:
            us, own = patterns[pattern]["us"], middle[EDM][pattern]["us"]
            cells.append(f"{us:.2f}" + ("" if system == EDM else f" ({us / own:.2f}×)"))
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    lines += [
        f"| {system} | {why} |" + " |" * (len(PATTERNS) - 1) for system, why in skipped.items()
    ]
    lines += ["", "Longest single access, ms; in brackets, what the hypervisor took of the cores"]
    lines += ["(steal) while the pattern ran:", "", "| | " + " | ".join(PATTERNS) + " |"]
    lines.append("|---" * (len(PATTERNS) + 1) + "|")
    for system, patterns in middle.items():
        found_of = (patterns[p] for p in PATTERNS)
        cells = [f"{f['longest_ms']:.1f} ({f['stolen_ms']:.0f})" for f in found_of]
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    lines += ["", "CPU seconds of each process, all patterns together:", ""]
    for system, runs in found.items():
        cpu = {k: statistics.median(run["cpu"][k] for run in runs) for k in runs[0]["cpu"]}
        lines.append(f"- {system}: " + ", ".join(f"{k} {v:.1f}" for k, v in sorted(cpu.items())))
    lines += [
        "",
        "Where the pager's time goes, in a run with timers (each costs a microsecond or two): for",
        "the DM-Handler µs a fault, for LPET µs an evicted page.",
        "",
        stage_table(stages),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024, help="MiB of memory (1024)")
    parser.add_argument("--resident", type=int, default=128, help="MiB of it resident (128)")
    parser.add_argument("--random", type=int, default=30000, help="random accesses (30000)")
    parser.add_argument("--limit", type=int, default=2, help="seconds a pattern at most (2)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each system (3)")
    parser.add_argument("--only", action="append", choices=SYSTEMS, help="this system (repeat)")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="a folder")
    args = parser.parse_args()
    wanted = args.only or SYSTEMS
    skipped = {system: why for system in wanted if (why := why_not(system))}
    found: dict[str, list[dict]] = {system: [] for system in wanted if system not in skipped}
    with tempfile.TemporaryDirectory(prefix="edm-bench-", dir="/var/tmp") as name:
        folder = Path(name)
        library = build(folder)
        for number in range(args.rounds):
            for system, runs in found.items():
                warm(4 * args.size)
                began = time.monotonic()
                runs.append(run_once(system, args, library, folder))
                taken = time.monotonic() - began
                print(f"round {number + 1}: {system}: {taken:.1f} s", file=sys.stderr)
        stages = run_once(EDM, args, library, folder, "--stages")["pager"]
    (args.output).mkdir(exist_ok=True)
    (args.output / "raw.json").write_text(json.dumps(found, indent=1))
    if EDM in found:
        text = table(args, found, skipped, stages)
        (args.output / "table.md").write_text(text)
        print(text)
        middle = {system: medians(runs) for system, runs in found.items()}
        (args.output / "chart.svg").write_text(bar_chart(middle, machine()))


if __name__ == "__main__":
    main()
