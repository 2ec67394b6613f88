"""Page information from the kernel, and the two ways of asking which pages are idle.

In the picture: what LPET reads before it decides.

Interface:
    Pagemap(fd, start_addr)      /proc/PID/pagemap: uffd-wp bits, presence, page frame numbers
    BitmapTracker                mark_idle(page, chosen), then later used(page, chosen)
    choose_tracker(wanted)       the name of the one that Config asks for, or of the best that works here
    bitmap_missing()             why the bitmap can't be used here, for doctor.py

A page is idle if nothing has read or written it since it was last marked idle. Neighbours are named by the first
page, and a byte for each, which is 255 for those that are meant. An answer is of such bytes, too.

`bitmap`, BitmapTracker, is the wiki's way, by /sys/kernel/mm/page_idle/bitmap. It needs root and
CONFIG_IDLE_PAGE_TRACKING.
  * A page that is still in a per-CPU LRU batch can't be marked idle. So the batches are drained first. That
    takes as long as to read 16 words of the bitmap.
  * A page frame number is good only at the moment when it is read, so it is read anew each time.

`unmap`, which is Lpet itself, needs neither root nor a kernel option. It takes a page out of the page table and
puts it back into the memfd; the next touch maps it again inside the kernel, without an event, and "present"
in pagemap shows that.

Rules: any thread may use a Pagemap. A tracker belongs to one Lpet.

Sources: Documentation/admin-guide/mm/idle_page_tracking.rst, .../mm/pagemap.rst.
"""

import os

from edm.uffd_ctypes import PAGE_SIZE

BITMAP = "/sys/kernel/mm/page_idle/bitmap"
HUGE = 2 << 20  # bytes

# For Pagemap.find, by an entry's top byte: bit 57, the uffd-wp bit, is not set; bit 63 is: the page is in the page table.
WRITTEN = bytes(0 if byte & 0x02 else 255 for byte in range(256))
PRESENT = bytes(255 if byte & 0x80 else 0 for byte in range(256))


class Pagemap:
    """/proc/PID/pagemap of the application, opened by it: 8 bytes a page of its address space, little-endian, as are
    all machines that EDM knows."""

    def __init__(self, fd: int, start_addr: int) -> None:
        """Pages are numbered from start_addr (bytes)."""
        self.fd, self._first = fd, start_addr // PAGE_SIZE

    def _read(self, page: int, count: int) -> bytes:
        # A process that has ended has no pages.
        return os.pread(self.fd, 8 * count, 8 * (self._first + page)).ljust(8 * count, b"\0")

    def find(self, page: int, chosen: bytes, which: bytes) -> bytes:
        """Those of the chosen pages that are WRITTEN, since they got the uffd-wp bit; or PRESENT, in the page table.
        The bytes of others are less than 255.

        The bit of shared memory stays in the page table when the page has gone. A page without it counts as
        written: so do all, once the process has ended.
        """
        found = self._read(page, len(chosen))[7::8].translate(which)  # the top bytes
        both = int.from_bytes(found, "big") & int.from_bytes(chosen, "big")
        return both.to_bytes(len(chosen), "big")

    def pfns(self, page: int, count: int) -> list[int]:
        """For each page: its page frame number; 0 if it has none, or this process may not know it."""
        entries = memoryview(self._read(page, count)).cast("Q")
        return [e & (1 << 55) - 1 if e >> 63 else 0 for e in entries]  # bits 0 to 54

    def is_gone(self) -> bool:
        """Has the process ended, or replaced itself by another program?"""
        return not os.pread(self.fd, 8, 8 * self._first)


class BitmapTracker:
    def __init__(self, pagemap: Pagemap) -> None:
        self._pagemap = pagemap
        self._fd = os.open(BITMAP, os.O_RDWR | os.O_CLOEXEC)

    def mark_idle(self, page: int, chosen: bytes) -> None:
        """Mark these pages idle."""
        if 255 in chosen:
            # Have every CPU put the pages of its LRU batches on the LRU lists. Asking for a mapped page of a file to be
            # dropped from the page cache does that: it can't be dropped, and the kernel thinks that a batch may
            # hold it (mm/fadvise.c, lru_add_drain_all).
            with open("/proc/self/exe", "rb") as mapped:
                os.posix_fadvise(mapped.fileno(), 0, PAGE_SIZE, os.POSIX_FADV_DONTNEED)
        for _, at, bit in self._bits(page, chosen):  # a zero bit of the word changes nothing
            os.pwrite(self._fd, bit.to_bytes(8, "little"), at)

    def used(self, page: int, chosen: bytes) -> bytes:
        """Those of these pages that were touched since they were marked. A page that is not in the page table
        counts as used: nothing is known of it."""
        used = bytearray(chosen)
        for place, at, bit in self._bits(page, chosen):
            if int.from_bytes(os.pread(self._fd, 8, at), "little") & bit:
                used[place] = 0
        return bytes(used)

    def _bits(self, page: int, chosen: bytes) -> list[tuple[int, int, int]]:
        """Of those that have a page frame number: (place in `chosen`, offset of a word in the bitmap, the page's bit
        there)."""
        pfns = enumerate(self._pagemap.pfns(page, len(chosen)))
        return [(i, pfn // 64 * 8, 1 << pfn % 64) for i, pfn in pfns if pfn and chosen[i] == 255]


def bitmap_missing() -> str:
    """Why this process can't use the kernel's idle bitmap; "" if it can."""
    if not os.access(BITMAP, os.R_OK | os.W_OK):
        return f"{BITMAP}: it is not there, or only for root"
    with open("/proc/self/pagemap", "rb") as pagemap:
        # Of the page that has this object: CPython's id is an address.
        [pfn] = Pagemap(pagemap.fileno(), 0).pfns(id(pagemap) // PAGE_SIZE, 1)
    return "" if pfn else "/proc/PID/pagemap hides page frame numbers: CAP_SYS_ADMIN shows them"


def choose_tracker(wanted: str) -> str:
    """The name of the tracker to use for Config.idle_tracker, bitmap, unmap or auto.

    Raises ValueError when it can't be had, or if pages can't be written back into a memfd here. LPET does that
    to mark pages idle without the bitmap, and when the store has refused some. A kernel that makes huge pages of a
    memfd would put pages of zeros where nothing is to be. Source: Documentation/admin-guide/mm/transhuge.rst.
    """
    missing = bitmap_missing() if wanted != "unmap" else "it is not wanted"
    if wanted == "bitmap" and missing:
        raise ValueError(f"idle_tracker: no bitmap here ({missing}); take --idle-tracker unmap")
    with open(os.memfd_create("edm"), "r+b", 0) as memfd:
        memfd.truncate(4 * HUGE)
        os.pwrite(memfd.fileno(), bytes(PAGE_SIZE), HUGE + PAGE_SIZE)
        if os.fstat(memfd.fileno()).st_blocks * 512 > PAGE_SIZE:
            # From Linux 6.10 on each size has a file, too, which may say always where the first one says never.
            files = "/sys/kernel/mm/transparent_hugepage/{,hugepages-*/}shmem_enabled"
            why = f"this kernel makes huge pages of memory files: echo advise | tee {files}"
            raise ValueError(f"pages can't be written back into memory here: {why}")
    return "unmap" if missing else "bitmap"
