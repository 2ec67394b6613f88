"""The MPI messages between an instance and the DMS.

In the picture: the arrow marked MPI. What travels along it, byte by byte; who sends is
mpi_client.py, who answers is dms.py.

A message is a header of 16 bytes and what belongs to it, and is as long as MPI says that it is.

    header   u16 kind, u16 stride, u32 count, u64 page         (little-endian)

    from the instance                          from the DMS
    HELLO      GEOMETRY                        OK, count 1 if the disk is kept; then
                                               the doorbell's address (doorbell.py)
    RINGS                                      OK: from now on the instance rings
    GET        count pages from page on,       NEW_PAGES: they were never accessed
               stride apart (0: as 1)          CONTENT: their bytes follow
                                               (either for the first count of them)
                                               UNREADABLE, a reason: the first one is lost
    EVICT      count runs, then the bytes of   OK: what was sent is written
               the dirty ones, in order
    STORE      as EVICT; the pages stay        OK: likewise
    SYNC                                       OK: what was written survives a crash
    FREE       count pages from page           OK: they are as never accessed
    LOCATIONS  count pages from page           LOCATIONS: a byte of the SPT each
    BYE                                        OK: the DMS forgets the instance

    run      u64 page, u32 count, u32 1 if dirty

A page is named by its number in the space: (address - start_addr) / PAGE_SIZE. Instead of any of
these answers the DMS may send ERROR with a reason in UTF-8; then every page is where it was.

Each MpiClient of an instance has an MPI tag of its own for its requests and their answers, and one
request under way at a time.
"""

from __future__ import annotations

import mmap
from struct import Struct

from edm.uffd_ctypes import PAGE_SIZE

VERSION = 2
MAX_PAGES = 256  # at most so many pages of content in one message (1 MiB)
MAX_STRIDE = 64  # pages at most from one page of a GET to the next
MAX_RUNS = MAX_PAGES  # at most so many runs in one EVICT
MAX_LOCATIONS = 1 << 16  # at most so many pages in one LOCATIONS

HELLO, GET, EVICT, FREE, LOCATIONS, BYE, RINGS, STORE, SYNC = range(1, 10)
OK, NEW_PAGES, CONTENT, ERROR, UNREADABLE = range(16, 21)

HEADER = Struct("<HHIQ")
GEOMETRY = Struct("<IIQQ")  # version, page size, start_addr, end_addr
RUN = Struct("<QII")

# Seconds after a request that was answered for which the DMS is surely awake: an instance rings
# after that. A DMS sleeps when it has had nothing to do for twice as long.
AWAKE = 250e-6

MAX_MESSAGE = HEADER.size + MAX_RUNS * RUN.size + MAX_PAGES * PAGE_SIZE  # bytes

# A byte of the SPT, and of a LOCATIONS answer: where a page is. INSTANCE | DISK is a page that the
# instance has and whose bytes on the disk are the same, unless it has been written meanwhile. SLOT
# is the SPT's own, see dms.py.
NEW, INSTANCE, DISK, SLOT = 0, 1, 2, 4


def location(byte: int, instance: int) -> str:
    """A byte of the SPT in the wiki's words: NEW, INSTANCE_n or DISK."""
    if byte & INSTANCE:
        return f"INSTANCE_{instance}"
    return "DISK" if byte & DISK else "NEW"


class DMSError(OSError):
    """The DMS refused a request; the text is its reason."""


class DMSGone(Exception):
    """The DMS's process has ended, and will answer no more."""


class MessageBuffer:
    """Memory for one message, made once: the header, then a body that begins at a page boundary."""

    def __init__(self) -> None:
        begin = PAGE_SIZE - HEADER.size
        memory = memoryview(mmap.mmap(-1, begin + MAX_MESSAGE))
        self.whole = memory[begin:]
        self.body = memory[PAGE_SIZE:]

    def head(self, kind: int, count: int = 0, page: int = 0, stride: int = 0) -> None:
        """Write the header."""
        HEADER.pack_into(self.whole, 0, kind, stride, count, page)

    def message(self, body_length: int = 0) -> memoryview:
        """The header and the first body_length bytes of the body."""
        return self.whole[: HEADER.size + body_length]
