"""Readahead: which faults belong to a sequential stream, and how many pages to fetch then.

In the picture: a part of the DM-Handler, which does what this decides.

Interface: Readahead.stream(page) gives the Stream that a fault of this page continues, if any. The
DM-Handler fetches the pages that the stream wants, asks the store for the next ones ahead of need
(stream.ahead), and tells which came (continued). It tells the faults that continue no stream, too
(single): they may begin one.

A stream begins after two faults in neighbouring pages, upward or downward, or after three at equal
distances (its stride, at most MAX_STRIDE, upward). Its window is small at first, and doubles each
time that one was used up, to at most max_window. Random access only ever pays for one look into a
small table.

What was asked for ahead is a hint: its pages stay AWAY until one of them faults. It is dropped when
any of its pages comes in another way, as its bytes may then be old.

Rules: the DM-Handler's thread only. Pages, not bytes.

The idea is the kernel's (mm/readahead.c).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

TYPE_CHECKING = False  # for type checkers it is true; typing takes long to import
if TYPE_CHECKING:
    from typing import Any

STREAMS = 8  # followed at once
REMEMBERED = 16  # single faults that may yet turn out to begin a stream
FIRST_WINDOW = 8
STRIDED_WINDOW = 64  # at most: the pages of one are read and installed one by one
MAX_STRIDE = 64
NEAR = 16  # strides: a fault so near after a window continues its stream


def bounds(pages: range) -> tuple[int, int]:
    """The (first, end) of these pages, upward or downward."""
    return min(pages[0], pages[-1]), max(pages[0], pages[-1]) + 1


class Stream:
    def __init__(self, next: int, window: int, stride: int = 1) -> None:
        self.next = next  # the page whose fault would continue it
        self.window = window  # pages to fetch then
        self.stride = stride  # between them; -1: downward
        self.near = range(0)  # pages whose fault continues it
        self.ahead: dict[range, Any] = {}  # pages → what the store's ask_get gave
        self.bounds = (0, 0)  # a range that has all pages of ahead

    def wanted(self, page: int, area: range) -> range:
        """The pages of this area to fetch when this one faults, in the order of need: this one first."""
        stop = page + self.window * self.stride
        within = min(stop, area.stop) if self.stride > 0 else max(stop, area.start - 1)
        return range(page, within if page in area else page + self.stride, self.stride)

    def asked(self, wanted: range) -> None:
        """These pages, in the order of need, are being asked for ahead."""
        self.bounds = bounds(wanted)


class Readahead:
    def __init__(self, max_window: int, drop: Callable[[Any], None]) -> None:
        """max_window: pages at most in one window; less than 2 turns readahead off. drop: called with
        what was asked for ahead and is not needed."""
        self.max_window, self._drop = max_window, drop
        self._streams: list[Stream] = []  # the one used last is the last
        self._near: dict[int, Stream] = {}  # whose fault continues which stream
        self._recent: list[int] = []  # pages of single faults, sorted
        self.stream = self._near.get

    def single(self, page: int) -> None:
        """This page has faulted, and has come alone."""
        if self.max_window < 2:
            return
        recent = self._recent
        at = bisect_left(recent, page)
        for before in recent[bisect_left(recent, page - MAX_STRIDE) : at + 1]:
            stride = page - before
            if stride in (1, -1) or stride > 1 and before - stride in recent:
                recent.remove(before)
                window = min(FIRST_WINDOW, self.max_window)
                stream = Stream(page + stride, window, stride)
                self._streams.append(stream)
                self._watch(stream)
                if len(self._streams) > STREAMS:
                    ended = self._streams.pop(0)
                    self._drop_ahead(ended)
                    self._unwatch(ended)
                return
        if len(recent) == REMEMBERED:
            recent.clear()
            at = 0
        recent.insert(at, page)

    def continued(self, stream: Stream, pages: range) -> None:
        """The stream has been continued with these pages, in the order of need."""
        stream.next = pages[-1] + stream.stride
        most = self.max_window if stream.stride in (1, -1) else min(self.max_window, STRIDED_WINDOW)
        stream.window = min(2 * stream.window, most)
        self._streams.remove(stream)
        self._streams.append(stream)
        self._watch(stream)

    def _watch(self, stream: Stream) -> None:
        """Note whose fault continues this stream, in place of what was noted of it before."""
        # Only its own entries change: to note all streams anew takes longer than a fault.
        self._unwatch(stream)
        # Pages that were here already do not end a stream. NEAR, as random faults that hit an old
        # stream would bring a window each.
        stream.near = range(stream.next, stream.next + NEAR * stream.stride, stream.stride)
        self._near.update(dict.fromkeys(stream.near, stream))

    def _unwatch(self, stream: Stream) -> None:
        for page in stream.near:
            if self._near.get(page) is stream:
                del self._near[page]

    def _drop_ahead(self, stream: Stream) -> None:
        while stream.ahead:
            self._drop(stream.ahead.popitem()[1])

    def come(self, low: int, high: int) -> None:
        """Pages of range(low, high) come: what was asked for ahead of them is dropped."""
        for stream in self._streams:
            first, end = stream.bounds
            if low < end and first < high:
                self._drop_ahead(stream)

    def end(self) -> None:
        """Drop everything."""
        for stream in self._streams:
            self._drop_ahead(stream)
