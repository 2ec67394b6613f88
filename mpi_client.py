"""MpiClient: an instance's end of the MPI arrow. Sends a request, waits for the DMS's answer.

In the picture: between the pager's threads and the DMS.

Interface: a method for each kind of request in messages.py: hello, free, locations, sync, bye; for
those that a thread has other work to do during, two: ask_get and answer_get, ask_evict and
answer_evict (which are STORE's too), tell_new and take_ack; and set_bell, once hello has given one.
Each raises DMSError with the DMS's reason if it refuses, and DMSGone if there is none any more, as
far as the doorbell can tell: of one on another machine, the launcher tells.

Rules: an MpiClient belongs to one thread, which may have several, each with a tag of its own; so
no lock, and an answer can only go to who asked. One request at a time. Buffers are made once. An
answer's content stays in the client's memory, valid until the next request.

Waiting: MPI has no wait that sleeps. The DM-Handler tests in a loop and offers its core
(sched_yield) after every test, because an answer takes microseconds; LPET and the main thread,
which nobody waits for, sleep between tests.
"""

from __future__ import annotations

import ctypes
import os
import time

from mpi4py import MPI

from edm import log
from edm import messages as m
from edm.doorbell import ADDRESS, Bell

PATIENCE = 50e-6  # seconds that a patient client sleeps between two tests
TESTS = 256  # after so many, it looks whether there still is a DMS


class MpiClient:
    def __init__(
        self, comm: MPI.Comm, dms: int, tag: int, patient: bool, start_addr: int = 0
    ) -> None:
        """Talks with rank dms of comm. A patient client sleeps while it waits.

        start_addr: of the space, for the log.
        """
        self._start = start_addr
        self.answer = m.MessageBuffer()
        self.question = m.MessageBuffer()
        self.content = self.answer.body  # where the bytes of a CONTENT answer are
        self.content_address = ctypes.addressof(ctypes.c_char.from_buffer(self.content))
        self.bytes_sent = self.bytes_received = 0  # of page content
        self._comm, self._dms, self._tag, self._patient = comm, dms, tag, patient
        self._receive = comm.Recv_init([self.answer.whole, MPI.BYTE], dms, tag)
        self._bell: Bell | None = None
        self._told = range(0)  # pages of tell_new whose ack was not taken yet
        self._asked_at = 0.0
        self._awake_until = 0.0  # the DMS is surely awake until then, in seconds of the clock
        self._log = log.logger("MpiClient")
        self._debug = self._log.isEnabledFor(log.logging.DEBUG)

    def wake_dms(self) -> None:
        """Ring if the DMS may be asleep: with a request, or earlier, when one is sure to come."""
        now = time.monotonic()
        if self._bell and now > self._awake_until:
            self._bell.ring()
            self._awake_until = now + m.AWAKE

    def check_dms(self) -> None:
        """Raises DMSGone if there is no DMS any more, as far as the bell can tell."""
        if self._bell and self._bell.is_broken():
            raise m.DMSGone("the DMS has died")

    def set_bell(self, bell: Bell | None) -> None:
        """Ring it from now on, when the DMS may be asleep."""
        self._bell = bell

    # ------------------------------------------------------------ the requests

    def hello(self, start_addr: int, end_addr: int) -> tuple[bool, Bell | None]:
        """Tell the DMS the geometry (bytes) of this instance's space.

        Returns whether its disk is a kept one, so that it may have pages already; and its doorbell's
        bell, for every client of this instance, None if it can't be reached.
        """
        geometry = m.GEOMETRY.pack(m.VERSION, m.PAGE_SIZE, start_addr, end_addr)
        self.question.body[: len(geometry)] = geometry
        _, kept = self.request(m.HELLO, body_length=len(geometry))
        try:
            bell = Bell(bytes(self.content[: ADDRESS.size]))
        except OSError as error:
            self._log.info("no doorbell: %s", error)
            return bool(kept), None
        self.request(m.RINGS)
        return bool(kept), bell

    def ask_get(self, pages: range) -> None:
        """Ask for these pages, at most MAX_PAGES, and wait for nothing."""
        page = pages.start
        if self._debug:
            address = self._start + page * m.PAGE_SIZE
            self._log.debug("send DmHandler's request for the page in address %#x", address)
        self._asked = page
        self._ask(m.GET, len(pages), page, stride=pages.step)

    def answer_get(self) -> tuple[int, int]:
        """Wait for the answer: (NEW_PAGES or CONTENT, for how many of the pages it is).

        (UNREADABLE, 0) if the first one's bytes are lost; reason() then tells why.
        """
        kind, got = self._answer()
        if kind == m.UNREADABLE:
            self._reason = self._text(got)
            got = 0
        if self._debug:
            address = self._start + self._asked * m.PAGE_SIZE
            self._log.debug("get DMS's response for the page in address %#x", address)
            self._log.debug("RequestPageFromDMS succeeded. ")
        if kind == m.CONTENT:
            self.bytes_received += got * m.PAGE_SIZE
        return kind, got

    def reason(self) -> str:
        return self._reason

    def tell_new(self, pages: range) -> None:
        """Tell the DMS that the instance has taken these pages, which were NEW; wait for nothing."""
        self.ask_get(pages)
        self._told = pages

    def answered(self) -> bool:
        """Has the answer to what was asked last arrived? Then waiting for it takes no time."""
        return self._receive.Test()

    def take_ack(self) -> range:
        """Wait for the ack of what tell_new has told, if it was not taken yet. Of which pages?"""
        told, self._told = self._told, range(0)
        if told and self.answer_get() != (m.NEW_PAGES, len(told)):
            raise m.DMSError(f"{told} were taken for new, and the DMS has some of them")
        return told

    def ask_evict(self, runs: int, content_length: int, stay: bool = False) -> None:
        """Send the run table and the content (bytes) that question.body holds; wait for nothing.

        stay: the pages stay in the instance.
        """
        kind = m.STORE if stay else m.EVICT
        self._ask(kind, runs, 0, runs * m.RUN.size + content_length)
        self.bytes_sent += content_length

    def answer_evict(self) -> None:
        """Wait until the DMS has written what was sent."""
        self._answer()

    def evict_clean(self, pages: range) -> None:
        """Give back pages, at most MAX_RUNS, that were not written: EVICT without bytes."""
        for index, page in enumerate(pages):
            m.RUN.pack_into(self.question.body, index * m.RUN.size, page, 1, 0)
        self.ask_evict(len(pages), 0)
        self.answer_evict()

    def free(self, page: int, count: int) -> None:
        """Let count pages from page be as if they were never accessed."""
        self.request(m.FREE, count, page)

    def locations(self, page: int, count: int) -> bytes:
        """The SPT's byte of each of count pages from page, as dms.SPT has them."""
        parts = []
        for at in range(page, page + count, m.MAX_LOCATIONS):
            _, got = self.request(m.LOCATIONS, min(m.MAX_LOCATIONS, page + count - at), at)
            parts.append(bytes(self.answer.body[:got]))
        return b"".join(parts)

    def sync(self) -> None:
        """Wait until everything that was sent would survive a crash."""
        self.request(m.SYNC)

    def bye(self) -> None:
        """The last request: this instance has ended."""
        self.request(m.BYE)

    # ------------------------------------------------------------ asking and waiting

    def request(
        self, kind: int, count: int = 0, page: int = 0, body_length: int = 0
    ) -> tuple[int, int]:
        """Send question with this header, wait for the answer: its kind and its count."""
        self._ask(kind, count, page, body_length)
        return self._answer()

    def _ask(self, kind: int, count: int, page: int, body_length: int = 0, stride: int = 0) -> None:
        self.question.head(kind, count, page, stride)
        self._receive.Start()
        message = [self.question.message(body_length), MPI.BYTE]
        self._sending = self._comm.Isend(message, self._dms, self._tag)
        self.wake_dms()
        self._asked_at = time.monotonic()

    def _answer(self) -> tuple[int, int]:
        # A large message travels only while both ends look after it: no sleeping here.
        self._wait(self._sending, patient=False)
        self._wait(self._receive, self._patient)
        # Counted from the request: the answer may have lain here for a while.
        self._awake_until = self._asked_at + m.AWAKE
        kind, _, count, _ = m.HEADER.unpack_from(self.answer.whole)
        if kind == m.ERROR:
            raise m.DMSError(self._text(count))
        return kind, count

    def _text(self, length: int) -> str:
        return bytes(self.content[:length]).decode(errors="replace")

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
                self.check_dms()
