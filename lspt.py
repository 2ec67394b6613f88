"""LSPT: the pages of this instance, a byte each, in memory that the pager and LPET share.

In the picture: the table between the DM-Handler (which makes pages come), LPET (which lets them
leave) and the pager's main thread (which frees them). Every page state is named here, and the
methods of LSPT are the only code that changes one:

             expect                     arrived
 NEW, AWAY ──────────────────► COMING ─────────────► HERE (with its generation)
     ▲                           │ not_coming: as before         │
     │ gone: the store has its   │ lost: LOST                    │ leaving
     │ bytes, or needs none      ▼                               ▼
     └───────────────────────────────────────────────── LEAVING ◄┘
                                                        └── stays ────► HERE
 freeing: any state but COMING and LEAVING → LEAVING;  freed: LEAVING → NEW

    NEW       never accessed: zeros
    AWAY      it was here; the store knows what it is
    COMING    the DM-Handler is installing it
    HERE      in the application's memory
    LEAVING   LPET, a sync or a free has it in its hands
    AWAITED   LEAVING, and a fault waits for that to end
    LOST      its bytes can't be had: touching it is a SIGBUS

Whether a page is clean is not stored: the page table knows.

Generations: one begins with each quarter of high_threshold that has come. HERE has the one in which
the page came, AWAY the one in which it left. Both count modulo GENERATIONS.

Interface: the methods named on the arrows. For waiting, two eventfds: `for_handler` tells the
DM-Handler that there is room, or that it is to stop; `for_lpet` tells LPET that there are pages to
evict, or that it is to stop. `figures` are counters that any process may read.

Rules:
    * `lock` protects every change of a state or counter. The methods take it; those whose
      docstring says "Locked" want the caller to hold it. No system call is made under it, but the writing of an eventfd.
    * COMING belongs to the DM-Handler, LEAVING to whoever made it so: nobody else touches the
      memory or the state of such a page, but for the DM-Handler, which makes LEAVING AWAITED. Who
      ends LEAVING wakes the faults of the pages that were AWAITED (the methods return which).
    * A LEAVING range may have holes: pages that are not here, and that nobody may bring meanwhile.
    * `areas` belongs to the pager's process; LPET does not need it.

Cost: one byte a page of the space, as zeros that the kernel has not given yet. `_used` has a byte a
PART of pages that is 1 once one of them came, so that nobody reads, and so makes, the other parts.
"""

from __future__ import annotations

import bisect
import mmap
import os
import re
from collections.abc import Iterator

from edm.uffd_ctypes import semaphore

NEW, LOST, COMING, LEAVING, AWAITED = range(5)
GENERATIONS = 64
AWAY = 64  # and its generation
HERE = 128  # and its generation

PART = 4096  # pages
QUARTERS = 4  # generations in one turnover of high_threshold pages
SMALL = 1024  # with no higher high_threshold, LPET follows the wiki's algorithm to the letter
# A page that comes back within so many generations after it left counts as if it had come so much
# later. The figures are the design's proposal; others were not tried.
SOON, LONGER = 2 * QUARTERS, QUARTERS

# Tables for `leaving`: 2 for a state that is to leave, 1 for a hole, 0 for what stays as it is.
ANY_HERE = bytes(
    2 if byte >= HERE else 1 if byte == NEW or byte & AWAY else 0 for byte in range(256)
)
NO_HOLES = bytes(2 if byte >= HERE else 0 for byte in range(256))
_ONLY_AWAY = bytes(AWAY <= byte < HERE for byte in range(256))
_RUN = re.compile(rb"\x02(?:[\x01\x02]*\x02)?")  # of what is to leave, with holes
_FETCHABLE = re.compile(rb"\x00+|[\x40-\x7f]+")
_HERE_RUN = re.compile(rb"[\x80-\xff]+")
_FREE_RUN = re.compile(rb"[^\x02\x03\x04]+")
_UNSETTLED = re.compile(rb"[\x02\x03\x04]")
_LEAVING_BYTE, _AWAITED_BYTE = bytes((LEAVING,)), bytes((AWAITED,))

Run = tuple[int, int]  # (first page, count of pages)
Left = tuple[int, bytes]  # the first page of a LEAVING range, and the states before

# Counters in shared memory: the LSPT's own, and LPET's figures.
(
    RESIDENT, PEAK, CAME, GENERATION, ROOM_WANTED, LPET_AWAKE, STOPPED,
    EVICTED_DIRTY, EVICTED_CLEAN, MARKED_IDLE, LPET_RUNS, REFUSED, STORED_BYTES,
) = range(13)  # fmt: skip


def runs_of(pages: list[int]) -> list[Run]:
    """The ascending page numbers as runs of neighbours."""
    runs: list[Run] = []
    for page in pages:
        if runs and sum(runs[-1]) == page:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((page, 1))
    return runs


def here_runs(left: Left) -> Iterator[Run]:
    """The runs of pages of a LEAVING range that were HERE."""
    first, before = left
    for run in _HERE_RUN.finditer(before):
        yield first + run.start(), run.end() - run.start()


class LSPT:
    def __init__(self, pages: int, high_threshold: int, low_threshold: int) -> None:
        """A table for a space of so many pages, of which at most high_threshold may be here.

        With more than SMALL LPET is woken halfway between the thresholds, so that a fault hardly ever
        finds no room; else when a fault finds none.
        """
        self.pages, self.high, self.low = pages, high_threshold, low_threshold
        self.lock = semaphore()
        self.state = mmap.mmap(-1, pages)
        self._used = mmap.mmap(-1, -(-pages // PART))
        self.figures = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self.for_handler = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.for_lpet = os.eventfd(0, os.EFD_CLOEXEC)
        self.areas: list[Run] = []  # of the application, sorted
        self._wake_at = high_threshold + 1
        if high_threshold > SMALL:
            self._wake_at = (high_threshold + low_threshold) // 2
        self._quarter = max(1, high_threshold // QUARTERS)

    def close(self) -> None:
        os.close(self.for_handler)
        os.close(self.for_lpet)

    # ------------------------------------------------------------ the DM-Handler's transitions

    def expect(self, wanted: range) -> tuple[int, range]:
        """NEW or AWAY → COMING, for the first page of `wanted` and those after it that are alike.

        Returns the state that the first page had, and which pages are COMING now, ascending: none
        if the state is another one (LEAVING has become AWAITED) or if there is no room for a page,
        in which case LPET is to be woken and for_handler tells when to ask again.
        """
        page = wanted.start
        with self.lock:
            state = self.state[page]
            if state >= AWAY or state == NEW:
                if state >= HERE:
                    return state, range(0)
                room = self.high - self.figures[RESIDENT]
                if room <= 0:
                    self.figures[ROOM_WANTED] = 1
                    return state, range(0)
                pages = range(page, page + 1) if len(wanted) == 1 else self.alike(wanted[:room])
                self._set(pages, COMING)
                self._used[pages.start // PART] = self._used[pages[-1] // PART] = 1
                self.figures[RESIDENT] = resident = self.figures[RESIDENT] + len(pages)
                self.figures[PEAK] = max(self.figures[PEAK], resident)
                return state, pages
            if state == LEAVING:
                self.state[page] = AWAITED
            return state, range(0)

    def alike(self, wanted: range) -> range:
        """Locked, or as a guess. As many of these pages, from the first on, as are all NEW or all AWAY; ascending."""
        if wanted.step > 0:
            states = self.state[wanted.start : wanted.stop : wanted.step]
            return wanted[: _FETCHABLE.match(states).end()]
        pages = wanted[::-1]
        states = self.state[pages.start : pages.stop][::-1]
        return pages[len(pages) - _FETCHABLE.match(states).end() :]

    def arrived(self, pages: range, came_from: int) -> bool:
        """COMING → HERE: they are installed. Is LPET to be woken?

        came_from: the state that a single page had before, or NEW: see SOON.
        """
        with self.lock:
            figures = self.figures
            generation = figures[GENERATION]
            if came_from and generation - came_from & GENERATIONS - 1 <= SOON:
                self._set(pages, HERE | generation + LONGER & GENERATIONS - 1)
            else:
                self._set(pages, HERE | generation & GENERATIONS - 1)
            figures[CAME] = came = figures[CAME] + len(pages)
            if came >= self._quarter:
                figures[CAME] = came - self._quarter
                figures[GENERATION] = generation + 1
            if figures[RESIDENT] >= self._wake_at and not figures[LPET_AWAKE]:
                figures[LPET_AWAKE] = 1
                return True
            return False

    def not_coming(self, pages: range, state: int) -> None:
        """COMING → NEW or AWAY: they could not be had now."""
        with self.lock:
            self._leave(pages, state, len(pages))

    def lost(self, page: int) -> None:
        """COMING → LOST."""
        with self.lock:
            self._leave(range(page, page + 1), LOST, 1)

    def _set(self, pages: range, state: int) -> None:
        if len(pages) == 1:
            self.state[pages.start] = state
        elif pages:
            self.state[pages.start : pages.stop : pages.step] = bytes((state,)) * len(pages)

    def _leave(self, pages: range, state: int, resident: int) -> None:
        self._set(pages, state)
        self._room(resident)

    # ------------------------------------------------------------ LEAVING

    def older_than(self, age: int) -> bytes:
        """A table for `leaving`: pages that are HERE for at least so many generations may leave.

        Those that count as if they came later have generations ahead of today's.
        """
        if age <= 0:
            return ANY_HERE
        table = bytearray(ANY_HERE)
        for generation in range(GENERATIONS):
            since = self.figures[GENERATION] - generation & GENERATIONS - 1
            if not age <= since < GENERATIONS - 2 * SOON:
                table[HERE + generation] = 0
        return bytes(table)

    def leaving(self, page: int, count: int, which: bytes = ANY_HERE) -> list[Left]:
        """HERE → LEAVING, for the pages of a range that the table `which` says (see older_than).

        Neighbours, holes between them included, are one entry of what is returned.
        """
        with self.lock:
            states = self.state[page : page + count]
            found = []
            for run in _RUN.finditer(states.translate(which)):
                at, end = run.span()
                self.state[page + at : page + end] = _LEAVING_BYTE * (end - at)
                found.append((page + at, states[at:end]))
            return found

    def gone(self, left: list[Left]) -> list[int]:
        """LEAVING → AWAY: the store has their bytes, or needs none. Returns the AWAITED pages."""
        away = AWAY | self.figures[GENERATION] & GENERATIONS - 1
        table = bytes(range(HERE)) + bytes((away,)) * (256 - HERE)
        with self.lock:
            awaited = self._end([(first, before.translate(table)) for first, before in left])
            self._room(sum(count for each in left for _, count in here_runs(each)))
            return awaited

    def stays(self, left: list[Left], generation: int | None = None) -> list[int]:
        """LEAVING → HERE, as they were before; returns the AWAITED pages.

        generation: pages that were used of late count as if they had come in that one.
        """
        if generation is not None:
            here = bytes((HERE | generation & GENERATIONS - 1,))
            table = bytes(range(HERE)) + here * (256 - HERE)
            left = [(first, before.translate(table)) for first, before in left]
        with self.lock:
            return self._end(left)

    def _end(self, left: list[Left]) -> list[int]:
        """Set these states, where LEAVING was; which pages were AWAITED?"""
        awaited = []
        for first, after in left:
            now = self.state[first : first + len(after)]
            if _AWAITED_BYTE in now:
                awaited += [first + at for at, state in enumerate(now) if state == AWAITED]
            self.state[first : first + len(after)] = after
        return awaited

    def _room(self, pages: int) -> None:
        self.figures[RESIDENT] -= pages
        if pages and self.figures[ROOM_WANTED]:
            self.figures[ROOM_WANTED] = 0
            os.eventfd_write(self.for_handler, 1)

    # ------------------------------------------------------------ freeing

    def freeing(self, page: int, count: int) -> tuple[list[Left], list[Run]]:
        """Any state → LEAVING, but COMING and LEAVING: these are returned as the second list.

        The caller comes back for those: nobody has them for longer than a batch.
        """
        taken: list[Left] = []
        later: list[Run] = []
        for first, length in self.used(page, count):
            with self.lock:
                states = self.state[first : first + length]
                for run in _FREE_RUN.finditer(states):
                    at, end = run.span()
                    self.state[first + at : first + end] = _LEAVING_BYTE * (end - at)
                    taken.append((first + at, states[at:end]))
            later += runs_of([first + at.start() for at in _UNSETTLED.finditer(states)])
        return taken, later

    def freed(self, left: list[Left]) -> list[int]:
        """LEAVING → NEW. Returns the AWAITED pages."""
        with self.lock:
            awaited = self._end([(first, bytes(len(before))) for first, before in left])
            self._room(sum(count for each in left for _, count in here_runs(each)))
            return awaited

    def on_disk(self, page: int, count: int) -> None:
        """NEW → AWAY, at the start: the store has these pages of an earlier job."""
        with self.lock:
            self._set(range(page, page + count), AWAY | 2 * SOON)  # not of late
            first, last = page // PART, (page + count - 1) // PART
            self._used[first : last + 1] = b"\1" * (last + 1 - first)

    # ------------------------------------------------------------ looking

    def used(self, page: int, count: int) -> Iterator[Run]:
        """The parts of a range that pages may be in, each within a PART; the others are all NEW."""
        part, end = page // PART, page + count
        while (part := self._used.find(b"\1", part, -(-end // PART))) >= 0:
            first = max(page, part * PART)
            yield first, min(end, (part + 1) * PART) - first
            part += 1

    def here(self) -> Iterator[Run]:
        """Runs of pages that are HERE, by address; each part as it is when it is asked for."""
        for first, count in self.used(0, self.pages):
            yield from here_runs((first, self.state[first : first + count]))

    def unsettled(self, page: int, count: int) -> bool:
        """Is any of these pages COMING or LEAVING?"""
        return bool(_UNSETTLED.search(self.state[page : page + count]))

    def area(self, page: int) -> range:
        """The area of the application that has this page; without one, an empty range."""
        index = bisect.bisect_right(self.areas, (page, self.pages)) - 1
        first, count = self.areas[index] if index >= 0 else (0, 0)
        return range(first, first + count) if page < first + count else range(0)

    def away(self) -> int:
        """How many pages only the store has; a while ago, some of them."""
        return sum(
            self.state[first : first + count].translate(_ONLY_AWAY).count(1)
            for first, count in self.used(0, self.pages)
        )

    # ------------------------------------------------------------ waiting

    def wake_lpet(self) -> None:
        os.eventfd_write(self.for_lpet, 1)

    def room_wanted(self) -> bool:
        """Does the DM-Handler wait for room?"""
        return bool(self.figures[ROOM_WANTED])

    def lpet_waits(self) -> bool:
        """LPET's: sleep until there is something to evict. False once stop was called."""
        while not self.stopped():
            with self.lock:
                full = self.figures[RESIDENT] >= self._wake_at
                self.figures[LPET_AWAKE] = awake = full or self.figures[ROOM_WANTED]
            if awake:
                return True
            os.eventfd_read(self.for_lpet)  # or what is left of a call that was seen already
        return False

    def stopped(self) -> bool:
        return bool(self.figures[STOPPED])

    def stop(self) -> None:
        """End the DM-Handler's and LPET's waiting for good."""
        self.figures[STOPPED] = 1
        os.eventfd_write(self.for_handler, 1)
        os.eventfd_write(self.for_lpet, 1)
