"""What a job tells of itself: --stats, --progress, --report.

In the picture: beside the pager's main thread, which asks for each of them when it is time.

Interface:
    table(figures, title)     what --stats prints
    Progress                  --progress: one live line on a terminal
    Report                    --report: collects while the job runs, and then writes one HTML page

The page is report.html with one JSON object in it, which a script there draws, in the browser. The
object has (times in seconds, as time.monotonic; counts in pages, if nothing else is said):
    title, page_size (bytes), start_addr, start_time, summary (what summary() returns)
    place          the size of a place: a part of the address space, by its number from start_addr on
    samples        until: when it was taken; resident, away: then; the counters FAULTS and EVICTIONS:
                   from the start until then; came: pages since the sample before it, by place
    latencies      [µs at most, faults], ascending
    areas          see Area; areas_in_all: how many there were, with those that are left out

Rules: the pager's main thread only, but for Report.came, to which the DM-Handler appends. Memory is
bounded however long the job runs: of more than COLUMNS samples, every second one is dropped, and
what it says goes to the next; when the samples have more than CELLS counts of places, each two
neighbouring places become one; and of the areas that were unmapped, the largest AREAS are remembered.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edm.lspt import AWAY, HERE, LOST, NEW
from edm.uffd_ctypes import PAGE_SIZE

COLUMNS = 192  # samples; even
CELLS = 256 * COLUMNS  # counts of places, in all samples: of many places, 128 or more stay apart
PLACE = 8  # log2 of the pages of a place, at first
AREAS = 200

FAULTS = ("faults_first_access", "faults_refetch", "faults_write_protect")
EVICTIONS = ("evicted_clean", "evicted_dirty")
WHERE = {NEW: "new", LOST: "lost", **dict.fromkeys(range(AWAY, HERE), "away")}  # the others: here

Figures = dict[str, object]
Latencies = Sequence[tuple[float, int]]  # (µs, faults), ascending


def size(pages: float) -> str:
    """So many pages, in bytes, for people."""
    amount, unit = pages * PAGE_SIZE, "bytes"
    for larger in ("KiB", "MiB", "GiB"):
        if amount >= 1024:
            amount, unit = amount / 1024, larger
    return f"{amount:.0f} {unit}" if amount >= 10 or unit == "bytes" else f"{amount:.1f} {unit}"


def summary(f: Figures) -> dict[str, str]:
    """What the figures of pager.py say: {what: in words}."""
    return {
        "faults": f"{sum(f[name] for name in FAULTS)}: {f['faults_first_access']} first accesses, "
        f"{f['faults_refetch']} refetches, {f['faults_write_protect']} first writes",
        "latency": f"{f['latency_median']:.0f} µs median, "
        f"{f['latency_99th']:.0f} µs 99th percentile of the faults",
        "waiting": f"{f['waited']:.2f} s, the application for its pages",
        "evictions": f"{f['evicted_dirty']} pages with their bytes, "
        f"{f['evicted_clean']} clean ones without",
        "to the DMS": size(f["bytes_sent"] / PAGE_SIZE),
        "from it": f"{size(f['bytes_received'] / PAGE_SIZE)}; {f['fetched']} pages came, new ones "
        "and those read ahead included",
        "resident": f"{size(f['peak_resident'])} at most",
    }


def table(figures: Figures, title: str) -> str:
    """The table of --stats."""
    return "\n".join([title, *(f"{what:12} {it}" for what, it in summary(figures).items())])


class Progress:
    """A line that is written over again and again."""

    def __init__(self) -> None:
        self._before = time.monotonic(), 0, 0

    def show(self, figures: Figures, away: int) -> None:
        """away: pages that the DMS has and this instance has not."""
        now = time.monotonic()
        faults, evictions = (sum(figures[name] for name in names) for names in (FAULTS, EVICTIONS))
        then, faults_then, evictions_then = self._before
        seconds = max(now - then, 1e-9)
        text = (
            f"resident {size(figures['resident'])}, on the DMS {size(away)}, "
            f"{(faults - faults_then) / seconds:.0f} faults/s, "
            f"{(evictions - evictions_then) / seconds:.0f} evictions/s"
        )
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        self._before = now, faults, evictions

    def end(self) -> None:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- the report


@dataclass
class Area:
    page: int  # the first, in the space
    count: int  # pages
    name: str
    mapped: float  # when, in seconds
    unmapped: float | None = None
    ended_up: Counter[str] = field(default_factory=Counter)  # pages, by where they were

    def ends(self, state: Sequence[int]) -> None:
        for byte, count in Counter(state[self.page : self.page + self.count]).items():
            self.ended_up[WHERE.get(byte, "here")] += count


class Report:
    def __init__(self, start_addr: int) -> None:
        self.came: deque[tuple[int, int]] = deque()  # (page, count) of what was installed
        self._start_addr = start_addr
        self._start_time = time.monotonic()
        self._samples: list[dict] = []  # see above
        self._shift = PLACE
        self._here: dict[int, Area] = {}  # mapped now, by first page
        self._gone: list[Area] = []  # the largest first
        self._areas = 0  # how many there were in all

    def mapped(self, page: int, count: int, name: str) -> None:
        """page: the first one of the area, in the space. count: its pages."""
        self._here[page] = Area(page, count, name, time.monotonic())
        self._areas += 1

    def unmapped(self, page: int, state: Sequence[int]) -> None:
        """state: of each page of the space, as lspt.py's, before this area's are freed."""
        if area := self._here.pop(page, None):  # else it was told before
            area.unmapped = time.monotonic()
            area.ends(state)
            self._gone = _largest([*self._gone, area])

    def sample(self, figures: Figures, away: int) -> None:
        """Note what has happened since this was last called. away: as Progress.show's."""
        came: Counter[int] = Counter()
        for _ in range(len(self.came)):
            page, count = self.came.popleft()
            came[page >> self._shift] += count
        now, samples = time.monotonic(), self._samples
        shortest = 2 * (now - self._start_time) / COLUMNS
        if len(samples) > 1 and samples[-1]["until"] - samples[-2]["until"] < shortest:
            came.update(samples.pop()["came"])
        counters = {name: figures[name] for name in (*FAULTS, *EVICTIONS, "resident")}
        samples.append({"until": now, "came": came, "away": away, **counters})
        if len(samples) > COLUMNS:
            for dropped, kept in zip(samples[1::2], samples[2::2], strict=True):  # COLUMNS is even
                kept["came"].update(dropped["came"])
            del samples[1::2]
        while sum(len(sample["came"]) for sample in samples) > CELLS:
            self._shift += 1
            for sample in samples:
                finer, sample["came"] = sample["came"], Counter()
                for place, count in finer.items():
                    sample["came"][place >> 1] += count

    def write(
        self, path: str, title: str, figures: Figures, latencies: Latencies, state: Sequence[int]
    ) -> None:
        """Write the page, at the end. state: as unmapped's. Raises OSError if it can't be written."""
        for area in self._here.values():
            area.ends(state)
        content = {
            "title": title,
            "page_size": PAGE_SIZE,
            "start_addr": self._start_addr,
            "start_time": self._start_time,
            "summary": summary(figures),
            "samples": self._samples,
            "place": 1 << self._shift,
            "latencies": latencies,
            "areas": [vars(area) for area in _largest([*self._here.values(), *self._gone])],
            "areas_in_all": self._areas,
        }
        text = json.dumps(content).replace("<", "\\u003c")  # a name can't end the script
        page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
        Path(path).write_text(page.replace("REPORT_AS_JSON", text), encoding="utf-8")


def _largest(areas: list[Area]) -> list[Area]:
    return sorted(areas, key=lambda area: area.count, reverse=True)[:AREAS]
