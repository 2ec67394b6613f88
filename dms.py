"""DMS, the disk manager server: serves a PageStore to each instance, over MPI.

In the picture: the box on the right, rank 0 of the job, if that has many machines.

Interface: DMS(comm, ...).serve() answers the instances' requests until the last has said BYE.

Rules: one thread, one process, no locks. A request is checked before anything is changed, and one
that is wrong is answered with ERROR and a reason; nothing that arrives ends the DMS, SIGTERM and
SIGINT neither: the instances end it, when they have written back what they hold. An eviction is
acknowledged when its bytes are written to the disk file. Which pages an instance has, it knows
itself: an EVICT of a page that is elsewhere in the SPT has overtaken the GET.

Waiting: MPI has no wait that sleeps. After a message the DMS looks for the next one without pause
for a moment, offering its core at every look. Then it naps between looks, longer and longer. It
waits for nobody who is slow to receive an answer: it goes on serving, and has another buffer for that.
"""

from __future__ import annotations

import os
import signal
import time

from mpi4py import MPI

from edm import log
from edm import messages as m
from edm.page_store import CONTENT, MAX_PAGES, PageStore
from edm.uffd_ctypes import PAGE_SIZE, PR_SET_TIMERSLACK, prctl

EAGER = 500e-6  # seconds after a message in which the DMS does not sleep
LOOK = 10e-6  # seconds that a look takes
SHORTEST_NAP, LONGEST_NAP = 50e-6, 2e-3  # seconds between two looks


class BadRequest(Exception):
    """A request that is wrong; the text says in what."""


class DMS:
    def __init__(
        self, comm: MPI.Comm, path: str | None, start_addr: int, end_addr: int, keep: bool = False
    ) -> None:
        """The server of every other rank of comm.

        path: the disk file of rank 1's instance; a further one's has its number added. keep: as
        Config's. Raises OSError when a disk can't be made, ValueError when it is not to be used.
        """
        self._comm = comm
        self._geometry = (m.VERSION, PAGE_SIZE, start_addr, end_addr)
        self._pages = (end_addr - start_addr) // PAGE_SIZE
        self._stores = []
        for instance in range(comm.size - 1):
            own = path if path is None or instance == 0 else f"{path}.{instance}"
            self._stores.append(PageStore(own, start_addr, end_addr, keep, instance))
        self._question, self._answer = m.MessageBuffer(), m.MessageBuffer()
        self._sending: list[tuple[MPI.Request, m.MessageBuffer]] = []  # answers under way
        self._log = log.logger("DMS")
        # What does each request, how long its body is (None: any), how many pages it may name (0:
        # it names none here).
        self._requests = {
            m.HELLO: (self._hello, m.GEOMETRY.size, 0),
            m.GET: (self._get, 0, MAX_PAGES),
            m.EVICT: (self._evict, None, 0),
            m.STORE: (self._store, None, 0),
            m.SYNC: (self._sync, 0, 0),
            m.FREE: (self._free, 0, self._pages),
            m.LOCATIONS: (self._locations, 0, m.MAX_LOCATIONS),
            m.BYE: (self._bye, 0, 0),
        }
        self._left: set[int] = set()  # instances that have said BYE
        self._refused = ""  # the last reason

    # ------------------------------------------------------------ receiving and answering

    def serve(self) -> None:
        """Answer requests until every instance has said BYE."""
        prctl(PR_SET_TIMERSLACK, 1)  # nanosecond: else a nap takes 50 µs more than it should
        for ending in (signal.SIGTERM, signal.SIGINT):
            signal.signal(ending, signal.SIG_IGN)
        self._log.debug("DMS ready for serving requests")
        status = MPI.Status()
        while len(self._left) < self._comm.size - 1:
            self._wait(status)
            source, tag = status.Get_source(), status.Get_tag()
            length = self._receive(status.Get_count(MPI.BYTE), source, tag)
            if length is not None:
                message = [self._answer.message(self._handle(source, length)), MPI.BYTE]
                self._send(self._comm.Isend(message, source, tag))
        for sending, _ in self._sending:
            sending.Wait()
        for store in self._stores:
            store.close()

    def _send(self, sending: MPI.Request) -> None:
        """Let this answer travel, and find a buffer for the next one."""
        self._sending.append((sending, self._answer))
        done = [buffer for sending, buffer in self._sending if sending.Test()]
        self._sending = [under_way for under_way in self._sending if under_way[0]]
        self._answer = done[0] if done else m.MessageBuffer()

    def _wait(self, status: MPI.Status) -> None:
        until, nap = time.monotonic() + EAGER, SHORTEST_NAP
        while not self._comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, status):
            if time.monotonic() < until:
                os.sched_yield()
            else:  # one look may not find what has come: MPI moves on a little at every look
                time.sleep(nap)
                until, nap = time.monotonic() + LOOK, min(2 * nap, LONGEST_NAP)

    def _receive(self, length: int, source: int, tag: int) -> int | None:
        """Receive the message that was found, and throw away what is too long to be any; its length.

        None: there is no memory for it, or MPI can't count so far. It was dropped, as to receive
        less than all of it writes behind the buffer with some MPI.
        """
        whole: bytearray | memoryview = self._question.whole
        try:
            if not 0 <= length <= len(whole):
                whole = bytearray(length)
        except (MemoryError, ValueError):  # ValueError: of MPI_UNDEFINED, which is negative
            self._comm.Mprobe(source, tag)  # no probe finds it again
            self._log.warning("a message of INSTANCE_%d was dropped: no room for it", source - 1)
            return None
        self._comm.Recv([whole, MPI.BYTE], source, tag)
        return length

    def _handle(self, source: int, length: int) -> int:
        """Do what the message of source asks. The answer is in _answer; returns its body's length.

        A request that can't be done changes nothing, and is answered with the reason.
        """
        try:
            if not m.HEADER.size <= length <= m.MAX_MESSAGE:
                raise BadRequest(f"a message of {length} bytes is none of the EDM's")
            kind, stride, count, page = m.HEADER.unpack_from(self._question.whole)
            if source - 1 in self._left:
                raise BadRequest("it has said BYE")
            if kind not in self._requests or stride and kind != m.GET:
                raise BadRequest(f"there is no request of kind {kind} and stride {stride}")
            action, right, most = self._requests[kind]
            body = self._question.body[: length - m.HEADER.size]
            if right is not None and len(body) != right:
                raise BadRequest(f"a body of {len(body)} bytes, where {right} belong")
            if most:
                self._check(page, count, most)
            self._answer.head(m.OK)
            if kind == m.GET:
                return self._get(source - 1, page, count, max(stride, 1))
            return action(source - 1, page, count, body) or 0
        except (BadRequest, OSError, MemoryError) as error:
            return self._refuse(m.ERROR, source - 1, error)

    def _refuse(self, kind: int, instance: int, error: Exception) -> int:
        reason = m.reason(error)
        text = str(m.error_of(reason).strerror)
        if text != self._refused:  # a full disk refuses again and again
            self._log.warning("request of INSTANCE_%d refused: %s", instance, text)
        self._refused = text
        return self._reply(kind, reason)

    def _reply(self, kind: int, body: bytes) -> int:
        self._answer.body[: len(body)] = body
        self._answer.head(kind, len(body))
        return len(body)

    def _check(self, page: int, count: int, most: int) -> None:
        if not 0 < count <= most:
            raise BadRequest(f"a count of {count} pages, where 1 to {most} may be")
        if page >= self._pages or count > self._pages - page:
            raise BadRequest(f"{count} pages from page {page} in a space of {self._pages} pages")

    # ------------------------------------------------------------ the requests

    def _hello(self, instance: int, page: int, count: int, body: memoryview) -> int:
        theirs = m.GEOMETRY.unpack(body)
        if theirs != self._geometry:
            raise BadRequest(
                "instance and DMS differ in (version, page size, start_addr, end_addr): "
                f"{theirs} and {self._geometry}"
            )
        kept = self._stores[instance].kept
        return self._reply(m.OK, m.WELCOME.pack(kept, os.getpid(), *m.pids_are_of()))

    def _get(self, instance: int, page: int, count: int, stride: int) -> int:
        if stride > m.MAX_STRIDE:
            raise BadRequest(f"a stride of {stride} pages, where up to {m.MAX_STRIDE} may be")
        if page + (count - 1) * stride >= self._pages:
            leave = f"{count} pages from page {page}, a stride of {stride} apart,"
            raise BadRequest(f"{leave} in a space of {self._pages} pages")
        pages = range(page, page + count * stride, stride)
        try:
            kind, got = self._stores[instance].get(pages, self._answer.body)
        except OSError as error:
            lost = OSError(error.errno, f"page {page}: {error.strerror}")
            return self._refuse(m.UNREADABLE, instance, lost)
        self._answer.head(kind, got, page)
        return got * PAGE_SIZE if kind == CONTENT else 0

    def _evict(self, instance: int, page: int, runs: int, body: memoryview) -> None:
        self._write(instance, runs, body, stay=False)

    def _store(self, instance: int, page: int, runs: int, body: memoryview) -> None:
        self._write(instance, runs, body, stay=True)

    def _write(self, instance: int, runs: int, body: memoryview, stay: bool) -> None:
        if not 0 < runs <= m.MAX_RUNS:
            raise BadRequest(f"{runs} runs, where 1 to {m.MAX_RUNS} may be")
        right = runs * m.RUN.size
        if len(body) < right:
            raise BadRequest(f"a body of {len(body)} bytes, with a table of {right}")
        table, content = list(m.RUN.iter_unpack(body[:right])), body[right:]
        for first, count, dirty in table:
            self._check(first, count, MAX_PAGES)
            if dirty > 1:
                raise BadRequest(f"a run's dirty is {dirty} from page {first}, where 0 or 1 may be")
            right += dirty * count * PAGE_SIZE
        if len(body) != right:
            raise BadRequest(f"a body of {len(body)} bytes, where {right} belong")
        self._stores[instance].write(table, content, stay)

    def _free(self, instance: int, page: int, count: int, body: memoryview) -> None:
        self._stores[instance].free(page, count)

    def _sync(self, instance: int, page: int, count: int, body: memoryview) -> None:
        self._stores[instance].sync()

    def _locations(self, instance: int, page: int, count: int, body: memoryview) -> int:
        return self._reply(m.LOCATIONS, self._stores[instance].locations(page, count))

    def _bye(self, instance: int, page: int, count: int, body: memoryview) -> None:
        self._left.add(instance)
