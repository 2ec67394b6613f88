"""readahead.py: which faults are a stream, and how its window grows and shrinks."""

import random

import pytest

from edm.dm_handler import DmHandler
from edm.lspt import LSPT
from edm.page_idle import pages_in
from edm.page_store import CONTENT
from edm.readahead import MAX_STRIDE, NEAR, REMEMBERED, STREAMS, Ahead, Readahead
from edm.uffd_ctypes import PAGE_SIZE


def follow(readahead, page, windows, stride=1):
    """Fault at page and go on from window to window; returns the sizes of the windows."""
    sizes = []
    for _ in range(windows):
        stream = readahead.fault(page)
        if stream:
            sizes.append(stream.window)
            pages = stream.wanted(page)
            readahead.used(stream, pages if pages.step > 0 else pages[::-1])
            page = stream.next
        else:
            page += stride
    return sizes


def test_two_neighbouring_faults_begin_a_stream_whose_window_doubles_to_the_maximum():
    assert follow(Readahead(256), 1000, 9) == [8, 16, 32, 64, 128, 256, 256, 256]


def test_a_stream_goes_downward_as_well():
    readahead = Readahead(256)
    assert follow(readahead, 1000, 9, stride=-1) == [8, 16, 32, 64, 128, 256, 256, 256]
    assert readahead._streams[0].next == 999 - 8 - 16 - 32 - 64 - 128 - 3 * 256


def test_three_faults_at_equal_distances_begin_a_strided_stream():
    assert follow(Readahead(256), 1000, 8, stride=7) == [8, 16, 32, 64, 64, 64]


def test_strided_streams_are_recognised_between_each_other():
    readahead = Readahead(256)
    found = [[readahead.fault(start + 5 * n) for start in (0, 10**6)] for n in range(3)]
    assert found[:2] == [[None, None], [None, None]]
    assert [stream.wanted(stream.next).step for stream in found[2]] == [5, 5]


def test_random_faults_never_begin_a_stream():
    readahead, dice = Readahead(256), random.Random(1)
    assert all(readahead.fault(100 * dice.randrange(10**6)) is None for _ in range(10000))
    assert list(readahead.surplus()) == [] and len(readahead._recent) <= REMEMBERED


def test_several_streams_are_followed_at_once():
    readahead = Readahead(256)
    starts = [10**6 * n for n in range(1, STREAMS + 1)]
    for start in starts:
        readahead.fault(start)
    streams = [readahead.fault(start + 1) for start in starts]
    for stream, start in zip(streams, starts, strict=True):
        readahead.used(stream, range(start + 1, start + 9))
    for stream, start in zip(streams, starts, strict=True):
        assert readahead.fault(start + 9) is stream
    assert list(readahead.surplus()) == [] and len(readahead._streams) == STREAMS


def begin(readahead, page):
    """The stream that begins with the faults of page and the next one."""
    readahead.fault(page)
    return readahead.fault(page + 1)


def test_the_streams_that_were_not_used_for_longest_are_those_to_end():
    readahead = Readahead(256)
    streams = [begin(readahead, 1000 * n) for n in range(1, STREAMS + 4)]
    for stream in streams:
        stream.ahead = Ahead(range(stream.next + 8, stream.next + 16), None)
    streams[1].ahead = None
    readahead.used(streams[0], range(1001, 1009))
    assert list(readahead.surplus()) == [streams[2].ahead, streams[3].ahead]
    assert list(readahead.surplus()) == []
    assert readahead._streams == [*streams[4:], streams[0]]


@pytest.mark.parametrize("stride", [1, -1, 5])
def test_a_fault_near_after_a_window_continues_its_stream_and_others_do_not(stride):
    readahead = Readahead(256)
    readahead.fault(1000 - 2 * stride)
    readahead.fault(1000 - stride)
    stream = readahead.fault(1000) or begin(readahead, 1000)
    pages = stream.wanted(1000)
    readahead.used(stream, pages if pages.step > 0 else pages[::-1])
    after = stream.next
    assert readahead.fault(after) is stream
    assert readahead.fault(after + (NEAR - 1) * stream.stride) is stream
    assert readahead.fault(after + NEAR * stream.stride) is not stream
    assert readahead.fault(after - stream.stride) is not stream


def test_what_was_asked_for_ahead_is_dropped_when_any_of_its_pages_comes_otherwise():
    readahead = Readahead(256)
    one, other = begin(readahead, 100), begin(readahead, 1000)
    one.ahead, other.ahead = Ahead(range(110, 120), "one"), Ahead(range(1010, 1020), "other")
    assert list(readahead.overlapping(range(100, 110))) == []
    assert list(readahead.overlapping(range(120, 1010))) == []
    assert [ahead.asked for ahead in readahead.overlapping(range(119, 120))] == ["one"]
    assert one.ahead is None and list(readahead.overlapping(range(119, 120))) == []
    assert [ahead.asked for ahead in readahead.overlapping(range(900, 1011))] == ["other"]
    assert other.ahead is None and len(readahead._streams) == 2, "the streams go on"


def test_all_that_was_asked_for_is_dropped_at_the_end():
    readahead = Readahead(256)
    one, _, other = (begin(readahead, 1000 * n) for n in (1, 2, 3))
    one.ahead, other.ahead = Ahead(range(110, 120), None), Ahead(range(1010, 1020), None)
    assert list(readahead.drop_all()) == [one.ahead, other.ahead]
    assert list(readahead.drop_all()) == [] and readahead._streams == []


def test_pages_that_are_here_already_do_not_end_a_stream():
    readahead = Readahead(256)
    stream = begin(readahead, 0)
    readahead.used(stream, range(1, 9))
    assert readahead.fault(9 + NEAR - 1) is stream
    assert readahead.fault(9 + NEAR) is None, "but random faults do not continue an old one"


def test_near_is_behind_the_window_in_the_direction_of_the_stream():
    readahead = Readahead(256)
    readahead.fault(1000)
    stream = readahead.fault(999)
    readahead.used(stream, range(992, 1000))
    assert stream.next == 991
    assert readahead.fault(992) is None and readahead.fault(991 - NEAR) is None
    assert readahead.fault(991 - NEAR + 1) is stream
    for page in (2000, 2010, 2020):
        stream = readahead.fault(page)
    readahead.used(stream, range(2020, 2100, 10))
    assert stream.next == 2100
    assert readahead.fault(2105) is None and readahead.fault(2100 + 10 * NEAR) is None
    assert readahead.fault(2100 + 10 * (NEAR - 1)) is stream


@pytest.mark.parametrize("stride", [-2, MAX_STRIDE + 1])
def test_strides_downward_or_too_long_are_no_streams(stride):
    readahead = Readahead(256)
    assert not any(readahead.fault(10**6 + n * stride) for n in range(20))


def test_readahead_can_be_turned_off():
    assert follow(Readahead(1), 0, 100) == []
    assert follow(Readahead(0), 0, 100) == []


@pytest.mark.parametrize("stride", [1, -1, 3])
def test_no_window_is_larger_than_the_maximum(stride):
    assert set(follow(Readahead(5), 1000, 9, stride)) == {5}


def test_two_streams_that_have_come_to_the_same_page_stay_two():
    readahead = Readahead(256)
    for start in (0, 100):
        readahead.fault(start)
    first, second = readahead.fault(1), readahead.fault(101)
    readahead.used(first, range(200, 208))
    readahead.used(second, range(300, 308))
    second.window = 8
    readahead.used(second, range(200, 208))  # now the two are alike in everything
    assert {id(stream) for stream in readahead._streams} == {id(first), id(second)}


# ---------------------------------------------------------------- with the DM-Handler


class Store:
    """As over MPI: an answer has the bytes of the time when it was asked for."""

    def __init__(self):
        self.version = dict.fromkeys(range(1000), 0)  # of each page's bytes
        self.asked = []

    def ask_get(self, pages):
        self.asked.append(Asked([self.version[page] for page in pages]))
        return self.asked[-1]


class Asked:
    def __init__(self, versions):
        self._versions, self.ended = versions, 0

    def take(self):
        return CONTENT, len(self._versions)

    def content(self, at, count):
        return self._versions[at : at + count]  # FakeUffd.copy gets it

    def done(self):
        self.ended += 1


class FakeUffd:
    def __init__(self):
        self.version = {}  # of each page as it was installed last

    def copy(self, address, source, length, mark):
        first = address // PAGE_SIZE
        self.version |= dict(zip(range(first, first + length // PAGE_SIZE), source, strict=True))

    def wake(self, address, length):
        pass


@pytest.fixture
def handler():
    lspt = LSPT(1000, 1000, 0)
    lspt.areas.append((0, 1000))
    lspt.on_disk(0, 1000)
    handler = DmHandler(-1, Store(), lspt, 0, Readahead(64), False, None)
    handler._uffd = FakeUffd()
    yield handler
    lspt.close()


def write_and_evict(handler, first, count):
    """These pages are HERE: the application writes them, and LPET evicts them."""
    left = handler._lspt.leaving(first, count)
    assert left == [(first, left[0][1])] and len(left[0][1]) == count
    for page in range(first, first + count):
        handler._store.version[page] += 1
    handler._lspt.gone(left)


def test_a_window_that_was_asked_for_ahead_comes_with_the_next_fault(handler):
    for page in (100, 101):
        handler._claim(page, False)
    asked = len(handler._store.asked)
    [stream] = handler._readahead._streams
    assert stream.ahead.pages == range(109, 125)
    handler._claim(109, False)
    assert list(pages_in(handler._lspt.here())) == list(range(100, 125))
    assert len(handler._store.asked) == asked + 1, "which is the one after it"
    assert [one.ended for one in handler._store.asked] == [1] * asked + [0]


@pytest.mark.parametrize("asked", ["ahead of need", "now"])
def test_bytes_that_were_asked_for_before_another_stream_brought_the_page_are_not_installed(
    handler, asked
):
    for page in (220, 219, 211, 100, 101, 109, 125):
        handler._claim(page, False)
    down, up = handler._readahead._streams
    assert (up.ahead.pages, down.ahead) == (range(157, 196), None)  # which wanted some of those
    if asked == "now":
        up.ahead = None
    handler._claim(157, False)
    write_and_evict(handler, 157, 39)
    handler._claim(195, False)
    here = list(pages_in(handler._lspt.here()))
    assert {164, 195} <= set(here)
    installed = handler._uffd.version
    assert [installed[page] for page in here] == [handler._store.version[page] for page in here]
    assert max(one.ended for one in handler._store.asked) == 1
