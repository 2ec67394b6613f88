"""DMS, the disk manager server: serves a PageStore to each instance, over MPI.

In the picture: the box on the right, rank 0 of the job, if that has many machines. Of several DMSs, the
ranks from 0 on, each has a share of every instance's pages (stripes.py).

Interface: DMS(comm, ...).serve() answers the instances' requests until the last has said BYE.

Rules: A request is checked before anything is changed, and one that is wrong is answered with ERROR
and a reason; nothing that arrives ends the DMS, SIGTERM and SIGINT neither: the instances end it, when
they have written back what they hold. An eviction is acknowledged when its bytes are written to the
disk file. Which pages an instance has, it knows itself: an EVICT of a page that is elsewhere in the SPT
has overtaken the GET.

Nobody waits for another instance. One thread receives, answers and sends, and is never blocked in any of
these: a message that is under way stays so while others are served, however long its other end takes. A
sync takes as long as the disk does, so each has a thread of its own, which calls no MPI.

Waiting: MPI has no wait that sleeps. After a message the DMS looks for the next one without pause
for a moment, offering its core at every look. Then it naps between looks, the longer the silence.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mpi4py import MPI

from edm import log
from edm import messages as m
from edm.page_store import CONTENT, PageStore
from edm.stripes import ALL, Share
from edm.uffd_ctypes import PAGE_SIZE, PAGES_AT_ONCE, PR_SET_TIMERSLACK, prctl

EAGER = 500e-6  # seconds after a message in which the DMS does not sleep
LOOK = 10e-6  # seconds that a look takes
# A nap between two looks is a part of the silence so far: so who asks two DMSs in turn, and finds one in a
# nap, does not find the other one in a longer nap then. With naps that doubled, a random read of two DMSs
# took 1300 µs.
NAPS, LONGEST_NAP = 16, 2e-3  # of a silence; seconds

# Seconds. A thread that holds the GIL keeps it for at most so long when another one wants it; the
# default of 5 ms is what an instance would wait while a sync computes.
SWITCH_INTERVAL = 50e-6


class Exchange:
    """A question and its answer: memory for both, and how far they are."""

    def __init__(self) -> None:
        self.question, self.answer = m.MessageBuffer(), m.MessageBuffer()
        self.failure: Exception | None = None  # a thread's, which ends the DMS

    def receives(self, source: int, tag: int, length: int, receiving: MPI.Request) -> None:
        """The question is under way. length: of it (bytes)."""
        self.source, self.tag, self.length, self.moving = source, tag, length, receiving

    def asks(self, kind: int, more: int, pages: range, body: memoryview) -> None:
        """What the question says: see messages.py."""
        self.kind, self.more, self.pages, self.body = kind, more, pages, body

    def reply(self, kind: int, body: bytes) -> int:
        """Write the answer; its body's length."""
        self.answer.body[: len(body)] = body
        self.answer.head(kind, len(body))
        return len(body)


class DMS:
    def __init__(
        self, comm: MPI.Comm, path: str | None, start_addr: int, end_addr: int, keep: bool = False,
        share: Share = ALL,
    ) -> None:  # fmt: skip
        """The server of every rank of comm that is no DMS.

        path: the disk file of the first instance; a further one's has its number added. keep: as
        Config's. share: the pages that it has. Raises OSError when a disk can't be made, ValueError
        when it is not to be used.
        """
        self._comm, self._first = comm, share.of  # the first rank that is an instance
        self._geometry = (m.VERSION, PAGE_SIZE, start_addr, end_addr, *share[1:])
        self._stores = []
        for instance in range(comm.size - share.of):
            own = path if path is None or instance == 0 else f"{path}.{instance}"
            self._stores.append(PageStore(own, start_addr, end_addr, keep, instance, share))
        self._pages = share.below((end_addr - start_addr) // PAGE_SIZE)
        self._syncs = {store: threading.Lock() for store in self._stores}
        self._receiving: list[Exchange] = []  # their questions are under way
        self._working: list[tuple[Exchange, threading.Thread]] = []
        self._sending: list[Exchange] = []  # their answers are under way
        self._unused: list[Exchange] = []
        self._log = log.logger("DMS")
        # What does each request; at most, how many pages, which `more`, and how long a body (bytes).
        self._requests: dict[int, tuple[Callable[..., int | None], int, int, int]] = {
            m.HELLO: (self._hello, 0, 0, m.GEOMETRY.size),
            m.GET: (self._get, PAGES_AT_ONCE, m.MAX_STRIDE, 0),
            m.EVICT: (self._put, PAGES_AT_ONCE, PAGES_AT_ONCE, m.MAX_MESSAGE),
            m.STORE: (self._put, PAGES_AT_ONCE, PAGES_AT_ONCE, m.MAX_MESSAGE),
            m.START: (self._start, 0, 0, m.EPOCH.size),
            m.SYNC: (self._sync, 0, m.SYNC_STEPS - 1, 0),
            m.FREE: (self._free, self._pages, 0, 0),
            m.LOCATIONS: (self._locations, m.MAX_LOCATIONS, 0, 0),
            m.BYE: (self._bye, 0, 0, 0),
        }
        self._left: list[PageStore] = []  # of the instances that have said BYE
        self._refused = b""  # the last reason

    # ------------------------------------------------------------ receiving and answering

    def serve(self) -> None:
        """Answer requests until every instance has said BYE."""
        prctl(PR_SET_TIMERSLACK, 1)  # nanosecond: else a nap takes 50 µs more than it should
        for ending in (signal.SIGTERM, signal.SIGINT):
            signal.signal(ending, signal.SIG_IGN)
        self._log.debug("DMS ready for serving requests")
        sys.setswitchinterval(SWITCH_INTERVAL)
        status, last, until = MPI.Status(), time.monotonic(), 0.0
        while len(self._left) < len(self._stores) or self._working:
            found, now = self._look(status), time.monotonic()
            if found:
                last, until = now, now + EAGER
            elif now < until:
                os.sched_yield()
            else:  # one look may not find what has come: MPI moves on a little at every look
                time.sleep(min((now - last) / NAPS, LONGEST_NAP))
                until = time.monotonic() + LOOK
        MPI.Request.Waitall([exchange.moving for exchange in self._sending])
        for store in self._stores:
            store.close()

    def _look(self, status: MPI.Status) -> bool:
        """Receive, do and send what can be now. Is there anything?"""
        if found := self._comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, status):
            self._receive(status.Get_count(MPI.BYTE), status.Get_source(), status.Get_tag())
        if not (self._receiving or self._working):
            return found
        here, self._receiving = _divide(self._receiving, lambda exchange: exchange.moving.Test())
        for exchange in here:
            self._begin(exchange)
        done, self._working = _divide(self._working, lambda work: not work[1].is_alive())
        for exchange, _ in done:
            if exchange.failure:
                raise exchange.failure
            self._send(exchange)
        return bool(found or here or done)

    def _receive(self, length: int, source: int, tag: int) -> None:
        """Begin to receive the message that was found. What is too long to be any is thrown away.

        It is dropped if there is no memory for it, or MPI can't count so far, as to receive less than
        all of it writes behind the buffer with some MPI.
        """
        exchange = self._unused.pop() if self._unused else Exchange()
        whole: bytearray | memoryview = exchange.question.whole
        try:
            if not 0 <= length <= len(whole):
                whole = bytearray(length)
        except (MemoryError, ValueError):  # ValueError: of MPI_UNDEFINED, which is negative
            self._comm.Mprobe(source, tag)  # no probe finds it again
            self._log.warning("a message of INSTANCE_%d was dropped: no room", source - self._first)
            return
        receiving = self._comm.Irecv([whole, MPI.BYTE], source, tag)
        exchange.receives(source, tag, length, receiving)
        self._receiving.append(exchange)

    def _begin(self, exchange: Exchange) -> None:
        """Do what the question asks, and send the answer. A sync is done by a thread."""
        kind, *_ = m.HEADER.unpack_from(exchange.question.whole)  # if it is whole: _handle sees
        if kind == m.SYNC:
            work = threading.Thread(target=self._work, args=(exchange,))
            with suppress(RuntimeError):  # there can't be one now: then all wait for it
                work.start()
                self._working.append((exchange, work))
                return
        self._handle(exchange)
        self._send(exchange)

    def _work(self, exchange: Exchange) -> None:
        """A thread."""
        try:
            self._handle(exchange)
        except Exception as error:  # noqa: BLE001 - _look raises it
            exchange.failure = error

    def _send(self, exchange: Exchange) -> None:
        """Let this answer travel."""
        answer = [exchange.answer.message(exchange.length), MPI.BYTE]
        exchange.moving = self._comm.Isend(answer, exchange.source, exchange.tag)
        self._sending.append(exchange)
        sent, self._sending = _divide(self._sending, lambda exchange: exchange.moving.Test())
        self._unused += sent

    def _handle(self, exchange: Exchange) -> None:
        """Do what the question asks, and write the answer. `length` is then its body's.

        A request that can't be done changes nothing, and is answered with the reason.
        """
        source, length, question = exchange.source, exchange.length, exchange.question
        try:
            if not m.HEADER.size <= length <= m.MAX_MESSAGE:
                raise ValueError(f"a message of {length} bytes is none of the EDM's")
            kind, more, count, page = m.HEADER.unpack_from(question.whole)
            store = self._stores[source - self._first]
            if store in self._left:
                raise ValueError("it has said BYE")
            if kind not in self._requests:
                raise ValueError(f"there is no request of kind {kind}")
            if store.offers and kind not in (m.HELLO, m.START, m.BYE):
                raise ValueError("its disk waits for START")
            action, *most = self._requests[kind]
            body = question.body[: length - m.HEADER.size]
            if not min(1, most[0]) <= count <= most[0] or more > most[1] or len(body) > most[2]:
                has = f"a count of {count}, `more` of {more} and a body of {len(body)} bytes"
                raise ValueError(f"{has}, where at most {most} may be")
            step = more if kind == m.GET else 1
            pages = range(page, page + count * step, step)
            if pages and pages[-1] >= self._pages:
                raise ValueError(f"page {pages[-1]}, in a space of {self._pages} pages")
            exchange.asks(kind, more, pages, body)
            exchange.answer.head(m.OK)
            exchange.length = action(store, exchange) or 0
        except (ValueError, struct.error, OSError, MemoryError) as error:
            reason = m.reason(error)
            if reason != self._refused:  # a full disk refuses again and again
                told = m.error_of(reason).strerror
                self._log.warning("request of INSTANCE_%d refused: %s", source - self._first, told)
            self._refused = reason
            exchange.length = exchange.reply(m.ERROR, reason)

    # ------------------------------------------------------------ the requests

    def _hello(self, store: PageStore, asked: Exchange) -> int:
        theirs = m.GEOMETRY.unpack(asked.body)
        fields = "(version, page size, start_addr, end_addr, DMSs, stripe)"
        if theirs != self._geometry:
            raise ValueError(f"instance and DMS differ in {fields}: {theirs} and {self._geometry}")
        offers = store.offers.start, store.offers.stop
        welcome = m.WELCOME.pack(store.kept, *offers, os.getpid(), *m.pids_are_of())
        return asked.reply(m.OK, welcome)

    def _start(self, store: PageStore, asked: Exchange) -> None:
        store.start(*m.EPOCH.unpack(asked.body))

    def _sync(self, store: PageStore, asked: Exchange) -> None:
        """In a thread."""
        with self._syncs[store]:  # should an instance ask twice at once
            store.sync_steps[asked.more]()

    def _get(self, store: PageStore, asked: Exchange) -> int:
        try:
            kind, got = store.get(asked.pages, asked.answer.body)
        except OSError as error:
            raise OSError(error.errno, f"page {asked.pages[0]}: {error.strerror}") from None
        asked.answer.head(kind, got, asked.pages[0])
        return got * PAGE_SIZE if kind == CONTENT else 0

    def _put(self, store: PageStore, asked: Exchange) -> None:
        pages, body, at, dirty = asked.pages, asked.body, asked.more * m.RUN.size, []
        for first, count in m.RUN.iter_unpack(body[:at]):
            if not pages.start <= first < first + count <= pages.stop:
                raise ValueError(f"{count} dirty pages from page {first}, where {pages} leave")
            dirty.append((first, body[at : at + count * PAGE_SIZE]))
            at += count * PAGE_SIZE
        if len(body) != at:
            raise ValueError(f"a body of {len(body)} bytes, where {at} belong")
        store.put([(pages.start, len(pages))] if asked.kind == m.EVICT else [], dirty)

    def _free(self, store: PageStore, asked: Exchange) -> None:
        store.free(asked.pages[0], len(asked.pages))

    def _locations(self, store: PageStore, asked: Exchange) -> int:
        return asked.reply(m.LOCATIONS, store.locations(asked.pages.start, len(asked.pages)))

    def _bye(self, store: PageStore, asked: Exchange) -> None:
        self._left.append(store)


def _divide(all_of: list, is_one: Callable[[Any], object]) -> tuple[list, list]:
    """Those of which this is true, and the others."""
    ones: list = []
    others: list = []
    for each in all_of:
        (ones if is_one(each) else others).append(each)
    return ones, others
