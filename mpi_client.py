"""MpiStore: the pager's store over MPI. Each method of PageStore is a message to each DMS concerned.

In the picture: between the pager's threads and the DMSs.

Interface: MpiStore(comm, dms, ...), with the methods of PageStore that a pager calls, and their contracts. Each
raises OSError with the DMS's errno and reason if a DMS refuses. If a DMS has died, it does not return: this process
is killed, by the launcher if the DMS was elsewhere (rank.py). `on_disk` has to be set before runs_on_disk is
called: what the DMSs have told this rank at the start (messages.py).

The pages are striped over the DMSs: stripe s, which is STRIPE pages, belongs to DMS s % N. A single DMS has
all pages in one endless stripe. A get is about pages of one stripe: a caller that wants more asks for all of
them before it takes the first. The other methods ask every DMS concerned, and wait.

    page             0 ... 63    64 ... 127    128 ... 191    192 ... 255
    of two DMSs      0           1             0              1

    sync     every DMS prepares it, then every DMS commits it: SYNC_PHASES of page_store.py

Rules: any thread may call any method, except that one thread alone calls ask_get and take_get. Each request has
a slot: an MPI tag, and the buffer for its answer. So no thread can get another one's answer.
There are as many slots for gets as there were gets at once. All else is done one after the other, under a lock:
nothing changes during a sync, and one slot for each DMS is enough.

Waiting: MPI has no wait that sleeps. A thread that waits for a page tests in a loop, and offers its core
(sched_yield) after every test, because an answer takes microseconds. A patient one, which delays no fault,
sleeps between tests.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from mpi4py import MPI

from edm import log
from edm import messages as m
from edm.lspt import Run
from edm.page_store import ONE_STRIPE, STRIPE, SYNC_PHASES, Bytes
from edm.uffd_ctypes import PAGE_SIZE

nap = partial(time.sleep, 50e-6)  # seconds: what a patient thread does between two tests


class Slot:
    """An MPI tag, and memory for an answer."""

    def __init__(self, comm: MPI.Comm, tag: int) -> None:
        self.answer = m.MessageBuffer()
        self.content_address = MPI.buffer(self.answer.body).address
        self._comm, self._tag = comm, tag

    def send(self, dms: int, kind: int, pages: range, more: int, *body: bytes) -> None:
        """Send this DMS the question; wait for nothing."""
        self.dms = dms
        message = b"".join([m.HEADER.pack(kind, more, len(pages), pages.start), *body])
        self.receiving = self._comm.Irecv([self.answer.whole, MPI.BYTE], dms, self._tag)
        self.sending = self._comm.Isend([message, MPI.BYTE], dms, self._tag)


class MpiStore:
    takes_pipes = False  # the bytes go into a message

    def __init__(self, comm: MPI.Comm, dms: int, config: object) -> None:
        """The store of this rank's instance. dms: how many of comm's ranks, the first ones, are DMSs. config: an
        edm.Config."""
        self._comm, self._dmss, self._start, self.kept = comm, dms, config.start_addr, config.keep
        self.stripe = STRIPE if dms > 1 else ONE_STRIPE
        self.on_disk: list[bytes] = []  # of each DMS, see DMS.on_disk
        self._log, _, self._info = log.of_box("MpiClient")
        self.from_each = [0] * dms  # pages that take_get has taken, from each DMS
        self._of_gets: list[Slot] = []
        # The free ones of these. That of the last take_get has its bytes until the next ask_get.
        self._free: list[Slot] = []
        self._of_others = [Slot(comm, 0) for _ in range(dms)]  # one for each DMS
        self._lock = threading.RLock()  # for _of_others

    # ------------------------------------------------------------ what a PageStore does

    def ask_get(self, pages: range) -> Slot:
        """See PageStore."""
        if not self._free:
            self._free.append(Slot(self._comm, 1 + len(self._of_gets)))
            self._of_gets += self._free
        slot = self._free.pop()
        slot.address = self._start + pages.start * PAGE_SIZE  # for take_get's log
        if self._info:
            self._log.debug("send DmHandler's request for the page in address %#x", slot.address)
        slot.send(pages.start // self.stripe % self._dmss, m.GET, pages, pages.step)
        return slot

    def take_get(self, asked: Slot) -> tuple[int, int, int]:
        """See PageStore."""
        self._free.append(asked)
        _wait(os.sched_yield, asked.sending, asked.receiving)
        kind, got = self._answer(asked)
        self.from_each[asked.dms] += got
        if self._info:
            self._log.debug("get DMS's response for the page in address %#x", asked.address)
            self._log.debug("RequestPageFromDMS succeeded. ")
        return kind, got, asked.content_address

    def put(self, gone: Sequence[Run], dirty: Sequence[Bytes]) -> None:
        """See PageStore. The message names all pages from the first range to the last. To the SPT those between have
        gone, too, even if the instance has them: nothing but the wiki's table depends on that."""
        ends = list(gone) or [(first, len(part) // PAGE_SIZE) for first, part in dirty]
        pages = range(ends[0][0], sum(ends[-1]))
        address = self._start + pages.start * PAGE_SIZE
        if gone:
            self._log.debug("send lpet's request to evict page in address %#x", address)
        self._request(m.PUT, pages, not gone, *dirty)
        if gone:
            self._log.debug("got ack for evict page of lpet in address %#x Ack message : ", address)

    def free(self, page: int, count: int) -> None:
        """See PageStore."""
        self._request(m.FREE, range(page, page + count))

    def sync(self) -> None:
        """See PageStore."""
        with self._lock:
            for phase in SYNC_PHASES:
                self._request(m.SYNC, more=phase)

    def runs_on_disk(self) -> Iterator[Run]:
        """See PageStore."""
        return m.RUN.iter_unpack(b"".join(self.on_disk))

    def close(self) -> None:
        """Say BYE: this instance has ended. Nothing else may be called after that."""
        for slot in self._of_gets:  # MPI writes to its memory until the answer is there
            _wait(nap, slot.sending, slot.receiving)
        self._request(m.BYE)

    # ------------------------------------------------------------ asking and waiting

    def _request(self, kind: int, pages: range = range(0), more: int = 0, *dirty: Bytes) -> None:
        """Ask those DMSs that have some of these pages; without pages, all. Wait patiently for the answers of all.
        Raises the first error, if there are any."""
        stripes = range(pages.start // self.stripe, -(-pages.stop // self.stripe))
        # Successive ones are of different DMSs, so the first ones tell.
        some = {stripe % self._dmss for stripe in stripes[: self._dmss]}
        body_of: list[list[bytes]] = [[] for _ in range(self._dmss)]
        for at, content in dirty:
            while content:  # cut it at the stripes' ends
                part = content[: (self.stripe - at % self.stripe) * PAGE_SIZE]
                many, dms = len(part) // PAGE_SIZE, at // self.stripe % self._dmss
                body_of[dms] += m.RUN.pack(at, many), part
                at, content = at + many, content[len(part) :]
        with self._lock:
            asked = {dms: self._of_others[dms] for dms in some or range(self._dmss)}
            for dms, slot in asked.items():
                slot.send(dms, kind, pages, more, *body_of[dms])
            # A large message travels only while both ends call MPI: no sleep before it is sent.
            _wait(os.sched_yield, *(slot.sending for slot in asked.values()))
            _wait(nap, *(slot.receiving for slot in asked.values()))
            for slot in asked.values():
                self._answer(slot)

    def _answer(self, slot: Slot) -> tuple[int, int]:
        """The kind and the count of the answer, which has come. Raises OSError if it is ERROR."""
        kind, number, count, _ = m.HEADER.unpack_from(slot.answer.whole)
        if kind == m.ERROR:
            raise OSError(number, bytes(slot.answer.body[:count]).decode(errors="replace"))
        return kind, count


def _wait(pause: Callable[[], None], *requests: MPI.Request) -> None:
    """Wait for these requests, with this pause between two tests."""
    for request in requests:
        while not request.Test():
            pause()
