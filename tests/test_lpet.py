"""lpet.py: what an eviction does to memory, table and store; which pages leave; refusals; storing.

The memory is a memfd of this process, which is "the application" too. Only where a test needs the
page table's marks is it registered with a userfaultfd.
"""

import ctypes
import errno
import mmap
import os
import random
import threading
import time

import pytest
from conftest import needs_userfaultfd

from edm import lpet as lpet_module
from edm import lspt as l
from edm import uffd_ctypes as u
from edm.lpet import Lpet, PagePipe
from edm.lspt import ANY_HERE, AWAY, HERE, LEAVING, LSPT, NEW, NO_HOLES, SMALL, runs_of
from edm.page_idle import BitmapTracker, Pagemap, UnmapTracker, pages_in
from edm.uffd_ctypes import PAGE_SIZE


def content(page, version=0):
    """The bytes of a page: no two pages or versions are alike."""
    return random.Random(1000 * page + version).randbytes(64) * (PAGE_SIZE // 64)


def read_pages(pipe, count):
    """So many pages out of a pipe, which must have them."""
    os.set_blocking(pipe, False)
    pages = []
    try:
        for _ in range(count):
            page = b""
            while len(page) < PAGE_SIZE:
                page += os.read(pipe, PAGE_SIZE - len(page))
            pages.append(page)
    finally:
        os.set_blocking(pipe, True)
    return pages


def is_empty(pipe):
    try:
        read_pages(pipe, 1)
    except BlockingIOError:
        return True
    return False


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
    """Takes what is put out of the pipe, as a PageStore does, and records it; or refuses."""

    def __init__(self):
        self.tries = []  # the runs of every put
        self.pages = {}  # page: its bytes, of the dirty ones
        self.gone = []  # the pages of puts that were not refused, in order
        self.refuses = lambda runs: False
        self.takes_before = 0  # pages that it takes out of the pipe before it refuses
        self.stayed = []  # of every put: was it with stay?
        self.meanwhile = lambda: None  # called in the midst of a put

    def put(self, runs, pipe, stay=False):
        self.tries.append(list(runs))
        self.stayed.append(stay)
        self.meanwhile()
        if self.refuses(runs):
            read_pages(pipe, self.takes_before)
            raise OSError(errno.ENOSPC, "no room on this disk")
        for page, count, dirty in runs:
            contents = read_pages(pipe, count)
            if dirty:
                self.pages |= dict(zip(range(page, page + count), contents, strict=True))
            self.gone += range(page, page + count)


class FakePagemap:
    """Pages are clean if they are in `clean`; there is no other mark in this memory."""

    def __init__(self, real):
        self.clean = set()
        self.present, self.pfns = real.present, real.pfns

    def written(self, runs):
        kinds = [(page, page not in self.clean) for page in pages_in(runs)]
        found = []
        for dirty in (True, False):
            of_it = [page for page, is_dirty in kinds if is_dirty == dirty]
            found += [(page, count, dirty) for page, count in runs_of(of_it)]
        return sorted(found)


class FakeUffd:
    def __init__(self):
        self.woken = []  # addresses
        self.protected = []  # (address, length, protect)

    def wake(self, start, length):
        self.woken += range(start, start + length, PAGE_SIZE)

    def writeprotect(self, start, length, protect):
        self.protected.append((start, length, protect))


class FakeTracker:
    """Pages are idle if they are in idle_pages."""

    def __init__(self, name=UnmapTracker.name):
        self.name, self.idle_pages, self.marked = name, set(), []

    def idle(self, runs):
        return self.idle_pages.intersection(pages_in(runs))

    def mark(self, runs):
        self.marked += pages_in(runs)


class Instance:
    """An LPET with all that it needs, and what a DM-Handler does for it."""

    def __init__(self, pages=100, high=64, low=0, batch=16):
        self.memory = Memory(pages)
        self.lspt = LSPT(pages, high, low)
        self.store = Store()
        self.pagemap_fd = os.open("/proc/self/pagemap", os.O_RDONLY)
        self.pagemap = FakePagemap(Pagemap(self.pagemap_fd, self.memory.address))
        self.pagers_map = mmap.mmap(self.memory.memfd, pages * PAGE_SIZE)
        self.lpet = Lpet(
            self.lspt, self.store, self.pagers_map, self.memory.memfd, -1, self.pagemap,
            self.memory.address, batch, UnmapTracker.name,
        )  # fmt: skip
        self.uffd = self.lpet._uffd = FakeUffd()

    def come(self, *runs, version=0):
        """These pages are brought, and written."""
        for page in pages_in(runs):
            state, pages = self.lspt.expect(range(page, page + 1))
            assert len(pages) == 1, f"page {page} is {state}"
            self.memory.write(page, version)
            self.lspt.arrived(pages, NEW)

    def here(self):
        return list(pages_in(self.lspt.here()))

    def states(self, first, count):
        return list(self.lspt.state[first : first + count])

    def figure(self, which):
        return self.lspt.figures[which]

    def evict_once(self):
        """As LPET does when it is woken; which pages left, in order?"""
        before = len(self.store.gone)
        self.lpet._evict_until_low_threshold()
        return self.store.gone[before:]

    def may_try_again(self):
        """The rest after a refusal is over."""
        self.lpet._again_at = 0.0

    def close(self):
        self.lpet.close()
        self.lspt.close()
        os.close(self.pagemap_fd)
        self.memory.close()


@pytest.fixture
def make():
    made = []

    def make(**options):
        made.append(Instance(**options))
        return made[-1]

    yield make
    for instance in made:
        instance.close()


# ---------------------------------------------------------------- PagePipe


@pytest.fixture
def memory():
    memory = Memory(1000)
    yield memory
    memory.close()


@pytest.fixture
def pipe(memory):
    pipe = PagePipe(memory.memfd)
    yield pipe
    pipe.close()


def remove(memory, *runs):
    for page, count in runs:
        memory.map.madvise(mmap.MADV_REMOVE, page * PAGE_SIZE, count * PAGE_SIZE)


RUNS = [(3, 2), (7, 1), (900, 50)]


@pytest.fixture
def taken(memory, pipe):
    """RUNS have been taken, and are no longer in the memfd."""
    for page in pages_in(RUNS):
        memory.write(page)
    pipe.take(RUNS)
    remove(memory, *RUNS)
    assert memory.pages_in_it() == 0


def test_a_pipe_has_room_for_all_that_leaves_at_once(memory, pipe):
    assert pipe.capacity == u.PAGES_AT_ONCE
    runs = [(0, 200), (300, pipe.capacity - 200)]
    for page in pages_in(runs):
        memory.write(page)
    pipe.take(runs)
    pipe.keep()
    remove(memory, *runs)
    assert read_pages(pipe.out, pipe.capacity) == [content(page) for page in pages_in(runs)]
    pipe.put_back(runs)
    assert all(memory.read(page) == content(page) for page in pages_in(runs))


def test_what_is_taken_is_there_after_it_was_removed_from_the_memory(taken, pipe, memory):
    assert read_pages(pipe.out, 53) == [content(page) for page in pages_in(RUNS)]
    assert is_empty(pipe.out)
    assert memory.pages_in_it() == 0


def test_what_is_taken_is_the_page_itself_until_it_is_removed(memory, pipe):
    memory.write(5, version=1)
    pipe.take([(5, 1)])
    memory.write(5, version=2)  # by a writer that is left
    remove(memory, (5, 1))
    assert read_pages(pipe.out, 1) == [content(5, version=2)]


@pytest.mark.parametrize("read_before", [0, 1, 20, 53])
def test_what_is_kept_can_be_put_back_however_much_was_read(taken, pipe, memory, read_before):
    pipe.keep()
    read_pages(pipe.out, read_before)
    pipe.put_back(RUNS)
    assert [memory.read(page) for page in pages_in(RUNS)] == [content(p) for p in pages_in(RUNS)]
    assert memory.pages_in_it() == 53
    assert is_empty(pipe.out) and is_empty(pipe._spare_out)


def test_what_is_dropped_is_in_no_pipe_and_the_next_take_is_its_own(taken, pipe, memory):
    pipe.keep()
    read_pages(pipe.out, 53)
    pipe.drop()
    assert is_empty(pipe._spare_out)
    memory.write(1)
    pipe.take([(1, 1)])
    pipe.keep()
    assert read_pages(pipe.out, 1) == read_pages(pipe._spare_out, 1) == [content(1)]


@pytest.mark.parametrize("read_before", [0, 20, 53])
def test_clear_drops_everything_whether_it_was_read_or_not(taken, pipe, memory, read_before):
    read_pages(pipe.out, read_before)
    pipe.clear()
    assert is_empty(pipe.out)
    memory.write(1)
    pipe.take([(1, 1)])
    pipe.keep()
    pipe.clear()
    assert is_empty(pipe.out) and is_empty(pipe._spare_out)


def test_what_was_taken_returns_at_once(taken, pipe, memory):
    pipe.return_at_once(RUNS)
    assert [memory.read(page) for page in pages_in(RUNS)] == [content(p) for p in pages_in(RUNS)]
    assert memory.pages_in_it() == 53 and is_empty(pipe.out)


# ---------------------------------------------------------------- one eviction


def test_an_eviction_gives_the_store_the_bytes_and_leaves_neither_memory_nor_state(make):
    instance = make()
    instance.come((10, 3), (15, 2), (40, 1), (60, 1))
    assert instance.lpet._evict(0, 50, ANY_HERE) == 6
    assert instance.store.tries == [[(10, 3, True), (15, 2, True), (40, 1, True)]]
    assert instance.store.stayed == [False]
    assert instance.store.pages == {p: content(p) for p in (10, 11, 12, 15, 16, 40)}
    assert instance.states(10, 8) == [AWAY, AWAY, AWAY, NEW, NEW, AWAY, AWAY, NEW]
    assert instance.here() == [60] and instance.memory.pages_in_it() == 1
    assert instance.memory.read(60) == content(60)
    assert instance.figure(l.RESIDENT) == 1
    assert instance.figure(l.EVICTED_DIRTY) == 6 and instance.figure(l.EVICTED_CLEAN) == 0
    assert instance.figure(l.STORED_BYTES) == 6 * PAGE_SIZE
    assert instance.uffd.woken == []


def test_nothing_to_evict_asks_nothing_of_the_store(make):
    instance = make()
    instance.come((10, 1))
    assert instance.lpet._evict(11, 50, ANY_HERE) == 0
    assert instance.store.tries == [] and instance.here() == [10]


def test_clean_pages_leave_without_their_bytes(make):
    instance = make()
    instance.come((10, 5))
    instance.pagemap.clean |= {11, 12, 13}
    assert instance.lpet._evict(0, 50, ANY_HERE) == 5
    assert instance.store.tries == [[(10, 1, True), (11, 3, False), (14, 1, True)]]
    assert instance.store.pages == {10: content(10), 14: content(14)}
    assert instance.states(10, 5) == [AWAY] * 5 and instance.memory.pages_in_it() == 0
    assert instance.figure(l.EVICTED_DIRTY) == 2 and instance.figure(l.EVICTED_CLEAN) == 3
    assert instance.figure(l.STORED_BYTES) == 2 * PAGE_SIZE


def test_the_store_gets_what_was_written_last_before_the_page_left_the_page_table(make):
    instance = make()
    instance.come((10, 2))
    real = instance.lpet._pipe.take

    def take(runs):
        real(runs)
        instance.memory.write(11, version=7)  # by a thread of the application

    instance.lpet._pipe.take = take
    instance.lpet._evict(0, 50, ANY_HERE)
    assert instance.store.pages == {10: content(10), 11: content(11, version=7)}


def test_the_marks_are_read_after_the_pages_have_left_the_page_table(make):
    instance = make()
    instance.come((10, 2))
    present = []
    real = instance.pagemap.written

    def written(runs):
        present.append(instance.pagemap.present(10, 2) + [instance.memory.pages_in_it()])
        return real(runs)

    instance.pagemap.written = written
    instance.lpet._evict(0, 50, ANY_HERE)
    assert present == [[False, False, 0]]


def test_faults_that_came_meanwhile_are_woken_when_the_page_is_away(make):
    instance = make()
    instance.come((10, 3), (15, 1))

    def fault():
        assert instance.lspt.expect(range(12, 13)) == (LEAVING, range(0))
        assert instance.lspt.expect(range(14, 15)) == (LEAVING, range(0)), "a hole"
        assert instance.uffd.woken == []

    instance.store.meanwhile = fault
    instance.lpet._evict(0, 50, ANY_HERE)
    assert instance.uffd.woken == [instance.memory.address + page * PAGE_SIZE for page in (12, 14)]
    assert instance.states(12, 3) == [AWAY, NEW, NEW]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("takes_before", [0, 1, 4, 6])
def test_what_the_store_refuses_is_here_again_with_its_bytes(make, takes_before):
    instance = make()
    instance.come((10, 3), (15, 3))
    instance.store.refuses = lambda runs: True
    instance.store.takes_before = takes_before
    instance.store.meanwhile = lambda: instance.lspt.expect(range(16, 17))
    assert instance.lpet._evict(0, 50, ANY_HERE) == 0
    assert instance.here() == [10, 11, 12, 15, 16, 17] and instance.memory.pages_in_it() == 6
    assert all(instance.memory.read(page) == content(page) for page in instance.here())
    assert instance.states(13, 2) == [NEW, NEW]
    assert instance.uffd.woken == [instance.memory.address + 16 * PAGE_SIZE]
    assert instance.figure(l.REFUSED) == 6 and instance.figure(l.RESIDENT) == 6
    assert instance.figure(l.EVICTED_DIRTY) == instance.figure(l.STORED_BYTES) == 0
    instance.store.refuses = lambda runs: False
    instance.store.meanwhile = lambda: None
    assert instance.lpet._evict(0, 50, ANY_HERE) == 6, "nothing was left in a pipe"
    assert instance.store.pages == {p: content(p) for p in (10, 11, 12, 15, 16, 17)}


def sizes(instance):
    return [sum(count for _, count, _ in runs) for runs in instance.store.tries]


def test_each_refusal_halves_what_is_tried_next_and_each_success_doubles_it(make):
    instance = make(low=32, batch=16)
    instance.come((0, 64))
    instance.store.refuses = lambda runs: True
    for _ in range(6):
        instance.may_try_again()
        instance.lpet._evict_until_low_threshold()
    assert sizes(instance) == [16, 8, 4, 2, 1, 1] and len(instance.here()) == 64
    instance.store.refuses = lambda runs: False
    instance.store.tries.clear()
    instance.may_try_again()
    instance.lpet._evict_until_low_threshold()
    instance.lspt.low = 0
    instance.lpet._evict_until_low_threshold()
    assert sizes(instance) == [1, 2, 4, 8, 16, 1, 16, 16], "32 pages each time"
    assert instance.store.pages == {page: content(page) for page in range(64)}


def test_while_the_store_refuses_only_clean_pages_leave(make):
    instance = make(low=32, batch=16)
    instance.come((0, 64))
    instance.lpet._tracker = FakeTracker()
    instance.store.refuses = lambda runs: any(dirty for _, _, dirty in runs)
    assert instance.evict_once() == [] and len(instance.store.tries) == 1
    instance.pagemap.clean |= {3, 20, 21, 63}
    gone = instance.evict_once() + instance.evict_once()
    assert sorted(gone) == [3, 20, 21, 63]
    assert not any(dirty for runs in instance.store.tries[1:] for _, _, dirty in runs)
    assert 0 < instance.lpet._rest() <= lpet_module.LONGEST_REST


def test_all_clean_pages_that_are_due_are_looked_at_in_the_turn_in_which_the_store_refuses(make):
    instance = make(low=32, batch=16)
    instance.come((0, 64))
    instance.lpet._tracker = FakeTracker()
    instance.lpet._most = 8  # it has refused before
    instance.pagemap.clean |= set(range(8, 32))
    instance.store.refuses = lambda runs: any(dirty for _, _, dirty in runs)
    assert sorted(instance.evict_once()) == list(range(8, 32))


def test_the_rest_between_two_tries_grows_and_is_short_again_after_a_success(make):
    instance = make(low=32, batch=1)
    instance.come((0, 64))
    instance.store.refuses = lambda runs: True
    rests = []
    for _ in range(10):
        instance.may_try_again()
        instance.lpet._evict_until_low_threshold()
        rests.append(instance.lpet._rest())
    shortest, longest = lpet_module.SHORTEST_REST, lpet_module.LONGEST_REST
    assert rests[0] == pytest.approx(shortest, abs=0.01)
    assert rests[1] == pytest.approx(2 * shortest, abs=0.01)
    assert rests[-1] == pytest.approx(longest, abs=0.01) and max(rests) <= longest
    instance.store.refuses = lambda runs: False
    instance.may_try_again()
    instance.lpet._evict_until_low_threshold()
    assert instance.lpet._rest() == 0.0
    instance.come((64, 8))
    instance.store.refuses = lambda runs: True
    instance.lpet._evict_until_low_threshold()
    assert instance.lpet._rest() == pytest.approx(shortest, abs=0.01)


def run_lpet(instance):
    """In a thread; returns it and the list that gets what it raises, or None."""
    ended = []

    def body():
        try:
            ended.append(instance.lpet.run())
        except OSError as error:
            ended.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread, ended


def test_when_grace_is_over_lpet_ends_with_the_stores_reason(make, monkeypatch):
    monkeypatch.setattr(lpet_module, "GRACE", 0.3)
    instance = make(high=8, batch=4)
    instance.come((0, 8))
    instance.store.refuses = lambda runs: True
    assert instance.lspt.expect(range(20, 21))[1] == range(0)
    began = time.monotonic()
    thread, ended = run_lpet(instance)
    thread.join(10)
    assert time.monotonic() - began > 0.3
    assert isinstance(ended[0], OSError) and ended[0].errno == errno.ENOSPC
    assert "no room on this disk" in ended[0].strerror
    assert instance.here() == list(range(8))
    assert all(instance.memory.read(page) == content(page) for page in range(8))


def test_refusals_end_nothing_while_no_fault_waits(make, monkeypatch):
    monkeypatch.setattr(lpet_module, "GRACE", 0.0)
    instance = make(high=8, batch=4)
    instance.come((0, 8))
    instance.store.refuses = lambda runs: True
    for _ in range(3):
        instance.may_try_again()
        instance.lpet._evict_until_low_threshold()
        assert instance.lpet._rest() > 0
    instance.lspt.expect(range(20, 21))
    instance.lpet._rest()  # grace begins
    while time.monotonic() <= instance.lpet._wanted_since:
        pass
    with pytest.raises(OSError, match="no room on this disk"):
        instance.lpet._rest()


def test_grace_begins_anew_when_a_fault_has_got_its_room(make, monkeypatch):
    monkeypatch.setattr(lpet_module, "GRACE", 0.2)
    instance = make(high=8, batch=4)
    instance.come((0, 8))
    instance.lpet._tracker = FakeTracker()
    instance.store.refuses = lambda runs: any(dirty for _, _, dirty in runs)
    instance.lspt.expect(range(20, 21))
    instance.lpet._evict_until_low_threshold()
    instance.lpet._rest()
    instance.pagemap.clean.add(7)
    assert instance.evict_once() == [7], "which makes room"
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        assert instance.lpet._rest() > 0
    instance.come((20, 1))
    instance.lspt.expect(range(21, 22))
    assert instance.lpet._rest() > 0, "this one has not waited yet"


def test_lpet_evicts_when_it_is_woken_and_ends_when_it_is_told_to(make):
    instance = make(high=8, low=4, batch=4)
    instance.come((0, 8))
    thread, ended = run_lpet(instance)
    assert instance.lspt.expect(range(20, 21))[1] == range(0)
    instance.lspt.wake_lpet()
    deadline = time.monotonic() + 10
    while instance.lspt.room_wanted() or len(instance.here()) > 4:
        assert time.monotonic() < deadline
        time.sleep(0.001)
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
    instance.lspt.figures[l.GENERATION] += 3
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
    now = large.figure(l.GENERATION)
    large.lspt.stays(large.lspt.leaving(0, 1800), now)
    large.lspt.stays(large.lspt.leaving(1800, 100), now - 1)
    large.lspt.low = 1800
    gone = large.evict_once()
    assert gone[:100] == list(range(1900, 2000)), "those that came long ago"
    assert gone[100:] == list(range(1800, 1900)), "and then those of the generation before"
    large.lspt.low = 1700
    assert set(large.evict_once()) <= set(range(1800)), "and at last those of today"
    assert large.figure(l.RESIDENT) <= 1700


def test_neighbours_leave_together_and_younger_pages_between_them_stay(large):
    now = large.figure(l.GENERATION)
    for page in (5, 40):
        large.lspt.stays(large.lspt.leaving(page, 1), now)
    large.lspt.low = 1999 - 64
    assert large.evict_once() == [p for p in range(128) if p not in (5, 40)][:126]
    assert large.store.tries[0] == [(0, 5, True), (6, 34, True), (41, 23, True)]
    assert large.lspt.state[5] == large.lspt.state[40] == HERE + now


def test_pages_that_the_idle_bitmap_says_were_used_are_passed_and_marked(large):
    tracker = large.lpet._tracker = FakeTracker(BitmapTracker.name)
    tracker.idle_pages = set(range(2000)) - {3, 4, 100}
    gone = large.evict_once()
    assert gone == [p for p in range(128) if p not in (3, 4, 100)]
    assert tracker.marked == [3, 4, 100]
    now = HERE + large.figure(l.GENERATION)
    assert [large.lspt.state[p] for p in (3, 4, 100)] == [now] * 3
    assert large.figure(l.MARKED_IDLE) == 3
    tracker.idle_pages = set()
    large.lspt.low = 0
    large.lspt.stop()
    assert large.evict_once() == [], "all the others of the next step are in use"


def test_if_all_pages_are_in_use_they_leave_nevertheless(large):
    large.lpet._tracker = FakeTracker(BitmapTracker.name)
    assert len(large.evict_once()) >= 100
    assert large.figure(l.RESIDENT) <= 1900


def test_pages_that_are_coming_or_in_other_hands_are_no_business_of_lpets(large):
    large.lspt.expect(range(3000, 3010))
    theirs = large.lspt.leaving(10, 20)
    assert set(large.evict_once()).isdisjoint(range(10, 30))
    assert all(large.memory.read(page) == content(page) for page in range(10, 30))
    assert large.lspt.stays(theirs) == []


@pytest.mark.parametrize("high", [64, 2048])
@pytest.mark.parametrize("here", [40, 50])
def test_nothing_leaves_when_it_is_woken_without_need(make, high, here):
    instance = make(pages=4096, high=high, low=50, batch=16)
    instance.come((0, here))
    instance.lspt.figures[l.GENERATION] += 3
    tracker = instance.lpet._tracker = FakeTracker()
    tracker.idle_pages = set(range(here))
    assert instance.evict_once() == [] and tracker.marked == []


# ---------------------------------------------------------------- which pages: the wiki's algorithm


def test_a_small_tables_idle_pages_leave_first_and_the_others_are_marked_and_passed(make):
    instance = make(high=16, low=12)
    instance.come((0, 16))
    tracker = instance.lpet._tracker = FakeTracker()
    tracker.idle_pages = {3, 9, 10, 14, 15}
    assert instance.evict_once() == [3, 9, 10, 14]
    assert sorted(tracker.marked) == [p for p in range(14) if p not in (3, 9, 10)]
    assert instance.figure(l.MARKED_IDLE) == 11
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
    assert instance.evict_once() == [3, 4, 23, 24], "round, and then in order: 24 is passed first"


def test_when_every_page_was_passed_they_leave_in_the_order_of_the_hand(make):
    instance = make(high=16, low=12)
    instance.come((0, 16))
    tracker = instance.lpet._tracker = FakeTracker()
    tracker.idle_pages = {6, 12}
    assert instance.evict_once() == [0, 1, 6, 12], "the idle ones, and the first that were passed"
    assert sorted(tracker.marked) == [p for p in range(2, 16) if p not in (6, 12)]
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
    assert instance.pagemap.present(4, 4) == [False] * 4, "and the others are marked"
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
    real = instance.lpet._pipe.return_at_once

    def return_at_once(runs):
        assert instance.lspt.expect(range(11, 12)) == (LEAVING, range(0))
        real(runs)

    instance.lpet._pipe.return_at_once = return_at_once
    instance.lpet._mark([(10, 2)])
    assert instance.uffd.woken == [instance.memory.address + 11 * PAGE_SIZE]
    assert instance.here() == [10, 11] and instance.pagemap.present(10, 2) == [False, False]
    assert [instance.memory.read(page) for page in (10, 11)] == [content(10), content(11)]


# ---------------------------------------------------------------- storing


def test_storing_sends_the_dirty_pages_and_keeps_them(make):
    instance = make(batch=4)
    instance.come((10, 7), (40, 1))
    instance.pagemap.clean |= {12, 40}
    assert instance.lpet.store(track_clean=False) == 6
    assert instance.store.pages == {p: content(p) for p in (10, 11, 13, 14, 15, 16)}
    assert all(instance.store.stayed) and instance.store.gone == sorted(instance.store.pages)
    assert instance.here() == [*range(10, 17), 40] and instance.memory.pages_in_it() == 8
    assert all(instance.memory.read(page) == content(page) for page in instance.here())
    assert instance.figure(l.STORED_BYTES) == 6 * PAGE_SIZE
    assert instance.figure(l.EVICTED_DIRTY) == 0 and instance.uffd.protected == []
    assert is_empty(instance.lpet._pipe.out)


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
    seen = []
    instance.store.meanwhile = lambda: seen.extend(instance.uffd.protected)
    instance.lpet.store(track_clean=True)
    at = instance.memory.address
    marks = [(at + page * PAGE_SIZE, PAGE_SIZE, True) for page in (10, 15)]
    assert seen == instance.uffd.protected == marks


def test_what_the_store_refuses_to_store_is_here_and_counts_as_written(make):
    instance = make(batch=4)
    instance.come((10, 2))
    instance.store.refuses = lambda runs: True
    instance.store.takes_before = 1
    instance.store.meanwhile = lambda: instance.lspt.expect(range(11, 12))
    with pytest.raises(OSError, match="no room on this disk") as caught:
        instance.lpet.store(track_clean=True)
    assert caught.value.errno == errno.ENOSPC
    at = instance.memory.address + 10 * PAGE_SIZE
    both = 2 * PAGE_SIZE
    assert instance.uffd.protected == [(at, both, True), (at, both, False)]
    assert instance.here() == [10, 11] and instance.figure(l.STORED_BYTES) == 0
    assert instance.uffd.woken == [at + PAGE_SIZE]
    instance.store.refuses, instance.store.meanwhile = (lambda runs: False), (lambda: None)
    assert instance.lpet.store(track_clean=True) == 2, "and no bytes of the first try are left"
    assert instance.store.pages == {10: content(10), 11: content(11)}


@pytest.mark.parametrize("how", ["installed", "refused", "evicted"])
def test_storing_waits_for_pages_that_somebody_else_has_in_hand(make, how):
    instance = make()
    instance.come((10, 3))
    if how == "installed":
        instance.lspt.expect(range(20, 21))
    else:
        theirs = instance.lspt.leaving(10, 1)
    stored = []
    thread = threading.Thread(target=lambda: stored.append(instance.lpet.store(False)), daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not instance.store.pages:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    thread.join(0.02)
    assert thread.is_alive(), "the others are stored; this one is waited for"
    if how == "installed":
        instance.memory.write(20)
        instance.lspt.arrived(range(20, 21), NEW)
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


def test_storing_does_not_wait_any_more_when_everything_ends(make):
    instance = make()
    instance.lspt.expect(range(20, 21))
    stored = []
    thread = threading.Thread(target=lambda: stored.append(instance.lpet.store(False)), daemon=True)
    thread.start()
    thread.join(0.02)
    assert thread.is_alive()
    instance.lspt.stop()
    thread.join(10)
    assert stored == [0]


@pytest.fixture
def registered(make):
    """The memory is registered, and its pages have the page table's real marks."""
    if u.WP_FEATURES & ~u.supported_features() or not (
        u.supported_features() & u.UFFD_FEATURE_WP_ASYNC
    ):
        pytest.skip("this kernel has no asynchronous write-protection (Linux 6.7)")
    instance = make()
    fd, _ = u.open_userfaultfd()
    uffd = u.Userfaultfd(fd)
    uffd.api(u.NEEDED_FEATURES | u.WP_FEATURES | u.UFFD_FEATURE_WP_ASYNC)
    uffd.register(instance.memory.address, 100 * PAGE_SIZE)
    instance.lpet._uffd = uffd
    instance.lpet._pagemap = Pagemap(instance.pagemap_fd, instance.memory.address)
    instance.install = lambda page, mark: install(instance, uffd, page, mark)
    yield instance
    os.close(fd)


def install(instance, uffd, page, mark):
    """As the DM-Handler does. A missing page must not be touched here: nobody would bring it."""
    state, pages = instance.lspt.expect(range(page, page + 1))
    source = ctypes.create_string_buffer(content(page), PAGE_SIZE)
    address = instance.memory.address + page * PAGE_SIZE
    uffd.copy(address, ctypes.addressof(source), PAGE_SIZE, mark)
    instance.lspt.arrived(pages, state)


@needs_userfaultfd
def test_pages_that_were_only_read_leave_without_their_bytes(registered):
    for page in range(10, 14):
        registered.install(page, page != 13)  # this one was brought by a write
    assert registered.memory.read(10) == content(10)
    registered.memory.write(11, version=1)
    assert registered.lpet._evict(0, 50, NO_HOLES) == 4
    assert registered.store.tries == [
        [(10, 1, False), (11, 1, True), (12, 1, False), (13, 1, True)]
    ]
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
    assert registered.lpet._evict(0, 50, ANY_HERE) == 3
    assert not any(dirty for _, _, dirty in registered.store.tries[-1])


@needs_userfaultfd
def test_what_the_store_refused_is_stored_the_next_time(registered):
    for page in (10, 11):
        registered.install(page, False)
    registered.store.refuses = lambda runs: True
    with pytest.raises(OSError, match="no room"):
        registered.lpet.store(track_clean=True)
    registered.store.refuses = lambda runs: False
    assert registered.lpet.store(track_clean=True) == 2
    registered.memory.write(11, version=1)
    registered.store.refuses = lambda runs: True
    assert registered.lpet._evict(0, 50, ANY_HERE) == 0
    registered.store.refuses = lambda runs: False
    assert registered.lpet._evict(0, 50, ANY_HERE) == 2
    assert registered.store.pages == {10: content(10), 11: content(11, version=1)}


@needs_userfaultfd
def test_unmapping_a_page_to_see_whether_it_is_used_does_not_make_it_written_or_clean(registered):
    for page in (10, 11, 12):
        registered.install(page, page != 11)
    registered.lpet._mark([(10, 3)])
    assert registered.lpet._tracker.idle([(10, 3)]) == {10, 11, 12}
    assert registered.memory.read(10) == content(10)
    registered.memory.write(12, version=1)
    assert registered.lpet._tracker.idle([(10, 3)]) == {11}
    assert registered.lpet._evict(0, 50, ANY_HERE) == 3
    assert registered.store.tries == [[(10, 1, False), (11, 2, True)]]
    assert registered.store.pages == {11: content(11), 12: content(12, version=1)}
