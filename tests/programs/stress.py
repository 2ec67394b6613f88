"""C threads write and check memory while LPET evicts it, in the right order or in a wrong one.

argv: stress.c as a library, the order, the way, threads, seconds, clean_tracking. Prints "wrong N of M,
(D, C) evicted": words, pages that were written, and clean ones. The orders: "right"; "bytes first": the
bytes are read before the pages leave the page table; "marks first": the marks are. The ways say which
pages leave.
"""

import _socket
import ctypes
import os
import sys
import time

from edm import address_space, lpet, pager
from edm.edm import Config
from edm.lpet import CHOSEN_RUN, Lpet
from edm.page_idle import WRITTEN
from edm.page_store import PageStore
from edm.uffd_ctypes import PAGE_SIZE

library, order, way, threads, seconds, tracking = sys.argv[1:]
PAGES = 4096
# high_threshold, and how old pages are that leave. With 0 a batch is all that is here, used or not.
HIGH, lpet.AGE = {
    "the wiki's way": (64, lpet.AGE),
    "by age": (1280, lpet.AGE),
    "whole batches": (1280, 0),
}[way]
USED = HIGH * 5 // 4  # pages: more than may be here, or those that leave would not be in use
MOMENT = 1e-3  # seconds: on a machine with much to do, the threads hardly run in less


class BytesFirst(Lpet):
    def _move_out(self, claimed):
        for first, content in self._content_of(claimed.page, claimed.chosen, CHOSEN_RUN):
            assert os.preadv(self._memfd, [content], first * PAGE_SIZE) == len(content)
        self.early = bytes(self._bytes)
        time.sleep(MOMENT)
        self._store.takes_pipes = False
        return super()._move_out(claimed)

    def _empty_pipe(self, spans):
        super()._empty_pipe(spans)
        self._bytes[:] = self.early


class MarksFirst(Lpet):
    def _move_out(self, claimed):
        written = self._pagemap.find(claimed.page, claimed.chosen, WRITTEN)
        time.sleep(MOMENT)
        spans, _ = super()._move_out(claimed)
        return spans, written


def application(control):
    space = address_space.Space(config, control, 0, False)
    area = space.mmap(PAGES * PAGE_SIZE)
    stress = ctypes.CDLL(library).stress
    stress.restype = ctypes.c_uint64
    steps, base = ctypes.c_uint64(), ctypes.addressof(ctypes.c_ubyte.from_buffer(area))
    wrong = stress(
        ctypes.c_void_p(base), ctypes.c_uint64(PAGES), ctypes.c_uint64(USED),
        ctypes.c_uint64(int(threads)), ctypes.c_double(float(seconds)), ctypes.byref(steps),
    )  # fmt: skip
    figures = space.figures()
    evicted = figures["evicted_dirty"], figures["evicted_clean"]
    print(f"wrong {wrong} of {steps.value}, {evicted} evicted", flush=True)


pager.Lpet = {"right": Lpet, "bytes first": BytesFirst, "marks first": MarksFirst}[order]
config = Config(high_threshold=HIGH, low_threshold=HIGH * 7 // 8, clean_tracking=tracking)
ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
if os.fork() == 0:
    theirs.close()
    application(ours)
    sys.exit()
ours.close()
pager.page_for(theirs, lambda hello: PageStore(hello, 0))
os.wait()
