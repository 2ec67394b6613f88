"""Page information from the kernel, and the two ways of asking which pages are idle.

In the picture: what LPET reads before it decides.

Interface:
    Pagemap(fd, start_addr)      /proc/PID/pagemap: uffd-wp bits, presence, page frame numbers
    BitmapTracker, UnmapTracker  mark_idle(runs), then later idle(runs)
    choose_tracker(wanted)       the name of the one that Config asks for, or of the best that works here
    bitmap_missing()             why the bitmap can't be used here, for doctor.py
    pages_in(runs)               the pages of these runs

A page is idle if nothing has read or written it since it was last marked idle.

BitmapTracker is the wiki's way, by /sys/kernel/mm/page_idle/bitmap. It needs root and
CONFIG_IDLE_PAGE_TRACKING.
  * A page that is still in a per-CPU LRU batch can't be marked idle. So the batches are drained first. That
    takes as long as to read 16 words of the bitmap.
  * A page frame number is good only at the moment when it is read, so it is read anew each time.

UnmapTracker needs neither root nor a kernel option. It takes a page out of the page table and puts
it back into the memfd; the next touch maps it again inside the kernel, without an event, and "present" in
pagemap shows that.

Rules: any thread may use a Pagemap. A tracker belongs to one Lpet.

Sources: Documentation/admin-guide/mm/idle_page_tracking.rst, .../mm/pagemap.rst.
"""

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

from edm.lspt import Run
from edm.uffd_ctypes import PAGE_SIZE

BITMAP = "/sys/kernel/mm/page_idle/bitmap"
HUGE = 2 << 20  # bytes

_PFN = (1 << 55) - 1
_TOP_BYTE = slice(7, None, 8)  # of little-endian words: so are all machines that EDM knows
_PRESENT, _UFFD_WP = 0x80, 0x02  # bits 63 and 57, in the top byte
_WRITTEN = bytes(0 if byte & _UFFD_WP else 255 for byte in range(256))


class Pagemap:
    """/proc/PID/pagemap of the application, opened by it: 8 bytes a page of its address space."""

    def __init__(self, fd: int, start_addr: int) -> None:
        """Pages are numbered from start_addr (bytes)."""
        self.fd, self._first = fd, start_addr // PAGE_SIZE

    def _read(self, page: int, count: int) -> bytes:
        raw = os.pread(self.fd, 8 * count, 8 * (self._first + page))
        return raw.ljust(8 * count, b"\0")  # a process that has ended has no pages

    def written(self, page: int, here: bytes) -> bytes:
        """For each page, from `page` on: 255 if its byte in `here` is 255, and it was written since it got
        the uffd-wp bit; else less.

        The bit (57) of shared memory stays in the page table when the page has gone. A page without it
        counts as written: so do all, once the process has ended.
        """
        written = self._read(page, len(here))[_TOP_BYTE].translate(_WRITTEN)
        both = int.from_bytes(written, "big") & int.from_bytes(here, "big")
        return both.to_bytes(len(here), "big")

    def absent(self, runs: Iterable[Run]) -> set[int]:
        """The pages of these runs that are not in the page table (bit 63)."""
        read = ((page, self._read(page, count)[_TOP_BYTE]) for page, count in runs)
        return {at for page, tops in read for at, top in enumerate(tops, page) if top < _PRESENT}

    def pfns(self, page: int, count: int) -> list[int]:
        """For each page: its page frame number; 0 if it has none, or this process may not know it."""
        entries = array("Q", self._read(page, count))
        return [e & _PFN if e >> 63 else 0 for e in entries]

    def is_gone(self) -> bool:
        """Has the process ended, or replaced itself by another program?"""
        return not os.pread(self.fd, 8, 8 * self._first)


class BitmapTracker:
    def __init__(self, pagemap: Pagemap, path: str = BITMAP) -> None:
        self._pagemap = pagemap
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def mark_idle(self, runs: Sequence[Run]) -> None:
        """Mark these pages idle."""
        if runs:
            drain_lru_batches()
        words: dict[int, int] = {}
        for _, at, bit in self._bits(runs):
            words[at] = words.get(at, 0) | bit
        for at, bits in words.items():  # a zero bit changes nothing
            os.pwrite(self._fd, bits.to_bytes(8, "little"), at)

    def idle(self, runs: Iterable[Run]) -> set[int]:
        """The pages of these runs that nothing has touched since they were marked."""
        words = ((page, os.pread(self._fd, 8, at), bit) for page, at, bit in self._bits(runs))
        return {page for page, word, bit in words if int.from_bytes(word, "little") & bit}

    def _bits(self, runs: Iterable[Run]) -> Iterator[tuple[int, int, int]]:
        """(page, offset of a word in the bitmap, the page's bit there). A page that is not in the page table
        has no frame number, and counts as used: nothing is known of it."""
        for page, count in runs:
            for at, pfn in enumerate(self._pagemap.pfns(page, count), start=page):
                if pfn:
                    yield at, pfn // 64 * 8, 1 << pfn % 64


def drain_lru_batches() -> None:
    """Have every CPU put the pages of its LRU batches on the LRU lists.

    Asking for a mapped page of a file to be dropped from the page cache does that: it can't be
    dropped, and the kernel thinks that a batch may hold it (mm/fadvise.c, lru_add_drain_all).
    """
    with open("/proc/self/exe", "rb") as mapped:
        os.posix_fadvise(mapped.fileno(), 0, PAGE_SIZE, os.POSIX_FADV_DONTNEED)


class UnmapTracker:
    def __init__(self, pagemap: Pagemap, unmap: Callable[[Iterable[Run]], None]) -> None:
        """unmap takes pages out of the page table, and puts them back into the memfd."""
        self.mark_idle, self.idle = unmap, pagemap.absent


def bitmap_missing() -> str:
    """Why this process can't use the kernel's idle bitmap; "" if it can."""
    try:
        with open(BITMAP, "r+b", 0), open("/proc/self/pagemap", "rb") as pagemap:
            # Of the page that has this object: CPython's id is an address.
            [pfn] = Pagemap(pagemap.fileno(), 0).pfns(id(pagemap) // PAGE_SIZE, 1)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return "" if pfn else "/proc/PID/pagemap hides page frame numbers: CAP_SYS_ADMIN shows them"


def choose_tracker(wanted: str) -> str:
    """The name of the tracker to use for Config.idle_tracker, bitmap, unmap or auto.

    Raises ValueError when it can't be had, or if pages can't be written back into a memfd here. UnmapTracker does
    that, and LPET when the store has refused some. A kernel that makes huge pages of a memfd would put pages of
    zeros where nothing is to be. Source: Documentation/admin-guide/mm/transhuge.rst.
    """
    missing = bitmap_missing() if wanted != "unmap" else "it is not wanted"
    if wanted == "bitmap" and missing:
        other = "take --idle-tracker unmap, which needs no root and no kernel option"
        raise ValueError(f"idle_tracker: the bitmap can't be used here ({missing}); {other}")
    with open(os.memfd_create("edm"), "r+b", 0) as memfd:
        memfd.truncate(4 * HUGE)
        os.pwrite(memfd.fileno(), bytes(PAGE_SIZE), HUGE + PAGE_SIZE)
        if os.fstat(memfd.fileno()).st_blocks * 512 > PAGE_SIZE:
            # From Linux 6.10 on each size has a file, too, which may say always where the first one says never.
            files = "/sys/kernel/mm/transparent_hugepage/{,hugepages-*/}shmem_enabled"
            why = f"this kernel makes huge pages of memory files: echo advise | tee {files}"
            raise ValueError(f"pages can't be written back into memory here: {why}")
    return "unmap" if missing else "bitmap"


def pages_in(runs: Iterable[Run]) -> Iterator[int]:
    """The pages of these runs."""
    for page, count in runs:
        yield from range(page, page + count)
