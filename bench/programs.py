"""python -m bench programs: whole programs, with EDM, with the kernel's swap, and with enough memory.

In the picture: starts program.py for each program, way and round, and writes bench/results/programs.md.

Interface: main(arguments) is the command. It needs NumPy; without pandas or scikit-learn it leaves out
their programs, without root and memory cgroups swap.

The same room: EDM's limit is on the arrays in its space. So the cgroup of swap has as much, and in
addition what the same program had outside of the space under EDM, and its page tables. The memory of
the interpreter and the libraries counts for neither, nor does EDM's own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from bench.program import PROGRAMS
from bench.surroundings import memory_cgroup, swap_file, warm
from bench.system import core_seconds
from bench.table import machine, rows

HERE = Path(__file__).parent
PLAIN, EDM, SWAP = "enough memory", "EDM", "swap"
TIMES = 4  # the resident size: the data of a program
SWAPPED = 4  # times its data: what a program with its results and copies may have, at most
LOOK = 0.01  # seconds between two looks at a process
MORE = 1 << 20  # bytes, see give_room


@dataclasses.dataclass
class Runs:
    """Of one program, one way."""

    seconds: list[float] = dataclasses.field(default_factory=list)  # of the work
    make: list[float] = dataclasses.field(default_factory=list)  # seconds of making the data
    outside: int = 0  # bytes, see program.py
    more: int = 0  # bytes, see give_room
    answer: float | None = None
    cut: bool = False  # it was cut off, or killed


def run_once(name: str, way: str, resident: int, limit: float, outside: int, folder: Path) -> dict:
    """What program.py prints, and what swap had beyond its room ("more"); {} if that took longer than
    limit seconds, or the kernel has killed it."""
    program = [HERE / "program.py", name, str(TIMES * resident)]
    words, more = [sys.executable, *program], 0
    with contextlib.ExitStack() as stack:
        if way == EDM:
            words = [sys.executable, "-m", "edm", "run", "--resident", f"{resident}M", *program]
        elif way == SWAP:
            page_tables = SWAPPED * TIMES * (resident << 20) // 512
            room = (resident << 20) + outside + page_tables
            group = stack.enter_context(memory_cgroup(room))
            with contextlib.suppress(OSError):  # version 2
                (group / "memory.oom_control").write_text("1")
            words.append(group)
            size = SWAPPED * TIMES * resident + 64
            stack.enter_context(swap_file(folder / "swap", size))
        process = subprocess.Popen(
            words, env={**os.environ, "TMPDIR": str(folder)}, stdout=subprocess.PIPE
        )
        try:
            until = time.monotonic() + limit
            while time.monotonic() < until:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    printed, _ = process.communicate(timeout=LOOK)
                    if way == SWAP and process.returncode == -signal.SIGKILL:
                        return {}
                    if process.returncode:
                        raise subprocess.CalledProcessError(process.returncode, words)
                    return {**json.loads(printed), "more": more}
                if way == SWAP:
                    more = max(more, give_room(group, room))
            return {}
        finally:
            process.kill()
            process.wait()


def can_swap(folder: Path) -> bool:
    """Whether this machine lets this user have a memory cgroup and swap."""
    try:
        with memory_cgroup(1 << 20), swap_file(folder / "try", 1):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def give_room(cgroup: Path, room: int) -> int:
    """Give MORE to a process that waits in this cgroup for a page to leave, and take it back as soon as
    it does not wait. How many bytes it has beyond room.

    In a small cgroup the kernel may find no such page at a moment, with most of them on their way.
    Version 1 lets the process wait then, if told so. Version 2 kills it.
    """
    control, limit = cgroup / "memory.oom_control", cgroup / "memory.limit_in_bytes"
    if not control.exists():
        return 0
    now = int(limit.read_text())
    waits = "under_oom 1" in control.read_text()
    if waits or now > room:
        with contextlib.suppress(OSError):  # EBUSY: it can't be taken back yet
            limit.write_text(str(now + MORE if waits else max(room, now - MORE)))
    return int(limit.read_text()) - room


Found = dict[str, dict[str, Runs]]  # {program: {way: its runs}}


def measure(found: Found, names: list[str], args: argparse.Namespace, folder: Path) -> None:
    """Every program in every way in turn, args.rounds times. What was cut off is not run again."""
    for _ in range(args.rounds):
        for name in names:
            each = found[name]
            for way, runs in each.items():
                if runs.cut:
                    continue
                warm(SWAPPED * TIMES * args.resident)
                one = run_once(name, way, args.resident, args.limit, each[EDM].outside, folder)
                runs.cut = not one
                runs.seconds.append(one.get("work", args.limit))
                runs.make += [one["make"]] if one else []
                runs.outside = one.get("outside", runs.outside)
                runs.more = max(runs.more, one.get("more", 0))
                if runs.answer not in (None, one.get("answer", runs.answer)):
                    sys.exit(f"{name}, {way}: another answer than in the round before")
                runs.answer = one.get("answer", runs.answer)
                print(f"{name}, {way}: {runs.seconds[-1]:.2f} s{', cut off' * runs.cut}",
                      file=sys.stderr)  # fmt: skip
                save(found, args)
            answers = {runs.answer for runs in each.values()} - {None}
            if len(answers) > 1:
                sys.exit(f"{name}: different answers: {answers}")


def raw(args: argparse.Namespace) -> Path:
    return args.output / f"programs-{args.resident}.json"


def save(found: Found, args: argparse.Namespace) -> None:
    """Keep all runs, for --add; this command may be ended at any moment."""
    content = {
        name: {way: dataclasses.asdict(runs) for way, runs in each.items()}
        for name, each in found.items()
    }
    raw(args).write_text(json.dumps(content, indent=1))


def load(args: argparse.Namespace, ways: list[str]) -> Found:
    """The runs of before, if they are to be added to; and none of the other programs."""
    before = json.loads(raw(args).read_text()) if args.add and raw(args).exists() else {}
    return {
        name: {way: Runs(**before.get(name, {}).get(way, {})) for way in ways} for name in PROGRAMS
    }


def middle(runs: Runs) -> float:
    """Seconds of the work: the median, or a lower bound, where it was cut off."""
    return max(runs.seconds) if runs.cut else median(runs.seconds)


def ratio(one: Runs, other: Runs) -> str:
    bound = "> " * one.cut + "< " * other.cut
    return "" if one.cut and other.cut else f"{bound}{middle(one) / middle(other):.2f}"


def table(found: Found) -> list[str]:
    body = []
    for name, each in found.items():
        cells = [f"{'> ' * runs.cut}{middle(runs):.2f}" for runs in each.values()]
        made = [f"{median(runs.make):.2f}" if runs.make else "?" for runs in each.values()]
        ratios = [ratio(each[EDM], each[way]) for way in (PLAIN, SWAP) if way in each]
        body.append([name, *cells, *ratios, " / ".join(made)])
    ways = list(next(iter(found.values())))
    ratios = [f"EDM / {way}" for way in (PLAIN, SWAP) if way in ways]
    return rows(["seconds", *ways, *ratios, "making the data"], body)


def summary(found: Found) -> str:
    """How EDM's times are beside swap's, over all programs."""
    beside = {
        name: middle(each[EDM]) / middle(each[SWAP])
        for name, each in found.items()
        if not (each[EDM].cut and each[SWAP].cut)
    }
    slower = [name for name, value in beside.items() if value > 1]
    return (
        f"EDM / swap, the median of the programs: {median(beside.values()):.2f} (to be: ≤ 0.5). "
        f"Slower than swap (to be: none): {'; '.join(slower) or 'none'}."
    )


def text(found: Found, args: argparse.Namespace, neighbours: str) -> str:
    """All of programs.md."""
    done = {name: each for name, each in found.items() if all(r.seconds for r in each.values())}
    counts = sorted({len(runs.seconds) for each in done.values() for runs in each.values()})
    more = max((each[SWAP].more for each in done.values() if SWAP in each), default=0) >> 20
    rounds = " to ".join(map(str, sorted({counts[0], counts[-1]})))
    lines = [
        f"## Programs on {TIMES * args.resident} MiB of data, {args.resident} MiB resident",
        "",
        f"Rounds: {rounds}; {time.strftime('%Y-%m-%d')}; {machine()}; {neighbours}.",
        "",
        "Medians; seconds of the work, without imports and without making the data, which is the last",
        "column. Results and copies come on top of the data. Swap has EDM's limit in a memory cgroup,",
        "and in addition what the program takes outside of EDM's space; where the kernel found no page",
        f"that could leave, it got more for a moment, {more} MiB at most. Files that a program reads and writes count",
        "there, and not for EDM. The page cache has EDM's disk file as long as the machine has memory",
        f"free; swap goes to the device. >: did not end in {args.limit:g} s, or was killed by the kernel.",
        "",
        *table(done),
        "",
        summary(done)
        if SWAP in found["np.sort"]
        else "Without swap: that needs root, swapon and memory cgroups.",
    ]
    if left_out := [name for name in found if name not in done]:
        lines += ["", f"Left out: {'; '.join(left_out)}."]
    return "\n".join([*lines, ""])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench programs", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--resident", type=int, help=f"MiB; {TIMES} times as much are data (64)")
    parser.add_argument("--rounds", type=int, help="runs of each (3)")
    parser.add_argument("--limit", type=float, default=200, help="seconds of a run at most (200)")
    parser.add_argument("--only", action="append", choices=PROGRAMS, help="this one (repeat)")
    parser.add_argument(
        "--add", action="store_true", help="to the runs that the output has already"
    )
    parser.add_argument("--quick", action="store_true", help="8 MiB resident, one round")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="a folder")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # cleaning up
    args.resident = args.resident or (8 if args.quick else 64)
    args.rounds = args.rounds if args.rounds is not None else 1 if args.quick else 3
    names = [
        name
        for name in args.only or PROGRAMS
        if importlib.util.find_spec(PROGRAMS[name][1].partition(".")[0])
    ]
    if not names:
        parser.error(f"--only: {', '.join(args.only)} needs a package that is not installed")
    args.output.mkdir(exist_ok=True)
    at_start, began, (_, stolen) = os.getloadavg()[0], time.monotonic(), core_seconds()
    with tempfile.TemporaryDirectory(prefix="edm-bench-", dir="/var/tmp") as folder:
        found = load(args, [PLAIN, EDM, *[SWAP] * can_swap(Path(folder))])
        measure(found, names, args, Path(folder))
    share = (core_seconds()[1] - stolen) / (time.monotonic() - began) / (os.cpu_count() or 1)
    neighbours = f"load average {at_start:.2f} at the start, steal {100 * share:.1f} %"
    written = text(found, args, neighbours)
    (args.output / "programs.md").write_text(written)
    print(written)
