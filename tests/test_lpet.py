"""lpet.py: what an eviction does to memory, table and store; which pages leave; refusals; storing.

The memory is a memfd of this process, which is "the application" too. Only where a test needs the
page table's marks is it registered with a userfaultfd.
"""

import ctypes
import errno
import mmap
import os
import random
import select
import threading
import time
import types

import pytest
from conftest import (
    close,
    lpet_is_first,
    needs_userfaultfd,
    pages_in,
    supported_features,
    wait_for,
)

from edm import lpet as lpet_module
from edm import lspt as l
from edm import uffd_ctypes as u
from edm.lpet import AGE, Lpet
from edm.lspt import ANY_HERE, AWAY, COMING, HERE, LEAVING, LOST, LSPT, NEW, NO_HOLES, SMALL
from edm.page_idle import PRESENT, WRITTEN, BitmapTracker, Pagemap
from edm.uffd_ctypes import PAGE_SIZE


def content(page, version=0):
    """The bytes of a page: no two pages or versions are alike."""
    return random.Random(1000 * page + version).randbytes(64) * (PAGE_SIZE // 64)


class Memory:
    """A memfd, and the "application's" mapping of it."""

    def __init__(self, pages):
        self.memfd = os.memfd_create("test")
        os.ftruncate(self.memfd, pages * PAGE_SIZE)
        self.map = mmap.mmap(self.memfd, pages * PAGE_SIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def write(self, page, version=0):
        self.map[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = content(page, version)

    def read(self, page):
        return self.map[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]

    def pages_in_it(self):
        return os.fstat(self.memfd).st_blocks * 512 // PAGE_SIZE

    def close(self):
        os.close(self.memfd)


class Store:
    """Records what is put, or refuses it."""

    def __init__(self):
        self.tries = []  # the runs that are dirty, of every put
        self.pages = {}  # page: its bytes
        self.stayed = []  # of every put: was it with stay?
        self.refuses = lambda runs: False
        self.meanwhile = lambda: None  # called in the midst of a put
        self.kept = True
        self.takes_pipes = False
        self.taken = []  # the runs that it took

    def put_from_pipe(self, pipe, page, into):
        self.taken.append((page, len(into) // PAGE_SIZE))
        for at in range(len(into) // PAGE_SIZE):
            self.pages[page + at] = os.read(pipe, PAGE_SIZE)
        return True

    def put(self, gone, dirty):
        runs = [(first, len(part) // PAGE_SIZE) for first, part in dirty]
        assert set(pages_in(runs)) <= {*pages_in(gone)} or not gone
        self.tries.append(runs)
        self.stayed.append(not gone)
        self.meanwhile()
        if self.refuses(runs):
            raise OSError(errno.ENOSPC, "no room on this disk")
        for first, part in dirty:
            for at in range(0, len(part), PAGE_SIZE):
                self.pages[first + at // PAGE_SIZE] = bytes(part[at : at + PAGE_SIZE])


class FakePagemap:
    """Pages are clean if they are in `clean`; there is no other mark in this memory."""

    def __init__(self, real):
        self.clean = set()
        self._find, self.pfns = real.find, real.pfns

    def find(self, page, chosen, which):
        if which is PRESENT:
            return self._find(page, chosen, which)
        return bytes(0 if at in self.clean else byte for at, byte in enumerate(chosen, start=page))


def absent(instance, page, count):
    """Those of these pages that are not in the page table."""
    there = Pagemap(instance.pagemap_fd, instance.memory.address).find(
        page, b"\xff" * count, PRESENT
    )
    return {at for at, byte in enumerate(there, page) if not byte}


class FakeUffd:
    def __init__(self, instance):
        self._start, self._instance = instance.memory.address, instance
        self.woken = set()  # pages
        self.protected = []  # (first page, count, protect)

    def wake(self, start, length):
        page, count = (start - self._start) // PAGE_SIZE, length // PAGE_SIZE
        states = self._instance.lspt.state
        ends = states[page], states[page + count - 1]  # others may be in between
        assert LEAVING not in ends, "or it would fault again"
        self.woken |= {*range(page, page + count)}

    def writeprotect(self, start, length, protect):
        self.protected.append(((start - self._start) // PAGE_SIZE, length // PAGE_SIZE, protect))


class FakeTracker:
    """Pages are idle if they are in idle_pages."""

    def __init__(self):
        self.idle_pages, self.marked = set(), []

    def used(self, page, chosen):
        return bytes(0 if at in self.idle_pages else byte for at, byte in enumerate(chosen, page))

    def mark_idle(self, page, chosen):
        self.marked += pages_in(l.runs(page, chosen, l.CHOSEN_RUN))


class FakeBitmap(FakeTracker, BitmapTracker):
    """The kernel's idle bitmap says which."""


class Instance:
    """An LPET with all that it needs, and what a DM-Handler does for it."""

    def __init__(self, pages=100, high=64, low=0, batch=16):
        self.memory = Memory(pages)
        self.uffd = FakeUffd(self)
        self.lspt = LSPT(pages, high, low, False, self.uffd, self.memory.address)
        self.store = Store()
        self.pagemap_fd = os.open("/proc/self/pagemap", os.O_RDONLY)
        self.pagemap = FakePagemap(Pagemap(self.pagemap_fd, self.memory.address))
        settings = {"evict_batch": batch, "idle_tracker": "unmap"}
        hello = types.SimpleNamespace(fds=[None, self.memory.memfd], **settings)
        self.lpet = Lpet(self.lspt, self.store, self.pagemap, hello)
        self.gone, self._gone = [], self.lspt.gone  # the pages that have left, in order
        self.lspt.gone = self._note_gone

    def _note_gone(self, left):
        self.gone += pages_in(l.runs(left.page, left.chosen, l.CHOSEN_RUN))
        self._gone(left)

    def come(self, *runs, version=0):
        """These pages are brought, and written."""
        for page in pages_in(runs):
            state = self.lspt.expect(page)
            assert state in (NEW, *range(AWAY, LOST)), f"page {page} is {state}"
            self.memory.write(page, version)
            self.lspt.arrived(range(page, page + 1))

    def here(self):
        return list(pages_in(self.lspt.runs_here()))

    def make_of(self, generation, page, count):
        """These pages came in this generation, or were used in it."""
        for first, n in l.runs(page, self.lspt.state[page : page + count], l.HERE_RUN):
            self.lspt.state[first : first + n] = bytes((HERE + generation % l.GENERATIONS,)) * n

    def states(self, first, count):
        return list(self.lspt.state[first : first + count])

    def figure(self, which):
        return self.lspt.figures[which]

    def evict(self, page, count, which):
        """Evict these pages; how many have left?"""
        return self.lpet._evict(self.lspt.claim(page, count, which))

    def evict_once(self):
        """As LPET does when it is woken; which pages left, in order?"""
        before = len(self.gone)
        self.lpet._evict_until_low_threshold(self.needed())
        return self.gone[before:]

    def needed(self):
        return self.figure(l.RESIDENT) - self.lspt.low

    def may_try_again(self):
        """The rest after a refusal is over."""
        self.lpet._again_at = 0.0

    def close(self):
        os.close(self.lpet._out)
        os.close(self.lpet._in)
        close(self.lspt)
        os.close(self.pagemap_fd)
        self.memory.close()

    def pipe_is_empty(self):
        return not select.select([self.lpet._out], [], [], 0)[0]


@pytest.fixture
def clock(monkeypatch):
    """Its `now` is the clock's seconds."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(time, "monotonic_ns", lambda: int(clock.now * 1e9))
    return clock


@pytest.fixture
def make(monkeypatch):
    for module in (l, lpet_module):
        monkeypatch.setattr(module, "Userfaultfd", lambda uffd: uffd)  # an Instance's is a FakeUffd
    made = []

    def make(**options):
        made.append(Instance(**options))
        return made[-1]

    yield make
    for instance in made:
        instance.close()


def refuse_all(runs):
    return bool(runs)


def refuse_nothing(runs):
    return False


def test_the_lspt_is_printed_as_the_wiki_prints_it(make, caplog):
    caplog.set_level("INFO", "edm")
    instance = make()
    instance.lpet._pagemap.pfns = lambda page, count: [45052]
    instance.lpet._tracker = FakeTracker()
    instance.lpet._tracker.idle_pages = {7}
    instance.come((3, 1), (7, 1))
    instance.lpet._show_lspt()
    used, idle = (f"{instance.memory.address + page * PAGE_SIZE:#x}" for page in (3, 7))
    start, table = caplog.messages
    assert start == f"start address: {used}"
    assert table == (
        "page list state: \n"
        "-----START LSPT ----\n"
        f"address : {used}  pfn : 45052  is_idle: 0\n"
        f"address : {idle}  pfn : 45052  is_idle: 1\n"
        "-----END LSPT ----"
    )


# ---------------------------------------------------------------- one eviction


def test_an_eviction_gives_the_store_the_bytes_and_leaves_neither_memory_nor_state(make):
    instance = make()
    instance.come((10, 3), (15, 2), (40, 1), (60, 1))
    assert instance.evict(0, 50, ANY_HERE) == 6
    assert instance.store.tries == [[(10, 3), (15, 2), (40, 1)]]
    assert instance.store.stayed == [False]
    assert instance.store.pages == {p: content(p) for p in (10, 11, 12, 15, 16, 40)}
    assert instance.states(10, 8) == [AWAY, AWAY, AWAY, NEW, NEW, AWAY, AWAY, NEW]
    assert instance.here() == [60] and instance.memory.pages_in_it() == 1
    assert instance.memory.read(60) == content(60)
    assert instance.figure(l.RESIDENT) == 1
    assert instance.figure(l.EVICTED_DIRTY) == 6 and instance.figure(l.EVICTED_CLEAN) == 0
    assert instance.figure(l.SENT) == 6 * PAGE_SIZE


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("every", [1, 2, 5, 7])
def test_as_many_pages_as_a_pipe_holds_leave_at_once_with_any_holes_between_them(
    make, every, refused
):
    instance = make(pages=300, high=300, batch=1000)
    assert instance.lpet._batch == u.PAGES_AT_ONCE == 256
    pages = range(10, 266, every)
    instance.come(*((page, 1) for page in pages))
    instance.store.refuses = refuse_all if refused else refuse_nothing
    assert instance.evict(10, 256, ANY_HERE) == (0 if refused else len(pages))
    assert len(instance.store.tries) == 1
    if refused:
        assert instance.here() == [*pages] and instance.memory.pages_in_it() == len(pages)
        assert all(instance.memory.read(page) == content(page) for page in pages)
    else:
        assert instance.store.pages == {page: content(page) for page in pages}
        assert instance.memory.pages_in_it() == 0
    assert instance.pipe_is_empty()


@pytest.mark.parametrize("takes", [True, False])
def test_dirty_neighbours_go_from_the_pipe_to_the_disk_if_it_takes_them(make, takes):
    instance = make()
    instance.come((9, 4))
    instance.store.takes_pipes = takes
    assert instance.evict(0, 50, ANY_HERE) == 4
    assert instance.store.taken == ([(9, 4)] if takes else [])
    assert instance.store.tries == ([] if takes else [[(9, 4)]])
    assert instance.store.pages == {page: content(page) for page in range(9, 13)}
    assert instance.pipe_is_empty() and instance.memory.pages_in_it() == 0
    assert instance.figure(l.EVICTED_DIRTY) == 4 and instance.figure(l.SENT) == 4 * PAGE_SIZE


@pytest.mark.parametrize("what", ["holes", "clean", "far"])
def test_only_neighbours_that_are_all_dirty_go_there(make, what):
    instance = make()
    instance.store.takes_pipes = True
    instance.come(*{"holes": ((9, 2), (12, 2)), "clean": ((9, 4),), "far": ((9, 1), (20, 1))}[what])
    instance.pagemap.clean |= {10} if what == "clean" else set()
    pages = set(instance.here()) - instance.pagemap.clean
    instance.evict(0, 50, ANY_HERE)
    assert instance.store.taken == []
    assert instance.store.pages == {page: content(page) for page in pages}


def test_nothing_to_evict_asks_nothing_of_the_store(make):
    instance = make()
    instance.come((10, 1))
    assert instance.evict(11, 50, ANY_HERE) == 0
    assert instance.store.tries == [] and instance.here() == [10]


def test_clean_pages_leave_without_their_bytes(make):
    instance = make()
    instance.come((10, 5))
    instance.pagemap.clean |= {11, 12, 13}
    assert instance.evict(0, 50, ANY_HERE) == 5
    assert instance.store.tries == [[(10, 1), (14, 1)]]
    assert instance.store.pages == {10: content(10), 14: content(14)}
    assert instance.states(10, 5) == [AWAY] * 5 and instance.memory.pages_in_it() == 0
    assert instance.figure(l.EVICTED_DIRTY) == 2 and instance.figure(l.EVICTED_CLEAN) == 3
    assert instance.figure(l.SENT) == 2 * PAGE_SIZE


@pytest.fixture
def null():
    with open(os.devnull, "wb") as file:
        yield file.fileno()


@pytest.mark.parametrize("most", [PAGE_SIZE, 1 << 20], ids=["interrupted", "at once"])
def test_pages_that_are_all_clean_leave_without_being_read(make, monkeypatch, null, most):
    instance = make()
    instance.lpet._null = null
    instance.come((10, 3), (20, 1))
    instance.pagemap.clean |= {10, 11, 12, 20}
    splice = os.splice

    def splice_some(src, dst, count, **options):  # as where a signal comes
        return splice(src, dst, min(count, most), **options)

    monkeypatch.setattr(os, "splice", splice_some)
    monkeypatch.setattr(os, "readv", None)
    assert instance.evict(0, 50, ANY_HERE) == 4
    assert instance.pipe_is_empty() and instance.memory.pages_in_it() == 0
    assert instance.store.tries == [[]] and instance.figure(l.EVICTED_CLEAN) == 4


def test_the_store_gets_what_was_written_last_before_the_page_left_the_page_table(
    make, monkeypatch
):
    instance = make()
    instance.come((10, 2))

    def punch_hole(*arguments):
        instance.memory.write(11, version=7)  # by a thread of the application
        u.punch_hole(*arguments)

    monkeypatch.setattr(lpet_module, "punch_hole", punch_hole)
    instance.evict(0, 50, ANY_HERE)
    assert instance.store.pages == {10: content(10), 11: content(11, version=7)}


def test_the_marks_are_read_after_the_pages_have_left_the_page_table(make):
    instance = make()
    instance.come((10, 2))
    there = []
    real = instance.pagemap.find

    def find(page, chosen, which):
        assert which is WRITTEN
        there.append((absent(instance, 10, 2), instance.memory.pages_in_it()))
        return real(page, chosen, which)

    instance.pagemap.find = find
    instance.evict(0, 50, ANY_HERE)
    assert there == [({10, 11}, 0)]


@pytest.mark.parametrize("refused", [False, True])
def test_faults_that_came_meanwhile_are_woken_when_the_page_is_away_or_here_again(make, refused):
    instance = make()
    instance.come((10, 3), (15, 1))
    instance.store.refuses = lambda runs: refused

    def fault():
        assert instance.lspt.expect(12) == LEAVING
        assert instance.lspt.expect(14) == LEAVING, "a hole"
        assert instance.uffd.woken == set()

    instance.store.meanwhile = fault
    instance.evict(0, 50, ANY_HERE)
    assert instance.uffd.woken == {*range(10, 16)}
    assert instance.states(12, 3) == [HERE if refused else AWAY, NEW, NEW]


# ---------------------------------------------------------------- refusals


def test_what_the_store_refuses_is_here_again_with_its_bytes(make):
    instance = make()
    instance.come((10, 3), (15, 3))
    instance.store.refuses = refuse_all
    assert instance.evict(0, 50, ANY_HERE) == 0
    assert instance.here() == [10, 11, 12, 15, 16, 17] and instance.memory.pages_in_it() == 6
    assert all(instance.memory.read(page) == content(page) for page in instance.here())
    assert instance.states(13, 2) == [NEW, NEW]
    assert instance.figure(l.REFUSED) == 6 and instance.figure(l.RESIDENT) == 6
    assert instance.figure(l.EVICTED_DIRTY) == instance.figure(l.SENT) == 0
    instance.store.refuses = refuse_nothing
    assert instance.evict(0, 50, ANY_HERE) == 6
    assert instance.store.pages == {p: content(p) for p in (10, 11, 12, 15, 16, 17)}


@pytest.mark.parametrize("runs", [False, True])
def test_clean_pages_that_the_store_does_not_let_go_are_here_with_their_bytes(make, null, runs):
    instance = make()
    instance.lpet._null = null if runs else 0
    instance.come((10, 3), (15, 3))
    instance.pagemap.clean |= {10, 11, 12, 15, 16, 17}
    instance.store.refuses = lambda runs: not runs  # as where the DMS can't be asked
    assert instance.evict(0, 50, ANY_HERE) == 0
    assert instance.here() == [10, 11, 12, 15, 16, 17] and instance.pipe_is_empty()
    assert all(instance.memory.read(page) == content(page) for page in instance.here())


def sizes(instance):
    return [sum(count for _, count in runs) for runs in instance.store.tries]


def test_after_a_refusal_pages_leave_one_by_one_as_far_as_they_fit_and_then_in_batches(make, clock):
    instance = make(low=32, batch=16)
    instance.come((0, 64))
    room = 5

    def refuses(runs):
        return sum(count for _, count in runs) > room - len(instance.store.pages)

    instance.store.refuses = refuses
    assert instance.evict_once() == [] and sizes(instance) == [16]
    clock.now += 1.5 * lpet_module.REST
    assert instance.evict_once() == [0, 1, 2, 3, 4], "the last one that fits, too"
    assert sizes(instance)[1:7] == [1] * 6
    instance.store.tries.clear()
    room = 100
    clock.now += lpet_module.GRACE + lpet_module.REST
    assert len(instance.evict_once()) == 27 and sizes(instance)[:1] == [16]
    assert all(instance.store.pages[page] == content(page) for page in instance.gone)


@pytest.mark.parametrize("high", [64, 2 * SMALL])
def test_a_fault_gets_room_as_long_as_any_page_fits_also_if_those_that_are_due_do_not(
    make, clock, high
):
    instance = make(pages=2 * high, high=high, low=high - 4, batch=16)
    instance.lpet._tracker = FakeTracker()
    instance.come((0, high))
    instance.make_of(instance.lspt.generation() + l.LONGER, 0, high)  # they came back soon
    instance.make_of(instance.lspt.generation() - 2, 20, 1)  # this one is due
    has_a_place = {17, high - 9}
    instance.store.refuses = lambda runs: not {*pages_in(runs)} <= has_a_place
    gone = []
    for page in (high, high + 1):
        assert instance.lspt.expect(page) is None
        for _ in range(5):
            gone += instance.evict_once()
            clock.now += lpet_module.REST
        assert instance.lspt.expect(page) is not None
        has_a_place.discard(gone[0])
    assert sorted(gone) == [17, high - 9]


def test_a_page_that_does_not_fit_is_tried_once_a_rest_while_no_fault_waits(make, clock):
    instance = make(low=32, batch=16)
    instance.come((0, 64))
    instance.store.refuses = refuse_all
    for tries in range(1, 6):
        assert instance.evict_once() == [] and instance.evict_once() == []
        assert len([runs for runs in instance.store.tries if runs]) == tries
        clock.now += lpet_module.REST


def test_while_the_store_refuses_only_clean_pages_leave_and_then_it_is_tried_again(make, clock):
    instance = make(low=32, batch=16)
    instance.come((0, 64))
    instance.lpet._tracker = FakeTracker()
    instance.store.refuses = refuse_all
    assert instance.evict_once() == [] and len(instance.store.tries) == 1
    instance.pagemap.clean |= {3, 20, 21, 63}
    gone = instance.evict_once() + instance.evict_once()
    assert sorted(gone) == [3, 20, 21, 63]
    assert not any(instance.store.tries[1:])
    assert instance.lpet._again_at == clock.now + lpet_module.REST
    instance.store.refuses = refuse_nothing
    assert instance.evict_once() == []
    clock.now += lpet_module.REST
    assert len(instance.evict_once()) == 28


def test_all_clean_pages_that_are_due_are_looked_at_in_the_turn_in_which_the_store_refuses(
    make, clock
):
    instance = make(low=32, batch=16)
    instance.come((0, 64))
    instance.lpet._tracker = FakeTracker()
    instance.lpet._again_at = clock.now  # it has refused before
    instance.pagemap.clean |= set(range(8, 32))
    instance.store.refuses = refuse_all
    assert sorted(instance.evict_once()) == list(range(8, 32))


def start(call):
    """In a thread; returns it and the list that gets what it returns, or the OSError that it raises."""
    ended = []

    def body():
        try:
            ended.append(call())
        except OSError as error:
            ended.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread, ended


def test_when_grace_is_over_lpet_ends_with_the_stores_reason(make, monkeypatch):
    monkeypatch.setattr(lpet_module, "GRACE", 0.3)
    instance = make(high=8, batch=4)
    instance.come((0, 8))
    instance.store.refuses = refuse_all
    assert instance.lspt.expect(20) is None
    began = time.monotonic()
    thread, ended = start(instance.lpet.run)
    thread.join(10)
    assert time.monotonic() - began > 0.3
    assert isinstance(ended[0], OSError) and ended[0].errno == errno.ENOSPC
    assert "no room on this disk" in ended[0].strerror
    assert instance.here() == list(range(8))
    assert all(instance.memory.read(page) == content(page) for page in range(8))


def test_refusals_end_nothing_while_no_fault_waits(make, clock):
    instance = make(high=8, batch=4)
    instance.come((0, 8))
    instance.store.refuses = refuse_all
    for _ in range(3):
        clock.now += 2 * lpet_module.GRACE
        assert instance.evict_once() == []
    instance.lspt.expect(20)
    instance.may_try_again()
    assert instance.evict_once() == [], "grace begins"
    clock.now += 1.1 * lpet_module.GRACE
    with pytest.raises(OSError, match="no room on this disk"):
        instance.evict_once()
    assert instance.here() == list(range(8)) and instance.figure(l.REFUSED) > 4


def want_room(instance):
    """As the DM-Handler does for advice."""
    with instance.lspt.lock:
        instance.lspt.want_room()


def test_advice_that_finds_no_room_never_ends_the_job_and_a_fault_that_does_has_grace(make, clock):
    instance = make(high=8, batch=4)
    instance.come((0, 8))
    instance.lspt.found_on_disk(20, 2)
    instance.store.refuses = refuse_all
    for _ in range(3):
        want_room(instance)
        clock.now += 2 * lpet_module.GRACE
        assert instance.evict_once() == []
    instance.lspt.expect(21)
    instance.may_try_again()
    assert instance.evict_once() == [], "grace begins"
    for _ in range(3):  # the fault and the advice try again
        clock.now += lpet_module.GRACE / 3 + 0.1
        want_room(instance)
        assert instance.lspt.expect(21) is None
    with pytest.raises(OSError, match="no room on this disk"):
        instance.evict_once()


@pytest.mark.parametrize("how", ["evicted", "freed"])
def test_grace_begins_anew_when_a_fault_has_got_its_room(make, clock, how):
    instance = make(high=8, batch=4)
    instance.come((0, 8))
    instance.lpet._tracker = FakeTracker()
    instance.store.refuses = refuse_all
    instance.lspt.expect(20)
    instance.evict_once()
    clock.now += 0.9 * lpet_module.GRACE
    assert instance.evict_once() == []
    if how == "evicted":
        instance.pagemap.clean.add(7)
        assert instance.evict_once() == [7]
    else:
        instance.lspt.freed(instance.lspt.claim(7, 1, l.SETTLED))
    instance.come((20, 1))
    clock.now += 100  # LPET sleeps
    instance.lspt.expect(21)
    assert instance.evict_once() == [], "it has not waited yet"
    clock.now += 1.1 * lpet_module.GRACE
    with pytest.raises(OSError, match="no room on this disk"):
        instance.evict_once()


def test_a_refusal_that_took_long_does_not_end_the_job_at_once(make, clock):
    instance = make(high=8, batch=8)
    instance.store.refuses = refuse_all

    def stall():
        clock.now += 2 * lpet_module.GRACE

    for _ in range(2):
        instance.come((0, 8))
        instance.lspt.expect(20)
        instance.store.refuses, instance.store.meanwhile = refuse_all, stall
        assert instance.evict_once() == []
        instance.store.refuses, instance.store.meanwhile = refuse_nothing, lambda: None
        instance.may_try_again()
        assert len(instance.evict_once()) == 8


def test_lpet_evicts_when_it_is_woken_and_ends_when_it_is_told_to(make):
    instance = make(high=8, low=4, batch=4)
    instance.come((0, 8))
    thread, ended = start(instance.lpet.run)
    assert instance.lspt.expect(20) is None
    wait_for(lambda: not instance.lspt.figures[l.ROOM_WANTED] and len(instance.here()) == 4)
    assert thread.is_alive() and len(instance.store.pages) == 4
    instance.lspt.stop()
    thread.join(10)
    assert ended == [None]


# ---------------------------------------------------------------- which pages: by age


@pytest.fixture
def large(make):
    """With more than SMALL pages, so that the clock decides; every page old enough to leave."""
    instance = make(pages=4096, high=2048, low=1900, batch=64)
    instance.come((0, 2000))
    instance.lspt.figures[l.FETCHED] += 3 * instance.lspt.quarter
    return instance


def test_lpet_evicts_until_the_low_threshold_and_the_clock_goes_on_where_it_stopped(large):
    assert large.evict_once() == list(range(128)), "100 were needed; 64 leave at a step"
    assert large.figure(l.RESIDENT) == 1872
    large.come((3000, 60))
    assert large.evict_once() == list(range(128, 192))
    large.come((0, 128))  # behind the hand, and of today
    assert large.evict_once() == list(range(192, 192 + 128))


def test_the_clock_goes_round(large):
    large.lpet._hand = 1950
    assert large.evict_once() == [*range(1950, 2000), *range(64)]
    assert large.memory.pages_in_it() == large.figure(l.RESIDENT) == 1886


def test_old_pages_leave_before_younger_ones_wherever_the_hand_is(large):
    now = large.lspt.generation()
    large.make_of(now, 0, 1900)
    large.make_of(now - AGE, 1900, 100)
    large.lspt.low = 1900
    assert large.evict_once() == list(range(1900, 2000)), "those that came before"
    large.lspt.low = 1800
    assert set(large.evict_once()) <= set(range(1900)), "and at last those of today"
    assert large.figure(l.RESIDENT) <= 1800


def test_pages_that_came_back_soon_leave_last(large):
    now = large.lspt.generation()
    large.make_of(now + l.LONGER, 100, 1800)
    large.make_of(now, 1900, 50)
    large.lspt.low = 1850
    others = [*range(100), *range(1900, 2000)]
    assert {*large.evict_once()} <= {*others}, "of old ones and those of today there were enough"
    large.lspt.low = 1700
    gone = large.evict_once()
    assert len(gone) >= 150 and {*others} & {*large.here()} == set()


def test_a_table_that_is_used_all_the_time_stays_while_other_pages_pass_once(make):
    instance = make(pages=40_000, high=2048, low=1900, batch=256)
    lspt, table, dice = instance.lspt, range(20_000, 20_000 + 1700), random.Random(3)
    fetched = dict.fromkeys(("table", "others"), 0)

    def touch(page, kind):
        if (state := lspt.expect(page)) is None:
            instance.evict_once()
            state = lspt.expect(page)
        if state < LOST:
            os.pwrite(instance.memory.memfd, b".", page * PAGE_SIZE)
            lspt.arrived(range(page, page + 1), state)
            fetched[kind] += 1

    for passing in range(8_000):
        touch(passing, "others")
        for _ in range(10):
            touch(dice.choice(table), "table")
    assert fetched["others"] == 8_000
    assert fetched["table"] < 4 * len(table), (
        "without a generation to come it is fetched seven times"
    )


def test_a_generation_in_which_the_clock_has_gone_round_has_no_old_pages_left(large, monkeypatch):
    now, ages = large.lspt.generation(), []
    older_than = large.lspt.older_than
    monkeypatch.setattr(large.lspt, "older_than", lambda age: ages.append(age) or older_than(age))
    large.make_of(now, 0, 1990)
    large.lspt.low = 1980
    assert {*range(1990, 2000)} <= {*large.evict_once()} and {*ages} == {AGE, 0}
    for later, expected in ((0, {0}), (1, {AGE})):
        large.lspt.figures[l.FETCHED] += later * large.lspt.quarter
        large.lspt.low = large.figure(l.RESIDENT) - 20
        ages.clear()
        assert large.evict_once() and {*ages} == expected


def test_neighbours_leave_together_and_younger_pages_between_them_stay(large):
    now = large.lspt.generation()
    for page in (5, 40):
        large.make_of(now, page, 1)
    large.lspt.low = 1999 - 64
    assert large.evict_once() == [p for p in range(128) if p not in (5, 40)][:126]
    assert large.store.tries[0] == [(0, 5), (6, 34), (41, 23)]
    assert large.lspt.state[5] == large.lspt.state[40] == HERE + now


def test_pages_that_the_idle_bitmap_says_were_used_are_passed_and_marked(large):
    tracker = large.lpet._tracker = FakeBitmap()
    tracker.idle_pages = set(range(2000)) - {3, 4, 100}
    gone = large.evict_once()
    assert gone == [p for p in range(128) if p not in (3, 4, 100)]
    assert tracker.marked == [3, 4, 100]
    assert large.states(3, 2) == [HERE] * 2, "they are as old as before"
    tracker.idle_pages = set()
    large.lspt.low = 0
    large.lspt.stop()
    assert large.evict_once() == [], "all the others of the next step are in use"


def test_if_all_pages_are_in_use_they_leave_nevertheless(large):
    large.lpet._tracker = FakeBitmap()
    assert len(large.evict_once()) >= 100
    assert large.figure(l.RESIDENT) <= 1900


def test_pages_that_are_coming_or_in_other_hands_are_no_business_of_lpets(large):
    large.lspt.state[30] = COMING
    theirs = large.lspt.claim(10, 20, ANY_HERE)
    assert set(large.evict_once()).isdisjoint(range(10, 31))
    assert all(large.memory.read(page) == content(page) for page in range(10, 30))
    assert large.states(10, 21) == [LEAVING] * 20 + [COMING]
    large.lspt.stays(theirs)


@pytest.mark.parametrize("high", [64, 2048])
@pytest.mark.parametrize("here", [40, 50])
def test_nothing_leaves_when_it_is_woken_without_need(make, high, here):
    instance = make(pages=4096, high=high, low=50, batch=16)
    instance.come((0, here))
    instance.lspt.figures[l.FETCHED] += 3 * instance.lspt.quarter
    tracker = instance.lpet._tracker = FakeTracker()
    tracker.idle_pages = set(range(here))
    thread, ended = start(instance.lpet.run)
    os.eventfd_write(instance.lspt.for_lpet, 1)
    thread.join(0.05)
    assert thread.is_alive() and instance.gone == tracker.marked == []
    instance.lspt.stop()
    thread.join(10)
    assert ended == [None]


# ---------------------------------------------------------------- which pages: the wiki's algorithm


def test_a_small_tables_idle_pages_leave_first_and_the_others_are_marked_and_passed(make):
    instance = make(high=16, low=12)
    instance.come((0, 16))
    tracker = instance.lpet._tracker = FakeTracker()
    tracker.idle_pages = {3, 9, 10, 14, 15}
    assert instance.evict_once() == [3, 9, 10, 14]
    assert sorted(tracker.marked) == [p for p in range(14) if p not in (3, 9, 10)]
    assert instance.here() == [p for p in range(16) if p not in (3, 9, 10, 14)]


def test_the_hand_goes_on_behind_the_last_page_that_was_asked(make):
    instance = make(high=16, low=12)
    instance.come((0, 16))
    tracker = instance.lpet._tracker = FakeTracker()
    tracker.idle_pages = {0, 1, 2, 5, 8, 15}
    assert instance.evict_once() == [0, 1, 2, 5]
    instance.come((20, 4))
    tracker.marked.clear()
    tracker.idle_pages |= {21, 22}
    assert instance.evict_once() == [8, 15, 21, 22], "from page 6 on"
    assert sorted(tracker.marked) == [6, 7, 9, 10, 11, 12, 13, 14, 20]
    instance.come((24, 4))
    tracker.idle_pages = {3, 4, 23}
    tracker.marked.clear()
    assert instance.evict_once() == [23, 3, 4, 24], "round, and then in order: 24 is passed first"


def test_when_every_page_was_passed_they_leave_in_the_order_of_the_hand(make):
    instance = make(high=16, low=12)
    instance.come((0, 16))
    tracker = instance.lpet._tracker = FakeTracker()
    tracker.idle_pages = {6, 12}
    assert instance.evict_once() == [6, 12, 0, 1], "the idle ones, and the first that were passed"
    assert sorted(tracker.marked) == [p for p in range(16) if p not in (6, 12)]
    instance.come((0, 2), (6, 1), (12, 1))
    tracker.idle_pages = set()
    assert instance.evict_once() == [2, 3, 4, 5]
    instance.come((2, 4))
    assert instance.evict_once() == [6, 7, 8, 9]


def test_small_means_at_most_small_pages(make):
    for high, asked in ((SMALL, True), (SMALL + 1, False)):
        instance = make(pages=2000, high=high, low=high - 10)
        instance.come((0, high))
        tracker = instance.lpet._tracker = FakeTracker()
        instance.evict_once()
        assert bool(tracker.marked) == asked


def test_an_unmapped_page_is_idle_until_it_is_touched_and_keeps_its_bytes(make):
    instance = make(high=8, low=4)
    instance.come((0, 8))
    assert instance.evict_once() == [0, 1, 2, 3], "all were in use: in order"
    assert absent(instance, 4, 4) == {4, 5, 6, 7}, "and the others are marked"
    assert instance.memory.pages_in_it() == 4
    # A read would map the neighbours too (fault-around), as this memory has no marks.
    instance.memory.map[4 * PAGE_SIZE] = content(4)[0]
    instance.memory.write(5, version=1)
    instance.come((0, 4))
    instance.lspt.low = 6
    assert instance.evict_once() == [6, 7]
    instance.lspt.low = 4
    instance.lpet._tracker = FakeTracker()
    assert instance.evict_once() == [0, 1]
    instance.lspt.low = 0
    assert instance.evict_once() == [2, 3, 4, 5]
    assert instance.store.pages == {p: content(p, version=1 if p == 5 else 0) for p in range(8)}


def test_who_touches_a_page_while_it_is_being_marked_is_woken(make):
    instance = make()
    instance.come((10, 2))
    real = instance.lpet._put_back

    def put_back(*arguments):
        assert instance.lspt.expect(11) == LEAVING
        real(*arguments)

    instance.lpet._put_back = put_back
    instance.lpet._tracker.mark_idle(10, b"\xff\xff")
    assert instance.uffd.woken == {10, 11}
    assert instance.here() == [10, 11] and absent(instance, 10, 2) == {10, 11}
    assert [instance.memory.read(page) for page in (10, 11)] == [content(10), content(11)]


# ---------------------------------------------------------------- storing


def test_storing_sends_the_dirty_pages_and_keeps_them(make):
    instance = make(batch=4)
    instance.come((10, 7), (40, 1))
    instance.pagemap.clean |= {12, 40}
    assert instance.lpet.store(track_clean=False) == 6
    assert instance.store.pages == {p: content(p) for p in (10, 11, 13, 14, 15, 16)}
    assert all(instance.store.stayed) and instance.gone == []
    assert instance.here() == [*range(10, 17), 40] and instance.memory.pages_in_it() == 8
    assert all(instance.memory.read(page) == content(page) for page in instance.here())
    assert instance.figure(l.SENT) == 6 * PAGE_SIZE
    assert instance.figure(l.EVICTED_DIRTY) == 0 and instance.uffd.protected == []
    assert instance.pipe_is_empty()


def test_bytes_that_cant_be_read_are_not_stored(make, monkeypatch):
    instance = make()
    instance.come((10, 3))
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: len(parts[0]) - PAGE_SIZE)
    with pytest.raises(OSError, match="can't be read"):
        instance.lpet.store(False)
    assert instance.store.pages == {} and instance.here() == [10, 11, 12]


def test_nothing_that_was_written_asks_nothing_of_the_store(make):
    instance = make()
    assert instance.lpet.store(track_clean=True) == 0
    instance.come((10, 2))
    instance.pagemap.clean |= {10, 11}
    assert instance.lpet.store(track_clean=True) == 0
    assert instance.store.tries == []


def test_pages_are_marked_before_their_bytes_are_read(make):
    instance = make()
    instance.come((10, 2), (15, 1))
    instance.pagemap.clean.add(11)
    real = instance.uffd.writeprotect

    def writeprotect(*arguments):
        instance.memory.write(10 if not instance.uffd.protected else 15, version=1)
        real(*arguments)

    instance.uffd.writeprotect = writeprotect
    instance.lpet.store(track_clean=True)
    assert instance.uffd.protected == [(10, 1, True), (15, 1, True)]
    assert instance.store.pages == {page: content(page, version=1) for page in (10, 15)}


def test_what_the_store_refuses_to_store_is_here_and_counts_as_written(make):
    instance = make(batch=4)
    instance.come((8, 2), (11, 1))
    instance.store.refuses = refuse_all
    with pytest.raises(OSError, match="no room on this disk") as caught:
        instance.lpet.store(track_clean=True)
    assert caught.value.errno == errno.ENOSPC
    both = (8, 2), (11, 1)
    assert instance.uffd.protected == [(*run, mark) for mark in (True, False) for run in both]
    assert instance.here() == [8, 9, 11] and instance.figure(l.SENT) == 0
    instance.store.refuses = refuse_nothing
    assert instance.lpet.store(track_clean=True) == 3
    assert instance.store.pages == {page: content(page) for page in (8, 9, 11)}


def test_forgetting_ends_with_the_application(make):
    instance = make()
    instance.come((10, 3))
    instance.lspt.stop()
    instance.lpet.forget([(0, 64)])
    assert instance.here() == [10, 11, 12] and instance.store.tries == []


@pytest.mark.parametrize("what", ["forget", "store"])
def test_after_forgets_that_were_refused_as_much_is_tried_at_once_as_before(make, what):
    instance = make(batch=16)
    instance.come((0, 64))
    instance.store.refuses = refuse_all
    for _ in range(6):
        instance.lpet.forget([(0, 64)])
    instance.store.refuses = refuse_nothing
    instance.store.tries.clear()
    instance.may_try_again()
    if what == "forget":
        instance.lpet.forget([(0, 64)])
    else:
        instance.lpet.store(track_clean=False)
    assert sizes(instance) == [16] * 4


def test_forgetting_waits_for_pages_that_are_coming(make):
    instance = make()
    instance.come((10, 3))
    instance.lspt.expect(11 + 2)
    thread, _ = start(lambda: instance.lpet.forget([(8, 8)]))
    thread.join(0.02)
    assert thread.is_alive()
    instance.memory.write(13)
    instance.lspt.arrived(range(13, 14))
    thread.join(10)
    assert not thread.is_alive() and instance.here() == []
    instance.lspt.expect(20)
    thread, _ = start(lambda: instance.lpet.forget([(16, 8)]))
    instance.lspt.stop()
    thread.join(10)
    assert not thread.is_alive(), "the space has ended"


@pytest.mark.parametrize("how", ["installed", "refused", "evicted"])
def test_storing_waits_for_pages_that_somebody_else_has_in_hand(make, how):
    instance = make()
    instance.come((10, 3))
    if how == "installed":
        instance.lspt.expect(20)
    else:
        theirs = instance.lspt.claim(10, 1, ANY_HERE)
    thread, stored = start(lambda: instance.lpet.store(False))
    wait_for(lambda: instance.store.pages)
    thread.join(0.02)
    assert thread.is_alive(), "the others are stored; this one is waited for"
    if how == "installed":
        instance.memory.write(20)
        instance.lspt.arrived(range(20, 21))
        expected = {10, 11, 12, 20}
    elif how == "refused":
        instance.lspt.stays(theirs)
        expected = {10, 11, 12}
    else:
        instance.lspt.gone(theirs)
        expected = {11, 12}  # who evicted it has stored it
    thread.join(10)
    assert stored == [len(expected)] and instance.store.pages.keys() == expected
    assert all(instance.store.pages[page] == content(page) for page in expected)


def test_storing_waits_for_a_page_that_lpet_takes_at_that_moment(make):
    instance = make()
    instance.come((10, 2))
    lspt = instance.lspt
    theirs = lpet_is_first(lspt, 11, 1)
    thread, stored = start(lambda: instance.lpet.store(False))
    wait_for(lambda: instance.store.pages)
    thread.join(0.02)
    assert thread.is_alive() and theirs
    lspt.stays(*theirs)
    thread.join(10)
    assert stored == [2] and instance.store.pages == {10: content(10), 11: content(11)}


@pytest.mark.parametrize("theirs", [COMING, LEAVING])
def test_storing_does_not_wait_when_everything_has_ended_but_misses_no_page(make, theirs):
    instance = make()
    instance.come((20, 1))
    instance.lspt.state[20] = theirs
    instance.lspt.stop()
    if theirs == COMING:  # the store has it
        assert instance.lpet.store(False) == 0
    else:
        with pytest.raises(OSError, match="LPET has ended in the midst"):
            instance.lpet.store(False)


@pytest.mark.parametrize("kept", [True, False])
def test_when_the_application_ends_storing_goes_on_if_the_disk_is_kept(make, kept):
    instance = make()
    instance.come((10, 1), (40, 1))  # in two batches
    instance.store.kept, instance.store.meanwhile = kept, instance.lspt.stop
    assert instance.lpet.store(False) == (2 if kept else 1)
    assert [*instance.store.pages] == ([10, 40] if kept else [10])


@pytest.mark.parametrize("lpet_ends", [True, False])
def test_no_page_is_missed_that_lpet_has_when_the_application_ends(make, monkeypatch, lpet_ends):
    instance = make()
    instance.come((10, 2))
    theirs = instance.lspt.claim(11, 1, ANY_HERE)

    def sleep(seconds):  # storing waits for page 11
        if lpet_ends:
            instance.lspt.stays(theirs)
        instance.lspt.stop()

    monkeypatch.setattr(time, "sleep", sleep)
    if lpet_ends:
        assert instance.lpet.store(False) == 2
        assert instance.store.pages == {page: content(page) for page in (10, 11)}
    else:
        with pytest.raises(OSError, match="LPET has ended in the midst"):
            instance.lpet.store(False)


@pytest.fixture
def registered(make):
    """The memory is registered, and its pages have the page table's real marks."""
    if u.UFFD_FEATURE_WP_HUGETLBFS_SHMEM & ~supported_features() or not (
        supported_features() & u.UFFD_FEATURE_WP_ASYNC
    ):
        pytest.skip("this kernel has no asynchronous write-protection (Linux 6.7)")
    instance = make()
    fd, _ = u.open_userfaultfd()
    uffd = u.Userfaultfd(fd)
    uffd.api(u.NEEDED_FEATURES | u.UFFD_FEATURE_WP_HUGETLBFS_SHMEM | u.UFFD_FEATURE_WP_ASYNC)
    uffd.register(instance.memory.address, 100 * PAGE_SIZE)
    instance.lpet._uffd = instance.lspt.uffd = uffd
    instance.lpet._pagemap = Pagemap(instance.pagemap_fd, instance.memory.address)
    instance.install = lambda page, mark: install(instance, uffd, page, mark)
    yield instance
    os.close(fd)


def install(instance, uffd, page, mark):
    """As the DM-Handler does. A missing page must not be touched here: nobody would bring it."""
    instance.lspt.expect(page)
    source = ctypes.create_string_buffer(content(page), PAGE_SIZE)
    address = instance.memory.address + page * PAGE_SIZE
    uffd.copy(address, ctypes.addressof(source), PAGE_SIZE, mark)
    instance.lspt.arrived(range(page, page + 1))


@needs_userfaultfd
def test_pages_that_were_only_read_leave_without_their_bytes(registered):
    for page in range(10, 14):
        registered.install(page, page != 13)  # this one was brought by a write
    assert registered.memory.read(10) == content(10)
    registered.memory.write(11, version=1)
    assert registered.evict(0, 50, NO_HOLES) == 4
    assert registered.store.tries == [[(11, 1), (13, 1)]]
    assert registered.store.pages == {11: content(11, version=1), 13: content(13)}
    assert registered.memory.pages_in_it() == 0


@needs_userfaultfd
def test_a_page_is_stored_once_for_each_time_that_it_was_written(registered):
    for page in (10, 11, 12):
        registered.install(page, False)
    assert registered.lpet.store(track_clean=True) == 3
    assert registered.lpet.store(track_clean=True) == 0
    registered.memory.write(11, version=1)
    assert registered.lpet.store(track_clean=True) == 1
    assert registered.store.pages[11] == content(11, version=1)
    registered.store.meanwhile = lambda: registered.memory.write(12, version=3)
    registered.memory.write(12, version=2)
    assert registered.lpet.store(track_clean=True) == 1
    registered.store.meanwhile = lambda: None
    assert registered.lpet.store(track_clean=True) == 1, "it was written in the midst of it"
    assert registered.store.pages[12] == content(12, version=3)
    assert registered.evict(0, 50, ANY_HERE) == 3
    assert registered.store.tries[-1] == [], "no byte of them"


@needs_userfaultfd
def test_what_the_store_refused_is_stored_the_next_time(registered):
    for page in (10, 11):
        registered.install(page, False)
    registered.store.refuses = refuse_all
    with pytest.raises(OSError, match="no room"):
        registered.lpet.store(track_clean=True)
    registered.store.refuses = refuse_nothing
    assert registered.lpet.store(track_clean=True) == 2
    registered.memory.write(11, version=1)
    registered.store.refuses = refuse_all
    assert registered.evict(0, 50, ANY_HERE) == 0
    registered.store.refuses = refuse_nothing
    assert registered.evict(0, 50, ANY_HERE) == 2
    assert registered.store.tries[-2:] == [[(11, 1)]] * 2, "a refusal leaves the marks as they were"
    assert registered.store.pages == {10: content(10), 11: content(11, version=1)}


@needs_userfaultfd
def test_unmapping_a_page_to_see_whether_it_is_used_does_not_make_it_written_or_clean(registered):
    for page in (10, 11, 12):
        registered.install(page, page != 11)
    registered.lpet._tracker.mark_idle(10, b"\xff\xff\xff")
    assert registered.lpet._tracker.used(10, b"\xff\xff\xff") == b"\0\0\0"
    assert registered.memory.read(10) == content(10)
    registered.memory.write(12, version=1)
    assert registered.lpet._tracker.used(10, b"\xff\xff\xff") == b"\xff\0\xff"
    assert registered.evict(0, 50, ANY_HERE) == 3
    assert registered.store.tries == [[(11, 2)]]
    assert registered.store.pages == {11: content(11), 12: content(12, version=1)}
