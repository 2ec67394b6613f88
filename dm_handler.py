"""DM-Handler: the thread that resolves the application's page faults.

In the picture: in the pager process, between the userfaultfd and the DMS.

Interface: run() is the thread; faults and latencies are its figures.

One fault, from the message to the woken application:

    run             reads the messages that are waiting
    _resolve        looks at the page's state in the LSPT and decides:
                      HELD            LPET has it in its hands and will wake the fault: note that
                      CLEAN, DIRTY    it is there already (another thread's fault): wake;
                                      a first write to a CLEAN page: allow writing, which wakes
                      NEW, AWAY       fetch it: _get
                      COMING          it was asked for ahead of need: _use_ahead
                      LOST            another thread's fault has found it so: wake
    _get            waits for room if high_threshold pages are here ("avoid memory flood"), and asks
                    the DMS for the page, or for a window of pages if readahead.py sees a stream.
                    For NEW ones the answer is known, and is taken when nobody waits for it
    _finish         takes the answer, asks for the stream's next window already, and then
    _install        installs what came, which wakes:
                      first access           zero pages
                      previously accessed    the content

Rules: this thread is the only one that reads the userfaultfd and that makes pages COME. It never
holds the LSPT's lock while it waits for MPI; it does while it lifts a page's write-protection,
because LPET must find either a protected CLEAN page or a writable DIRTY one.
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
from collections.abc import Sequence
from logging import INFO

from edm import log
from edm.lspt import AWAY, CLEAN, COMING, DIRTY, HELD_CLEAN, HELD_DIRTY, LOST, LSPT, NEW, Stopped
from edm.messages import CONTENT, NEW_PAGES, UNREADABLE, DMSError
from edm.mpi_client import TESTS, MpiClient
from edm.readahead import Ahead, Readahead, Stream
from edm.uffd_ctypes import (
    PAGE_SIZE,
    UFFD_PAGEFAULT_FLAG_WP,
    UFFD_PAGEFAULT_FLAG_WRITE,
    Userfaultfd,
)

EAGER = 200e-6  # seconds after a fault in which this thread does not sleep
FIRST_CHUNK, CHUNK = 16, 64  # pages of a window that are installed by one UFFDIO_COPY
STOP, GIVE_UP = b"s", b"g"  # end; and give up what was asked for ahead of lspt.unwanted
LATENCY_BUCKETS = 64 * 16  # 16 for each power of two of nanoseconds


class DmHandler:
    def __init__(
        self,
        uffd: Userfaultfd,
        clients: Sequence[MpiClient],
        lspt: LSPT,
        start_addr: int,
        readahead: Readahead,
        track_clean: bool,
        commands_fd: int,
        came: deque[tuple[int, int]] | None,
    ) -> None:
        """The first client is for faults, the others for what is asked for ahead of need.

        Without track_clean, every page counts as DIRTY. commands_fd is a pipe: see STOP and GIVE_UP.
        came: who wants to know gets (page, count) of what is installed.
        """
        self._uffd, self._lspt, self._start = uffd, lspt, start_addr
        self._client, *self._free_clients = clients
        self._readahead, self._track_clean = readahead, track_clean
        self._commands_fd, self._came = commands_fd, came
        self._log, self._banner = log.logger("DmHandler"), log.logger()
        self._info = self._log.isEnabledFor(INFO)
        # The source of a zero page that is to be write-protected, which UFFDIO_ZEROPAGE can't do
        # in one step with the installing.
        self._zero_memory = mmap.mmap(-1, max(1, readahead.max_window) * PAGE_SIZE)
        self._zeros = ctypes.addressof(ctypes.c_char.from_buffer(self._zero_memory))
        self._first_access = self._refetch = self._write_protect = self._other = 0
        self._fetched = self._waited = 0  # pages; nanoseconds
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
        }

    def _latency(self, share: float) -> float:
        """So many µs at most took this share of the faults."""
        seen = list(itertools.accumulate(self._latencies))
        return round(_at_most(bisect.bisect_left(seen, share * seen[-1])), 3) if seen[-1] else 0.0

    def latencies(self) -> list[tuple[float, int]]:
        """(µs at most, how many faults took so long), ascending; without those that none took."""
        return [(_at_most(at), n) for at, n in enumerate(self._latencies) if n]

    def run(self) -> None:
        """Resolve faults until told to stop, or until the application has ended."""
        try:
            self._serve()
        finally:
            self._client.take_ack()
            for stream in self._readahead.asked():  # no answer may be left under way
                stream.ahead.client.answer_get()

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._uffd.fd, select.POLLIN)
        poll.register(self._commands_fd, select.POLLIN)
        while True:
            ready = poll.poll(0) or self._look_again(poll) or poll.poll()
            began = time.monotonic_ns()
            self._client.wake_dms()  # so that it wakes up while this thread reads the messages
            for fd, _ in ready:
                if fd == self._commands_fd and not self._obey(os.read(fd, 1)):
                    return
            for flags, address in self._uffd.read_faults():
                other = self._other
                try:
                    self._resolve(flags, address & -PAGE_SIZE)
                except (ProcessLookupError, Stopped):
                    return  # ESRCH, or LPET has stopped: the application has ended, or is about to
                if self._other > other:
                    continue  # it is there already, or waits for LPET and will come again
                took = time.monotonic_ns() - began
                self._waited += took
                bits = max(5, took.bit_length())
                self._latencies[16 * bits + (took >> bits - 5 & 15)] += 1

    def _obey(self, command: bytes) -> bool:
        """False for STOP."""
        if command == GIVE_UP:
            for stream in self._readahead.within(*self._lspt.unwanted):
                self._end(stream)
        return command != STOP

    def _look_again(self, poll: select.poll) -> list[tuple[int, int]]:
        """For EAGER seconds, offering the core at every look: the next fault is often near.

        And until what was asked for ahead has arrived: a large message needs both ends until then,
        and the DMS serves nobody else. Takes the ack of what it was told, too.
        """
        until = time.monotonic() + EAGER
        waiting = [self._client, *(stream.ahead.client for stream in self._readahead.asked())]
        looks = 0
        while time.monotonic() < until or not all(client.answered() for client in waiting):
            os.sched_yield()
            if ready := poll.poll(0):
                return ready
            looks += 1
            if looks % TESTS == 0:
                self._client.check_dms()
        self._take_ack()
        return []

    def _resolve(self, flags: int, address: int) -> None:
        page = (address - self._start) // PAGE_SIZE
        lspt = self._lspt
        write = bool(flags & UFFD_PAGEFAULT_FLAG_WRITE)
        if self._info:
            self._banner.info("\n--------------START HANDLING PAGE FAULT--------------")
            self._log.info("UFFD_EVENT_PAGEFAULT in address = %#x", address)
        with lspt.lock:
            state = lspt.state[page]
            if state == CLEAN and flags & UFFD_PAGEFAULT_FLAG_WP:
                pages = lspt.written(page)
                self._write_protect += 1
                start, length = self._start + pages.start * PAGE_SIZE, len(pages) * PAGE_SIZE
                try:
                    self._uffd.writeprotect(start, length, False)
                except FileNotFoundError:  # unmapped meanwhile, at least in part
                    self._uffd.writeprotect_mapped(start, length, False)
                    self._uffd.wake(address, PAGE_SIZE)
            elif state in (HELD_CLEAN, HELD_DIRTY):
                lspt.awaited.add(page)
                self._other += 1
                if self._info:
                    self._log.info("page in address : %#x is being evicted, wait for it", address)
        if state in (NEW, AWAY, COMING):
            self._fetch(page, write)
        elif state in (DIRTY, LOST) or state == CLEAN and not flags & UFFD_PAGEFAULT_FLAG_WP:
            self._uffd.wake(address, PAGE_SIZE)
            self._other += 1
        if self._info:
            self._banner.info("\n--------------FINISH HANDLING PAGE FAULT--------------\n")

    def _make_room(self) -> None:
        """See LSPT.ask_for_room."""
        while True:
            with self._lspt.lock:
                if not self._lspt.full():
                    return
                if self._info:
                    self._log.info("reached high threshold, waking up lpet")
                self._lspt.ask_for_room()
            self._obey(GIVE_UP)

    # ------------------------------------------------------------ fetching, and reading ahead

    def _fetch(self, page: int, write: bool) -> None:
        """A page that is not here: see to it that it comes."""
        came = range(0)
        while page not in came:
            # More than once if what was asked for ahead turns out shorter than up to this page;
            # the window that was asked for then may have it, or not.
            if self._lspt.state[page] == COMING:
                came = self._use_ahead(self._readahead.coming(page), write, page)
            else:
                came = self._get(page, write)

    def _get(self, page: int, write: bool) -> range:
        """A page that is NEW or AWAY: ask the DMS for it, and for more if a stream has come here.

        Returns the pages that came.
        """
        stream = self._readahead.fault(page)
        pages = range(page, page + 1)
        self._make_room()
        with self._lspt.lock:
            if not self._lspt.in_area(page):  # a second message of a fault that is long over
                self._uffd.wake(self._start + page * PAGE_SIZE, PAGE_SIZE)
                return pages
            if stream:
                pages = self._lspt.fetchable(stream.wanted(page)) or pages
            new = self._lspt.state[page] == NEW
            self._lspt.expect(pages)
        self._take_ack()
        if self._info:
            address = self._start + page * PAGE_SIZE
            self._log.info("send request for the page in address %#x from DMS", address)
        if new:
            self._client.tell_new(pages)
            self._first_access += 1
            if stream:
                self._readahead.used(stream, pages)
            self._install_all(pages, None, write, page)
        else:
            self._client.ask_get(pages)
            asked = pages
            pages = self._finish(Ahead(asked, self._client), stream, write, page)
            if not pages and asked.start == page:
                self._lose(page)
                pages = range(page, page + 1)
        for surplus in self._readahead.surplus():
            self._end(surplus)
        return pages

    def _lose(self, page: int) -> None:
        """The DMS can't give this page back: touching it is a SIGBUS from now on, never zeros."""
        address, reason = self._start + page * PAGE_SIZE, self._client.reason()
        self._log.error("page in address %#x can't be brought back: %s", address, reason)
        self._lspt.lost(page)
        try:
            # A page that was write-protected has left a mark of that in the page table, and poison
            # wants an empty place there (EEXIST).
            self._uffd.writeprotect_mapped(address, PAGE_SIZE, False)
            self._uffd.poison(address, PAGE_SIZE)
        except (FileNotFoundError, ProcessLookupError):
            self._uffd.wake(address, PAGE_SIZE)  # it is unmapped, or nobody is there any more
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTTY):
                raise
            raise DMSError(
                f"page in address {address:#x} can't be brought back: {reason}; and this kernel "
                "can't tell the application so (UFFDIO_POISON: Linux 6.6)"
            ) from None

    def _use_ahead(self, stream: Stream, write: bool, page: int) -> range:
        """A page that is COMING: its window was asked for ahead. Install it; the pages that came."""
        ahead = stream.ahead
        stream.ahead = None
        came = self._finish(ahead, stream, write, page)
        self._free_clients.append(ahead.client)  # not before: the pages came out of its memory
        return came

    def _finish(self, ahead: Ahead, stream: Stream | None, write: bool, page: int) -> range:
        """Wait for the answer, ask for the stream's next window, install; the pages that came."""
        kind, got = ahead.client.answer_get()
        pages, missed = ahead.pages[:got], ahead.pages[got:]
        if missed:
            self._lspt.not_coming(missed)
        if kind == UNREADABLE:
            if stream:
                self._readahead.ended(stream)
            return pages
        if stream:
            self._readahead.used(stream, pages)
            self._ask_ahead(stream)
        self._log_ack(pages, kind)
        if kind == CONTENT:
            self._refetch += 1
            self._install_all(pages, ahead.client.content_address, write, page)
        else:
            self._first_access += 1
            self._install_all(pages, None, write, page)
        return pages

    def _take_ack(self) -> None:
        if pages := self._client.take_ack():
            self._log_ack(pages, NEW_PAGES)

    def _log_ack(self, pages: range, kind: int) -> None:
        if self._info:
            address = self._start + pages[0] * PAGE_SIZE
            known = "previously accessed" if kind == CONTENT else "first access"
            self._log.info("received ack for page in address : %#x (%s)", address, known)

    def _install_all(self, pages: range, source: int | None, write: bool, page: int) -> None:
        """source: where their content is in this process; None for pages of zeros. page: which of
        them has faulted.
        """
        if self._info:
            what = "zero page" if source is None else "page content from DMS"
            self._log.info("copying %s to address : %#x", what, self._start + pages[0] * PAGE_SIZE)
        got = len(pages)
        self._fetched += got
        # The first few pages wake the application, which works on them while the rest comes.
        downward = page == pages[-1]
        done = 0
        while done < got:
            count = (FIRST_CHUNK if done == 0 else CHUNK) if pages.step == 1 else 1
            count = min(count, got - done)
            at = got - done - count if downward else done
            here = None if source is None else source + at * PAGE_SIZE
            self._install(pages[at : at + count], here, write)
            done += count

    def _install(self, pages: range, source: int | None, write: bool) -> None:
        """Neighbours. Those that are read first are write-protected, to know if they stay CLEAN."""
        address, length = self._start + pages.start * PAGE_SIZE, len(pages) * PAGE_SIZE
        dirty = write or not self._track_clean
        try:
            with self._lspt.installing:
                if source is not None:
                    self._uffd.copy(address, source, length, not dirty)
                elif dirty:
                    self._uffd.zeropage(address, length)
                else:
                    self._uffd.copy(address, self._zeros, length, True)
                self._lspt.arrived(pages, dirty)
            if self._came is not None:
                self._came.append((pages.start, len(pages)))
        except FileNotFoundError:
            # ENOENT: the application has unmapped the area under its own feet. Its fault is woken,
            # to find out. The DMS gets the pages back here, as the munmap may be over already.
            self._take_ack()
            self._client.evict_clean(pages)
            self._lspt.not_coming(pages)
            self._uffd.wake(address, length)

    def _ask_ahead(self, stream: Stream) -> None:
        """Ask for the stream's next window before it is needed, if there is room for it."""
        if not self._free_clients:
            return
        with self._lspt.lock:
            pages = self._lspt.fetchable(stream.wanted(stream.next))
            if len(pages) < 2 or self._lspt.state[pages.start] == NEW:
                return
            self._lspt.expect(pages)
        client = self._free_clients.pop()
        client.ask_get(pages)
        stream.ahead = Ahead(pages, client)

    def _end(self, stream: Stream) -> None:
        """End a stream. A window that it has asked for goes back to the DMS, unused."""
        ahead = stream.ahead
        self._readahead.ended(stream)
        if ahead:
            _, got = ahead.client.answer_get()
            if got:
                ahead.client.evict_clean(ahead.pages[:got])
            self._free_clients.append(ahead.client)
            self._lspt.not_coming(ahead.pages)


def _at_most(bucket: int) -> float:
    """The longest latency in a bucket, in µs."""
    bits, part = divmod(bucket, 16)
    return (17 + part) * 2.0 ** (bits - 5) / 1000
