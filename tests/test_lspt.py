"""lspt.py: every transition of a page, what claims it and what does not, and the waits."""

import bisect
import contextlib
import os
import random
import select
import signal
import threading
import traceback
from types import SimpleNamespace

import pytest
from conftest import close, shared_memory, wait_for

from edm.lspt import (
    ANY_HERE,
    AWAY,
    AWAY_RUN,
    AWAYS,
    COMING,
    FETCHED,
    GENERATIONS,
    HERE,
    HERE_RUN,
    LEAVING,
    LONGER,
    LOST,
    LSPT,
    NEW,
    NO_HOLES,
    PART,
    PEAK,
    RESIDENT,
    ROOM_WANTED,
    SETTLED,
    SMALL,
    SOON,
    UNSETTLED,
    Claimed,
    runs,
)
from edm.pager import Pager
from edm.uffd_ctypes import PAGE_SIZE

# For bytes.translate: without the generations of pages that are AWAY.
ONE_AWAY = bytes(AWAY if AWAY <= byte < LOST else byte for byte in range(256))


@pytest.fixture
def make(woken):
    """Make an LSPT that is closed with the test."""
    made = []

    def make(pages=100, high=100, low=0, plain=False):
        made.append(LSPT(pages, high, low, plain, -1, 0))
        return made[-1]

    yield make
    for lspt in made:
        close(lspt)


def count_away(lspt):
    return sum(states.translate(ONE_AWAY).count(AWAY) for _, states in lspt.ever_set(0, lspt.pages))


def expect(lspt, wanted):
    """As the DM-Handler, when the first of these faults: its state, and the runs of pages that come."""
    state = lspt.expect(wanted[0])
    if state is None or state >= LOST:
        return state, []
    return ONE_AWAY[state], lspt.expect_more(wanted)


def ascending(pages):
    return pages if pages.step > 0 else pages[::-1]


def come(lspt, first, count=1):
    """NEW or AWAY → HERE, one after the other."""
    for page in range(first, first + count):
        state, runs = expect(lspt, range(page, page + 1))
        assert len(runs) == 1, f"page {page} is {state}"
        lspt.arrived(runs[0])


def evict(lspt, first, count=1):
    """HERE → AWAY."""
    lspt.gone(lspt.claim(first, count, ANY_HERE))


def taken(*claims):
    """(first page, states before) of each run of pages that were claimed."""
    return [
        (first, claimed.before[first - claimed.page :][:count])
        for claimed in claims
        for first, count in claimed.leaving
    ]


def held(claimed):
    """(page, state before) of each page that was claimed."""
    return [(first + at, state) for first, run in taken(claimed) for at, state in enumerate(run)]


def others(*claims):
    """The runs of pages that other threads had."""
    return [run for each in claims for run in runs(each.page, each.before, UNSETTLED)]


def ever_set(lspt, page, count):
    """The runs that LSPT.ever_set finds."""
    return [(first, len(states)) for first, states in lspt.ever_set(page, count)]


def freeing(lspt, page, count):
    """What is claimed at first when these pages are freed."""
    return [lspt.claim(*part, SETTLED) for part in ever_set(lspt, page, count)]


def free(lspt, claims):
    for claimed in claims:
        lspt.freed(claimed)


def rings(lspt, bell="for_handler"):
    """Was this told something since this was last asked?"""
    fd = getattr(lspt, bell)
    return bool(select.select([fd], [], [], 0)[0]) and os.eventfd_read(fd) > 0


def test_runs_are_of_neighbours():
    before = bytes((HERE, HERE + 63, NEW, AWAY, HERE + 1, LOST, NEW))
    assert list(runs(10, before, HERE_RUN)) == [(10, 2), (14, 1)]


# ---------------------------------------------------------------- pages come


def test_a_page_comes_leaves_comes_back_and_is_freed(make):
    lspt = make()
    assert lspt.expect(7) == NEW
    assert lspt.state[7] == COMING and lspt.figures[RESIDENT] == 1
    lspt.arrived(range(7, 8))
    assert lspt.state[7] == HERE
    left = lspt.claim(0, 100, ANY_HERE)
    assert taken(left) == [(7, bytes((HERE,)))] and lspt.state[7] == LEAVING
    assert lspt.figures[RESIDENT] == 1, "it takes its memory until it has gone"
    lspt.gone(left)
    assert lspt.state[7] == AWAY and lspt.figures[RESIDENT] == 0
    assert lspt.expect(7) == AWAY
    lspt.arrived(range(7, 8))
    found = freeing(lspt, 0, 100)
    assert others(*found) == [] and lspt.state[7] == LEAVING
    free(lspt, found)
    assert lspt.state[:] == bytes(100) and lspt.figures[RESIDENT] == 0
    assert lspt.figures[PEAK] == 1


@pytest.mark.parametrize(
    "wanted, expected",
    [
        (range(15, 20), [range(15, 20)]),
        (range(15, 40), [range(15, 20), range(23, 40)]),  # around those that are HERE
        (range(15, 23), [range(15, 20)]),
        (range(19, 40), [range(19, 20), range(23, 40)]),
        (range(90, 130), [range(90, 100)]),  # the space ends
        (range(30, 10, -1), [range(30, 22, -1), range(19, 10, -1)]),  # downward
        (range(5, -1, -1), [range(5, -1, -1)]),
        (range(24, 40, 7), [range(24, 40, 7)]),  # strided, without what lies between
        (range(13, 60, 7), [range(13, 14), range(27, 60, 7)]),
        (range(60, 65), [range(60, 62), range(63, 65)]),  # around the page that is LOST
        (range(66, 60, -1), [range(66, 62, -1), range(61, 60, -1)]),
        (range(65, 80), [range(65, 80)]),  # one is AWAY, the others are NEW
    ],
)
def test_the_missing_pages_of_a_window_come_together(make, wanted, expected):
    lspt = make(high=1000)
    come(lspt, 20, 3)
    lspt.state[62], lspt.state[70] = LOST, AWAY
    before = lspt.state[:]
    assert expect(lspt, wanted) == (NEW, expected)
    pages = {page for run in expected for page in run}
    assert {page for page, state in enumerate(lspt.state[:]) if state == COMING} == pages
    assert lspt.figures[RESIDENT] == 3 + len(pages)
    for run in expected:
        lspt.arrived(ascending(run))
    after = bytes(HERE if page in pages else state for page, state in enumerate(before))
    assert lspt.state[:] == after


def test_pages_that_left_come_together_whenever_that_was_and_if_need_be_without_new_ones(make):
    lspt = make()
    come(lspt, 10, 10)
    evict(lspt, 10, 4)
    lspt.figures[FETCHED] += lspt.quarter
    evict(lspt, 14, 2)
    assert lspt.expect_more(range(8, 40), AWAY_RUN) == [range(10, 16)]
    resident = lspt.figures[RESIDENT]
    assert lspt.expect_more(range(15, 40), AWAY_RUN) == [] and lspt.figures[RESIDENT] == resident
    evict(lspt, 16, 4)
    assert expect(lspt, range(19, 0, -1)) == (AWAY, [range(19, 15, -1), range(9, 0, -1)])


@pytest.mark.parametrize("wanted", [range(20), range(20, 0, -1), range(0, 50, 5)])
def test_no_more_pages_come_than_there_is_room_for(make, wanted):
    lspt = make(high=10)
    come(lspt, 50, 6)
    assert expect(lspt, wanted) == (NEW, [wanted[:4]])
    assert lspt.figures[ROOM_WANTED] == 0
    assert lspt.expect(90) is None and lspt.state[90] == NEW
    assert lspt.figures[ROOM_WANTED]
    assert lspt.expect_more(range(90, 95)) == []
    assert lspt.figures[RESIDENT] == lspt.figures[PEAK] == 10


def test_no_more_pages_come_around_others_than_there_is_room_for(make):
    lspt = make(high=10)
    come(lspt, 50, 3)
    assert expect(lspt, range(48, 60)) == (NEW, [range(48, 50), range(53, 58)])
    assert lspt.figures[RESIDENT] == lspt.figures[PEAK] == 10


@pytest.mark.parametrize("state", [LOST, COMING, LEAVING, HERE, HERE + 63])
def test_a_page_in_another_state_is_not_claimed(make, state):
    lspt = make()
    lspt.state[5] = state
    assert lspt.expect(5) == state == lspt.state[5]
    assert lspt.expect(4) == NEW
    assert lspt.expect_more(range(4, 20), AWAY_RUN) == []
    assert lspt.expect_more(range(4, 20)) == [range(4, 5), range(6, 20)] and lspt.state[5] == state


def test_arrived_gives_a_page_the_generation_in_which_it_came(make):
    lspt = make(high=40)
    for page in range(15):
        come(lspt, page)
    assert lspt.quarter == 40 // 4 == 10
    assert lspt.state[:15] == bytes((*[HERE] * 9, *[HERE + 1] * 6)) and lspt.generation() == 1


def test_generations_count_on_when_their_numbers_begin_anew(make):
    lspt = make()
    lspt.figures[FETCHED] = (GENERATIONS + 3) * lspt.quarter
    come(lspt, 0)
    assert lspt.state[0] == HERE + 3
    assert taken(lspt.claim(0, 100, lspt.older_than(1))) == []
    lspt.figures[FETCHED] = (2 * GENERATIONS + 2 - LONGER) * lspt.quarter
    age = GENERATIONS - 1 - LONGER
    assert taken(lspt.claim(0, 100, lspt.older_than(age + 1))) == []
    assert taken(lspt.claim(0, 100, lspt.older_than(age))) == [(0, bytes((HERE + 3,)))]


def test_what_could_not_be_had_is_away_and_lost_is_lost_until_it_is_freed(make):
    lspt = make()
    come(lspt, 5, 5)
    evict(lspt, 5, 5)
    expect(lspt, range(5, 10))
    lspt.not_coming(range(8, 10))
    assert lspt.state[5:11] == bytes((COMING, COMING, COMING, AWAY, AWAY, NEW))
    assert lspt.figures[RESIDENT] == 3
    lspt.not_coming(range(7, 8), LOST)
    assert lspt.state[7] == LOST and lspt.figures[RESIDENT] == 2
    lspt.arrived(range(5, 7))
    assert taken(lspt.claim(0, 100, ANY_HERE)) == [(5, bytes((HERE, HERE)))], (
        "a lost page does not leave"
    )
    _, [strided] = expect(lspt, range(20, 40, 4))
    lspt.not_coming(strided)
    assert [page for page in range(10, 60) if lspt.state[page]] == [20, 24, 28, 32, 36]
    [found] = freeing(lspt, 7, 90)
    assert held(found)[0] == (7, LOST) and others(found) == []
    lspt.freed(found)
    assert lspt.state[7:] == bytes(93) and lspt.figures[RESIDENT] == 2


# ---------------------------------------------------------------- pages leave


def test_pages_leave_with_the_holes_between_them(make):
    lspt = make()
    come(lspt, 10, 3)
    come(lspt, 15, 2)
    come(lspt, 20)
    evict(lspt, 16)
    left = lspt.claim(5, 50, ANY_HERE)
    here, new, away = HERE, NEW, AWAY
    assert taken(left) == [
        (10, bytes((here, here, here, new, new, here, away, new, new, new, here)))
    ]
    assert lspt.state[10:21] == bytes((LEAVING,)) * 11, "nobody may bring the holes meanwhile"
    assert lspt.state[9] == lspt.state[21] == NEW
    assert lspt.figures[RESIDENT] == 5
    lspt.gone(left)
    assert lspt.state[10:21] == bytes(
        (away, away, away, new, new, away, away, new, new, new, away)
    ), "a hole is what it was"
    assert lspt.figures[RESIDENT] == 0


@pytest.mark.parametrize("blocks", [LOST, COMING, LEAVING])
def test_what_is_in_other_hands_or_lost_is_no_hole(make, blocks):
    lspt = make()
    come(lspt, 10, 5)
    lspt.state[12] = blocks
    assert taken(lspt.claim(0, 100, ANY_HERE)) == [
        (10, bytes((HERE, HERE))),
        (13, bytes((HERE, HERE))),
    ]
    assert lspt.state[12] == blocks


def test_only_pages_of_the_range_leave_and_without_holes_each_run_by_itself(make):
    lspt = make()
    come(lspt, 10, 3)
    come(lspt, 15, 3)
    left = [(11, bytes((HERE,)) * 2), (15, bytes((HERE,)) * 2)]
    assert taken(lspt.claim(11, 6, NO_HOLES)) == left
    assert lspt.state[9:19] == bytes(
        (NEW, HERE, *[LEAVING] * 2, NEW, NEW, *[LEAVING] * 2, HERE, NEW)
    )
    assert taken(lspt.claim(11, 6, ANY_HERE)) == [], "they are in somebody's hands"
    lspt.expect(13)
    claimed = lspt.claim(10, 7, NO_HOLES)
    assert taken(claimed) == [(10, bytes((HERE,)))] and others(claimed) == [(11, 3), (15, 2)]


def test_only_pages_old_enough_leave_and_younger_ones_between_them_are_no_holes(make):
    lspt = make()
    for generation, page in enumerate((10, 11, 13, 14)):
        lspt.figures[FETCHED] = generation * lspt.quarter
        come(lspt, page)
    lspt.figures[FETCHED] = 3 * lspt.quarter
    assert lspt.older_than(-LONGER) == ANY_HERE
    assert taken(lspt.claim(0, 100, lspt.older_than(2))) == [(10, bytes((HERE, HERE + 1)))]
    assert taken(lspt.claim(0, 100, lspt.older_than(2))) == []
    assert taken(lspt.claim(0, 100, lspt.older_than(1))) == [(13, bytes((HERE + 2,)))]
    assert taken(lspt.claim(0, 100, lspt.older_than(0))) == [(14, bytes((HERE + 3,)))]


def test_ages_are_right_when_the_numbers_of_generations_begin_anew(make):
    lspt = make()
    for generation in (GENERATIONS - 1, GENERATIONS, GENERATIONS + 1):
        lspt.figures[FETCHED] = generation * lspt.quarter
        come(lspt, generation - GENERATIONS + 1)
    assert lspt.state[:3] == bytes((HERE + GENERATIONS - 1, HERE, HERE + 1))
    assert [first for first, _ in taken(lspt.claim(0, 100, lspt.older_than(2)))] == [0]
    assert [first for first, _ in taken(lspt.claim(0, 100, lspt.older_than(1)))] == [1]


def test_gone_notes_when_the_pages_left(make):
    lspt = make()
    come(lspt, 10, 2)
    left = lspt.claim(0, 100, ANY_HERE)
    lspt.figures[FETCHED] = (GENERATIONS + 5) * lspt.quarter
    lspt.gone(left)
    assert lspt.state[10:12] == bytes((AWAY + (GENERATIONS + 5) % AWAYS,)) * 2


@pytest.mark.parametrize("began", [0, AWAYS - 1, GENERATIONS - 1])
@pytest.mark.parametrize("since, stays", [(0, True), (SOON, True), (SOON + 1, False)])
def test_a_page_that_comes_back_soon_after_it_left_stays_longer(make, began, since, stays):
    lspt, page = make(), 10
    lspt.figures[FETCHED] = began * lspt.quarter
    come(lspt, page)
    evict(lspt, page)
    now = began + since
    lspt.figures[FETCHED] = now * lspt.quarter
    state = lspt.expect(page)
    lspt.arrived(range(page, page + 1), state)
    come(lspt, 11)
    for later in range(LONGER + 2):
        lspt.figures[FETCHED] = (now + later) * lspt.quarter
        leaves = later > LONGER or (later and not stays)
        assert (lspt.older_than(1)[lspt.state[page]] == 255) == leaves
        assert (lspt.older_than(1)[lspt.state[11]] == 255) == (later > 0)
        assert (lspt.older_than(0)[lspt.state[page]] == 255) == (later >= LONGER or not stays)
        assert lspt.older_than(-LONGER)[lspt.state[page]] == 255


def test_a_page_that_arrives_alone_is_as_one_that_arrives_with_others(make):
    lspt, page = make(3 * PART), 2 * PART + 1
    for arrives in (
        lspt.page_arrived,
        lambda page, before: lspt.arrived(range(page, page + 1), before),
    ):
        found = []
        for _ in range(2):  # NEW, and back soon
            arrives(page, lspt.expect(page))
            found.append(lspt.state[page])
            assert list(lspt.runs_here()) == [(page, 1)]
            evict(lspt, page)
        assert found == [HERE, HERE + LONGER]
        free(lspt, freeing(lspt, page, 1))


def test_a_page_that_is_new_is_not_made_to_stay(make):
    lspt = make()
    lspt.arrived(range(10, 11), lspt.expect(10))
    assert lspt.state[10] == HERE + lspt.generation()


def test_stays_makes_the_pages_as_they_were(make):
    lspt = make()
    for generation in (3, 4):
        lspt.figures[FETCHED] = generation * lspt.quarter
        come(lspt, 10 + 2 * generation)
    before = lspt.state[:]
    lspt.stays(lspt.claim(0, 100, ANY_HERE))
    assert lspt.state[:] == before and lspt.figures[RESIDENT] == 2


# ---------------------------------------------------------------- freeing


def test_freeing_takes_every_page_but_those_in_other_hands(make):
    lspt = make()
    come(lspt, 10, 8)
    evict(lspt, 10, 2)
    theirs = lspt.claim(13, 2, ANY_HERE)
    expect(lspt, range(20, 22))
    found = freeing(lspt, 8, 15)
    assert others(*found) == [(13, 2), (20, 2)]
    new, away, here = NEW, AWAY, HERE
    assert taken(*found) == [
        (8, bytes((new, new, away, away, here))),
        (15, bytes((here, here, here, new, new))),
        (22, bytes((new,))),
    ]
    free(lspt, found)
    assert lspt.state[8:23] == bytes((*[NEW] * 5, *[LEAVING] * 2, *[NEW] * 5, *[COMING] * 2, NEW))
    assert lspt.figures[RESIDENT] == 4
    lspt.arrived(range(20, 22))
    lspt.gone(theirs)
    for [found] in (freeing(lspt, 13, 2), freeing(lspt, 20, 2)):
        assert others(found) == []
        lspt.freed(found)
    assert lspt.state[:] == bytes(100) and lspt.figures[RESIDENT] == 0


def test_pages_that_nobody_may_free_stay_as_they_were(make):
    lspt = make()
    come(lspt, 10, 3)
    evict(lspt, 11)
    before = lspt.state[:]
    lspt.stays(*freeing(lspt, 0, 100))
    assert lspt.state[:] == before and lspt.figures[RESIDENT] == 2


@pytest.mark.parametrize("which", [NO_HOLES, SETTLED])
def test_pages_in_other_hands_are_claimed_when_these_have_let_go(make, start, which):
    lspt = make()
    come(lspt, 10, 4)
    theirs, too = lspt.claim(10, 1, ANY_HERE), lspt.claim(13, 1, ANY_HERE)
    lspt.expect(20)
    found = []

    def claim():
        for claimed in lspt.claims([(8, 16)], which, 8, to_end=False):
            part = claimed.page, len(claimed.before)
            found.append((part, [page for page, state in held(claimed) if state >= HERE]))
            lspt.freed(claimed)

    thread, _ = start(claim)
    wait_for(lambda: len(found) > 5)
    assert thread.is_alive()
    assert found[:2] == [((8, 8), [11, 12]), ((16, 8), [])]
    assert {part for part, _ in found[2:]} == {(10, 1), (13, 1), (20, 1)}
    lspt.stays(theirs)
    wait_for(lambda: ((10, 1), [10]) in found)
    lspt.gone(too)
    lspt.arrived(range(20, 21))
    thread.join(10)
    assert not thread.is_alive() and ((20, 1), [20]) in found and ((13, 1), [13]) not in found
    assert count_away(lspt) == (which == NO_HOLES) and lspt.figures[RESIDENT] == 0


def test_after_stop_pages_in_other_hands_are_claimed_no_more_and_all_others_are(make):
    lspt = make()
    come(lspt, 10, 4)
    theirs = lspt.claim(10, 1, ANY_HERE)
    lspt.stop()
    for claimed in lspt.claims([(8, 16)], NO_HOLES, 8, to_end=True):
        first = claimed.page == 8
        assert held(claimed) == ([(page, HERE) for page in (11, 12, 13)] if first else [])
        lspt.stays(claimed)
    lspt.stays(theirs)
    assert list(lspt.runs_here()) == [(10, 4)]


# ---------------------------------------------------------------- looking


def test_what_an_earlier_job_left_is_away_and_did_not_leave_of_late(make):
    lspt = make(3 * PART)
    lspt.found_on_disk(PART - 2, 4)
    lspt.found_on_disk(2 * PART + 7, 1)
    assert count_away(lspt) == 5 and lspt.figures[RESIDENT] == 0
    before = lspt.state[PART - 2]
    assert lspt.expect_more(range(PART - 3, PART + 10), AWAY_RUN) == [range(PART - 2, PART + 2)]
    lspt.arrived(range(PART - 2, PART - 1), before)
    assert lspt.state[PART - 2] == HERE, "it does not count as one that came back soon"


@pytest.mark.parametrize("ending", ["gone", "stays", "freed"])
def test_the_end_of_a_claim_wakes_the_faults_of_its_pages(make, woken, ending):
    lspt = make(PART)
    come(lspt, 10, 2)
    come(lspt, 20, 3)
    claimed = lspt.claim(0, 30, NO_HOLES)
    assert claimed.leaving == [(10, 2), (20, 3)] and not woken
    getattr(lspt, ending)(claimed)
    assert woken == [(10 * PAGE_SIZE, 13 * PAGE_SIZE)]
    getattr(lspt, ending)(lspt.claim(50, 10, NO_HOLES))
    assert len(woken) == 1, "of no pages"


def test_only_parts_that_have_pages_here_are_occupied_from_a_page_on_and_round_to_it(make):
    lspt = make(10 * PART, 2 * PART)
    come(lspt, 2 * PART - 2, PART + 4)  # in three parts
    come(lspt, 3 * PART + 100)
    come(lspt, 8 * PART)
    found = freeing(lspt, 2 * PART - 2, PART + 4)
    assert not others(*found)
    free(lspt, found)
    assert [page for page, _ in lspt.ever_set(0, 10 * PART)] == [3 * PART, 8 * PART]
    evict(lspt, 8 * PART)
    lspt.expect(3 * PART + 200)
    assert [page for page, _ in lspt.ever_set(0, 10 * PART)] == [3 * PART, 8 * PART]
    assert [page for page, _ in lspt.occupied()] == [3 * PART]
    here = 3 * PART + 100
    assert [*lspt.occupied(here)] == [(here, PART - 100)]
    assert [*lspt.occupied(here + 1)] == [(3 * PART, 101)]
    evict(lspt, 3 * PART + 100)
    assert [*lspt.occupied()] == [*lspt.runs_here()] == []
    come(lspt, 2 * PART)
    assert [*lspt.runs_here()] == [(2 * PART, 1)], "they may be used again"


def test_only_the_parts_that_pages_were_ever_in_are_looked_at(make):
    lspt = make(10 * PART)
    assert ever_set(lspt, 0, 10 * PART) == list(lspt.runs_here()) == []
    come(lspt, 3 * PART + 5, 2)
    expect(lspt, range(6 * PART - 1, 6 * PART + 1))
    lspt.found_on_disk(9 * PART, 1)
    assert ever_set(lspt, 0, 10 * PART) == [(n * PART, PART) for n in (3, 5, 6, 9)]
    assert ever_set(lspt, 3 * PART + 10, 3 * PART) == [
        (5 * PART, PART), (6 * PART, 10),
    ]  # fmt: skip
    assert ever_set(lspt, 4 * PART, PART) == []
    for first, states in lspt.ever_set(3 * PART + 10, 3 * PART):
        assert states == lspt.state[first : first + len(states)]
    assert list(lspt.runs_here()) == [(3 * PART + 5, 2)]
    come(lspt, 3 * PART + 10)
    come(lspt, 4 * PART - 1, 2)
    assert [*lspt.runs_here()] == [
        (3 * PART + 5, 2), (3 * PART + 10, 1), (4 * PART - 1, 1), (4 * PART, 1),
    ]  # fmt: skip


def test_away_counts_the_pages_that_only_the_store_has(make):
    lspt = make()
    come(lspt, 10, 6)
    evict(lspt, 10, 2)
    lspt.figures[FETCHED] = (GENERATIONS - 1) * lspt.quarter
    evict(lspt, 12, 2)
    assert count_away(lspt) == 4
    lspt.expect(10)
    lspt.freed(*freeing(lspt, 13, 1))
    assert count_away(lspt) == 2


def test_what_is_here_comes_or_leaves_is_located_here_and_what_was_here_on_the_disk(make):
    INSTANCE, DISK = 1, 2
    lspt = make()
    lspt.write(range(10, 16), bytes((NEW, AWAY, HERE, LOST, COMING, LEAVING)))
    found = Pager.locations(SimpleNamespace(_lspt=lspt), 10, 6)
    assert found == bytes((0, DISK, INSTANCE, DISK, INSTANCE, INSTANCE))


def test_the_area_of_a_page_is_known(make):
    lspt = make()
    assert lspt.area(5) == range(5, 6)
    lspt.areas += [(10, 20, "one"), (30, 5, ""), (50, 1, "")]
    for page, area in {
        9: range(9, 10), 10: range(10, 30), 29: range(10, 30), 30: range(30, 35), 35: range(35, 36),
        50: range(50, 51), 51: range(51, 52), 99: range(99, 100),
    }.items():  # fmt: skip
        assert lspt.area(page) == area
    lspt.areas = [(0, lspt.pages, "all")]
    assert lspt.area(0) == lspt.area(lspt.pages - 1) == range(lspt.pages)


def test_an_area_that_another_thread_forgets_meanwhile_is_none(make, monkeypatch):
    lspt = make()
    lspt.areas += [(10, 20, "one"), (30, 5, ""), (50, 1, "")]
    real = bisect.bisect_right

    def bisect_right(areas, key):
        found = real(areas, key)
        del areas[0]
        return found

    monkeypatch.setattr(bisect, "bisect_right", bisect_right)
    assert [lspt.area(30), lspt.area(50)] == [range(30, 31), range(50, 51)]


def test_untouched_parts_of_a_huge_table_cost_no_memory(make):
    pages, before = 1 << 32, shared_memory()
    lspt = make(pages, high=1 << 20)
    for page in (0, pages // 2, pages - 1):
        come(lspt, page)
    evict(lspt, pages // 2)
    assert list(lspt.runs_here()) == [(0, 1), (pages - 1, 1)] and count_away(lspt) == 1
    found = freeing(lspt, 1, pages - 1)
    assert len(taken(*found)) == 2 and others(*found) == [], "page 0 alone is in the first part"
    free(lspt, found)
    assert list(lspt.runs_here()) == [(0, 1)] and lspt.figures[RESIDENT] == 1
    used = pages // PART + 4 * 3 * PAGE_SIZE  # bytes
    assert shared_memory() - before <= used >> 10


# ---------------------------------------------------------------- waiting


@pytest.fixture
def start():
    """Start a call in a thread, which has to end; returns (thread, list that gets its result)."""
    threads = []

    def start(call):
        result = []
        threads.append(threading.Thread(target=lambda: result.append(call()), daemon=True))
        threads[-1].start()
        return threads[-1], result

    yield start
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("how", ["gone", "freed", "not_coming", "lost"])
def test_the_handler_is_told_when_there_is_room_if_it_wants_some(make, how, wanted):
    lspt = make(high=4)
    come(lspt, 0, 3)
    lspt.expect(3)
    if wanted:
        assert lspt.expect(9) is None
    assert bool(lspt.figures[ROOM_WANTED]) == wanted and not rings(lspt)
    {
        "gone": lambda: lspt.gone(lspt.claim(0, 1, ANY_HERE)),
        "freed": lambda: lspt.freed(*freeing(lspt, 0, 1)),
        "not_coming": lambda: lspt.not_coming(range(3, 4)),
        "lost": lambda: lspt.not_coming(range(3, 4), LOST),
    }[how]()
    assert rings(lspt) == wanted and not lspt.figures[ROOM_WANTED]
    assert lspt.expect(9) == NEW


def test_what_makes_no_room_does_not_tell_the_handler(make):
    lspt = make(high=4)
    come(lspt, 0, 4)
    lspt.expect(9)
    lspt.stays(lspt.claim(0, 4, ANY_HERE))
    lspt.gone(lspt.claim(20, 4, ANY_HERE))
    lspt.freed(lspt.claim(20, 4, SETTLED))
    assert lspt.figures[ROOM_WANTED] and not rings(lspt)


def test_in_the_plain_way_there_is_room_when_lpet_has_ended_its_run(make, start):
    lspt = make(pages=4 * SMALL, high=2 * SMALL, low=SMALL, plain=True)
    come(lspt, 0, 2 * SMALL)
    assert lspt.as_the_wiki_does
    assert not rings(lspt, "for_lpet"), "it is not woken before a fault finds no room"
    lspt.expect(3 * SMALL)
    assert lspt.wait_to_evict() and not rings(lspt), "nothing has left"
    evict(lspt, 0, 1)
    assert not rings(lspt) and lspt.figures[ROOM_WANTED], "others may leave yet"
    start(lspt.wait_to_evict)
    wait_for(lambda: rings(lspt))
    assert not lspt.figures[ROOM_WANTED]
    assert lspt.expect(3 * SMALL) == NEW
    lspt.stop()


def test_lpet_sleeps_until_a_fault_finds_no_room(make, start):
    lspt = make(high=4, low=2)
    lpet, woken = start(lspt.wait_to_evict)
    come(lspt, 0, 4)
    lpet.join(0.05)
    assert lpet.is_alive(), "a small table is filled first"
    assert lspt.expect(9) is None
    lpet.join(10)
    assert woken == [4 - 2]
    assert lspt.wait_to_evict(), "as long as a fault waits it does not sleep"


def test_a_larger_tables_lpet_is_woken_once_halfway_between_the_thresholds(make, start):
    lspt = make(pages=4 * SMALL, high=2 * SMALL, low=SMALL)
    come(lspt, 0, SMALL)
    lpet, woken = start(lspt.wait_to_evict)
    lpet.join(0.05)
    half = 3 * SMALL // 2
    come(lspt, SMALL, half - 1 - SMALL)
    lpet.join(0.05)
    assert lpet.is_alive()
    come(lspt, half - 1)
    lpet.join(10)
    assert woken == [half - SMALL]
    come(lspt, half)
    assert not rings(lspt, "for_lpet"), "it is awake"
    assert lspt.wait_to_evict(), "and does not sleep before there is room"
    evict(lspt, 0, SMALL)
    lpet, woken = start(lspt.wait_to_evict)
    lpet.join(0.05)
    assert lpet.is_alive()
    come(lspt, 0, SMALL)
    lpet.join(10)
    assert woken[0] > 0, "it sleeps again, so it has to be woken again"


def test_lpet_sleeps_with_one_page_between_the_thresholds_until_there_is_one_to_evict(make, start):
    lspt = make(pages=4 * SMALL, high=2 * SMALL, low=2 * SMALL - 1)
    come(lspt, 0, 2 * SMALL - 1)
    lpet, woken = start(lspt.wait_to_evict)
    lpet.join(0.05)
    assert lpet.is_alive()
    come(lspt, 2 * SMALL - 1)
    lpet.join(10)
    assert woken == [1]


def test_who_is_woken_before_it_sleeps_does_not_sleep_and_only_once(make, start):
    lspt = make(high=4)
    come(lspt, 0, 4)
    assert lspt.expect(9) is None
    assert lspt.wait_to_evict()
    evict(lspt, 0, 4)
    lpet, _ = start(lspt.wait_to_evict)
    lpet.join(0.05)
    assert lpet.is_alive(), "there is nothing to do any more"
    lspt.stop()


def test_stop_ends_every_wait_for_good(make, start):
    lspt = make(high=4)
    lpet, woken = start(lspt.wait_to_evict)
    handler, heard = start(lambda: select.select([lspt.for_handler], [], [], 10)[0])
    lpet.join(0.05)
    assert lpet.is_alive() and handler.is_alive() and not lspt.stopped()
    lspt.stop()
    lpet.join(10)
    handler.join(10)
    assert woken == [0] and heard == [[lspt.for_handler]]
    assert lspt.stopped()
    come(lspt, 0, 4)
    lspt.expect(5)
    assert not lspt.wait_to_evict(), "even if there is something to do"


# ---------------------------------------------------------------- two processes


@pytest.fixture
def fork():
    """Run a function in a forked process, which ends with the test; its process id."""
    children = []

    def fork(body, *arguments):
        child = os.fork()
        if child:
            children.append(child)
            return child
        try:
            body(*arguments)
            os._exit(0)
        except BaseException:  # noqa: BLE001 - it would go on with the tests
            traceback.print_exc()
        finally:
            os._exit(1)

    yield fork
    for child in children:
        with contextlib.suppress(ChildProcessError):  # the test has waited for it
            if os.waitpid(child, os.WNOHANG) == (0, 0):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_what_a_forked_process_does_is_seen_here(make, fork):
    lspt = make(3 * PART, high=4)

    def body():
        come(lspt, 2 * PART, 4)
        lspt.expect(5)
        lspt.gone(lspt.claim(2 * PART, 1, ANY_HERE))
        lspt.stop()

    assert ended(fork(body)) == 0
    assert list(lspt.runs_here()) == [(2 * PART + 1, 3)] and count_away(lspt) == 1
    assert (lspt.figures[RESIDENT], lspt.figures[PEAK]) == (3, 4)
    assert rings(lspt) and lspt.stopped()
    assert lspt.state[2 * PART] == AWAY + lspt.generation()


PAGE_30 = Claimed(30, bytes((HERE,)), b"\xff", [(30, 1)])
TRANSITIONS = {
    "expect": lambda lspt: lspt.expect(50),
    "expect_more": lambda lspt: lspt.expect_more(range(49, 52)),
    "not_coming": lambda lspt: lspt.not_coming(range(20, 21)),
    "claim": lambda lspt: lspt.claim(0, 10, ANY_HERE),
    "gone": lambda lspt: lspt.gone(PAGE_30),
    "stays": lambda lspt: lspt.stays(PAGE_30),
    "freeing": lambda lspt: freeing(lspt, 0, 100),
    "freed": lambda lspt: lspt.freed(PAGE_30),
    "found_on_disk": lambda lspt: lspt.found_on_disk(60, 2),
}


@pytest.mark.parametrize("name", TRANSITIONS)
def test_no_transition_of_another_process_gets_between_while_the_lock_is_held(make, fork, name):
    lspt = make()
    come(lspt, 0, 2)
    lspt.expect(20)
    come(lspt, 30)
    lspt.claim(30, 1, ANY_HERE)
    before = lspt.state[:], lspt.figures[RESIDENT]
    ours, theirs = os.pipe()

    def body():
        os.write(theirs, b"1")
        TRANSITIONS[name](lspt)
        os.write(theirs, b"2")

    with lspt.lock:
        child = fork(body)
        assert os.read(ours, 1) == b"1"
        assert not select.select([ours], [], [], 0.02)[0]
        assert (lspt.state[:], lspt.figures[RESIDENT]) == before
    assert select.select([ours], [], [], 10)[0] and os.read(ours, 1) == b"2"
    assert ended(child) == 0
    assert lspt.state[:] != before[0]
    os.close(ours)
    os.close(theirs)


class Actor:
    """Takes random pages of a table into its hands, and lets go of them as the picture says."""

    def __init__(self, lspt, seed, within=None):
        self.lspt, self.dice = lspt, random.Random(seed)
        self.within = within or range(lspt.pages)  # the pages that it takes
        self.coming = []  # (pages, state before)
        self.left = []  # [claimed]
        self.freeing = []

    def here(self):
        """How many LEAVING pages in these hands were here."""
        claims = *self.left, *self.freeing
        return sum(state >= HERE for claimed in claims for _, state in held(claimed))

    def step(self):
        self.dice.choice((self.expect, self.end_coming, self.leave, self.end_left, self.free))()

    def expect(self):
        start = self.dice.choice(self.within)
        step = self.dice.choice((1, 1, -1, 7))
        length = self.dice.randint(1, 12)
        wanted = range(start, start + step * length, step)
        inside = [page for page in wanted if 0 <= page < self.lspt.pages]
        _, runs = expect(self.lspt, wanted[: len(inside)])
        self.coming += map(ascending, runs)

    def end_coming(self):
        if self.coming:
            pages = self.coming.pop(self.dice.randrange(len(self.coming)))
            end = self.dice.randrange(6)
            if end < 2:
                self.lspt.not_coming(pages, AWAY if end else LOST)
            else:
                self.lspt.arrived(pages)

    def leave(self):
        which = self.dice.choice((ANY_HERE, NO_HOLES, self.lspt.older_than(1)))
        page = self.dice.choice(self.within)
        count = min(self.dice.randint(1, 40), self.lspt.pages - page)
        self.left.append(self.lspt.claim(page, count, which))

    def end_left(self):
        if self.freeing:
            self.lspt.freed(self.freeing.pop())
        elif self.left:
            self.dice.choice((self.lspt.gone, self.lspt.gone, self.lspt.stays))(self.left.pop())

    def free(self):
        if self.dice.random() < 0.2:
            page = self.dice.choice(self.within)
            self.freeing += freeing(self.lspt, page, min(20, self.lspt.pages - page))

    def let_go(self):
        while self.coming or self.left or self.freeing:
            self.end_coming()
            self.end_left()


def count(lspt, states):
    return sum(state in states for state in lspt.state[:])


def test_resident_counts_whatever_two_processes_do_at_once(make, fork):
    pages, rounds = 2 * PART, 10
    for seed in range(2):
        lspt = make(pages, high=100)
        pipes = [(os.pipe(), os.pipe()) for _ in range(2)]

        def body(number, seed=seed, lspt=lspt, pipes=pipes):
            # Where two parts meet, so that the actors meet too.
            actor = Actor(lspt, 2 * seed + number, range(PART - 300, PART + 300))
            (go, _), (_, told) = pipes[number]
            for _ in range(rounds):
                for _ in range(1000):
                    actor.step()
                os.write(told, b"%8d" % actor.here())
                os.read(go, 1)
            actor.let_go()

        children = [fork(body, number) for number in range(2)]
        for _ in range(rounds):
            here = 0
            for _, (tells, _) in pipes:
                assert select.select([tells], [], [], 30)[0], "a process has failed, or hangs"
                here += int(os.read(tells, 8))
            settled = count(lspt, range(HERE, 256)) + count(lspt, [COMING])
            assert lspt.figures[RESIDENT] == settled + here
            assert lspt.figures[RESIDENT] <= lspt.figures[PEAK] <= 100
            for (_, go), _ in pipes:
                os.write(go, b".")
        assert [ended(child) for child in children] == [0, 0]
        assert count(lspt, (COMING, LEAVING)) == 0
        assert lspt.figures[RESIDENT] == count(lspt, range(HERE, 256)) > 0
        assert lspt.figures[PEAK] == 100
        assert count_away(lspt) > 0
        for pipe in sum(pipes, ()):
            for fd in pipe:
                os.close(fd)


def test_any_sequence_of_transitions_does_to_each_page_what_the_picture_says(make):
    allowed = {
        "expect": {NEW: {COMING}, AWAY: {COMING}},
        "end_coming": {COMING: {HERE, AWAY, LOST}},
        "leave": {HERE: {LEAVING}, NEW: {LEAVING}, AWAY: {LEAVING}},
        "end_left": {LEAVING: {HERE, NEW, AWAY, LOST}},
        "free": {state: {LEAVING} for state in (NEW, AWAY, HERE, LOST)},
    }
    seen = set()
    for seed in range(10):
        lspt = make(120, high=60)
        actor = Actor(lspt, seed)
        for _ in range(400):
            before = [min(s, HERE) for s in lspt.state[:].translate(ONE_AWAY)]
            name = actor.dice.choice(list(allowed))
            getattr(actor, name)()
            after = [min(s, HERE) for s in lspt.state[:].translate(ONE_AWAY)]
            for old, new in zip(before, after, strict=True):
                if old != new:
                    assert new in allowed[name][old], f"{name}: {old} → {new}"
                    seen.add((name, old, new))
            here = count(lspt, range(HERE, 256)) + count(lspt, [COMING]) + actor.here()
            assert lspt.figures[RESIDENT] == here <= 60
    pictured = {
        (name, old, new) for name in allowed for old in allowed[name] for new in allowed[name][old]
    }
    assert seen == pictured - {("end_left", LEAVING, LOST)}, (
        "nobody takes lost pages but to free them"
    )
