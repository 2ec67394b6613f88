"""readahead.py: which faults are a stream, how its window grows, and what comes with a fault."""

import contextlib
import errno
import os
import random
import threading
import time
from collections import deque

import pytest
from conftest import close, lpet_is_first, pages_in, wait_for

from edm import dm_handler
from edm.dm_handler import DmHandler
from edm.lspt import (
    ANY_HERE,
    AWAY,
    COMING,
    FETCHED,
    HERE,
    LEAVING,
    LONGER,
    LOST,
    LSPT,
    NEVER,
    RESIDENT,
    ROOM_WANTED,
    SOON,
)
from edm.page_store import CONTENT, ONE_STRIPE
from edm.readahead import (
    FIRST_WINDOW,
    MAX_STRIDE,
    NEAR,
    PROBE,
    REMEMBERED,
    STREAMS,
    Readahead,
    Stream,
)
from edm.uffd_ctypes import PAGE_SIZE, UFFDIO_COPY_MODE_WP

SPACE = range(10**12)


def nothing_is_missing(pages):
    return False


@pytest.fixture
def readahead():
    return Readahead(256, nothing_is_missing)


def singles(stride):
    """How many faults come alone before a stream begins."""
    return 1 if stride == 1 else 2


def at(readahead, page):
    """The stream of a fault at the page's begin."""
    return readahead.stream(page * PAGE_SIZE)


def wanted(stream, area=SPACE):
    """The pages that it wants."""
    return [page for run in stream.wanted(area) for page in run]


def begin(readahead, page, stride=1):
    """The stream that begins with the fault of this page, and those of pages before it."""
    before = [page - n * stride for n in range(singles(stride), 0, -1)]
    assert not any(at(readahead, earlier) for earlier in before)
    return at(readahead, page)


def continues(stream):
    """Is this a stream that has begun, and has had one more fault?"""
    return bool(stream) and stream.window == 2 * FIRST_WINDOW


def begun(readahead, stride):
    """A stream that has begun with page 1000, and brings its first window."""
    return begin(readahead, 1000, stride)


def fault(readahead, place):
    """The pages that come when the page at this place (bytes) faults."""
    if not (stream := readahead.stream(place)):
        return [place // PAGE_SIZE]
    pages = wanted(stream)
    assert pages[0] == place // PAGE_SIZE
    return pages


def follow(readahead, page, faults, stride=1):
    """Fault at page and go on from window to window; returns the sizes of the windows."""
    sizes = []
    for _ in range(faults):
        if stream := at(readahead, page):
            pages = wanted(stream)
            assert pages == [*range(page, page + len(pages) * stride, stride)]
            sizes.append(len(pages))
            page += len(pages) * stride
        else:
            page += stride
    return sizes


DOUBLING = [4, 8, 16, 32, 64, 128, 256, 256]


@pytest.mark.parametrize(
    "max_window, stride, windows",
    [
        pytest.param(256, 1, DOUBLING, id="upward"),
        pytest.param(256, -1, DOUBLING, id="downward"),
        pytest.param(256, 7, DOUBLING, id="strided"),
        pytest.param(256, MAX_STRIDE // PAGE_SIZE, DOUBLING, id="the longest stride"),
        pytest.param(5, 1, [4, 5, 5, 5], id="at most 5"),
        pytest.param(5, -1, [4, 5, 5, 5], id="at most 5, downward"),
        pytest.param(5, 3, [4, 5, 5, 5], id="at most 5, strided"),
        *(pytest.param(most, 1, [], id=f"turned off by {most}") for most in (0, 1)),
        pytest.param(256, -2, [], id="strides downward are no streams"),
        pytest.param(256, MAX_STRIDE // PAGE_SIZE + 1, [], id="nor are longer ones"),
    ],
)
def test_a_second_neighbouring_fault_or_a_third_at_equal_distances_begins_a_stream_whose_window_doubles(
    max_window, stride, windows
):
    readahead = Readahead(max_window, nothing_is_missing)
    assert follow(readahead, 10**6, singles(stride) + (len(windows) or 20), stride) == windows


@pytest.mark.parametrize("step", [1, -1])
def test_neighbours_are_recognised_wherever_in_their_pages_the_faults_are(readahead, step):
    dice, pages = random.Random(1), range(1000)[::step]
    faults, came = 0, set()
    for page in pages:
        if page not in came:
            came |= {*fault(readahead, page * PAGE_SIZE + dice.randrange(PAGE_SIZE))}
            faults += 1
    assert faults < 15


@pytest.mark.parametrize(
    "stride, area, pages",
    [
        (1, range(900, 1002), range(1000, 1002)),
        (-1, range(998, 1100), range(1000, 997, -1)),
        (5, range(900, 1012), range(1000, 1012, 5)),
        (5, range(1000, 1001), range(1000, 1001)),  # the area has gone
    ],
)
def test_a_window_ends_where_the_area_does(readahead, stride, area, pages):
    assert wanted(begin(readahead, 1000, stride), area) == [*pages]


def test_random_faults_never_begin_a_stream(readahead):
    dice = random.Random(1)
    assert not any(at(readahead, 100 * dice.randrange(10**6)) for _ in range(10000))
    assert len(readahead._recent) <= REMEMBERED + 1 and readahead._streams == []


def rows(readahead, count, pages):
    """Random rows of so many pages. Returns how many faults each took."""
    took = []
    for row in random.Random(2).sample(range(10**6), count):
        page, last, faults = 10_000 * row, 10_000 * row + pages - 1, 0
        while page <= last:
            come = fault(readahead, page * PAGE_SIZE)
            page, faults = come[-1] + 1, faults + 1
        took.append(faults)
    return took


@pytest.mark.parametrize("pages", [2, 3])
def test_where_streams_end_with_their_first_window_a_row_takes_one_fault_except_for_probes(
    readahead, pages
):
    took = rows(readahead, 1000, pages)
    learnt = took[2 * REMEMBERED :]
    assert {*took[:REMEMBERED]} == {2} and {*learnt} == {1, 2}
    assert learnt.count(2) == pytest.approx(len(learnt) / PROBE, abs=1)


@pytest.mark.parametrize("pages", [1, 20])
def test_pages_and_longer_rows_come_as_ever(readahead, pages):
    assert {*rows(readahead, 1000, pages)} == {1 if pages == 1 else 4}


@pytest.mark.parametrize("after", ["rows", "sequential phases"])
@pytest.mark.parametrize("stride", [1, 4, 10**4])
def test_what_was_before_does_not_change_for_long_what_comes_with_a_fault(readahead, after, stride):
    if after == "rows":
        rows(readahead, 1000, 3)
    else:
        for n in range(1, 100):
            follow(readahead, 10**9 * n, 20)
    page, come = 10**8, set()
    for touched in range(page, page + 3000 * stride, stride):
        if touched not in come:
            come |= {*fault(readahead, touched * PAGE_SIZE)}
    assert len(come) < 1.2 * 3000


@pytest.mark.parametrize("stride", [1, 5])
def test_several_streams_are_recognised_between_each_other_and_followed_at_once(readahead, stride):
    count = min(STREAMS, REMEMBERED // singles(stride))
    starts = [10**6 * n for n in range(1, count + 1)]
    for n in range(singles(stride)):
        assert not any(at(readahead, start + n * stride) for start in starts)
    starts = [start + (n + 1) * stride for start in starts]
    streams = [at(readahead, start) for start in starts]
    assert len(set(streams)) == count > 8
    for stream, start in zip(streams, starts, strict=True):
        assert continues(at(readahead, start + 4 * stride))
        assert stream.stride == stride * PAGE_SIZE


def test_the_streams_that_were_not_used_for_longest_are_those_to_end(readahead):
    starts = [10_000 * n for n in range(1, STREAMS + 4)]
    streams = [begin(readahead, start) for start in starts[:STREAMS]]
    first = at(readahead, starts[0] + 4)
    assert continues(first)
    later = [begin(readahead, start) for start in starts[STREAMS + 1 :]]
    assert readahead._streams[::-1] == [*streams[3:STREAMS], first, *later]
    assert not any(continues(at(readahead, start + 4)) for start in starts[1:3])
    assert at(readahead, starts[0] + 12).window == 2 * first.window


@pytest.mark.parametrize("stride", [1, -1, 5])
def test_a_fault_in_a_window_or_near_after_it_continues_its_stream_and_others_do_not(stride):
    near = {1000 + n * stride for n in range(1, 4 + NEAR)}
    for page in range(500, 1500):
        readahead = Readahead(256, nothing_is_missing)
        begun(readahead, stride)
        del readahead._recent[:-1]  # or a fault would begin a stream with the one before
        assert continues(at(readahead, page)) == (page in near)


@pytest.mark.parametrize("row", [24000, 12000, 5980, 300_000, 3 * PAGE_SIZE])
@pytest.mark.parametrize("begins", [0, 4088])
def test_a_column_of_a_matrix_comes_in_windows_and_brings_no_page_between_its_own(row, begins):
    needed = range(begins, begins + 3000 * row, row)
    came, faults = set(), 0
    readahead = Readahead(256, lambda pages: not came.issuperset(pages))
    for place in needed:
        if place // PAGE_SIZE not in came:
            came |= {*fault(readahead, place)}
            faults += 1
    near = row < 2 * PAGE_SIZE  # then they are neighbours at times, and all pages come
    assert faults < (200 if near else 30)
    assert len(came) < len(needed) * (1.5 if near else 1.1)


def test_the_pages_of_a_stride_are_runs_of_equal_distances_in_the_order_of_need():
    stream = Stream(100 * PAGE_SIZE, 12, 20000)  # 4.88 pages
    assert wanted(stream) == [(100 * PAGE_SIZE + n * 20000) // PAGE_SIZE for n in range(12)]
    assert len(stream.wanted(SPACE)) <= 4
    assert stream.wanted(range(90, 112)) == [range(100, 105, 4), range(109, 110)]


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("pages", [1, 2, 3, 4])
def test_a_fault_within_or_at_the_end_of_a_window_ends_its_stream_if_the_page_before_it_is_missing(
    pages, step
):
    for missing, goes_on in (999, True), (pages - 1, False), (pages, True), (pages + 1, True):
        readahead = Readahead(256, {1000 + missing * step}.intersection)
        begun(readahead, step)
        stream = at(readahead, 1000 + pages * step)
        assert continues(stream) == goes_on == (stream in readahead._streams)
        assert goes_on or readahead._streams == []


def test_a_fault_behind_a_window_ends_its_stream_if_a_page_before_it_is_missing():
    for missing, goes_on in ({1004}, False), ({1005}, False), ({1002, 1003, 1006}, True):
        readahead = Readahead(256, missing.intersection)
        begun(readahead, 1)
        stream = at(readahead, 1006)
        assert continues(stream) == goes_on == (readahead._streams == [stream])


def test_other_faults_do_not_end_a_stride(readahead):
    begun(readahead, 5)
    for place in (1000, 1010.5, 1013, 1020.5, 1029, 1000 + 5 * (4 + NEAR)):
        assert not continues(readahead.stream(int(place * PAGE_SIZE)))
    assert continues(at(readahead, 1025))


def test_two_streams_that_have_come_to_the_same_page_stay_two(readahead):
    alike = [Stream(200 * PAGE_SIZE, FIRST_WINDOW, PAGE_SIZE) for _ in range(2)]
    readahead._streams += alike
    assert continues(at(readahead, 204)) and readahead._streams[1:] == alike[1:]


# ---------------------------------------------------------------- with the DM-Handler


class Store:
    stripe = ONE_STRIPE
    takes_pipes = False

    def __init__(self):
        self.asked = []
        self.unreadable = set()

    def ask_get(self, pages):
        assert len(pages) <= 64
        self.asked.append(pages)
        return pages

    def take_get(self, asked):
        good = 0
        while good < len(asked) and asked[good] not in self.unreadable:
            good += 1
        if not good:
            raise OSError(errno.EIO, "the checksum is wrong")
        return CONTENT, good, 1 << 20


class FakeUffd:
    def __init__(self, lspt):
        self.poisoned = []
        self.faults = []
        self.lspt = lspt
        self.mapped = lspt.pages

    def read_faults(self):
        return self.faults

    def copy(self, address, source, length, mark):
        if address + length > self.mapped * PAGE_SIZE:
            raise FileNotFoundError(errno.ENOENT, "UFFDIO_COPY")
        return length

    def poison(self, address, length):
        # No FREE takes the page in between: its next area would find the poison.
        assert self.lspt.state[address // PAGE_SIZE] == COMING
        self.poisoned.append(address // PAGE_SIZE)


@pytest.fixture
def handler(woken):
    lspt = LSPT(1000, 1000, 0, False, -1, 0)
    lspt.areas.append((0, 1000, "all"))
    lspt.found_on_disk(0, 1000)
    lspt.uffd = lspt.for_lpet  # any that an epoll takes
    handler = DmHandler(Store(), lspt, 64, False)
    handler._readahead.max_window = 64  # here that would be too much of high_threshold
    handler._uffd = FakeUffd(lspt)
    yield handler
    close(lspt)


def claim(handler, *pages):
    for page in pages:
        handler._bring_missing(page * PAGE_SIZE, False)


def touch(handler, pages):
    """Returns how many of them have faulted."""
    faults = 0
    for page in pages:
        if handler._lspt.state[page] < HERE:
            claim(handler, page)
            faults += 1
    return faults


@contextlib.contextmanager
def running(handler):
    def until_stopped():
        with pytest.raises(ProcessLookupError):
            handler.run()

    thread = threading.Thread(target=until_stopped)
    thread.start()
    try:
        yield
    finally:
        handler._lspt.stop()
        thread.join(10)
        assert not thread.is_alive()


def here(handler):
    return list(pages_in(handler._lspt.runs_here()))


def test_a_row_of_a_few_pages_takes_two_faults_and_brings_few_other_pages(handler):
    claim(handler, 100, 101)
    assert here(handler) == [*range(100, 105)]


@pytest.fixture
def short_way(handler):
    """Pages that fault alone may come by the short way. Which ones have: (address, source, length, mode)."""
    came = []
    handler._store.takes_pipes = True
    handler._store.take_page = lambda page: 1 << 21
    handler._copy_page = lambda: came.append(tuple(handler._block[:4]))
    return came


def test_a_page_that_faults_alone_comes_by_the_short_way(handler, short_way):
    claim(handler, 100)
    assert here(handler) == [100] and handler._store.asked == []
    assert short_way == [(100 * PAGE_SIZE, 1 << 21, PAGE_SIZE, 0)]
    claim(handler, 500, 501)
    assert here(handler) == [100, *range(500, 505)] and handler._store.asked == [range(501, 505)]
    assert handler.figures()["bytes_received"] == 6 * PAGE_SIZE


def test_a_page_that_is_read_is_clean_and_one_that_is_written_is_not(handler, short_way):
    handler._track_clean = True
    handler._bring_missing(100 * PAGE_SIZE, False)
    handler._bring_missing(500 * PAGE_SIZE, True)
    assert [mode for *_, mode in short_way] == [UFFDIO_COPY_MODE_WP, 0]


@pytest.mark.parametrize("why", ["a report", "no bytes", "the disk", "the copy", "the store"])
def test_what_cannot_come_by_the_short_way_comes_by_the_long_one(handler, short_way, why):
    def fails(*_):
        raise OSError(errno.EIO, why)

    match why:
        case "a report":
            handler.came = deque()
        case "no bytes":
            handler._store.take_page = lambda page: 0
        case "the disk":
            handler._store.take_page = fails
        case "the copy":
            handler._copy_page = fails
        case "the store":
            handler._store.takes_pipes = False
    claim(handler, 100)
    assert here(handler) == [100] and handler._store.asked == [range(100, 101)]
    assert short_way == [] and handler.came in (None, deque([100]))
    # What the store has given counts, also if it was in vain.
    assert handler.figures()["bytes_received"] == PAGE_SIZE * (2 if why == "the copy" else 1)


@pytest.mark.parametrize("short", [False, True])
def test_a_page_that_left_soon_before_it_faults_alone_stays_longer(handler, short_way, short):
    lspt, handler._store.takes_pipes = handler._lspt, short
    claim(handler, 100, 500)
    assert {lspt.state[page] for page in (100, 500)} == {HERE + lspt.generation()}, "long ago"
    lspt.gone(lspt.claim(0, 1000, ANY_HERE))
    claim(handler, 100)
    assert lspt.state[100] == HERE + lspt.generation() + LONGER
    lspt.figures[FETCHED] += (SOON + 1) * lspt.quarter
    claim(handler, 500)
    assert lspt.state[500] == HERE + lspt.generation() and len(short_way) == 4 * short


@pytest.mark.parametrize("step", [1, -1, 3])
def test_a_window_passes_the_pages_that_are_here(handler, step):
    sequence = range(100, 900)[::step]
    for page in random.Random(1).sample(sequence, len(sequence) // 4):
        handler._lspt.expect(page)
        handler._lspt.arrived(range(page, page + 1))
    assert touch(handler, sequence) < 25 and {*sequence} <= {*here(handler)}


@pytest.mark.parametrize("step", [1, -1, 5])
def test_a_page_that_did_not_come_with_its_window_continues_the_stream(handler, step):
    lspt, pages = handler._lspt, range(500, 500 + 20 * step, step)
    late = pages[singles(step) + 2]  # the third page of the first window
    lspt.state[late] = LEAVING
    claim(handler, *pages[: singles(step) + 1])
    lspt.state[late] = AWAY
    assert {*here(handler)} == {*pages[: singles(step) + 4]} - {late}
    claim(handler, late)
    assert {*here(handler)} == {*pages[: singles(step) + 2 + 8]}


def test_a_sequence_that_left_soon_before_comes_in_windows(handler):
    touch(handler, range(100, 200))
    handler._lspt.gone(handler._lspt.claim(0, 1000, ANY_HERE))
    handler._store.asked.clear()
    touch(handler, range(100, 200))
    assert len(handler._store.asked) < 20


def test_pages_that_were_asked_for_come_many_at_once_and_those_that_are_here_are_passed(handler):
    claim(handler, 110)
    before = len(handler._store.asked)
    handler.prefetch([(100, 100), (300, 1)])
    handler._bring_advised()
    assert here(handler) == [*range(100, 164)]  # 63 have come, and one was here
    assert handler._store.asked[before:] == [range(100, 110), range(111, 127), range(127, 164)]
    handler._bring_advised()
    assert here(handler) == [*range(100, 200), 300] and not handler._advised


def test_pages_that_were_asked_for_wait_for_room_and_faults_do_not_wait_for_them(handler):
    lspt = handler._lspt
    lspt.high = 60
    faults, resolved = [], []
    handler._uffd.read_faults = lambda: [faults.pop()] if faults else []
    handler._resolve = lambda faults: resolved.extend(faults) or 0
    handler.prefetch([(100, 100)])
    with running(handler):
        wait_for(lambda: lspt.figures[ROOM_WANTED] == NEVER)
        assert here(handler) == [*range(100, 160)]
        faults.append((0, 0, 0, 0))
        wait_for(lambda: resolved)
        assert here(handler) == [*range(100, 160)] and lspt.figures[ROOM_WANTED] == NEVER
        lspt.gone(lspt.claim(100, 20, ANY_HERE))
        wait_for(lambda: lspt.figures[ROOM_WANTED] == NEVER)  # it has heard that there is room
        assert here(handler) == [*range(120, 180)]


def test_nothing_that_was_asked_for_comes_when_the_space_ends(handler):
    handler.prefetch([(100, 100)])
    handler._lspt.stop()
    with pytest.raises(ProcessLookupError):
        handler.run()
    assert here(handler) == []


def test_a_page_that_was_asked_for_does_not_come_while_lpet_has_it_as_a_hole(handler):
    lspt = handler._lspt
    claim(handler, 100, 110)
    handler.prefetch([(105, 1)])
    left = lpet_is_first(lspt, 100, 11)
    handler._bring_advised()
    assert lspt.state[100:111] == bytes((LEAVING,)) * 11
    lspt.gone(*left)
    assert all(AWAY <= state < LOST for state in lspt.state[100:111])
    assert lspt.figures[RESIDENT] == 0
    claim(handler, 105)
    assert here(handler) == [105]


def test_no_more_runs_are_asked_for_than_pages_may_be_here_and_the_first_ones_come(handler):
    for _ in range(3):
        handler.prefetch([(page, 1) for page in range(0, 800, 2)])
    assert len(handler._advised) == handler._lspt.high
    while handler._advised:
        handler._bring_advised()
    assert here(handler) == [*range(0, 800, 2)]


@pytest.mark.parametrize("mapped", [0, 100, 130])
def test_pages_that_the_application_has_unmapped_are_not_coming_and_nothing_fails(handler, mapped):
    handler._uffd.mapped = mapped
    handler.prefetch([(100, 100), (300, 1)])
    while handler._advised:
        handler._bring_advised()
    assert here(handler) == [*range(100, mapped)]
    assert COMING not in handler._lspt.state[:]
    assert handler._lspt.figures[RESIDENT] == len(here(handler))


def test_where_a_copy_was_interrupted_the_next_one_goes_on(handler):
    copied = []

    def copy(address, source, length, mark):
        copied.append((address, source, length))
        return min(length, 3 * PAGE_SIZE)

    handler._uffd.copy = copy
    handler.prefetch([(100, 5)])
    handler._bring_advised()
    assert here(handler) == [*range(100, 105)]
    rest = 103 * PAGE_SIZE, copied[0][1] + 3 * PAGE_SIZE, 2 * PAGE_SIZE
    assert copied == [(100 * PAGE_SIZE, copied[0][1], 5 * PAGE_SIZE), rest]


def test_a_call_that_came_while_it_waited_for_a_childs_page_is_seen_before_it_sleeps(
    handler, monkeypatch
):
    monkeypatch.setattr(dm_handler, "BRING", 10)  # or the caller would write again
    caller = threading.Thread(target=handler.bring, args=(range(5, 6), False))
    caller.start()
    handler.children.sent = {0: []}

    def serve_children():  # it may read the wake-up, in _await_wakeup
        os.eventfd_read(handler._lspt.for_handler)
        handler.children.sent = {}

    handler._serve_children = serve_children
    with running(handler):
        caller.join(5)
        assert not caller.is_alive() and here(handler) == [5]


def test_after_a_page_that_came_too_late_the_next_ones_are_waited_for(handler):
    late = threading.Thread(target=handler.bring, args=(range(100, 101), False))
    late.start()
    late.join(0.2)  # nobody serves it
    assert late.is_alive() and handler._lspt.state[100] < COMING
    with running(handler):
        late.join(10)
        assert not late.is_alive() and handler._lspt.state[100] >= HERE
        for page in (300, 500, 700):
            handler.bring(range(page, page + 1), False)
            assert handler._lspt.state[page] >= HERE


@pytest.mark.parametrize("stride", [1, -1])
def test_a_page_that_cant_be_read_is_lost_when_it_faults_and_not_before(handler, stride):
    lspt, unreadable = handler._lspt, 500 + 3 * stride
    handler._store.unreadable = {unreadable}
    before = range(-4 - singles(stride), 0)
    claim(handler, *(500 + n * stride for n in (*before[:-3], 0)))
    others = {500 + n * stride for n in (*before, *range(8))} - {unreadable}
    assert {*here(handler)} == others and COMING not in lspt.state[:]
    assert AWAY <= lspt.state[unreadable] < LOST
    handler._readahead.max_window = 1
    claim(handler, unreadable)
    assert lspt.state[unreadable] == LOST and handler._uffd.poisoned == [unreadable]
    assert {*here(handler)} == others


def test_latencies_are_counted_by_eighths_of_a_power_of_two(handler, monkeypatch):
    assert handler.figures()["latency_median"] == handler.figures()["latency_99th"] == 0
    # 0, as a clock may tell, and three days
    took = {100: 0, 300: 15_000, 550: 16_384, 700: 1_000_000, 990: 259_200 * 10**9}
    for page, nanoseconds in took.items():
        clock = iter((10**9, 10**9 + nanoseconds))
        handler._uffd.faults = [(0, 0, page * PAGE_SIZE, 0)]
        with monkeypatch.context() as patched:
            patched.setattr(time, "monotonic_ns", lambda clock=clock: next(clock))
            with pytest.raises(StopIteration):  # at the same fault, again
                handler.run()
    counted = {n: faults for n, faults in enumerate(handler.latencies) if faults}
    assert counted == {0: 1, 111: 1, 113: 1, 160: 1, 384: 1}
    for n, nanoseconds in zip(counted, took.values(), strict=True):
        assert nanoseconds < 2 ** (n / 8) <= max(1, nanoseconds * 1.1)
    # µs that half of the faults, and all of them, did not exceed: 9 % more than the longest, at most
    assert handler.figures()["latency_median"] == round(2 ** (113 / 8) / 1000) == 18
    assert 259_200 * 10**6 < handler.figures()["latency_99th"] < 1.1 * 259_200 * 10**6
