"""One system of the benchmark, in a process of its own: python -m bench.system NAME OPTIONS.

Prints one line of JSON: a result for every pattern, and what else the system knows of itself.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import mmap
import os
import resource
import sys
from pathlib import Path

from bench.stages import Stages

PAGE = 4096
PATTERNS = ("seq write", "seq read", "random read", "random write", "zipf", "strided")
FLOORS = {  # pages a fault, and whether the handler spins
    "C floor, poll": (1, 0),
    "C floor, spin": (1, 1),
    "C floor, poll, 16": (16, 0),
    "C floor, spin, 16": (16, 1),
}
# What the original does: a page at a time, every evicted page sent, its whole LSPT looked through.
ORIGINAL = {"readahead": 1, "evict_batch": 1, "clean_tracking": False}


class Result(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("accesses", "nanoseconds", "longest", "wrong")]


def library(path: str) -> ctypes.CDLL:
    lib = ctypes.CDLL(path)
    u64 = ctypes.c_uint64
    lib.pattern.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, u64, u64, u64,
                            ctypes.c_void_p)  # fmt: skip
    lib.floor_open.argtypes, lib.floor_open.restype = (u64, u64, ctypes.c_int), ctypes.c_void_p
    lib.floor_forget.argtypes = (u64,)
    return lib


def measure(args: argparse.Namespace, base: int, between=lambda pattern: None) -> dict:
    """Run every pattern on the memory at base."""
    lib, pages = library(args.library), args.size * 256
    versions = (ctypes.c_uint32 * pages)()
    accesses = {
        "seq write": pages, "seq read": pages, "random read": args.random,
        "random write": args.random, "zipf": 3 * args.random, "strided": pages // 7,
    }  # fmt: skip
    found = {}
    for number, pattern in enumerate(PATTERNS):
        # Everything must be written once, as the other patterns read it; the rest may be cut off.
        limit = 10**12 if pattern == "seq write" and not args.floor else args.limit * 10**9
        between(pattern)
        r = Result()
        stolen = stolen_ms()
        lib.pattern(number, base, versions, pages, accesses[pattern], limit, ctypes.byref(r))
        if r.wrong:
            sys.exit(f"{args.system}: {pattern}: {r.wrong} words are wrong")
        found[pattern] = {
            "us": r.nanoseconds / r.accesses / 1e3,
            "longest_ms": r.longest / 1e6,
            "stolen_ms": stolen_ms() - stolen,
            "accesses": r.accesses,
        }
    return found


def report(args: argparse.Namespace, **found: object) -> None:
    print("RESULT " + json.dumps({"system": args.system, **found}), flush=True)


def stolen_ms() -> float:
    """Milliseconds that the hypervisor has given to others, of all cores: proc(5), "steal"."""
    with open("/proc/stat") as file:
        return int(file.readline().split()[8]) * 1000 / os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run_floor(args: argparse.Namespace) -> None:
    lib = library(args.library)
    batch, spin = FLOORS[args.system]
    base = lib.floor_open(args.size * 256, batch, spin)
    if not base:
        sys.exit("the floor could not be opened")
    keep = args.size // args.resident
    random = ("random read", "random write", "zipf", "strided")
    patterns = measure(args, base, lambda p: lib.floor_forget(keep if p in random else 0))
    report(args, patterns=patterns, cpu={"all": cpu_seconds()})


def run_kernel(args: argparse.Namespace) -> None:
    """Anonymous memory or a mapped file, in a cgroup that allows so much of it."""
    if args.system == "swap":
        memory = mmap.mmap(-1, args.size << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        with open(args.disk, "w+b") as file:
            file.truncate(args.size << 20)
            memory = mmap.mmap(file.fileno(), args.size << 20)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    library(args.library)  # loaded before the limit counts
    Path(args.cgroup, "cgroup.procs").write_text(str(os.getpid()))
    report(args, patterns=measure(args, base), cpu={"all": cpu_seconds()})


def run_edm(args: argparse.Namespace) -> None:
    import edm

    settings = dict(ORIGINAL) if args.system == "EDM, original's way" else {}
    known = {setting.name for setting in dataclasses.fields(edm.Config)}
    config = edm.Config(
        high_threshold=args.resident * 256,
        disk=args.disk,
        **{name: value for name, value in settings.items() if name in known},
    )

    stages = Stages()
    if args.stages:
        library_of_run = sys.modules[edm.run.__module__]
        make_pager = library_of_run._make_pager

        def make_pager_with_stages(*arguments: object) -> object:
            stages.install()
            return make_pager(*arguments)

        library_of_run._make_pager = make_pager_with_stages

    def app(space: edm.Space) -> None:
        area = space.mmap(args.size << 20)
        base = ctypes.addressof(ctypes.c_char.from_buffer(area))
        looks: list[tuple[dict, list[float]]] = []

        def between(_: str = "") -> None:
            looks.append((space.figures(), stages.seconds()))

        patterns = measure(args, base, between)
        between()
        each = {
            name: {
                "figures": {k: v - was[k] for k, v in now.items() if isinstance(v, int)},
                "seconds": [t - u for t, u in zip(then, before, strict=True)],
            }
            for name, (was, before), (now, then) in zip(
                PATTERNS, looks[:-1], looks[1:], strict=True
            )
        }
        report(args, patterns=patterns, pager=each, cpu={"application": cpu_seconds()})

    edm.run(app, config)
    role = "DMS" if "edm.dms" in sys.modules else "pager"
    report(args, cpu={role: cpu_seconds()})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("system")
    parser.add_argument("--library", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--resident", type=int, required=True)
    parser.add_argument("--random", type=int, required=True)
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--disk")
    parser.add_argument("--stages", action="store_true", help="time the pager's stages")
    parser.add_argument("--cgroup")
    args = parser.parse_args()
    args.floor = args.system in FLOORS
    if args.floor:
        run_floor(args)
    elif args.system in ("swap", "mapped file"):
        run_kernel(args)
    else:
        run_edm(args)


if __name__ == "__main__":
    main()
