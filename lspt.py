"""LSPT: the pages of this instance, in the order in which they came, and the state of each.

In the picture: the table between the DM-Handler (which adds pages), LPET (which takes them away)
and the main thread (which frees them at munmap). Every page state is named here, and the methods
of LSPT are the only code that changes one.

                           expect            arrived
        NEW or AWAY  ──────────────►  COMING  ─────►  CLEAN or DIRTY
              ▲                                          │ CLEAN ──written──► DIRTY
              │ left                                     │
              └──────────────  HELD  ◄────── hold ───────┤   (LPET: to evict it, to store it, or to
                                │                        │    mark it idle)
                                └───── released ────────►┤   (marked)
                                └───── refused ─────────►┤   (the DMS has not taken it)
                                └───── stored ──────────►┘   (CLEAN now: the DMS has its bytes)

    munmap takes pages the same way, and makes them NEW: hold_all, then freed; or refused. A page
    whose bytes the DMS can't give back is LOST until then.

Interface: the methods named on the arrows, and for waiting: ask_for_room, ask_to_store,
wait_for_work; LPET reads the order with next_candidates and turns it with passed; the DM-Handler
asks fetchable how far it may read ahead.

Rules:
    * `lock` protects everything here. Methods whose docstring says "Locked" want the caller to
      hold it; the others take it themselves. The state of a page may be read without it where a
      stale answer does no harm.
    * The DM-Handler holds `installing` from before a page is installed until it has arrived:
      installing wakes the application, which may write the page and call for a sync meanwhile.
      Who wants both takes `installing` first.
    * COMING belongs to the DM-Handler and HELD to whoever held it: nobody else touches such a
      page's memory or state. A fault of a HELD page is put into `awaited`; who holds the page
      wakes those that wait when it lets go.
    * CLEAN says: write-protected since it was installed, so the DMS's copy is as good (or there
      never was anything but zeros). It becomes DIRTY by the one call that lifts the protection,
      made under the lock; so a page that is held while CLEAN stays unwritten.

Cost: one byte a page of address space (lazily, as zeros that the kernel has not given yet), and
4 bytes an entry of the order. A page that leaves otherwise than by its entry's turn (munmap) leaves
a stale entry behind, which is skipped; when those are many, LPET's thread writes the order anew.
Nothing looks through all pages while it holds the lock or the GIL.
"""

from __future__ import annotations

import bisect
import itertools
import mmap
import re
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future

NEW = 0  # never accessed: the DMS knows no more of it than that it is zeros
AWAY = 1  # it was here, or may have been: the DMS has to be asked
LOST = 2  # touching it is a SIGBUS
COMING = 3  # asked for, not yet installed
CLEAN = 4  # here, write-protected
DIRTY = 5  # here, writable
HELD_CLEAN = 6  # as CLEAN, but LPET or munmap has it in its hands: faults wait
HELD_DIRTY = 7  # as DIRTY, likewise

PART = 1 << 16  # pages whose states are looked at together: no other thread runs meanwhile
MAX_PAGES = 1 << 31  # of a space: the order's entries have four bytes, one bit of it the mark
WRITTEN_BEFORE, WRITTEN_AT_ONCE = 3, 64  # pages, see LSPT.written
SMALL = 1024  # with a lower high_threshold, LPET is woken when that is reached, not before

_CLEAN_BYTE, _DIRTY_BYTE = bytes((CLEAN,)), bytes((DIRTY,))
_CLEAN_OR_DIRTY_RUN = re.compile(b"%c+|%c+" % (CLEAN, DIRTY))
_CLEAN_RUN = re.compile(b"%c+" % CLEAN)
_DIRTY_RUN = re.compile(b"[%c%c]+" % (DIRTY, HELD_DIRTY))
_FETCHABLE = re.compile(b"%c+|%c*" % (AWAY, NEW))
_UNSETTLED = re.compile(b"[%c%c%c]" % (COMING, HELD_CLEAN, HELD_DIRTY))
_RELEASE = bytes((NEW, AWAY, LOST, COMING, CLEAN, DIRTY, CLEAN, DIRTY)) + bytes(248)
_STORED = bytes((NEW, AWAY, LOST, COMING, CLEAN, DIRTY, CLEAN, CLEAN)) + bytes(248)

Run = tuple[int, int]  # (first page, count of pages)
HeldRun = tuple[int, int, bool]  # (first page, count of pages, whether they were DIRTY)


def runs_of(pages: Iterable[int]) -> list[Run]:
    """The ascending page numbers as runs of neighbours."""
    runs: list[Run] = []
    first = last = -2
    for page in pages:
        if page == last + 1:
            last = page
            continue
        if last >= 0:
            runs.append((first, last + 1 - first))
        first = last = page
    if last >= 0:
        runs.append((first, last + 1 - first))
    return runs


class Stopped(Exception):
    """There will be no more room: the instance is coming to its end."""


class LSPT:
    def __init__(self, pages: int, high_threshold: int, low_threshold: int = 0) -> None:
        """A table for a space of so many pages, of which at most high_threshold may be here.

        If that is many, LPET is woken halfway between the thresholds already, so that a fault
        hardly ever finds no room.
        """
        self.lock = threading.Lock()
        self.installing = threading.Lock()
        self.state = mmap.mmap(-1, pages)  # one byte a page: the states above
        self.resident = 0  # how many pages are COMING, CLEAN, DIRTY or HELD
        self.peak = 0  # the most that resident ever was
        self.awaited: set[int] = set()  # HELD pages on which a fault has come
        self.unwanted: Run = (0, 0)  # the pages that munmap waits for
        self.waiting_since: float | None = None  # a fault, for room: seconds of the clock
        self._high = high_threshold
        self._wake_at = high_threshold
        if high_threshold >= SMALL:
            self._wake_at = (high_threshold + low_threshold) // 2
        # 2 * page, and 1 more if LPET has marked it; the entries before _hand are done with.
        self._order = array("I")
        self._hand = 0
        self._areas: list[Run] = []  # of the application, sorted
        self._taken: int | None = None  # while LPET has candidates: where it has read up to
        self._room = threading.Condition(self.lock)
        self._work = threading.Condition(self.lock)
        self._settled = threading.Condition(self.lock)
        self._wanted = self._stopped = False
        self._to_store: Future[int] | None = None

    # ------------------------------------------------------------ the DM-Handler's transitions

    def expect(self, pages: range) -> None:
        """Locked. NEW or AWAY → COMING: they are on their way, and count as resident."""
        self._set(pages, COMING)
        self.resident += len(pages)
        self.peak = max(self.peak, self.resident)

    def arrived(self, pages: range, dirty: bool) -> None:
        """COMING → CLEAN or DIRTY: the pages are installed, and join the end of the order."""
        with self.lock:
            self._set(pages, DIRTY if dirty else CLEAN)
            self._order.extend(range(2 * pages.start, 2 * pages.stop, 2 * pages.step))
            if self.resident >= self._wake_at and not self._wanted and not self.full():
                self._wanted = True
                self._work.notify()
            if self._is_stale():
                self._work.notify()
            self._settled.notify_all()

    def not_coming(self, pages: range) -> None:
        """COMING → AWAY: they could not be had after all."""
        with self.lock:
            self._leave(pages, AWAY, len(pages))

    def lost(self, page: int) -> None:
        """AWAY → LOST: the DMS can't give it back."""
        with self.lock:
            self.state[page] = LOST

    def written(self, page: int) -> range:
        """Locked. CLEAN → DIRTY, this page and perhaps neighbours; which ones.

        The caller lifts their write-protection, still locked. A program that has just written the
        pages up to this one, or down to it, is taken to go on: as many as are DIRTY behind it, so
        many CLEAN ones before it become DIRTY too. A wrong guess costs evictions with bytes.
        """
        below = self.state[max(0, page - WRITTEN_AT_ONCE) : page]
        above = self.state[page + 1 : page + 1 + WRITTEN_AT_ONCE]
        written_below = len(below) - len(below.rstrip(_DIRTY_BYTE))
        written_above = len(above) - len(above.lstrip(_DIRTY_BYTE))
        start, stop = page, page + 1
        if written_below >= WRITTEN_BEFORE:
            above = above[:written_below]
            stop += len(above) - len(above.lstrip(_CLEAN_BYTE))
        elif written_above >= WRITTEN_BEFORE:
            below = below[-written_above:]
            start -= len(below) - len(below.rstrip(_CLEAN_BYTE))
        self._set(range(start, stop), DIRTY)
        return range(start, stop)

    # ------------------------------------------------------------ LPET's and munmap's transitions

    def hold(self, runs: Iterable[Run], only_clean: bool = False) -> list[HeldRun]:
        """CLEAN → HELD_CLEAN, DIRTY → HELD_DIRTY: from now on, faults of them wait.

        Pages in other states are left out of what is returned.
        """
        with self.lock:
            return self._hold(runs, _CLEAN_RUN if only_clean else _CLEAN_OR_DIRTY_RUN)

    def hold_dirty(self, runs: Iterable[Run]) -> list[HeldRun]:
        """As hold, but DIRTY pages only; and those that a thread which has failed was holding."""
        with self.lock:
            return self._hold(runs, _DIRTY_RUN)

    def _hold(self, runs: Iterable[Run], which: re.Pattern[bytes]) -> list[HeldRun]:
        held = []
        for page, count in runs:
            states = self.state[page : page + count]
            for run in which.finditer(states):
                at, end = run.span()
                dirty = states[at] != CLEAN
                hold = HELD_DIRTY if dirty else HELD_CLEAN
                self.state[page + at : page + end] = bytes((hold,)) * (end - at)
                held.append((page + at, end - at, dirty))
        return held

    def hold_all(
        self, page: int, count: int, give_up: Callable[[], None] = lambda: None
    ) -> list[HeldRun]:
        """For munmap: wait until LPET and DM-Handler have let go of these pages; hold those here.

        give_up tells the DM-Handler to let go of those of `unwanted` that it has asked for ahead.
        Raises Stopped if they have ended, or end meanwhile.
        """
        with self.lock:
            self.unwanted = (page, count)
            if COMING in self.state[page : page + count]:
                give_up()
                self._room.notify_all()  # it may be waiting for some
            while _UNSETTLED.search(self.state[page : page + count]):
                if self._stopped:
                    raise Stopped
                self._settled.wait()
            self.unwanted = (0, 0)
            return self._hold([(page, count)], _CLEAN_OR_DIRTY_RUN)

    def released(self, runs: Iterable[Run]) -> list[int]:
        """HELD_CLEAN → CLEAN, HELD_DIRTY → DIRTY. Returns the pages whose faults are to be woken."""
        with self.lock:
            return self._let_go(runs, _RELEASE)

    def refused(self, runs: Iterable[Run]) -> list[int]:
        """As released; and as LPET's hand has passed the pages, they join the order's end again."""
        with self.lock:
            for page, count in runs:
                self._order.extend(range(2 * page, 2 * (page + count), 2))
            return self._let_go(runs, _RELEASE)

    def stored(self, runs: Iterable[Run]) -> list[int]:
        """HELD → CLEAN: still write-protected. Returns the pages whose faults are to be woken."""
        with self.lock:
            return self._let_go(runs, _STORED)

    def _let_go(self, runs: Iterable[Run], states: bytes) -> list[int]:
        for page, count in runs:
            self.state[page : page + count] = self.state[page : page + count].translate(states)
        self._settled.notify_all()
        return self._no_longer_awaited(runs)

    def left(self, runs: Iterable[Run]) -> list[int]:
        """HELD → AWAY. Returns the pages whose faults are to be woken."""
        with self.lock:
            for page, count in runs:
                self._leave(range(page, page + count), AWAY, count)
            return self._no_longer_awaited(runs)

    def freed(self, page: int, count: int) -> list[int]:
        """For munmap: HELD or AWAY → NEW. Returns the pages whose faults are to be woken."""
        with self.lock:
            states = self.state[page : page + count]
            held = states.count(HELD_CLEAN) + states.count(HELD_DIRTY)
            self._leave(range(page, page + count), NEW, held)
            return self._no_longer_awaited([(page, count)])

    def _set(self, pages: range, state: int) -> None:
        if len(pages) == 1:
            self.state[pages.start] = state
        else:
            self.state[pages.start : pages.stop : pages.step] = bytes((state,)) * len(pages)

    def _leave(self, pages: range, state: int, resident: int) -> None:
        self._set(pages, state)
        self.resident -= resident
        self._room.notify_all()
        self._settled.notify_all()

    def _no_longer_awaited(self, runs: Iterable[Run]) -> list[int]:
        if not self.awaited:
            return []
        done = [p for p in self.awaited for page, count in runs if page <= p < page + count]
        self.awaited.difference_update(done)
        return done

    # ------------------------------------------------------------ the order

    def next_candidates(self, limit: int) -> dict[int, bool]:
        """At most limit pages that may be evicted, in order from the hand: {page: is it marked}.

        LPET's thread only. They stay where they are until passed() speaks of them. Empty once
        there is none.
        """
        with self.lock:
            found: dict[int, bool] = {}  # ordered, and without a stale entry's second mention
            at = self._hand
            while len(found) < limit and at < len(self._order):
                for entry in self._order[at : at + limit - len(found)]:
                    at += 1
                    if self.state[entry >> 1] in (CLEAN, DIRTY):
                        found.setdefault(entry >> 1, bool(entry & 1))
            self._taken = at if found else None
            return found

    def passed(self, candidates: Iterable[int], done: int, kept: Iterable[int]) -> None:
        """The hand moves over the first done candidates; kept ones go to the order's end, marked."""
        with self.lock:
            stop = next(itertools.islice(candidates, done, None), None)
            if stop is None:
                self._hand = self._taken
            else:
                while self._order[self._hand] >> 1 != stop:
                    self._hand += 1
            self._taken = None
            self._order.extend([2 * page + 1 for page in kept])
            if self._hand > 1024 and self._hand > len(self._order) // 2:
                del self._order[: self._hand]
                self._hand = 0

    def pages(self) -> Iterator[int]:
        """Locked. Every page of the LSPT, in order from the hand."""
        return (entry >> 1 for entry in self._valid(self._order[self._hand :]))

    def _valid(self, entries: Iterable[int]) -> Iterator[int]:
        """The entries that are not stale: the first one of each page that is here."""
        seen = set()
        for entry in entries:
            if entry >> 1 not in seen and self.state[entry >> 1] >= CLEAN:
                seen.add(entry >> 1)
                yield entry

    def _is_stale(self) -> bool:
        return len(self._order) - self._hand > 2 * self.resident + 1024

    def _without_stale(self) -> None:
        """Locked, in LPET's thread, but for the time that it takes to look through all entries."""
        entries = self._order[self._hand :]
        self.lock.release()
        try:
            # A page that comes meanwhile, or comes back, gets another entry behind these.
            valid = array("I", self._valid(entries))
        finally:
            self.lock.acquire()
        self._order[: self._hand + len(entries)] = valid
        self._hand = 0

    # ------------------------------------------------------------ the areas

    def mapped(self, page: int, count: int, away: Iterable[Run] = ()) -> None:
        """The application has mapped an area. away: NEW → AWAY, what the DMS has of it already."""
        with self.lock:
            bisect.insort(self._areas, (page, count))
            for first, length in away:
                self._set(range(first, first + length), AWAY)

    def unmapped(self, page: int, count: int) -> bool:
        """The application has unmapped an area. Was it there?"""
        with self.lock:
            there = (page, count) in self._areas
            if there:
                self._areas.remove((page, count))
            return there

    def in_area(self, page: int) -> bool:
        """Locked. Is this page in an area?"""
        return page in self._area(page)

    def _area(self, page: int) -> range:
        """The area that has this page; without one, an empty range or one that has it not."""
        index = bisect.bisect_right(self._areas, (page, MAX_PAGES)) - 1
        first, count = self._areas[index] if index >= 0 else (0, 0)
        return range(first, first + count)

    def fetchable(self, wanted: range) -> range:
        """Locked. As many of these pages, from the first on, as may be fetched together; ascending.

        They are all NEW or all AWAY, in one area, and fit under the high threshold.
        """
        area = self._area(wanted.start)
        if wanted.start not in area:
            return range(0)
        upward = wanted.step > 0
        stop = min(wanted.stop, area.stop) if upward else max(wanted.stop, area.start - 1)
        wanted = range(wanted.start, stop, wanted.step)[: max(0, self._high - self.resident)]
        pages = wanted if upward else wanted[::-1]
        states = self.state[pages.start : pages.stop : pages.step]
        if upward:
            return pages[: _FETCHABLE.match(states).end()]
        return pages[len(pages) - _FETCHABLE.match(states[::-1]).end() :]

    def dirty(self) -> Iterator[Run]:
        """Runs of pages with every page that is DIRTY, HELD ones too; by address.

        What the application has been woken for is among them, and not COMING any more.
        """
        with self.installing:
            pass  # what was just being installed has arrived
        for page, states in self._parts():
            for run in _DIRTY_RUN.finditer(states):
                yield page + run.start(), run.end() - run.start()

    def away(self) -> int:
        """How many pages the DMS has and this instance has not; a while ago, some of them."""
        return sum(states.count(AWAY) for _, states in self._parts())

    def _parts(self) -> Iterator[tuple[int, bytes]]:
        """(first page, states) of every area, a part at a time, so that other threads can run."""
        with self.lock:
            areas = list(self._areas)
        for page, count in areas:
            for at in range(page, page + count, PART):
                yield at, self.state[at : min(at + PART, page + count)]

    # ------------------------------------------------------------ waiting

    def full(self) -> bool:
        """Locked. Are high_threshold pages here?"""
        return self.resident >= self._high

    def ask_for_room(self) -> None:
        """Locked. Wake LPET, and wait until fewer than high_threshold pages are here; or until
        munmap waits for pages that the DM-Handler has asked for ahead.

        Raises Stopped if LPET has ended, or ends meanwhile.
        """
        self._wanted = True
        self._work.notify()
        self.waiting_since = time.monotonic()
        try:
            while self.full() and not self._is_to_give_up():
                if self._stopped:
                    raise Stopped
                self._room.wait()
        finally:
            self.waiting_since = None

    def _is_to_give_up(self) -> bool:
        page, count = self.unwanted
        return COMING in self.state[page : page + count]

    def ask_to_store(self) -> Future[int]:
        """Have LPET send every DIRTY page to the DMS, which makes it CLEAN; of how many pages.

        Cancelled if LPET has ended, or ends meanwhile.
        """
        with self.lock:
            self._to_store = stored = Future()
            if self._stopped:
                stored.cancel()
            self._work.notify()
        return stored

    def wait_for_work(self, rest: float = 0) -> tuple[bool, Future[int] | None]:
        """LPET's thread: sleep until it is woken: (is it to evict, is it to store).

        Neither, once stop was called. rest: do not evict for so many seconds.
        """
        until = time.monotonic() + rest
        with self.lock:
            while not self._stopped and not self._to_store:
                left = until - time.monotonic()
                if (self._wanted or self.waiting_since and self.full()) and left <= 0:
                    break
                if self._is_stale():
                    self._without_stale()
                    continue  # the lock was free meanwhile: whoever has notified was not heard
                self._work.wait(left if left > 0 else None)
            store, self._to_store = self._to_store, None
            if self._stopped and store:
                store.cancel()
            evict = not self._stopped and not store
            if evict:
                self._wanted = False
            return evict, None if self._stopped else store

    def stop(self) -> None:
        """End every wait for good: LPET's for work, the DM-Handler's for room, and munmap's."""
        with self.lock:
            self._stopped = True
            if self._to_store:
                self._to_store.cancel()
            for waiting in (self._work, self._room, self._settled):
                waiting.notify_all()
