"""DM-Handler: the thread that resolves the application's page faults.

In the picture: in the pager, between the userfaultfd and the store.

Interface: run() is the thread; figures() and `latencies` what it has counted. For other threads:
bring() and prefetch(). `children`: the forked ones of the application (children.py). For --report and --progress:
`came` and `lines`, which report.py sets.

To bring pages is to make them COMING (LSPT.expect), ask the store for them, take its answer, and install them.
_bring_missing brings a page that a thread waits for: a fault of the application, a fault of a forked
child, or bring(), which a thread of the pager calls for a system call. Readahead may bring pages that
follow it. _bring_advised brings pages that the application's advice has named, see prefetch(), and only
while no fault waits.

One fault, from the message to the woken application:

    run             reads the messages that wait, and calls _resolve.
    _bring_missing  calls LSPT.expect: NEW or AWAY → COMING. If high_threshold pages are here, sleeps until LPET
                    has made room ("avoid memory flood"), and calls it again. For a page that is LEAVING it
                    does nothing: the thread that has claimed the page wakes the application. If readahead.py
                    sees a stream, it makes the pages that follow COMING, too.
    _bring_alone    if readahead adds nothing, and the store has the page's bytes in a file of this process, does
                    what the next three do, in a third less time. Not with a log or a report, which tell more, nor
                    for a kept disk, nor for a page that was NEW. If anything fails, the next three do it all again,
                    and find out what it is.
    _fetch          asks the store for all of these, in pieces. The first piece of a run is small: the
                    application works on it while the others come.
    _take           takes a piece from the store. If the store returns fewer pages, asks for the rest.
    _install        makes the pages by UFFDIO_COPY or UFFDIO_ZEROPAGE, which wakes the application. Then
                    LSPT.arrived: COMING → HERE. The application may be running already.

A page that a read fault brings gets the uffd-wp bit, in the page table. Its first write clears the bit, so LPET
knows which pages are clean. With UFFD_FEATURE_WP_ASYNC the kernel clears it. Without, the write is a fault, which
_resolve answers with UFFDIO_WRITEPROTECT. A page that a write fault brings, and each page of its window, has no
bit, and counts as written.

Rules: this thread alone reads the userfaultfds and makes pages COMING.

Waiting: to wake an idle core takes longer than the rest of a fault. So this thread looks for the next
fault for SPIN nanoseconds before it sleeps. Two other ways were measured, and are slower. To follow the
application to its core and sleep at once took 41 to 44 µs a random read; SPIN took 22 to 32 in the same
runs. To look by the epoll takes 0.3 µs, by os.read 0.9, and as it is 0.4: random reads took 6 to 12 % longer
by the epoll than by os.read.
"""

import bisect
import contextlib
import itertools
import os
import select
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from fcntl import ioctl
from functools import partial
from threading import Event

from edm import log
from edm import lspt as l
from edm import uffd_ctypes as u
from edm.children import Children
from edm.page_store import CONTENT, PageStore
from edm.readahead import Readahead
from edm.uffd_ctypes import PAGE_SIZE, PAGES_AT_ONCE, Userfaultfd

BRING = 0.1  # seconds from one look to the next whether this thread still runs
SPIN = 30_000  # nanoseconds: random reads take 33 µs without, 21 with it, and no less with a millisecond
WINDOW_PART = 64  # a readahead window is at most 1/WINDOW_PART of high_threshold
FIRST_PIECE, PIECE = 16, min(64, PAGES_AT_ONCE)  # pages of a run that are installed at once
# What the application waited for: figures(), in seconds.
WAITS = FAULTS, STORE, ROOM = "waited", "waited_for_store", "waited_for_room"
# What it counts, for figures() too: in a dict, which takes half the time that shared memory takes.
COUNTED = "faults_first_access", "faults_refetch", "faults_write_protect", "bytes_received"


class DmHandler:
    def __init__(self, store: PageStore, lspt: l.LSPT, readahead: int, track_clean: bool) -> None:
        """readahead: the setting. track_clean: pages that come to be read get the uffd-wp bit."""
        self._uffd, self._store, self._lspt = Userfaultfd(lspt.uffd), store, lspt
        self._start, self._track_clean = lspt.start, track_clean
        self._readahead = Readahead(min(readahead, lspt.high // WINDOW_PART), lspt.is_missing)
        self._epoll = select.epoll()
        self._epoll.register(lspt.uffd, select.EPOLLIN)
        self._epoll.register(lspt.for_handler, select.EPOLLIN)
        self.children = Children(self._epoll)
        self.came: deque[int] | None = None  # gets the pages that are installed
        self.lines = None  # a lines.Lines, which samples the faults
        self._log, self._banner, self._info = log.of_box("DmHandler")
        # The source of a zero page that gets the uffd-wp bit, which UFFDIO_ZEROPAGE can't set.
        self._zeros = u.mmap(0, PIECE * PAGE_SIZE, u.PROT_READ, u.MAP_PRIVATE | u.MAP_ANONYMOUS)
        # An UFFDIO_COPY of one page, for _bring_alone: dst, src, len, mode, copy.
        self._block = array("L", (0, 0, PAGE_SIZE, 0, 0))
        self._copy_page = partial(ioctl, lspt.uffd, u.IOCTLS["UFFDIO_COPY"], self._block)
        self._called: deque[tuple[range, bool, Event]] = deque()  # what bring was called for
        self._advised: deque[range] = deque()  # what prefetch was called for
        # Nanoseconds. A wait subtracts the clock when it begins, and adds it when it ends. So a negative sum
        # means that a wait is under way.
        self._waited = dict.fromkeys(WAITS, 0)
        self._counted = dict.fromkeys(COUNTED, 0)
        # How many faults took less than 2 ** (n / 8) ns, but not less than 2 ** ((n - 1) / 8), by n. That is the
        # number of bits that the eighth power of the time has.
        self.latencies = [0] * (8 * 64)

    def figures(self) -> dict[str, object]:
        """COUNTED; the median and the 99th percentile of the faults' latency, in µs, 9 % too long at most; the sum of
        all, in seconds.

        Latency: from the message's arrival to the woken application, as this thread sees it.
        """
        # What half of the faults, and all but a hundredth, did not exceed.
        seen = list(itertools.accumulate(self.latencies))
        places = (bisect.bisect_left(seen, part * seen[-1]) for part in (0.5, 0.99))
        median, long = (round(2 ** (n / 8) / 1000) for n in places)
        # A wait that is under way counts, as it may be a long one: until now, or LSPT.stop.
        now = self._lspt.figures[l.STOPPED] or time.monotonic_ns()
        waits = {name: round((ns + (ns < 0 and now)) / 1e9, 3) for name, ns in self._waited.items()}
        return {**self._counted, "latency_median": median, "latency_99th": long, **waits}

    # ------------------------------------------------------------ for other threads

    def bring(self, pages: range, write: bool) -> None:
        """Bring those of these pages that are missing, as if they had faulted. Returns when none is missing,
        or after LSPT.stop."""
        while self._lspt.is_missing(pages) and not self._lspt.stopped():
            done = Event()
            self._called.append((pages, write, done))
            os.eventfd_write(self._lspt.for_handler, 1)
            done.wait(BRING)
            if self._lspt.is_missing(pages):  # a page that was LEAVING
                time.sleep(l.SETTLE)

    def prefetch(self, runs: Iterable[l.Run]) -> None:
        """Bring those of these pages that are AWAY, while no fault waits. Returns at once.

        No more runs wait than pages may be here: then the last ones of these are dropped.
        """
        for first, count in itertools.islice(runs, max(self._lspt.high - len(self._advised), 0)):
            self._advised.append(range(first, first + count))
        os.eventfd_write(self._lspt.for_handler, 1)

    # ------------------------------------------------------------ the thread

    def run(self) -> None:
        """Do what bring was called for, and resolve the faults that wait. If there are none, bring some of the pages
        that are advised. If there is nothing to do, look again for SPIN nanoseconds, and yield the core each time; then
        sleep. Raises ProcessLookupError after LSPT.stop, and when the application has ended; else the OSError of
        an ioctl that has failed."""
        figures, until = self._lspt.figures, 0
        while True:
            if self.children.sent:
                self._serve_children()
            # Only now: _await_wakeup may have read the wake-up, while a child's page waited for room.
            while self._called:
                pages, write, done = self._called.popleft()
                for page in pages:
                    if self._lspt.state[page] < l.HERE:
                        self._bring_missing(self._start + page * PAGE_SIZE, write)
                done.set()
            if faults := self._uffd.read_faults():
                until = self._resolve(faults) + SPIN
            # If advice waits for room, LPET wakes this thread. After LSPT.stop, no advised page comes.
            elif self._advised and not (figures[l.ROOM_WANTED] or figures[l.STOPPED]):
                self._bring_advised()
            elif time.monotonic_ns() < until:
                os.sched_yield()
            elif (self._lspt.for_handler, select.EPOLLIN) in self._epoll.poll():
                self._await_wakeup()

    def _serve_children(self) -> None:
        """Bring the pages that forked children miss, as if the application had read them, and wake the
        children. A child whose page is LEAVING faults again until it has left."""
        for child in self.children.faulting():
            for _, _, address, _ in child.read_faults():
                begin, page = address & -PAGE_SIZE, (address - self._start) // PAGE_SIZE
                self._bring_missing(address, False)
                if self._lspt.state[page] == l.LOST:
                    # Another of its threads may have touched this page before; or it has ended.
                    with contextlib.suppress(FileExistsError, ProcessLookupError):
                        child.poison(begin, PAGE_SIZE)
                child.wake(begin, PAGE_SIZE)

    def _await_wakeup(self) -> None:
        """Sleep until for_handler is written to. Raises ProcessLookupError after LSPT.stop."""
        os.read(self._lspt.for_handler, 8)  # unlike os.eventfd_read, this goes on after a signal
        if self._lspt.stopped():
            raise ProcessLookupError

    def _resolve(self, faults: Iterable[tuple[int, int, int, int]]) -> int:
        """Resolve the faults that were read. Returns when that ended."""
        began = time.monotonic_ns()
        for _, flags, address, thread in faults:
            if self.lines:  # that does not count as latency
                began += self.lines.begins(thread, address, self._waited[FAULTS])
            self._waited[FAULTS] -= began
            if self._info:
                self._banner.info("\n--------------START HANDLING PAGE FAULT--------------")
                self._log.info("UFFD_EVENT_PAGEFAULT in address = %#x", address & -PAGE_SIZE)
            if flags & u.UFFD_PAGEFAULT_FLAG_WP:
                # In any state of the page: without the bit, it counts as written.
                self._uffd.writeprotect(address & -PAGE_SIZE, PAGE_SIZE, False)
                self._counted["faults_write_protect"] += 1
            else:
                self._bring_missing(address, flags & u.UFFD_PAGEFAULT_FLAG_WRITE > 0)
            if self._info:
                self._banner.info("\n--------------FINISH HANDLING PAGE FAULT--------------\n\n")
            ended = time.monotonic_ns()
            self._waited[FAULTS] += ended
            self.latencies[((ended - began) ** 8).bit_length()] += 1
        return ended

    def _bring_missing(self, address: int, write: bool) -> None:
        """Bring the page that has this address, and what readahead adds, if it is NEW or AWAY. If it is HERE or
        LOST, wake the application. It is never COMING: this thread alone makes pages so."""
        page = (address - self._start) // PAGE_SIZE
        while (state := self._lspt.expect(page)) is None:
            if self._info:
                self._log.info("reached high threshold, waking up lpet")
                self._log.debug("avoid memory flood- dmhandler goes to sleep")
            self._waited[ROOM] -= time.monotonic_ns()
            self._await_wakeup()
            self._waited[ROOM] += time.monotonic_ns()
        if state >= l.LOST:
            if state != l.LEAVING:  # else who has claimed it wakes the application
                self._uffd.wake(address & -PAGE_SIZE, PAGE_SIZE)
            return
        self._counted["faults_first_access" if state == l.NEW else "faults_refetch"] += 1
        if stream := self._readahead.stream(address - self._start):
            wanted = stream.wanted(self._lspt.area(page))
            runs = [run for part in wanted for run in self._lspt.expect_more(part)]
            # The next column of a matrix needs the pages of this one again, so in a stride it counts that they
            # have come back soon.
            self._fetch(runs, page, write, state if stream.stride > PAGE_SIZE else l.NEW)
        elif state == l.NEW or not self._bring_alone(page, write, state):
            pages = range(page, page + 1)
            self._take(pages, self._ask(pages), page, write, state)

    def _bring_alone(self, page: int, write: bool, before: int) -> bool:
        """Bring this page, which is COMING. Returns whether it has come. before: see LSPT.arrived."""
        store, block = self._store, self._block
        try:
            # A report counts what this does not.
            if self.came is None and store.takes_pipes and (source := store.take_page(page)):
                self._counted["bytes_received"] += PAGE_SIZE
                block[0], block[1] = self._start + page * PAGE_SIZE, source
                block[3] = u.UFFDIO_COPY_MODE_WP if self._track_clean and not write else 0
                self._copy_page()
                self._lspt.page_arrived(page, before)
                return True
        except OSError:
            return False  # _take will find out what it is, and what to do
        return False

    def _bring_advised(self) -> None:
        """Bring those of the next PIECE advised pages that are AWAY. If there is room for fewer, look at so many."""
        runs, most = [], min(PIECE, self._lspt.high - self._lspt.figures[l.RESIDENT])
        if not most:
            with self._lspt.lock:
                self._lspt.want_room()
        while most > 0 and self._advised:
            pages = self._advised.popleft()
            runs += self._lspt.expect_more(pages[:most], l.AWAY_RUN)
            if rest := pages[most:]:
                self._advised.appendleft(rest)
            most -= len(pages)
        self._fetch(runs, -1, False, l.NEW)

    # ------------------------------------------------------------ fetching

    def _fetch(self, runs: list[range], page: int, write: bool, before: int) -> None:
        """Ask for all of these pages, in pieces, so that several DMSs work at once. Then _take them in order."""
        pieces = [piece for run in runs for piece in self._pieces(run)]
        for piece, asked in [(piece, self._ask(piece)) for piece in pieces]:
            self._take(piece, asked, page, write, before)

    def _pieces(self, pages: range) -> Iterator[range]:
        """Parts of these pages, in the order of need. Each is of one stripe of the store, and its pages ascend."""
        stripe, step, most = self._store.stripe, pages.step, FIRST_PIECE
        while pages:
            place = pages[0] % stripe
            more = (stripe - 1 - place) // step if step > 0 else place // -step  # in the stripe
            part = pages[: min(most, 1 + more)]
            yield part if step > 0 else part[::-1]
            pages, most = pages[len(part) :], PIECE

    def _ask(self, pages: range) -> object:
        if self._info:
            address = self._start + pages.start * PAGE_SIZE
            self._log.info("send request for the page in address %#x from DMS", address)
        return self._store.ask_get(pages)

    def _take(self, pages: range, asked: object, page: int, write: bool, before: int) -> None:
        """Install these pages, which are COMING and were asked for. A page that can't be read becomes AWAY;
        or LOST, if it is `page`, the one that has faulted. before: see LSPT.arrived."""
        noted = self.came is not None and self._waited[FAULTS] < 0  # for a report, if a fault waits
        if noted:
            self._waited[STORE] -= time.monotonic_ns()
        try:
            kind, got, source = self._store.take_get(asked)
        except OSError as error:
            kind, got, failed = None, 1, error
        if noted:
            self._waited[STORE] += time.monotonic_ns()
        if kind:
            come = pages if got == len(pages) else pages[:got]  # to slice a range takes 0.3 µs
            self._install(come, source if kind == CONTENT else 0, write, before)
        elif pages[0] == page:
            self._lose(page, failed)
        else:
            self._lspt.not_coming(pages[:1])
        if got < len(pages):  # the store could not return all together
            self._take(pages[got:], self._ask(pages[got:]), page, write, before)

    def _install(self, pages: range, source: int, write: bool, before: int) -> None:
        """source: the address of their bytes; 0: they are zeros."""
        address = self._start + pages.start * PAGE_SIZE
        if self._info:
            known = "previously accessed" if source else "first access"
            what = "page content from DMS" if source else "zero page"
            self._log.info("received ack for page in address : %#x (%s)", address, known)
            self._log.info("copying %s to address : %#x", what, address)
        wp = self._track_clean and not write
        at, end, at_once = 0, len(pages) * PAGE_SIZE, pages.step == 1
        if source:  # counted first: the application may ask as soon as it is woken
            self._counted["bytes_received"] += end
        while at < end:
            dst, length = address + at * pages.step, end - at if at_once else PAGE_SIZE
            try:
                if source or wp:
                    at += self._uffd.copy(dst, (source or self._zeros) + at, length, wp)
                else:
                    at += self._uffd.zeropage(dst, length)
            except FileNotFoundError:  # the program has split the mapping, as by madvise(2)
                if not at_once:  # or Space.close has unmapped it: nobody waits for these
                    self._lspt.not_coming(pages[at // PAGE_SIZE :])
                    pages, end = pages[: at // PAGE_SIZE], at
                at_once = False
        if pages:
            self._lspt.arrived(pages, before)
        if self.came is not None:
            self.came.extend(pages)

    def _lose(self, page: int, error: OSError) -> None:
        """The store can't return this page: from now on touching it is a SIGBUS, and never gives zeros. Raises
        OSError, which ends the job, where there is no UFFDIO_POISON (before Linux 6.6)."""
        address = self._start + page * PAGE_SIZE
        self._log.error("page in address %#x can't be brought back: %s", address, error)
        if self._track_clean:  # EEXIST, if the uffd-wp bit is left in the page table
            self._uffd.writeprotect(address, PAGE_SIZE, False)
        self._uffd.poison(address, PAGE_SIZE)
        # Only now: a page that is COMING can't be freed, and then be another area's.
        self._lspt.not_coming(range(page, page + 1), l.LOST)
