"""What a job tells of itself: --stats, --progress, --report.

In the picture: beside the pager's main thread, which asks for each of them when it is time.

Interface:
    summary(figures)          what --stats prints: {what: a line of words}
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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from edm.lspt import AWAY, LOST, NEW
from edm.uffd_ctypes import PAGE_SIZE

COLUMNS = 192  # samples of the timeline
CELLS = 1024  # places of the address space, each at first 1 << PLACE pages
PLACE = 8
ROWS = 128  # of the heat map
AREAS = 400

Figures = dict[str, object]


def size(pages: float) -> str:
    """So many pages, in bytes, for people."""
    amount = pages * PAGE_SIZE
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if amount >= 10 or unit == "bytes" else f"{amount:.1f} {unit}"


def summary(f: Figures) -> dict[str, str]:
    """What the figures of pager.py say, in words."""
    faults = f["faults_first_access"] + f["faults_refetch"] + f["faults_write_protect"]
    return {
        "faults": f"{faults}: {f['faults_first_access']} first accesses, "
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
    """summary as --stats prints it."""
    lines = [f"{what:12} {words}" for what, words in summary(figures).items()]
    return "\n".join([title, *lines])


class Progress:
    """A line that is written over again and again."""

    def __init__(self) -> None:
        self._before: tuple[float, int, int] | None = None

    def show(self, figures: Figures, away: int) -> None:
        """away: pages that the DMS has and this instance has not."""
        now = time.monotonic()
        faults, evictions = _faults(figures), _evictions(figures)
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


def _faults(f: Figures) -> int:
    return f["faults_first_access"] + f["faults_refetch"] + f["faults_write_protect"]


def _evictions(f: Figures) -> int:
    return f["evicted_dirty"] + f["evicted_clean"]


# ---------------------------------------------------------------- collecting


@dataclass
class Sample:
    """What happened in the time up to `until`, in seconds since the start."""

    until: float
    counts: Counter[str]  # of what COUNTED names
    came: Counter[int]  # pages that came, by place
    resident: int  # pages, at the end of it
    away: int


@dataclass
class Area:
    page: int
    count: int
    name: str
    mapped: float  # seconds since the start
    unmapped: float | None = None
    ended_up: Counter[str] = field(default_factory=Counter)  # pages by where they are


COUNTED = {
    "faults_first_access": ("first accesses", "#7a9cc6"),
    "faults_refetch": ("refetches", "#c0504d"),
    "faults_write_protect": ("first writes", "#e2b33c"),
    "evicted_clean": ("clean", "#8fbf7f"),
    "evicted_dirty": ("with their bytes", "#8064a2"),
}


class Report:
    def __init__(self, start_addr: int) -> None:
        self.came: deque[tuple[int, int]] = deque()  # (page, count) of what was installed
        self._start_addr = start_addr
        self._began = time.monotonic()
        self._samples: list[Sample] = []
        self._next = 0.0  # when the last of them is to end
        self._interval = 0.0  # of each; doubled with every halving of their number
        self._before: Counter[str] = Counter()
        self._shift = PLACE
        self._here: dict[int, Area] = {}  # mapped now, by first page
        self._gone: list[Area] = []
        self._forgotten = 0  # areas

    def _now(self) -> float:
        return time.monotonic() - self._began

    def mapped(self, page: int, count: int, name: str) -> None:
        self._here[page] = Area(page, count, name, self._now())

    def unmapped(self, page: int) -> None:
        area = self._here.pop(page)
        area.unmapped = self._now()
        self._gone.append(area)
        if len(self._gone) > 2 * AREAS:
            self._forgotten += len(self._gone) - AREAS
            self._gone = heapq.nlargest(AREAS, self._gone, key=lambda area: area.count)

    def sample(self, figures: Figures, away: int) -> None:
        """Note what has happened since this was last called."""
        now = self._now()
        counts = Counter({name: figures[name] for name in COUNTED})
        came: Counter[int] = Counter()
        for _ in range(len(self.came)):
            page, count = self.came.popleft()
            came[page >> self._shift] += count
        self._samples.append(Sample(now, counts - self._before, came, figures["resident"], away))
        self._before = counts
        last = self._samples[-2:]
        if len(last) == 2 and now < self._next:
            self._samples[-2:] = [_merged(*last)]
        else:
            self._next = now + self._interval
        if len(self._samples) > COLUMNS:
            self._interval = 2 * now / COLUMNS
            pairs = zip(self._samples[::2], self._samples[1::2], strict=False)
            odd = self._samples[len(self._samples) // 2 * 2 :]
            self._samples = [_merged(*pair) for pair in pairs] + odd
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
        """Write the page. latencies: (µs, faults), ascending. state: of each page, as lspt.py's.

        Raises OSError if it can't be written.
        """
        for area in self._here.values():
            states = Counter(state[area.page : area.page + area.count])
            for byte, count in states.items():
                area.ended_up[_where(byte)] += count
        areas = sorted([*self._here.values(), *self._gone], key=lambda a: (a.page, a.mapped))
        sections = [
            f"<h1>{html.escape(title)}</h1>",
            _rows_of(summary(figures).items()),
            "<h2>When</h2>",
            self._timeline(),
            "<h2>How long a fault took</h2>",
            _histogram(latencies),
            "<h2>Where</h2>",
            f"<p>{_WHERE}</p>",
            self._heat_map(areas, state),
            "<h2>The areas</h2>",
            self._area_table(areas),
        ]
        with open(path, "w", encoding="utf-8") as file:
            file.write(_PAGE.replace("TITLE", html.escape(title)) + "\n".join(sections) + _END)

    # ------------------------------------------------------------ drawing

    def _timeline(self) -> str:
        parts = []
        for name, keys in (
            ("faults a second", ("faults_first_access", "faults_refetch", "faults_write_protect")),
            ("pages evicted a second", ("evicted_clean", "evicted_dirty")),
        ):
            legend = [COUNTED[key] for key in keys]
            rates = [
                [s.counts[key] / max(s.until - began, 1e-6) for key in keys]
                for began, s in self._spans()
            ]
            parts.append(self._chart(name, legend, rates, "{:.0f}".format))
        legend = [("here", "#4f81bd"), ("on the DMS only", "#c8c8c8")]
        sizes = [[s.resident, s.away] for _, s in self._spans()]
        parts.append(self._chart("memory", legend, sizes, size))
        return "\n".join(parts)

    def _spans(self) -> Iterable[tuple[float, Sample]]:
        began = 0.0
        for sample in self._samples:
            yield began, sample
            began = sample.until

    def _chart(self, name: str, legend: list, values: list[list[float]], words: object) -> str:
        """Stacked steps over time."""
        width, height, left, top = 760, 110, 90, 24
        most = max((sum(v) for v in values), default=0) or 1
        last = self._samples[-1].until if self._samples else 1
        svg = [
            f'<text x="0" y="12" class="name">{name}</text>',
            f'<text x="{left - 6}" y="{top + 10}" class="right">{words(most)}</text>',
            f'<text x="{left - 6}" y="{top + height}" class="right">0</text>',
            f'<rect x="{left}" y="{top}" width="{width}" height="{height}" class="frame"/>',
        ]
        at = left + 100
        for label, color in legend:
            svg.append(f'<rect x="{at}" y="3" width="10" height="10" fill="{color}"/>')
            svg.append(f'<text x="{at + 14}" y="12">{label}</text>')
            at += 34 + 7 * len(label)
        for index, (_, color) in reversed(list(enumerate(legend))):
            path = f"M{left} {top + height}"
            for (began, sample), value in zip(self._spans(), values, strict=True):
                y = top + height * (1 - sum(value[: index + 1]) / most)
                path += f"L{left + width * began / last:.1f} {y:.1f}"
                path += f"L{left + width * sample.until / last:.1f} {y:.1f}"
            svg.append(f'<path d="{path}V{top + height}Z" fill="{color}"/>')
        svg += _seconds(left, top + height, width, last)
        return _svg(left + width + 20, top + height + 20, svg)

    def _heat_map(self, areas: list[Area], state: Sequence[int]) -> str:
        places = {
            place
            for area in areas
            for place in range(area.page >> self._shift, ((area.page + area.count - 1) >> self._shift) + 1)
        }  # fmt: skip
        if not places or not self._samples:
            return "<p>No area was mapped.</p>"
        ordered = sorted(places)
        height = -(-len(ordered) // ROWS)  # places in a row
        rows = [ordered[at : at + height] for at in range(0, len(ordered), height)]
        row_of = {place: row for row, places in enumerate(rows) for place in places}
        left, top, width, strip, h = 250, 6, 560, 90, max(6, min(16, 420 // len(rows)))
        last = self._samples[-1].until
        levels: dict[int, list[str]] = {}
        full = height << self._shift  # pages in a row
        for began, sample in self._spans():
            cells: Counter[int] = Counter()
            for place, count in sample.came.items():
                if place in row_of:
                    cells[row_of[place]] += count
            x, w = width * began / last, max(0.5, width * (sample.until - began) / last)
            for row, count in cells.items():
                level = max(0, min(7, 7 + round(math.log2(count / full))))
                levels.setdefault(level, []).append(
                    f"M{left + x:.1f} {top + row * h}h{w:.1f}v{h}h-{w:.1f}z"
                )
        svg = [
            f'<rect x="{left}" y="{top}" width="{width}" height="{len(rows) * h}" class="frame"/>'
        ]
        for level, cells_of_it in sorted(levels.items()):
            lightness = 88 - 9 * level
            svg.append(f'<path d="{"".join(cells_of_it)}" fill="hsl(14 70% {lightness}%)"/>')
        named_until = -1.0
        for row, in_row in enumerate(rows):
            first, stop = in_row[0] << self._shift, (in_row[-1] + 1) << self._shift
            y = top + row * h
            where: Counter[str] = Counter()
            for area in self._here.values():
                low, high = max(first, area.page), min(stop, area.page + area.count)
                if low < high:
                    for byte, count in Counter(state[low:high]).items():
                        where[_where(byte)] += count
            x = left + width + 12.0
            for what, color in _ENDED_UP.items():
                w = strip * where[what] / full
                if w:
                    svg.append(
                        f'<rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="{h}" fill="{color}"/>'
                    )
                x += w
            if y >= named_until:
                inside = [a for a in areas if a.page < stop and first < a.page + a.count]
                largest = max(inside, key=lambda a: a.count, default=None)
                if largest:
                    svg.append(
                        f'<text x="{left - 6}" y="{y + 10}" class="right">'
                        f"{html.escape(largest.name[-34:] or hex(self._address(first)))}</text>"
                    )
                    named_until = y + 13
        bottom = top + len(rows) * h
        svg += _seconds(left, bottom, width, last)
        at = left + width + 12
        for what, color in _ENDED_UP.items():
            svg.append(f'<rect x="{at}" y="{bottom + 6}" width="10" height="10" fill="{color}"/>')
            svg.append(f'<text x="{at + 14}" y="{bottom + 15}">{what}</text>')
            bottom += 15
        return _svg(left + width + strip + 60, bottom + 20, svg)

    def _address(self, page: int) -> int:
        return self._start_addr + page * PAGE_SIZE

    def _area_table(self, areas: list[Area]) -> str:
        rows = []
        for area in sorted(areas, key=lambda a: a.count, reverse=True)[:AREAS]:
            until = "the end" if area.unmapped is None else f"{area.unmapped:.2f} s"
            ended = ", ".join(f"{what}: {size(n)}" for what, n in area.ended_up.items() if n)
            rows.append(
                (area.name, f"{self._address(area.page):#x}", size(area.count),
                 f"{area.mapped:.2f} s to {until}", ended or "freed")
            )  # fmt: skip
        left_out = len(areas) - len(rows) + self._forgotten
        more = f"<p>{left_out} smaller ones are left out.</p>" if left_out else ""
        head = ("made in", "address", "size", "mapped", "in the end")
        return _rows_of([head, *rows], "areas") + more


def _merged(a: Sample, b: Sample) -> Sample:
    return Sample(b.until, a.counts + b.counts, a.came + b.came, b.resident, b.away)


_ENDED_UP = {
    "here": "#4f81bd",
    "on the DMS": "#c8c8c8",
    "lost": "#c00000",
    "never accessed": "none",
}


def _where(state: int) -> str:
    return {NEW: "never accessed", AWAY: "on the DMS", LOST: "lost"}.get(state, "here")


def _seconds(left: float, y: float, width: float, last: float) -> list[str]:
    """A time axis."""
    return [
        f'<text x="{left + width * part / 4}" y="{y + 14}" class="{anchor}">{last * part / 4:.3g} s</text>'
        for part, anchor in enumerate(("", "middle", "middle", "middle", "right"))
    ]  # fmt: skip


def _histogram(latencies: Sequence[tuple[float, int]]) -> str:
    bars: Counter[int] = Counter()
    for microseconds, faults in latencies:
        bars[round(2 * math.log2(microseconds))] += faults
    if not bars:
        return "<p>There was no fault.</p>"
    left, top, height, w = 90, 6, 120, 24
    first, last, most = min(bars), max(bars), max(bars.values())
    svg = [f'<text x="{left - 6}" y="{top + 10}" class="right">{most} faults</text>']
    for bar in range(first, last + 1):
        x, h = left + (bar - first) * w, height * bars[bar] / most
        svg.append(
            f'<rect x="{x}" y="{top + height - h:.1f}" width="{w - 2}" height="{h:.1f}" '
            f'fill="#7a9cc6"><title>{bars[bar]} faults</title></rect>'
        )
        if (bar - first) % 2 == 0:
            svg.append(f'<text x="{x}" y="{top + height + 14}">{2 ** (bar / 2):.3g} µs</text>')
    return _svg(left + (last + 2 - first) * w + 20, top + height + 20, svg)


def _svg(width: float, height: float, parts: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'style="max-width:{width:.0f}px">\n' + "\n".join(parts) + "\n</svg>"
    )


def _rows_of(rows: Iterable[Sequence[str]], kind: str = "") -> str:
    lines = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return f'<table class="{kind}">' + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"


_WHERE = (
    "Each row is a part of the address space, named by the largest area that was there; the darker, "
    "the more of its pages came in that moment. Beside it: where its pages were in the end."
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
.areas tr:first-child { font-weight: 600 } .areas td { border-bottom: 1px solid #eee; overflow-wrap: anywhere }
svg { width: 100%; display: block; margin: 8px 0; font: 11px system-ui, sans-serif; fill: #222 }
.right { text-anchor: end } .middle { text-anchor: middle } .name { font-weight: 600 }
.frame { fill: #fafafa; stroke: #ddd }
</style>
"""
_END = "\n</html>\n"
