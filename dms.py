"""DMS, the disk manager server: knows where every page is, and keeps those that are on the disk.

In the picture: the box on the right, rank 0 of the job.

Interface: DMS(comm, ...).serve() answers the instances' requests until the last has said BYE.
    SPT     of one instance: a byte a page, where it is now
    Disk    of one instance: the file, reached by pread and pwrite at a page's own places

Rules: one thread, one process, no locks. A request is checked before anything is changed, and one
that is wrong is answered with ERROR and a reason; nothing that arrives ends the DMS, SIGTERM and
SIGINT neither: the instances end it, when they have written back what they hold. An eviction is
acknowledged when its bytes are written to the disk file.

A page's bytes stay on the disk while the instance has the page too. So a page that was not written
meanwhile (CLEAN in the LSPT) goes back without its bytes.

    SPT byte          location        an eviction that names the page makes it
    NEW               never accessed
    INSTANCE          INSTANCE_n      DISK if dirty, else NEW: it never was anything but zeros
    INSTANCE | DISK   INSTANCE_n      DISK
    DISK              DISK

and SLOT beside DISK, if the page's bytes are in the second of its two places.

The disk file (little-endian; all of it is sparse):

    at 0, at 64 KiB        the header, twice: HEADER and the crc32 of that. The newer one counts, if
                           they differ; and the whole one, if one is damaged
    at 128 KiB (TABLE)     for each page a pair of entries, of its first place and its second:
                             u64   version: epoch << 2 | 1 if HOLE | 2 if LOST
                             u32   crc32 of the page's bytes
                             u32   crc32 of CHECKED: of which page and place, and of the above
                           All 0: nothing there. HOLE: no bytes, the page was freed. LOST: no bytes,
                           there was an entry that was damaged
    after it, at a         the pages' first places; behind those, if the disk is kept, the second
    multiple of 64 KiB     ones. A page is at its number times its size

The epoch of the header is that of the last sync; a page that is written belongs to the next one,
whose entries only count when the next sync has written the header. The entry with the greater epoch
is the page's current one. A page is always written to the place which that last sync does not need,
its bytes first, then its entry. So at every moment the file holds all pages as they were when the
last sync returned, whatever was written since; and that is what a job which resumes it gets, unless
the one before it ended with a sync, as it does unless DMS or pager are killed. sync is: fsync, write
one header, fsync, write the other one. When the file system is full, the bytes go that neither the
last sync nor the pages of now need.

A pair with an entry whose check is wrong says nothing: its page can't be read until it is written or
freed, which makes the pair whole again.

A disk that is not kept has the same format, uses the first places only, and begins anew; so nobody
reads its versions, and the checks of its entries are 0.

Waiting: MPI has no wait that sleeps. After a message the DMS looks for the next one without pause
for a moment, offering its core at every look; then it sleeps until its doorbell rings. It looks
again now and then all the same, and often if an instance can't ring.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os
import re
import signal
import tempfile
import time
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from logging import DEBUG, INFO
from struct import Struct

from mpi4py import MPI

from edm import log
from edm import messages as m
from edm.doorbell import Doorbell
from edm.edm import disk_folder
from edm.messages import DISK, INSTANCE, NEW, SLOT
from edm.uffd_ctypes import PAGE_SIZE, PR_SET_TIMERSLACK, prctl, punch_hole

EAGER = 2 * m.AWAKE  # seconds after a message in which the DMS does not sleep
NAP = 70e-6  # seconds between two looks, if an instance can't ring
LOOK = 20e-6  # seconds that a look takes
SLEEP = 10e-3  # seconds between two looks, if all of them can


# The disk file's format.
MAGIC, FORMAT = b"EDM disk", 2
HEADER = Struct("<8sII IQQ Q")  # magic, format, kept; page size, start_addr, end_addr; epoch
CRC = Struct("<I")
HEADER_COPY = 64 << 10  # bytes from one copy to the other; divisible by every page size
TABLE = 2 * HEADER_COPY
PAIR = 32  # bytes of a page's two entries, four numbers in an array("Q")
CHECKED = Struct("<QIIQ")  # page number, 0 or 1 for its place, crc32 of its bytes, version
CRC_BITS = 0xFFFFFFFF
EPOCH, HOLE, LOST = 2, 1, 2  # of an entry's version
PART = 1 << 16  # pages at most whose entries are looked at together

# What becomes of an SPT byte, as tables for bytes.translate.
_DROPPED = bytes(byte & ~INSTANCE for byte in range(256))
_WITHOUT_SLOT = bytes(byte & ~SLOT for byte in range(256))


class SPT:
    """Where each page of one instance's space is. Pages are numbered from its start_addr."""

    _SAME = re.compile(rb"(?s)(.)\1*")
    _ELSEWHERE = re.compile(rb"[\0\2\6]")
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
        self.load(page, self.read(page, count).translate(_DROPPED))

    def load(self, page: int, states: bytes) -> None:
        """Set the bytes of as many pages, from page on."""
        self._bytes[page : page + len(states)] = states

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


def _runs(page: int, values: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """(first page, count, value) of the runs of equal values, of the pages from page on."""
    for value, same in itertools.groupby(values):
        count = len(list(same))
        yield page, count, value
        page += count


def _sums(page: int, slot: int, version: int, crc: int) -> int:
    """The second number of an entry: its check, and the crc32 of the page's bytes."""
    return zlib.crc32(CHECKED.pack(page, slot, crc, version)) << 32 | crc


def _is_damaged(page: int, pair: Sequence[int]) -> bool:
    """Is one of these two entries not what was written for this page?"""
    for slot in (0, 1):
        version, sums = pair[2 * slot], pair[2 * slot + 1]
        if (version or sums) and sums != _sums(page, slot, version, sums & CRC_BITS):
            return True
    return False


class Disk:
    """The file of one instance's pages. Its format is at the top of this file."""

    def __init__(self, path: str | None, start_addr: int, end_addr: int, keep: bool) -> None:
        """Without a path, a file without a name in disk_folder(). keep: it outlives the job.

        Raises ValueError, which names the file, if it is not one to use; OSError when it can't be
        made.
        """
        self._path, self._keep = path, keep
        self._geometry = (PAGE_SIZE, start_addr, end_addr)
        pages = (end_addr - start_addr) // PAGE_SIZE
        self._data = -(-(TABLE + pages * PAIR) // HEADER_COPY) * HEADER_COPY
        self._slot = pages * PAGE_SIZE  # bytes from a page's first place to its second
        self._synced = 0  # the epoch that the disk goes back to after a crash
        self._freed: set[tuple[int, int]] = set()  # (first page, count) since then
        self._torn: set[int] = set()  # pages that could not be written, and were not since
        self._room_made = -1  # at which epoch the bytes that nobody needs were punched out
        self._failed_sync: OSError | None = None
        if path is None:
            self._fd, name = tempfile.mkstemp(prefix="edm-", dir=disk_folder())
            os.unlink(name)
        else:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._begin(path or name)
        except OSError as error:
            os.close(self._fd)
            raise OSError(error.errno, f"{error.strerror} ({path or name})") from None
        except ValueError:
            os.close(self._fd)
            raise

    def _begin(self, name: str) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"disk: {name} is in use by another job") from None
        size = self._data + self._slot * (2 if self._keep else 1)
        # Else it is new, or its making was interrupted before its header was written.
        begun, agree = self._next_data(0) is not None, False
        if begun:
            kept, agree = self._read_header(name)
            if kept and not self._keep:
                raise ValueError(
                    f"disk: {name} is the kept disk of an earlier job; "
                    "--keep goes on with it, removing the file gives it up"
                )
            if self._keep and not kept:
                raise ValueError(f"disk: {name} was not kept by its job; remove it")
            if kept:
                self._check_whole(name, size)
        os.fchmod(self._fd, 0o600)
        if not self._keep:
            os.ftruncate(self._fd, 0)
        os.ftruncate(self._fd, size)
        if not self._keep or not agree:
            # Both are whole from here on, and have their blocks, however full the disk gets; and what
            # this job goes on from is durable, as it writes over what the sync before that needs.
            self._write_header(self._synced, 0)
            os.fsync(self._fd)
            self._write_header(self._synced, 1)
        if self._keep and not begun:
            self._sync_name(name)

    @staticmethod
    def _sync_name(name: str) -> None:
        try:
            folder = os.open(os.path.dirname(os.path.realpath(name)), os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:  # not for us to read, or a file system that does not do it
            log.logger("DMS").info("the folder of %s could not be synced: %s", name, error)

    def _next_data(self, at: int) -> int | None:
        """Where, from at on, there is something else than a hole; None if nowhere."""
        try:
            return os.lseek(self._fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return None

    def _check_whole(self, name: str, size: int) -> None:
        """Nothing was changed yet: do size and entries fit the header?"""
        found = os.fstat(self._fd).st_size
        if found != size:
            raise ValueError(
                f"disk: {name} is damaged: it has {found} bytes, and should have {size}"
            )
        too_new = self._synced + 2 << EPOCH
        for first, pairs in self._used(0, self._slot // PAGE_SIZE):
            for index in (i // 2 for i, version in enumerate(pairs[::2]) if version >= too_new):
                if not _is_damaged(first + index, pairs[4 * index : 4 * index + 4]):
                    raise ValueError(f"disk: {name} is damaged: its header is older than its pages")

    # ------------------------------------------------------------ the header

    def _write_header(self, epoch: int, copy: int) -> None:
        fields = HEADER.pack(MAGIC, FORMAT, self._keep, *self._geometry, epoch)
        whole = fields + CRC.pack(zlib.crc32(fields))
        self._write_all(memoryview(whole), copy * HEADER_COPY)

    def _read_header(self, name: str) -> tuple[bool, bool]:
        """Take the epoch from the newer whole copy. Was the disk kept; do both say the same?

        Then it is durable, as the second one is written after that.
        """
        magic, whole = False, []
        for at in (0, HEADER_COPY):
            raw = os.pread(self._fd, HEADER.size + CRC.size, at)
            magic = magic or raw.startswith(MAGIC)
            if len(raw) == HEADER.size + CRC.size:
                fields, crc = raw[: HEADER.size], raw[HEADER.size :]
                if magic and CRC.pack(zlib.crc32(fields)) == crc:
                    whole.append(HEADER.unpack(fields))
        if not magic:
            raise ValueError(f"disk: {name} is not an EDM disk; choose another path")
        if not whole:
            raise ValueError(f"disk: the header of {name} is damaged; no job can use it")
        _, version, kept, *geometry, self._synced = max(whole, key=lambda header: header[-1])
        if len(whole) < 2 and self._synced:  # at 0, its making may have been interrupted
            log.logger("DMS").warning("%s: one of the two copies of its header is damaged", name)
        if version != FORMAT:
            raise ValueError(
                f"disk: {name} has version {version} of the format; this EDM knows {FORMAT}"
            )
        if kept and tuple(geometry) != self._geometry:
            size, start, end = geometry
            raise ValueError(
                f"disk: {name} is of another geometry: pages of {size} bytes, start_addr "
                f"{start:#x}, end_addr {end:#x}; give the same ones"
            )
        return bool(kept), len(whole) == 2 and whole[0] == whole[1]

    # ------------------------------------------------------------ the table

    def _read_pairs(self, page: int, count: int) -> array:
        """Four numbers for each of these pages: version and sums of its first place, its second."""
        pairs = array("Q", os.pread(self._fd, count * PAIR, TABLE + page * PAIR))
        if len(pairs) != 4 * count:
            raise OSError(errno.EIO, "pread: short read of the disk file's table")
        return pairs

    def _write_pairs(self, page: int, pairs: array) -> None:
        self._write_all(memoryview(pairs).cast("B"), TABLE + page * PAIR)

    def _used(self, page: int, count: int) -> Iterator[tuple[int, array]]:
        """(first page, pairs) for the parts of this range that have entries at all."""
        at, end = TABLE + page * PAIR, TABLE + (page + count) * PAIR
        while at < end and (data := self._next_data(at)) is not None:
            at = data // PAIR * PAIR
            stop = min(end, at + PART * PAIR, os.lseek(self._fd, at, os.SEEK_HOLE))
            stop = -(-stop // PAIR) * PAIR
            if at < end:
                first = (at - TABLE) // PAIR
                yield first, self._read_pairs(first, (stop - at) // PAIR)
            at = stop

    def _mend(self, page: int, pairs: array) -> None:
        """Let those that are damaged say that the last sync's bytes are LOST."""
        lost = self._synced << EPOCH | LOST
        for at in range(0, len(pairs), 4):
            if _is_damaged(page + at // 4, pairs[at : at + 4]):
                pairs[at : at + 4] = array("Q", (lost, _sums(page + at // 4, 0, lost, 0), 0, 0))

    def _writable(self, pairs: array) -> list[int]:
        """Which place of each page is to be written: the one that a crash would not go back to."""
        if not self._keep:
            return [0] * (len(pairs) // 4)
        return [
            (b > a) if max(a, b) >> EPOCH > self._synced else not b > a
            for a, b in zip(pairs[0::4], pairs[2::4], strict=True)
        ]

    def restore(self) -> Iterator[tuple[int, bytes]]:
        """Go back to the last sync: (first page, the SPT's bytes from it on) for what there is."""
        unsynced = self._synced + 1 << EPOCH
        for first, pairs in self._used(0, self._slot // PAGE_SIZE):
            states = bytearray(len(pairs) // 4)
            holes, dropped = [False] * len(states), [-1] * len(states)
            for index, (a, b) in enumerate(zip(pairs[0::4], pairs[2::4], strict=True)):
                newest = max(a, b)
                if not newest or newest >= unsynced or newest & HOLE:
                    # Before it says that there is nothing, or something older: does it say that?
                    pair = pairs[4 * index : 4 * index + 4]
                    if _is_damaged(first + index, pair):
                        states[index] = DISK  # read looks again, and tells
                        continue
                    if newest >= unsynced:
                        dropped[index] = slot = int(b > a)
                        pairs[4 * index + 2 * slot] = pairs[4 * index + 2 * slot + 1] = 0
                        a, b = pairs[4 * index], pairs[4 * index + 2]
                        newest = max(a, b)
                holes[index] = bool(newest & HOLE)
                if newest and not holes[index]:
                    states[index] = DISK | (SLOT if b > a else 0)
            if max(dropped) >= 0:
                self._write_pairs(first, pairs)
                self._punch_places(_runs(first, dropped))
            self._give_back(first, holes)
            yield first, bytes(states)

    # ------------------------------------------------------------ the pages

    def read(self, pages: range, byte: int, into: memoryview) -> int:
        """Read these pages, one behind the other, from where the SPT's byte says.

        Returns how many are whole, from the first on. Raises OSError if not even that is.
        """
        slot = bool(byte & SLOT)
        base = self._data + slot * self._slot
        got = 0
        try:
            pairs = self._read_pairs(pages.start, pages[-1] + 1 - pages.start)
            if pages.step == 1:
                got = os.preadv(self._fd, [into], base + pages.start * PAGE_SIZE)
            else:
                for page in pages:
                    here = into[got : got + PAGE_SIZE]
                    got += os.preadv(self._fd, [here], base + page * PAGE_SIZE)
        except OSError as error:
            if len(pages) == 1:
                raise
            log.logger("DMS").info("%d pages from page %d: %s", len(pages), pages.start, error)
            return self.read(pages[:1], byte, into[:PAGE_SIZE])  # perhaps it is not the first
        sums = pairs[2 * slot + 1 :: 4 * pages.step]
        for index in range(got // PAGE_SIZE):
            content = into[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
            whole = zlib.crc32(content) == sums[index] & CRC_BITS
            untold = self._keep and self._says_nothing(pages[index], slot, pairs, pages.start)
            if whole and not untold:
                continue
            reason = (
                "its entry in the disk's table is damaged" if untold else "the checksum is wrong"
            )
            if index == 0:
                raise OSError(errno.EIO, reason)
            return index
        if got < PAGE_SIZE:
            raise OSError(errno.EIO, "preadv: short read of the disk file")
        return got // PAGE_SIZE

    @staticmethod
    def _says_nothing(page: int, slot: int, pairs: array, first: int) -> bool:
        """Is this page's pair, of these from page first on, damaged, or known to have been?"""
        pair = pairs[4 * (page - first) : 4 * (page - first) + 4]
        version = pair[2 * slot]
        return not version or bool(version & (HOLE | LOST)) or _is_damaged(page, pair)

    def _check_written(self) -> None:
        """Which header a kept disk has after a sync that failed is not known: leave it all."""
        if self._keep and self._failed_sync:
            raise self._failed_sync

    def write(self, page: int, content: memoryview) -> list[tuple[range, int]]:
        """Write these pages, whole ones. Returns the SPT's DISK byte for each run of them."""
        self._check_written()
        count = len(content) // PAGE_SIZE
        if self._keep:
            pairs = self._read_pairs(page, count)
            self._mend(page, pairs)
        else:
            pairs = array("Q", bytes(count * PAIR))
        slots = self._writable(pairs)
        version = self._synced + 1 << EPOCH
        for index, slot in enumerate(slots):
            crc = zlib.crc32(content[index * PAGE_SIZE : (index + 1) * PAGE_SIZE])
            sums = _sums(page + index, slot, version, crc) if self._keep else crc
            pairs[4 * index + 2 * slot], pairs[4 * index + 2 * slot + 1] = version, sums
        runs = list(_runs(page, slots))
        pages = range(page, page + count)
        try:
            for first, length, slot in runs:
                at = (first - page) * PAGE_SIZE
                part = content[at : at + length * PAGE_SIZE]
                self._write_all(part, self._data + slot * self._slot + first * PAGE_SIZE)
            self._write_pairs(page, pairs)
        except OSError as error:
            self._torn.update(pages)  # the second write since a sync goes over the first
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._punch_places(runs)  # what was written of it: others may fit there
            if not self._make_room():
                raise
            return self.write(page, content)
        self._torn.difference_update(pages)
        return [
            (range(first, first + length), DISK | (SLOT if slot else 0))
            for first, length, slot in runs
        ]

    def _make_room(self) -> bool:
        """Punch out what neither the last sync nor the pages of now need; was it there till now?"""
        if not self._keep or self._room_made == self._synced:
            return False
        self._room_made = self._synced
        for first, pairs in self._used(0, self._slot // PAGE_SIZE):
            self._mend(first, pairs)
            spare = [
                slot if max(a, b) >> EPOCH <= self._synced else -1
                for slot, a, b in zip(self._writable(pairs), pairs[0::4], pairs[2::4], strict=True)
            ]
            self._punch_places(_runs(first, spare))
        return True

    def _write_all(self, content: memoryview, at: int) -> None:
        while content:
            done = os.pwrite(self._fd, content, at)
            content, at = content[done:], at + done

    def free(self, page: int, count: int) -> None:
        """These pages are as never written. Gives their blocks back; on a kept disk, those that the
        last sync needs at the next one."""
        self._check_written()
        if self._keep:
            changed = page
            try:
                for first, pairs in self._used(page, count):
                    self._mend(first, pairs)
                    slots = self._writable(pairs)
                    freed = self._make_holes(first, pairs, slots)
                    changed = first + len(freed)
                    self._write_pairs(first, pairs)
                    self._freed.update((at, many) for at, many, new in _runs(first, freed) if new)
                    self._punch_places(_runs(first, slots))  # what the last sync does not need
            except OSError:
                self._torn.update(range(page, changed))  # no sync may make this the last word
                raise
        else:
            self._punch(TABLE + page * PAIR, count * PAIR)
            self._punch_places([(page, count, 0)])
        self._torn = {torn for torn in self._torn if not page <= torn < page + count}

    def _make_holes(self, first: int, pairs: array, slots: Sequence[int]) -> list[bool]:
        """Let the pairs say in these places that their pages are freed: which said so not yet?"""
        hole = self._synced + 1 << EPOCH | HOLE
        freed = []
        for index, slot in enumerate(slots):
            at = 4 * index
            newest = max(pairs[at], pairs[at + 2])
            freed.append(bool(newest and not newest & HOLE))
            if freed[-1]:
                pairs[at + 2 * slot] = hole
                pairs[at + 2 * slot + 1] = _sums(first + index, slot, hole, 0)
        return freed

    def _give_back(self, first: int, holes: Sequence[bool]) -> None:
        """Those of the pages from first on that are holes, by the last sync too: as never there."""
        for page, count, hole in _runs(first, holes):
            if hole:
                self._punch_places([(page, count, 0), (page, count, 1)])
                self._punch(TABLE + page * PAIR, count * PAIR)

    def _punch_places(self, runs: Iterable[tuple[int, int, int]]) -> None:
        """Of each (first page, count, place): the bytes there; of no place, if that is -1."""
        for page, count, slot in runs:
            if slot >= 0:
                at = self._data + slot * self._slot + page * PAGE_SIZE
                self._punch(at, count * PAGE_SIZE)

    def _punch(self, at: int, length: int) -> None:
        try:
            punch_hole(self._fd, at, length)
        except OSError as error:  # it is only room: SPT and entries say that nothing is there
            log.logger("DMS").info("%d bytes at %d of the disk: %s", length, at, error)

    def sync(self) -> None:
        """What was written so far is what a crash goes back to.

        Raises OSError, and for ever after once the file system has failed to: what it has lost by
        then it does not tell again.
        """
        if self._failed_sync:
            raise self._failed_sync
        if self._torn:
            raise OSError(errno.EIO, f"{len(self._torn)} pages could not be written")
        try:
            os.fsync(self._fd)
            if self._keep:
                self._write_header(self._synced + 1, 0)
                os.fsync(self._fd)
                self._synced += 1
                self._write_header(self._synced, 1)
        except OSError as error:
            self._failed_sync = error
            raise
        hole = self._synced << EPOCH | HOLE
        for page, count in self._freed:
            try:
                pairs = self._read_pairs(page, count)
            except OSError as error:  # the sync is done: this is only room
                log.logger("DMS").info("freed pages from page %d: %s", page, error)
                continue
            self._mend(page, pairs)
            versions = zip(pairs[0::4], pairs[2::4], strict=True)
            self._give_back(page, [hole in both for both in versions])  # not written since
        self._freed.clear()

    def close(self) -> None:
        os.close(self._fd)


class BadRequest(Exception):
    """A request that is wrong; the text says in what."""


class DMS:
    def __init__(
        self, comm: MPI.Comm, path: str | None, start_addr: int, end_addr: int, keep: bool = False
    ) -> None:
        """The server of every other rank of comm.

        path: the disk file of rank 1's instance; a further one's has its number added. keep: as
        Config's. Raises OSError when a disk can't be made, ValueError when it is not to be used.
        """
        self._comm = comm
        self._start, self._end = start_addr, end_addr
        pages = (end_addr - start_addr) // PAGE_SIZE
        self._spts = [SPT(pages, instance) for instance in range(comm.size - 1)]
        self._keep = keep
        self._disks = []
        for instance, spt in enumerate(self._spts):
            own = path if path is None or instance == 0 else f"{path}.{instance}"
            self._disks.append(Disk(own, start_addr, end_addr, keep))
            if keep:
                for page, states in self._disks[instance].restore():
                    spt.load(page, states)
        self._question, self._answer = m.MessageBuffer(), m.MessageBuffer()
        self._log = log.logger("DMS")
        self._info = self._log.isEnabledFor(INFO)
        self._debug = self._log.isEnabledFor(DEBUG)
        # What does each request, how long its body is (None: any), how many pages it may name (0:
        # it names none here).
        self._requests = {
            m.HELLO: (self._hello, m.GEOMETRY.size, 0),
            m.GET: (self._get, 0, m.MAX_PAGES),
            m.EVICT: (self._evict, None, 0),
            m.STORE: (self._store, None, 0),
            m.SYNC: (self._sync, 0, 0),
            m.FREE: (self._free, 0, pages),
            m.LOCATIONS: (self._locations, 0, m.MAX_LOCATIONS),
            m.BYE: (self._bye, 0, 0),
            m.RINGS: (self._rings, 0, 0),
        }
        self._left: set[int] = set()  # instances that have said BYE
        self._refused = ""  # the last reason
        self._doorbell = Doorbell()
        self._silent = set(range(comm.size - 1))  # instances that do not ring

    # ------------------------------------------------------------ receiving and answering

    def serve(self) -> None:
        """Answer requests until every instance has said BYE."""
        prctl(PR_SET_TIMERSLACK, 1)  # nanosecond: else a nap takes 50 µs more than it should
        for ending in (signal.SIGTERM, signal.SIGINT):
            signal.signal(ending, signal.SIG_IGN)
        self._log.debug("DMS ready for serving requests")
        status = MPI.Status()
        while len(self._left) < self._comm.size - 1:
            self._wait(status)
            source, tag = status.Get_source(), status.Get_tag()
            length = self._receive(status.Get_count(MPI.BYTE), source, tag)
            if length is None:
                continue
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

    def _receive(self, length: int, source: int, tag: int) -> int | None:
        """Receive the message that was found, and throw away what is too long to be any; its length.

        None: there is no memory for it, or MPI can't count so far. It was dropped, as to receive
        less than all of it writes behind the buffer with some MPI.
        """
        whole: bytearray | memoryview = self._question.whole
        try:
            if not 0 <= length <= len(whole):
                whole = bytearray(length)
        except (MemoryError, ValueError):  # ValueError: of MPI_UNDEFINED, which is negative
            self._comm.Mprobe(source, tag)  # no probe finds it again
            self._log.warning("a message of INSTANCE_%d was dropped: no room for it", source - 1)
            return None
        self._comm.Recv([whole, MPI.BYTE], source, tag)
        return length

    def _handle(self, source: int, length: int) -> int:
        """Do what the message of source asks. The answer is in _answer; returns its body's length.

        A request that can't be done changes nothing, and is answered with the reason.
        """
        try:
            if not m.HEADER.size <= length <= m.MAX_MESSAGE:
                raise BadRequest(f"a message of {length} bytes is none of the EDM's")
            kind, stride, count, page = m.HEADER.unpack_from(self._question.whole)
            if source - 1 in self._left:
                raise BadRequest("it has said BYE")
            if kind not in self._requests or stride and kind != m.GET:
                raise BadRequest(f"there is no request of kind {kind} and stride {stride}")
            action, right, most = self._requests[kind]
            body = self._question.body[: length - m.HEADER.size]
            if right is not None and len(body) != right:
                raise BadRequest(f"a body of {len(body)} bytes, where {right} belong")
            if most:
                self._check(page, count, most)
            self._answer.head(m.OK)
            if kind == m.GET:
                return self._get(source - 1, page, count, max(stride, 1))
            return action(source - 1, page, count, body) or 0
        except (BadRequest, OSError, MemoryError) as error:
            return self._refuse(m.ERROR, source - 1, str(error) or type(error).__name__)

    def _refuse(self, kind: int, instance: int, reason: str) -> int:
        if reason != self._refused:  # a full disk refuses again and again
            self._log.warning("request of INSTANCE_%d refused: %s", instance, reason)
        self._refused = reason
        text = reason.encode()[:1000]
        self._answer.body[: len(text)] = text
        self._answer.head(kind, len(text))
        return len(text)

    def _check(self, page: int, count: int, most: int) -> None:
        pages = self._spts[0].pages
        if not 0 < count <= most:
            raise BadRequest(f"a count of {count} pages, where 1 to {most} may be")
        if page >= pages or count > pages - page:
            raise BadRequest(f"{count} pages from page {page} in a space of {pages} pages")

    def _address(self, page: int) -> int:
        return self._start + page * PAGE_SIZE

    # ------------------------------------------------------------ the requests

    def _hello(self, instance: int, page: int, count: int, body: memoryview) -> int:
        theirs = m.GEOMETRY.unpack(body)
        ours = (m.VERSION, PAGE_SIZE, self._start, self._end)
        if theirs != ours:
            raise BadRequest(
                "instance and DMS differ in (version, page size, start_addr, end_addr): "
                f"{theirs} and {ours}"
            )
        address = self._doorbell.address()
        self._answer.body[: len(address)] = address
        self._answer.head(m.OK, self._keep)
        return len(address)

    def _rings(self, instance: int, page: int, count: int, body: memoryview) -> None:
        self._silent.discard(instance)

    def _get(self, instance: int, page: int, count: int, stride: int) -> int:
        spt = self._spts[instance]
        if stride > m.MAX_STRIDE:
            raise BadRequest(f"a stride of {stride} pages, where up to {m.MAX_STRIDE} may be")
        if page + (count - 1) * stride >= spt.pages:
            leave = f"{count} pages from page {page}, a stride of {stride} apart,"
            raise BadRequest(f"{leave} in a space of {spt.pages} pages")
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
            try:
                body = self._answer.body[:answer_length]
                same = self._disks[instance].read(pages, byte, body)
            except OSError as error:
                return self._refuse(m.UNREADABLE, instance, f"page {page}: {error}")
            answer_length = same * PAGE_SIZE
            spt.set(pages[:same], byte | INSTANCE)
            self._answer.head(m.CONTENT, same, page)
        self._show(instance)
        if self._debug:
            self._log.debug("page in address: %#x sent to app", self._address(page))
        return answer_length

    def _evict(self, instance: int, page: int, runs: int, body: memoryview) -> None:
        self._write(instance, runs, body, 0)

    def _store(self, instance: int, page: int, runs: int, body: memoryview) -> None:
        self._write(instance, runs, body, INSTANCE)

    def _write(self, instance: int, runs: int, body: memoryview, stay: int) -> None:
        """stay: INSTANCE, if the instance goes on having the pages; else 0."""
        if not 0 < runs <= m.MAX_RUNS:
            raise BadRequest(f"{runs} runs, where 1 to {m.MAX_RUNS} may be")
        table_length = runs * m.RUN.size
        if len(body) < table_length:
            raise BadRequest(f"a body of {len(body)} bytes, with a table of {table_length}")
        spt, disk = self._spts[instance], self._disks[instance]
        table = list(m.RUN.iter_unpack(body[:table_length]))
        content_length = 0
        for first, count, dirty in table:
            self._check(first, count, m.MAX_PAGES)
            if dirty > 1:
                raise BadRequest(f"a run's dirty is {dirty} from page {first}, where 0 or 1 may be")
            if not spt.all_in_instance(first, count):
                raise BadRequest(f"{count} pages from page {first} are not all in the instance")
            content_length += dirty * count * PAGE_SIZE
        if len(body) != table_length + content_length:
            right = table_length + content_length
            raise BadRequest(f"a body of {len(body)} bytes, where {right} belong")
        at = table_length
        written = []
        for first, count, dirty in table:
            if dirty:
                written += disk.write(first, body[at : at + count * PAGE_SIZE])
                at += count * PAGE_SIZE
        for pages, byte in written:
            spt.set(pages, byte | stay)
        for first, count, dirty in table:
            if not dirty and not stay:
                spt.dropped(first, count)
            if self._info:
                for p in range(first, first + count):
                    self._log.info("page in address: %#x written to disk", self._address(p))
        self._show(instance)

    def _free(self, instance: int, page: int, count: int, body: memoryview) -> None:
        self._disks[instance].free(page, count)
        for at in range(page, page + count, PART):
            self._spts[instance].set(range(at, min(at + PART, page + count)), NEW)
        self._show(instance)

    def _sync(self, instance: int, page: int, count: int, body: memoryview) -> None:
        self._disks[instance].sync()

    def _locations(self, instance: int, page: int, count: int, body: memoryview) -> int:
        states = self._spts[instance].read(page, count)
        self._answer.body[:count] = states.translate(_WITHOUT_SLOT)
        self._answer.head(m.LOCATIONS, count, page)
        return count

    def _bye(self, instance: int, page: int, count: int, body: memoryview) -> None:
        self._left.add(instance)

    def _show(self, instance: int) -> None:
        if self._debug:
            self._log.debug("SPT updated. Current state: ")
        if self._info:
            self._log.info(self._spts[instance].table(self._start))
