"""What a job reports of itself: --stats, --progress, --report.

In the picture: beside the pager, which calls it.

Interface:
    TABLE                     what --stats prints, by the figures of pager.py
    Report                    collects samples while the job runs. --progress prints each of them as a
                              live line on a terminal; --report writes an HTML page of all in the end

The page is report.html with one JSON object in it, which a script there draws in the browser. The
object has (times in seconds, as time.monotonic; counts in pages, unless a unit is given):
    title, page_size (bytes), start_addr, table (what --stats prints)
    place          the size of a place: a part of the address space, by its number from start_addr on
    samples        until: when it was taken; came: pages since the sample before, by place. And all but the
                   first, which is the start: the figures of pager.py; away: pages of the
                   areas of that time that were not here
    latencies      faults, by how long they took: see dm_handler.py
    areas          the largest AREAS; page: the first, in the space; count; name; mapped, unmapped: when, or
                   null
    lines          [line, its array's first page, count of pages, faults, nanoseconds], see lines.py

Rules: one thread at a time calls sample or write; one calls mapped, unmapped or write. The DM-Handler
appends the pages that come meanwhile. Memory is bounded however long the job runs. If there are more than
COLUMNS samples, the two neighbours that cover the shortest time are merged. The last second's stay apart:
--progress is about them. If all samples together have more than CELLS counts of places, neighbouring places
are merged in pairs. Of the areas that were unmapped, the largest AREAS are kept.
"""

import time
from collections import Counter, deque

from edm.dm_handler import WAITS, DmHandler
from edm.edm import tell
from edm.lspt import LSPT
from edm.uffd_ctypes import PAGE_SIZE

COLUMNS = 192  # samples
CELLS = 256 * COLUMNS  # counts of places, in all samples: of many places, 128 or more stay apart
PLACE = 8  # log2 of the pages of a place, at first
AREAS = 200
SAMPLE = 100  # milliseconds from one sample to the next

FAULTS = ("faults_first_access", "faults_refetch", "faults_write_protect")
EVICTIONS = ("evicted_clean", "evicted_dirty")


TABLE = """\
faults       {faults_first_access} first accesses, {faults_refetch} refetches, \
{faults_write_protect} first writes
latency      {latency_median} µs median, {latency_99th} µs 99th percentile of the faults
waiting      {waited:.2f} s, the application for its pages
evictions    {evicted_dirty} pages with their bytes, {evicted_clean} clean ones without
to the store {bytes_sent:,} bytes
from it      {bytes_received:,} bytes; {fetched} pages came, new ones and those read ahead included
from each    {from_each_dms} pages, of the DMSs by rank
resident     {peak_resident} pages at most"""


class Report:
    def __init__(self, title: str, lspt: LSPT, handler: DmHandler, live: bool) -> None:
        """title: the title of the HTML page. live: print a line to stderr, which each sample overwrites."""
        self._title, self._lspt, self._handler, self._live = title, lspt, handler, live
        self._came = handler.came = deque()  # the pages that were installed
        self._samples: list[dict] = [{"until": time.monotonic(), "came": Counter()}]  # see above
        self._shift = PLACE
        self._here: dict[int, dict] = {}  # the areas that are mapped now, by first page
        self._gone: list[dict] = []  # the largest first
        self.lines: dict[tuple[str, int, int], list[int]] = {}  # what lines.py finds

    def mapped(self, page: int, count: int, name: str) -> None:
        """An area begins at this page of the space, with count pages; or it has grown to count pages."""
        new = {"page": page, "name": name, "mapped": time.monotonic(), "unmapped": None}
        self._here.setdefault(page, new)["count"] = count

    def unmapped(self, page: int) -> None:
        """Before the area's pages are freed."""
        if area := self._here.pop(page, None):  # None: this was called before
            area["unmapped"] = time.monotonic()
            self._gone = _largest([*self._gone, area])

    def sample(self, figures: dict[str, object]) -> None:
        """Note what has happened since the last call."""
        came = Counter(self._came.popleft() >> self._shift for _ in range(len(self._came)))
        samples = self._samples
        away = max(0, sum(count for _, count in self._lspt.areas) - figures["resident"])
        now = figures | {"until": time.monotonic(), "came": came, "away": away}
        samples.append(now)
        second = 1000 // SAMPLE  # so many samples
        if self._live:
            # ?7l and ?7h: the terminal cuts off a line that is too long.
            tell(f"\r\x1b[K\x1b[?7l{_line(samples[-1 - second :][0], now)}\x1b[?7h", "")
        if len(samples) > COLUMNS:
            ends = [sample["until"] for sample in samples]
            shortest = min(range(1, COLUMNS - second), key=lambda at: ends[at + 1] - ends[at - 1])
            merged = samples.pop(shortest)
            samples[shortest]["came"].update(merged["came"])
        while sum(len(sample["came"]) for sample in samples) > CELLS:
            self._shift += 1
            for sample in samples:
                finer, sample["came"] = sample["came"], Counter()
                for place, count in finer.items():
                    sample["came"][place >> 1] += count

    def write(self, path: str | None, figures: dict[str, object]) -> None:
        """At the end: erase the live line, and write the HTML page if it has a path. Raises OSError."""
        if self._live:
            tell("\r\x1b[K", "")
        if not path:
            return
        content = {
            "title": self._title,
            "page_size": PAGE_SIZE,
            "start_addr": self._lspt.start,
            "table": TABLE.format(**figures),
            "samples": self._samples,
            "place": 1 << self._shift,
            "latencies": self._handler.latencies,
            "lines": [[*key, *found] for key, found in self.lines.copy().items()],
            "areas": _largest([*self._here.values(), *self._gone]),
        }
        import json  # both take long to import
        from pathlib import Path

        text = json.dumps(content).replace("<", "\\u003c")  # a name can't end the script
        page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
        Path(path).write_text(page.replace("REPORT_AS_JSON", text), encoding="utf-8")


def _line(before: dict, now: dict) -> str:
    """The line of --progress, about the second between two samples."""

    def rate(*names: str) -> float:
        happened = sum(now[name] - before.get(name, 0) for name in names)
        return happened / (now["until"] - before["until"])

    waits, store, room = (f"{max(0, rate(name)):.0%}" for name in WAITS)
    here, away = (now[name] * PAGE_SIZE >> 20 for name in ("resident", "away"))
    return (
        f"waits {waits} (reading {store}, for room {room}), resident {here} MiB, "
        f"not here {away} MiB, {rate(*FAULTS):.0f} faults/s, {rate(*EVICTIONS):.0f} evictions/s"
    )


def _largest(areas: list[dict]) -> list[dict]:
    return sorted(areas, key=lambda area: area["count"], reverse=True)[:AREAS]
