"""What a job tells of itself: --stats, --progress, --report.

In the picture: beside the pager's main thread, which asks for each of them when it is time.

Interface:
    table(figures, title)     what --stats prints
    Progress                  --progress: one live line on a terminal
    Report                    --report: collects while the job runs, and then writes one HTML page

Rules: the pager's main thread only, but for Report.came, to which the DM-Handler appends. Memory is
bounded however long the job runs: when there are more than COLUMNS samples or CELLS places, each two
neighbours become one; and of the areas that were unmapped, the largest AREAS are remembered.
"""

from __future__ import annotations

import heapq
import html
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from edm.lspt import AWAY, LOST, NEW
from edm.uffd_ctypes import PAGE_SIZE

COLUMNS = 192  # samples of the timeline
CELLS = 1024  # places of the address space, each at first 1 << PLACE pages
PLACE = 8
ROWS = 128  # of the heat map
AREAS = 200

FAULTS = {
    "faults_first_access": ("first accesses", "#7a9cc6"),
    "faults_refetch": ("refetches", "#c0504d"),
    "faults_write_protect": ("first writes", "#e2b33c"),
}
EVICTIONS = {
    "evicted_clean": ("clean", "#8fbf7f"),
    "evicted_dirty": ("with their bytes", "#8064a2"),
}
MEMORY = {"resident": ("here", "#4f81bd"), "away": ("on the DMS only", "#c8c8c8")}
WHERE = {AWAY: ("on the DMS", "#c8c8c8"), NEW: ("never accessed", "none"), LOST: ("lost", "#c00")}
HERE = ("here", "#4f81bd")  # every other state

Figures = dict[str, object]


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
        self._before: tuple[float, int, int] | None = None

    def show(self, figures: Figures, away: int) -> None:
        """away: pages that the DMS has and this instance has not."""
        now = time.monotonic()
        faults, evictions = (sum(figures[name] for name in names) for names in (FAULTS, EVICTIONS))
        if self._before:
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


# ---------------------------------------------------------------- collecting


@dataclass
class Sample:
    """What happened between two moments, in seconds since the start."""

    began: float
    until: float
    counts: Counter[str]  # of FAULTS and EVICTIONS
    came: Counter[int]  # pages that came, by place
    memory: dict[str, int]  # pages at the end of it, see MEMORY

    def merged(self, later: Sample) -> Sample:
        counts, came = self.counts + later.counts, self.came + later.came
        return Sample(self.began, later.until, counts, came, later.memory)


@dataclass
class Area:
    page: int
    count: int
    name: str
    mapped: float  # seconds since the start
    unmapped: float | None = None
    ended_up: Counter[tuple[str, str]] = field(default_factory=Counter)  # pages by where they were

    def ends(self, state: Sequence[int]) -> None:
        for byte, count in Counter(state[self.page : self.page + self.count]).items():
            self.ended_up[WHERE.get(byte, HERE)] += count


class Report:
    def __init__(self, start_addr: int) -> None:
        self.came: deque[tuple[int, int]] = deque()  # (page, count) of what was installed
        self._start_addr = start_addr
        self._start_time = time.monotonic()
        self._samples: list[Sample] = []
        self._shortest = 0.0  # seconds of a sample; doubled with every halving of their number
        self._before: Counter[str] = Counter()
        self._shift = PLACE
        self._here: dict[int, Area] = {}  # mapped now, by first page
        self._gone: list[Area] = []
        self._forgotten = 0  # areas

    def _now(self) -> float:
        return time.monotonic() - self._start_time

    def mapped(self, page: int, count: int, name: str) -> None:
        self._here[page] = Area(page, count, name, self._now())

    def unmapped(self, page: int, state: Sequence[int]) -> None:
        """state: of each page of the space, as lspt.py's, before this area's are freed."""
        area = self._here.pop(page, None)
        if area is None:
            return  # told a second time
        area.unmapped = self._now()
        area.ends(state)
        self._gone.append(area)
        if len(self._gone) > 2 * AREAS:
            self._forgotten += len(self._gone) - AREAS
            self._gone = heapq.nlargest(AREAS, self._gone, key=lambda area: area.count)

    def sample(self, figures: Figures, away: int) -> None:
        """Note what has happened since this was last called. away: as Progress.show's."""
        counts = Counter({name: figures[name] for name in FAULTS | EVICTIONS})
        came: Counter[int] = Counter()
        for _ in range(len(self.came)):
            page, count = self.came.popleft()
            came[page >> self._shift] += count
        began = self._samples[-1].until if self._samples else 0.0
        memory = {"resident": figures["resident"], "away": away}
        new = Sample(began, self._now(), counts - self._before, came, memory)
        self._before = counts
        if self._samples and began - self._samples[-1].began < self._shortest:
            new = self._samples.pop().merged(new)
        self._samples.append(new)
        if len(self._samples) > COLUMNS:
            self._shortest = 2 * new.until / COLUMNS
            last = self._samples[-1:] if len(self._samples) % 2 else []
            pairs = zip(self._samples[::2], self._samples[1::2], strict=False)
            self._samples = [one.merged(other) for one, other in pairs] + last
        while len(set().union(*(sample.came for sample in self._samples))) > CELLS:
            self._shift += 1
            for sample in self._samples:
                coarser: Counter[int] = Counter()
                for place, count in sample.came.items():
                    coarser[place >> 1] += count
                sample.came = coarser

    def write(
        self,
        path: str,
        title: str,
        figures: Figures,
        latencies: Sequence[tuple[float, int]],
        state: Sequence[int],
    ) -> None:
        """Write the page. latencies: (µs, faults), ascending. state: as unmapped's.

        Raises OSError if it can't be written.
        """
        for area in self._here.values():
            area.ends(state)
        areas = [*self._here.values(), *self._gone]
        samples = self._samples
        rates = [
            (name, legend, [[s.counts[key] / max(s.until - s.began, 1e-6) for key in legend]
                            for s in samples], "{:.0f}".format)
            for name, legend in (("faults a second", FAULTS), ("pages evicted a second", EVICTIONS))
        ]  # fmt: skip
        memory = ("memory", MEMORY, [[s.memory[key] for key in MEMORY] for s in samples], size)
        sections = [
            f"<h1>{html.escape(title)}</h1>",
            _rows([(html.escape(cell) for cell in row) for row in summary(figures).items()]),
            "<h2>When</h2>",
            *(_chart(samples, *chart) for chart in (*rates, memory)),
            "<h2>How long a fault took</h2>",
            _histogram(latencies),
            "<h2>Where</h2>",
            _HEAT_MAP,
            self._heat_map(areas),
            "<h2>The areas</h2>",
            self._area_table(areas),
        ]
        with open(path, "w", encoding="utf-8") as file:
            file.write(
                _PAGE.replace("TITLE", html.escape(title)) + "\n".join(sections) + "</html>\n"
            )

    # ------------------------------------------------------------ drawing

    def _heat_map(self, areas: Sequence[Area]) -> str:
        places = set().union(*(sample.came for sample in self._samples))
        if not places:
            return "<p>No page came.</p>"
        ordered = sorted(places)
        in_row = -(-len(ordered) // ROWS)  # places
        rows = [ordered[at : at + in_row] for at in range(0, len(ordered), in_row)]
        row_of = {place: row for row, places in enumerate(rows) for place in places}
        left, top, width, height = 250, 6, 640, max(6, min(16, 420 // len(rows)))
        last = self._samples[-1].until
        levels: dict[int, str] = {}
        for sample in self._samples:
            cells: Counter[int] = Counter()
            for place, count in sample.came.items():
                cells[row_of[place]] += count
            x, w = left + width * sample.began / last, width * (sample.until - sample.began) / last
            for row, count in cells.items():
                share = count / (in_row << self._shift)
                level = max(0, min(7, 7 + round(math.log2(share))))
                cell = f"M{x:.1f} {top + row * height}h{w:.1f}v{height}h-{w:.1f}z"
                levels[level] = levels.get(level, "") + cell
        svg = [_box(left, top, width, len(rows) * height, "#fafafa")]
        svg += [f'<path d="{d}" fill="hsl(14 70% {88 - 9 * n}%)"/>' for n, d in levels.items()]
        named, free_from = None, 0
        for row, places in enumerate(rows):
            first, stop, y = (
                places[0] << self._shift,
                places[-1] + 1 << self._shift,
                top + row * height,
            )
            inside = [a for a in areas if a.page < stop and first < a.page + a.count]
            area = max(inside, key=lambda area: area.count, default=None)
            if area and area is not named and y >= free_from:
                name = area.name[-36:] or hex(self._address(area.page))
                svg.append(_text(left - 6, y + 10, name, "right"))
                named, free_from = area, y + 13
        svg += _seconds(left, top + len(rows) * height, width, last)
        return _svg(left + width + 20, top + len(rows) * height + 20, svg)

    def _address(self, page: int) -> int:
        return self._start_addr + page * PAGE_SIZE

    def _area_table(self, areas: Sequence[Area]) -> str:
        rows = [("made in", "address", "size", "mapped", "in the end its pages were")]
        largest = sorted(areas, key=lambda area: area.count, reverse=True)[:AREAS]
        for area in largest:
            until = "the end" if area.unmapped is None else f"{area.unmapped:.2f} s"
            bar, x = [_box(0, 0, 120, 10, "none")], 0.0
            for (_, color), count in area.ended_up.items():
                bar.append(_box(x, 0, 120 * count / area.count, 10, color))
                x += 120 * count / area.count
            words = ", ".join(f"{where} {size(n)}" for (where, _), n in area.ended_up.items())
            rows.append(
                (html.escape(area.name), f"{self._address(area.page):#x}", size(area.count),
                 f"{area.mapped:.2f} s to {until}", _svg(120, 10, bar) + words)
            )  # fmt: skip
        left_out = len(areas) - len(largest) + self._forgotten
        return _rows(rows, "areas") + (
            f"<p>{left_out} smaller ones left out.</p>" if left_out else ""
        )


def _chart(
    samples: Sequence[Sample],
    name: str,
    legend: dict[str, tuple[str, str]],
    values: Sequence[Sequence[float]],
    words: Callable[[float], str],
) -> str:
    """Stacked steps over time: values has a row a sample, with a column each of the legend."""
    left, top, width, height = 90, 24, 760, 110
    most, last = max(map(sum, values), default=0) or 1, samples[-1].until
    svg = [
        _text(0, 12, name, "name"), _text(left - 6, top + 10, words(most), "right"),
        _text(left - 6, top + height, "0", "right"), _box(left, top, width, height, "#fafafa"),
    ]  # fmt: skip
    for column, (_, color) in reversed(list(enumerate(legend.values()))):
        path = f"M{left} {top + height}"
        for sample, row in zip(samples, values, strict=True):
            y = top + height * (1 - sum(row[: column + 1]) / most)
            for moment in (sample.began, sample.until):
                path += f"L{left + width * moment / last:.1f} {y:.1f}"
        svg.append(f'<path d="{path}V{top + height}Z" fill="{color}"/>')
    at = left + 120
    for label, color in legend.values():
        svg += [_box(at, 3, 10, 10, color), _text(at + 14, 12, label)]
        at += 40 + 7 * len(label)
    return _svg(
        left + width + 20, top + height + 20, svg + _seconds(left, top + height, width, last)
    )


def _histogram(latencies: Sequence[tuple[float, int]]) -> str:
    bars: Counter[int] = Counter()
    for microseconds, faults in latencies:
        bars[round(2 * math.log2(microseconds))] += faults
    if not bars:
        return "<p>There was no fault.</p>"
    left, top, height, w = 90, 6, 120, 24
    first, last, most = min(bars), max(bars), max(bars.values())
    svg = [_text(left - 6, top + 10, f"{most} faults", "right")]
    for bar in range(first, last + 1):
        x, h = left + (bar - first) * w, height * bars[bar] / most
        svg.append(_box(x, top + height - h, w - 2, h, "#7a9cc6", f"{bars[bar]} faults"))
        if (bar - first) % 2 == 0:
            took = 2 ** (bar / 2)
            words = f"{took:.3g} µs" if took < 1000 else f"{took / 1000:.3g} ms"
            svg.append(_text(x, top + height + 14, words))
    return _svg(left + (last + 3 - first) * w, top + height + 20, svg)


def _box(x: float, y: float, width: float, height: float, fill: str, title: str = "") -> str:
    box = f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"'
    frame = ' stroke="#ddd"' if fill in ("none", "#fafafa") else ""
    return f"{box}{frame}><title>{title}</title></rect>"


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{html.escape(words)}</text>'


def _seconds(left: float, y: float, width: float, last: float) -> list[str]:
    """A time axis."""
    kinds = ("", "middle", "middle", "middle", "right")
    return [
        _text(left + width * part / 4, y + 14, f"{last * part / 4:.3g} s", kind)
        for part, kind in enumerate(kinds)
    ]


def _svg(width: float, height: float, parts: Iterable[str]) -> str:
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n' + "\n".join(parts) + "\n</svg>"


def _rows(rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """A table of cells that are HTML."""
    lines = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    return f'<table class="{kind}">' + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"


_HEAT_MAP = (
    "<p>Each row is a part of the address space, named by the largest area that was there; the "
    "darker, the more of its pages came in that moment.</p>"
)
_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>TITLE</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.4em; overflow-wrap: anywhere } h2 { font-size: 1.1em; margin-top: 2em }
table { border-collapse: collapse; font-size: 14px } td { padding: 2px 14px 2px 0; vertical-align: top }
.areas tr:first-child { font-weight: 600 } .areas td { border-bottom: 1px solid #eee }
.areas td:first-child { overflow-wrap: anywhere } .areas td:last-child { min-width: 8em }
svg { width: 100%; display: block; margin: 8px 0; font: 11px system-ui, sans-serif; fill: #222 }
.right { text-anchor: end } .middle { text-anchor: middle } .name { font-weight: 600 }
</style>
"""
