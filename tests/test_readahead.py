"""readahead.py: which faults are a stream, and how its window grows and shrinks."""

import random

from edm.readahead import REMEMBERED, STREAMS, Ahead, Readahead


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
    assert readahead.surplus() == [] and len(readahead._recent) <= REMEMBERED


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
    assert readahead.surplus() == []


def test_the_stream_that_was_not_used_for_longest_is_the_one_to_end():
    readahead = Readahead(256)
    first = None
    for n in range(STREAMS + 1):
        readahead.fault(1000 * n)
        stream = readahead.fault(1000 * n + 1)
        first = first or stream
    assert readahead.surplus() == [first]
    readahead.ended(first)
    assert readahead.surplus() == []


def test_a_window_that_was_asked_for_in_vain_makes_the_next_streams_begin_smaller():
    readahead = Readahead(256)
    readahead.fault(0)
    stream = readahead.fault(1)
    stream.ahead = Ahead(range(9, 17), None)
    assert readahead.coming(16) is stream and readahead.coming(17) is None
    assert readahead.within(0, 9) == [] and readahead.within(16, 100) == [stream]
    readahead.ended(stream)
    assert follow(readahead, 5000, 4) == [4, 8, 16]


def test_pages_that_are_here_already_do_not_end_a_stream():
    readahead = Readahead(256)
    readahead.fault(0)
    stream = readahead.fault(1)
    readahead.used(stream, range(1, 9))
    assert readahead.fault(12) is stream


def test_a_stream_that_has_asked_ahead_is_not_continued_by_a_fault_beyond_that():
    readahead = Readahead(256)
    readahead.fault(0)
    stream = readahead.fault(1)
    readahead.used(stream, range(1, 9))
    stream.ahead = Ahead(range(9, 13), None)
    assert readahead.fault(14) is not stream


def test_readahead_can_be_turned_off():
    assert follow(Readahead(1), 0, 100) == []


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
