"""LSPT: the state of each page of this instance, in memory that the pager and LPET share.

In the picture: the table between the DM-Handler, which brings pages, LPET, which evicts them, and the
pager's mailbox thread, which frees, forgets and stores them. (At the end the pager's main thread stores
them.) Every page state is named here, and only the methods of LSPT change one:

              expect                arrived
 NEW, AWAY ─────────────► COMING ─────────────► HERE (with its generation)
     ▲                                            │
     │ gone                                 claim │
     └──────────────── LEAVING ◄──────────────────┘

    method                from                      to                by
    expect, expect_more   NEW, AWAY                 COMING            the DM-Handler
    arrived, page_arrived COMING                    HERE              the DM-Handler
    not_coming            COMING                    AWAY, LOST        the DM-Handler
    claim, claims         HERE; holes: NEW, AWAY    LEAVING           LPET; to forget: the mailbox thread
    claims: NO_HOLES      HERE                      LEAVING           to store: the pager
    claims: SETTLED       NEW, AWAY, HERE, LOST     LEAVING           to free: the mailbox thread
    gone                  LEAVING                   AWAY              who claimed it
    stays                 LEAVING                   the state before  who claimed it
    freed                 LEAVING                   NEW               the mailbox thread
    found_on_disk         NEW                       AWAY              the main thread, at the start

    NEW       never accessed, or freed: zeros
    AWAY      only the store has it, or it left without ever being written
              (with the generation in which it left)
    COMING    the DM-Handler is fetching and installing it
    HERE      in the memfd, the application's memory
    LEAVING   it belongs to the thread that has claimed it, to evict, store, mark or free it; or it is a hole
              between such pages. While it is stored, the application can still use it
    LOST      its bytes can't be read: touching it is a SIGBUS

Whether a page is clean is not stored here: the page table knows.

Generations: a new one begins when a quarter of high_threshold pages has come. The byte of a page that is HERE
includes the generation in which the page came, modulo GENERATIONS. A page that
faults again SOON after it has left gets a generation that is LONGER ahead of the current one (arrived).
So pages that are used all the time stay, while a program passes through other memory once.

Interface: the methods on the arrows. Two eventfds wake those who wait: `for_handler` the DM-Handler,
when there is room, another thread wants pages, or it has to stop; `for_lpet` LPET, when there are pages
to evict or it has to stop. `figures` are counters that any process may read.

Rules:
    * All methods but `arrived` and `page_arrived` change states under `lock`. RESIDENT, PEAK, FETCHED and
      ROOM_WANTED change only under `lock`, too. The other counters are only figures, and may miss an
      increment. The only system call under the lock is the write to an eventfd.
    * A COMING page belongs to the DM-Handler, a LEAVING page to the thread that claimed it. No other
      thread of EDM changes its state, or installs or removes its memory. So these two need no lock. A
      fault of a LEAVING page sleeps until the state is another one: `gone`, `stays` and `freed` wake it. Then
      it is tried again.
    * One claim takes neighbours, and may take holes between them: pages that are NEW or AWAY. They become
      LEAVING too, so that they can't come meanwhile. `gone` and `stays` give them back the state before.
    * `areas` belongs to the pager's process. LPET does not use it.
"""

import bisect
import mmap
import os
import re
import time
from collections import namedtuple
from collections.abc import Iterable, Iterator

from edm.pins import Pins
from edm.uffd_ctypes import MAP_NORESERVE, PAGE_SIZE, Userfaultfd, semaphore

# A page that is AWAY has the byte AWAY + generation % AWAYS; one that is HERE, HERE + generation %
# GENERATIONS.
NEW, AWAY, AWAYS, LOST, COMING, LEAVING, HERE, GENERATIONS = 0, 1, 64, 65, 66, 67, 128, 128

PART = 4096  # pages: their bytes are one page of memory, which the first access allocates
# Generations. With these values, zipf's accesses fetch one sixth fewer pages (simulated), and pandas'
# sort_values by a random key fetches a third as many. With a LONGER of 2 or less, there is no gain.
SOON, LONGER = 2, 8
# Seconds between two looks at a page that is COMING or LEAVING in another thread's hands: a part of an
# eviction, which takes 100 µs for one page and a millisecond for 256.
SETTLE = 100e-6
NEVER = (1 << 63) - 1  # nanoseconds of the clock: in the far future
SMALL = 1024  # pages: up to this high_threshold, LPET follows the wiki's algorithm to the letter

# Tables for `claim`, by state: 255: the page is claimed; 1: it may be a hole; 0: it stays as it is.
ANY_HERE = bytes(255 if byte >= HERE else byte < LOST for byte in range(256))
NO_HOLES = bytes(255 if byte >= HERE else 0 for byte in range(256))
SETTLED = bytes(0 if byte in (COMING, LEAVING) else 255 for byte in range(256))
# A page that is HERE, COMING or LEAVING is located here, 1; one that is AWAY or LOST on the disk, 2.
LOCATION = bytes(1 if byte >= COMING else 2 if byte > NEW else 0 for byte in range(256))
_IS_MISSING = bytes(byte < HERE and byte != LOST for byte in range(256))
_RUN = re.compile(rb"\xff(?:[\x01\xff]*\xff)?")  # claimed pages, and the holes between them
# For `expect_more`: pages that are NEW or AWAY, behind the first one, if that is COMING; and those that are AWAY.
MISSING_RUN = re.compile(rb"\A\x42[\0-\x40]*|[\0-\x40]+")
AWAY_RUN = re.compile(rb"[\1-\x40]+")
HERE_RUN, LOST_PAGE = re.compile(rb"[\x80-\xff]+"), re.compile(rb"\x41")
UNSETTLED, CHOSEN_RUN = re.compile(rb"[\x42\x43]+"), re.compile(rb"\xff+")

# How several pages are written, in all modules. Neighbours have numbers that follow each other.
#     range      Python's: pages at equal distances, in the order of need
#     Run        neighbours
#     Claimed    neighbours: what each was before a claim, which were to be claimed, and which are LEAVING now
#     Bytes      neighbours and their content (page_store.py)
#     bytes      a byte for each page, from some page on: its state; or 255 if the page is chosen, else 0
Run = tuple[int, int]  # first page, count

# page: the first of the neighbours. before: the state of each. chosen: 255 for each page that was to be
# claimed, less for holes and others. leaving: the runs of what is LEAVING now.
Claimed = namedtuple("Claimed", "page before chosen leaving")

# Counters in shared memory: those that are for Space.figures() (see pager.py), then the LSPT's own. ROOM_WANTED:
# when the DM-Handler began to wait for room (nanoseconds of the clock), NEVER if only advice wants some; or 0.
# STOPPED: when stop was called; or 0.
FIGURES = (
    "resident", "peak_resident", "fetched", "evicted_dirty", "evicted_clean", "refused", "bytes_sent",
)  # fmt: skip
RESIDENT, PEAK, FETCHED, EVICTED_DIRTY, EVICTED_CLEAN, REFUSED, SENT = range(7)
ROOM_WANTED, STOPPED = 7, 8


def runs(page: int, states: bytes, which: re.Pattern[bytes]) -> Iterator[Run]:
    """The runs of pages whose states match. page: the page of the first state."""
    for found in which.finditer(states):
        yield page + found.start(), found.end() - found.start()


class ByteTable:
    """A byte a page, in shared memory. A part that was never set costs one byte: ever_set() and read() skip
    it, because reading shared memory allocates it."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.state = mmap.mmap(-1, pages, mmap.MAP_SHARED | MAP_NORESERVE)
        self._ever_set = mmap.mmap(-1, -(-pages // PART))  # 1 for each part that was ever set

    def ever_set(self, page: int, count: int) -> Iterator[tuple[int, bytes]]:
        """(first page, bytes) of runs that have all of these pages that were ever set. A run has at most PART pages,
        not all of them 0, and is read when the iteration gets there."""
        part, end = page // PART, -(-(page + count) // PART)
        while (part := self._ever_set.find(b"\1", part, end)) >= 0:
            first, part = max(page, part * PART), part + 1
            states = self.state[first : min(page + count, part * PART)]
            if states != bytes(len(states)):
                yield first, states

    def read(self, page: int, count: int) -> bytes:
        """The bytes of count pages from page; fewer at the table's end."""
        states = bytearray(min(count, self.pages - page))
        for first, part in self.ever_set(page, len(states)):
            states[first - page : first - page + len(part)] = part
        return bytes(states)

    def set(self, pages: range, byte: int) -> None:
        """pages: ascending, at least one."""
        if len(pages) == 1:  # as with most faults
            self._ever_set[pages.start // PART] = 1
            self.state[pages.start] = byte
        else:
            self.write(pages, bytes((byte,)) * len(pages))

    def write(self, pages: range, content: bytes) -> None:
        """Set the bytes of these pages. pages: ascending, at least one."""
        for part in range(pages[0] // PART, pages[-1] // PART + 1):
            self._ever_set[part] = 1
        self.state[pages.start : pages.stop : pages.step] = content

    def change(self, pages: range, becomes: bytes) -> None:
        """Translate the bytes of neighbours, see bytes.translate."""
        self.write(pages, self.state[pages.start : pages.stop].translate(becomes))


class LSPT(ByteTable):
    def __init__(self, pages: int, high: int, low: int, plain: bool, uffd: int, start: int) -> None:
        """A table of this many pages, of which at most `high`, high_threshold, may be here. uffd: the application's
        userfaultfd. start: the address of page 0.

        With a high_threshold over SMALL, LPET is woken halfway between the thresholds, so that a fault
        rarely has to wait for room. Else it is woken when a fault finds no room. plain: the latter at any
        size, and the fault waits until LPET's run has ended.
        """
        super().__init__(pages)
        self.high, self.low, self.uffd, self.start = high, low, uffd, start
        self.lock = semaphore()
        # One instruction may need two pages: with four or more, pins leave two.
        self.pins = Pins(self.lock, max(1, (high - 2) // 2))
        self.figures = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self.for_handler, self.for_lpet = (os.eventfd(0, os.EFD_CLOEXEC) for _ in range(2))
        # The application's areas, sorted: the first page, the count of pages, and the name.
        self.areas: list[tuple[int, int, str]] = []
        self._plain, self.as_the_wiki_does = plain, plain or high <= SMALL
        self._wake_at = self.high + 1 if self.as_the_wiki_does else (self.high + self.low + 1) // 2
        self.quarter = max(1, high // 4)  # pages that come in a generation

    # ------------------------------------------------------------ the DM-Handler's transitions

    def expect(self, page: int) -> int | None:
        """NEW or AWAY → COMING; any other state stays. Returns the state before. None if there is no room for a
        page: see want_room."""
        with self.lock:
            state = self.state[page]
            if state < LOST:
                if (resident := self.figures[RESIDENT]) >= self.high:
                    self.want_room(time.monotonic_ns())
                    return None
                if state == NEW:  # else it was set when it came
                    self._ever_set[page // PART] = 1
                self.state[page] = COMING
                self._coming(1, resident)
            return state

    def want_room(self, since: int = NEVER) -> None:
        """Wake LPET. for_handler is written as soon as there is room for a page. since: when a fault began to wait
        for it (nanoseconds of the clock). The caller has the lock."""
        self.figures[ROOM_WANTED] = min(self.figures[ROOM_WANTED] or NEVER, since)
        os.eventfd_write(self.for_lpet, 1)

    def expect_more(self, wanted: range, which: re.Pattern[bytes] = MISSING_RUN) -> list[range]:
        """NEW or AWAY → COMING: those of these pages whose states match, in order, as far as there is room. Returns
        their runs. With MISSING_RUN the first page may be COMING, by `expect`: then it begins the first run."""
        with self.lock:
            first, last = sorted((wanted[0], wanted[-1]))
            states = self.state[first : last + 1][:: wanted.step]
            runs, coming = [], int(states[0] == COMING and which is MISSING_RUN)
            resident = self.figures[RESIDENT]
            room = self.high - resident + coming
            for found in which.finditer(states):
                if run := wanted[slice(*found.span())][:room]:
                    self.set(run if run.step > 0 else run[::-1], COMING)
                    runs.append(run)
                    room -= len(run)
            self._coming(sum(map(len, runs)) - coming, resident)
        return runs

    def _coming(self, pages: int, resident: int) -> None:
        """resident: how many were here and COMING before these."""
        figures = self.figures
        figures[FETCHED] += pages
        figures[RESIDENT] = resident = resident + pages
        if resident > figures[PEAK]:  # noqa: PLR1730 - max() takes 0.1 µs
            figures[PEAK] = resident
        if resident - pages < self._wake_at <= resident:
            os.eventfd_write(self.for_lpet, 1)

    def arrived(self, pages: range, before: int = NEW) -> None:
        """COMING → HERE: the pages are installed. before: the state of a page that has faulted alone, or in a
        stride. If it left within the last SOON generations, these pages get a generation LONGER ahead."""
        self.set(pages, self._here(before))

    def page_arrived(self, page: int, before: int) -> None:
        """As arrived, for one page, in two thirds of the time: expect has set its part."""
        self.state[page] = self._here(before)

    def _here(self, before: int) -> int:
        generation = self.generation()
        if AWAY <= before < LOST and (generation - (before - AWAY)) % AWAYS <= SOON:
            generation += LONGER
        return HERE + generation % GENERATIONS

    def not_coming(self, pages: range, state: int = AWAY) -> None:
        """COMING → AWAY: the pages have not come; the store has them as before. Or → LOST."""
        with self.lock:
            self.set(pages, state)
            self._room(len(pages), not self._plain)

    # ------------------------------------------------------------ LEAVING

    def generation(self) -> int:
        """The current generation."""
        return self.figures[FETCHED] // self.quarter

    def older_than(self, age: int) -> bytes:
        """A table for `claim`: the pages that came at least `age` generations ago are claimed. With -LONGER,
        all are."""
        table, now = bytearray(ANY_HERE), self.generation()
        for generation in range(now - age + 1, now + LONGER + 1):
            table[HERE + generation % GENERATIONS] = 0
        return bytes(table)

    def claim(self, page: int, count: int, which: bytes, passed: Iterable[Run] = ()) -> Claimed:
        """HERE → LEAVING, for those of count pages that the table `which` selects, and the holes between them.
        Not for pages that are passed. If the table has holes, pages are to leave: then not for pinned ones."""
        if leave := which[NEW] == 1:
            self.pins.drop_ended(page, count)
        with self.lock:
            states = self.state[page : page + count]
            chosen = states.translate(which)
            for first, many in [*passed, *self.pins.runs()] if leave else ():
                begin, end = (min(max(at - page, 0), len(chosen)) for at in (first, first + many))
                chosen = chosen[:begin] + bytes(end - begin) + chosen[end:]
            leaving = list(runs(page, chosen, _RUN))
            for first, many in leaving:
                self.state[first : first + many] = bytes((LEAVING,)) * many
        return Claimed(page, states, chosen, leaving)

    def claims(self, pages: list[Run], which: bytes, most: int, to_end: bool) -> Iterator[Claimed]:
        """claim of all these pages that were ever set, in parts of at most so many. Then the same with those that
        were COMING or LEAVING, until none is: other threads have a page for no longer than a batch takes. The
        caller ends each claim, by gone, stays or freed, before it asks for the next.

        It ends when stop is called. to_end: it goes on, but tries pages that other threads have only once more."""
        while pages:
            later: list[Run] = []
            stopped = self.stopped()
            for page, part in (each for run in pages for each in self.ever_set(*run)):
                for at in range(0, len(part), most):
                    if self.stopped() and not to_end:
                        return
                    claimed = self.claim(page + at, len(part[at : at + most]), which)
                    later += runs(page + at, claimed.before, UNSETTLED)
                    yield claimed
            pages = [] if stopped else later
            if pages:
                time.sleep(SETTLE)

    def gone(self, claimed: Claimed) -> None:
        """LEAVING → AWAY: the store has the pages' bytes, or they are zeros. Holes get the state before."""
        now = AWAY + self.generation() % AWAYS
        self._end(claimed, bytes(range(HERE)) + bytes((now,)) * (256 - HERE))

    def stays(self, claimed: Claimed) -> None:
        """LEAVING → the state before."""
        self._end(claimed, bytes(range(256)))

    def freed(self, claimed: Claimed) -> None:
        """LEAVING → NEW."""
        self._end(claimed, bytes(256))

    def _end(self, claimed: Claimed, becomes: bytes) -> None:
        """LEAVING → the state before, translated by this table. The faults that wait for it are tried again."""
        with self.lock:
            for first, many in claimed.leaving:
                before = claimed.before[first - claimed.page :][:many]
                self.state[first : first + many] = before.translate(becomes)
                if becomes[HERE] < HERE:
                    self._room(before.translate(NO_HOLES).count(255), not self._plain)
        if claimed.leaving:
            page, end = claimed.leaving[0][0], sum(claimed.leaving[-1])
            Userfaultfd(self.uffd).wake(self.start + page * PAGE_SIZE, (end - page) * PAGE_SIZE)

    def _room(self, pages: int, tell: bool) -> None:
        """So many pages fewer are here. tell: wake the DM-Handler, if it wants room and there is some."""
        self.figures[RESIDENT] -= pages
        if tell and self.figures[ROOM_WANTED] and self.figures[RESIDENT] < self.high:
            self.figures[ROOM_WANTED] = 0
            os.eventfd_write(self.for_handler, 1)

    def found_on_disk(self, page: int, count: int) -> None:
        """NEW → AWAY, at the start: the store has these pages from an earlier job, long ago."""
        with self.lock:
            self.set(range(page, page + count), AWAY + AWAYS // 2)

    # ------------------------------------------------------------ looking

    def occupied(self, start: int = 0) -> Iterator[Run]:
        """The runs of ever_set, of all pages, from this one on and then round to it. Without those that have no page
        that is HERE."""
        for run in ((start, self.pages - start), (0, start)):
            for first, states in self.ever_set(*run):
                if not states.isascii():  # HERE is 128 and more
                    yield first, len(states)

    def runs_here(self, start: int = 0) -> Iterator[Run]:
        """The runs of pages that are HERE, in the order of occupied. Each part is read when the iteration gets
        there."""
        for first, count in self.occupied(start):
            yield from runs(first, self.state[first : first + count], HERE_RUN)

    def is_missing(self, pages: range) -> bool:
        """Whether any of these pages is NEW, AWAY, COMING or LEAVING. pages: may have a step; downward, their
        stop is a page, too."""
        return 1 in self.state[pages.start : pages.stop : pages.step].translate(_IS_MISSING)

    def area(self, page: int) -> range:
        """The pages of the application's area that has this page; only this page if there is none."""
        index = bisect.bisect_right(self.areas, (page + 1,)) - 1
        for first, count, _ in self.areas[index : index + 1]:  # another thread may change the list
            if first <= page < first + count:
                return range(first, first + count)
        return range(page, page + 1)

    # ------------------------------------------------------------ waiting

    def wait_to_evict(self) -> int:
        """For LPET, which has evicted what it could: sleep until there is something to evict. Returns how many pages
        are to leave; 0 once stop was called."""
        while not self.stopped():
            with self.lock:
                self._room(0, True)
                if self.figures[RESIDENT] >= self._wake_at or self.figures[ROOM_WANTED]:
                    return self.figures[RESIDENT] - self.low
            # It returns at once if there was a wake-up since the last read.
            os.read(self.for_lpet, 8)  # unlike os.eventfd_read, this goes on after a signal
        return 0

    def stopped(self) -> bool:
        return bool(self.figures[STOPPED])

    def stop(self) -> None:
        """Make the DM-Handler and LPET stop waiting, for good."""
        self.figures[STOPPED] = time.monotonic_ns()
        os.eventfd_write(self.for_handler, 1)
        os.eventfd_write(self.for_lpet, 1)
