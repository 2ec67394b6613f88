"""PageStore: the pages of one instance outside of its memory: the SPT, and the disk file.

In the picture: the box on the right. On one machine it is in the pager's own process. Over MPI the
DMS (dms.py) has one for each instance, and the pager has an MpiStore (mpi_client.py), which has the
same methods.

Interface: PageStore(config, ...)
    ask_get, take_get    pages come to the instance, for a pager: ask starts, take reads them
    take_page            one page comes, which was not asked for; only if takes_pipes
    stripe               ask_get asks for pages of one stripe: this many neighbours; the first one begins at page 0
    get                  ask and take in one step, for the DMS
    put                  pages leave the instance, or only their bytes are stored
    put_from_pipe        pages leave, and their bytes are in a pipe; only if takes_pipes
    free, sync, runs_on_disk, table, close
    offers, start        a kept store of several DMSs: the syncs that it can resume from
    SYNC_PHASES          a sync of several stores as one: all do the first of these before any does the second.
                         The first is steps 1 and 2 (see below), the second step 3
    SPT                  a byte a page: where the page is
    disk_folder          where a disk without a path is made

Rules:
    * A page belongs to one thread of one process at a time, which the LSPT ensures. So its byte in
      the SPT and its checksum need no lock.
    * All state that changes is in shared memory. A process that is forked after the store was made
      may call put and put_from_pipe while its parent calls the other methods.
    * A kept disk has one lock for all processes. put, free and sync hold it; get does not. Who asks for
      one phase of a sync sees to it that nothing is put or freed until the other.
      A process that is killed while it holds the lock blocks the others forever, so its parent
      must end the job.
    * A disk that is not kept has no lock. Its calls share nothing but the pages that they name.
    * Only one thread calls ask_get, take_get and take_page.

A page's bytes stay on the disk while the instance has the page. So a clean page is dropped without
writing: the disk already has its bytes. INSTANCE says that the page was sent to the instance and has
not left it since.

    SPT byte          location        after the page has left in a put
    NEW               never accessed
    INSTANCE          INSTANCE_n      DISK if it was dirty, else NEW: it is still all zeros
    INSTANCE | DISK   INSTANCE_n      DISK
    DISK              DISK

With DISK, FIRST or SECOND says in which place of the file the bytes are. TORN is added when a put has failed.

The disk file is sparse. All its numbers are little-endian.

    at 0, at 64 KiB    the header, twice: HEADER and its crc32
    at 128 KiB         kept disk: the table, twice
    after that, at a   the first place of each page: page n is n times the page size from there
    multiple of 64 KiB
    after those        kept disk: the second place of each page

A disk that is not kept has no table and no second places. Its header says that no other job can read
it. A file without a name has no header.

The table of a kept disk consists of blocks of 4096 bytes: BLOCK and its crc32. A block describes 816
pages. For each it has the place of the page's bytes, as in the SPT (0, DISK | FIRST, DISK | SECOND),
and their crc32. A block of zeros describes pages that were never written.

The epoch counts the syncs. The header has the epoch of the last one. If the epoch is even, the first
copy of the table is current; if it is odd, the second. So the header selects one consistent table, and
a crash needs no recovery. Changes since the last sync are in memory only: 6 bytes for each page that
was ever used.

    put     writes a page to the place that the last sync does not use.
    sync    1. writes the changed blocks to the copy of the table that is not current: the blocks that
               changed since the last sync, or between the last two.
            2. writes the second header with the next epoch, fsync: the sync is prepared.
            3. writes the first header with the next epoch, fsync: it is committed.
    start   takes the first header, or if its crc32 is wrong, the second; and first makes both the
            same and durable.

If step 2 or 3 fails, it is not known what is durable, and nothing is written after that.

Several DMSs have a part of the pages each (mpi_client.py). All number the pages alike: to a store, the others'
pages are NEW. So its memory and table are as large as if it had all pages.

Such stores sync as one. Their client has all of them prepare it, and only when all have succeeded, commit it. In
between, nothing is put, freed or synced. A disk that was prepared, and not committed, has two epochs, and offers
both. So does a disk with a damaged header: the first may have named the epoch before, or the second the next. At
the start all take the oldest epoch that all disks offer. If one has committed the newer epoch, it offers only
that, and then all have prepared it. If none has, the older one is whole everywhere: a put never writes over what
the last committed sync needs. So if one disk can't prepare a sync, all go on as before.

A block is damaged if its crc32 is wrong, its number is not its own, its epoch is later than the header's, or
it is zeros although the other copy has it from an earlier sync. Its pages count as pages with a checksum of 0,
which is wrong. So they can't be read until they are written or freed.

A page whose put has failed is TORN: the bytes at its new place are undefined. No sync succeeds until
the page is written or freed.

Disk space: free punches the places that the last sync does not use, and the next sync punches the others.
Before a page is written, the file gets room for the page's block in both copies of the table. When a write
to a kept disk fails, put punches every place that neither the last sync nor the SPT uses, once an epoch, and
tries again. What a failed put has written keeps its room until the page is written again or freed.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from struct import Struct

from edm import log
from edm.lspt import ByteTable, Run, runs
from edm.uffd_ctypes import PAGE_SIZE, PAGES_AT_ONCE, punch_hole, semaphore

# A byte of the SPT. INSTANCE | DISK: the instance has the page, and the disk has its bytes, unless the
# application has written it since.
NEW, INSTANCE, DISK = 0, 1, 2
FIRST, SECOND = 4, 8  # with DISK: the place. Both: in a damaged block, with a crc32 of 0
TORN = 128  # a put of the page has failed. No other byte is beyond ASCII
UNREADABLE = DISK | FIRST | SECOND

NEW_PAGES, CONTENT = 17, 18  # answers to a get, on the wire too: never accessed; bytes

SYNC_PHASES = range(2)  # on the wire too: it is prepared; it is committed

Bytes = tuple[int, memoryview]  # the first page of a run, and the run's bytes

# Pages. Of n DMSs, one has every n-th stripe. A readahead window of 256 pages goes to four DMSs at once.
STRIPE, ONE_STRIPE = 64, 1 << 40  # the latter: there is one DMS, or none

# Bytes in one write. Longer writes make larger folios in the page cache, where ext4 takes longer to write
# a single page: measured 28 µs after writes of 1 MiB, 5 after 128 KiB. A page of a run takes 1.5 and 2.3.
WRITE_SIZE = 128 << 10

# The disk file's format.
MAGIC, FORMAT = b"EDM disk", 4
# magic, format; the DMS's number, how many there are (0: not kept), STRIPE; page size, start_addr,
# end_addr; epoch
HEADER = Struct("<8sH HHH IQQ Q")
HEADER_COPY = 64 << 10  # bytes from one copy to the other: a multiple of every page size
TABLE = 2 * HEADER_COPY
BLOCK_PAGES = 816
BLOCK = Struct("<IQ816s3264s")  # number; epoch; the places of its pages; their crc32s
CRC = 4  # bytes
BLOCK_SIZE = BLOCK.size + CRC

# The bytes of the blocks. 0: never used. SAME: both copies of the table have it. A changed block is written by
# two syncs, one for each copy: WRITE_TWICE, after the first of them WRITE_ONCE, and then SAME.
SAME, WRITE_ONCE, WRITE_TWICE = 1, 2, 3

# The shared words: the epoch of the last sync; an errno if nothing may be written; the last epoch in which put
# made room, plus 1.
EPOCH, NO_WRITES, ROOM_MADE = 0, 1, 2

# Tables for bytes.translate, of SPT bytes.
_DROPPED = bytes(byte & ~INSTANCE for byte in range(256))
_LOCATION = bytes(byte & (INSTANCE | DISK) for byte in range(256))
_TORN = bytes(byte | TORN for byte in range(256))
_PLACE = bytes(byte & UNREADABLE if byte < TORN else 0 for byte in range(256))
_ON_DISK = re.compile(rb"[\2\3]+")  # by locations
_TO_WRITE = re.compile(b"[%c%c]" % (WRITE_ONCE, WRITE_TWICE))
# 6 is DISK | FIRST, and 10 DISK | SECOND.
# {place: the pages that are written there, by their places at the last sync}
_TARGETS = {DISK | FIRST: re.compile(rb"[^\x06]+"), DISK | SECOND: re.compile(rb"\x06+")}
_NOWHERE = re.compile(rb"\0+")  # the pages without a place
# {place: the pages that do not use it, by the places that they use}
_SPARE = {FIRST: re.compile(rb"[\x00\x0a]+"), SECOND: re.compile(rb"[\x00\x06]+")}


def disk_folder() -> str:
    """The folder for a disk without a path: not /tmp, which is memory on many machines, if there is another
    that can be written. Raises FileNotFoundError if there is none at all."""
    for folder in (os.environ.get("TMPDIR") or "/var/tmp", "/var/tmp"):
        with suppress(OSError), tempfile.TemporaryFile(dir=folder):
            return folder
    return tempfile.gettempdir()


# ---------------------------------------------------------------- bytes


def write_all(fd: int, content: bytes | memoryview, at: int) -> None:
    """Write all the content at this offset, at most WRITE_SIZE bytes in one call."""
    while (done := os.pwrite(fd, content[:WRITE_SIZE], at)) < len(content):
        content, at = content[done:], at + done


def _crc(content: memoryview, at: int) -> int:
    """The crc32 of page number `at` of this content."""
    return zlib.crc32(content[at * PAGE_SIZE : (at + 1) * PAGE_SIZE])


def _sealed(content: bytes) -> bytes:
    """The content, followed by its crc32."""
    return content + zlib.crc32(content).to_bytes(CRC, "little")


def data(fd: int, begin: int, end: int, unit: int = 1) -> Iterator[Run]:
    """The runs of units between these offsets of a file that are not all hole. unit: bytes; the first unit, 0,
    is at `begin`."""
    at = begin
    try:
        while (at := os.lseek(fd, at, os.SEEK_DATA)) < end:
            first, at = (at - begin) // unit, min(os.lseek(fd, at, os.SEEK_HOLE), end)
            yield first, -(-(at - begin) // unit) - first
    except OSError as error:
        if error.errno != errno.ENXIO:  # ENXIO: only a hole is left
            raise


# ---------------------------------------------------------------- the store


class PageStore:
    stripe = ONE_STRIPE

    def __init__(self, config: object, instance: int, dms: tuple[int, int] = (0, 1)) -> None:
        """config: an edm.Config. Without a path as disk, that is a file without a name in disk_folder(). With keep, it
        outlives the job, which resumes from the last sync of an earlier one.

        instance: its number, which the path of every instance but the first, 0, has added. dms: the number of its
        DMS, and how many there are; a kept disk of several waits for start(). Raises ValueError, which names the
        file, if the file can't be used; OSError if it can't be made.
        """
        path, keep, start, end = config.disk, config.keep, config.start_addr, config.end_addr
        if path:
            path += f".{instance}" if instance else ""
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        else:
            self.fd, name = tempfile.mkstemp(prefix="edm-", dir=disk_folder())
            os.unlink(name)
        self.kept, self._start, self._dmss = keep, start, dms[1]
        self._geometry = *(dms if keep else (0, 0)), STRIPE, PAGE_SIZE, start, end
        pages = (end - start) // PAGE_SIZE
        self._blocks = -(-pages // BLOCK_PAGES) if keep else 0  # in a copy of the table
        self._data = -(-self._block_place(2, 0) // HEADER_COPY) * HEADER_COPY  # the first places
        self._synced = ByteTable(pages)  # the places at the last sync; 0 if the disk is not kept
        self.spt, self._instance = ByteTable(pages), f"INSTANCE_{instance}"  # as the log names it
        self._size = self._place(pages, SECOND if keep else FIRST)
        self._crcs = memoryview(mmap.mmap(-1, 4 * pages if keep else 4)).cast("I")
        self._changed = memoryview(mmap.mmap(-1, max(1, self._blocks)))  # a byte a block: see SAME
        self._words = memoryview(mmap.mmap(-1, 24)).cast("Q")
        self._lock = semaphore() if keep else nullcontext()
        # For take_get and take_page.
        self._buffer = memoryview(mmap.mmap(-1, PAGES_AT_ONCE * PAGE_SIZE))
        self._buffer_at = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        self._page = [self._buffer[:PAGE_SIZE]]  # where take_page reads
        self._log, self._banner, self._info = log.of_box("DMS")
        # Whether pages may come and go by a short way. A kept disk needs checksums, and a log names each page.
        self.takes_pipes = not (keep or self._info)
        self.offers = range(0)  # the epochs that its disk has; none without a path
        # Between the steps of a sync: the blocks that it has written, and the places in them.
        self._prepared: dict[int, bytes] | None = None
        try:
            self._begin(path) if path else os.ftruncate(self.fd, self._size)
        except BaseException as error:
            os.close(self.fd)
            error.filename = path or name  # for the words of an OSError
            raise

    # ------------------------------------------------------------ pages come

    def ask_get(self, pages: range) -> range:
        """Ask for these pages, at most PAGES_AT_ONCE of one stripe, without waiting. pages may have a step.

        The result is an argument for take_get.
        """
        if len(pages) > 1 and pages.step == 1 and (byte := self.spt.state[pages.start]) & DISK:
            place, length = self._place(pages.start, byte), len(pages) * PAGE_SIZE
            os.posix_fadvise(self.fd, place, length, os.POSIX_FADV_WILLNEED)
        return pages

    def take_get(self, asked: range) -> tuple[int, int, int]:
        """Get the pages that were asked for: as get, with the address of the bytes in this process. They
        are valid until the next call, also of take_page."""
        if len(asked) == 1 and self.takes_pipes and (at := self.take_page(asked.start)):
            return CONTENT, 1, at
        return *self.get(asked, self._buffer), self._buffer_at

    def take_page(self, page: int) -> int:
        """If takes_pipes: get one page, which needs no ask_get. Returns the address of its bytes, as take_get; 0 if it
        has none, or not all can be read. Raises OSError.

        This takes 2.5 µs, where get takes 3.7.
        """
        byte, place = self.spt.state[page], self._data + page * PAGE_SIZE
        if not byte & DISK or os.preadv(self.fd, self._page, place) < PAGE_SIZE:
            return 0
        self.spt.state[page] = byte | INSTANCE
        return self._buffer_at

    def get(self, pages: range, into: memoryview) -> tuple[int, int]:
        """Send pages to the instance: (NEW_PAGES or CONTENT, the number of pages, from the first on). With
        CONTENT, their bytes are in `into`.

        It sends fewer pages than it was asked for, at least one, if not all are alike or can be read.
        Raises OSError if the first page can't be read.
        """
        states = self.spt.state[pages.start : pages.stop : pages.step].translate(_DROPPED)
        byte, got = states[0], len(states) - len(states.lstrip(states[:1]))  # INSTANCE is ignored
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
            address = self._start + pages.start * PAGE_SIZE
            self._log.info("get request to send content of page in address: %#x", address)
            new = "page accessed first time, set info - new_page"
            self._log.debug(f"read page address: {address:#x} from disk" if byte & DISK else new)
            self._show()
            self._log.debug("page in address: %#x sent to app", address)
        return CONTENT if byte & DISK else NEW_PAGES, got

    def _read(self, pages: range, byte: int, into: memoryview) -> None:
        """Read these pages, which have this SPT byte, one behind the other. Raises OSError unless all can
        be read and have the right checksums."""
        place = self._place(pages.start, byte)
        length = (len(pages) if pages.step == 1 else 1) * PAGE_SIZE  # bytes in one read
        for at in range(0, len(pages) * PAGE_SIZE, length):
            if os.preadv(self.fd, [into[at : at + length]], place + at * pages.step) < length:
                raise OSError(errno.EIO, "short read of the disk file")
        if self.kept and any(_crc(into, at) != self._crcs[page] for at, page in enumerate(pages)):
            raise OSError(errno.EIO, "the checksum is wrong")

    # ------------------------------------------------------------ pages go

    def put(self, gone: Sequence[Run], dirty: Sequence[Bytes]) -> None:
        """Write the dirty pages. The pages `gone` have left the instance; if there are none, the instance
        keeps the dirty ones. There is at least one page. From the first to the last, there are at most
        PAGES_AT_ONCE.

        Raises OSError on failure. Then no page has left.
        """
        if gone:
            self._say(self._log.debug, "Handle page eviction in address %#x", dirty)
        with self._lock:
            self._check_writable()
            self._write(dirty)
            for page, count in gone:
                self.spt.change(range(page, page + count), _DROPPED)
        self._say(self._log.info, "page in address %#x stored in disk", dirty)
        if gone and self._info:
            self._log.debug("Page evicted successfully, sending ack")
        self._show()

    def put_from_pipe(self, pipe: int, page: int, content: memoryview) -> bool:
        """If takes_pipes: write a run of pages, which have left the instance, from a pipe without copying them.
        1.4 µs a page in runs of 256, where copying takes 2.0. content: memory for the bytes of the run.

        Returns False if a write fails: content has the bytes then, for put, which reports the error. Raises
        OSError if what was written can't be read back.
        """
        place, done = self._place(page, FIRST), 0
        with suppress(OSError):
            while done < len(content):  # the pipe has no more
                done += os.splice(pipe, self.fd, WRITE_SIZE, offset_dst=place + done)
        if done == len(content):
            self.spt.set(range(page, page + done // PAGE_SIZE), DISK | FIRST)
            return True
        again = os.preadv(self.fd, [content[:done]], place) + os.readv(pipe, [content[done:]])
        if again < len(content):
            raise OSError(errno.EIO, "the disk does not give back what it took")
        return False

    def _write(self, dirty: Sequence[Bytes]) -> None:
        """Write these pages. If one write fails, all pages are TORN: a part of them may be written. On a kept disk,
        this makes room, once an epoch, and tries again."""
        try:
            for page, content in dirty:
                self._write_run(page, content)
        except OSError:
            for page, content in dirty:
                self.spt.change(range(page, page + len(content) // PAGE_SIZE), _TORN)
            epoch = self._words[EPOCH]
            if not self.kept or self._words[ROOM_MADE] > epoch:
                raise
            self._words[ROOM_MADE] = epoch + 1
            # All pages that the file has: also what a killed job wrote after its sync.
            for begin in (self._place(0, FIRST), self._place(0, SECOND)):
                for run in data(self.fd, begin, begin + self.spt.pages * PAGE_SIZE, PAGE_SIZE):
                    self._punch_spare(*run)
            self._write(dirty)

    def _write_run(self, page: int, content: memoryview) -> None:
        count = len(content) // PAGE_SIZE
        if not self.kept:
            write_all(self.fd, content, self._place(page, FIRST))
            self.spt.set(range(page, page + count), INSTANCE | DISK | FIRST)
            return
        for block in self._blocks_of(page, count):
            self._changed[block] = WRITE_TWICE
            for table in (0, 1):  # so that no sync fails for lack of room
                os.posix_fallocate(self.fd, self._block_place(table, block), BLOCK_SIZE)
        synced = self._synced.read(page, count)
        for place, where in _TARGETS.items():
            for first, many in runs(page, synced, where):
                part = content[(first - page) * PAGE_SIZE :][: many * PAGE_SIZE]
                write_all(self.fd, part, self._place(first, place))
                self.spt.set(range(first, first + many), INSTANCE | place)
                for at in range(many):
                    self._crcs[first + at] = _crc(part, at)

    # ------------------------------------------------------------ the rest

    def free(self, page: int, count: int) -> None:
        """Forget these pages: they are NEW."""
        with self._lock:
            for first, before in self.spt.ever_set(page, count):
                many = len(before)
                self.spt.set(range(first, first + many), NEW)
                for block in self._blocks_of(first, many):
                    self._changed[block] = self._changed[block] and WRITE_TWICE
                if before.strip(b"\0\1") and not self._words[NO_WRITES]:  # some were written
                    self._punch_spare(first, many)
        self._show()

    def sync(self, phases: Iterable[int] = SYNC_PHASES) -> None:
        """Make everything that was put durable. A job that opens the kept disk again resumes from here. Of a disk
        that is not kept, nothing needs to be.

        Raises OSError if a page is TORN. Once the file system has failed to sync, each call raises
        OSError: the kernel reports lost writes only once, see fsync(2).
        """
        with self._lock:
            for phase in phases if self.kept else ():
                (self._prepare, self._commit)[phase]()

    def runs_on_disk(self) -> Iterator[Run]:
        """The runs of pages whose bytes are on the disk."""
        for first, states in self.spt.ever_set(0, self.spt.pages):
            yield from runs(first, states.translate(_LOCATION), _ON_DISK)

    def table(self) -> str:
        """The SPT as the wiki prints it: a line for each page that was ever accessed."""
        lines = ["DMS- Print SPT STATE", "-----START SPT ----"]
        for first, states in self.spt.ever_set(0, self.spt.pages):
            for at, byte in enumerate(states.translate(_LOCATION), first):
                if byte:
                    where = self._instance if byte & INSTANCE else "DISK"
                    lines.append(f"address : {self._start + at * PAGE_SIZE:#x}  location : {where}")
        return "\n".join([*lines, "------END SPT-----"])

    def close(self) -> None:
        """Close the disk. If it is not kept, it is empty, or gone if it has no name."""
        # A network file system may report errors here. A kept disk has been synced; else it is only room.
        with suppress(OSError), open(self.fd, "r+b", 0) as disk:
            if not self.kept:
                disk.truncate(0)

    def _say(self, tell: Callable[..., None], words: str, dirty: Iterable[Bytes]) -> None:
        for first, content in dirty if self._info else ():
            for page in range(first, first + len(content) // PAGE_SIZE):
                tell(words, self._start + page * PAGE_SIZE)

    def _show(self) -> None:
        if self._info:
            self._log.debug("SPT updated. Current state: ")
            self._banner.info(self.table())

    # ------------------------------------------------------------ the disk file

    def _place(self, page: int, byte: int) -> int:
        """The offset in the file of a page with this SPT byte."""
        return self._data + (page + (self.spt.pages if byte & SECOND else 0)) * PAGE_SIZE

    def _punch_spare(self, page: int, count: int) -> None:
        """Give back the places of these pages that neither the SPT nor the last sync uses."""
        now, synced = self.spt.read(page, count).translate(_PLACE), self._synced.read(page, count)
        used = int.from_bytes(now, "big") | int.from_bytes(synced, "big")
        for place, spare in _SPARE.items():
            for first, many in runs(page, used.to_bytes(len(now), "big"), spare):
                with suppress(OSError):  # it is only room
                    punch_hole(self.fd, self._place(first, place), many * PAGE_SIZE)

    def _begin(self, path: str) -> None:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"disk: {path} is in use by another job, or just was") from None
        # Without data, the file is new, or a job was killed before it wrote the header. A pipe can't be asked;
        # a device can't be either, or has no header.
        self.offers = self._read_header(path) if any(data(self.fd, 0, 1 << 62)) else range(1)
        os.fchmod(self.fd, 0o600)
        os.ftruncate(self.fd, self._size if self.kept else 0)
        os.ftruncate(self.fd, self._size)
        if not self.kept or self._dmss == 1:
            self.start(self.offers[0])
        # Also if an earlier job made the file, and was killed before this.
        with suppress(OSError):  # the folder may be unreadable, or not take an fsync
            folder = os.open(os.path.dirname(os.path.realpath(path)), os.O_RDONLY)
            with suppress(OSError):
                os.fsync(folder)
            os.close(folder)

    def start(self, epoch: int) -> None:
        """Resume from the sync of this epoch, one of `offers`. Raises OSError if the headers can't be written.

        This job overwrites what another epoch needs, so its own has to be durable first. A header may not be
        durable, if a job was killed after it had written it. Both have to be allocated before the disk is full.
        """
        self._words[EPOCH] = epoch
        for at in (0, HEADER_COPY):
            self._write_header(epoch, at)
        self._load_table()

    def _pread(self, length: int, at: int) -> bytes:
        """A part of header or table. An I/O error is as damaged bytes: there is another copy, or the pages of
        one block can't be read."""
        with suppress(OSError):
            return os.pread(self.fd, length, at)
        return b"\xff" * length

    def _read_header(self, path: str) -> range:
        """The epochs that this job can resume from. Raises ValueError if it can't use the file.

        The second copy names the sync that was prepared last, the first one the last that was committed.
        """
        copies = [self._pread(HEADER.size + CRC, at) for at in (0, HEADER_COPY)]
        if not (ours := [copy for copy in copies if copy.startswith(MAGIC)]):
            raise ValueError(f"disk: {path} is not an EDM disk; choose another path")
        whole = [HEADER.unpack(copy[:-CRC]) for copy in ours if copy == _sealed(copy[:-CRC])]
        if not whole:
            raise ValueError(f"disk: the header of {path} is damaged; no job can use it")
        _, *found, epoch = whole[0]  # in all but the epoch, the other one is the same
        found, right = (*found, os.fstat(self.fd).st_size), (FORMAT, *self._geometry, self._size)
        compared = len(right) if self.kept else 3  # a disk that is not kept begins anew
        if found[:compared] != right[:compared]:
            fields = "version, DMS, DMSs or 0 without keep, stripe, page size, start_addr, end_addr, bytes"
            how = f"is of another version, geometry or size: {found}, not {right} ({fields})"
            raise ValueError(f"disk: {path} {how}; take its settings, or remove it")
        epochs = [fields[-1] for fields in whole]
        if len(whole) < 2 and epoch:  # at epoch 0, the job that made the disk may have been killed
            self._log.warning("%s: one of the two copies of its header is damaged", path)
            if self._dmss > 1:
                # The first copy may have named the epoch before, or the second one the next.
                epochs.append(epoch + 1 if copies[0] == _sealed(copies[0][:-CRC]) else epoch - 1)
        return range(min(epochs), max(epochs) + 1)

    # ------------------------------------------------------------ the table of a kept disk

    def _block_place(self, table: int, block: int) -> int:
        """The offset in the file of this block in this copy of the table."""
        return TABLE + (table * self._blocks + block) * BLOCK_SIZE

    def _blocks_of(self, page: int, count: int) -> range:
        """The blocks that describe these pages; none if the disk is not kept."""
        return range(page // BLOCK_PAGES, min(-(-(page + count) // BLOCK_PAGES), self._blocks))

    def _load_table(self) -> None:
        now, in_file = self._words[EPOCH] % 2, set()
        for first, many in data(self.fd, TABLE, self._block_place(2, 0), BLOCK_SIZE):
            in_file.update(number % self._blocks for number in range(first, first + many))
        for block in in_file:
            other = self._read_block(1 - now, block, True)
            # A changed block is written to both copies. So zeros are right only if the other copy has no checksum.
            places, crcs = self._read_block(now, block, not any(other[1]))
            # A damaged block is written, too: if it is of a sync that was interrupted, the next epoch would
            # make it valid.
            same = (places, crcs) == other and UNREADABLE not in places
            self._changed[block] = SAME if same else WRITE_TWICE
            page = block * BLOCK_PAGES
            for table in (self.spt, self._synced):
                table.write(range(page, page + len(places)), places)
            self._crcs[page : page + len(places)] = memoryview(crcs).cast("I")

    def _read_block(self, table: int, block: int, may_be_new: bool) -> tuple[bytes, bytes]:
        """The places of this block's pages, and their crc32s. may_be_new: it may be zeros."""
        count = min(BLOCK_PAGES, self.spt.pages - block * BLOCK_PAGES)
        raw = self._pread(BLOCK_SIZE, self._block_place(table, block))
        number, epoch, places, crcs = BLOCK.unpack(raw[:-CRC])
        right = raw == _sealed(raw[:-CRC]) and number == block and epoch <= self._words[EPOCH]
        if not right and (any(raw) or not may_be_new):
            return bytes((UNREADABLE,)) * count, bytes(4 * count)
        return places[:count], crcs[: 4 * count]

    # ------------------------------------------------------------ a sync's steps

    def _prepare(self) -> None:
        """Steps 1 and 2. If step 1 fails, what counts on the disk is as before. Raises OSError if a page is TORN,
        or nothing may be written."""
        self._check_writable()
        prepared, epoch = {}, self._words[EPOCH] + 1
        for block, _ in runs(0, bytes(self._changed[: self._blocks]), _TO_WRITE):
            states = self.spt.read(block * BLOCK_PAGES, BLOCK_PAGES)
            if not states.isascii():  # some are TORN
                raise OSError(errno.EIO, "pages could not be written")
            places = prepared[block] = states.translate(_PLACE)
            crcs = self._crcs[block * BLOCK_PAGES :][:BLOCK_PAGES].tobytes()
            whole = _sealed(BLOCK.pack(block, epoch, places, crcs))
            write_all(self.fd, whole, self._block_place(epoch % 2, block))
        self._write_header(epoch, HEADER_COPY)
        self._prepared = prepared

    def _commit(self) -> None:
        """Step 3. Places that only the sync before this one needs are punched, of pages that have none now."""
        prepared, self._prepared = self._prepared, None
        if prepared is None:
            raise OSError(errno.EINVAL, "there is no sync to commit")
        self._write_header(self._words[EPOCH] + 1, 0)
        self._words[EPOCH] += 1
        for block, places in prepared.items():
            self._changed[block] -= 1
            page = block * BLOCK_PAGES
            self._synced.write(range(page, page + len(places)), places)
            for run in runs(page, places, _NOWHERE):
                self._punch_spare(*run)

    def _write_header(self, epoch: int, at: int) -> None:
        """Write this copy of the header. It, and all that was written before, is durable then."""
        try:
            write_all(self.fd, _sealed(HEADER.pack(MAGIC, FORMAT, *self._geometry, epoch)), at)
            os.fsync(self.fd)
        except OSError as error:
            self._words[NO_WRITES] = error.errno
            raise

    def _check_writable(self) -> None:
        if why := self._words[NO_WRITES]:
            raise OSError(why, os.strerror(why))
