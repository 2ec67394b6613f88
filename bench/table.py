"""The benchmark's result as text: Markdown tables, and which requirements are met.

Interface: medians(runs) is of one system, section(...) the whole text of one size of memory.
"""

from __future__ import annotations

import os
import platform
import time
from statistics import median

from bench.system import (
    EDM,
    EDM_4,
    IDLE,
    LARGEST_SCAN,
    OVER_MPI,
    PATTERNS,
    POLL,
    SWAP,
    SWAP_4,
    Load,
)

BESIDE = {EDM: SWAP, EDM_4: SWAP_4, **dict.fromkeys(OVER_MPI, SWAP)}
# Which row, which pattern, beside which row; at most so many times its time: must, aim. Beside the
# floor it is the time of a fault: the floor never evicts, so the same accesses meet fewer faults.
RATIOS = (
    (EDM, "seq write", SWAP, 0.6, 0.45),
    (EDM, "seq read", SWAP, 0.25, 0.15),
    (EDM, "random read", SWAP, 0.7, 0.45),
    (EDM, "random write", SWAP, 0.7, 0.5),
    (EDM, "zipf", SWAP, 0.7, 0.5),
    (EDM, "strided", SWAP, 0.5, 0.35),
    (EDM, "random read", POLL, 1.4, 1.1),
    (EDM, "random write", POLL, 1.4, 1.1),
    (EDM_4, "random read", SWAP_4, 0.7, None),
)
LONGEST = 5  # ms, aim


def medians(runs: list[dict]) -> dict:
    """{"us", "fault_us", "longest_ms", "stolen_ms": of each pattern; "longest": ms; "cores";
    "pager"}."""
    each = [run["patterns"] for run in runs]
    middle = {
        key: {pattern: median(run[pattern][key] for run in each) for pattern in PATTERNS}
        for key in ("us", "fault_us", "longest_ms", "stolen_ms")
    }
    middle["longest"] = median(max(p["longest_ms"] for p in run.values()) for run in each)
    middle["cores"] = median(
        sum(p["busy"] for p in run.values()) / sum(p["seconds"] for p in run.values())
        for run in each
    )
    if "pager" in runs[0]:
        middle["pager"] = {key: median(r["pager"][key] for r in runs) for key in runs[0]["pager"]}
    return middle


def rows(head: list[str], body: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(line) + " |" for line in lines]


def times(middle: dict[str, dict], skipped: dict[str, str]) -> list[str]:
    body = []
    for system, found in middle.items():
        us = found["us"]
        cells = [f"{us[p]:.2f}" for p in PATTERNS] + [f"{found['longest']:.1f}"]
        if BESIDE.get(system) in middle:
            other = middle[BESIDE[system]]
            ratios = [us[p] / other["us"][p] for p in PATTERNS]
            ratios.append(found["longest"] / other["longest"])
            cells = [f"{cell} ({r:.2f})" for cell, r in zip(cells, ratios, strict=True)]
        body.append([system, *cells])
    body += [[system, why, *[""] * len(PATTERNS)] for system, why in skipped.items()]
    return rows(["", *PATTERNS, "longest stall, ms"], body)


def stalls(middle: dict[str, dict]) -> list[str]:
    body = [
        [
            system,
            *(f"{found['longest_ms'][p]:.1f} ({found['stolen_ms'][p]:.0f})" for p in PATTERNS),
            f"{found['cores']:.1f}",
        ]
        for system, found in middle.items()
    ]
    return rows(["", *PATTERNS, "cores busy"], body)


def requirements(middle: dict[str, dict], load: Load, started: float) -> list[str]:
    """What the figures have to be and what they should be, and whether they are."""
    found: list[tuple[str, float, float, float | None]] = []
    for system, pattern, other, must, aim in RATIOS:
        if {system, other} <= middle.keys():
            what = "fault_us" if other == POLL else "us"
            ratio = middle[system][what][pattern] / middle[other][what][pattern]
            told_as = f"{pattern}{', a fault' if other == POLL else ''}: {system} / {other}"
            found.append((told_as, ratio, must, aim))
    if SWAP in middle:
        longest = (middle[EDM]["longest"], middle[SWAP]["longest"], LONGEST)
        found.append(("longest stall, ms (must: swap's)", *longest))
    pager, used = middle[EDM]["pager"], 40 + 2 * load.pages / (1 << 20)
    found += [
        (f"pager and LPET idle for {IDLE} s, % of a core", pager["idle_percent"], 0.5, None),
        ("their memory after the patterns, MiB", pager["at_end"] / (1 << 20), used, None),
        ("start of a program of ten lines, s more than plain", started, 0.2, None),
    ]

    def told(value: float, bound: float | None) -> str:
        if bound is None:
            return ""
        return f"≤ {bound:.3g}: " + ("met" if value <= bound else "**not met**")

    body = [[what, f"{v:.3g}", told(v, must), told(v, aim)] for what, v, must, aim in found]
    return rows(["", "measured", "must", "aim"], body)


def machine() -> str:
    with open("/proc/cpuinfo") as file:
        models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return (
        f"{os.cpu_count()} cores ({models[0] if models else platform.machine()}), "
        f"Linux {platform.release()}, Python {platform.python_version()}"
    )


def section(
    load: Load, rounds: int, middle: dict[str, dict], skipped: dict, neighbours: str,
    started: float,
) -> str:  # fmt: skip
    lines = [
        f"## {load.size} MiB of memory, {load.resident} MiB of it resident",
        "",
        f"Rounds: {rounds}; {time.strftime('%Y-%m-%d')}; {machine()}; {neighbours}.",
        "",
        "Medians. µs an access: of a whole page in the sequential patterns, of one word of a page in",
        f"the others. All pages are written once; then up to {LARGEST_SCAN} are read in order,",
        f"{load.random} accesses are random ({3 * load.random} of zipf), up to {load.random} strided;",
        f"what has not ended after {load.limit:g} s is cut off. With 4 threads, the time until the last",
        "one ended, over the accesses of all. The longest stall is the longest single access of a run,",
        "in any pattern. In brackets: EDM's time / swap's, with as many threads. The page cache has",
        "EDM's disk file, outside of the resident memory, as long as the machine has memory free; swap",
        "goes to the device.",
        "",
        *times(middle, skipped),
        "",
        "Longest single access, ms; in brackets, ms that the hypervisor took of the cores (steal)",
        "while the pattern ran. Cores busy: with everything that ran on the machine meanwhile.",
        "",
        *stalls(middle),
    ]
    if EDM in middle:
        pager = middle[EDM]["pager"]
        before, after = (pager[key] / (1 << 20) for key in ("at_start", "at_end"))
        grown = (pager["at_end"] - pager["at_start"]) / load.pages
        lines += [
            "",
            "What is required:",
            "",
            *requirements(middle, load, started),
            "",
            f"The memory of pager and LPET grew from {before:.1f} MiB to {after:.1f} MiB, by",
            f"{grown:.1f} bytes a page of the space in use; what the two share counts twice.",
        ]
    return "\n".join(lines) + "\n"
