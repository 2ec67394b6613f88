"""What a job reports of itself: --stats, --progress, --report.

In the picture: beside the pager, which calls it.

Interface:
    TABLE                     what --stats prints, by the figures of pager.py
    Report                    collects samples while the job runs, for --progress and --report. --progress prints
                              each of them as a live line on a terminal. In the end --report writes an HTML
                              page of all, and --stats prints its table

The page is report.html with one JSON object in it, which a script there draws in the browser. The
object has (times in seconds, as time.monotonic; counts in pages, unless a unit is given):
    title, page_size (bytes), start_addr, table (what --stats prints)
    place          the pages of a place, a part of the address space, in the end
    samples        until: when it was taken; came: pages since the sample before, by the first page of their
                   place. Places were smaller in earlier samples. And all but the first, which is the start: the figures
                   of pager.py; away: pages of the areas of that time that were not here
    latencies      faults, by how long they took: see dm_handler.py
    areas          [the first page, count of pages, name, when it was seen first and last], the largest first
    lines          [line, its array's first page, count of pages, faults, nanoseconds], see lines.py

Rules: one thread at a time calls sample or end. The DM-Handler appends the pages that come meanwhile. An area
that no call of sample sees is not told of. However long the job runs, the memory grows with the logarithm of its
time at most: a sample goes on until it covers 1/COLUMNS of the time so far, or is one call's, if that covers more.
It has about PLACES counts at most, as a place grows with the areas. The largest AREAS areas are kept. --progress is
about the last second's figures, which are kept apart.
"""

import sys
import time
from collections import Counter, deque

from edm import log
from edm.dm_handler import WAITS, DmHandler
from edm.edm import tell
from edm.lspt import LSPT
from edm.uffd_ctypes import PAGE_SIZE

COLUMNS = 128  # a sample may cover this part of the time so far
PLACES = 256  # that the areas have, at most, if there are no gaps; and half as many at least
AREAS = 200
SAMPLE = 100  # milliseconds from one sample to the next

TABLE = """\
faults       {faults_first_access} first accesses, {faults_refetch} refetches, \
{faults_write_protect} first writes
latency      {latency_median} µs median, {latency_99th} µs 99th percentile of the faults
waiting      {waited:.2f} s, the application for its pages
evictions    {evicted_dirty} pages with their bytes, {evicted_clean} clean ones without
to the store {bytes_sent:,} bytes
from it      {bytes_received:,} bytes; {fetched} pages came, new ones and those read ahead included
from DMSs    {from_each_dms} pages of each, by rank; [] on one machine
resident     {peak_resident} pages at most"""


class Report:
    def __init__(self, hello: object, lines: list[int], lspt: LSPT, handler: DmHandler) -> None:
        """hello: see pager.page_for. lines: the descriptor for lines.py, if there is one."""
        self._hello, self._lspt, self._handler = hello, lspt, handler
        # Whether a line is printed to the terminal, which each sample overwrites.
        self._live = hello.progress and sys.stderr.isatty()
        self._came = deque()  # the pages that were installed
        if self._live or hello.report:  # else nobody looks at samples
            handler.came = self._came
        start = {"until": time.monotonic(), "came": Counter()}
        self._samples: list[dict] = [start, start]  # of two ends, a sample begins at the first
        self._second = deque([start], 1 + 1000 // SAMPLE)  # the figures of the last second
        self._place = 1
        # The largest areas, the largest first: LSPT.areas has each as its key, and when it was seen first and last.
        self._areas: dict[tuple[int, int, str], list[float]] = {}
        self._lines: dict[tuple[str, int, int], list[int]] = {}  # what lines.py finds
        if lines:
            from edm.lines import Lines  # few jobs need it

            handler.lines = Lines(hello.pid, *hello.lines, *lines, lspt, self._lines)

    def sample(self, figures: dict[str, object]) -> None:
        """Note what has happened since the last call."""
        areas, until = self._lspt.areas.copy(), time.monotonic()
        for area in sorted(areas, key=lambda area: area[1])[-AREAS:]:
            self._areas.setdefault(area, [until, until])[1] = until
        largest = sorted(self._areas.items(), key=lambda item: item[0][1], reverse=True)
        self._areas = dict(largest[:AREAS])
        mapped = sum(count for _, count, _ in areas)
        self._place = max(self._place, 1 << (mapped // PLACES).bit_length())
        now = figures | {"until": until, "away": max(0, mapped - figures["resident"])}
        self._second.append(now)
        if self._live:
            # ?7l and ?7h: the terminal cuts off a line that is too long.
            tell(f"\r\x1b[K\x1b[?7l{_line(self._second[0], now)}\x1b[?7h", "")
        ends = [sample["until"] for sample in self._samples]
        if ends[-1] - ends[-2] >= (ends[-1] - ends[0]) / COLUMNS:
            self._samples.append({"came": Counter()})
        sample = self._samples[-1]
        sample.update(now)
        sample["came"].update(self._came.popleft() & -self._place for _ in range(len(self._came)))

    def end(self, figures: dict[str, object]) -> None:
        """After a last sample, erase the live line, write the HTML page and print the table, if they are wanted."""
        self.sample(figures)
        if self._live:
            tell("\r\x1b[K", "")
        if self._hello.report:
            try:
                self.write(figures)
            except OSError as error:
                log.logger("EDM CLIENT").error("report: %s", error)
        if self._hello.stats:
            tell(f"{self._hello.title}\n{TABLE.format(**figures)}")

    def write(self, figures: dict[str, object]) -> None:
        """Write the HTML page. Raises OSError."""
        content = {
            "title": self._hello.title,
            "page_size": PAGE_SIZE,
            "start_addr": self._lspt.start,
            "table": TABLE.format(**figures),
            "samples": self._samples[1:],
            "place": self._place,
            "latencies": self._handler.latencies,
            "lines": [[*key, *found] for key, found in self._lines.copy().items()],
            "areas": [[*area, *seen] for area, seen in self._areas.items()],
        }
        import json  # both take long to import
        from pathlib import Path

        text = json.dumps(content).replace("<", "\\u003c")  # a name can't end the script
        page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
        Path(self._hello.report).write_text(page.replace("REPORT_AS_JSON", text), encoding="utf-8")


def _line(before: dict, now: dict) -> str:
    """The line of --progress, about the second between two samples."""

    def rate(name: str) -> float:
        return max(0, now[name] - before.get(name, 0)) / (now["until"] - before["until"])

    waits, store, room = (f"{rate(name):.0%}" for name in WAITS)
    here, away = (now[name] * PAGE_SIZE >> 20 for name in ("resident", "away"))
    come, leave = rate("fetched"), rate("evicted_clean") + rate("evicted_dirty")
    return (
        f"waits {waits} (reading {store}, for room {room}), resident {here} MiB, "
        f"not here {away} MiB, {come:.0f} pages/s come, {leave:.0f} leave"
    )
