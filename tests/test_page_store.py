"""page_store.py: what a PageStore and its disk file promise, alone and after a crash."""

import ctypes
import errno
import fcntl
import os
import random
import resource
import select
import signal
import threading
import time
import traceback
import zlib
from struct import Struct

import pytest

from edm import page_store
from edm.page_store import (
    BLOCK_PAGES,
    BLOCK_SIZE,
    CONTENT,
    CRC,
    DISK,
    FIRST,
    HEADER,
    HEADER_COPY,
    INSTANCE,
    MAGIC,
    MAX_PAGES,
    NEW,
    NEW_PAGES,
    PIECE,
    SECOND,
    SPT,
    TABLE,
    TORN,
    PageStore,
)
from edm.uffd_ctypes import PAGE_SIZE

PAGES = 300
START = 0x1B58000
END = START + PAGES * PAGE_SIZE


def content(seed, pages=1):
    return random.Random(seed).randbytes(pages * PAGE_SIZE)


def write(store, page, whole, stay=False):
    """These bytes of so many pages."""
    store.write([(page, len(whole) // PAGE_SIZE, True)], memoryview(whole), stay)


def get(store, pages):
    """What the store gives, and gives back: (kind, bytes, or how many pages are new)."""
    asked = store.ask_get(pages)
    kind, got = asked.take()
    try:
        if kind == NEW_PAGES:
            return kind, got
        parts = [
            ctypes.string_at(asked.content(at, part), part * PAGE_SIZE)
            for at in range(0, got, PIECE)
            for part in [min(PIECE, got - at)]
        ]
        return kind, b"".join(parts)
    finally:
        asked.give_back(0)
        asked.done()


class Kept:
    """A kept disk."""

    def __init__(self, path, start=START, end=END):
        self.range = start, end
        self.store = PageStore(str(path), start, end, keep=True)
        self.fd = self.store.fd
        self.free, self.sync, self.close = self.store.free, self.store.sync, self.store.close

    def write(self, page, *seeds):
        write(self.store, page, b"".join(map(content, seeds)))

    def read(self, page):
        """The page's bytes, or None if it was never written."""
        kind, got = get(self.store, range(page, page + 1))
        return got if kind == CONTENT else None

    def all(self):
        return [self.read(page) for page in range(PAGES)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "disk"


def crash_and_resume(kept):
    """As after kill -9: the file is all that is left. A copy of it, as the lock is still held."""
    path = f"/proc/self/fd/{kept.fd}"
    copy = os.path.realpath(path) + ".crashed"
    with open(path, "rb") as file, open(copy, "wb") as to:
        to.write(file.read())
    return Kept(copy, *kept.range)


def failing(number):
    """A function that raises the OSError of this number, whatever it is called with."""

    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    return fail


def read_after_a_crash(kept, page):
    resumed = crash_and_resume(kept)
    try:
        return resumed.read(page)
    finally:
        resumed.close()


# ---------------------------------------------------------------- pages come and go

BOTH = pytest.mark.parametrize("keep", [False, True], ids=["scratch", "kept"])


@pytest.fixture
def pipe():
    """(read end, write end) of one that takes as much as a put may have, and does not wait for more."""
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, MAX_PAGES * PAGE_SIZE)
    yield read, write
    os.close(read)
    os.close(write)


def put(store, pipe, runs, whole, stay=False):
    """Put these runs; whole: the bytes of all of their pages."""
    assert len(whole) == sum(count for _, count, _ in runs) * PAGE_SIZE
    assert os.write(pipe[1], whole) == len(whole)
    store.put(runs, pipe[0], stay)
    assert is_empty(pipe)


def is_empty(pipe):
    try:
        os.read(pipe[0], 1)
    except BlockingIOError:
        return True
    return False


def whole_states(store):
    """The SPT, but for which pages are torn."""
    return bytes(byte & ~TORN for byte in store.spt.read(0, PAGES))


def drain(pipe):
    while not is_empty(pipe):
        os.read(pipe[0], MAX_PAGES * PAGE_SIZE)


@pytest.fixture
def small_files():
    """Call it with a number of bytes, and no file can have more. (Python ignores SIGXFSZ.)"""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def shared_memory():
    """KiB that this process has of it."""
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("RssShmem")).split()[1])


@BOTH
def test_the_first_access_of_a_page_gives_new_and_is_noted(path, keep):
    store = PageStore(str(path), START, END, keep)
    asked = store.ask_get(range(7, 9))
    assert store.locations(6, 4) == bytes((NEW, NEW, NEW, NEW))
    assert asked.take() == (NEW_PAGES, 2)
    asked.done()
    assert store.locations(6, 4) == bytes((NEW, INSTANCE, INSTANCE, NEW))


@BOTH
def test_what_was_put_is_in_the_file_and_comes_back(path, pipe, keep):
    store = PageStore(str(path), START, END, keep)
    put(store, pipe, [(7, 2, True), (90, 1, True)], content(1, 3))
    assert store.locations(7, 2) == bytes((DISK, DISK))
    assert all(content(1, 3)[at : at + PAGE_SIZE] in path.read_bytes() for at in (0, PAGE_SIZE))
    assert get(store, range(7, 9)) == (CONTENT, content(1, 3)[: 2 * PAGE_SIZE])
    assert get(store, range(90, 91)) == (CONTENT, content(1, 3)[2 * PAGE_SIZE :])


def test_a_disk_that_is_not_kept_has_a_pages_bytes_at_its_own_place_and_nothing_else(path, pipe):
    store = PageStore(str(path), START, END)
    header = path.read_bytes()[:TABLE]
    assert path.stat().st_size == TABLE + PAGES * PAGE_SIZE
    put(store, pipe, [(5, 2, True)], content(1, 2))
    rest = bytes((PAGES - 7) * PAGE_SIZE)
    assert path.read_bytes() == header + bytes(5 * PAGE_SIZE) + content(1, 2) + rest


@BOTH
def test_one_put_carries_clean_and_dirty_runs_and_only_the_dirty_ones_are_written(path, pipe, keep):
    store = PageStore(str(path), START, END, keep)
    put(store, pipe, [(0, 100, True)], content(1, 100))
    assert store.ask_get(range(100)).take() == (CONTENT, 100)
    assert store.ask_get(range(200, 210)).take() == (NEW_PAGES, 10)
    runs = [(0, 3, False), (3, 2, True), (5, 1, False), (200, 4, False), (204, 2, True)]
    put(store, pipe, runs, content(2, 12))
    first, second = content(1, 100), content(2, 12)
    now = first[: 3 * PAGE_SIZE] + second[3 * PAGE_SIZE : 5 * PAGE_SIZE]
    assert get(store, range(6)) in (
        (CONTENT, now + first[5 * PAGE_SIZE : 6 * PAGE_SIZE]),
        (CONTENT, first[: 3 * PAGE_SIZE]),  # those after it are in their other places
    )
    assert get(store, range(3, 5)) == (CONTENT, second[3 * PAGE_SIZE : 5 * PAGE_SIZE])
    assert get(store, range(5, 6)) == (CONTENT, first[5 * PAGE_SIZE : 6 * PAGE_SIZE])
    assert get(store, range(204, 206)) == (CONTENT, second[10 * PAGE_SIZE :])
    assert store.locations(0, 7) == bytes([DISK] * 6 + [INSTANCE | DISK])
    assert store.locations(200, 7) == bytes([NEW] * 4 + [DISK] * 2 + [INSTANCE])


@BOTH
def test_what_is_stored_to_stay_is_on_the_disk_and_in_the_instance(path, pipe, keep):
    store = PageStore(str(path), START, END, keep)
    assert store.ask_get(range(7, 10)).take() == (NEW_PAGES, 3)
    put(store, pipe, [(7, 2, True), (9, 1, False)], content(1, 3), stay=True)
    assert store.locations(7, 3) == bytes((INSTANCE | DISK, INSTANCE | DISK, INSTANCE))
    put(store, pipe, [(7, 3, False)], content(2, 3))
    assert store.locations(7, 3) == bytes((DISK, DISK, NEW))
    assert get(store, range(7, 9)) == (CONTENT, content(1, 2))


@BOTH
def test_a_get_is_for_the_first_pages_that_are_in_the_same_place(path, pipe, keep):
    store = PageStore(str(path), START, END, keep)
    put(store, pipe, [(2, 2, True)], content(1, 2))
    assert get(store, range(8)) == (NEW_PAGES, 2)
    assert get(store, range(2, 8)) == (CONTENT, content(1, 2))
    assert get(store, range(4, 8)) == (NEW_PAGES, 4)


@BOTH
def test_a_get_of_every_so_maniest_page_gives_those(path, pipe, keep):
    store = PageStore(str(path), START, END, keep)
    put(store, pipe, [(0, 30, True)], content(1, 30))
    pages = [content(1, 30)[p * PAGE_SIZE : (p + 1) * PAGE_SIZE] for p in (3, 10, 17, 24)]
    assert get(store, range(3, 45, 7)) == (CONTENT, b"".join(pages))
    assert store.ask_get(range(3, 45, 7)).take() == (CONTENT, 4)
    where = store.locations(0, 40)
    assert [p for p in range(40) if where[p] == INSTANCE | DISK] == [3, 10, 17, 24]
    assert get(store, range(31, 73, 7)) == (NEW_PAGES, 6)


@BOTH
def test_what_was_asked_for_and_not_used_is_given_again(path, pipe, keep):
    store = PageStore(str(path), START, END, keep)
    put(store, pipe, [(0, 4, True)], content(1, 4))
    for _ in range(2):
        assert store.ask_get(range(4)).take() == (CONTENT, 4)
        assert store.ask_get(range(4, 8)).take() == (NEW_PAGES, 4)
    store.ask_get(range(4)).done()
    asked = store.ask_get(range(2, 6))
    assert asked.take() == (CONTENT, 2)
    asked.give_back(1)
    assert store.locations(0, 8) == bytes([INSTANCE | DISK] * 3 + [DISK] + [INSTANCE] * 4)
    asked = store.ask_get(range(4, 8, 2))
    assert asked.take() == (NEW_PAGES, 2)
    asked.give_back(1)
    asked.give_back(2)
    assert store.locations(4, 4) == bytes((INSTANCE, INSTANCE, NEW, INSTANCE))


@BOTH
def test_a_put_that_is_refused_midway_tells_the_errno_and_moves_no_page(
    path, pipe, keep, small_files
):
    store = PageStore(str(path), START, END, keep)
    put(store, pipe, [(0, 20, True)], content(1, 20))
    put(store, pipe, [(180, 2, True), (190, 10, True)], content(3, 12))
    store.sync()
    store.free(190, 10)
    assert store.ask_get(range(10)).take() == (CONTENT, 10)
    assert store.ask_get(range(190, 200)).take() == (NEW_PAGES, 10)
    before = whole_states(store)
    runs = [(0, 5, False), (5, 2, True), (180, 2, False), (190, 10, True)]
    small_files(store.place(194, SECOND if keep else FIRST) + 100)  # one write is a short one
    os.write(pipe[1], content(2, 19))
    with pytest.raises(OSError, match="File too large") as refused:
        store.put(runs, pipe[0])
    assert refused.value.errno == errno.EFBIG
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    drain(pipe)
    assert whole_states(store) == before
    assert get(store, range(5)) == (CONTENT, content(1, 20)[: 5 * PAGE_SIZE])
    assert get(store, range(180, 182)) == (CONTENT, content(3, 12)[: 2 * PAGE_SIZE])
    put(store, pipe, runs, content(2, 19))
    assert get(store, range(190, 200)) == (CONTENT, content(2, 19)[9 * PAGE_SIZE :])
    store.sync()


@BOTH
def test_a_put_that_a_full_file_system_refuses_leaves_its_room_to_others(
    small_file_system, pipe, keep
):
    store = PageStore(str(small_file_system / "disk"), START, START + 3000 * PAGE_SIZE, keep)
    for page in range(0, 3000, 150):
        os.write(pipe[1], content(page, 150))
        try:
            store.put([(page, 150, True)], pipe[0])
        except OSError as error:
            assert error.errno == errno.ENOSPC
            break
    else:
        pytest.fail("there was room for more than there is")
    drain(pipe)
    assert page >= 600 and store.locations(page, 150) == bytes(150)
    put(store, pipe, [(page, 20, True)], content(1, 20))
    for full in range(0, page, 150):
        assert get(store, range(full, full + 150)) == (CONTENT, content(full, 150))
    store.close()


def test_a_put_whose_pipe_has_been_closed_too_early_is_an_error(path):
    for keep in (False, True):
        store = PageStore(None, START, END) if not keep else Kept(path).store
        read, write = os.pipe()
        os.write(write, content(1))
        os.close(write)
        with pytest.raises(OSError, match="the pipe of a put ends before its pages do"):
            store.put([(5, 2, True)], read)
        assert store.locations(5, 2) == bytes((NEW, NEW))
        os.close(read)


def test_what_a_forked_process_puts_its_parent_gets_and_the_other_way_round(pipe):
    store = PageStore(None, START, END)
    go, back = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        try:
            put(store, pipe, [(7, 2, True)], content(1, 2))
            os.write(back[1], b"x")
            os.read(go[0], 1)  # until the parent has got a page, freed one, and put another
            right = get(store, range(9, 10)) == (CONTENT, content(3))
            right &= store.locations(7, 3) == bytes((INSTANCE | DISK, NEW, DISK))
        finally:
            os._exit(0 if right else 1)
    os.read(back[0], 1)
    asked = store.ask_get(range(7, 9))
    assert asked.take() == (CONTENT, 2)
    assert ctypes.string_at(asked.content(0, 2), 2 * PAGE_SIZE) == content(1, 2)
    store.free(8, 1)
    put(store, pipe, [(9, 1, True)], content(3))
    os.write(go[1], b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for end in (*go, *back):
        os.close(end)


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


def test_what_a_forked_process_puts_on_a_kept_disk_its_parent_gets_and_syncs(path, pipe):
    kept = Kept(path)
    kept.write(0, *range(50))
    kept.sync()

    def put_often():  # amid the syncs and frees of the parent
        for turn in range(200):
            page = 100 + turn % 10 * 10
            put(kept.store, pipe, [(page, 2, True), (page + 3, 1, True)], content(turn, 3))

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
            parts = [whole[at : at + PAGE_SIZE] for at in range(0, len(whole), PAGE_SIZE)]
            assert [store.read(page + at) for at in range(4)] == [*parts[:2], None, parts[2]]
    assert resumed.all() == kept.all() and syncs
    resumed.close()


def test_what_fails_in_a_forked_process_is_known_in_its_parent_and_the_other_way_round(path, pipe):
    kept = Kept(path)
    put_one = [(7, 1, True)]

    def put_fails(match, broken):
        os.write(pipe[1], content(1))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(os, broken, failing(errno.EIO))
            with pytest.raises(OSError, match=match):
                kept.store.put(put_one, pipe[0])

    with Child(
        lambda: put_fails("Input/output", "pwrite"),
        lambda: put(kept.store, pipe, put_one, content(2)),
        lambda: put_fails("Input/output", "dup"),  # which no put calls: the sync has failed
    ) as child:
        child.step()
        with pytest.raises(OSError, match="1 pages could not be written"):
            kept.sync()
        child.step()
        kept.sync()
        assert read_after_a_crash(kept, 7) == content(2)
        with pytest.MonkeyPatch.context() as patched, pytest.raises(OSError, match="Input/output"):
            patched.setattr(os, "fsync", failing(errno.EIO))
            kept.sync()
        child.step()


def test_a_page_of_a_kept_disk_costs_at_most_eight_bytes_of_memory_and_an_unused_one_none(path):
    pages = (64 << 30) // PAGE_SIZE
    before = shared_memory()
    kept = Kept(path, START, START + pages * PAGE_SIZE)
    for page in range(0, 40000, 100):
        kept.write(pages // 2 + page, *[page] * 100)
    kept.sync()
    kept.free(pages // 2, 100)
    kept.sync()
    used = 1024 * (shared_memory() - before) - MAX_PAGES * PAGE_SIZE  # that is for the puts
    assert used <= 8 * 40000 + 64 * 1024
    kept.close()
    before = shared_memory()
    kept = Kept(path, START, START + pages * PAGE_SIZE)
    assert 1024 * (shared_memory() - before) <= 8 * 40000 + 64 * 1024
    assert kept.read(pages // 2 + 100) == content(100)


def test_a_sync_writes_only_the_blocks_of_the_table_that_have_changed(path, monkeypatch):
    kept = Kept(path, START, START + 10 * BLOCK_PAGES * PAGE_SIZE)
    for block in range(10):
        kept.write(block * BLOCK_PAGES, block)
    for _ in range(3):
        kept.sync()
    written = []
    real = os.pwrite

    def pwrite(fd, what, at):
        if TABLE <= at < kept.store.place(0, FIRST):
            written.append((at - TABLE) // BLOCK_SIZE)
        return real(fd, what, at)

    def blocks(action):
        written.clear()
        action()
        kept.sync()
        copy = {number // 10 for number in written}
        assert len(copy) <= 1
        return sorted(number % 10 for number in written)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert blocks(lambda: None) == []
    assert blocks(lambda: kept.write(3 * BLOCK_PAGES - 1, 1, 2)) == [2, 3]
    assert blocks(lambda: kept.free(7 * BLOCK_PAGES, 1)) == [2, 3, 7]  # the other copy too
    assert blocks(lambda: None) == [7]
    assert blocks(lambda: None) == []
    kept.write(5 * BLOCK_PAGES, 1)
    kept.sync()
    kept.close()
    kept = Kept(path, START, START + 10 * BLOCK_PAGES * PAGE_SIZE)
    assert blocks(lambda: kept.write(0, 1)) == [0, 5]  # what the last job had not written twice
    assert blocks(lambda: None) == [0, 5] and blocks(lambda: None) == []


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


def test_a_huge_range_is_freed_and_looked_at_at_once_and_costs_no_memory():
    store = PageStore(None, START, START + (256 << 30))
    pages = (256 << 30) // PAGE_SIZE
    before, began = shared_memory(), time.monotonic()
    store.free(0, pages)
    assert store.table().count("\n") == 2 and not list(store.runs_on_disk())
    assert store.locations(pages // 2, 100) == bytes(100)
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


def test_a_kept_disk_is_used_by_several_threads_at_once(path):
    kept = Kept(path, START, START + 1000 * PAGE_SIZE)
    stop, failed = threading.Event(), []

    def work(first):
        """With pages of its own."""
        dice, now = random.Random(first), {}
        read, write = os.pipe()
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 64 * PAGE_SIZE)
        try:
            while not stop.is_set():
                page = first + dice.randrange(40)
                seed = dice.randrange(1000)
                if dice.random() < 0.1:
                    kept.free(page, 1)
                    now.pop(page, None)
                elif dice.random() < 0.7:
                    os.write(write, content(seed))
                    kept.store.put([(page, 1, True)], read)
                    now[page] = seed
                into = memoryview(bytearray(PAGE_SIZE))
                kind, _ = kept.store.get(range(page, page + 1), into)
                assert kind == (CONTENT if page in now else NEW_PAGES)
                assert page not in now or into == content(now[page])
        except BaseException as error:
            failed.append(error)
            raise
        finally:
            os.close(read)
            os.close(write)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 40, 80)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 1
    while time.monotonic() < until and not failed:
        kept.sync()
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed
    kept.sync()
    resumed = crash_and_resume(kept)
    assert [resumed.read(page) for page in range(120)] == [kept.read(page) for page in range(120)]


def test_everything_that_a_store_opened_is_closed_and_for_no_program_that_it_starts(path):
    before = set(os.listdir("/proc/self/fd"))
    for keep in (False, True):
        store = PageStore(str(path) if keep else None, START, END, keep)
        opened = set(os.listdir("/proc/self/fd")) - before
        assert len(opened) >= 2
        for fd in map(int, opened):
            try:
                assert not os.get_inheritable(fd)
            except OSError as error:  # the one that listed them
                assert error.errno == errno.EBADF
        store.close()
        assert set(os.listdir("/proc/self/fd")) == before


def test_the_log_has_the_wikis_lines_in_the_wikis_order(pipe, caplog):
    caplog.set_level("DEBUG", "edm")
    store = PageStore(None, START, END, instance=3)
    where = f"{START + 7 * PAGE_SIZE:#x}"

    def lines():
        said = [
            f"[{record.name.removeprefix('edm.')}] {record.message}" for record in caplog.records
        ]
        caplog.clear()
        return said

    def table(location):
        row = [f"address : {where}  location : {location}"] if location else []
        return ["Print SPT STATE", "-----START SPT ----", *row, "------END SPT-----"]

    def spt(location):
        return ["[DMS] SPT updated. Current state: ", "[DMS] " + "\n".join(table(location))]

    store.ask_get(range(7, 8)).take()
    assert lines() == [
        f"[DMS] get request to send content of page in address: {where}",
        "[DMS] page accessed first time, set info - new_page",
        *spt("INSTANCE_3"),
        f"[DMS] page in address: {where} sent to app",
    ]
    put(store, pipe, [(7, 1, True)], content(1))
    assert lines() == [f"[DMS] page in address: {where} written to disk", *spt("DISK")]
    store.get(range(7, 8), memoryview(bytearray(PAGE_SIZE)))
    assert lines() == [
        f"[DMS] get request to send content of page in address: {where}",
        f"[DMS] read page address: {where} from disk",
        *spt("INSTANCE_3"),
        f"[DMS] page in address: {where} sent to app",
    ]
    store.free(7, 1)
    assert lines() == spt("")


def test_the_spt_costs_no_memory_until_it_is_used():
    before, shared = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, shared_memory()
    spt = SPT(1 << 34, 0)  # 64 TiB
    spt.set(range(1 << 33, (1 << 33) + 100), DISK)
    assert spt.place(range(1 << 33, (1 << 33) + 4096)) == (DISK, 100)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # KiB
    assert shared_memory() - shared < 64


def test_the_spt_is_printed_as_the_wiki_prints_it():
    spt = SPT(PAGES, 0)
    spt.set(range(2, 3), INSTANCE)
    spt.set(range(4, 5), DISK)
    assert spt.table(0x1D4A000) == (
        "Print SPT STATE\n"
        "-----START SPT ----\n"
        "address : 0x1d4c000  location : INSTANCE_0\n"
        "address : 0x1d4e000  location : DISK\n"
        "------END SPT-----"
    )


# ---------------------------------------------------------------- one job


def test_a_disk_without_a_path_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    store = PageStore(None, START, END)
    write(store, 9, content(1))
    assert get(store, range(9, 10)) == (CONTENT, content(1))
    assert list(tmp_path.iterdir()) == []
    store.close()


@pytest.mark.parametrize("keep", [False, True])
def test_the_disk_file_is_for_its_owner_only(path, keep):
    path.touch(0o666)
    PageStore(str(path), START, END, keep).close()
    assert path.stat().st_mode & 0o777 == 0o600


def test_freed_pages_give_their_blocks_back(path):
    kept = Kept(path)
    kept.write(0, *range(200))
    kept.sync()
    full = path.stat().st_blocks
    kept.free(0, 190)
    kept.sync()
    assert path.stat().st_blocks < full / 5
    assert kept.all()[190:200] == [content(seed) for seed in range(190, 200)]
    scratch = PageStore(None, START, END)
    write(scratch, 0, content(1, 200))
    full = os.fstat(scratch.fd).st_blocks
    scratch.free(0, 190)
    assert os.fstat(scratch.fd).st_blocks < full / 5


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
    assert again.store.locations(4, 4) == bytes((NEW, DISK, DISK, NEW))
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


def test_any_sequence_of_writes_frees_syncs_and_crashes_gives_what_the_last_sync_had(tmp_path):
    for seed in range(30):
        dice, kept = random.Random(seed), Kept(tmp_path / f"disk{seed}")
        now, synced = [None] * PAGES, [None] * PAGES
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
            assert kept.all() == now
        kept.close()


def test_whatever_bit_of_a_header_is_flipped_the_other_copy_is_taken_and_nothing_is_lost(
    path, caplog
):
    kept = Kept(path, START, START + 8 * PAGE_SIZE)
    for seed in range(3):
        kept.write(0, seed)
        kept.sync()
    kept.close()
    whole = path.read_bytes()
    length = HEADER.size + CRC
    for copy in (0, HEADER_COPY):
        for bit in range(8 * length):
            flipped = bytearray(whole)
            flipped[copy + bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            caplog.clear()
            again = Kept(path, START, START + 8 * PAGE_SIZE)
            assert again.read(0) == content(2)
            assert "one of the two copies of its header is damaged" in caplog.text
            again.close()


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


def test_a_failed_sync_is_never_followed_by_one_that_succeeds(path, monkeypatch):
    kept = Kept(path)
    kept.write(0, 1)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            kept.sync()
    with pytest.raises(OSError, match="Input/output"):
        kept.sync()


@pytest.mark.parametrize("fails", ["the first fsync", "the header", "the second fsync"])
def test_after_a_sync_that_failed_nothing_is_written_over_what_was_there(path, monkeypatch, fails):
    kept = Kept(path)
    kept.write(0, 1)
    kept.sync()
    kept.write(0, 2)
    real, syncs = os.fsync, []

    def fsync(fd):
        syncs.append(fd)
        if fails == ("the first fsync", "the second fsync")[len(syncs) - 1]:
            raise OSError(5, "Input/output error")
        real(fd)

    def pwrite(fd, content, at):
        if at < TABLE:
            raise OSError(28, "No space left on device")
        return real_pwrite(fd, content, at)

    real_pwrite = os.pwrite
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fsync)
        if fails == "the header":
            broken.setattr(os, "pwrite", pwrite)
        with pytest.raises(OSError, match="Input/output|No space"):
            kept.sync()
    for page in (0, 1):
        with pytest.raises(OSError, match="Input/output|No space"):
            kept.write(page, 3)
    with pytest.raises(OSError, match="Input/output|No space"):
        kept.sync()
    kept.free(0, 1)  # in memory only
    assert kept.read(0) is None
    kept.close()
    assert Kept(path).read(0) == content(2 if fails == "the second fsync" else 1)


def test_a_page_that_was_torn_keeps_a_sync_from_returning_until_it_is_whole(path, monkeypatch):
    kept = Kept(path)
    kept.write(5, 1, 2)
    with monkeypatch.context() as broken:

        def half(fd, content, at):
            if at >= kept.store.place(0, FIRST) and len(content) < PAGE_SIZE:
                raise OSError(5, "Input/output error")
            return real(fd, content[: len(content) // 2], at)

        real = os.pwrite
        broken.setattr(os, "pwrite", half)
        with pytest.raises(OSError, match="Input/output"):
            kept.write(5, 3)
    with pytest.raises(OSError, match="1 pages could not be written"):
        kept.sync()
    kept.write(5, 4)
    kept.sync()
    assert crash_and_resume(kept).all()[5:7] == [content(4), content(2)]


def test_a_page_that_was_torn_and_then_freed_keeps_no_sync_from_returning(path, monkeypatch):
    kept = Kept(path)
    kept.write(3, 1)
    kept.sync()
    with monkeypatch.context() as full, pytest.raises(OSError, match="Input/output"):
        full.setattr(os, "pwrite", failing(errno.EIO))
        kept.write(3, 2)
    with pytest.raises(OSError, match="could not be written"):
        kept.sync()
    kept.free(3, 1)
    kept.sync()
    assert read_after_a_crash(kept, 3) is None


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


def test_that_no_hole_can_be_punched_is_no_error(path, monkeypatch):
    kept = Kept(path)
    kept.write(3, 1, 2)
    kept.sync()
    monkeypatch.setattr("edm.page_store.punch_hole", failing(errno.EIO))
    kept.free(3, 1)
    kept.sync()
    assert kept.all() == crash_and_resume(kept).all() == [*[None] * 4, content(2), *[None] * 295]


def test_what_a_resumed_job_goes_on_from_is_durable_before_anything_is_written(path, monkeypatch):
    made(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:HEADER_COPY] + bytes(50) + whole[HEADER_COPY + 50 :])
    calls = []
    real_fsync, real_pwrite = os.fsync, os.pwrite
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), real_fsync(fd)))
    monkeypatch.setattr(
        os, "pwrite", lambda fd, what, at: (calls.append(at), real_pwrite(fd, what, at))[1]
    )
    for _ in range(2):
        Kept(path).close()
        assert calls == [0, "fsync", HEADER_COPY]  # and never again: both say the same now


@pytest.mark.parametrize("keep", [False, True])
def test_a_page_that_the_file_system_can_not_read_is_told_and_its_neighbours_are_read(
    path, monkeypatch, keep
):
    store = PageStore(str(path), START, END, keep)
    write(store, 0, content(1, 4))
    real = os.preadv

    def preadv(fd, into, at):
        bad = store.place(2, store.spt.read(2, 1)[0])
        if at <= bad < at + sum(map(len, into)):
            raise OSError(5, "Input/output error")
        return real(fd, into, at)

    monkeypatch.setattr(os, "preadv", preadv)
    into = memoryview(bytearray(4 * PAGE_SIZE))
    kind, got = store.get(range(4), into)
    assert (kind, got) == (CONTENT, 2)
    assert into[: 2 * PAGE_SIZE] == content(1, 4)[: 2 * PAGE_SIZE]
    assert store.locations(0, 4) == bytes([INSTANCE | DISK, INSTANCE | DISK, DISK, DISK])
    assert get(store, range(3, 4)) == (CONTENT, content(1, 4)[3 * PAGE_SIZE :])
    assert (
        get(store, range(1, 4, 2))[1]
        == content(1, 4)[PAGE_SIZE : 2 * PAGE_SIZE] + get(store, range(3, 4))[1]
    )
    for pages in (range(2, 3), range(2, 4)):
        with pytest.raises(OSError, match="Input/output"):
            store.get(pages, into)
    assert store.locations(2, 2) == bytes((DISK, DISK))
    asked = store.ask_get(range(4))
    assert asked.take() == (CONTENT, 4)
    for part in ((0, 4), (1, 2), (2, 1)):
        with pytest.raises(OSError, match="Input/output") as told:
            asked.content(*part)
        assert told.value.errno == errno.EIO
    for at in (0, 1, 3):
        page = content(1, 4)[at * PAGE_SIZE : (at + 1) * PAGE_SIZE]
        assert ctypes.string_at(asked.content(at, 1), PAGE_SIZE) == page
    asked.give_back(2)
    asked.done()
    assert store.locations(0, 4) == bytes([INSTANCE | DISK] * 2 + [DISK] * 2)


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


DAMAGED = "its entry in the disk's table is damaged"


@pytest.mark.parametrize(("times", "since"), HISTORIES.values(), ids=HISTORIES.keys())
def test_whatever_bit_of_a_pages_block_in_the_table_is_flipped_no_other_bytes_are_read(
    path, small_blocks, times, since
):
    kept = Kept(path, START, START + 8 * PAGE_SIZE)
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
    with pytest.raises(OSError, match="damaged"):
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
    with pytest.raises(OSError, match="damaged"):  # a crash goes back to it, not to what was before
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


def test_a_batch_that_did_not_fit_leaves_its_room_to_a_smaller_one(small_file_system):
    for keep in (False, True):
        store = PageStore(str(small_file_system / "disk"), START, START + 3000 * PAGE_SIZE, keep)
        with pytest.raises(OSError, match="No space left"):
            write(store, 0, content(1, 2000))
        write(store, 2000, content(2, 900))
        store.close()
        (small_file_system / "disk").unlink()


def test_a_new_disk_has_room_for_both_of_its_headers(path):
    Kept(path).close()
    whole = path.read_bytes()
    assert whole[:8] == whole[HEADER_COPY:][:8] == b"EDM disk"


def test_a_file_system_that_punches_no_holes_does_not_keep_pages_from_being_freed(
    path, monkeypatch
):
    def punch_hole(fd, offset, length):
        raise OSError(errno.EOPNOTSUPP, "fallocate: Operation not supported")

    monkeypatch.setattr("edm.page_store.punch_hole", punch_hole)
    store = PageStore(str(path), START, END)
    write(store, 0, content(1))
    store.free(0, 1)
    assert get(store, range(1)) == (NEW_PAGES, 1)
    write(store, 0, content(2))
    assert get(store, range(1)) == (CONTENT, content(2))


# ---------------------------------------------------------------- what is refused


def made(path):
    kept = Kept(path)
    kept.write(0, 1)
    kept.sync()
    kept.close()


def refused(path, match, start=START, end=END, keep=True):
    """Refused with these words, and left as it is."""
    before = path.read_bytes(), path.stat().st_mode
    with pytest.raises(ValueError, match=match):
        PageStore(str(path), start, end, keep)
    assert (path.read_bytes(), path.stat().st_mode) == before


def test_a_disk_in_use_is_refused(path):
    for keep in (True, False):
        store = PageStore(str(path), START, END, keep)
        write(store, 0, content(1))
        for other in (True, False):
            refused(path, "disk: .* in use by another job", keep=other)
        store.close()
        path.unlink()


def test_a_file_that_is_no_disk_is_refused_and_left_as_it_is(path):
    for text in (b"x", b"my thesis\n" * 30000):
        for keep in (True, False):
            path.write_bytes(text)
            refused(path, "disk: .* is not an EDM disk", keep=keep)


def test_another_geometry_is_refused(path):
    made(path)
    for start, end in ((START, END + PAGE_SIZE), (START + PAGE_SIZE, END)):
        refused(path, "geometry.*start_addr 0x1b58000", start, end)


def test_another_version_of_the_format_is_refused(path, monkeypatch):
    monkeypatch.setattr("edm.page_store.FORMAT", 99)
    made(path)
    monkeypatch.undo()
    refused(path, "version 99")


def test_a_kept_disk_of_format_2_is_refused_with_one_line(path):
    fields = HEADER.pack(MAGIC, 2, True, PAGE_SIZE, START, END, 7)
    header = fields + zlib.crc32(fields).to_bytes(4, "little")
    path.write_bytes(header.ljust(HEADER_COPY, b"\0") + header + bytes(1 << 20))
    words = f"^disk: {path} has version 2 of the format; this EDM knows 3$"
    for keep in (True, False):
        refused(path, words, keep=keep)


def test_a_damaged_header_is_told(path):
    made(path)
    with path.open("r+b") as file:
        for at in (0, HEADER_COPY):
            file.seek(at + 30)
            file.write(b"damage")
    refused(path, "damaged")


def test_a_kept_disk_that_was_cut_short_is_told(path):
    made(path)
    os.truncate(path, path.stat().st_size - PAGE_SIZE)
    refused(path, "damaged: it has .* bytes, and should have")


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


def test_a_kept_disk_is_not_overwritten_by_a_job_that_does_not_keep_it(path):
    made(path)
    refused(path, "kept disk of an earlier job; --keep goes on", keep=False)
    assert Kept(path).read(0) == content(1)


def test_a_disk_that_was_not_kept_is_refused_for_keeping_and_else_begins_anew(path):
    store = PageStore(str(path), START, END)
    write(store, 0, content(1))
    store.close()
    refused(path, "not kept")
    store = PageStore(str(path), START, END + PAGE_SIZE)
    assert content(1)[:100] not in path.read_bytes()
    assert get(store, range(PAGES)) == (NEW_PAGES, PAGES)
    store.close()
