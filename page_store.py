"""PageStore: one instance's pages outside of memory. Where each is (SPT), and the disk file.

In the picture: the box on the right. On one machine it is in the pager's own process; over MPI the
DMS (dms.py) has one for each instance, and the pager an MpiStore (mpi_client.py), which has the same
methods.

Interface: PageStore(path, start_addr, end_addr, ...)
    ask_get, take_get    pages come, for a pager: asked for, and later taken; or drop_get
    get                  the same for the DMS, in one step
    put                  pages go, or only their bytes
    free, sync, locations, runs_on_disk, table, close
    offers, start        of a kept store that has only a share of the pages: the syncs it can go on from
    sync_steps           sync, of several stores as one: all do the first step, then all the next one
    SPT                  a byte a page: where it is now
    disk_folder          where a disk without a path is

Rules:
    * A page belongs to one thread at a time, of any process. The LSPT sees to that. So a page's own
      SPT byte and checksum need no lock.
    * All state that changes is in shared memory. A process that was forked after the store was made
      may call put while its parent calls the other methods.
    * A kept disk has one lock for all processes. put, free and sync hold it. get does not.
      If a process is killed while it holds the lock, nobody gets it any more. Who forked it must end.
    * A disk that is not kept has no lock. Its calls share nothing but the pages that they name.
    * One thread alone calls take_get.

A page's bytes stay on the disk while the instance has the page too. So a clean page goes back
without its bytes: the disk has them. INSTANCE says that the page was sent to the instance, and has
not gone back since.

    SPT byte          location        a put of a range that has the page makes it
    NEW               never accessed
    INSTANCE          INSTANCE_n      DISK if dirty, else NEW: it never was anything but zeros
    INSTANCE | DISK   INSTANCE_n      DISK
    DISK              DISK

The disk file is sparse. All numbers in it are little-endian.

    at 0, at 64 KiB    the header, twice: HEADER and its crc32
    at 128 KiB         of a kept disk: the table, twice
    behind it, at a    the first place of each page: page n is n times the page size from there
    multiple of 64 KiB
    behind those       of a kept disk: the second place of each page

A disk that is not kept has no table and no second places. No job reads what another one has left
there, and its header says so. A file without a name has no header.

The table of a kept disk consists of blocks of 4096 bytes: BLOCK and its crc32. A block is about 816
pages. It has two things for each: its place, which is what the SPT says of where its bytes are
(0, DISK | FIRST, DISK | SECOND), and the crc32 of the bytes. A block that is all zeros is about pages
that were never written.

The epoch counts the syncs. The header has the epoch of the last one. If that is even, the first copy
of the table counts, if it is odd, the second. So the header names one whole table, and a crash needs
no recovery. The table of now is in memory only: 6 bytes for each page that was used.

    put     writes a page to the place that the last sync does not use.
    sync    1. writes the blocks that have changed to the copy of the table that does not count. Those
               are the blocks that changed since the last sync, or in the interval before it.
            2. fsync: pages and table are durable.
            3. writes the first header with the next epoch, fsync.
            4. writes the second header.
    start   takes the newer one of the headers that are whole. If the two differ, it first makes both
            the same and durable, as steps 3 and 4 do.

If step 2 or 3 fails, it is not known which epoch counts. Then nothing is written any more.

Several stores, each with a Share of the pages (stripes.py), sync as one. Their client lets all of them
do steps 1 to 3, and step 4 only when all have. Meanwhile nothing is put, freed or synced, so between the
two a disk has two whole epochs, which its headers name: it offers both. At the start the client takes
the newest epoch that all offer. That is one of the last sync that returned, or of the one under way:
if one disk does not offer the newer epoch, no disk has done step 4, and all have the older one still;
if all offer it, it is whole. Going back is a start from headers that differ, as after any crash.

A block is damaged if its crc32 is wrong, its number is not its own, or its epoch is later than the
header's. Its pages can't be read until they are written or freed.

A page whose put has failed is TORN: the bytes at its new place may be anything. No sync returns until
it is written or freed.

Room: free punches the places that the last sync does not use. The next sync punches the others of
these pages. A page's blocks in the table get their room before the page is written. When the file
system is full, put punches every place that neither the last sync nor the SPT uses, once an epoch,
and tries again.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import operator
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from logging import DEBUG, INFO
from struct import Struct

from edm import log
from edm.lspt import ByteTable, Run, runs
from edm.stripes import ALL, Share
from edm.uffd_ctypes import PAGE_SIZE, PAGES_AT_ONCE, punch_hole, semaphore

# A byte of the SPT: where a page is. INSTANCE | DISK is a page that the instance has and whose bytes on
# the disk are the same, unless it has been written meanwhile.
NEW, INSTANCE, DISK = 0, 1, 2
FIRST, SECOND = 4, 8  # beside DISK: in which place. Both: in a damaged block, so it can't be read
TORN = 16  # a put of the page has failed

NEW_PAGES, CONTENT = 17, 18  # what a get gives: pages never accessed; bytes. On the wire too

Bytes = tuple[int, memoryview]  # the first page of neighbours, and what is in them

# Bytes. A longer write makes a larger folio of the page cache, and to write one page of that takes ext4
# longer: measured 28 µs after writes of 1 MiB, 5 after 128 KiB; a page in a row takes 2.3 and 1.5.
AT_ONCE = 128 << 10

# The disk file's format.
MAGIC, FORMAT = b"EDM disk", 3
# magic, format; the share: which, of (0: not kept), stripe (pages; 0 if it has all of them); page size,
# start_addr, end_addr; epoch
HEADER = Struct("<8sH HHH IQQ Q")
HEADER_COPY = 64 << 10  # bytes from one copy to the other; divisible by every page size
TABLE = 2 * HEADER_COPY
BLOCK_PAGES = 816
BLOCK = Struct("<IQ816s3264s")  # number; epoch; of each page: its place; of each page: its crc32
CRC = 4  # bytes
BLOCK_SIZE = BLOCK.size + CRC
UNREADABLE = DISK | FIRST | SECOND

# Of a block. SAME: both copies say the same. WRITE_TWICE: the next two syncs write it, which makes it 2,
# and then SAME. 0: it was never used.
SAME, WRITE_TWICE = 1, 3

# Words: of the last sync; errno, if nothing may be written (EBUSY: a sync is under way); for which epoch.
EPOCH, NO_WRITES, ROOM_MADE = 0, 1, 2

# What becomes of an SPT byte, as tables for bytes.translate.
_DROPPED = bytes(byte & ~INSTANCE for byte in range(256))
_LOCATION = bytes(byte & (INSTANCE | DISK) for byte in range(256))
_TORN = bytes(byte | TORN for byte in range(256))
_WHOLE = bytes(range(TORN))  # the bytes of pages that are not TORN
_PLACE = bytes(byte & UNREADABLE if byte < TORN else 0 for byte in range(256))
ON_DISK = re.compile(rb"[\2\3]+")  # of PageStore.locations
_TO_WRITE = re.compile(rb"[\2\3]")
# {place: the pages that are written there, by their places at the last sync}. No page is written to the
# place that it has there.
_TARGETS = {DISK | FIRST: re.compile(rb"[^\x06]+"), DISK | SECOND: re.compile(rb"\x06+")}
_NOWHERE = re.compile(rb"\0+")  # of the places at a sync
# {place: the pages that do not use it, by the places that they use}.
_SPARE = {FIRST: re.compile(rb"[\x00\x0a]+"), SECOND: re.compile(rb"[\x00\x06]+")}


def disk_folder() -> str:
    """Where a disk without a path is: not in /tmp, which is memory on many machines."""
    return os.environ.get("TMPDIR") or "/var/tmp"


# ---------------------------------------------------------------- bytes


def _write_all(fd: int, content: bytes | memoryview, at: int) -> None:
    """Write all of it there, at most AT_ONCE bytes at a time."""
    while (done := os.pwrite(fd, content[:AT_ONCE], at)) < len(content):
        content, at = content[done:], at + done


def _crc(content: memoryview, at: int) -> int:
    """The crc32 of the at-th page of this content."""
    return zlib.crc32(content[at * PAGE_SIZE : (at + 1) * PAGE_SIZE])


def _sealed(content: bytes) -> bytes:
    """And its crc32."""
    return content + zlib.crc32(content).to_bytes(CRC, "little")


def data(fd: int, at: int, end: int) -> Iterator[tuple[int, int]]:
    """(begin, length) of what is no hole in a file, between these two places (bytes)."""
    try:
        while (at := os.lseek(fd, at, os.SEEK_DATA)) < end:
            hole = os.lseek(fd, at, os.SEEK_HOLE)
            yield at, min(hole, end) - at
            at = hole
    except OSError as error:
        if error.errno != errno.ENXIO:  # that is: no data from there on
            raise


# ---------------------------------------------------------------- the SPT


class SPT(ByteTable):
    """Where each page of one instance's space is. Pages are numbered from its start_addr."""

    def alike(self, pages: range) -> tuple[int, int]:
        """The byte of the first of these pages, and how many from it on have the same; all of them
        without INSTANCE."""
        if len(pages) == 1:
            return self.state[pages.start] & ~INSTANCE, 1
        states = self.state[pages.start : pages.stop : pages.step].translate(_DROPPED)
        return states[0], len(states) - len(states.lstrip(states[:1]))

    def change(self, page: int, count: int, table: bytes) -> None:
        """Each of these bytes becomes what this table for bytes.translate says."""
        self.write(page, self.state[page : page + count].translate(table))


# ---------------------------------------------------------------- the store


class PageStore:
    def __init__(
        self,
        path: str | None,
        start_addr: int,
        end_addr: int,
        keep: bool = False,
        instance: int = 0,
        share: Share = ALL,
    ) -> None:
        """Without a path, the disk is a file without a name in disk_folder().

        keep: it outlives the job, and what an earlier one has left there counts. instance: its number,
        for the log. share: the pages that it has, and numbers; if not all, a kept disk waits for start.
        Raises ValueError, which names the file, if it is not one to use; OSError when it can't be made.
        """
        if path:
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        else:
            self.fd, name = tempfile.mkstemp(prefix="edm-", dir=disk_folder())
            os.unlink(name)
        self.kept, self._start, self._share = keep, start_addr, share
        stripes = (*share[:2], share.stripe if share.of > 1 else 0) if keep else (0, 0, 0)
        self._geometry = *stripes, PAGE_SIZE, start_addr, end_addr
        pages = max(share.below((end_addr - start_addr) // PAGE_SIZE), 1)
        self._blocks = -(-pages // BLOCK_PAGES) if keep else 0  # in a copy of the table
        self._data = -(-self._block_place(2, 0) // HEADER_COPY) * HEADER_COPY  # the first places
        self._synced = SPT(
            pages
        )  # the place of each page at the last sync; 0 if the disk is not kept
        self.spt, self._instance = SPT(pages), instance
        self._size = self._place(pages, SECOND if keep else FIRST)
        self._crcs = memoryview(mmap.mmap(-1, 4 * pages if keep else 4)).cast("I")
        self._changed = memoryview(mmap.mmap(-1, max(1, self._blocks)))  # a byte a block, see SAME
        self._words = memoryview(mmap.mmap(-1, 24)).cast("Q")
        self._lock = semaphore() if keep else nullcontext()
        self._taken = memoryview(mmap.mmap(-1, PAGES_AT_ONCE * PAGE_SIZE))  # what take_get has read
        self._taken_at = ctypes.addressof(ctypes.c_char.from_buffer(self._taken))
        self._log, self._banner = log.logger("DMS"), log.logger()
        self._info = self._log.isEnabledFor(INFO)
        self.offers = range(0)  # the epochs to start from, until it has
        self._durable: dict[int, bytes] = {}  # blocks, between the last two steps of a sync
        self.sync_steps = self._changed_blocks, self._make_durable, self._make_current
        try:
            self._begin(path) if path else os.ftruncate(self.fd, self._size)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------ pages come

    def together(self, pages: range) -> int:
        """How many of these pages, from the first on, one ask_get can be about. pages may descend."""
        return len(pages)

    def ask_get(self, pages: range) -> range:
        """Ask for these pages, at most PAGES_AT_ONCE, and wait for nothing. pages may have a step.

        What this returns is for take_get, or for drop_get.
        """
        if len(pages) > 1 and pages.step == 1:
            byte = self.spt.state[pages.start]
            if byte & DISK:
                place, length = self._place(pages.start, byte), len(pages) * PAGE_SIZE
                os.posix_fadvise(self.fd, place, length, os.POSIX_FADV_WILLNEED)
        return pages

    def take_get(self, asked: range) -> tuple[int, int, int]:
        """What was asked for: as get, and the address of the bytes, in this process. They are there
        until the next call."""
        kind, got = self.get(asked, self._taken)
        return kind, got, self._taken_at

    def drop_get(self, asked: range) -> None:
        """What was asked for is not needed."""

    def get(self, pages: range, into: memoryview) -> tuple[int, int]:
        """(NEW_PAGES or CONTENT, for how many of the pages, from the first on, that holds); of CONTENT
        the bytes are in into. Those pages are the instance's from now on.

        It gives fewer, at least one, if it can't read them all. Raises OSError if the first of them
        can't be read.
        """
        byte, got = self.spt.alike(pages)
        if got < len(pages):
            pages = pages[:got]
        if byte & DISK:
            try:
                self._read(pages, byte, into)
            except OSError:
                if got == 1:
                    raise
                return self.get(pages[: got // 2], into)
        self.spt.set(pages, byte | INSTANCE)
        if self._info:
            address = self._address(pages.start)
            self._log.info("get request to send content of page in address: %#x", address)
            if byte & DISK:
                self._log.debug("read page address: %#x from disk", address)
            else:
                self._log.debug("page accessed first time, set info - new_page")
            self._show()
            self._log.debug("page in address: %#x sent to app", address)
        return CONTENT if byte & DISK else NEW_PAGES, got

    def _read(self, pages: range, byte: int, into: memoryview) -> None:
        """Read these pages, one behind the other, from where the SPT's byte says. Raises OSError if not
        all of them are there and whole."""
        if byte & UNREADABLE == UNREADABLE:
            raise OSError(errno.EIO, "its entry in the disk's table is damaged")
        place = self._place(pages.start, byte)
        length = (len(pages) if pages.step == 1 else 1) * PAGE_SIZE  # neighbours are read at once
        for at in range(0, len(pages) * PAGE_SIZE, length):
            if os.preadv(self.fd, [into[at : at + length]], place + at * pages.step) < length:
                raise OSError(errno.EIO, "short read of the disk file")
        if self.kept:
            for at, page in enumerate(pages):
                if _crc(into, at) != self._crcs[page]:
                    raise OSError(errno.EIO, "the checksum is wrong")

    # ------------------------------------------------------------ pages go

    def put(self, gone: Sequence[Run], dirty: Sequence[Bytes]) -> None:
        """Write the dirty pages. The ranges of pages `gone` have left the instance; if there are none,
        it has the dirty ones still. All of them lie within PAGES_AT_ONCE pages.

        Raises OSError if it can't be done; then none of them has gone.
        """
        if gone:
            self._say(DEBUG, "Handle page eviction in address %#x", dirty)
        with self._lock:
            if self.kept:
                self._check_writable()
            self._write(dirty)
            for page, count in gone:
                self.spt.change(page, count, _DROPPED)
        self._say(INFO, "page in address %#x stored in disk", dirty)
        if self._info:
            if gone:
                self._log.debug("Page evicted successfully, sending ack")
            self._show()

    def take_from(self, pipe: int, page: int, content: memoryview) -> bool:
        """Write neighbours whose bytes are in a pipe, without a copy in between. False if that can't be
        done: then content has their bytes, for put, which says why.

        A kept disk needs the bytes for their checksums; and put tells the log of each page.
        """
        place, done = self._place(page, FIRST), 0
        with suppress(OSError):
            while not self.kept and not self._info and done < len(content):
                part = min(AT_ONCE, len(content) - done)
                done += os.splice(pipe, self.fd, part, offset_dst=place + done)
        if done == len(content):
            self.spt.set(range(page, page + done // PAGE_SIZE), INSTANCE | DISK | FIRST)
            return True
        again = os.preadv(self.fd, [content[:done]], place) + os.readv(pipe, [content[done:]])
        if again < len(content):
            raise OSError(errno.EIO, "the disk does not give back what it took")
        return False

    def _write(self, dirty: Iterable[Bytes]) -> None:
        """If this fails, all of these pages are TORN, as the room of any may be taken from it."""
        try:
            for page, content in dirty:
                self._write_run(page, content)
        except OSError as error:
            for page, content in dirty:
                self.spt.change(page, len(content) // PAGE_SIZE, _TORN)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._make_room(dirty):
                raise
            self._write(dirty)

    def _write_run(self, page: int, content: memoryview) -> None:
        count = len(content) // PAGE_SIZE
        if not self.kept:
            self._write_to(DISK | FIRST, page, content)
            return
        for block in self._blocks_of(page, count):
            self._changed[block] = WRITE_TWICE
            for table in (0, 1):  # no sync is to lack the room for it
                os.posix_fallocate(self.fd, self._block_place(table, block), BLOCK_SIZE)
        synced = self._synced.read(page, count)
        for place, where in _TARGETS.items():
            for first, many in runs(page, synced, where):
                part = content[(first - page) * PAGE_SIZE :][: many * PAGE_SIZE]
                self._write_to(place, first, part)
                for at in range(many):
                    self._crcs[first + at] = _crc(part, at)

    def _write_to(self, place: int, page: int, content: memoryview) -> None:
        _write_all(self.fd, content, self._place(page, place))
        self.spt.set(range(page, page + len(content) // PAGE_SIZE), INSTANCE | place)

    def _make_room(self, dirty: Iterable[Bytes]) -> bool:
        """These pages found the file system full. Is it of use to try again?"""
        again = self.kept and self._words[ROOM_MADE] <= self._words[EPOCH]
        self._words[ROOM_MADE] = self._words[EPOCH] + 1
        torn = [(page, len(content) // PAGE_SIZE) for page, content in dirty]
        for run in self.spt.used(0, self.spt.pages) if again else torn:
            self._punch_spare(*run)
        return again

    # ------------------------------------------------------------ the rest

    def free(self, page: int, count: int) -> None:
        """These pages are as never written."""
        with self._lock:
            for first, many in self.spt.used(page, count):
                self.spt.set(range(first, first + many), NEW)
                for block in self._blocks_of(first, many):
                    self._changed[block] = self._changed[block] and WRITE_TWICE
                if not self._words[NO_WRITES]:
                    self._punch_spare(first, many)
        if self._info:
            self._show()

    def sync(self) -> None:
        """What was written so far survives a crash; on a kept disk, the next job finds it.

        Raises OSError if a page could not be written, and has not been written or freed since; and for
        ever after once the file system has failed to sync, as what it has lost it does not tell again.
        """
        with self._lock:
            self._make_durable()
            self._make_current()

    def locations(self, page: int, count: int) -> bytes:
        """Of each of count pages from page: NEW, or INSTANCE, DISK, or both of these. Bit 0: INSTANCE."""
        return self.spt.read(page, count).translate(_LOCATION)

    def runs_on_disk(self) -> Iterator[Run]:
        """The pages whose bytes are on the disk: what a kept disk begins with."""
        for first, count in self.spt.used(0, self.spt.pages):
            yield from runs(first, self.locations(first, count), ON_DISK)

    def table(self) -> str:
        """The SPT as the wiki prints it: a line for each page that was accessed."""
        instance = f"INSTANCE_{self._instance}"
        names = {INSTANCE: instance, DISK: "DISK", INSTANCE | DISK: instance}
        return log.spt_table(
            (self._address(first + at), names[byte])
            for first, count in self.spt.used(0, self.spt.pages)
            for at, byte in enumerate(self.locations(first, count))
            if byte
        )

    def close(self) -> None:
        """The end of it. A disk that is not kept is lost with that, if it has no name."""
        for table in (self.spt, self._synced):
            table.state.close()
        os.close(self.fd)

    def _address(self, page: int) -> int:
        return self._start + self._share.page(page) * PAGE_SIZE

    def _say(self, level: int, words: str, dirty: Iterable[Bytes]) -> None:
        for first, content in dirty if self._info else ():
            for page in range(first, first + len(content) // PAGE_SIZE):
                self._log.log(level, words, self._address(page))

    def _show(self) -> None:
        self._log.debug("SPT updated. Current state: ")
        self._banner.info(self.table())

    # ------------------------------------------------------------ the disk file

    def _place(self, page: int, byte: int) -> int:
        """Where in the file this page is, if the SPT has this byte for it."""
        return self._data + (page + (self.spt.pages if byte & SECOND else 0)) * PAGE_SIZE

    def _punch_spare(self, page: int, count: int) -> None:
        """Give back the places of these pages that neither the SPT nor the last sync uses."""
        now, synced = self.spt.read(page, count).translate(_PLACE), self._synced.read(page, count)
        used = bytes(map(operator.or_, now, synced))
        for place, spare in _SPARE.items():
            for first, many in runs(page, used, spare):
                with suppress(OSError):  # it is only room
                    punch_hole(self.fd, self._place(first, place), many * PAGE_SIZE)

    def _begin(self, path: str) -> None:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"disk: {path} is in use by another job") from None
        # Else it is new, or its making was interrupted before its header was written.
        begun = any(data(self.fd, 0, os.fstat(self.fd).st_size))
        self.offers = self._read_header(path) if begun else range(1)
        os.fchmod(self.fd, 0o600)
        os.ftruncate(self.fd, self._size if self.kept else 0)
        os.ftruncate(self.fd, self._size)
        if not self.kept or self._share.of == 1:
            self.start(self.offers[-1])
        if not begun:
            with suppress(OSError):  # a folder that is not for us to read, or can't be synced
                folder = os.open(os.path.dirname(os.path.realpath(path)), os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)

    def start(self, epoch: int) -> None:
        """Go on from the sync of this epoch, one of offers. Raises ValueError if it is none of them."""
        if epoch not in self.offers:
            raise ValueError(f"it can't start from sync {epoch}, only from one of {self.offers}")
        self._words[EPOCH], header = epoch, self._header(epoch)
        if any(os.pread(self.fd, len(header), at) != header for at in (0, HEADER_COPY)):
            # Both are whole from here on, and have their blocks, however full the disk gets; and what
            # this job goes on from is durable, as it writes over what the other sync needs.
            _write_all(self.fd, header, 0)
            os.fsync(self.fd)
            _write_all(self.fd, header, HEADER_COPY)
        self._load_table()
        self.offers = range(0)

    def _header(self, epoch: int) -> bytes:
        return _sealed(HEADER.pack(MAGIC, FORMAT, *self._geometry, epoch))

    def _read_header(self, path: str) -> range:
        """The epochs that this job can go on from, by the copies that are whole.

        If they say the same, it is durable, as the second one is written after that.
        """
        copies = [os.pread(self.fd, HEADER.size + CRC, at) for at in (0, HEADER_COPY)]
        ours = [copy for copy in copies if copy.startswith(MAGIC)]
        if not ours:
            raise ValueError(f"disk: {path} is not an EDM disk; choose another path")
        whole = [HEADER.unpack(copy[:-CRC]) for copy in ours if copy == _sealed(copy[:-CRC])]
        if not whole:
            raise ValueError(f"disk: the header of {path} is damaged; no job can use it")
        _, version, *geometry, epoch = max(whole, key=operator.itemgetter(-1))
        size, right, kept = os.fstat(self.fd).st_size, self._size, geometry[1] > 0
        other = (
            "is of another geometry: DMS {} of {}, stripes of {} pages, pages of {} bytes, "
            "start_addr {:#x}, end_addr {:#x}"
        )
        for wrong, how in (
            (version != FORMAT, f"has version {version} of the format; this EDM knows {FORMAT}"),
            (kept < self.kept, "was not kept by its job; remove it"),
            (kept > self.kept, "is an earlier job's kept disk; --keep goes on, else remove it"),
            (kept and tuple(geometry) != self._geometry, other.format(*geometry)),
            (kept and size != right, f"is damaged: it has {size} bytes, and should have {right}"),
        ):
            if wrong:
                raise ValueError(f"disk: {path} {how}")
        if len(whole) < 2 and epoch:  # at 0, its making may have been interrupted
            self._log.warning("%s: one of the two copies of its header is damaged", path)
        return range(min(fields[-1] for fields in whole), epoch + 1)

    # ------------------------------------------------------------ the table of a kept disk

    def _block_place(self, table: int, block: int) -> int:
        """Where in the file this block of this copy of the table is."""
        return TABLE + (table * self._blocks + block) * BLOCK_SIZE

    def _blocks_of(self, page: int, count: int) -> range:
        """The blocks about these pages; none, if the disk is not kept."""
        return range(page // BLOCK_PAGES, min(-(-(page + count) // BLOCK_PAGES), self._blocks))

    def _load_table(self) -> None:
        now, in_file = self._words[EPOCH] % 2, set()
        for at, length in data(self.fd, TABLE, self._block_place(2, 0)):
            first, last = (at - TABLE) // BLOCK_SIZE, (at - TABLE + length - 1) // BLOCK_SIZE
            in_file.update(number % self._blocks for number in range(first, last + 1))
        for block in in_file:
            places, crcs = self._read_block(now, block)
            # A damaged block is written again, too: it may be of a sync that was not finished, and the
            # next epoch would make it whole.
            same = (places, crcs) == self._read_block(1 - now, block) and UNREADABLE not in places
            self._changed[block] = SAME if same else WRITE_TWICE
            page = block * BLOCK_PAGES
            for table in (self.spt, self._synced):
                table.write(page, places)
            self._crcs[page : page + len(places)] = memoryview(crcs).cast("I")

    def _read_block(self, table: int, block: int) -> tuple[bytes, bytes]:
        """The places of its pages, and their crc32s."""
        count = min(BLOCK_PAGES, self.spt.pages - block * BLOCK_PAGES)
        raw = os.pread(self.fd, BLOCK_SIZE, self._block_place(table, block))
        number, epoch, places, crcs = BLOCK.unpack(raw[:-CRC])
        right = raw == _sealed(raw[:-CRC]) and number == block and epoch <= self._words[EPOCH]
        if any(raw) and not right:
            return bytes((UNREADABLE,)) * count, bytes(4 * count)
        return places[:count], crcs[: 4 * count]

    # ------------------------------------------------------------ a sync's steps

    def _changed_blocks(self) -> dict[int, bytes]:
        """The blocks that differ in the other copy; the bytes of their pages in the SPT.

        Raises OSError if they can't be synced: a page is TORN, or nothing may be written.
        """
        self._check_writable()
        blocks = {
            block: self.spt.read(block * BLOCK_PAGES, BLOCK_PAGES)
            for block, _ in runs(0, bytes(self._changed[: self._blocks]), _TO_WRITE)
        }
        if torn := sum(len(states.translate(None, _WHOLE)) for states in blocks.values()):
            raise OSError(errno.EIO, f"{torn} pages could not be written")
        return blocks

    def _make_durable(self) -> None:
        """Steps 1 to 3. Until _make_current, nothing may be written."""
        self._durable, epoch = self._changed_blocks(), self._words[EPOCH] + 1
        for block, states in self._durable.items():
            crcs = self._crcs[block * BLOCK_PAGES :][:BLOCK_PAGES].tobytes()
            whole = _sealed(BLOCK.pack(block, epoch, states.translate(_PLACE), crcs))
            _write_all(self.fd, whole, self._block_place(epoch % 2, block))
        try:
            os.fsync(self.fd)
            if self.kept:
                _write_all(self.fd, self._header(epoch), 0)
                os.fsync(self.fd)
                self._words[NO_WRITES] = errno.EBUSY
        except OSError as error:
            self._words[NO_WRITES] = error.errno or errno.EIO
            raise

    def _make_current(self) -> None:
        """Step 4, and what is only of use to the sync before it goes."""
        if self.kept:
            if self._words[NO_WRITES] != errno.EBUSY:
                raise OSError(errno.EINVAL, "there is no sync to make current")
            _write_all(self.fd, self._header(self._words[EPOCH] + 1), HEADER_COPY)
            self._words[EPOCH] += 1
            self._words[NO_WRITES] = 0
        for block, states in self._durable.items():
            self._changed[block] -= 1
            page, now = block * BLOCK_PAGES, states.translate(_PLACE)
            self._synced.write(page, now)
            for run in runs(page, now, _NOWHERE):
                self._punch_spare(*run)

    def _check_writable(self) -> None:
        if why := self._words[NO_WRITES]:
            raise OSError(why, os.strerror(why))
