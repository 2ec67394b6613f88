"""DMS, the disk manager server: serves a PageStore to each instance, over MPI.

In the picture: the right end of the MPI arrow, rank 0 of the job; or ranks 0 to N-1, if there are N DMSs. Then
each has some stripes of every instance's pages (mpi_client.py).

Interface: DMS(comm, dms, ...).serve() answers the instances' requests until the last has said BYE. Before that,
all DMSs of a job tell each other their `offers`. If there are several, and the disks are kept, they call start(). Then
each tells the instances what is on_disk().

Rules: A request is checked before anything is changed. A wrong one is answered with ERROR and a reason. No message
but the last instance's BYE ends the DMS, nor do SIGTERM and SIGINT. An eviction is acknowledged when its bytes are
written to the disk file. A PUT may name pages that the instance does not have: the DMS does not check this, as only
the instance's LSPT knows.

Nobody waits for another instance's messages. One thread receives, answers and sends. A message that is
under way does not block it: it is a generator (_exchange), which is continued at each look, while others
are served. Only the disk blocks it, for one batch. A sync may take seconds, so another thread
does them, one after the other. It calls no MPI. It has the store's lock: a PUT or FREE of the same instance would
block the DMS meanwhile, but MpiStore sends none.

Waiting: MPI has no wait that sleeps. After a message the DMS looks for the next one without pause
for a moment, offering its core at every look. Then it naps between looks, the longer the silence.
"""

import errno
import os
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import starmap

from mpi4py import MPI

from edm import log
from edm import messages as m
from edm.page_store import CONTENT, SYNC_PHASES, PageStore
from edm.uffd_ctypes import PAGE_SIZE, PAGES_AT_ONCE, PR_SET_TIMERSLACK, prctl

EAGER = 500e-6  # seconds after a message in which the DMS does not sleep
LOOK = 10e-6  # seconds in which the DMS looks for messages after a nap
# A nap takes 1/NAPS of the silence so far, at most LONGEST_NAP seconds. Of two DMSs that an instance asks in turn,
# one naps while the other answers. So its nap is short against that answer. With naps that doubled, a random read
# of two DMSs took 1300 µs.
NAPS, LONGEST_NAP = 16, 2e-3


class DMS:
    def __init__(self, comm: MPI.Comm, dms: int, config: object) -> None:
        """The server of all ranks of comm that are not DMSs. dms: how many ranks, the first ones, are DMSs. config: an
        edm.Config, with the path of this one's disk.

        Raises OSError when a disk can't be made, ValueError when one may not be used, RuntimeError when there can't be
        another thread.
        """
        self._comm, self._first = comm, dms  # the first rank that is an instance
        self._stores = [PageStore(config, n, (comm.rank, dms)) for n in range(comm.size - dms)]
        self._unused: list[m.MessageBuffer] = []
        self._syncs = ThreadPoolExecutor(1)
        self._syncs.submit(int)  # starts its thread now
        self._log = log.logger("DMS")
        # Of each kind: the method; the most pages; the largest `more`; the longest body (bytes). A method gets the
        # instance's store, the pages that the question is about, memory for the answer, `more`, and the body.
        self._requests: dict[int, tuple[Callable[..., object], int, int, int]] = {
            m.GET: (self._get, PAGES_AT_ONCE, 0xFFFF, 0),
            m.PUT: (self._put, PAGES_AT_ONCE, 1, m.MAX_MESSAGE),
            m.SYNC: (lambda store, pages, _, more, __: store.sync([more]), 0, SYNC_PHASES[-1], 0),
            m.FREE: (lambda store, pages, *_: store.free(pages.start, len(pages)), 1 << 32, 0, 0),
            m.BYE: (lambda store, *_: self._left.add(store), 0, 0, 0),
        }
        self._left: set[PageStore] = set()  # of the instances that have said BYE
        self.offers = [store.offers for store in self._stores]  # the syncs that each can start from

    def start(self, offers_of_all: list[list[range]]) -> None:
        """Start the stores, which wait for it, each from the oldest sync that all DMSs have (page_store.py). Raises
        ValueError if there is none, OSError as PageStore.start does."""
        for store, *offers in zip(self._stores, *offers_of_all, strict=True):
            if not (by_all := set.intersection(*map(set, offers))):
                raise ValueError(f"disk: no sync is on the disks of all DMSs: {offers}")
            store.start(min(by_all))

    def on_disk(self) -> list[bytes]:
        """Of each instance: its pages on the disk here that an earlier job has left, as RUNs (messages.py)."""
        return [b"".join(starmap(m.RUN.pack, store.runs_on_disk())) for store in self._stores]

    # ------------------------------------------------------------ receiving and answering

    def serve(self) -> None:
        """Answer requests until every instance has said BYE."""
        prctl(PR_SET_TIMERSLACK, 1)  # nanosecond: else a nap takes 50 µs more than it should
        self._log.debug("DMS ready for serving requests")
        status, last, until = MPI.Status(), time.monotonic(), 0.0
        under_way: list[Iterator[None]] = []
        while len(self._left) < len(self._stores) or under_way:
            if found := self._comm.Improbe(MPI.ANY_SOURCE, MPI.ANY_TAG, status):
                under_way.append(self._exchange(found, status.source, status.tag, status.count))
            before = len(under_way)
            # next() gives True when an exchange has come to its end.
            under_way = [exchange for exchange in under_way if not next(exchange, True)]
            now = time.monotonic()
            if found is not None or len(under_way) < before:  # a message that was received is false
                last, until = now, now + EAGER
            elif now < until:
                os.sched_yield()
            else:  # one look may not find what has come: MPI moves on a little at every look
                time.sleep(min((now - last) / NAPS, LONGEST_NAP))
                until = time.monotonic() + LOOK
        for store in self._stores:
            store.close()

    def _exchange(self, found: MPI.Message, source: int, tag: int, length: int) -> Iterator[None]:
        """Receive the message that was found, do what it asks, and send the answer. Yields instead of
        waiting, to be continued at the next look.

        A message that is too long is received whole, and refused: some MPIs write behind a buffer that
        is too small. It is dropped if there is no memory for it, or MPI can't count that high.
        """
        buffer = self._unused.pop() if self._unused else m.MessageBuffer()
        question = buffer.whole
        try:
            if not 0 <= length <= len(question):
                question = memoryview(bytearray(length))
        except (MemoryError, ValueError):  # ValueError: of MPI_UNDEFINED, which is negative
            self._log.warning("a message of INSTANCE_%d was dropped: no room", source - self._first)
            return
        receiving = found.Irecv([question, MPI.BYTE])
        while not receiving.Test():
            yield
        kind, *_ = m.HEADER.unpack_from(question)
        handle = partial(self._handle, source, question[:length], buffer)
        if kind == m.SYNC:
            sync = self._syncs.submit(handle)
            while not sync.done():
                yield
            handle = sync.result  # if the thread has failed, this fails here, and ends the DMS
        sending = self._comm.Isend([handle(), MPI.BYTE], source, tag)
        while not sending.Test():
            yield
        self._unused.append(buffer)

    def _handle(self, source: int, question: memoryview, answer: m.MessageBuffer) -> memoryview:
        """Do what the question asks; the answer. It may be written over the question.

        A wrong request changes nothing. One that can't be done moves no page, see PageStore.put. Both are answered
        with the reason, which the pager prints, as on one machine.
        """
        store = self._stores[source - self._first]
        try:
            kind, more, count, page = m.HEADER.unpack_from(question)
            # No count is right for a kind that there is not.
            action, *most = self._requests.get(kind, (None, -1, 0, 0))
            body = question[m.HEADER.size :]
            fits = min(1, most[0]) <= count <= most[0] and more <= most[1] and len(body) <= most[2]
            step = more if kind == m.GET else 1
            pages = range(page, page + count * step, step)
            if not fits or pages and pages[-1] >= store.spt.pages:
                fields = kind, more, count, page, len(body)
                raise ValueError(f"wrong kind, `more`, count, page or length of body: {fields}")
            return action(store, pages, answer, more, body) or answer.message(m.OK)
        except (ValueError, struct.error, OSError, MemoryError) as error:
            number = getattr(error, "errno", 0) or errno.EINVAL
            words = getattr(error, "strerror", "") or str(error) or type(error).__name__
            body = words.encode()[:1000]
            return answer.message(m.ERROR, len(body), number, body)

    # ------------------------------------------------------------ the requests

    def _get(self, store: PageStore, pages: range, answer: m.MessageBuffer, *_) -> memoryview:
        kind, got = store.get(pages, answer.body)
        length = got * PAGE_SIZE if kind == CONTENT else 0
        return answer.message(kind, got, 0, answer.body[:length])

    def _put(self, store: PageStore, pages: range, _: object, more: int, body: memoryview) -> None:
        at, dirty = 0, []
        while at < len(body):
            first, count = m.RUN.unpack_from(body, at)
            begin, at = at + m.RUN.size, at + m.RUN.size + count * PAGE_SIZE
            dirty.append((first, body[begin:at]))
            if at > len(body) or not pages.start <= first < first + count <= pages.stop:
                raise ValueError(f"{len(body)} bytes: {count} dirty pages from {first}, of {pages}")
        store.put([] if more else [(pages.start, len(pages))], dirty)
