"""Readahead: which faults belong to a sequential stream, and how many pages to fetch then.

In the picture: a part of the DM-Handler, which does what this decides.

Interface: Readahead.fault(page) is told every fault of a page that is not here, and gives the Stream
that it continues, if any. The DM-Handler fetches the pages that the stream wants, asks the store for
the next ones ahead of need (stream.ahead), and tells which were used.

A stream begins with the second of two faults in neighbouring pages, upward or downward, or with the
third of three at equal distances (its stride, at most MAX_STRIDE, upward). Its window is small at
first, and doubles each time that one was used up, to at most max_window. Random access only ever
pays for one look into a small table.

What was asked for ahead is a hint: its pages stay AWAY until one of them faults. It is dropped when
any of its pages comes in another way, as its bytes may then be old.

Rules: the DM-Handler's thread only. Pages, not bytes.

The idea is the kernel's (mm/readahead.c).
"""

from __future__ import annotations

from collections.abc import Iterator

TYPE_CHECKING = False  # for type checkers it is true; typing takes long to import
if TYPE_CHECKING:
    from typing import Any

STREAMS = 4  # followed at once
REMEMBERED = 16  # single faults that may yet turn out to begin a stream
FIRST_WINDOW = 8
STRIDED_WINDOW = 64  # at most: the pages of one are read and installed one by one
MAX_STRIDE = 64
NEAR = 16  # strides: a fault so near after a window continues its stream


class Ahead:
    """A window that was asked for ahead of need."""

    def __init__(self, pages: range, asked: Any) -> None:
        """pages: ascending. asked: what the store's ask_get gave."""
        self.pages, self.asked = pages, asked


class Stream:
    def __init__(self, next: int, window: int, stride: int = 1) -> None:
        self.next = next  # the page whose fault would continue it
        self.window = window  # pages to fetch then
        self.stride = stride  # between them; -1: downward
        self.ahead: Ahead | None = None

    def wanted(self, page: int) -> range:
        """The pages to fetch when this one faults, in the order in which they will be needed."""
        return range(page, page + self.window * self.stride, self.stride)


class Readahead:
    def __init__(self, max_window: int) -> None:
        """max_window: pages at most in one window; less than 2 turns readahead off."""
        self.max_window = max_window
        self._streams: list[Stream] = []  # the one used last is the last
        self._near: dict[int, Stream] = {}  # whose fault continues which stream
        self._recent: dict[int, None] = {}  # pages of single faults, in order
        self._places: dict[int, int] = {}  # how many of them are in each MAX_STRIDE pages

    def fault(self, page: int) -> Stream | None:
        """The stream that a fault of this page continues or begins."""
        if stream := self._near.get(page):
            return stream
        if self.max_window < 2:
            return None
        place, places = page // MAX_STRIDE, self._places
        if place in places or place - 1 in places or place + 1 in places:
            for before in self._recent:
                stride = page - before
                if stride in (1, -1) or (
                    1 < stride <= MAX_STRIDE and before - stride in self._recent
                ):
                    self._forget(before)
                    stream = Stream(page, min(FIRST_WINDOW, self.max_window), stride)
                    self._streams.append(stream)
                    return stream
        if page not in self._recent:
            self._recent[page] = None
            places[place] = places.get(place, 0) + 1
            if len(self._recent) > REMEMBERED:
                self._forget(next(iter(self._recent)))
        return None

    def _forget(self, page: int) -> None:
        del self._recent[page]
        place = page // MAX_STRIDE
        if self._places[place] == 1:
            del self._places[place]
        else:
            self._places[place] -= 1

    def used(self, stream: Stream, pages: range) -> None:
        """The stream has been continued with these pages, ascending."""
        stream.next = pages[-1] + stream.stride if stream.stride > 0 else pages.start - 1
        most = self.max_window if stream.stride in (1, -1) else min(self.max_window, STRIDED_WINDOW)
        stream.window = min(2 * stream.window, most)
        self._streams.remove(stream)
        self._streams.append(stream)
        self._watch()

    def _watch(self) -> None:
        # Pages that were here already do not end a stream. NEAR, as random faults that hit an old
        # stream would bring a window each.
        self._near = {
            page: stream
            for stream in self._streams
            for page in range(stream.next, stream.next + NEAR * stream.stride, stream.stride)
        }

    def surplus(self) -> Iterator[Ahead]:
        """End the streams that are more than STREAMS, those that were not used for longest; what
        these had asked for ahead is to be dropped."""
        while len(self._streams) > STREAMS:
            stream = self._streams.pop(0)
            self._watch()
            if stream.ahead:
                yield stream.ahead

    def overlapping(self, pages: range) -> Iterator[Ahead]:
        """These pages come otherwise: what was asked for ahead of them is to be dropped."""
        for stream in self._streams:
            ahead = stream.ahead
            if ahead and ahead.pages.start <= pages[-1] and pages.start <= ahead.pages[-1]:
                stream.ahead = None
                yield ahead

    def drop_all(self) -> Iterator[Ahead]:
        """End every stream, as `surplus`."""
        for stream in self._streams:
            if stream.ahead:
                yield stream.ahead
        self._streams.clear()
        self._near.clear()
