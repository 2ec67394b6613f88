"""DMS, the disk manager server: knows where every page is, and keeps those that are on the disk.

In the picture: the box on the right, rank 0 of the job.

Interface: DMS(comm, ...).serve() answers the instances' requests until the last has said BYE.
    SPT     of one instance: a byte a page, where it is now
    Disk    of one instance: the file, reached by pread and pwrite at a page's own offset

Rules: one thread, one process, no locks. A request is checked before anything is changed, and one
that is wrong is answered with ERROR and a reason; nothing that arrives ends the DMS. An eviction
is acknowledged when its bytes are written to the disk file.

A page's bytes stay on the disk while the instance has the page too. So a page that was not written
meanwhile (CLEAN in the LSPT) goes back without its bytes.

    SPT byte          location        an eviction that names the page makes it
    NEW               never accessed
    INSTANCE          INSTANCE_n      DISK if dirty, else NEW: it never was anything but zeros
    INSTANCE | DISK   INSTANCE_n      DISK
    DISK              DISK

Waiting: MPI has no wait that sleeps. After a message the DMS looks for the next one without pause
for a moment, offering its core at every look; then it sleeps until its doorbell rings. It looks
again now and then all the same, and often if an instance can't ring.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import tempfile
import time
from logging import DEBUG, INFO

from mpi4py import MPI

from edm import log
from edm import messages as m
from edm.doorbell import Doorbell
from edm.messages import DISK, INSTANCE, NEW
from edm.uffd_ctypes import PAGE_SIZE, PR_SET_TIMERSLACK, prctl, punch_hole

EAGER = 2 * m.AWAKE  # seconds after a message in which the DMS does not sleep
NAP = 70e-6  # seconds between two looks, if an instance can't ring
LOOK = 20e-6  # seconds that a look takes
SLEEP = 10e-3  # seconds between two looks, if all of them can


class SPT:
    """Where each page of one instance's space is. Pages are numbered from its start_addr."""

    _SAME = re.compile(rb"(?s)(.)\1*")
    _ELSEWHERE = re.compile(rb"[\0\2]")
    _ACCESSED = re.compile(rb"[^\0]")

    def __init__(self, pages: int, instance: int) -> None:
        self.pages = pages
        self._instance = instance
        self._bytes = mmap.mmap(-1, pages)  # zeros, and no memory until written to

    def read(self, page: int, count: int) -> bytes:
        """The bytes of count pages from page."""
        return self._bytes[page : page + count]

    def same(self, pages: range) -> tuple[int, int]:
        """The byte of the first of these pages, and how many from it on have the same."""
        if len(pages) == 1:
            return self._bytes[pages.start], 1
        found = self._SAME.match(self._bytes[pages.start : pages.stop : pages.step])
        return found[0][0], found.end()

    def set(self, pages: range, byte: int) -> None:
        if len(pages) == 1:
            self._bytes[pages.start] = byte
        else:
            self._bytes[pages.start : pages.stop : pages.step] = bytes((byte,)) * len(pages)

    def dropped(self, page: int, count: int) -> None:
        """INSTANCE → NEW, INSTANCE | DISK → DISK: the instance gives back what it did not write."""
        kept = self.read(page, count).translate(bytes((NEW, NEW, DISK, DISK)) + bytes(252))
        self._bytes[page : page + count] = kept

    def all_in_instance(self, page: int, count: int) -> bool:
        if count == 1:
            return bool(self._bytes[page] & INSTANCE)
        return not self._ELSEWHERE.search(self.read(page, count))

    def table(self, start_addr: int) -> str:
        """The SPT as the wiki prints it: a line for each page that was accessed."""
        found = self._ACCESSED.finditer(self._bytes)
        return log.spt_table(
            (start_addr + at.start() * PAGE_SIZE, m.location(at[0][0], self._instance))
            for at in found
        )


class Disk:
    """The file of one instance's pages: page n is at n * PAGE_SIZE.

    Without a path, a temporary file without a name, which nobody else can open and which is gone
    with the DMS.
    """

    def __init__(self, path: str | None, length: int) -> None:
        """Raises OSError, which names the file, when it can't be made."""
        if path is None:
            self._fd, name = tempfile.mkstemp(prefix="edm-")
            os.unlink(name)
        else:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_TRUNC
            self._fd = os.open(path, flags, 0o600)
        try:
            os.ftruncate(self._fd, length)
        except OSError as error:
            raise OSError(error.errno, f"ftruncate to {length} bytes: {error.strerror}", path)

    def read(self, pages: range, into: memoryview) -> None:
        """Read these pages, one behind the other."""
        length = len(into) if pages.step == 1 else PAGE_SIZE
        for at, page in zip(range(0, len(into), length), pages, strict=False):
            if os.preadv(self._fd, [into[at : at + length]], page * PAGE_SIZE) != length:
                raise OSError(errno.EIO, "preadv: short read of the disk file")

    def write(self, page: int, content: memoryview) -> None:
        if os.pwrite(self._fd, content, page * PAGE_SIZE) != len(content):
            raise OSError(errno.EIO, "pwrite: short write to the disk file")

    def discard(self, page: int, count: int) -> None:
        """Give the blocks back, where the file system can do that; the SPT says NEW anyway."""
        try:
            punch_hole(self._fd, page * PAGE_SIZE, count * PAGE_SIZE)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise

    def close(self) -> None:
        os.close(self._fd)


class BadRequest(Exception):
    """A request that is wrong; the text says in what."""


class DMS:
    def __init__(self, comm: MPI.Comm, path: str | None, start_addr: int, end_addr: int) -> None:
        """The server of every other rank of comm.

        path: the disk file of rank 1's instance; a further one's has its number added. Raises
        OSError when a disk can't be made.
        """
        self._comm = comm
        self._start, self._end = start_addr, end_addr
        pages = (end_addr - start_addr) // PAGE_SIZE
        self._spts = [SPT(pages, instance) for instance in range(comm.size - 1)]
        self._disks = []
        for instance in range(comm.size - 1):
            own = path if path is None or instance == 0 else f"{path}.{instance}"
            self._disks.append(Disk(own, pages * PAGE_SIZE))
        self._question, self._answer = m.MessageBuffer(), m.MessageBuffer()
        self._log = log.logger("DMS")
        self._info = self._log.isEnabledFor(INFO)
        self._debug = self._log.isEnabledFor(DEBUG)
        self._actions = {
            m.HELLO: self._hello,
            m.EVICT: self._evict,
            m.FREE: self._free,
            m.LOCATIONS: self._locations,
            m.BYE: self._bye,
            m.RINGS: self._rings,
        }
        self._left = 0  # instances that have said BYE
        self._doorbell = Doorbell()
        self._silent = set(range(comm.size - 1))  # instances that do not ring

    # ------------------------------------------------------------ receiving and answering

    def serve(self) -> None:
        """Answer requests until every instance has said BYE."""
        prctl(PR_SET_TIMERSLACK, 1)  # nanosecond: else a nap takes 50 µs more than it should
        self._log.debug("DMS ready for serving requests")
        status = MPI.Status()
        while self._left < self._comm.size - 1:
            self._wait(status)
            source, tag = status.Get_source(), status.Get_tag()
            length = self._receive(status.Get_count(MPI.BYTE), source, tag)
            answer_length = self._handle(source, length)
            self._comm.Send([self._answer.message(answer_length), MPI.BYTE], source, tag)
        self._doorbell.close()
        for disk in self._disks:
            disk.close()

    def _wait(self, status: MPI.Status) -> None:
        eager_until = time.monotonic() + EAGER
        while not self._comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, status):
            if time.monotonic() < eager_until:
                os.sched_yield()
            elif self._doorbell.rung() or self._doorbell.wait(NAP if self._silent else SLEEP):
                eager_until = time.monotonic() + EAGER
            else:  # one look may not find what has come: MPI moves on a little at every look
                eager_until = time.monotonic() + LOOK

    def _receive(self, length: int, source: int, tag: int) -> int:
        """Receive the message that was found; 0 stands for one that is too long to be any."""
        if length <= len(self._question.whole):
            self._comm.Recv([self._question.whole, MPI.BYTE], source, tag)
            return length
        self._comm.Recv([bytearray(length), MPI.BYTE], source, tag)
        return 0

    def _handle(self, source: int, length: int) -> int:
        """Do what the message of source asks. The answer is in _answer; returns its body's length.

        A request that can't be done changes nothing, and is answered with the reason.
        """
        try:
            if length < m.HEADER.size:
                raise BadRequest(f"a message of {length} bytes is none of the EDM's")
            kind, stride, count, page = m.HEADER.unpack_from(self._question.whole)
            length -= m.HEADER.size
            if kind == m.GET:
                return self._get(source - 1, page, count, length, max(stride, 1))
            action = self._actions.get(kind)
            if action is None or stride:
                raise BadRequest(f"there is no request of kind {kind} and stride {stride}")
            return action(source - 1, page, count, length)
        except (BadRequest, OSError) as error:
            reason = f"{error}"
            self._log.warning("request of INSTANCE_%d refused: %s", source - 1, reason)
            text = reason.encode()[:1000]
            self._answer.body[: len(text)] = text
            self._answer.head(m.ERROR, len(text))
            return len(text)

    def _check(self, page: int, count: int, most: int) -> None:
        pages = self._spts[0].pages
        if not 0 < count <= most:
            raise BadRequest(f"a count of {count} pages, where 1 to {most} may be")
        if page >= pages or count > pages - page:
            raise BadRequest(f"{count} pages from page {page} in a space of {pages} pages")

    @staticmethod
    def _check_length(length: int, right: int) -> None:
        if length != right:
            raise BadRequest(f"a body of {length} bytes, where {right} belong")

    def _address(self, page: int) -> int:
        return self._start + page * PAGE_SIZE

    # ------------------------------------------------------------ the requests

    def _hello(self, instance: int, page: int, count: int, length: int) -> int:
        self._check_length(length, m.GEOMETRY.size)
        theirs = m.GEOMETRY.unpack_from(self._question.body)
        ours = (m.VERSION, PAGE_SIZE, self._start, self._end)
        if theirs != ours:
            raise BadRequest(
                "instance and DMS differ in (version, page size, start_addr, end_addr): "
                f"{theirs} and {ours}"
            )
        address = self._doorbell.address()
        self._answer.body[: len(address)] = address
        self._answer.head(m.OK)
        return len(address)

    def _rings(self, instance: int, page: int, count: int, length: int) -> int:
        self._check_length(length, 0)
        self._silent.discard(instance)
        self._answer.head(m.OK)
        return 0

    def _get(self, instance: int, page: int, count: int, length: int, stride: int) -> int:
        self._check_length(length, 0)
        self._check(page, count, m.MAX_PAGES)
        self._check(page, (count - 1) * stride + 1, self._spts[0].pages)
        spt = self._spts[instance]
        if self._info:
            self._log.info(
                "get request to send content of page in address: %#x", self._address(page)
            )
        pages = range(page, page + count * stride, stride)
        byte, same = spt.same(pages)
        pages = pages[:same]
        if byte & INSTANCE:
            raise BadRequest(f"page {page} is in INSTANCE_{instance} already")
        if byte == NEW:
            spt.set(pages, INSTANCE)
            self._answer.head(m.NEW_PAGES, same, page)
            if self._debug:
                self._log.debug("page accessed first time, set info - new_page")
            answer_length = 0
        else:
            answer_length = same * PAGE_SIZE
            if self._debug:
                self._log.debug("read page address: %#x from disk", self._address(page))
            self._disks[instance].read(pages, self._answer.body[:answer_length])
            spt.set(pages, INSTANCE | DISK)
            self._answer.head(m.CONTENT, same, page)
        self._show(instance)
        if self._debug:
            self._log.debug("page in address: %#x sent to app", self._address(page))
        return answer_length

    def _evict(self, instance: int, page: int, runs: int, length: int) -> int:
        if not 0 < runs <= m.MAX_RUNS:
            raise BadRequest(f"{runs} runs, where 1 to {m.MAX_RUNS} may be")
        table_length = runs * m.RUN.size
        if length < table_length:
            raise BadRequest(f"a body of {length} bytes, with a table of {table_length}")
        spt, disk = self._spts[instance], self._disks[instance]
        body = self._question.body
        table = list(m.RUN.iter_unpack(body[:table_length]))
        content_length = 0
        for first, count, dirty in table:
            self._check(first, count, m.MAX_PAGES)
            if dirty > 1:
                raise BadRequest(f"a run's dirty is {dirty}, where 0 or 1 may be")
            if not spt.all_in_instance(first, count):
                raise BadRequest(f"{count} pages from page {first} are not all in the instance")
            content_length += dirty * count * PAGE_SIZE
        self._check_length(length, table_length + content_length)
        at = table_length
        for first, count, dirty in table:
            if dirty:
                disk.write(first, body[at : at + count * PAGE_SIZE])
                at += count * PAGE_SIZE
        for first, count, dirty in table:
            if dirty:
                spt.set(range(first, first + count), DISK)
            else:
                spt.dropped(first, count)
            if self._info:
                for p in range(first, first + count):
                    self._log.info("page in address: %#x written to disk", self._address(p))
        self._show(instance)
        self._answer.head(m.OK)
        return 0

    def _free(self, instance: int, page: int, count: int, length: int) -> int:
        self._check_length(length, 0)
        self._check(page, count, self._spts[instance].pages)
        self._disks[instance].discard(page, count)
        self._spts[instance].set(range(page, page + count), NEW)
        self._show(instance)
        self._answer.head(m.OK)
        return 0

    def _locations(self, instance: int, page: int, count: int, length: int) -> int:
        self._check_length(length, 0)
        self._check(page, count, m.MAX_LOCATIONS)
        self._answer.body[:count] = self._spts[instance].read(page, count)
        self._answer.head(m.LOCATIONS, count, page)
        return count

    def _bye(self, instance: int, page: int, count: int, length: int) -> int:
        self._check_length(length, 0)
        self._left += 1
        self._answer.head(m.OK)
        return 0

    def _show(self, instance: int) -> None:
        if self._debug:
            self._log.debug("SPT updated. Current state: ")
        if self._info:
            self._log.info(self._spts[instance].table(self._start))
