"""DM-Handler: the thread that resolves the application's page faults.

In the picture: in the pager process, between the userfaultfd and the DMS.

Interface: run() is the thread; faults and latencies are its figures.

One fault, from the message to the woken application:

    run             reads the messages that are waiting
    _resolve        looks at the page's state in the LSPT and decides:
                      HELD            LPET has it in its hands and will wake the fault: note that
                      CLEAN, DIRTY    it is there already (another thread's fault): wake;
                                      a first write to a CLEAN page: allow writing, which wakes
                      ABSENT          fetch it
    _fetch          waits for room if high_threshold pages are here ("avoid memory flood"), asks
                    the DMS, and installs what comes, which wakes:
                      first access           zero page
                      previously accessed    the content

Rules: this thread is the only one that reads the userfaultfd and that makes pages COME. It never
holds the LSPT's lock while it waits for MPI; it does while it lifts a page's write-protection,
because LPET must find either a protected CLEAN page or a writable DIRTY one.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import time
from array import array
from logging import INFO

from edm import log
from edm.lspt import ABSENT, CLEAN, DIRTY, LSPT, Stopped
from edm.messages import CONTENT
from edm.mpi_client import MpiClient
from edm.uffd_ctypes import (
    PAGE_SIZE,
    UFFD_PAGEFAULT_FLAG_WP,
    UFFD_PAGEFAULT_FLAG_WRITE,
    Userfaultfd,
)

EAGER = 200e-6  # seconds after a fault in which this thread does not sleep
LATENCY_BUCKETS = 8192  # of 1.024 µs each; the last one takes all that is slower


class DmHandler:
    def __init__(
        self, uffd: Userfaultfd, client: MpiClient, lspt: LSPT, start_addr: int, stop_fd: int
    ) -> None:
        """run() ends when stop_fd becomes readable."""
        self._uffd, self._client, self._lspt, self._start = uffd, client, lspt, start_addr
        self._stop_fd = stop_fd
        self._log, self._banner = log.logger("DmHandler"), log.logger()
        self._info = self._log.isEnabledFor(INFO)
        # The source of a zero page that is to be write-protected, which UFFDIO_ZEROPAGE can't do
        # in one step with the installing.
        self._zero_memory = mmap.mmap(-1, PAGE_SIZE)
        self._zeros = ctypes.addressof(ctypes.c_char.from_buffer(self._zero_memory))
        self._first_access = self._refetch = self._write_protect = self._other = 0
        self._latencies = array("Q", bytes(8 * LATENCY_BUCKETS))

    def figures(self) -> dict[str, object]:
        """Counts of faults by kind; the median and the 99th percentile of their latency, in µs.

        Latency: from the message's arrival to the woken application, as this thread sees it.
        """
        return {
            "faults_first_access": self._first_access,
            "faults_refetch": self._refetch,
            "faults_write_protect": self._write_protect,
            "faults_other": self._other,
            "latency_median": self._latency(0.5),
            "latency_99th": self._latency(0.99),
        }

    def _latency(self, share: float) -> float:
        """So many µs at most took this share of the faults."""
        seen, wanted = 0, share * sum(self._latencies)
        for bucket, faults in enumerate(self._latencies):
            seen += faults
            if seen >= wanted:
                return round((bucket + (faults > 0)) * 1.024, 3)
        return 0.0

    def run(self) -> None:
        """Resolve faults until told to stop, or until the application has ended."""
        poll = select.poll()
        poll.register(self._uffd.fd, select.POLLIN)
        poll.register(self._stop_fd, select.POLLIN)
        while True:
            ready = poll.poll(0) or self._look_again(poll) or poll.poll()
            if any(fd == self._stop_fd for fd, _ in ready):
                return
            began = time.monotonic_ns()
            self._client.wake_dms()  # so that it wakes up while this thread reads the messages
            for flags, address in self._uffd.read_faults():
                try:
                    self._resolve(flags, address & -PAGE_SIZE)
                except (ProcessLookupError, Stopped):
                    return  # ESRCH, or LPET has stopped: the application has ended, or is about to
                bucket = min(time.monotonic_ns() - began >> 10, LATENCY_BUCKETS - 1)
                self._latencies[bucket] += 1

    @staticmethod
    def _look_again(poll: select.poll) -> list[tuple[int, int]]:
        """For EAGER seconds, offering the core at every look: the next fault is often near."""
        until = time.monotonic() + EAGER
        while time.monotonic() < until:
            os.sched_yield()
            if ready := poll.poll(0):
                return ready
        return []

    def _resolve(self, flags: int, address: int) -> None:
        page = (address - self._start) // PAGE_SIZE
        lspt = self._lspt
        if self._info:
            self._banner.info("\n--------------START HANDLING PAGE FAULT--------------")
            self._log.info("UFFD_EVENT_PAGEFAULT in address = %#x", address)
        with lspt.lock:
            state = lspt.state[page]
            if state == CLEAN and flags & UFFD_PAGEFAULT_FLAG_WP:
                lspt.written(page)
                self._uffd.writeprotect(address, PAGE_SIZE, False)
                self._write_protect += 1
            elif state == ABSENT:
                self._make_room(address)
                lspt.expect(page, 1)
            elif state not in (CLEAN, DIRTY):
                lspt.awaited.add(page)
                self._other += 1
                if self._info:
                    self._log.info("page in address : %#x is being evicted, wait for it", address)
        if state == ABSENT:
            self._fetch(page, address, bool(flags & UFFD_PAGEFAULT_FLAG_WRITE))
        elif state == DIRTY or state == CLEAN and not flags & UFFD_PAGEFAULT_FLAG_WP:
            self._uffd.wake(address, PAGE_SIZE)
            self._other += 1
        if self._info:
            self._banner.info("\n--------------FINISH HANDLING PAGE FAULT--------------\n")

    def _make_room(self, address: int) -> None:
        """Locked: see LSPT.ask_for_room."""
        if self._lspt.full():
            if self._info:
                self._log.info("reached high threshold, waking up lpet")
            self._lspt.ask_for_room()

    def _fetch(self, page: int, address: int, write: bool) -> None:
        if self._info:
            self._log.info("send request for the page in address %#x from DMS", address)
        kind, _ = self._client.get(page, 1)
        if self._info:
            known = "previously accessed" if kind == CONTENT else "first access"
            self._log.info("received ack for page in address : %#x (%s)", address, known)
            what = "page content from DMS" if kind == CONTENT else "zero page"
            self._log.info("copying %s to address : %#x", what, address)
        try:
            self._install(page, address, kind == CONTENT, write)
        except FileNotFoundError:
            # ENOENT: the application has unmapped the area under its own feet. Its fault is woken,
            # to find out; the munmap that is under way tells the DMS.
            self._lspt.not_coming(page, 1)
            self._uffd.wake(address, PAGE_SIZE)

    def _install(self, page: int, address: int, content: bool, write: bool) -> None:
        """A page that is read first is write-protected, to know later that it is still CLEAN."""
        if content:
            self._uffd.copy(address, self._client.content_address, PAGE_SIZE, not write)
            self._refetch += 1
        else:
            if write:
                self._uffd.zeropage(address, PAGE_SIZE)
            else:
                self._uffd.copy(address, self._zeros, PAGE_SIZE, True)
            self._first_access += 1
        self._lspt.arrived(page, 1, dirty=write)
