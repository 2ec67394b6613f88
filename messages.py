"""The MPI messages between an instance and the DMS.

In the picture: the arrow marked MPI. mpi_client.py sends the questions, dms.py the answers.

A message is a header of 16 bytes and a body, if it has one. MPI gives its length.

    header   u16 kind, u16 more, u32 count, u64 page           (little-endian)

    from the instance                          from the DMS
    GET        count pages from page on,       NEW_PAGES: they were never accessed
               `more` pages apart              CONTENT: their bytes follow
                                               (each of the first count of them)
    PUT        count pages from page on leave, OK: what was sent is written
               or if `more` is 1, stay; of each
               run of dirty ones: dirty, then
               the bytes
    SYNC       `more`: one of SYNC_PHASES      OK: this step is done; after the last one,
                                               what was written survives a crash
    FREE       count pages from page           OK: they are as never accessed
    BYE                                        OK: the instance has left

    dirty    u64 page, u32 count: a RUN

The unused fields of a question's header are 0.

Before the first question, each DMS tells each instance the pages that an earlier job has left to it on the DMS's
disk, as RUNs behind each other. All ranks do this at once, see rank.py.

A page's number is (address - start_addr) / PAGE_SIZE. A range may have pages of other DMSs (mpi_client.py). A DMS
is never sent their bytes, so to it they stay NEW.

Instead of any of these answers the DMS may send ERROR: `more` is an errno, and words in UTF-8 follow. Then no
page has moved, though a part of a PUT may be written. ERROR to a GET says that the first page can't be read.

That both ends have the same VERSION (rank.py) and settings is seen before the first message.

A question and its answer have the same MPI tag. No other question between these two ranks has that tag until the
answer is there.
Messages of different tags have no order.
"""

import mmap
from struct import Struct

from edm.uffd_ctypes import PAGE_SIZE, PAGES_AT_ONCE

GET, PUT, FREE, SYNC, BYE = range(1, 6)
OK, ERROR = 16, 19  # and NEW_PAGES, CONTENT, which are 17 and 18

HEADER = Struct("<HHIQ")
RUN = Struct("<QI")  # the first page of neighbours, and how many they are

MAX_MESSAGE = HEADER.size + PAGES_AT_ONCE * (RUN.size + PAGE_SIZE)  # bytes


class MessageBuffer:
    """Memory for one message that is received, or answers one: the header, then a body that begins at a page boundary:
    pread takes twice as long to 16 bytes behind one, and 6 times as long for 256 pages."""

    def __init__(self) -> None:
        begin = PAGE_SIZE - HEADER.size
        self.whole = memoryview(mmap.mmap(-1, begin + MAX_MESSAGE))[begin:]
        self.body = self.whole[HEADER.size :]

    def message(self, kind: int, count: int = 0, more: int = 0, body: bytes = b"") -> memoryview:
        """Write this answer; returns it. A body that is in its place already takes no time."""
        HEADER.pack_into(self.whole, 0, kind, more, count, 0)
        self.body[: len(body)] = body
        return self.whole[: HEADER.size + len(body)]
