"""Readahead: which faults belong to a sequential stream, and how many pages to fetch then.

In the picture: a part of the DM-Handler, which does what this decides.

Interface: Readahead.stream(place) returns the Stream that a fault at this place continues or begins, if any. The
DM-Handler fetches the pages that the stream wants and that are not here. A place is a number of bytes from the
start of the space.

A stream begins with the second of two faults in neighbouring pages, upward, or with the third of three: in
neighbouring pages downward, or at equal distances (its stride) upward. Its window is small at first, because no
more faults may follow, and doubles each time that one was used up, to at most max_window.

Strides are in bytes. The rows of a matrix are rarely whole pages: along a column, a fault is 3 pages behind the
one before a few times, and then 2. But the kernel reports the exact addresses of faults
(UFFD_FEATURE_EXACT_ADDRESS), and these are equally far from each other.

A window that nobody needs pushes out pages that are needed. Two faults may be neighbours by chance, as where two
columns start. So a stream of neighbours is forgotten when a page faults near it and a missing page was passed
over: one behind its last window, or the one before the fault, if that is in the window. Not all pages of a window
have to come: then a fault in it continues the stream. A stride is continued by exact places only.

A row of a few neighbouring pages, as random access to a table has them, would fault twice. So where streams begin
again and again and do not go on, a single fault gets a stream of its own, which brings the rest of the row and is
not followed: the fault may as well be one of equal distances. About every PROBE-th single fault still comes alone,
to see if the rows go on.

After each REMEMBERED single faults, the stream that was used least recently is forgotten. So random
access ends up with none to look at. A stream that was forgotten begins again as a new one does.

Rules: the DM-Handler's thread only.

The idea is the kernel's (mm/readahead.c).
"""

from bisect import bisect_left
from collections.abc import Callable

from edm.uffd_ctypes import PAGE_SIZE

# Followed at once: several of each thread. With 8, 16 threads with arrays of their own took three times as long.
STREAMS = 32
REMEMBERED = 32  # single faults that may yet turn out to begin a stream
FIRST_WINDOW = 4  # pages, mm/readahead.c's
ROWS, PROBE = 224, 8
NO_PLACE = 1 << 63  # beyond all
# Bytes: the longest stride. A column shares its pages with those beside it, and may fault in every 64th row only.
MAX_STRIDE = 1024 * PAGE_SIZE
# A fault at most so many strides after a window continues its stream. Few, because each random fault that hits
# an old stream brings a window.
NEAR = 16


class Stream:
    def __init__(self, place: int, window: int, stride: int) -> None:
        """A fault at this place brings so many pages. Only a fault in these continues the stream, which is a new Stream
        then, or one behind them or near: pages that are here do not fault."""
        self.stride = stride  # bytes from one fault to the next; -PAGE_SIZE: downward
        # What counts of a fault's place: of a stream of neighbours, where its page begins.
        self.mask = -PAGE_SIZE if abs(stride) == PAGE_SIZE else -1
        self.place, self.window = place & self.mask, window
        self.reach = range(self.place + stride, self.place + (window + NEAR) * stride, stride)

    def wanted(self, area: range) -> list[range]:
        """The pages of this area to fetch now, in the order of need: first the one that has faulted. They are
        in runs of equal distances, as the store and the LSPT want them."""
        page, step = self.place // PAGE_SIZE, self.stride // PAGE_SIZE
        if self.stride % PAGE_SIZE == 0:
            return [area[page - area.start :: step][: self.window]]
        stop = min(self.place + self.window * self.stride, area.stop * PAGE_SIZE)
        runs = [range(page, page + 1)]
        for place in range(self.place + self.stride, stop, self.stride):
            page, run = place // PAGE_SIZE, runs[-1]
            if len(run) == 1 or page == run[-1] + run.step:
                runs[-1] = range(run[0], page + 1, page - run[-1])
            else:
                runs.append(range(page, page + 1))
        return runs


class Readahead:
    def __init__(self, max_window: int, is_missing: Callable[[range], bool]) -> None:
        """max_window: pages at most in one window; less than 2 turns readahead off. is_missing: LSPT's."""
        self.max_window, self._is_missing = max_window, is_missing
        self._first_window = min(FIRST_WINDOW, max_window)
        self._streams: list[Stream] = []  # the one used last is the first
        self._recent = [NO_PLACE]  # places of single faults, sorted
        # A stream that begins adds PROBE, a window that was used up takes PROBE, and a single fault takes 1. If it leaves
        # ROWS or more, the row comes at once.
        self._rows = 0

    def stream(self, place: int) -> Stream | None:
        """The stream that a fault at this place continues or begins, or one for the rest of a row. If there is
        none, the page comes alone."""
        for stream in self._streams:
            if (at := place & stream.mask) in stream.reach:
                self._streams.remove(stream)
                begin, step = stream.place // PAGE_SIZE, stream.stride // PAGE_SIZE
                pages = range(begin, at // PAGE_SIZE, step)
                # Those that a stream of neighbours would have reached before. A column may well pass over pages.
                pages = pages[stream.window :] or pages[-1:]
                if stream.mask == -PAGE_SIZE and self._is_missing(pages):
                    break
                stream = Stream(at, min(2 * stream.window, self.max_window), stream.stride)
                self._streams.insert(0, stream)
                self._rows = max(self._rows - PROBE, 0)
                return stream
        return self._begin(place) if self.max_window > 1 else None

    def _begin(self, place: int) -> Stream | None:
        recent, page, window = self._recent, place // PAGE_SIZE, self._first_window
        at = bisect_left(recent, place)
        # In random access, most faults are far from the others.
        if place - recent[at - 1] <= MAX_STRIDE or recent[at] - place < 2 * PAGE_SIZE:
            for before in recent[bisect_left(recent, place - MAX_STRIDE) : at + 1]:
                pages, stride = page - before // PAGE_SIZE, place - before
                if pages == 1 or pages == -1 and any(at // PAGE_SIZE == page + 2 for at in recent):
                    stride = pages * PAGE_SIZE
                elif pages < 2 or before - stride not in recent:
                    continue
                recent.remove(before)
                self._rows = min(self._rows + PROBE * (stride == PAGE_SIZE), ROWS + PROBE)
                self._streams = [Stream(place, window, stride), *self._streams[: STREAMS - 1]]
                return self._streams[0]
        if self._rows:
            self._rows -= 1
        if len(recent) > REMEMBERED:
            del recent[:-1], self._streams[-1:]
            at = 0
        recent.insert(at, place)
        return Stream(place, window, PAGE_SIZE) if self._rows >= ROWS else None
