"""Page information from the kernel, and the two ways of asking which pages are idle.

In the picture: what LPET reads before it decides.

Interface:
    Pagemap(fd)                         /proc/PID/pagemap: flags and page frame numbers
    IdleTracker                         mark(runs), then later idle(runs)
      BitmapTracker                     by /sys/kernel/mm/page_idle/bitmap
      UnmapTracker                      by taking pages out of the page table; any kernel, any user
    choose_tracker(wanted)              the one that Config asks for, or the best there is

A page is idle if nothing has read or written it since it was last marked.

Rules: LPET's thread only. mark() may be given CLEAN and DIRTY pages; UnmapTracker holds them
while it works (lspt.py), so faults of them wait.

BitmapTracker needs root and CONFIG_IDLE_PAGE_TRACKING, and knows four things about it:
  * the kernel clears accessed bits without flushing the TLB, and a touch through a translation
    that is still cached goes unseen: so it has the range's translations flushed after marking;
  * a page that still sits in a per-CPU LRU batch can't be marked: so it reads the marks back, and
    where one is missing it has the batches drained and marks once more;
  * a page frame number is good only at the moment when it is read, so it is read anew each time;
  * touches that only an exited process made are lost to a multi-generation LRU; no matter here.

Sources: Documentation/admin-guide/mm/idle_page_tracking.rst, .../mm/pagemap.rst.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence
from struct import Struct

from edm import log
from edm.lspt import LSPT, Run
from edm.uffd_ctypes import PAGE_SIZE, Userfaultfd, punch_hole

BITMAP = "/sys/kernel/mm/page_idle/bitmap"
TRACKERS = ("auto", "bitmap", "unmap")
SHMEM_ENABLED = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
HUGE = 2 << 20  # bytes
UNMAP_BATCH = 256  # pages in one hold of UnmapTracker

_U64 = Struct("=Q")
_PFN = (1 << 55) - 1
_PRESENT_IN_TOP_BYTE = 0x80  # bit 63
_TOP_BYTE = slice(7, None, 8) if sys.byteorder == "little" else slice(0, None, 8)


class Pagemap:
    """/proc/PID/pagemap of the application, opened by it: 8 bytes a page of its address space."""

    def __init__(self, fd: int, start_addr: int) -> None:
        """Pages are numbered from start_addr (bytes)."""
        self._fd, self._first = fd, start_addr // PAGE_SIZE

    def _read(self, page: int, count: int) -> bytes:
        raw = os.pread(self._fd, 8 * count, 8 * (self._first + page))
        return raw.ljust(8 * count, b"\0")  # a process that has ended has no pages

    def present(self, page: int, count: int) -> list[bool]:
        """Of each page: is it in the page table (bit 63)?"""
        return [bool(b & _PRESENT_IN_TOP_BYTE) for b in self._read(page, count)[_TOP_BYTE]]

    def pfns(self, page: int, count: int) -> list[int]:
        """Of each page: its page frame number; 0 if it has none, or for who may not know it."""
        entries = array("Q", self._read(page, count))
        return [e & _PFN if e >> 63 else 0 for e in entries]


class IdleTracker(ABC):
    name: str

    @abstractmethod
    def mark(self, runs: Sequence[Run]) -> None:
        """Mark these pages idle."""

    @abstractmethod
    def idle(self, runs: Sequence[Run]) -> set[int]:
        """The pages of these runs that nothing has touched since they were marked."""


class BitmapTracker(IdleTracker):
    """The wiki's: page frame number from pagemap, a bit each in the kernel's idle bitmap."""

    name = "bitmap"

    def __init__(self, pagemap: Pagemap, flush_tlb: Callable[[], None], path: str = BITMAP) -> None:
        """flush_tlb empties the TLB of the application's address space."""
        self._pagemap, self._flush_tlb = pagemap, flush_tlb
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def mark(self, runs: Sequence[Run]) -> None:
        pages = sum(count for _, count in runs)
        self._set_bits(runs)
        if len(self.idle(runs)) < pages:
            drain_lru_batches()
            self._set_bits(runs)
        self._flush_tlb()

    def _set_bits(self, runs: Sequence[Run]) -> None:
        words: dict[int, int] = {}
        for page, count in runs:
            for pfn in self._pagemap.pfns(page, count):
                if pfn:
                    words[pfn // 64] = words.get(pfn // 64, 0) | 1 << pfn % 64
        for word, bits in words.items():  # a zero bit changes nothing
            os.pwrite(self._fd, _U64.pack(bits), 8 * word)

    def idle(self, runs: Sequence[Run]) -> set[int]:
        found = set()
        for page, count in runs:
            for at, pfn in enumerate(self._pagemap.pfns(page, count)):
                # A page that isn't in the page table (pfn 0) can't have been touched either, but
                # this tracker never takes one out; who did is not known, so it stays.
                if pfn:
                    (bits,) = _U64.unpack(os.pread(self._fd, 8, pfn // 64 * 8))
                    if bits >> pfn % 64 & 1:
                        found.add(page + at)
        return found


def drain_lru_batches() -> None:
    """Have every CPU put the pages of its LRU batches on the LRU lists.

    Asking for a mapped page of a file to be dropped from the page cache does that: it can't be
    dropped, and the kernel thinks that a batch may hold it (mm/fadvise.c, lru_add_drain_all).
    """
    with open(sys.executable, "rb") as mapped:
        os.posix_fadvise(mapped.fileno(), 0, PAGE_SIZE, os.POSIX_FADV_DONTNEED)


class UnmapTracker(IdleTracker):
    """Marking takes a page out of the page table and leaves it in the memfd.

    The next touch, read or write, maps it again inside the kernel, without an event; "present" in
    pagemap tells. Taking out: write-protect, read the bytes, punch a hole in the memfd, write the
    same bytes back, allow writing. A fault in between waits, as the page is HELD.
    """

    name = "unmap"

    def __init__(
        self, pagemap: Pagemap, memfd: int, uffd: Userfaultfd, lspt: LSPT, start_addr: int
    ) -> None:
        self._pagemap, self._memfd, self._uffd, self._lspt = pagemap, memfd, uffd, lspt
        self._start = start_addr
        self._bytes = memoryview(mmap.mmap(-1, UNMAP_BATCH * PAGE_SIZE))

    def mark(self, runs: Sequence[Run]) -> None:
        for page, count in runs:
            for at in range(page, page + count, UNMAP_BATCH):
                self._unmap(at, min(UNMAP_BATCH, page + count - at))

    def _unmap(self, page: int, count: int) -> None:
        held = self._lspt.hold([(page, count)])
        for first, length, dirty in held:
            address, offset = self._start + first * PAGE_SIZE, first * PAGE_SIZE
            content = self._bytes[: length * PAGE_SIZE]
            # A CLEAN page is write-protected, and stays so: the kernel keeps that in a marker in
            # the page table while the page is away.
            if dirty:
                self._uffd.writeprotect_mapped(address, length * PAGE_SIZE, True)
            if os.preadv(self._memfd, [content], offset) != len(content):
                raise OSError(errno.EIO, "preadv: short read of the memfd")
            punch_hole(self._memfd, offset, len(content))
            if os.pwrite(self._memfd, content, offset) != len(content):
                raise OSError(errno.EIO, "pwrite: short write to the memfd")
            if dirty:
                self._uffd.writeprotect_mapped(address, length * PAGE_SIZE, False)
        for awaited in self._lspt.released([(first, length) for first, length, _ in held]):
            self._uffd.wake(self._start + awaited * PAGE_SIZE, PAGE_SIZE)

    def idle(self, runs: Sequence[Run]) -> set[int]:
        found = set()
        for page, count in runs:
            present = self._pagemap.present(page, count)
            found.update(page + at for at, there in enumerate(present) if not there)
        return found


class TlbFlush:
    """Empties the TLB of another process's address space, with nothing but userfaultfd.

    A scratch area of the application, shared with the pager like the space itself: install its
    first and its last page, then punch both out at once. Unmapping them flushes everything between
    them, and beyond 33 pages x86 flushes the whole address space instead of each page.
    """

    PAGES = 64  # of the scratch area

    def __init__(self, address: int, memfd: int, offset: int, uffd: Userfaultfd) -> None:
        """The scratch area lies at address in the application, at offset (bytes) in the memfd."""
        self._address, self._memfd, self._offset, self._uffd = address, memfd, offset, uffd

    def __call__(self) -> None:
        self._uffd.zeropage(self._address, PAGE_SIZE)
        self._uffd.zeropage(self._address + (self.PAGES - 1) * PAGE_SIZE, PAGE_SIZE)
        punch_hole(self._memfd, self._offset, self.PAGES * PAGE_SIZE)


def bitmap_missing() -> str:
    """Why this process can't use the kernel's idle bitmap; "" if it can."""
    try:
        os.close(os.open(BITMAP, os.O_RDWR | os.O_CLOEXEC))
        return pfns_missing()
    except OSError as error:
        return f"{error.filename}: {error.strerror}"


def pfns_missing() -> str:
    """Why this process can't know page frame numbers; "" if it can. Raises OSError without /proc."""
    here = mmap.mmap(-1, PAGE_SIZE)
    here[0] = 1
    address = ctypes.addressof(ctypes.c_char.from_buffer(here))
    with open("/proc/self/pagemap", "rb") as pagemap:
        pfn = Pagemap(pagemap.fileno(), 0).pfns(address // PAGE_SIZE, 1)[0]
    return "" if pfn else "/proc/PID/pagemap hides page frame numbers: CAP_SYS_ADMIN shows them"


def unmap_missing() -> str:
    """Why UnmapTracker can't be used here; "" if it can.

    It writes pages back into a memfd, and a kernel that makes huge pages of that would put pages of
    zeros where nothing is to be. Source: Documentation/admin-guide/mm/transhuge.rst.
    """
    memfd = os.memfd_create("edm")
    try:
        os.ftruncate(memfd, 4 * HUGE)
        os.pwrite(memfd, bytes(PAGE_SIZE), HUGE + PAGE_SIZE)
        if os.fstat(memfd).st_blocks * 512 > PAGE_SIZE:
            return f"this kernel makes huge pages of memory files: echo advise > {SHMEM_ENABLED}"
        return ""
    finally:
        os.close(memfd)


def choose_tracker(wanted: str) -> str:
    """The name of the tracker to use for Config.idle_tracker, one of TRACKERS.

    Raises ValueError when it can't be had.
    """
    missing = bitmap_missing() if wanted != "unmap" else ""
    if wanted == "bitmap" and missing:
        raise ValueError(
            f"idle_tracker: the bitmap can't be used here ({missing}); "
            "take --idle-tracker unmap, which needs no root and no kernel option"
        )
    name = "unmap" if missing or wanted == "unmap" else "bitmap"
    if name == "unmap" and (why := unmap_missing()):
        raise ValueError(f"idle_tracker: unmap can't be used here: {why}")
    log.logger("Lpet").info(
        "idle tracker: %s%s", name, f" (no bitmap: {missing})" if missing else ""
    )
    return name
