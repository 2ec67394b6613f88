"""PageStore: one instance's pages outside of memory. Where each is (SPT), and the disk file.

In the picture: the box on the right. On one machine it is in the pager's own process; over MPI the
DMS (dms.py) has one for each instance, and the pager an MpiStore (mpi_client.py), which has the same
methods.

Interface: PageStore(path, start_addr, end_addr, ...)
    ask_get, put         pages come, pages go: for a pager, which has descriptors and addresses
    get, write           the same for the DMS, which has messages: memory
    free, sync, locations, runs_on_disk, table, close
    SPT                  a byte a page: where it is now
    disk_folder          where a disk without a path is

Rules:
    * A page belongs to one thread at a time, of any process. The LSPT sees to that. So a page's own
      SPT byte and checksum need no lock.
    * All state that changes is in shared memory. A process that was forked after the store was made
      may call put while its parent calls the other methods.
    * A kept disk has one lock for all processes. put, write, free and sync hold it. get does not.
      If a process is killed while it holds the lock, nobody gets it any more. Who forked it must end.
    * A disk that is not kept has no lock. Its calls share nothing but the pages that they name.
    * One thread alone calls the methods of what ask_get returns.

A page's bytes stay on the disk while the instance has the page too. So a page that was not written
meanwhile (clean) goes back without its bytes.

    SPT byte          location        a put that names the page makes it
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
pages. It has two things for each: which place has the page's bytes (one of PLACES), and the crc32 of
the bytes. A block that is all zeros is about pages that were never written.

The epoch counts the syncs. The header has the epoch of the last one. If that is even, the first copy
of the table counts, if it is odd, the second. So the header names one whole table, and a crash needs
no recovery. The table of now is in memory only: 6 bytes for each page that was used.

    put     writes a page to the place that the last sync does not use.
    sync    1. writes the blocks that have changed to the copy of the table that does not count. Those
               are the blocks that changed since the last sync, or in the interval before it.
            2. fsync: pages and table are durable.
            3. writes the first header with the next epoch, fsync, then writes the second header.
    start   takes the newer one of the headers that are whole. If the two differ, it first makes both
            the same and durable, as step 3 does.

If step 2 or 3 fails, it is not known which epoch counts. Then nothing is written any more.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from logging import INFO
from struct import Struct

from edm import log
from edm.uffd_ctypes import PAGE_SIZE, punch_hole, semaphore

# A byte of the SPT: where a page is. INSTANCE | DISK is a page that the instance has and whose bytes on
# the disk are the same, unless it has been written meanwhile.
NEW, INSTANCE, DISK = 0, 1, 2
FIRST, SECOND = 4, 8  # beside DISK: in which place. Both: in a damaged block, so it can't be read
TORN = 16  # a put of the page has begun, and has not succeeded

NEW_PAGES, CONTENT = 17, 18  # what a get gives: pages never accessed; bytes. On the wire too
MAX_PAGES = 256  # at most so many pages in one get, and in all runs of one put together (1 MiB)
PIECE = 64  # at most so many pages in one content()

Run = tuple[int, int]  # first page, count of pages
PutRun = tuple[int, int, bool]  # and whether they are dirty
PlaceRun = tuple[int, int, int]  # and one of PLACES

# The disk file's format.
MAGIC, FORMAT = b"EDM disk", 3
HEADER = Struct("<8sII IQQ Q")  # magic, format, kept; page size, start_addr, end_addr; epoch
HEADER_COPY = 64 << 10  # bytes from one copy to the other; divisible by every page size
TABLE = 2 * HEADER_COPY
BLOCK_PAGES = 816
BLOCK = Struct("<IQ816s3264s")  # number; epoch; of each page: one of PLACES; of each page: crc32
CRC = 4  # bytes
BLOCK_SIZE = BLOCK.size + CRC
UNREADABLE = DISK | FIRST | SECOND
PLACES = (0, DISK | FIRST, DISK | SECOND, UNREADABLE)

EPOCH, SYNC_FAILED, ROOM_MADE = 0, 1, 2  # words: of the last sync; errno or 0; for which epoch

# What becomes of an SPT byte, as tables for bytes.translate.
_DROPPED = bytes(byte & ~INSTANCE for byte in range(256))
_LOCATION = bytes(byte & (INSTANCE | DISK) for byte in range(256))
_TORN = bytes(byte | TORN for byte in range(256))
_PLACE = bytes(byte & UNREADABLE for byte in range(256))
# Where a page is written that the last sync has there.
_TARGET = bytes(DISK | (SECOND if byte == DISK | FIRST else FIRST) for byte in range(256))
_SAME_PLACE = re.compile(b"|".join(b"\\x%02x+" % place for place in PLACES))


def location(byte: int, instance: int) -> str:
    """A byte of the SPT in the wiki's words: NEW, INSTANCE_n or DISK."""
    if byte & INSTANCE:
        return f"INSTANCE_{instance}"
    return "DISK" if byte & DISK else "NEW"


def disk_folder() -> str:
    """Where a disk without a path is: not in /tmp, which is memory on many machines."""
    return os.environ.get("TMPDIR") or "/var/tmp"


# ---------------------------------------------------------------- bytes


def _moved(length: int, some: Callable[[int, int], int]) -> None:
    """Call some(bytes moved so far, bytes left), which moves some more, until all are."""
    done = 0
    while done < length:
        more = some(done, length - done)
        if not more:
            raise OSError(errno.EIO, "the pipe of a put ends before its pages do")
        done += more


def _splice(pipe: int, to: int, length: int, at: int = 0) -> None:
    """Move so many bytes out of the pipe: to this place of a file, or with 0 to /dev/null."""
    _moved(length, lambda done, left: os.splice(pipe, to, left, offset_dst=at and at + done))


def take_dirty(runs: Iterable[PutRun], pipe: int, into: memoryview, null: int) -> int:
    """Take the bytes of these runs out of the pipe, and keep those of the dirty ones in into.

    Returns how many bytes that are. null: /dev/null, open for writing.
    """
    at = 0
    for _, count, dirty in runs:
        length = count * PAGE_SIZE
        if dirty:
            whole = into[at : at + length]
            _moved(length, lambda done, left, whole=whole: os.readv(pipe, [whole[done:]]))
            at += length
        else:
            _splice(pipe, null, length)
    return at


def _data(fd: int, at: int, end: int) -> Iterator[Run]:
    """(begin, length) of what is no hole in a file, between these two places (bytes)."""
    try:
        while (at := os.lseek(fd, at, os.SEEK_DATA)) < end:
            hole = os.lseek(fd, at, os.SEEK_HOLE)
            yield at, min(hole, end) - at
            at = hole
    except OSError as error:
        if error.errno != errno.ENXIO:  # that is: no data from there on
            raise


def _runs(page: int, places: bytes) -> Iterator[PlaceRun]:
    """The runs of pages that have the same place, from page on."""
    for found in _SAME_PLACE.finditer(places):
        yield page + found.start(), len(found[0]), found[0][0]


def _crc(content: memoryview, at: int) -> int:
    """The crc32 of the at-th page of this content."""
    return zlib.crc32(content[at * PAGE_SIZE : (at + 1) * PAGE_SIZE])


def _sealed(content: bytes) -> bytes:
    """And its crc32."""
    return content + zlib.crc32(content).to_bytes(CRC, "little")


# ---------------------------------------------------------------- the SPT


class SPT:
    """Where each page of one instance's space is. Pages are numbered from its start_addr.

    It is a file in shared memory. The parts that were never set are its holes, and cost no memory.
    """

    ON_DISK = re.compile(rb"[\2\3]+")  # of PageStore.locations
    _ACCESSED = re.compile(rb"[^\0]")

    def __init__(self, pages: int, instance: int) -> None:
        self.pages, self._instance = pages, instance
        self._fd = os.memfd_create("SPT")
        os.ftruncate(self._fd, pages)
        self._bytes = mmap.mmap(self._fd, pages)

    def used(self, page: int, count: int) -> Iterator[Run]:
        """The parts of these pages that were ever set, with some unset neighbours."""
        return _data(self._fd, page, page + count)

    def read(self, page: int, count: int) -> bytes:
        """The bytes of count pages from page. Reading a hole through the mapping would fill it."""
        return os.pread(self._fd, count, page)

    def place(self, pages: range) -> tuple[int, int]:
        """The byte of the first of these pages, and how many from it on have the same; all of them
        without INSTANCE."""
        if len(pages) == 1:
            return self._bytes[pages.start] & ~INSTANCE, 1
        states = self._bytes[pages.start : pages.stop : pages.step].translate(_DROPPED)
        return states[0], len(states) - len(states.lstrip(states[:1]))

    def set(self, pages: range, byte: int) -> None:
        if len(pages) == 1:
            self._bytes[pages.start] = byte
        else:
            self._bytes[pages.start : pages.stop : pages.step] = bytes((byte,)) * len(pages)

    def change(self, pages: range, table: bytes) -> None:
        """Each of these bytes becomes what this table for bytes.translate says."""
        which = slice(pages.start, pages.stop, pages.step)
        self._bytes[which] = self._bytes[which].translate(table)

    def load(self, page: int, states: bytes) -> None:
        """Set the bytes of as many pages, from page on."""
        self._bytes[page : page + len(states)] = states

    def found(self, pattern: re.Pattern[bytes]) -> Iterator[tuple[int, bytes]]:
        """(first page, locations) of what fits this pattern."""
        for first, count in self.used(0, self.pages):
            for found in pattern.finditer(self.read(first, count).translate(_LOCATION)):
                yield first + found.start(), found[0]

    def table(self, start_addr: int) -> str:
        """The SPT as the wiki prints it: a line for each page that was accessed."""
        return log.spt_table(
            (start_addr + page * PAGE_SIZE, location(found[0], self._instance))
            for page, found in self.found(self._ACCESSED)
        )

    def close(self) -> None:
        self._bytes.close()
        os.close(self._fd)


# ---------------------------------------------------------------- the store


class Asked:
    """Pages that were asked for: what PageStore.ask_get returns."""

    def __init__(self, store: PageStore, pages: range) -> None:
        self._store, self._pages = store, pages

    def take(self) -> tuple[int, int]:
        """(NEW_PAGES or CONTENT, for how many of the pages, from the first on, that holds).

        Those are the instance's from now on. That they were so before is no error: an answer may have
        been asked for ahead of need, and not used.
        """
        self._place, got = self._store.spt.place(self._pages)
        self._pages = self._pages[:got]
        return self._store.hand_out(self._pages, self._place), got

    def content(self, at: int, count: int) -> int:
        """The address, in this process, of the bytes of count pages, at most PIECE, from the at-th on.

        They are there until the next call. Raises OSError if not all of them can be read whole.
        """
        self._store.read(self._pages[at : at + count], self._place, self._store.piece)
        return self._store.piece_address

    def give_back(self, at: int, end: int | None = None) -> None:
        """Of what take gave, the pages from the at-th on (to before the end-th) are as if they had not
        been asked for."""
        if pages := self._pages[at:end]:
            self._store.spt.change(pages, _DROPPED)

    def done(self) -> None:
        """Nothing more will be asked of it."""


class PageStore:
    def __init__(
        self,
        path: str | None,
        start_addr: int,
        end_addr: int,
        keep: bool = False,
        instance: int = 0,
    ) -> None:
        """Without a path, the disk is a file without a name in disk_folder().

        keep: it outlives the job, and what an earlier one has left there counts. instance: its number,
        for the log. Raises ValueError, which names the file, if it is not one to use; OSError when it
        can't be made.
        """
        if path:
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        else:
            self.fd, name = tempfile.mkstemp(prefix="edm-", dir=disk_folder())
            os.unlink(name)
        self.kept, self._start = keep, start_addr
        self._geometry = PAGE_SIZE, start_addr, end_addr
        pages = (end_addr - start_addr) // PAGE_SIZE
        self._blocks = -(-pages // BLOCK_PAGES) if keep else 0  # in a copy of the table
        self._data = -(-self._block_place(2, 0) // HEADER_COPY) * HEADER_COPY  # the first places
        self.spt = SPT(pages, instance)
        self._size = self.place(pages, SECOND if keep else FIRST)
        self._synced = SPT(pages, instance)  # a byte of PLACES: where the last sync has it
        self._crcs = memoryview(mmap.mmap(-1, 4 * pages if keep else 4)).cast("I")
        # The epoch for which each block has changed last; 0: it was never used.
        self._changed = memoryview(mmap.mmap(-1, 8 * max(1, self._blocks))).cast("Q")
        self._words = memoryview(mmap.mmap(-1, 24)).cast("Q")
        self._lock = semaphore() if keep else nullcontext()
        self.piece = memoryview(mmap.mmap(-1, PIECE * PAGE_SIZE))
        self.piece_address = ctypes.addressof(ctypes.c_char.from_buffer(self.piece))
        self._dirty = memoryview(mmap.mmap(-1, MAX_PAGES * PAGE_SIZE))  # no memory until used
        self._null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self._log = log.logger("DMS")
        self._info = self._log.isEnabledFor(INFO)
        try:
            self._begin(path) if path else os.ftruncate(self.fd, self._size)
        except (OSError, ValueError):
            self.close()
            raise

    # ------------------------------------------------------------ pages come

    def ask_get(self, pages: range) -> Asked:
        """Ask for these pages, at most MAX_PAGES, and wait for nothing. pages may have a step."""
        if len(pages) > 1 and pages.step == 1:
            byte, _ = self.spt.place(pages[:1])
            if byte & DISK:
                place, length = self.place(pages.start, byte), len(pages) * PAGE_SIZE
                os.posix_fadvise(self.fd, place, length, os.POSIX_FADV_WILLNEED)
        return Asked(self, pages)

    def get(self, pages: range, into: memoryview) -> tuple[int, int]:
        """As ask_get and take; and the bytes are then in into, of as many pages as it gives.

        It gives fewer, if it can't read them all. Raises OSError if not even the first can be read;
        then nothing has changed.
        """
        byte, got = self.spt.place(pages)
        if byte & DISK:
            try:
                self.read(pages[:got], byte, into)
            except OSError:
                if got == 1:
                    raise
                return self.get(pages[: got // 2], into)
        return self.hand_out(pages[:got], byte), got

    def hand_out(self, pages: range, byte: int) -> int:
        """These pages, which have this byte in the SPT, are in the instance. NEW_PAGES or CONTENT."""
        self.spt.set(pages, byte | INSTANCE)
        if self._info:
            address = self._start + pages.start * PAGE_SIZE
            self._log.info("get request to send content of page in address: %#x", address)
            if byte & DISK:
                self._log.debug("read page address: %#x from disk", address)
            else:
                self._log.debug("page accessed first time, set info - new_page")
            self._show()
            self._log.debug("page in address: %#x sent to app", address)
        return CONTENT if byte & DISK else NEW_PAGES

    def read(self, pages: range, byte: int, into: memoryview) -> None:
        """Read these pages, one behind the other, from where the SPT's byte says. Raises OSError if not
        all of them are there and whole."""
        if byte & UNREADABLE == UNREADABLE:
            raise OSError(errno.EIO, "its entry in the disk's table is damaged")
        done = 0
        for part in [pages] if pages.step == 1 else [range(page, page + 1) for page in pages]:
            wanted = into[done : done + len(part) * PAGE_SIZE]
            if os.preadv(self.fd, [wanted], self.place(part.start, byte)) < len(wanted):
                raise OSError(errno.EIO, "preadv: short read of the disk file")
            done += len(wanted)
        for at, page in enumerate(pages if self.kept else ()):
            if _crc(into, at) != self._crcs[page]:
                raise OSError(errno.EIO, "the checksum is wrong")

    # ------------------------------------------------------------ pages go

    def put(self, runs: Sequence[PutRun], pipe: int, stay: bool = False) -> None:
        """The bytes of all pages of these runs, of the clean ones too, are in the pipe: write those of
        the dirty ones. stay: the instance goes on having the pages.

        At most MAX_PAGES pages. Raises OSError if it can't be done; then a part of the bytes may be
        left in the pipe, and no page has gone.
        """
        with self._lock:
            if self.kept:
                content = self._dirty[: take_dirty(runs, pipe, self._dirty, self._null)]
                self._put(runs, lambda targets: self._write(targets, content), stay)
            else:
                self._put(runs, lambda targets: self._write_pipe(runs, pipe), stay)

    def write(self, runs: Sequence[PutRun], content: memoryview, stay: bool = False) -> None:
        """As put; content has the bytes of the dirty runs, in order."""
        with self._lock:
            self._put(runs, lambda targets: self._write(targets, content), stay)

    def _put(self, runs: Sequence[PutRun], write: Callable, stay: bool) -> None:
        try:
            targets = self._targets(runs)
            write(targets)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT) and self._make_room(runs):
                return self._put(runs, write, stay)
            raise
        for page, count, place in targets:
            self.spt.set(range(page, page + count), place | INSTANCE if stay else place)
        for page, count, dirty in runs:
            if not dirty and not stay:
                self.spt.change(range(page, page + count), _DROPPED)
        if self._info:
            for page, count, _ in runs:
                for at in range(page, page + count):
                    address = self._start + at * PAGE_SIZE
                    self._log.info("page in address: %#x written to disk", address)
            self._show()

    def _targets(self, runs: Iterable[PutRun]) -> list[PlaceRun]:
        """Where the dirty ones are written. Those of a kept disk are TORN now, and no sync returns."""
        if not self.kept:
            return [(page, count, DISK | FIRST) for page, count, dirty in runs if dirty]
        self._check_sync()
        targets: list[PlaceRun] = []
        for page, count, dirty in runs:
            if dirty:
                targets += _runs(page, self._synced.read(page, count).translate(_TARGET))
                self.spt.change(range(page, page + count), _TORN)
                for block in self._blocks_of(page, count):
                    self._changed[block] = self._words[EPOCH] + 1
                    for table in (0, 1):  # no sync is to lack the room for it
                        os.posix_fallocate(self.fd, self._block_place(table, block), BLOCK_SIZE)
        return targets

    def _write_pipe(self, runs: Iterable[PutRun], pipe: int) -> None:
        for page, count, dirty in runs:
            to, at = (self.fd, self.place(page, FIRST)) if dirty else (self._null, 0)
            _splice(pipe, to, count * PAGE_SIZE, at)

    def _write(self, targets: Iterable[PlaceRun], content: memoryview) -> None:
        done = 0
        for page, count, place in targets:
            part = content[done : done + count * PAGE_SIZE]
            self._write_all(part, self.place(page, place))
            done += len(part)
            for at in range(count if self.kept else 0):
                self._crcs[page + at] = _crc(part, at)

    def _make_room(self, runs: Iterable[PutRun]) -> bool:
        """These found the file system full. Is it of use to try again?"""
        for page, count, dirty in runs:
            if dirty:
                self._punch_spare(page, self._synced.read(page, count))  # others may fit there
        if not self.kept or self._words[ROOM_MADE] > self._words[EPOCH]:
            return False
        self._words[ROOM_MADE] = self._words[EPOCH] + 1
        for page, count in self.spt.used(0, self.spt.pages):
            now = self.spt.read(page, count).translate(_PLACE)
            self._punch_spare(page, bytes(map(operator.or_, now, self._synced.read(page, count))))
        return True

    # ------------------------------------------------------------ the rest

    def free(self, page: int, count: int) -> None:
        """These pages are as never written."""
        with self._lock:
            for first, many in self.spt.used(page, count):
                self.spt.set(range(first, first + many), NEW)
                for block in self._blocks_of(first, many):
                    self._changed[block] = self._changed[block] and self._words[EPOCH] + 1
                if not self._words[SYNC_FAILED]:
                    self._punch_spare(first, self._synced.read(first, many))
        if self._info:
            self._show()

    def sync(self) -> None:
        """What was written so far survives a crash; on a kept disk, the next job finds it.

        Raises OSError if a page could not be written, and has not been written or freed since; and for
        ever after once the file system has failed to sync, as what it has lost it does not tell again.
        """
        with self._lock:
            self._check_sync()
            written = self._write_table()
            try:
                os.fsync(self.fd)
                if self.kept:
                    self._words[EPOCH] += 1
                    self._write_headers()
            except OSError as error:
                self._words[SYNC_FAILED] = error.errno or errno.EIO
                raise
            for page, now in written:
                was = self._synced.read(page, len(now))
                self._synced.load(page, now)
                freed = (0 if b and not a else UNREADABLE for a, b in zip(now, was, strict=True))
                self._punch_spare(page, bytes(freed))

    def locations(self, page: int, count: int) -> bytes:
        """Of each of count pages from page: NEW, or INSTANCE, DISK, or both of these."""
        return self.spt.read(page, count).translate(_LOCATION)

    def runs_on_disk(self) -> Iterator[Run]:
        """The pages whose bytes are on the disk: what a kept disk begins with."""
        return ((page, len(found)) for page, found in self.spt.found(SPT.ON_DISK))

    def table(self) -> str:
        """The SPT as the wiki prints it."""
        return self.spt.table(self._start)

    def close(self) -> None:
        """The end of it. A disk that is not kept is lost with that, if it has no name."""
        self.spt.close()
        self._synced.close()
        os.close(self.fd)
        os.close(self._null)

    def _show(self) -> None:
        self._log.debug("SPT updated. Current state: ")
        self._log.info(self.table())

    # ------------------------------------------------------------ the disk file

    def place(self, page: int, byte: int) -> int:
        """Where in the file this page is, if the SPT has this byte for it."""
        return self._data + (page + (self.spt.pages if byte & SECOND else 0)) * PAGE_SIZE

    def _write_all(self, content: bytes | memoryview, at: int) -> None:
        _moved(len(content), lambda done, left: os.pwrite(self.fd, content[done:], at + done))

    def _punch_spare(self, page: int, used: bytes) -> None:
        """Give back the places, of the pages from page on, that are not in used."""
        for first, count, places in _runs(page, used):
            for place in (FIRST, SECOND):
                if not places & place:
                    try:
                        punch_hole(self.fd, self.place(first, place), count * PAGE_SIZE)
                    except OSError as error:  # it is only room
                        self._log.info("%d pages from page %d: %s", count, first, error)

    def _begin(self, path: str) -> None:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"disk: {path} is in use by another job") from None
        # Else it is new, or its making was interrupted before its header was written.
        begun = any(_data(self.fd, 0, os.fstat(self.fd).st_size))
        agree = begun and self._read_header(path)
        os.fchmod(self.fd, 0o600)
        os.ftruncate(self.fd, self._size if self.kept else 0)
        os.ftruncate(self.fd, self._size)
        if not agree:
            # Both are whole from here on, and have their blocks, however full the disk gets; and what
            # this job goes on from is durable, as it writes over what the sync before that needs.
            self._write_headers()
        if not begun:
            with suppress(OSError):  # a folder that is not for us to read, or can't be synced
                folder = os.open(os.path.dirname(os.path.realpath(path)), os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        self._load_table()

    def _write_headers(self) -> None:
        header = HEADER.pack(MAGIC, FORMAT, self.kept, *self._geometry, self._words[EPOCH])
        self._write_all(_sealed(header), 0)
        os.fsync(self.fd)
        self._write_all(_sealed(header), HEADER_COPY)

    def _read_header(self, path: str) -> bool:
        """Take the epoch from the newer whole copy. Do both say the same, for this job too?

        Then it is durable, as the second one is written after that.
        """
        copies = [os.pread(self.fd, HEADER.size + CRC, at) for at in (0, HEADER_COPY)]
        ours = [copy for copy in copies if copy.startswith(MAGIC)]
        if not ours:
            raise ValueError(f"disk: {path} is not an EDM disk; choose another path")
        whole = [HEADER.unpack(copy[:-CRC]) for copy in ours if copy == _sealed(copy[:-CRC])]
        if not whole:
            raise ValueError(f"disk: the header of {path} is damaged; no job can use it")
        _, version, kept, *geometry, self._words[EPOCH] = max(whole, key=operator.itemgetter(-1))
        size, right = os.fstat(self.fd).st_size, self._size
        other = "is of another geometry: pages of {} bytes, start_addr {:#x}, end_addr {:#x}"
        for wrong, how in (
            (version != FORMAT, f"has version {version} of the format; this EDM knows {FORMAT}"),
            (kept < self.kept, "was not kept by its job; remove it"),
            (
                kept > self.kept,
                "is the kept disk of an earlier job; --keep goes on, else remove it",
            ),
            (kept and tuple(geometry) != self._geometry, other.format(*geometry)),
            (kept and size != right, f"is damaged: it has {size} bytes, and should have {right}"),
        ):
            if wrong:
                raise ValueError(f"disk: {path} {how}")
        if len(whole) < 2 and self._words[EPOCH]:  # at 0, its making may have been interrupted
            self._log.warning("%s: one of the two copies of its header is damaged", path)
        return self.kept and len(whole) == 2 and whole[0] == whole[1]

    # ------------------------------------------------------------ the table of a kept disk

    def _block_place(self, table: int, block: int) -> int:
        """Where in the file this block of this copy of the table is."""
        return TABLE + (table * self._blocks + block) * BLOCK_SIZE

    def _blocks_of(self, page: int, count: int) -> range:
        """The blocks about these pages; none, if the disk is not kept."""
        return range(page // BLOCK_PAGES, min(-(-(page + count) // BLOCK_PAGES), self._blocks))

    def _load_table(self) -> None:
        in_file, now = set(), self._words[EPOCH] % 2
        for at, length in _data(self.fd, TABLE, self._block_place(2, 0)):
            end = -(-(at - TABLE + length) // BLOCK_SIZE)
            in_file.update(range((at - TABLE) // BLOCK_SIZE, end))
        for block in {number % self._blocks for number in in_file}:
            places, crcs = self._read_block(now, block)
            same = (places, crcs) == self._read_block(1 - now, block)
            # If not, the next two syncs write it to both copies. So they do if one is damaged, which
            # may be a block of a sync that was not finished: the next epoch would make it a whole one.
            self._changed[block] = (
                1 if same and UNREADABLE not in places else self._words[EPOCH] + 1
            )
            if any(places):  # else it needs no memory
                page = block * BLOCK_PAGES
                self.spt.load(page, places)
                self._synced.load(page, places)
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

    def _write_table(self) -> list[tuple[int, bytes]]:
        """Write to the other copy what differs there: (first page, places of its pages) of each block.

        Raises OSError if a page is TORN.
        """
        epoch, torn, written = self._words[EPOCH] + 1, 0, []
        for block, changed in enumerate(self._changed):
            if changed and changed >= epoch - 1:
                page = block * BLOCK_PAGES
                states = self.spt.read(page, BLOCK_PAGES)
                written.append((page, states.translate(_PLACE)))
                torn += sum(byte & TORN > 0 for byte in states)
                if not torn:
                    crcs = self._crcs[page : page + BLOCK_PAGES].tobytes()
                    whole = _sealed(BLOCK.pack(block, epoch, states.translate(_PLACE), crcs))
                    self._write_all(whole, self._block_place(epoch % 2, block))
        if torn:
            raise OSError(errno.EIO, f"{torn} pages could not be written")
        return written

    def _check_sync(self) -> None:
        if failed := self._words[SYNC_FAILED]:
            raise OSError(failed, os.strerror(failed))
