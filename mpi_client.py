"""MpiStore: the pager's store over MPI. Each method of PageStore's is a message to the DMS.

In the picture: between the pager's threads and the DMS.

Interface: MpiStore(comm, dms, start_addr, end_addr), with the methods that a pager calls of a PageStore,
and what they say there holds here. Each raises OSError with the DMS's errno and reason if it refuses;
and DMSGone if its process has ended, as far as that can be told: of one on another machine, the
launcher tells.

Rules: any thread may call any method, but one alone calls take_get. A request has a slot to itself,
which is an MPI tag and the buffers for a question and its answer, until it is done with: so no lock,
and an answer can only reach who asked. As many slots are made as there are requests at once.

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
from collections.abc import Iterator, Sequence
from contextlib import suppress
from logging import DEBUG

from mpi4py import MPI

from edm import log
from edm import messages as m
from edm.lspt import Run, runs
from edm.page_store import ON_DISK, Bytes
from edm.uffd_ctypes import PAGE_SIZE

PATIENCE = 50e-6  # seconds that who is patient sleeps between two tests
TESTS = 256  # after so many, it looks whether there still is a DMS
LAST_WORDS = 0.5  # seconds for what the DMS has sent before its end: it need not have died


class Slot:
    """An MPI tag, and memory for a question and for its answer."""

    def __init__(self, comm: MPI.Comm, dms: int, tag: int) -> None:
        self.question, self.answer = m.MessageBuffer(), m.MessageBuffer()
        self.content_address = ctypes.addressof(ctypes.c_char.from_buffer(self.answer.body))
        self.address = 0  # of the first page that was asked for
        self._comm, self._dms, self._tag = comm, dms, tag

    def send(self, kind: int, count: int, page: int, more: int, length: int = 0) -> None:
        """Send the question, whose body is so long (bytes); wait for nothing."""
        self.question.head(kind, count, page, more)
        self.receiving = self._comm.Irecv([self.answer.whole, MPI.BYTE], self._dms, self._tag)
        message = [self.question.message(length), MPI.BYTE]
        self.sending = self._comm.Isend(message, self._dms, self._tag)


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
        self._slots: list[Slot] = []  # those that are free
        self._taken: Slot | None = None  # what take_get gave is in there
        self._tags = itertools.count()
        self._process = -1  # the DMS's pidfd, if it is on this machine
        self._ended_since = 0.0  # seconds of the clock
        geometry = m.GEOMETRY.pack(m.VERSION, PAGE_SIZE, start_addr, end_addr)
        try:
            kept, pid, *there = m.WELCOME.unpack(self._request(m.HELLO, 0, 0, 0, geometry))
        except OSError:
            self.close()
            raise
        self.kept = bool(kept)
        if tuple(there) == m.pids_are_of():
            self._process = os.pidfd_open(pid)

    # ------------------------------------------------------------ what a PageStore does

    def ask_get(self, pages: range) -> Slot:
        """See PageStore."""
        slot = self._slot()
        slot.address = self._start + pages.start * PAGE_SIZE
        if self._debug:
            self._log.debug("send DmHandler's request for the page in address %#x", slot.address)
        slot.send(m.GET, len(pages), pages.start, pages.step)
        return slot

    def take_get(self, asked: Slot) -> tuple[int, int, int]:
        """See PageStore."""
        if self._taken:
            self._slots.append(self._taken)
        self._taken = asked
        kind, got = self._answer(asked, patient=False)
        if self._debug:
            self._log.debug("get DMS's response for the page in address %#x", asked.address)
            self._log.debug("RequestPageFromDMS succeeded. ")
        return kind, got, asked.content_address

    def drop_get(self, asked: Slot) -> None:
        """See PageStore."""
        with suppress(OSError):  # it could not be read: so what
            self._answer(asked, patient=False)
        self._slots.append(asked)

    def put(self, gone: Sequence[Run], dirty: Sequence[Bytes]) -> None:
        """See PageStore. What lies between the ranges goes too: that is only where the SPT says that a
        page is, and LSPT.located knows better."""
        written = [(first, len(part) // PAGE_SIZE) for first, part in dirty]
        if not (gone or written):
            return
        page, end = (gone or written)[0][0], sum((gone or written)[-1])
        table, parts = b"".join(m.RUN.pack(*run) for run in written), [part for _, part in dirty]
        kind, address = m.EVICT if gone else m.STORE, self._start + page * PAGE_SIZE
        if gone:
            self._log.debug("send lpet's request to evict page in address %#x", address)
        self._request(kind, end - page, page, len(dirty), table, *parts)
        if gone:
            self._log.debug("got ack for evict page of lpet in address %#x Ack message : ", address)

    def take_from(self, pipe: int, page: int, content: memoryview) -> bool:
        """See PageStore. It never does, as the bytes go into a message."""
        if os.readv(pipe, [content]) < len(content):
            raise RuntimeError("readv: the pipe has less than was put into it")
        return False

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
        for at in range(0, self._pages if self.kept else 0, m.MAX_LOCATIONS):
            states = self.locations(at, min(m.MAX_LOCATIONS, self._pages - at))
            yield from runs(at, states, ON_DISK)

    def close(self) -> None:
        """The last request: BYE, this instance has ended."""
        self._request(m.BYE)
        if self._process >= 0:
            os.close(self._process)

    # ------------------------------------------------------------ asking and waiting

    def _slot(self) -> Slot:
        try:
            return self._slots.pop()
        except IndexError:
            return Slot(self._comm, self._dms, next(self._tags))

    def _request(
        self, kind: int, count: int = 0, page: int = 0, more: int = 0, *body: bytes | memoryview
    ) -> bytes:
        """Send this, wait patiently for the answer: its body."""
        slot, length = self._slot(), 0
        for part in body:
            slot.question.body[length : length + len(part)] = part
            length += len(part)
        slot.send(kind, count, page, more, length)
        try:
            _, length = self._answer(slot)
            return bytes(slot.answer.body[:length])
        finally:
            self._slots.append(slot)

    def _answer(self, slot: Slot, patient: bool = True) -> tuple[int, int]:
        """Wait for the answer: its kind and its count."""
        # A large message travels only while both ends look after it: no sleeping here.
        self._wait(slot.sending, False)
        self._wait(slot.receiving, patient)
        kind, _, count, _ = m.HEADER.unpack_from(slot.answer.whole)
        if kind == m.ERROR:
            raise m.error_of(bytes(slot.answer.body[:count]))
        return kind, count

    def _wait(self, request: MPI.Request, patient: bool) -> None:
        for tests in itertools.count(1):
            if request.Test():
                return
            if patient:
                time.sleep(PATIENCE)
            else:
                os.sched_yield()
            if tests % TESTS == 0 and self._process >= 0:
                self._check_dms()

    def _check_dms(self) -> None:
        """Raises DMSGone if the DMS's process has ended, and this has been known for LAST_WORDS."""
        poll = select.poll()  # one of its own: another thread may be in here too
        poll.register(self._process, select.POLLIN)
        if poll.poll(0):
            now = time.monotonic()
            self._ended_since = self._ended_since or now
            if now - self._ended_since > LAST_WORDS:
                raise m.DMSGone("the DMS has died")
