"""MpiStore: the pager's store over MPI. Each method of PageStore's is a message to the DMS.

In the picture: between the pager's threads and the DMS.

Interface: MpiStore(comm, dms, start_addr, end_addr), with the methods that a pager calls of a PageStore,
and what they say there holds here. Each raises OSError with the DMS's errno and reason if it refuses;
and DMSGone if its process has ended, as far as that can be told: of one on another machine, the
launcher tells.

Rules: any thread may call any method. A request has a slot to itself, which is an MPI tag and the
buffers for a question and its answer, until it is done with: so no lock, and an answer can only reach
who asked. As many slots are made as there are requests at once.

Waiting: MPI has no wait that sleeps. Who waits for a page tests in a loop and offers its core
(sched_yield) after every test, because an answer takes microseconds. Who is patient, because nobody
waits for it, sleeps between tests.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import select
import time
from collections import deque
from collections.abc import Iterator, Sequence
from logging import DEBUG

from mpi4py import MPI

from edm import log
from edm import messages as m
from edm.page_store import CONTENT, NEW_PAGES, SPT, PutRun, Run, take_dirty
from edm.uffd_ctypes import PAGE_SIZE

PATIENCE = 50e-6  # seconds that who is patient sleeps between two tests
TESTS = 256  # after so many, it looks whether there still is a DMS
LAST_WORDS = 0.5  # seconds for what the DMS has sent before its end: it need not have died


class Slot:
    """An MPI tag, and memory for a question and for its answer."""

    def __init__(self, comm: MPI.Comm, dms: int, tag: int) -> None:
        self.question, self.answer = m.MessageBuffer(), m.MessageBuffer()
        self.content_address = ctypes.addressof(ctypes.c_char.from_buffer(self.answer.body))
        self._comm, self._dms, self._tag = comm, dms, tag
        self.receiving = comm.Recv_init([self.answer.whole, MPI.BYTE], dms, tag)

    def send(
        self, kind: int, count: int = 0, page: int = 0, length: int = 0, stride: int = 0
    ) -> None:
        """Send the question, whose body is so long (bytes); wait for nothing."""
        self.question.head(kind, count, page, stride)
        self.receiving.Start()
        message = [self.question.message(length), MPI.BYTE]
        self.sending = self._comm.Isend(message, self._dms, self._tag)


class Asked:
    """Pages that were asked for: what MpiStore.ask_get returns."""

    def __init__(self, store: MpiStore, slot: Slot, pages: range) -> None:
        self._store, self._slot, self._pages = store, slot, pages
        self._taken = False
        self._lost: OSError | None = None

    def take(self) -> tuple[int, int]:
        """See page_store.Asked. Of a first page that can't be read it says CONTENT, and content raises."""
        kind, got = self._store.answer(self._slot)
        self._taken = True
        self._store.log_answer(self._pages.start)
        if kind not in (NEW_PAGES, CONTENT):
            self._lost = m.error_of(bytes(self._slot.answer.body[:got]))
            kind, got = CONTENT, 1
        self._pages = self._pages[:got]
        return kind, got

    def content(self, at: int, count: int) -> int:
        """See page_store.Asked. They are there until done()."""
        if self._lost:
            raise self._lost
        return self._slot.content_address + at * PAGE_SIZE

    def give_back(self, at: int, end: int | None = None) -> None:
        """See page_store.Asked."""
        if pages := self._pages[at:end]:
            self._store.give_back(pages)

    def done(self) -> None:
        """Nothing more will be asked of it. If it was not taken, it is given back."""
        if not self._taken:
            self.take()
            self.give_back(0)
        self._store.slots.append(self._slot)


class MpiStore:
    def __init__(self, comm: MPI.Comm, dms: int, start_addr: int, end_addr: int) -> None:
        """The pages of this rank's instance that rank dms of comm has.

        Says HELLO. Raises OSError if it is refused, because the two differ in their settings; then it
        has said BYE, too.
        """
        self._comm, self._dms, self._start = comm, dms, start_addr
        self._pages = (end_addr - start_addr) // PAGE_SIZE
        self._log = log.logger("MpiClient")
        self._debug = self._log.isEnabledFor(DEBUG)
        self._null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self.slots: deque[Slot] = deque()  # those that are free
        self._tags = itertools.count()
        self._process = -1  # the DMS's pidfd, if it is on this machine
        self._ended_since = 0.0  # seconds of the clock
        geometry = m.GEOMETRY.pack(m.VERSION, PAGE_SIZE, start_addr, end_addr)
        try:
            kept, pid, *there = m.WELCOME.unpack(self._request(m.HELLO, body=geometry))
        except OSError:
            self.close()
            raise
        self.kept = bool(kept)
        if tuple(there) == m.pids_are_of():
            self._process = os.pidfd_open(pid)

    # ------------------------------------------------------------ what a PageStore does

    def ask_get(self, pages: range) -> Asked:
        """See PageStore."""
        if self._debug:
            address = self._start + pages.start * PAGE_SIZE
            self._log.debug("send DmHandler's request for the page in address %#x", address)
        slot = self._slot()
        slot.send(m.GET, len(pages), pages.start, stride=pages.step)
        return Asked(self, slot, pages)

    def put(self, runs: Sequence[PutRun], pipe: int, stay: bool = False) -> None:
        """See PageStore."""
        slot = self._slot()
        begin = len(runs) * m.RUN.size
        length = take_dirty(runs, pipe, slot.question.body[begin:], self._null)
        self._put(slot, m.STORE if stay else m.EVICT, runs, begin + length)

    def free(self, page: int, count: int) -> None:
        """See PageStore."""
        self._request(m.FREE, count, page)

    def sync(self) -> None:
        """See PageStore."""
        self._request(m.SYNC)

    def locations(self, page: int, count: int) -> bytes:
        """See PageStore."""
        parts = []
        for at in range(page, page + count, m.MAX_LOCATIONS):
            many = min(m.MAX_LOCATIONS, page + count - at)
            parts.append(self._request(m.LOCATIONS, many, at))
        return b"".join(parts)

    def runs_on_disk(self) -> Iterator[Run]:
        """See PageStore."""
        if not self.kept:
            return
        for at in range(0, self._pages, m.MAX_LOCATIONS):
            states = self.locations(at, min(m.MAX_LOCATIONS, self._pages - at))
            for found in SPT.ON_DISK.finditer(states):
                yield at + found.start(), len(found[0])

    def close(self) -> None:
        """The last request: BYE, this instance has ended."""
        try:
            self._request(m.BYE)
        finally:
            os.close(self._null)
            for slot in self.slots:
                slot.receiving.Free()
            if self._process >= 0:
                os.close(self._process)

    # ------------------------------------------------------------ asking and waiting

    def _slot(self) -> Slot:
        try:
            return self.slots.pop()
        except IndexError:
            return Slot(self._comm, self._dms, next(self._tags))

    def _request(self, kind: int, count: int = 0, page: int = 0, body: bytes = b"") -> bytes:
        """Send this, wait patiently for the answer: its body."""
        slot = self._slot()
        slot.question.body[: len(body)] = body
        slot.send(kind, count, page, len(body))
        return self._finish(slot)

    def _put(self, slot: Slot, kind: int, runs: Sequence[PutRun], length: int) -> None:
        """Send the runs; the body is so long (bytes), and has the content already."""
        for index, run in enumerate(runs):
            m.RUN.pack_into(slot.question.body, index * m.RUN.size, *run)
        slot.send(kind, len(runs), 0, length)
        self._finish(slot)

    def _finish(self, slot: Slot) -> bytes:
        kind, length = self.answer(slot, patient=True)
        body = bytes(slot.answer.body[:length])
        self.slots.append(slot)
        if kind == m.ERROR:
            raise m.error_of(body)
        return body

    def give_back(self, pages: range) -> None:
        """These pages, at most MAX_PAGES, go as they came: EVICT without bytes."""
        runs = [(page, 1, False) for page in pages]
        self._put(self._slot(), m.EVICT, runs, len(runs) * m.RUN.size)

    def answer(self, slot: Slot, patient: bool = False) -> tuple[int, int]:
        """Wait for the answer: its kind and its count."""
        # A large message travels only while both ends look after it: no sleeping here.
        self._wait(slot.sending, False)
        self._wait(slot.receiving, patient)
        kind, _, count, _ = m.HEADER.unpack_from(slot.answer.whole)
        return kind, count

    def log_answer(self, page: int) -> None:
        if self._debug:
            address = self._start + page * PAGE_SIZE
            self._log.debug("get DMS's response for the page in address %#x", address)
            self._log.debug("RequestPageFromDMS succeeded. ")

    def _wait(self, request: MPI.Request, patient: bool) -> None:
        # A test that succeeds ends a one-time request and readies a persistent one for Start.
        tests = 0
        while not request.Test():
            if patient:
                time.sleep(PATIENCE)
            else:
                os.sched_yield()
            tests += 1
            if tests % TESTS == 0:
                self._check_dms()

    def _check_dms(self) -> None:
        """Raises DMSGone if the DMS's process has ended, and this has been known for LAST_WORDS."""
        if self._process < 0:
            return
        poll = select.poll()  # one of its own: another thread may be in here too
        poll.register(self._process, select.POLLIN)
        if poll.poll(0):
            now = time.monotonic()
            self._ended_since = self._ended_since or now
            if now - self._ended_since > LAST_WORDS:
                raise m.DMSGone("the DMS has died")
