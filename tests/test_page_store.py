"""page_store.py: what a PageStore and its disk file promise, alone and after a crash."""

import ctypes
import errno
import functools
import gc
import os
import random
import resource
import select
import signal
import stat
import tempfile
import threading
import time
import traceback
import zlib
from pathlib import Path
from struct import Struct
from types import SimpleNamespace

import pytest
from conftest import shared_memory
from programs.where import locations

from edm import page_store
from edm.lspt import PART, ByteTable
from edm.page_store import (
    BLOCK_PAGES,
    BLOCK_SIZE,
    CONTENT,
    CRC,
    DISK,
    FIRST,
    FORMAT,
    HEADER,
    HEADER_COPY,
    INSTANCE,
    MAGIC,
    NEW,
    NEW_PAGES,
    SECOND,
    STRIPE,
    SYNC_PHASES,
    TABLE,
    PageStore,
    data,
)
from edm.uffd_ctypes import PAGE_SIZE

PAGES = 300
START = 0x1B58000
END = START + PAGES * PAGE_SIZE
BOTH = pytest.mark.parametrize("keep", [False, True], ids=["scratch", "kept"])


def open_store(path, start=START, end=END, keep=False, instance=0, dms=(0, 1)):
    config = SimpleNamespace(disk=path, start_addr=start, end_addr=end, keep=keep)
    return PageStore(config, instance, dms)


@functools.lru_cache(maxsize=4096)
def content(seed, pages=1):
    return random.Random(seed).randbytes(pages * PAGE_SIZE)


def part(whole, at, count=1):
    """The bytes of count pages from the at-th on."""
    return whole[at * PAGE_SIZE : (at + count) * PAGE_SIZE]


def put(store, page, count, *dirty, stay=False):
    """dirty: (first page, the bytes of it and its neighbours)."""
    gone = [] if stay else [(page, count)]
    store.put(gone, [(first, memoryview(whole)) for first, whole in dirty])


def write(store, page, whole):
    put(store, page, len(whole) // PAGE_SIZE, (page, whole))


def get(store, pages):
    """What the store gives: (kind, bytes, or how many pages are new)."""
    kind, got, address = store.take_get(store.ask_get(pages))
    return kind, ctypes.string_at(address, got * PAGE_SIZE) if kind == CONTENT else got


class Kept:
    """A kept disk."""

    def __init__(self, path, start=START, end=END):
        self.range = start, end
        self.store = open_store(str(path), start, end, keep=True)
        self.fd = self.store.fd
        self.free, self.sync, self.close = self.store.free, self.store.sync, self.store.close

    def write(self, page, *seeds):
        write(self.store, page, b"".join(map(content, seeds)))

    def read(self, page):
        """The page's bytes, or None if it was never written."""
        kind, got = get(self.store, range(page, page + 1))
        return got if kind == CONTENT else None

    def all(self, pages=PAGES):
        return [self.read(page) for page in range(pages)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "disk"


@pytest.fixture
def quick_path():
    """In memory: what is only killed, and loses no power, needs no real disk."""
    with tempfile.TemporaryDirectory(prefix="edm-test-", dir="/dev/shm") as folder:
        yield Path(folder) / "disk"


def crash_and_resume(kept):
    """As after kill -9: the file is all that is left. A copy of it, as the lock is still held."""
    copy = os.path.realpath(f"/proc/self/fd/{kept.fd}") + ".crashed"
    size = os.fstat(kept.fd).st_size
    with open(copy, "wb") as to:
        to.truncate(size)
        for at, length in data(kept.fd, 0, size):
            os.pwrite(to.fileno(), os.pread(kept.fd, length, at), at)
    return Kept(copy, *kept.range)


def read_after_a_crash(kept, page):
    resumed = crash_and_resume(kept)
    try:
        return resumed.read(page)
    finally:
        resumed.close()


def failing(number):
    """A function that raises the OSError of this number, whatever it is called with."""

    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture
def small_files():
    """Call it with a number of bytes, and no file can have more. (Python ignores SIGXFSZ.)"""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---------------------------------------------------------------- pages come and go


@BOTH
def test_the_first_access_of_a_page_gives_new_and_is_noted(path, keep):
    store = open_store(str(path), START, END, keep)
    store.ask_get(range(7, 9))
    asked = store.ask_get(range(7, 9))
    assert locations(store, 6, 4) == bytes((NEW, NEW, NEW, NEW))
    assert store.take_get(asked)[:2] == (NEW_PAGES, 2)
    assert locations(store, 6, 4) == bytes((NEW, INSTANCE, INSTANCE, NEW))


@BOTH
def test_what_was_put_is_in_the_file_and_comes_back(path, keep):
    store = open_store(str(path), START, END, keep)
    put(store, 7, 84, (7, content(1, 2)), (90, content(2)))
    assert locations(store, 7, 2) == bytes((DISK, DISK))
    assert all(page in path.read_bytes() for page in (part(content(1, 2), 1), content(2)))
    assert get(store, range(7, 9)) == (CONTENT, content(1, 2))
    assert get(store, range(90, 91)) == (CONTENT, content(2))


def test_a_page_alone_comes_with_its_bytes_or_is_left_to_get(path, monkeypatch):
    store = open_store(str(path), START, END)
    put(store, 7, 84, (7, content(1, 2)), (90, content(2)))
    for page, bytes_of_it in ((8, part(content(1, 2), 1)), (90, content(2))):
        assert ctypes.string_at(store.take_page(page), PAGE_SIZE) == bytes_of_it
    assert locations(store, 7, 2) == bytes((DISK, INSTANCE | DISK))
    assert store.take_page(9) == 0 and locations(store, 9, 1) == bytes((NEW,)), "it has no bytes"
    with pytest.raises(OSError), monkeypatch.context() as broken:
        broken.setattr(os, "preadv", failing(errno.EIO))
        store.take_page(7)
    os.truncate(path, 0)
    assert store.take_page(7) == 0, "the file has no such bytes"
    assert locations(store, 7, 1) == bytes((DISK,))


def test_a_disk_that_is_not_kept_has_a_pages_bytes_at_its_own_place_and_nothing_else(path):
    store = open_store(str(path), START, END)
    header = path.read_bytes()[:TABLE]
    assert path.stat().st_size == TABLE + PAGES * PAGE_SIZE
    write(store, 5, content(1, 2))
    rest = bytes((PAGES - 7) * PAGE_SIZE)
    assert path.read_bytes() == header + bytes(5 * PAGE_SIZE) + content(1, 2) + rest


@BOTH
def test_one_put_carries_clean_and_dirty_pages_and_only_the_dirty_ones_are_written(path, keep):
    store = open_store(str(path), START, END, keep)
    first, at_3, at_204 = content(1, 100), content(2, 2), content(3, 2)
    write(store, 0, first)
    assert get(store, range(101)) == (CONTENT, first)
    assert get(store, range(200, 210)) == (NEW_PAGES, 10)
    put(store, 0, 206, (3, at_3), (204, at_204))
    assert locations(store, 0, 207) == bytes(
        [DISK] * 100 + [NEW] * 100 + [NEW] * 4 + [DISK] * 2 + [INSTANCE]
    )
    assert get(store, range(3)) == (CONTENT, part(first, 0, 3))
    assert get(store, range(3, 5)) == (CONTENT, at_3)
    assert get(store, range(5, 100)) == (CONTENT, part(first, 5, 95))
    assert get(store, range(6)) in (
        (CONTENT, part(first, 0, 3) + at_3 + part(first, 5)),
        (CONTENT, part(first, 0, 3)),  # those after it are in their other places
    )
    assert get(store, range(204, 206)) == (CONTENT, at_204)


@BOTH
def test_what_is_stored_to_stay_is_on_the_disk_and_in_the_instance(path, keep):
    store = open_store(str(path), START, END, keep)
    assert get(store, range(7, 10)) == (NEW_PAGES, 3)
    put(store, 7, 3, (7, content(1, 2)), stay=True)
    assert locations(store, 7, 3) == bytes((INSTANCE | DISK, INSTANCE | DISK, INSTANCE))
    put(store, 7, 3)
    assert locations(store, 7, 3) == bytes((DISK, DISK, NEW))
    assert get(store, range(7, 9)) == (CONTENT, content(1, 2))


@BOTH
def test_a_get_is_for_the_first_pages_that_are_in_the_same_place(path, keep):
    store = open_store(str(path), START, END, keep)
    write(store, 2, content(1, 2))
    for _ in range(2):  # whether they are in the instance
        assert get(store, range(8)) == (NEW_PAGES, 2)
        assert get(store, range(2, 8)) == (CONTENT, content(1, 2))
        assert get(store, range(3, 8)) == (CONTENT, part(content(1, 2), 1))
    assert get(store, range(4, 8)) == (NEW_PAGES, 4)


@BOTH
def test_a_get_of_every_so_maniest_page_gives_those(path, keep):
    store = open_store(str(path), START, END, keep)
    write(store, 0, content(1, 30))
    pages = b"".join(part(content(1, 30), page) for page in (3, 10, 17, 24))
    assert get(store, range(3, 45, 7)) == (CONTENT, pages)
    where = locations(store, 0, 40)
    assert [page for page in range(40) if where[page] == INSTANCE | DISK] == [3, 10, 17, 24]
    assert get(store, range(31, 73, 7)) == (NEW_PAGES, 6)


@BOTH
def test_what_was_given_is_given_again_and_is_the_instances_until_it_is_put(path, keep):
    store = open_store(str(path), START, END, keep)
    write(store, 0, content(1, 4))
    for _ in range(2):
        assert get(store, range(4)) == (CONTENT, content(1, 4))
        assert get(store, range(4, 8)) == (NEW_PAGES, 4)
        store.ask_get(range(8))
    assert locations(store, 0, 8) == bytes([INSTANCE | DISK] * 4 + [INSTANCE] * 4)
    put(store, 3, 2)
    assert locations(store, 0, 8) == bytes([INSTANCE | DISK] * 3 + [DISK, NEW] + [INSTANCE] * 3)


@BOTH
def test_a_put_that_is_refused_midway_tells_the_errno_and_moves_no_page(path, keep, small_files):
    store = open_store(str(path), START, END, keep)
    write(store, 0, content(1, 20))
    put(store, 180, 20, (180, content(3, 2)), (190, content(4, 10)))
    store.sync()
    store.free(190, 10)
    for pages in (range(10), range(190, 202)):
        get(store, pages)
    before = locations(store, 0, PAGES)
    dirty = (5, content(2, 2)), (190, content(5, 10)), (200, content(6, 2))
    small_files(store._place(194, SECOND if keep else FIRST) + 100)  # one write is a short one
    with pytest.raises(OSError, match="File too large") as refused:
        put(store, 0, 202, *dirty)
    assert refused.value.errno == errno.EFBIG
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert locations(store, 0, PAGES) == before
    assert get(store, range(5)) == (CONTENT, part(content(1, 20), 0, 5))
    assert get(store, range(180, 182)) == (CONTENT, content(3, 2))
    if keep:
        with pytest.raises(OSError, match="pages could not be written"):
            store.sync()
    put(store, 0, 202, *dirty)
    for page, whole in dirty:
        assert get(store, range(page, page + len(whole) // PAGE_SIZE)) == (CONTENT, whole)
    store.sync()


def test_only_a_disk_without_checksums_takes_pages_from_a_pipe(path):
    assert not open_store(str(path), START, END, keep=True).takes_pipes


@pytest.mark.parametrize("fits", [10.0, 4.0, 4.5, 0.0], ids="pages {}".format)
def test_what_is_in_a_pipe_is_written_or_is_there_to_be_put(path, small_files, fits):
    store = open_store(str(path), START, END)
    assert store.takes_pipes
    write(store, 20, content(1, 10))
    get(store, range(20, 30))
    out, into = os.pipe()
    os.write(into, content(2, 10))
    bytes_of = memoryview(bytearray(10 * PAGE_SIZE))
    small_files(store._place(20, FIRST) + int(fits * PAGE_SIZE))
    taken = store.put_from_pipe(out, 20, bytes_of)
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    os.close(into)
    assert os.read(out, 1) == b"", "nothing is left in the pipe"
    os.close(out)
    assert taken == (fits == 10)
    if taken:
        assert locations(store, 20, 10) == bytes((DISK,)) * 10
    else:
        assert bytes_of == content(2, 10)
        put(store, 20, 10, (20, bytes_of))
    assert get(store, range(20, 30)) == (CONTENT, content(2, 10))
    assert locations(store, 20, 10) == bytes((INSTANCE | DISK,)) * 10


@BOTH
def test_a_put_that_a_full_file_system_refuses_moves_no_page_and_others_go_on(
    small_file_system, keep
):
    store = open_store(str(small_file_system / "disk"), START, START + 3000 * PAGE_SIZE, keep)
    for page in range(0, 3000, 150):
        get(store, range(page, page + 150))
        try:
            put(store, page, 150, (page, content(page, 20)), (page + 20, content(page, 130)))
        except OSError as error:
            assert error.errno == errno.ENOSPC
            break
    else:
        pytest.fail("there was room for more than there is")
    assert 600 <= page
    assert all(byte & INSTANCE for byte in locations(store, page, 150))
    if keep:
        with pytest.raises(OSError, match="pages could not be written"):
            store.sync()
    write(store, page, content(1, 20))
    assert get(store, range(page, page + 20)) == (CONTENT, content(1, 20))
    for full in range(0, page, 150):
        for at, count in ((full, 20), (full + 20, 130)):
            assert get(store, range(at, at + count))[1] == content(full, count)
    store.free(page + 20, 130)
    store.sync()
    store.close()


@BOTH
def test_a_page_that_the_file_system_can_not_read_is_told_and_its_neighbours_are_read(
    path, monkeypatch, keep
):
    store = open_store(str(path), START, END, keep)
    write(store, 0, content(1, 4))
    real = os.preadv

    def preadv(fd, into, at):
        bad = store._place(2, store.spt.read(2, 1)[0])
        if at <= bad < at + sum(map(len, into)):
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, into, at)

    monkeypatch.setattr(os, "preadv", preadv)
    for pages in (range(2, 3), range(2, 4)):
        with pytest.raises(OSError, match="Input/output") as told:
            get(store, pages)
        assert told.value.errno == errno.EIO
    for pages, given in (
        (range(4), (0, 1)),
        (range(3, 4), (3,)),
        (range(0, 4, 2), (0,)),
        (range(1, 4, 2), (1, 3)),
    ):
        assert get(store, pages) == (CONTENT, b"".join(part(content(1, 4), at) for at in given))
    had = INSTANCE | DISK
    assert locations(store, 0, 4) == bytes((had, had, DISK, had))


# ---------------------------------------------------------------- processes and threads


class Child:
    """A forked process that takes a step whenever the parent says so."""

    def __init__(self, *steps):
        self._go, self._done = os.pipe(), os.pipe()
        self.pid = os.fork()
        if not self.pid:
            status = 1
            try:
                for step in steps:
                    os.read(self._go[0], 1)
                    step()
                    os.write(self._done[1], b"x")
                status = 0
            finally:
                if status:
                    traceback.print_exc()
                os._exit(status)
        os.close(self._done[1])

    def begin(self):
        os.write(self._go[1], b"x")

    def is_busy(self):
        return not select.select([self._done[0]], [], [], 0)[0]

    def wait(self):
        assert os.read(self._done[0], 1) == b"x"

    def step(self):
        self.begin()
        self.wait()

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        if failure[0]:
            os.kill(self.pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        for fd in (*self._go, self._done[0]):
            os.close(fd)
        assert failure[0] or status == 0


def test_what_a_forked_process_puts_its_parent_gets_and_the_other_way_round():
    store = open_store(None, START, END)

    def find_what_the_parent_has_done():
        assert get(store, range(9, 10)) == (CONTENT, content(3))
        assert locations(store, 7, 3) == bytes((INSTANCE | DISK, NEW, INSTANCE | DISK))

    with Child(lambda: write(store, 7, content(1, 2)), find_what_the_parent_has_done) as child:
        child.step()
        assert get(store, range(7, 9)) == (CONTENT, content(1, 2))
        store.free(8, 1)
        write(store, 9, content(3))
        child.step()


def test_what_a_forked_process_puts_on_a_kept_disk_its_parent_gets_and_syncs(path):
    kept = Kept(path)
    kept.write(0, *range(50))
    kept.sync()

    def put_often():  # amid the syncs and frees of the parent
        for turn in range(200):
            page, whole = 100 + turn % 10 * 10, content(turn, 3)
            put(kept.store, page, 4, (page, part(whole, 0, 2)), (page + 3, part(whole, 2)))

    syncs = 0
    with Child(put_often) as child:
        child.begin()
        while child.is_busy():
            kept.free(syncs % 50, 1)
            kept.write(200 + syncs % 50, syncs)
            kept.sync()
            syncs += 1
        child.wait()
        kept.sync()
    resumed = crash_and_resume(kept)
    for store in (kept, resumed):
        for turn in range(190, 200):
            page, whole = 100 + turn % 10 * 10, content(turn, 3)
            expected = [part(whole, 0), part(whole, 1), None, part(whole, 2)]
            assert [store.read(page + at) for at in range(4)] == expected
    assert resumed.all() == kept.all() and syncs
    resumed.close()


def test_what_fails_in_a_forked_process_is_known_in_its_parent_and_the_other_way_round(path):
    kept = Kept(path)

    def put_fails(broken):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(os, broken, failing(errno.EIO))
            with pytest.raises(OSError, match="Input/output"):
                kept.write(7, 1)

    with Child(
        lambda: put_fails("pwrite"),
        lambda: kept.write(7, 2),
        lambda: put_fails("dup"),  # which no put calls: the sync has failed
    ) as child:
        child.step()
        with pytest.raises(OSError, match="pages could not be written"):
            kept.sync()
        child.step()
        kept.sync()
        assert read_after_a_crash(kept, 7) == content(2)
        with pytest.MonkeyPatch.context() as patched, pytest.raises(OSError, match="Input/output"):
            patched.setattr(os, "fsync", failing(errno.EIO))
            kept.sync()
        child.step()


def test_a_kept_disk_is_used_by_several_threads_at_once(path):
    kept = Kept(path, START, START + 1000 * PAGE_SIZE)
    stop, failed = threading.Event(), []

    def work(first):
        """With pages of its own."""
        dice, now = random.Random(first), {}
        try:
            while not stop.is_set():
                page = first + dice.randrange(40)
                seed = dice.randrange(1000)
                if dice.random() < 0.1:
                    kept.free(page, 1)
                    now.pop(page, None)
                elif dice.random() < 0.7:
                    kept.write(page, seed)
                    now[page] = seed
                into = memoryview(bytearray(PAGE_SIZE))
                kind, _ = kept.store.get(range(page, page + 1), into)
                assert kind == (CONTENT if page in now else NEW_PAGES)
                assert page not in now or into == content(now[page])
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 40, 80)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 0.5
    while time.monotonic() < until and not failed:
        kept.sync()
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed
    kept.sync()
    assert crash_and_resume(kept).all(120) == kept.all(120)


# ---------------------------------------------------------------- what it costs


def test_a_page_of_a_kept_disk_costs_at_most_eight_bytes_of_memory_and_an_unused_one_none(path):
    pages = (64 << 30) // PAGE_SIZE
    before = shared_memory()
    kept = Kept(path, START, START + pages * PAGE_SIZE)
    for page in range(0, 40000, 100):
        kept.write(pages // 2 + page, *[page] * 100)
    kept.sync()
    kept.free(pages // 2, 100)
    kept.sync()
    assert 1024 * (shared_memory() - before) <= 8 * 40000 + 64 * 1024
    kept.close()
    before = shared_memory()
    kept = Kept(path, START, START + pages * PAGE_SIZE)
    assert 1024 * (shared_memory() - before) <= 8 * 40000 + 64 * 1024
    assert kept.read(pages // 2 + 100) == content(100)


def test_a_sync_writes_only_the_blocks_of_the_table_that_have_changed(path, monkeypatch):
    kept = Kept(path, START, START + 11 * BLOCK_PAGES * PAGE_SIZE)
    for block in range(10):
        kept.write(block * BLOCK_PAGES, block)
    for _ in range(3):
        kept.sync()
    written = []
    real = os.pwrite

    def pwrite(fd, what, at):
        if TABLE <= at < kept.store._place(0, FIRST):
            written.append((at - TABLE) // BLOCK_SIZE)
        return real(fd, what, at)

    def blocks(action):
        written.clear()
        action()
        kept.sync()
        copy = {number // 11 for number in written}
        assert len(copy) <= 1
        return sorted(number % 11 for number in written)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert blocks(lambda: None) == []
    assert blocks(lambda: kept.write(3 * BLOCK_PAGES - 1, 1, 2)) == [2, 3]
    assert blocks(lambda: kept.free(7 * BLOCK_PAGES, 1)) == [2, 3, 7]  # the other copy too
    assert blocks(lambda: None) == [7]
    get(kept.store, range(10 * BLOCK_PAGES, 10 * BLOCK_PAGES + 1))
    assert blocks(lambda: kept.free(10 * BLOCK_PAGES, 1)) == []  # it was never written
    kept.write(5 * BLOCK_PAGES, 1)
    kept.sync()
    kept.close()
    kept = Kept(path, START, START + 11 * BLOCK_PAGES * PAGE_SIZE)
    assert blocks(lambda: kept.write(0, 1)) == [0, 5]  # what the last job had not written twice
    assert blocks(lambda: None) == [0, 5] and blocks(lambda: None) == []


@pytest.mark.undisturbed
def test_a_sync_of_few_pages_in_a_large_space_takes_milliseconds(path, monkeypatch):
    pages = (64 << 30) // PAGE_SIZE
    kept = Kept(path, START, START + pages * PAGE_SIZE)
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # the file system's time is not ours
    took = []
    for page in range(pages // 20, pages, pages // 20):
        kept.write(page, page)
        began = time.monotonic()
        kept.sync()
        took.append(time.monotonic() - began)
    assert min(took) < 0.01 and sorted(took)[len(took) // 2] < 0.02, took


@pytest.mark.undisturbed
def test_a_huge_range_is_freed_and_looked_at_at_once_and_costs_no_memory():
    store = open_store(None, START, START + (256 << 30))
    pages = (256 << 30) // PAGE_SIZE
    before, began = shared_memory(), time.monotonic()
    store.free(0, pages)
    assert store.table().count("\n") == 2 and not list(store.runs_on_disk())
    assert locations(store, pages // 2, 100) == bytes(100)
    assert time.monotonic() - began < 0.05
    for page in (3, pages // 2, pages - 1):
        write(store, page, content(page))
    assert list(store.runs_on_disk()) == [(3, 1), (pages // 2, 1), (pages - 1, 1)]
    began = time.monotonic()
    store.free(0, pages - 1)
    assert time.monotonic() - began < 0.05
    assert list(store.runs_on_disk()) == [(pages - 1, 1)]
    assert get(store, range(pages - 1, pages)) == (CONTENT, content(pages - 1))
    assert os.fstat(store.fd).st_blocks * 512 <= 4 * PAGE_SIZE
    assert shared_memory() - before < 512
    store.close()


def test_the_spt_costs_no_memory_until_it_is_used():
    before, shared = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, shared_memory()
    spt = ByteTable(1 << 34)  # 64 TiB
    spt.set(range(1 << 33, (1 << 33) + 100), DISK)
    assert spt.read(1 << 33, 4096) == bytes((DISK,)) * 100 + bytes(3996)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # KiB
    assert shared_memory() - shared < 64


def test_everything_that_a_store_opened_is_closed_and_for_no_program_that_it_starts(path):
    gc.collect()  # or what other tests have left is closed meanwhile
    before = set(os.listdir("/proc/self/fd"))
    for keep in (False, True):
        store = open_store(str(path) if keep else None, START, END, keep)
        opened = set(os.listdir("/proc/self/fd")) - before
        assert opened
        for fd in map(int, opened):
            try:
                assert not os.get_inheritable(fd)
            except OSError as error:  # the one that listed them
                assert error.errno == errno.EBADF
        store.close()
        assert set(os.listdir("/proc/self/fd")) == before


# ---------------------------------------------------------------- what it tells


def test_the_log_has_the_wikis_lines_in_the_wikis_order(caplog):
    caplog.set_level("DEBUG", "edm")
    store = open_store(None, START, END, instance=3)
    where = f"{START + 7 * PAGE_SIZE:#x}"

    def lines():
        said = [
            f"[{record.name.removeprefix('edm.')}] {record.message}" for record in caplog.records
        ]
        caplog.clear()
        return said

    def table(location):
        row = [f"address : {where}  location : {location}"] if location else []
        return ["DMS- Print SPT STATE", "-----START SPT ----", *row, "------END SPT-----"]

    def spt(location):
        return ["[DMS] SPT updated. Current state: ", "[edm] " + "\n".join(table(location))]

    for said in (
        "page accessed first time, set info - new_page",
        f"read page address: {where} from disk",
    ):
        get(store, range(7, 8))
        assert lines() == [
            f"[DMS] get request to send content of page in address: {where}",
            f"[DMS] {said}",
            *spt("INSTANCE_3"),
            f"[DMS] page in address: {where} sent to app",
        ]
        write(store, 7, content(1))
        assert lines() == [
            f"[DMS] Handle page eviction in address {where}",
            f"[DMS] page in address {where} stored in disk",
            "[DMS] Page evicted successfully, sending ack",
            *spt("DISK"),
        ]
    store.free(7, 1)
    assert lines() == spt("")


def test_the_spt_is_printed_as_the_wiki_prints_it():
    store = open_store(None, 0x1D4A000, 0x1D4A000 + PAGES * PAGE_SIZE)
    get(store, range(2, 3))
    write(store, 4, content(1))
    assert store.table() == (
        "DMS- Print SPT STATE\n"
        "-----START SPT ----\n"
        "address : 0x1d4c000  location : INSTANCE_0\n"
        "address : 0x1d4e000  location : DISK\n"
        "------END SPT-----"
    )


# ---------------------------------------------------------------- one job


def test_a_disk_without_a_path_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    store = open_store(None, START, END)
    write(store, 9, content(1))
    assert get(store, range(9, 10)) == (CONTENT, content(1))
    assert list(tmp_path.iterdir()) == []
    store.close()


@pytest.mark.parametrize("variable", ["", "/nowhere"])
def test_a_disk_without_a_path_is_in_tmpdir_or_where_others_have_temporary_files(
    tmp_path, monkeypatch, variable
):
    monkeypatch.setenv("TMPDIR", variable or str(tmp_path))
    store = open_store(None, START, END)
    folder = os.path.dirname(os.readlink(f"/proc/self/fd/{store.fd}"))
    assert folder == ("/var/tmp" if variable else str(tmp_path))
    store.close()


@BOTH
def test_the_disk_file_is_for_its_owner_only(path, keep):
    path.touch(0o666)
    open_store(str(path), START, END, keep).close()
    assert path.stat().st_mode & 0o777 == 0o600


@BOTH
def test_freed_pages_give_their_blocks_back(path, keep):
    store = open_store(str(path) if keep else None, START, END, keep)
    write(store, 0, content(1, 200))
    if keep:
        store.sync()
    full = os.fstat(store.fd).st_blocks
    store.free(0, 190)
    if keep:
        store.sync()
    assert os.fstat(store.fd).st_blocks < full / 5
    assert get(store, range(190, 200)) == (CONTENT, part(content(1, 200), 190, 10))


@BOTH
def test_a_file_system_that_punches_no_holes_does_not_keep_pages_from_being_freed(
    path, keep, monkeypatch
):
    monkeypatch.setattr("edm.page_store.punch_hole", failing(errno.EOPNOTSUPP))
    store = open_store(str(path), START, END, keep)
    write(store, 0, content(1, 2))
    store.sync()
    store.free(0, 1)
    store.sync()
    assert get(store, range(2)) == (NEW_PAGES, 1)
    assert get(store, range(1, 2)) == (CONTENT, part(content(1, 2), 1))
    write(store, 0, content(2))
    assert get(store, range(1)) == (CONTENT, content(2))


# ---------------------------------------------------------------- the next job


def test_what_was_synced_is_there_when_the_disk_is_opened_again(path):
    kept = Kept(path)
    kept.write(5, 1, 2, 3)
    kept.write(6, 4)
    kept.free(7, 1)
    kept.sync()
    before = kept.all()
    assert before[5:8] == [content(1), content(4), None]
    kept.close()
    again = Kept(path)
    assert list(again.store.runs_on_disk()) == [(5, 2)]
    assert locations(again.store, 4, 4) == bytes((NEW, DISK, DISK, NEW))
    assert again.all() == before


def test_a_crash_goes_back_to_the_last_sync_whatever_was_written_since(path):
    kept = Kept(path)
    kept.write(0, *range(20))
    kept.free(3, 2)
    kept.sync()
    before = kept.all()
    kept.write(0, 100, 101, 102, 103)
    kept.write(1, 110)  # a second time since the sync
    kept.free(8, 4)
    kept.write(9, 120)
    kept.write(40, 130)
    again = crash_and_resume(kept)
    assert again.all() == before
    # And what the crashed job had begun does not come to life with the next sync.
    again.write(50, 140)
    again.sync()
    before[50] = content(140)
    assert again.all() == before
    again.close()


def test_a_crash_before_any_sync_leaves_an_empty_disk(path):
    kept = Kept(path)
    kept.write(0, 1, 2)
    assert crash_and_resume(kept).all() == [None] * PAGES


def test_any_sequence_of_writes_frees_syncs_and_crashes_gives_what_the_last_sync_had(quick_path):
    for seed in range(30):
        dice, kept = random.Random(seed), Kept(f"{quick_path}{seed}")
        now, synced = [None] * 50, [None] * 50
        for _ in range(60):
            page, count = dice.randrange(40), dice.randint(1, 10)
            action = dice.choice(["write", "write", "write", "free", "sync", "crash"])
            if action == "write":
                seeds = [dice.random() for _ in range(count)]
                kept.write(page, *seeds)
                now[page : page + count] = map(content, seeds)
            elif action == "free":
                kept.free(page, count)
                now[page : page + count] = [None] * count
            elif action == "sync":
                kept.sync()
                synced = now.copy()
            else:
                crashed = kept
                kept, now = crash_and_resume(kept), synced.copy()
                crashed.close()
            assert kept.all(50) == now
        assert locations(kept.store, 50, PAGES - 50) == bytes(PAGES - 50)
        kept.close()


def test_whatever_bit_of_a_header_is_flipped_the_other_copy_is_taken_and_nothing_is_lost(
    quick_path, caplog
):
    kept = Kept(quick_path, START, START + 8 * PAGE_SIZE)
    for seed in range(3):
        kept.write(0, seed)
        kept.sync()
    kept.close()
    header = quick_path.read_bytes()[: HEADER.size + CRC]
    for copy in (0, HEADER_COPY):
        for bit in range(8 * len(header)):
            flipped = bytearray(header)
            flipped[bit // 8] ^= 1 << bit % 8
            with quick_path.open("r+b") as file:
                file.seek(copy)
                file.write(flipped)
            caplog.clear()
            again = Kept(quick_path, START, START + 8 * PAGE_SIZE)
            assert again.read(0) == content(2)
            assert "one of the two copies of its header is damaged" in caplog.text
            again.close()
            whole = quick_path.read_bytes()
            assert whole.startswith(header) and whole.startswith(header, HEADER_COPY)


@pytest.mark.parametrize("copy", [0, HEADER_COPY])
@pytest.mark.parametrize("then", ["nothing", "refused", "killed"])
def test_one_damaged_header_of_several_disks_is_no_loss_whatever_became_of_the_next_sync(
    path, copy, then
):
    def begin():
        stores = [open_store(f"{path}{n}", START, END, True, 0, (n, 2)) for n in range(2)]
        epoch = min(set.intersection(*(set(store.offers) for store in stores)))
        for store in stores:
            store.start(epoch)
        return stores

    stores, expected = begin(), 2
    for seed in range(3):
        for store in stores:
            write(store, 0, content(seed))
        for phase in range(2):
            for store in stores:
                store.sync([phase])
    if then == "refused":  # by the other disk
        write(stores[0], 0, content(4))
        stores[0].sync([0])
        write(stores[0], 0, content(5))  # over what was prepared
    if then == "killed":  # when the other disk had committed
        expected = 6
        for store in stores:
            write(store, 0, content(expected))
            store.sync([0])
        stores[1].sync([1])
    for store in stores:
        store.close()
    with open(f"{path}0", "r+b") as file:
        file.seek(copy)
        file.write(b"EDM disk, damaged")
    for store in begin():
        assert get(store, range(1)) == (CONTENT, content(expected))
        store.close()


def make_unreadable(monkeypatch, place):
    """From now on, reading from this place of a file fails."""
    real = os.pread

    def pread(fd, length, at):
        if at == place:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, length, at)

    monkeypatch.setattr(os, "pread", pread)


@pytest.mark.parametrize("copy", [0, HEADER_COPY])
def test_a_header_that_can_not_be_read_leaves_the_other_copy(path, monkeypatch, copy):
    made(path)
    make_unreadable(monkeypatch, copy)
    kept = Kept(path)
    assert kept.read(0) == content(1)
    kept.close()


def test_a_block_of_the_table_that_can_not_be_read_costs_its_own_pages_only(path, monkeypatch):
    end = START + 3 * BLOCK_PAGES * PAGE_SIZE
    kept = Kept(path, START, end)
    for page in (0, BLOCK_PAGES):
        kept.write(page, page)
    kept.sync()
    kept.close()
    make_unreadable(monkeypatch, kept.store._block_place(1, 1))
    kept = Kept(path, START, end)
    assert kept.read(0) == content(0)
    with pytest.raises(OSError, match="the checksum is wrong"):
        kept.read(BLOCK_PAGES)
    kept.close()


def test_a_header_that_was_torn_by_a_crash_in_the_sync_leaves_the_other_copy(path, monkeypatch):
    kept = Kept(path)
    kept.write(0, 1)
    kept.sync()
    kept.write(0, 2)
    real = os.pwrite
    written = []

    def torn(fd, content, at):
        if at < TABLE:
            written.append(at)
            real(fd, content[:20], at)
            raise KeyboardInterrupt
        return real(fd, content, at)

    with monkeypatch.context() as crash:
        crash.setattr(os, "pwrite", torn)
        with pytest.raises(KeyboardInterrupt):
            kept.sync()
    assert written and crash_and_resume(kept).read(0) == content(1)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize(
    "fails", ["the second header", "the first fsync", "the first header", "the second fsync"]
)
def test_after_a_sync_that_failed_none_succeeds_and_nothing_is_written_over_what_was_there(
    path, monkeypatch, fails, number
):
    kept = Kept(path)
    kept.write(0, 1)
    kept.sync()
    kept.write(0, 2)
    real_fsync, real_pwrite, syncs = os.fsync, os.pwrite, []

    def fsync(fd):
        syncs.append(fd)
        if fails == ("the first fsync", "the second fsync")[len(syncs) - 1]:
            failing(number)()
        real_fsync(fd)

    def pwrite(fd, content, at):
        if at < TABLE and fails == ("the second header" if at else "the first header"):
            failing(number)()
        return real_pwrite(fd, content, at)

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fsync)
        broken.setattr(os, "pwrite", pwrite)
        with pytest.raises(OSError, match=os.strerror(number)):
            kept.sync()
    for action in (lambda: kept.write(0, 3), lambda: kept.write(1, 3), kept.sync):
        with pytest.raises(OSError, match=os.strerror(number)):
            action()
    kept.free(0, 1)  # in memory only
    assert kept.read(0) is None
    kept.close()
    assert Kept(path).read(0) == content(2 if fails == "the second fsync" else 1)


@pytest.mark.parametrize("epoch", [2, 3])
def test_a_block_of_the_table_that_has_become_zeros_is_damaged_and_not_new(path, epoch):
    kept = Kept(path, START, START + 2 * BLOCK_PAGES * PAGE_SIZE)
    kept.write(0, 1)
    kept.write(BLOCK_PAGES, 2)
    for _ in range(epoch):
        kept.sync()
    os.pwrite(kept.fd, bytes(BLOCK_SIZE), kept.store._block_place(epoch % 2, 0))
    kept.close()
    again = Kept(path, START, START + 2 * BLOCK_PAGES * PAGE_SIZE)
    with pytest.raises(OSError, match="the checksum is wrong"):
        again.read(0)
    assert again.read(BLOCK_PAGES) == content(2)
    again.write(0, 3)
    again.sync()
    again.close()
    assert Kept(path, START, START + 2 * BLOCK_PAGES * PAGE_SIZE).read(0) == content(3)


def test_a_block_that_was_damaged_and_written_again_and_becomes_zeros_is_not_new_either(path):
    kept = Kept(path, START, START + 2 * BLOCK_PAGES * PAGE_SIZE)
    kept.write(0, 1, 2)
    kept.sync()
    os.pwrite(kept.fd, b"damage", block_at(kept, 0) + 2)
    kept.close()
    kept = Kept(path, *kept.range)
    kept.write(0, 3)
    for _ in range(2):
        kept.sync()
    assert kept.read(0) == read_after_a_crash(kept, 0) == content(3)
    os.pwrite(kept.fd, bytes(BLOCK_SIZE), block_at(kept, 0))
    for page in (0, 1):
        with pytest.raises(OSError, match="the checksum is wrong"):
            read_after_a_crash(kept, page)


def test_a_disk_whose_sync_another_dms_has_refused_goes_on_and_can_be_synced_later(path):
    kept = Kept(path)
    prepare, commit = (functools.partial(kept.sync, [phase]) for phase in SYNC_PHASES)
    with pytest.raises(OSError, match="no sync to commit"):
        commit()
    kept.write(0, 1)
    kept.sync()
    for seed in (2, 3, 4):  # of which some are written over what was prepared
        kept.write(0, seed)
        prepare()
        assert read_after_a_crash(kept, 0) == content(1)
    kept.write(0, 5)
    kept.free(1, 1)
    assert read_after_a_crash(kept, 0) == content(1)
    kept.sync()
    with pytest.raises(OSError, match="no sync to commit"):
        commit()
    kept.write(0, 6)
    assert read_after_a_crash(kept, 0) == content(5)
    kept.close()
    assert Kept(path).read(0) == content(5)


def test_a_full_disk_that_is_not_kept_can_be_synced_and_freeing_makes_room(
    small_file_system, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(small_file_system))
    store, page = open_store(None, START, START + 3000 * PAGE_SIZE), 0
    with pytest.raises(OSError, match="No space left"):
        for page in range(3000):
            write(store, page, content(page))
    store.sync()
    store.free(0, 10)
    write(store, page, content(page))
    assert get(store, range(page - 1, page + 1))[1] == content(page - 1) + content(page)
    store.close()


@pytest.mark.parametrize("then", [4, None], ids=["written", "freed"])
@pytest.mark.parametrize("synced", [False, True], ids=["new", "synced"])
def test_a_page_that_was_torn_keeps_a_sync_from_returning_until_it_is_written_or_freed(
    path, monkeypatch, synced, then
):
    kept = Kept(path)
    kept.write(5, 1, 2)
    if synced:
        kept.sync()
    real = os.pwrite

    def half(fd, content, at):
        if at >= kept.store._place(0, FIRST) and len(content) < PAGE_SIZE:
            raise OSError(5, "Input/output error")
        return real(fd, content[: len(content) // 2], at)

    with monkeypatch.context() as broken, pytest.raises(OSError, match="Input/output"):
        broken.setattr(os, "pwrite", half)
        kept.write(5, 3)
    for _ in range(2):
        with pytest.raises(OSError, match="pages could not be written"):
            kept.sync()
    if then:
        kept.write(5, then)
    else:
        kept.free(5, 1)
    kept.sync()
    assert crash_and_resume(kept).all()[5:7] == [then and content(then), content(2)]


def test_freeing_writes_nothing_and_can_not_be_refused(path, monkeypatch):
    kept = Kept(path)
    kept.write(3, 1)
    kept.sync()
    with monkeypatch.context() as broken:
        for call in ("pwrite", "fsync", "posix_fallocate"):
            broken.setattr(os, call, failing(errno.EIO))
        broken.setattr("edm.page_store.punch_hole", failing(errno.EIO))
        kept.free(3, 1)
    assert kept.read(3) is None and read_after_a_crash(kept, 3) == content(1)
    kept.sync()
    assert read_after_a_crash(kept, 3) is None


def test_what_a_resumed_job_goes_on_from_is_durable_before_anything_is_written(path, monkeypatch):
    made(path)
    with path.open("r+b") as file:
        file.seek(HEADER_COPY)
        file.write(bytes(50))
    calls = []
    real_fsync, real_pwrite = os.fsync, os.pwrite
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), real_fsync(fd)))
    monkeypatch.setattr(
        os, "pwrite", lambda fd, what, at: (calls.append(at), real_pwrite(fd, what, at))[1]
    )
    for _ in range(
        2
    ):  # also if both are the same: the first may be a killed job's, and not durable
        calls.clear()
        Kept(path).close()
        assert calls == [0, "fsync", HEADER_COPY, "fsync", "fsync"]  # the last one of its folder


def test_a_kept_disk_gives_blocks_that_no_sync_needs_back_at_once(path):
    kept = Kept(path)
    kept.write(0, *range(100))
    kept.sync()
    synced = kept.all()
    blocks = path.stat().st_blocks
    for _ in range(50):
        kept.write(100, *range(100))
        kept.write(0, *range(200, 210))
        kept.free(100, 100)
        kept.free(0, 10)
        kept.free(0, 300)
    assert path.stat().st_blocks < blocks + 40
    assert crash_and_resume(kept).all() == synced


HISTORIES = {  # of a page: how often it was written and synced, and what came since
    "never written": (0, "sync"),
    "written once": (1, "sync"),
    "written twice": (2, "sync"),
    "written since": (2, "write"),
    "freed": (1, "free, sync"),
    "freed since": (2, "free"),
    "freed, and written since": (1, "free, sync, write"),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of the table for three pages each, of two sectors."""
    monkeypatch.setattr("edm.page_store.BLOCK_PAGES", 3)
    monkeypatch.setattr("edm.page_store.BLOCK", Struct("<IQ3s12s993x"))
    monkeypatch.setattr("edm.page_store.BLOCK_SIZE", 1024)
    return 1024


def block_at(kept, page, current=True):
    """Where the page's block is, in the copy of the table that the header names, or in the other."""
    with open(f"/proc/self/fd/{kept.fd}", "rb") as file:
        epoch = HEADER.unpack(file.read(HEADER.size))[-1]
    return kept.store._block_place((epoch + (not current)) % 2, page // page_store.BLOCK_PAGES)


DAMAGED = "the checksum is wrong"


@pytest.mark.parametrize(("times", "since"), HISTORIES.values(), ids=HISTORIES.keys())
def test_whatever_bit_of_a_pages_block_in_the_table_is_flipped_no_other_bytes_are_read(
    quick_path, small_blocks, times, since
):
    kept = Kept(quick_path, START, START + 8 * PAGE_SIZE)
    kept.write(2, 1)
    kept.write(4, 2)
    kept.write(6, 3)
    for seed in range(times):
        kept.write(5, seed)
        kept.sync()
    for action in since.split(", "):
        if action == "write":
            kept.write(5, 30)
        elif action == "free":
            kept.free(5, 1)
        else:
            kept.sync()
    at = block_at(kept, 5)
    block = os.pread(kept.fd, small_blocks, at)
    dice = random.Random(1)
    used = [*range(31), *range(small_blocks - CRC, small_blocks), dice.randrange(31, small_blocks)]
    for byte in used:  # and one of those that are always 0
        for bit in range(8):
            flipped = bytearray(block)
            flipped[byte] ^= 1 << bit
            os.pwrite(kept.fd, flipped, at)
            resumed = crash_and_resume(kept)
            for page in (3, 4, 5):
                with pytest.raises(OSError, match=DAMAGED):
                    resumed.read(page)
            assert (resumed.read(2), resumed.read(6)) == (content(1), content(3))
            resumed.close()


def test_damage_in_the_copy_of_the_table_that_is_not_current_is_no_loss(path, small_blocks):
    kept = Kept(path, START, START + 8 * PAGE_SIZE)
    for seed in range(4):
        kept.write(4, seed)
        kept.sync()
    for _ in range(2):
        kept.sync()  # both copies say the same, and no block needs to be written
    at = block_at(kept, 4, current=False)
    os.pwrite(kept.fd, b"damage", at + 2)
    kept.close()
    kept = Kept(path, START, START + 8 * PAGE_SIZE)
    assert kept.read(4) == content(3)
    kept.sync()
    assert read_after_a_crash(kept, 4) == content(3)


def test_a_block_of_another_page_or_of_a_sync_that_never_was_is_damaged(path, small_blocks):
    kept = Kept(path, START, START + 8 * PAGE_SIZE)
    kept.write(0, 1, 2, 3, 4)
    kept.sync()
    at, first = block_at(kept, 3), block_at(kept, 0)
    block = os.pread(kept.fd, small_blocks, at)
    os.pwrite(kept.fd, os.pread(kept.fd, small_blocks, first), at)
    with pytest.raises(OSError, match=DAMAGED):
        read_after_a_crash(kept, 3)
    number, epoch, *rest = page_store.BLOCK.unpack(block[:-CRC])
    later = page_store.BLOCK.pack(number, epoch + 1, *rest)
    os.pwrite(kept.fd, later + zlib.crc32(later).to_bytes(CRC, "little"), at)
    with pytest.raises(OSError, match=DAMAGED):
        read_after_a_crash(kept, 3)
    os.pwrite(kept.fd, block, at)
    assert read_after_a_crash(kept, 3) == content(4)


def test_a_sync_that_was_killed_does_not_come_to_life_when_the_block_that_counts_is_damaged(
    path, small_blocks, monkeypatch
):
    kept = Kept(path)
    kept.write(4, 1)
    for _ in range(3):
        kept.sync()
    kept.write(4, 2)
    real = os.pwrite

    def pwrite(fd, what, at):
        if at < TABLE:
            raise KeyboardInterrupt
        return real(fd, what, at)

    with monkeypatch.context() as killing, pytest.raises(KeyboardInterrupt):
        killing.setattr(os, "pwrite", pwrite)
        kept.sync()
    os.pwrite(kept.fd, b"damage", block_at(kept, 4) + 2)
    kept.close()
    kept = Kept(path)
    for page in range(20, 24):
        kept.write(page, page)
        kept.sync()
        with pytest.raises(OSError, match=DAMAGED):
            read_after_a_crash(kept, 4)


@pytest.mark.parametrize("then", ["write", "free"])
def test_a_page_whose_block_in_the_table_is_damaged_is_whole_again_when_it_is_written_or_freed(
    path, small_blocks, then
):
    kept = Kept(path)
    for seed in (1, 2):
        kept.write(3, *range(seed, seed + 40, 10))
        kept.sync()
    os.pwrite(kept.fd, b"damage", block_at(kept, 5) + 2)
    with pytest.raises(OSError, match=DAMAGED):
        read_after_a_crash(kept, 5)
    kept.close()
    kept = Kept(path)
    assert list(kept.store.runs_on_disk()) == [(3, 4)]
    for page in (3, 4, 5):
        with pytest.raises(OSError, match=DAMAGED):
            kept.read(page)
    if then == "write":
        kept.write(5, 3)
    else:
        kept.free(5, 1)
    with pytest.raises(OSError, match=DAMAGED):  # a crash goes back to it, not to what was before
        read_after_a_crash(kept, 5)
    kept.sync()
    expected = content(3) if then == "write" else None
    assert kept.read(5) == read_after_a_crash(kept, 5) == expected
    assert read_after_a_crash(kept, 6) == content(32)
    for _ in range(2):
        with pytest.raises(OSError, match=DAMAGED):  # as it was, whichever copy says it
            read_after_a_crash(kept, 4)
        kept.sync()
    if then == "free":
        kept.write(5, 4)
        kept.sync()
        assert read_after_a_crash(kept, 5) == content(4)


def test_what_was_freed_is_gone_even_if_the_job_is_killed_in_the_sync_and_leaves_its_room(
    small_file_system, monkeypatch
):
    path, end = small_file_system / "disk", START + 2000 * PAGE_SIZE
    kept = Kept(path, START, end)
    for page in range(0, 800, 100):
        kept.write(page, *range(page, page + 100))
    kept.sync()
    kept.free(0, 800)

    class Killed(Exception):
        pass

    def punch_hole(*where):
        raise Killed

    with monkeypatch.context() as killing:
        killing.setattr("edm.page_store.punch_hole", punch_hole)
        with pytest.raises(Killed):
            kept.sync()
    kept.close()
    resumed = Kept(path, START, end)
    assert resumed.all() == [None] * PAGES
    for page in range(1000, 1800, 100):
        resumed.write(page, *range(page, page + 100))
    resumed.sync()
    assert [resumed.read(page) for page in (1000, 1799)] == [content(1000), content(1799)]


def test_on_a_full_file_system_what_no_sync_needs_makes_room_for_what_is_new(small_file_system):
    pages = 2000
    kept = Kept(small_file_system / "disk", START, START + pages * PAGE_SIZE)
    for round_ in (0, 1000):  # so that half of the blocks are of versions before the last
        for page in range(0, 400, 100):
            kept.write(page, *range(round_ + page, round_ + page + 100))
        kept.sync()
    for page in range(500, 800, 100):
        kept.write(page, *range(page, page + 100))
    kept.write(0, *range(2000, 2050))
    assert [kept.read(page) for page in range(400)] == [
        content(2000 + page if page < 50 else 1000 + page) for page in range(400)
    ]
    assert [kept.read(page) for page in range(500, 800)] == [content(p) for p in range(500, 800)]
    with pytest.raises(OSError, match="No space left"):
        for page in range(800, 2000, 100):
            kept.write(page, *range(page, page + 100))
    page -= 100
    assert kept.read(page) == content(page)  # the last one that fitted
    with pytest.raises(OSError, match="could not be written"):
        kept.sync()
    kept.close()
    resumed = Kept(small_file_system / "disk", START, START + pages * PAGE_SIZE)
    assert [resumed.read(page) for page in range(400)] == [content(1000 + p) for p in range(400)]
    assert {resumed.read(page) for page in range(400, 2000)} == {None}
    resumed.close()


def test_what_was_put_on_a_file_system_that_is_full_now_can_be_synced(small_file_system):
    end = START + 2000 * BLOCK_PAGES * PAGE_SIZE  # each page in a block of its own
    kept = Kept(small_file_system / "disk", START, end)
    for number in range(2000):
        try:
            kept.write(number * BLOCK_PAGES, number)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            break
    else:
        pytest.fail("there was room for more than there is")
    kept.free((number - 1) * BLOCK_PAGES, BLOCK_PAGES + 1)
    kept.sync()
    kept.close()
    resumed = Kept(small_file_system / "disk", START, end)
    assert [page for page, _ in resumed.store.runs_on_disk()] == [
        at * BLOCK_PAGES for at in range(number - 1)
    ]
    assert resumed.read(7 * BLOCK_PAGES) == content(7)
    resumed.close()


def test_what_a_killed_job_wrote_after_its_last_sync_makes_room_for_what_is_new(small_file_system):
    end = START + 20 * PART * PAGE_SIZE
    killed = Kept(small_file_system / "disk", START, end)
    killed.write(0, 1)
    killed.sync()
    with pytest.raises(OSError, match="No space left"):
        for page in range(1, 2000):
            killed.write(page, page)
    killed.close()
    kept = Kept(small_file_system / "disk", START, end)
    for n in range(page - 20):
        kept.write(15 * PART + n, n)
    kept.sync()
    kept.close()
    resumed = Kept(small_file_system / "disk", START, end)
    assert resumed.read(0) == content(1) and resumed.read(1) is None
    assert all(resumed.read(15 * PART + n) == content(n) for n in range(page - 20))
    resumed.close()


def test_a_new_disk_has_room_for_both_of_its_headers(path):
    Kept(path).close()
    whole = path.read_bytes()
    assert whole[:8] == whole[HEADER_COPY:][:8] == MAGIC


def test_a_new_disk_for_which_there_is_no_room_is_named(small_file_system):
    with open(small_file_system / "other", "wb") as other:
        os.posix_fallocate(other.fileno(), 0, 4 << 20)
    path = str(small_file_system / "disk")
    with pytest.raises(OSError, match=path) as caught:
        open_store(path, START, END)
    assert caught.value.errno == errno.ENOSPC


# ---------------------------------------------------------------- what is refused


def made(path, keep=True):
    store = open_store(str(path), START, END, keep)
    write(store, 0, content(1))
    store.sync()
    store.close()


def refused(path, match, start=START, end=END, keep=True):
    """Refused with these words, and left as it is."""
    before = path.read_bytes(), path.stat().st_mode
    with pytest.raises(ValueError, match=f"^disk: (the header of )?{path} {match}"):
        open_store(str(path), start, end, keep)
    assert (path.read_bytes(), path.stat().st_mode) == before


def other_than(*found):
    """The words for a disk with these numbers, where others are needed."""
    numbers = ", ".join(map(str, found))
    fields = ".*, start_addr, end_addr, bytes"
    words = f"is of another version, geometry or size: .{numbers}, .*, not .{FORMAT}, .*{fields}"
    return words + ".; take its settings, or remove it$"


GEOMETRY = FORMAT, 0, 1, STRIPE, PAGE_SIZE, START, END  # of what made() makes


@BOTH
def test_a_disk_in_use_is_refused(path, keep):
    store = open_store(str(path), START, END, keep)
    for other in (True, False):
        refused(path, "is in use by another job", keep=other)
    store.close()


@BOTH
@pytest.mark.parametrize("text", [b"x", b"my thesis\n" * 30000], ids=["short", "long"])
def test_a_file_that_is_no_disk_is_refused_and_left_as_it_is(path, text, keep):
    path.write_bytes(text)
    refused(path, "is not an EDM disk", keep=keep)


@BOTH
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_regular_file_is_refused_and_left_as_it_is(path, kind, keep):
    if kind == "fifo":
        os.mkfifo(path, 0o666)
    elif os.geteuid() == 0:
        try:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.stat("/dev/null").st_rdev)
        except PermissionError:
            pytest.skip("making a device needs CAP_MKNOD")
    else:
        pytest.skip("only root can make a device")
    before = path.stat()
    with pytest.raises((ValueError, OSError), match=f"{path}") as caught:
        open_store(str(path), START, END, keep)
    if kind == "fifo":
        assert caught.value.errno == errno.ESPIPE and caught.value.filename == str(path)
    else:
        assert str(caught.value) == f"disk: {path} is not an EDM disk; choose another path"
    assert path.stat().st_mode == before.st_mode


@BOTH
def test_a_kept_disk_of_another_version_of_the_format_is_refused_with_one_line(path, keep):
    for version in (3, 99):
        fields = HEADER.pack(MAGIC, version, 0, 1, 0, PAGE_SIZE, START, END, 7)
        header = fields + zlib.crc32(fields).to_bytes(CRC, "little")
        path.write_bytes(header.ljust(HEADER_COPY, b"\0") + header + bytes(1 << 20))
        refused(path, other_than(version, 0, 1, 0), keep=keep)


def damage(path):
    with path.open("r+b") as file:
        for at in (0, HEADER_COPY):
            file.seek(at + 30)
            file.write(b"damage")


def cut_short(path):
    os.truncate(path, path.stat().st_size - PAGE_SIZE)


@pytest.mark.parametrize(
    ("change", "words", "other"),
    [
        (damage, "is damaged; no job can use it", {}),
        (cut_short, other_than(*GEOMETRY), {}),
        (None, other_than(*GEOMETRY), {"end": END + PAGE_SIZE}),
        (None, other_than(*GEOMETRY), {"start": START + PAGE_SIZE}),
        (None, other_than(*GEOMETRY), {"keep": False}),
    ],
    ids=["damaged", "cut short", "longer", "begins elsewhere", "not to be kept"],
)
def test_a_kept_disk_that_is_damaged_or_of_another_job_is_told(path, change, words, other):
    made(path)
    if change:
        change(path)
    refused(path, words, **other)
    if not change:
        assert Kept(path).read(0) == content(1)


@pytest.mark.parametrize("headers", [0, 1])
def test_a_kept_disk_whose_making_was_interrupted_is_a_new_one(path, caplog, headers):
    if headers:
        Kept(path).close()
        with path.open("r+b") as file:
            file.seek(HEADER_COPY)
            file.write(bytes(HEADER.size + CRC))
    else:
        path.touch()
        os.truncate(path, 1 << 20)
    assert Kept(path).all() == [None] * PAGES
    assert not caplog.text


def test_a_disk_that_is_not_kept_is_empty_when_its_job_has_ended(path):
    made(path, keep=False)
    assert path.stat().st_size == 0
    made(path)
    open_store(str(path), START, END, keep=True).close()


def test_a_killed_jobs_disk_that_was_not_kept_is_refused_for_keeping_and_else_begins_anew(path):
    killed = open_store(str(path), START, END)
    write(killed, 0, content(1))
    os.close(killed.fd)
    refused(path, other_than(FORMAT, 0, 0, STRIPE, PAGE_SIZE, START, END))
    store = open_store(str(path), START, END + PAGE_SIZE)
    assert content(1)[:100] not in path.read_bytes()
    assert get(store, range(PAGES)) == (NEW_PAGES, PAGES)
    store.close()
