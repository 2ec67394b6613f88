"""lspt.py: every transition of a page, what claims it and what does not, and the waits."""

import contextlib
import ctypes
import os
import random
import select
import signal
import threading
import traceback

import pytest

from edm.lspt import (
    ANY_HERE,
    AWAITED,
    AWAY,
    CAME,
    COMING,
    GENERATION,
    GENERATIONS,
    HERE,
    LEAVING,
    LONGER,
    LOST,
    LPET_AWAKE,
    LSPT,
    NEW,
    NO_HOLES,
    PART,
    PEAK,
    QUARTERS,
    RESIDENT,
    ROOM_WANTED,
    SMALL,
    SOON,
    here_runs,
    runs_of,
)


@pytest.fixture
def make():
    """Make an LSPT that is closed with the test."""
    made = []

    def make(pages=100, high=100, low=0):
        made.append(LSPT(pages, high, low))
        return made[-1]

    yield make
    for lspt in made:
        lspt.close()


def come(lspt, first, count=1):
    """NEW or AWAY → HERE, one after the other."""
    for page in range(first, first + count):
        state, pages = lspt.expect(range(page, page + 1))
        assert len(pages) == 1, f"page {page} is {state}"
        lspt.arrived(pages, NEW)


def evict(lspt, first, count=1):
    """HERE → AWAY."""
    assert lspt.gone(lspt.leaving(first, count)) == []


def rings(lspt):
    """Was for_handler told since this was last asked?"""
    try:
        return os.eventfd_read(lspt.for_handler) > 0
    except BlockingIOError:
        return False


def test_runs_of_joins_neighbours():
    assert runs_of([]) == []
    assert runs_of([0, 1, 2, 5, 7, 8]) == [(0, 3), (5, 1), (7, 2)]


def test_here_runs_are_the_pages_of_a_leaving_range_that_were_here():
    before = bytes((HERE, HERE + 63, NEW, AWAY + 63, HERE + 1, LOST, NEW))
    assert list(here_runs((10, before))) == [(10, 2), (14, 1)]


# ---------------------------------------------------------------- pages come


def test_a_page_comes_leaves_comes_back_and_is_freed(make):
    lspt = make()
    assert lspt.expect(range(7, 8)) == (NEW, range(7, 8))
    assert lspt.state[7] == COMING and lspt.figures[RESIDENT] == 1
    lspt.arrived(range(7, 8), NEW)
    assert lspt.state[7] == HERE
    left = lspt.leaving(0, 100)
    assert left == [(7, bytes((HERE,)))] and lspt.state[7] == LEAVING
    assert lspt.figures[RESIDENT] == 1, "it takes its memory until it has gone"
    assert lspt.gone(left) == []
    assert lspt.state[7] == AWAY and lspt.figures[RESIDENT] == 0
    assert lspt.expect(range(7, 8)) == (AWAY, range(7, 8))
    lspt.arrived(range(7, 8), AWAY)
    taken, later = lspt.freeing(0, 100)
    assert later == [] and lspt.state[7] == LEAVING
    assert lspt.freed(taken) == []
    assert lspt.state[:] == bytes(100) and lspt.figures[RESIDENT] == 0
    assert lspt.figures[PEAK] == 1


def test_the_pages_of_a_window_that_are_alike_come_together(make):
    lspt = make()
    come(lspt, 20)
    assert lspt.expect(range(10, 40)) == (NEW, range(10, 20))
    lspt.arrived(range(10, 20), NEW)
    assert lspt.state[9:22] == bytes((NEW, *[HERE] * 11, NEW))
    evict(lspt, 10, 4)
    lspt.figures[GENERATION] += 1
    evict(lspt, 14, 2)
    assert lspt.expect(range(8, 40)) == (NEW, range(8, 10))
    assert lspt.expect(range(10, 40)) == (AWAY, range(10, 16)), "whenever they left"
    lspt.not_coming(range(10, 16), AWAY)
    assert lspt.expect(range(90, 130)) == (NEW, range(90, 100)), "the space ends"


def test_a_downward_window_is_claimed_from_the_page_that_faults(make):
    lspt = make()
    come(lspt, 20, 3)
    assert lspt.expect(range(30, 10, -1)) == (NEW, range(23, 31))
    assert lspt.state[22:32] == bytes((HERE, *[COMING] * 8, NEW))
    assert lspt.expect(range(5, -1, -1)) == (NEW, range(6))
    evict(lspt, 20, 3)
    assert lspt.expect(range(22, 10, -1)) == (AWAY, range(20, 23))


def test_a_strided_window_is_claimed_without_what_lies_between(make):
    lspt = make()
    assert lspt.expect(range(10, 40, 7)) == (NEW, range(10, 40, 7))
    coming = {10, 17, 24, 31, 38}
    assert [lspt.state[page] == COMING for page in range(50)] == [p in coming for p in range(50)]
    lspt.arrived(range(10, 40, 7), NEW)
    assert [lspt.state[page] == HERE for page in range(50)] == [p in coming for p in range(50)]
    evict(lspt, 24)
    assert lspt.expect(range(3, 60, 7))[1] == range(3, 10, 7)
    assert lspt.expect(range(24, 60, 7)) == (AWAY, range(24, 31, 7))


def test_no_more_pages_come_than_there_is_room_for(make):
    lspt = make(high=10)
    come(lspt, 50, 6)
    assert lspt.expect(range(20)) == (NEW, range(4))
    assert lspt.figures[ROOM_WANTED] == 0
    assert lspt.expect(range(90, 91)) == (NEW, range(0)) and lspt.state[90] == NEW
    assert lspt.figures[ROOM_WANTED] == 1 and lspt.room_wanted()
    assert lspt.figures[RESIDENT] == lspt.figures[PEAK] == 10
    lspt = make(high=10)
    come(lspt, 50, 6)
    assert lspt.expect(range(20, 0, -1)) == (NEW, range(17, 21)), "downward too"
    lspt = make(high=10)
    come(lspt, 50, 6)
    assert lspt.expect(range(0, 50, 5)) == (NEW, range(0, 20, 5)), "strided too"


@pytest.mark.parametrize("state", [LOST, COMING, LEAVING, AWAITED, HERE, HERE + 63])
def test_a_page_in_another_state_is_not_claimed(make, state):
    lspt = make()
    lspt.state[5] = state
    assert lspt.expect(range(5, 20)) == (state, range(0))
    assert lspt.figures[RESIDENT] == 0 and lspt.state[6] == NEW
    assert lspt.state[5] == (AWAITED if state == LEAVING else state)


def test_arrived_gives_a_page_the_generation_in_which_it_came(make):
    lspt = make(high=40)
    for page in range(15):
        come(lspt, page)
    assert lspt.state[:15] == bytes((*[HERE] * 10, *[HERE + 1] * 5))
    assert (lspt.figures[GENERATION], lspt.figures[CAME]) == (1, 5)
    assert 40 == QUARTERS * 10


def test_generations_count_on_when_their_numbers_begin_anew(make):
    lspt = make()
    lspt.figures[GENERATION] = GENERATIONS + 3
    come(lspt, 0)
    evict(lspt, 0)
    assert lspt.state[0] == AWAY + 3
    come(lspt, 1)
    assert lspt.state[1] == HERE + 3
    lspt.expect(range(1))
    lspt.figures[GENERATION] = 3 * GENERATIONS - 1
    lspt.arrived(range(1), AWAY + GENERATIONS - 1)
    assert lspt.state[0] == HERE + LONGER - 1


@pytest.mark.parametrize("later", [0, SOON, SOON + 1])
def test_a_page_that_comes_back_soon_lives_longer(make, later):
    lspt = make()
    lspt.figures[GENERATION] = 60
    come(lspt, 7)
    evict(lspt, 7)
    lspt.figures[GENERATION] += later
    state, pages = lspt.expect(range(7, 8))
    assert state == AWAY + 60
    lspt.arrived(pages, state)
    now = 60 + later
    expected = now + LONGER if later <= SOON else now
    assert lspt.state[7] == HERE + expected % GENERATIONS
    lspt.figures[GENERATION] = now + 2  # as old as pages are when they leave
    assert bool(lspt.leaving(0, 100, lspt.older_than(2))) == (later > SOON)
    lspt.figures[GENERATION] = now + LONGER + 2
    assert bool(lspt.leaving(0, 100, lspt.older_than(2))) == (later <= SOON)


def test_what_could_not_be_had_is_as_it_was_and_lost_is_lost(make):
    lspt = make(high=1000, pages=100)
    come(lspt, 5, 5)
    evict(lspt, 5, 5)
    state, _ = lspt.expect(range(5, 10))
    lspt.not_coming(range(8, 10), state)
    assert lspt.state[5:11] == bytes((COMING, COMING, COMING, AWAY, AWAY, NEW))
    assert lspt.figures[RESIDENT] == 3
    lspt.lost(7)
    assert lspt.state[7] == LOST and lspt.figures[RESIDENT] == 2
    lspt.arrived(range(5, 7), NEW)
    assert lspt.leaving(0, 100) == [(5, bytes((HERE, HERE)))], "a lost page does not leave"
    strided = lspt.expect(range(20, 40, 4))[1]
    lspt.not_coming(strided, NEW)
    assert lspt.state[10:60] == bytes(50)


def test_a_lost_page_is_new_when_it_was_freed(make):
    lspt = make()
    lspt.expect(range(5, 6))
    lspt.lost(5)
    taken, later = lspt.freeing(0, 10)
    assert taken == [(0, bytes((*[NEW] * 5, LOST, *[NEW] * 4)))] and later == []
    lspt.freed(taken)
    assert lspt.state[5] == NEW and lspt.figures[RESIDENT] == 0


# ---------------------------------------------------------------- pages leave


def test_pages_leave_with_the_holes_between_them(make):
    lspt = make()
    come(lspt, 10, 3)
    come(lspt, 15, 2)
    come(lspt, 20)
    evict(lspt, 16)
    left = lspt.leaving(5, 50)
    here, new, away = HERE, NEW, AWAY
    assert left == [(10, bytes((here, here, here, new, new, here, away, new, new, new, here)))]
    assert lspt.state[10:21] == bytes((LEAVING,)) * 11, "nobody may bring the holes meanwhile"
    assert lspt.state[9] == lspt.state[21] == NEW
    assert lspt.figures[RESIDENT] == 5
    lspt.gone(left)
    assert lspt.state[10:21] == bytes(
        (away, away, away, new, new, away, away, new, new, new, away)
    ), "a hole is what it was"
    assert lspt.figures[RESIDENT] == 0


@pytest.mark.parametrize("blocks", [LOST, COMING, LEAVING, AWAITED])
def test_what_is_in_other_hands_or_lost_is_no_hole(make, blocks):
    lspt = make()
    come(lspt, 10, 5)
    lspt.state[12] = blocks
    assert lspt.leaving(0, 100) == [(10, bytes((HERE, HERE))), (13, bytes((HERE, HERE)))]
    assert lspt.state[12] == blocks


def test_without_holes_each_run_of_neighbours_leaves_by_itself(make):
    lspt = make()
    come(lspt, 10, 3)
    come(lspt, 15, 2)
    assert lspt.leaving(11, 50, NO_HOLES) == [(11, bytes((HERE,)) * 2), (15, bytes((HERE,)) * 2)]
    assert lspt.state[9:18] == bytes((NEW, HERE, LEAVING, LEAVING, NEW, NEW, LEAVING, LEAVING, NEW))


def test_only_pages_of_the_range_leave(make):
    lspt = make(high=1000)
    come(lspt, 0, 100)
    assert lspt.leaving(40, 3) == [(40, bytes((HERE,)) * 3)]
    assert lspt.state[39] == lspt.state[43] == HERE
    assert lspt.leaving(40, 3) == [], "they are in somebody's hands"


def test_only_pages_old_enough_leave_and_younger_ones_between_them_are_no_holes(make):
    lspt = make()
    for generation, page in enumerate((10, 11, 13, 14)):
        lspt.figures[GENERATION] = generation
        come(lspt, page)
    lspt.figures[GENERATION] = 3
    assert lspt.older_than(0) == ANY_HERE
    assert lspt.leaving(0, 100, lspt.older_than(2)) == [(10, bytes((HERE, HERE + 1)))]
    assert lspt.leaving(0, 100, lspt.older_than(2)) == []
    assert lspt.leaving(0, 100, lspt.older_than(1)) == [(13, bytes((HERE + 2,)))]
    assert lspt.leaving(0, 100, lspt.older_than(0)) == [(14, bytes((HERE + 3,)))]


def test_ages_are_right_when_the_numbers_of_generations_begin_anew(make):
    lspt = make()
    for generation in (GENERATIONS - 1, GENERATIONS, GENERATIONS + 1):
        lspt.figures[GENERATION] = generation
        come(lspt, generation - GENERATIONS + 1)
    assert lspt.state[:3] == bytes((HERE + 63, HERE, HERE + 1))
    assert [first for first, _ in lspt.leaving(0, 100, lspt.older_than(2))] == [0]
    assert [first for first, _ in lspt.leaving(0, 100, lspt.older_than(1))] == [1]


def test_gone_notes_when_the_pages_left(make):
    lspt = make()
    come(lspt, 10, 2)
    left = lspt.leaving(0, 100)
    lspt.figures[GENERATION] = 5
    lspt.gone(left)
    assert lspt.state[10:12] == bytes((AWAY + 5,)) * 2


def test_stays_makes_the_pages_as_they_were_or_as_if_they_had_come_now(make):
    lspt = make()
    for generation in (3, 4):
        lspt.figures[GENERATION] = generation
        come(lspt, 10 + 2 * generation)
    before = lspt.state[:]
    lspt.stays(lspt.leaving(0, 100))
    assert lspt.state[:] == before and lspt.figures[RESIDENT] == 2
    lspt.stays(lspt.leaving(0, 100), GENERATIONS + 9)
    assert lspt.state[15:20] == bytes((NEW, HERE + 9, NEW, HERE + 9, NEW))
    assert lspt.figures[RESIDENT] == 2


@pytest.mark.parametrize("ends", ["gone", "stays", "stays with a generation", "freed"])
def test_who_ends_leaving_is_told_which_pages_are_waited_for_and_no_others(make, ends):
    lspt = make()
    come(lspt, 0, 3)
    come(lspt, 5, 2)
    end = {
        "gone": lspt.gone,
        "stays": lspt.stays,
        "stays with a generation": lambda left: lspt.stays(left, 1),
        "freed": lspt.freed,
    }[ends]
    come(lspt, 50)
    left = lspt.freeing(0, 10)[0] if ends == "freed" else lspt.leaving(0, 10)
    other = lspt.leaving(50, 1)
    for page in (1, 4, 6, 50):  # 4 is a hole
        assert lspt.expect(range(page, page + 9)) == (LEAVING, range(0))
        assert lspt.expect(range(page, page + 9)) == (AWAITED, range(0))
    assert end(left) == [1, 4, 6]
    assert lspt.state[50] == AWAITED and lspt.gone(other) == [50]
    assert AWAITED not in lspt.state[:] and LEAVING not in lspt.state[:]
    again = lspt.freeing(0, 60)[0] if ends == "freed" else lspt.leaving(0, 60)
    assert end(again) == [], "once"


# ---------------------------------------------------------------- freeing


def test_freeing_takes_every_page_but_those_in_other_hands(make):
    lspt = make()
    come(lspt, 10, 8)
    evict(lspt, 10, 2)
    lspt.leaving(13, 2)
    lspt.expect(range(14, 15))  # AWAITED
    lspt.expect(range(20, 22))
    taken, later = lspt.freeing(8, 15)
    assert later == [(13, 2), (20, 2)]
    new, away, here = NEW, AWAY, HERE
    assert taken == [
        (8, bytes((new, new, away, away, here))),
        (15, bytes((here, here, here, new, new))),
        (22, bytes((new,))),
    ]
    assert lspt.freed(taken) == []
    assert lspt.state[8:23] == bytes(
        (*[NEW] * 5, LEAVING, AWAITED, *[NEW] * 5, COMING, COMING, NEW)
    )
    assert lspt.figures[RESIDENT] == 4
    lspt.arrived(range(20, 22), NEW)
    lspt.gone([(13, bytes((HERE, HERE)))])
    for pages, rest in (lspt.freeing(13, 2), lspt.freeing(20, 2)):
        assert rest == [] and lspt.freed(pages) == []
    assert lspt.state[:] == bytes(100) and lspt.figures[RESIDENT] == 0


def test_pages_that_nobody_may_free_stay_as_they_were(make):
    lspt = make()
    come(lspt, 10, 3)
    evict(lspt, 11)
    before = lspt.state[:]
    taken, _ = lspt.freeing(0, 100)
    assert lspt.expect(range(12, 13)) == (LEAVING, range(0))
    assert lspt.stays(taken) == [12]
    assert lspt.state[:] == before and lspt.figures[RESIDENT] == 2


# ---------------------------------------------------------------- looking


def test_what_an_earlier_job_left_is_away_and_did_not_leave_of_late(make):
    lspt = make(3 * PART)
    lspt.on_disk(PART - 2, 4)
    lspt.on_disk(2 * PART + 7, 1)
    assert lspt.away() == 5 and lspt.figures[RESIDENT] == 0
    state, pages = lspt.expect(range(PART - 3, PART + 10))
    assert (state, pages) == (NEW, range(PART - 3, PART - 2))
    state, pages = lspt.expect(range(PART - 2, PART + 10))
    assert state >= AWAY and pages == range(PART - 2, PART + 2)
    lspt.arrived(range(PART - 2, PART - 1), state)
    assert lspt.state[PART - 2] == HERE, "it does not count as one that came back soon"


def test_only_the_parts_that_pages_were_ever_in_are_looked_at(make):
    lspt = make(10 * PART)
    assert list(lspt.used(0, 10 * PART)) == list(lspt.here()) == []
    come(lspt, 3 * PART + 5, 2)
    lspt.expect(range(6 * PART - 1, 6 * PART + 1))
    lspt.on_disk(9 * PART, 1)
    assert list(lspt.used(0, 10 * PART)) == [(n * PART, PART) for n in (3, 5, 6, 9)]
    assert list(lspt.used(3 * PART + 10, 3 * PART)) == [
        (3 * PART + 10, PART - 10), (5 * PART, PART), (6 * PART, 10),
    ]  # fmt: skip
    assert list(lspt.used(4 * PART, PART)) == []
    assert list(lspt.here()) == [(3 * PART + 5, 2)]
    come(lspt, 3 * PART + 10)
    come(lspt, 4 * PART - 1, 2)
    runs = [(3 * PART + 5, 2), (3 * PART + 10, 1), (4 * PART - 1, 1), (4 * PART, 1)]
    assert list(lspt.here()) == runs


@pytest.mark.parametrize("wanted", [range(PART - 1, 2 * PART + 50, 64), range(PART, PART - 9, -1)])
def test_the_parts_at_both_ends_of_a_window_are_looked_at(make, wanted):
    lspt = make(3 * PART)
    _, pages = lspt.expect(wanted)
    assert len(pages) == len(wanted)
    lspt.arrived(pages, NEW)
    assert sum(count for _, count in lspt.here()) == len(wanted)


def test_away_counts_the_pages_that_only_the_store_has(make):
    lspt = make()
    come(lspt, 10, 6)
    evict(lspt, 10, 2)
    lspt.figures[GENERATION] = GENERATIONS - 1
    evict(lspt, 12, 2)
    assert lspt.away() == 4
    lspt.expect(range(10, 11))
    lspt.freed(lspt.freeing(13, 1)[0])
    assert lspt.away() == 2


def test_unsettled_is_what_somebody_has_in_hand(make):
    lspt = make()
    come(lspt, 10, 3)
    assert not lspt.unsettled(0, 100)
    lspt.expect(range(20, 21))
    assert lspt.unsettled(0, 100) and not lspt.unsettled(0, 20) and lspt.unsettled(20, 1)
    left = lspt.leaving(11, 1)
    assert lspt.unsettled(11, 1)
    lspt.expect(range(11, 12))
    assert lspt.state[11] == AWAITED and lspt.unsettled(11, 1)
    lspt.gone(left)
    assert not lspt.unsettled(0, 20)


def test_the_area_of_a_page_is_known(make):
    lspt = make()
    assert lspt.area(5) == range(0)
    lspt.areas += [(10, 20), (30, 5), (50, 1)]
    for page, area in {
        9: range(0), 10: range(10, 30), 29: range(10, 30), 30: range(30, 35), 35: range(0),
        50: range(50, 51), 51: range(0), 99: range(0),
    }.items():  # fmt: skip
        assert lspt.area(page) == area


def test_untouched_parts_of_a_huge_table_cost_no_memory(make):
    pages = 1 << 32
    lspt = make(pages, high=1 << 20)
    for page in (0, pages // 2, pages - 1):
        come(lspt, page)
    evict(lspt, pages // 2)
    assert list(lspt.here()) == [(0, 1), (pages - 1, 1)] and lspt.away() == 1
    taken, later = lspt.freeing(1, pages - 1)
    assert len(taken) == 3 and later == []
    lspt.freed(taken)
    assert list(lspt.here()) == [(0, 1)] and lspt.figures[RESIDENT] == 1
    assert resident_bytes(lspt.state) <= 3 * 2 * PART
    assert resident_bytes(lspt._used) <= pages // PART


def resident_bytes(memory):
    """How many bytes of a mapping have memory."""
    address = f"{ctypes.addressof(ctypes.c_char.from_buffer(memory)):x}-"
    with open("/proc/self/smaps") as smaps:
        mapping = smaps.read().partition(f"\n{address}")[2]
    return int(mapping.partition("\nRss:")[2].split()[0]) << 10


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


def room_is_made(lspt, how):
    {
        "gone": lambda: lspt.gone(lspt.leaving(0, 1)),
        "freed": lambda: lspt.freed(lspt.freeing(0, 1)[0]),
        "not_coming": lambda: lspt.not_coming(range(3, 4), NEW),
        "lost": lambda: lspt.lost(3),
    }[how]()


@pytest.mark.parametrize("how", ["gone", "freed", "not_coming", "lost"])
def test_the_handler_is_told_when_there_is_room_if_it_wants_some(make, how):
    lspt = make(high=4)
    come(lspt, 0, 3)
    lspt.expect(range(3, 4))
    lspt.expect(range(9, 10))
    assert lspt.room_wanted() and not rings(lspt)
    room_is_made(lspt, how)
    assert rings(lspt) and not lspt.room_wanted()
    assert lspt.expect(range(9, 10))[1] == range(9, 10)


@pytest.mark.parametrize("how", ["gone", "freed", "not_coming", "lost"])
def test_the_handler_is_not_told_of_room_that_it_does_not_want(make, how):
    lspt = make(high=4)
    come(lspt, 0, 3)
    lspt.expect(range(3, 4))
    room_is_made(lspt, how)
    assert not rings(lspt)


def test_what_makes_no_room_does_not_tell_the_handler(make):
    lspt = make(high=4)
    come(lspt, 0, 4)
    lspt.expect(range(9, 10))
    lspt.stays(lspt.leaving(0, 4))
    lspt.gone([])
    lspt.freed(lspt.freeing(20, 4)[0])
    assert lspt.room_wanted() and not rings(lspt)


def test_lpet_sleeps_until_a_fault_finds_no_room(make, start):
    lspt = make(high=4, low=2)
    lpet, woken = start(lspt.lpet_waits)
    for page in range(4):
        state, pages = lspt.expect(range(page, page + 1))
        assert not lspt.arrived(pages, state), "a small table is filled first"
    lpet.join(0.05)
    assert lpet.is_alive()
    assert lspt.expect(range(9, 10))[1] == range(0)
    lspt.wake_lpet()
    lpet.join(10)
    assert woken == [True]
    assert lspt.lpet_waits(), "as long as a fault waits it does not sleep"
    assert lspt.figures[LPET_AWAKE]


def test_a_larger_tables_lpet_is_woken_once_halfway_between_the_thresholds(make, start):
    lspt = make(pages=4 * SMALL, high=2 * SMALL, low=SMALL)
    come(lspt, 0, SMALL)
    lpet, woken = start(lspt.lpet_waits)
    lpet.join(0.05)
    half = 3 * SMALL // 2
    _, pages = lspt.expect(range(SMALL, half - 1))
    assert not lspt.arrived(pages, NEW) and lpet.is_alive()
    _, pages = lspt.expect(range(half - 1, half))
    assert lspt.arrived(pages, NEW)
    lspt.wake_lpet()
    lpet.join(10)
    assert woken == [True]
    _, pages = lspt.expect(range(half, half + 1))
    assert not lspt.arrived(pages, NEW), "it is awake"
    assert lspt.lpet_waits(), "and does not sleep before there is room"
    evict(lspt, 0, SMALL)
    lpet, woken = start(lspt.lpet_waits)
    lpet.join(0.05)
    assert lpet.is_alive() and not lspt.figures[LPET_AWAKE]
    _, pages = lspt.expect(range(SMALL))
    assert lspt.arrived(pages, NEW), "it sleeps again, so it has to be woken again"
    lspt.wake_lpet()


def test_who_is_woken_before_it_sleeps_does_not_sleep(make):
    lspt = make(high=4)
    come(lspt, 0, 4)
    assert lspt.expect(range(9, 10))[1] == range(0)
    lspt.wake_lpet()
    assert lspt.lpet_waits()


def test_a_call_that_lpet_has_seen_to_already_does_not_wake_it_again(make, start):
    lspt = make(high=4)
    lspt.wake_lpet()
    lpet, _ = start(lspt.lpet_waits)
    lpet.join(0.05)
    assert lpet.is_alive()
    lspt.stop()
    lpet.join(10)


def test_stop_ends_every_wait_for_good(make, start):
    lspt = make(high=4)
    lpet, woken = start(lspt.lpet_waits)
    handler, heard = start(lambda: select.select([lspt.for_handler], [], [], 10)[0])
    lpet.join(0.05)
    assert lpet.is_alive() and handler.is_alive() and not lspt.stopped()
    lspt.stop()
    lpet.join(10)
    handler.join(10)
    assert woken == [False] and heard == [[lspt.for_handler]]
    assert lspt.stopped()
    come(lspt, 0, 4)
    lspt.expect(range(5, 6))
    assert not lspt.lpet_waits(), "even if there is something to do"


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
        lspt.expect(range(5, 6))
        left = lspt.leaving(2 * PART, 1)
        lspt.gone(left)
        lspt.stop()

    assert ended(fork(body)) == 0
    assert list(lspt.here()) == [(2 * PART + 1, 3)] and lspt.away() == 1
    assert (lspt.figures[RESIDENT], lspt.figures[PEAK]) == (3, 4)
    assert rings(lspt) and lspt.stopped()
    assert lspt.state[2 * PART] == AWAY + 4, "four generations have begun in the child"


TRANSITIONS = {
    "expect": lambda lspt: lspt.expect(range(50, 51)),
    "arrived": lambda lspt: lspt.arrived(range(20, 21), NEW),
    "not_coming": lambda lspt: lspt.not_coming(range(20, 21), NEW),
    "lost": lambda lspt: lspt.lost(20),
    "leaving": lambda lspt: lspt.leaving(0, 10),
    "gone": lambda lspt: lspt.gone([(30, bytes((HERE,)))]),
    "stays": lambda lspt: lspt.stays([(30, bytes((HERE,)))]),
    "freeing": lambda lspt: lspt.freeing(0, 100),
    "freed": lambda lspt: lspt.freed([(30, bytes((HERE,)))]),
    "on_disk": lambda lspt: lspt.on_disk(60, 2),
}


@pytest.mark.parametrize("name", TRANSITIONS)
def test_no_transition_of_another_process_gets_between_while_the_lock_is_held(make, fork, name):
    lspt = make()
    come(lspt, 0, 2)
    lspt.expect(range(20, 21))
    come(lspt, 30)
    lspt.leaving(30, 1)
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
        self.left = []  # [one entry of leaving's]
        self.freeing = []

    def here(self):
        """How many LEAVING pages in these hands were here."""
        left = [each for lefts in (*self.left, *self.freeing) for each in lefts]
        return sum(count for each in left for _, count in here_runs(each))

    def step(self):
        self.dice.choice((self.expect, self.end_coming, self.leave, self.end_left, self.free))()

    def expect(self):
        start = self.dice.choice(self.within)
        step = self.dice.choice((1, 1, -1, 7))
        length = self.dice.randint(1, 12)
        wanted = range(start, start + step * length, step)
        inside = [page for page in wanted if 0 <= page < self.lspt.pages]
        state, pages = self.lspt.expect(wanted[: len(inside)])
        if pages:
            self.coming.append((pages, state))

    def end_coming(self):
        if self.coming:
            pages, state = self.coming.pop(self.dice.randrange(len(self.coming)))
            end = self.dice.randrange(6)
            if end == 0:
                self.lspt.not_coming(pages, state)
            elif end == 1 and len(pages) == 1:
                self.lspt.lost(pages[0])
            else:
                self.lspt.arrived(pages, state if len(pages) == 1 else NEW)

    def leave(self):
        which = self.dice.choice((ANY_HERE, NO_HOLES, self.lspt.older_than(1)))
        page = self.dice.choice(self.within)
        count = min(self.dice.randint(1, 40), self.lspt.pages - page)
        if left := self.lspt.leaving(page, count, which):
            self.left.append(left)

    def end_left(self):
        if self.freeing:
            self.check(self.freeing.pop(), self.lspt.freed)
        elif self.left:
            end = self.dice.choice((self.lspt.gone, self.lspt.gone, self.lspt.stays))
            self.check(self.left.pop(), end)

    def check(self, left, end):
        mine = {first + at for first, before in left for at in range(len(before))}
        assert set(end(left)) <= mine

    def free(self):
        if self.dice.random() < 0.2:
            page = self.dice.choice(self.within)
            taken, _ = self.lspt.freeing(page, min(20, self.lspt.pages - page))
            self.freeing.append(taken)

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
        assert count(lspt, (COMING, LEAVING, AWAITED)) == 0
        assert lspt.figures[RESIDENT] == count(lspt, range(HERE, 256)) > 0
        assert lspt.figures[PEAK] == 100
        assert count(lspt, range(AWAY, HERE)) == lspt.away() > 0
        for pipe in sum(pipes, ()):
            for fd in pipe:
                os.close(fd)


def test_any_sequence_of_transitions_does_to_each_page_what_the_picture_says(make):
    allowed = {
        "expect": {NEW: {COMING}, AWAY: {COMING}, LEAVING: {AWAITED}},
        "end_coming": {COMING: {HERE, NEW, AWAY, LOST}},
        "leave": {HERE: {LEAVING}, NEW: {LEAVING}, AWAY: {LEAVING}},
        "end_left": {LEAVING: {HERE, NEW, AWAY, LOST}, AWAITED: {HERE, NEW, AWAY, LOST}},
        "free": {state: {LEAVING} for state in (NEW, AWAY, HERE, LOST)},
    }
    seen = set()
    for seed in range(10):
        lspt = make(120, high=60)
        actor = Actor(lspt, seed)
        for _ in range(400):
            before = [s & ~63 if s >= AWAY else s for s in lspt.state[:]]
            name = actor.dice.choice(list(allowed))
            getattr(actor, name)()
            after = [s & ~63 if s >= AWAY else s for s in lspt.state[:]]
            for old, new in zip(before, after, strict=True):
                if old != new:
                    assert new in allowed[name][old], f"{name}: {old} → {new}"
                    seen.add((name, old, new))
            here = count(lspt, range(HERE, 256)) + count(lspt, [COMING]) + actor.here()
            assert lspt.figures[RESIDENT] == here <= 60
    assert {
        ("expect", LEAVING, AWAITED),
        ("end_left", AWAITED, HERE),
        ("free", LOST, LEAVING),
    } <= seen
