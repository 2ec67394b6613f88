"""Readahead: which faults belong to a sequential stream, and how many pages to ask for then.

In the picture: a part of the DM-Handler, which does what this decides.

Interface: Readahead.fault(page) is told every fault of a page that is neither here nor asked for,
and gives the Stream that it continues, if any. The DM-Handler fetches stream.window pages, asks for
the next window ahead of need (stream.ahead), and tells what came of it: used, ended.

A stream begins with the second of two faults in neighbouring pages, upward or downward, or with the
third of three at equal distances (its stride, at most MAX_STRIDE, upward). Its window is small at
first, and doubles each time that one was used up, to at most max_window. A window that nobody used
makes the next streams begin with less. Random access only ever pays for one look into a small table.

Rules: the DM-Handler's thread only. Pages, not bytes.

The idea is the kernel's (mm/readahead.c); what differs is that a page which was asked for ahead is
installed only when its window's first page faults, because nothing else would tell that the
application has come so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edm.messages import MAX_STRIDE

if TYPE_CHECKING:
    from edm.mpi_client import MpiClient

STREAMS = 4  # followed at once
REMEMBERED = 16  # single faults that may yet turn out to begin a stream
FIRST_WINDOW = 8
STRIDED_WINDOW = 64  # at most: the pages of one are read and installed one by one


@dataclass(eq=False)  # two with equal fields are still two
class Ahead:
    """A window that was asked for ahead of need: its pages are COMING."""

    pages: range  # ascending
    client: MpiClient  # which has the request under way, or its answer


@dataclass(eq=False)  # two with equal fields are still two
class Stream:
    next: int  # the page whose fault would continue it
    window: int  # pages to fetch then
    stride: int = 1  # between them; -1: downward
    ahead: Ahead | None = None

    def wanted(self, page: int) -> range:
        """The pages to fetch when this one faults, in the order in which they will be needed."""
        return range(page, page + self.window * self.stride, self.stride)


class Readahead:
    def __init__(self, max_window: int) -> None:
        """max_window: pages at most in one window; less than 2 turns readahead off."""
        self.max_window = max_window
        self._first_window = min(FIRST_WINDOW, max_window)
        self._streams: list[Stream] = []  # the one used last is the last
        self._recent: dict[int, None] = {}  # pages of single faults, in order

    def fault(self, page: int) -> Stream | None:
        """The stream that a fault of this page continues or begins."""
        if self.max_window < 2:
            return None
        for stream in self._streams:
            # Pages that were here already do not end a stream. One that has asked ahead goes on
            # with a fault of what it has asked for, and not with this one.
            if not stream.ahead and page in stream.wanted(stream.next):
                return stream
        for before in self._recent:
            stride = page - before
            if stride in (1, -1) or 1 < stride <= MAX_STRIDE and before - stride in self._recent:
                del self._recent[before]
                stream = Stream(page, self._first_window, stride)
                self._streams.append(stream)
                return stream
        self._recent[page] = None
        if len(self._recent) > REMEMBERED:
            del self._recent[next(iter(self._recent))]
        return None

    def coming(self, page: int) -> Stream | None:
        """The stream that has asked for this page ahead."""
        return next((s for s in self.asked() if page in s.ahead.pages), None)

    def used(self, stream: Stream, pages: range) -> None:
        """The stream has been continued with these pages, ascending."""
        stream.next = pages.stop if stream.stride > 0 else pages.start - 1
        most = self.max_window if stream.stride in (1, -1) else min(self.max_window, STRIDED_WINDOW)
        stream.window = min(2 * stream.window, most)
        self._streams.remove(stream)
        self._streams.append(stream)
        self._first_window = min(2 * self._first_window, FIRST_WINDOW, self.max_window)

    def surplus(self) -> list[Stream]:
        """The streams that are to be ended, as there are more than STREAMS: the longest unused."""
        return self._streams[:-STREAMS]

    def asked(self) -> list[Stream]:
        """The streams that have asked ahead."""
        return [stream for stream in self._streams if stream.ahead]

    def within(self, page: int, count: int) -> list[Stream]:
        """The streams that have asked ahead for any of these pages."""
        return [
            stream for stream in self.asked()
            if stream.ahead.pages.start < page + count and page < stream.ahead.pages.stop
        ]  # fmt: skip

    def ended(self, stream: Stream) -> None:
        """Forget a stream; what it has asked for ahead was for nothing."""
        self._streams.remove(stream)
        if stream.ahead:
            self._first_window = max(2, self._first_window // 2)
