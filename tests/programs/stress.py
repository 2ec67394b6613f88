"""C threads write and check memory while LPET evicts it, in the right order or in a wrong one.

argv: stress.c as a library, the order, threads, seconds, clean_tracking, and high_threshold. Prints
"wrong N of M, E evicted". The orders: "right"; "bytes first": the bytes are read before the pages leave
the page table; "marks first": the marks are.
"""

import _socket
import ctypes
import os
import socket
import sys

from edm import address_space, pager
from edm.edm import Config
from edm.lpet import Lpet
from edm.page_store import PageStore
from edm.uffd_ctypes import PAGE_SIZE

library, order, threads, seconds, tracking, high = sys.argv[1:]
PAGES = 4096 if int(high) <= 1024 else 16384


class BytesFirst(Lpet):
    def _take_out(self, left, here):
        for page, count in here:
            content = os.pread(self._pipe._memfd, count * PAGE_SIZE, page * PAGE_SIZE)
            assert os.write(self._pipe._in, content) == len(content)
            self._pipe._pages += count
        self._remove(left)
        return self._pagemap.written(here)


class MarksFirst(Lpet):
    def _take_out(self, left, here):
        runs = self._pagemap.written(here)
        self._pipe.take(here)
        self._remove(left)
        return runs


def application(control):
    space = address_space.Space(config, control)
    area = space.mmap(PAGES * PAGE_SIZE)
    stress = ctypes.CDLL(library).stress
    stress.restype = ctypes.c_uint64
    steps, base = ctypes.c_uint64(), ctypes.addressof(ctypes.c_ubyte.from_buffer(area))
    wrong = stress(
        ctypes.c_void_p(base), ctypes.c_uint64(PAGES), ctypes.c_uint64(int(threads)),
        ctypes.c_double(float(seconds)), ctypes.byref(steps),
    )  # fmt: skip
    figures = space.figures()
    evicted = figures["evicted_dirty"], figures["evicted_clean"]
    print(f"wrong {wrong} of {steps.value}, {evicted} evicted", flush=True)


pager.Lpet = {"right": Lpet, "bytes first": BytesFirst, "marks first": MarksFirst}[order]
config = Config(high_threshold=int(high), low_threshold=int(high) * 7 // 8, clean_tracking=tracking)
ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
if os.fork() == 0:
    theirs.close()
    application(ours)
    sys.exit()
ours.close()
control = socket.socket(fileno=theirs.detach())
hello, fds = address_space.receive_hello(control)
store = PageStore(None, config.start_addr, config.end_addr)
pager.Pager(config, hello, fds, control, store, lpet_is_process=True).run()
os.wait()
