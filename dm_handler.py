"""DM-Handler: the thread that resolves the application's page faults.

In the picture: in the pager, between the userfaultfd and the store.

Interface: run() is the thread; figures() and latencies() what it has counted.

One fault, from the message to the woken application:

    run         reads the messages that wait.
    _resolve    claims the page, with LSPT.expect: it was NEW or AWAY, and is COMING now. If
                high_threshold pages are here, it waits for LPET to make room ("avoid memory flood").
                A page that is LEAVING is waited for by the application alone: LPET wakes it.
    _fetch      asks the store for the page, or for a window of pages if readahead.py sees a stream.
    _install    makes the pages by UFFDIO_COPY or UFFDIO_ZEROPAGE, which wakes the application. A
                window comes in pieces, the first one small: the application works on it meanwhile.

A page that is installed because it was read gets the page table's mark; its first write clears that,
so that LPET knows which pages are clean. With UFFD_FEATURE_WP_ASYNC the kernel clears it itself, else
the write is a fault, which `run` answers with UFFDIO_WRITEPROTECT.

Rules: this thread alone reads the userfaultfd and makes pages COME.

Waiting: waking another core that is idle takes longer than all the rest of a fault. So this thread
looks for the next fault for LOOK seconds before it sleeps. Following the application to its core, and
sleeping at once, was measured too: 41 to 44 µs a random read, where looking takes 22 to 32.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import itertools
import mmap
import os
import select
import time
from array import array
from collections import deque
from logging import INFO

from edm import log
from edm.lspt import AWAITED, AWAY, HERE, LEAVING, LOST, LSPT, NEW
from edm.page_store import CONTENT
from edm.readahead import Ahead, Readahead, Stream
from edm.uffd_ctypes import (
    PAGE_SIZE,
    UFFD_PAGEFAULT_FLAG_WP,
    UFFD_PAGEFAULT_FLAG_WRITE,
    Userfaultfd,
)

TYPE_CHECKING = False  # for type checkers it is true; typing takes long to import
if TYPE_CHECKING:
    from typing import Any

LOOK = 30e-6  # seconds: random reads take 33 µs without, 21 with it, and no less with a millisecond
FIRST_PIECE, PIECE = 16, 64  # pages of a window that are installed at once
LATENCY_BUCKETS = 64 * 16  # 16 for each power of two of nanoseconds


class Stopped(Exception):
    """The instance is coming to its end: no page comes any more."""


class DmHandler:
    def __init__(
        self,
        uffd: int,
        store: Any,
        lspt: LSPT,
        start_addr: int,
        readahead: Readahead,
        track_clean: bool,
        came: deque[tuple[int, int]] | None,
    ) -> None:
        """track_clean: pages that are read first get the mark.

        came: who wants to know gets (page, count) of what is installed.
        """
        self._uffd, self._store, self._lspt = Userfaultfd(uffd), store, lspt
        self._start, self._readahead, self._track_clean = start_addr, readahead, track_clean
        self._came = came
        self._log, self._banner = log.logger("DmHandler"), log.logger()
        self._info = self._log.isEnabledFor(INFO)
        # The source of a zero page that is to have the mark, which UFFDIO_ZEROPAGE can't set.
        self._zero_memory = mmap.mmap(-1, PIECE * PAGE_SIZE)
        self._zeros = ctypes.addressof(ctypes.c_char.from_buffer(self._zero_memory))
        self._first_access = self._refetch = self._write_protect = self._other = 0
        self._fetched = self._waited = self._received = 0  # pages; nanoseconds; pages
        self._latencies = array("Q", bytes(8 * LATENCY_BUCKETS))

    def figures(self) -> dict[str, object]:
        """Counts of faults by kind; the median and the 99th percentile of their latency, in µs; the
        sum of all, in seconds.

        Latency: from the message's arrival to the woken application, as this thread sees it.
        """
        return {
            "faults_first_access": self._first_access,
            "faults_refetch": self._refetch,
            "faults_write_protect": self._write_protect,
            "faults_other": self._other,
            "fetched": self._fetched,
            "latency_median": self._latency(0.5),
            "latency_99th": self._latency(0.99),
            "waited": round(self._waited / 1e9, 3),
            "bytes_received": self._received * PAGE_SIZE,
        }

    def _latency(self, share: float) -> float:
        """So many µs at most took this share of the faults."""
        seen = list(itertools.accumulate(self._latencies))
        return round(_at_most(bisect.bisect_left(seen, share * seen[-1])), 3) if seen[-1] else 0.0

    def latencies(self) -> list[tuple[float, int]]:
        """(µs at most, how many faults took so long), ascending; without those that none took."""
        return [(_at_most(at), n) for at, n in enumerate(self._latencies) if n]

    # ------------------------------------------------------------ the thread

    def run(self) -> None:
        """Resolve faults until told to stop, or until the application has ended."""
        try:
            self._serve()
        except (ProcessLookupError, Stopped):
            pass  # ESRCH: the application has ended
        finally:
            for ahead in self._readahead.drop_all():
                self._drop(ahead)

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._uffd.fd, select.POLLIN)
        poll.register(self._lspt.for_handler, select.POLLIN)
        bell = self._lspt.for_handler
        while True:
            ready = self._look(poll) or poll.poll()
            began = time.monotonic_ns()
            for fd, _ in ready:
                if fd == bell:
                    self._hear()
            for _, flags, address in self._uffd.read_faults():
                if self._resolve(flags, address & -PAGE_SIZE):
                    took = time.monotonic_ns() - began
                    self._waited += took
                    bits = max(5, took.bit_length())
                    self._latencies[16 * bits + (took >> bits - 5 & 15)] += 1

    def _look(self, poll: select.poll) -> list[tuple[int, int]]:
        """For LOOK seconds, offering the core at every look: the next fault is often near."""
        until = time.monotonic() + LOOK
        while time.monotonic() < until:
            if ready := poll.poll(0):
                return ready
            os.sched_yield()
        return []

    def _hear(self) -> None:
        os.eventfd_read(self._lspt.for_handler)
        if self._lspt.stopped():
            raise Stopped

    def _resolve(self, flags: int, address: int) -> bool:
        """One fault. Was it one that a page came for, or a first write?"""
        page = (address - self._start) // PAGE_SIZE
        if self._info:
            self._banner.info("\n--------------START HANDLING PAGE FAULT--------------")
            self._log.info("UFFD_EVENT_PAGEFAULT in address = %#x", address)
        if flags & UFFD_PAGEFAULT_FLAG_WP:
            # In whatever state the page is: without the mark, it counts as written.
            self._uffd.writeprotect(address, PAGE_SIZE, False)
            self._write_protect += 1
            resolved = True
        else:
            resolved = self._claim(page, bool(flags & UFFD_PAGEFAULT_FLAG_WRITE))
        if self._info:
            self._banner.info("\n--------------FINISH HANDLING PAGE FAULT--------------\n")
        return resolved

    def _claim(self, page: int, write: bool) -> bool:
        """A page is missing: see to it that it comes. False if it is here, or is waited for."""
        stream = self._readahead.fault(page)
        wanted = self._wanted(stream, page) if stream else range(page, page + 1)
        while True:
            state, pages = self._lspt.expect(wanted)
            if pages:
                self._fetch(pages, state, write, page, stream)
                return True
            if state >= HERE or state == LOST:
                self._uffd.wake(self._start + page * PAGE_SIZE, PAGE_SIZE)
            elif state in (LEAVING, AWAITED):
                if self._info:
                    self._log.info(
                        "page in address : %#x is being evicted, wait for it",
                        self._start + page * PAGE_SIZE,
                    )
            else:
                self._wait_for_room()
                continue
            self._other += 1
            return False

    def _wait_for_room(self) -> None:
        if self._info:
            self._log.info("reached high threshold, waking up lpet")
        self._lspt.wake_lpet()
        poll = select.poll()
        poll.register(self._lspt.for_handler, select.POLLIN)
        poll.poll()
        self._hear()

    def _wanted(self, stream: Stream, page: int) -> range:
        """What the stream wants, as far as it is of one area, and of one window asked for ahead."""
        wanted = stream.wanted(page)
        within = self._lspt.area(page)
        if stream.ahead and page in stream.ahead.pages:
            within = stream.ahead.pages
        if page not in within:
            return range(page, page + 1)
        low, high = within.start, within[-1]
        most = (high - page) // stream.stride if stream.stride > 0 else page - low
        return wanted[: most + 1]

    # ------------------------------------------------------------ fetching, and reading ahead

    def _fetch(
        self, pages: range, state: int, write: bool, page: int, stream: Stream | None
    ) -> None:
        """These pages are COMING: get them from the store, and install them. One has faulted."""
        ahead = stream.ahead if stream else None
        if ahead and state != NEW and page in ahead.pages:
            stream.ahead = None
            asked, at = ahead.asked, ahead.pages.index(pages.start)
        else:
            for old in self._readahead.overlapping(pages):
                self._drop(old)
            if self._info:
                self._log.info(
                    "send request for the page in address %#x from DMS",
                    self._start + page * PAGE_SIZE,
                )
            asked, at = self._store.ask_get(pages), 0
        kind, got = asked.take()
        if at + len(pages) > got:  # the store has some pages as bytes, and knows others as zeros
            coming = pages[: max(0, got - at)]
            if page not in coming:
                asked.give_back(0)
                asked.done()
                coming = range(page, page + 1)
                asked, at = self._store.ask_get(coming), 0
                kind, got = asked.take()
            first = pages.index(coming.start)
            for others in pages[:first], pages[first + len(coming) :]:
                self._lspt.not_coming(others, state)
            pages = coming
        if at:  # what is not used may be in what is asked for next
            asked.give_back(0, at)
        if at + len(pages) < got:
            asked.give_back(at + len(pages))
        if kind == CONTENT:
            self._refetch += 1
        else:
            self._first_access += 1
        if self._info:
            known = "previously accessed" if kind == CONTENT else "first access"
            self._log.info(
                "received ack for page in address : %#x (%s)", self._start + page * PAGE_SIZE, known
            )
        if stream:
            self._readahead.used(stream, pages)
            if kind == CONTENT:
                self._ask_ahead(stream)
            for surplus in self._readahead.surplus():
                self._drop(surplus)
        self._install(asked, at, pages, state, kind, write, page)
        asked.done()

    def _ask_ahead(self, stream: Stream) -> None:
        """Ask for the stream's next window before it is needed."""
        area = self._lspt.area(stream.next)
        if stream.next in area and AWAY <= self._lspt.state[stream.next] < HERE:
            wanted = self._lspt.alike(self._wanted(stream, stream.next))
            if len(wanted) > 1:
                # Two streams never ask for the same pages: the bytes of one could be old by then.
                for old in self._readahead.overlapping(wanted):
                    self._drop(old)
                stream.ahead = Ahead(wanted, self._store.ask_get(wanted))

    def _drop(self, ahead: Ahead) -> None:
        """What was asked for ahead is not needed."""
        ahead.asked.done()

    # ------------------------------------------------------------ installing

    def _install(
        self, asked: Any, at: int, pages: range, state: int, kind: int, write: bool, page: int
    ) -> None:
        """Install what was asked for, of which these pages begin at `at`, piece by piece."""
        if self._info:
            what = "page content from DMS" if kind == CONTENT else "zero page"
            self._log.info("copying %s to address : %#x", what, self._start + page * PAGE_SIZE)
        # In the order in which the application needs them: downward, if the last one has faulted.
        downward = page == pages[-1] and len(pages) > 1
        came_from = state if len(pages) == 1 else NEW
        step = FIRST_PIECE
        while pages:
            count = min(step, len(pages)) if pages.step == 1 else 1
            first = len(pages) - count if downward else 0
            piece = pages[first : first + count]
            source = None
            if kind == CONTENT:
                try:
                    source = asked.content(at + first, count)
                except OSError as error:
                    asked.give_back(at)
                    self._unreadable(pages, state, write, page, error)
                    return
            if not self._install_piece(piece, source, write, came_from):
                self._lspt.not_coming(pages, state)
                asked.give_back(at)
                return
            pages = pages[:first] if downward else pages[count:]
            at += 0 if downward else count
            step = PIECE

    def _install_piece(self, pages: range, source: int | None, write: bool, came_from: int) -> bool:
        """Neighbours; source: where their bytes are, None for zeros. False if they can't be."""
        address, length = self._start + pages.start * PAGE_SIZE, len(pages) * PAGE_SIZE
        mark = self._track_clean and not write
        try:
            if source is not None:
                self._uffd.copy(address, source, length, mark)
                self._received += len(pages)
            elif mark:
                self._uffd.copy(address, self._zeros, length, True)
            else:
                self._uffd.zeropage(address, length)
        except FileNotFoundError:  # ENOENT: the application has unmapped the space under its feet
            self._uffd.wake(address, length)
            return False
        if self._lspt.arrived(pages, came_from):
            self._lspt.wake_lpet()
        self._fetched += len(pages)
        if self._came is not None:
            self._came.append((pages.start, len(pages)))
        return True

    def _unreadable(self, pages: range, state: int, write: bool, page: int, error: OSError) -> None:
        """One of these can't be read. The one that has faulted is tried alone; if it was, it is lost."""
        if pages == range(page, page + 1):
            self._lose(page, error)
            return
        at = pages.index(page) if page in pages else len(pages)
        for others in pages[:at], pages[at + 1 :]:
            self._lspt.not_coming(others, state)
        if page in pages:
            self._fetch(range(page, page + 1), state, write, page, None)

    def _lose(self, page: int, error: OSError) -> None:
        """The store can't give this page back: touching it is a SIGBUS from now on, never zeros."""
        address, reason = self._start + page * PAGE_SIZE, error.strerror or error
        self._log.error("page in address %#x can't be brought back: %s", address, reason)
        self._lspt.lost(page)
        try:
            # Poison wants an empty place in the page table, without the mark (EEXIST).
            if self._track_clean:
                self._uffd.writeprotect(address, PAGE_SIZE, False)
            self._uffd.poison(address, PAGE_SIZE)
        except OSError as failure:
            if failure.errno not in (errno.EINVAL, errno.ENOTTY):
                raise
            raise OSError(
                error.errno,
                f"page in address {address:#x} can't be brought back: {reason}; and this kernel "
                "can't tell the application so (UFFDIO_POISON: Linux 6.6)",
            ) from None


def _at_most(bucket: int) -> float:
    """The longest latency in a bucket, in µs."""
    bits, part = divmod(bucket, 16)
    return (17 + part) * 2.0 ** (bits - 5) / 1000
