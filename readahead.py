"""Readahead: which faults belong to a sequential stream, and how many pages to fetch then.

In the picture: a part of the DM-Handler, which does what this decides.

Interface: Readahead.stream(page) returns the Stream that a fault of this page continues or begins, if any. The
DM-Handler fetches the pages that the stream wants and that are not here, and reports them (continued).

A stream begins with the second of two faults in neighbouring pages, upward, or with the third of three at
equal distances: a page downward, or upward at most MAX_STRIDE (its stride). Its window is small at first,
because no more faults may follow, and doubles each time that one was used up, to at most max_window.

A window that nobody needs pushes out pages that are needed. A stride is often not exact, as that of a column
whose rows are no whole pages: it is 3 pages a few times, then 2. So a stream is forgotten when an unexpected
page faults: one of its last window, one between the pages of that, or one behind it, if a missing page was
passed over.

A row is a few neighbouring pages. Random rows would fault twice in each row. So where streams end with their
first window again and again, a single fault gets a stream of its own, which brings the rest of the row and
is not followed: the fault may as well be one of equal distances. Every PROBE-th single fault still comes
alone, to see if the rows go on.

Among single faults, every REMEMBERED of them, the stream that was used least recently is forgotten. So
random access ends up with none to look at. A stream that was forgotten begins again as a new one does.

Rules: the DM-Handler's thread only. Pages, not bytes.

The idea is the kernel's (mm/readahead.c).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

# Followed at once: several of each thread. With 8, 16 threads with arrays of their own took three times as long.
STREAMS = 32
REMEMBERED = 32  # single faults that may yet turn out to begin a stream
FIRST_WINDOW = 4  # mm/readahead.c's
ROWS, PROBE = 16, 8
MAX_STRIDE = 64
# A fault at most so many strides after a window continues its stream. Few, because each random fault that hits
# an old stream brings a window.
NEAR = 16


class Stream:
    def __init__(self, page: int, window: int, stride: int) -> None:
        self.window = window  # pages to fetch when it is continued
        self.stride = stride  # between them; -1: downward
        self.expect_from(page, page)

    def expect_from(self, page: int, begin: int) -> None:
        """The fault that continues the stream is this page's, or near: pages that are here do not fault.
        begin: the first page of the window before."""
        self.reach = range(page, page + NEAR * self.stride, self.stride)
        self.span = range(min(begin, self.reach.stop + 1), max(begin + 1, self.reach.stop))

    def wanted(self, page: int, area: range) -> range:
        """The pages of this area to fetch when this one faults, in the order of need: this one first."""
        stop = page + self.window * self.stride
        within = min(stop, area.stop) if self.stride > 0 else max(stop, area.start - 1)
        return range(page, within if page in area else page + self.stride, self.stride)


class Readahead:
    def __init__(self, max_window: int, is_missing: Callable[[range], bool]) -> None:
        """max_window: pages at most in one window; less than 2 turns readahead off. is_missing: LSPT's."""
        self.max_window, self._is_missing = max_window, is_missing
        self._streams: list[Stream] = []  # the one used last is the first
        self._recent: list[int] = []  # pages of single faults, sorted
        # Grows with each row that was seen, and shrinks with what is no row. More than ROWS: rows come at once.
        self._rows = 0
        self._singles = 0  # faults of no stream

    def stream(self, page: int) -> Stream | None:
        """The stream that a fault of this page continues or begins, or one for the rest of a row. If there is
        none, the page comes alone."""
        for stream in self._streams:
            if page in stream.span:
                self._streams.remove(stream)
                if page in stream.reach and not self._passed_over(stream.reach, page):
                    self._streams.insert(0, stream)
                    return stream
                break
        return self._begin(page) if self.max_window > 1 else None

    def _passed_over(self, reach: range, page: int) -> bool:
        """Is any page of `reach` before this one missing? It would have faulted."""
        passed = reach[: reach.index(page)]
        return self._is_missing(passed if reach.step > 0 else passed[::-1])

    def _begin(self, page: int) -> Stream | None:
        recent = self._recent
        at = bisect_left(recent, page)
        for before in recent[bisect_left(recent, page - MAX_STRIDE) : at + 1]:
            stride = page - before
            if stride == 1 or (stride == -1 or stride > 1) and before - stride in recent:
                recent.remove(before)
                return self._new(page, stride)
        in_rows = self._rows > ROWS
        if len(recent) == REMEMBERED:
            recent.clear()
            at = 0
            if not in_rows:
                self._rows = 0
                del self._streams[-1:]
        recent.insert(at, page)
        self._singles += 1
        if in_rows and self._singles % PROBE:
            return Stream(page, FIRST_WINDOW, 1)
        self._rows -= in_rows
        return None

    def _new(self, page: int, stride: int) -> Stream:
        if len(self._streams) == STREAMS:
            last = self._streams.pop()
            is_row = last.stride == 1 and last.window == 2 * FIRST_WINDOW < self.max_window
            self._rows = min(self._rows + 2 * is_row, 2 * ROWS)
        self._streams.insert(0, Stream(page, min(FIRST_WINDOW, self.max_window), stride))
        return self._streams[0]

    def continued(self, stream: Stream, pages: range) -> None:
        """The stream has been continued with these pages, in the order of need. Some were here before."""
        if stream.window > FIRST_WINDOW:
            self._rows = max(self._rows - 1, 0)
        stream.window = min(2 * stream.window, self.max_window)
        stream.expect_from(pages[-1] + stream.stride, pages[0])
