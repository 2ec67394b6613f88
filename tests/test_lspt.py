"""lspt.py: every transition of a page, the order, and the waits."""

import random
import threading
import time

import pytest

from edm.lspt import (
    AWAY,
    CLEAN,
    COMING,
    DIRTY,
    HELD_CLEAN,
    HELD_DIRTY,
    LSPT,
    NEW,
    Stopped,
    runs_of,
)


def come(lspt, page, count=1, dirty=True):
    with lspt.lock:
        lspt.expect(range(page, page + count))
    lspt.arrived(range(page, page + count), dirty)


def in_order(lspt):
    with lspt.lock:
        return list(lspt.pages())


def evict(lspt, pages):
    lspt.left([(first, count) for first, count, _ in lspt.hold(runs_of(sorted(pages)))])


def test_runs_of_joins_neighbours():
    assert runs_of([]) == []
    assert runs_of([0, 1, 2, 5, 7, 8]) == [(0, 3), (5, 1), (7, 2)]


def test_a_page_comes_is_written_is_held_and_leaves():
    lspt = LSPT(8, high_threshold=4)
    with lspt.lock:
        lspt.expect(range(3, 5))
    assert lspt.state[2:6] == bytes((NEW, COMING, COMING, NEW)) and lspt.resident == 2
    lspt.arrived(range(3, 5), dirty=False)
    assert lspt.state[3:5] == bytes((CLEAN, CLEAN))
    with lspt.lock:
        assert lspt.written(4) == range(4, 5)
    assert lspt.hold([(2, 4)]) == [(3, 1, False), (4, 1, True)]
    assert lspt.state[3:5] == bytes((HELD_CLEAN, HELD_DIRTY)) and lspt.resident == 2
    lspt.released([(4, 1)])
    assert lspt.state[3:5] == bytes((HELD_CLEAN, DIRTY))
    lspt.left([(3, 1)])
    assert lspt.state[3:5] == bytes((AWAY, DIRTY)) and lspt.resident == 1
    assert lspt.peak == 2


def test_what_could_not_be_had_is_to_be_asked_for_again():
    lspt = LSPT(8, high_threshold=4)
    with lspt.lock:
        lspt.expect(range(3, 4))
    lspt.not_coming(range(3, 4))
    assert lspt.state[3] == AWAY and lspt.resident == 0 and in_order(lspt) == []


@pytest.mark.parametrize("letting_go", ["left", "released"])
def test_letting_go_tells_which_faults_are_to_be_woken_and_no_others(letting_go):
    lspt = LSPT(8, high_threshold=8)
    come(lspt, 0, 8)
    lspt.hold([(0, 4)])
    lspt.awaited |= {1, 3, 6}
    assert sorted(getattr(lspt, letting_go)([(0, 2), (3, 1)])) == [1, 3]
    assert lspt.awaited == {6}


def test_candidates_come_in_the_order_in_which_pages_came():
    lspt = LSPT(100, high_threshold=100)
    for page in (40, 10, 30, 20):
        come(lspt, page)
    assert list(lspt.next_candidates(3)) == [40, 10, 30]


def test_the_hand_goes_round_and_evicted_pages_leave_the_order():
    lspt = LSPT(100, high_threshold=100)
    come(lspt, 0, 6)
    candidates = lspt.next_candidates(4)
    evict(lspt, [1])
    lspt.passed(candidates, 3, [0, 2])  # it stopped before page 3
    assert in_order(lspt) == [3, 4, 5, 0, 2]


def test_a_page_that_came_back_after_munmap_stands_in_the_order_once():
    lspt = LSPT(100, high_threshold=100)
    come(lspt, 0, 4)
    evict(lspt, [1, 2])  # as munmap does: their entries stay behind
    come(lspt, 2)
    assert in_order(lspt) == [0, 2, 3]
    assert list(lspt.next_candidates(10)) == [0, 2, 3]


def test_pages_held_or_coming_are_no_candidates():
    lspt = LSPT(100, high_threshold=100)
    come(lspt, 0, 4)
    lspt.hold([(1, 2)])
    with lspt.lock:
        lspt.expect(range(9, 10))
    assert list(lspt.next_candidates(10)) == [0, 3]


def test_lpet_which_has_nothing_else_to_do_keeps_stale_entries_from_piling_up():
    lspt = LSPT(1 << 17, high_threshold=1 << 17)
    lpet, _ = waits(lspt.wait_for_work)
    come(lspt, 60000, 3)
    for _ in range(20):
        come(lspt, 0, 50000)
        evict(lspt, range(50000))
    deadline = time.monotonic() + 10
    come(lspt, 7)
    while len(lspt._order) > 5000:
        assert time.monotonic() < deadline, "a million entries, and four pages here"
        time.sleep(0.001)
    assert in_order(lspt) == [60000, 60001, 60002, 7]
    lspt.stop()
    lpet.join(10)


@pytest.mark.parametrize("call", ["stop", "ask_to_store"])
def test_who_calls_lpet_while_it_looks_through_all_entries_is_heard(monkeypatch, call):
    lspt = LSPT(10000, high_threshold=10000)
    come(lspt, 0, 4000)
    evict(lspt, range(4000))
    real = LSPT._valid

    def valid(self, entries):
        getattr(lspt, call)()
        return real(self, entries)

    monkeypatch.setattr(LSPT, "_valid", valid)
    lpet, work = waits(lspt.wait_for_work)
    lpet.join(10)
    assert work and bool(work[0][1]) == (call == "ask_to_store")


def test_no_lock_is_held_while_all_entries_are_looked_through(monkeypatch):
    lspt = LSPT(10000, high_threshold=10000)
    come(lspt, 0, 4000)
    evict(lspt, range(4000))
    real, came = LSPT._valid, []

    def valid(self, entries):
        handler = threading.Thread(target=come, args=(lspt, 9000), daemon=True)
        handler.start()
        handler.join(10)
        came.append(not handler.is_alive())
        return real(self, entries)

    with monkeypatch.context() as patched:
        patched.setattr(LSPT, "_valid", valid)
        lpet, _ = waits(lspt.wait_for_work)
        deadline = time.monotonic() + 20
        while len(lspt._order) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        lspt.stop()
        lpet.join(10)
    assert came == [True] and lspt.state[9000] == DIRTY and in_order(lspt) == [9000]


def test_any_sequence_of_arrivals_and_evictions_leaves_exactly_the_resident_pages_in_order():
    for seed in range(20):
        dice, lspt = random.Random(seed), LSPT(64, high_threshold=1000)
        here = []
        for _ in range(500):
            absent = [p for p in range(64) if p not in here]
            if absent and dice.random() < 0.6:
                page = dice.choice(absent)
                come(lspt, page, dirty=dice.random() < 0.5)
                here.append(page)
            elif here:
                candidates = list(lspt.next_candidates(dice.randint(1, 10)))
                done = dice.randint(1, len(candidates))
                gone = [p for p in candidates[:done] if dice.random() < 0.5]
                evict(lspt, gone)
                lspt.passed(candidates, done, [p for p in candidates[:done] if p not in gone])
                here = [p for p in here if p not in gone]
            assert sorted(in_order(lspt)) == sorted(here)
            assert lspt.resident == len(here)


def waits(call):
    """Start call in a thread; returns (thread, list that gets its result or exception)."""
    result = []

    def body():
        try:
            result.append(call())
        except Stopped as error:
            result.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread, result


def test_at_the_high_threshold_a_fault_wakes_lpet_and_waits_for_room():
    lspt = LSPT(100, high_threshold=4)
    come(lspt, 0, 4)
    lpet, woken = waits(lspt.wait_for_work)

    def ask():
        with lspt.lock:
            lspt.ask_for_room()

    handler, _ = waits(ask)
    lpet.join(10)
    assert woken == [(True, None)] and handler.is_alive() and lspt.waiting_since
    evict(lspt, [0])
    handler.join(10)
    assert not handler.is_alive() and not lspt.waiting_since


def test_lpet_evicts_again_while_a_fault_waits_but_not_before_it_has_rested():
    lspt = LSPT(100, high_threshold=4)
    come(lspt, 0, 4)

    def ask():
        with lspt.lock:
            lspt.ask_for_room()

    handler, _ = waits(ask)
    assert lspt.wait_for_work() == (True, None)
    began = time.monotonic()
    assert lspt.wait_for_work(rest=0.2) == (True, None)
    assert time.monotonic() - began >= 0.2
    evict(lspt, [0])
    handler.join(10)


def test_storing_is_asked_of_lpet_and_makes_dirty_pages_clean():
    lspt = LSPT(100, high_threshold=100)
    lspt.mapped(0, 50)
    come(lspt, 0, 2)
    come(lspt, 2, 2, dirty=False)
    asked = lspt.ask_to_store()
    assert lspt.wait_for_work(rest=100) == (False, asked)
    assert list(lspt.dirty()) == [(0, 2)]
    held = lspt.hold_dirty([(0, 4)])
    assert held == [(0, 2, True)]
    lspt.awaited.add(1)
    assert lspt.stored([(0, 2)]) == [1]
    assert lspt.state[:4] == bytes((CLEAN,)) * 4
    assert lspt.hold([(0, 4)]) == [(0, 4, False)]


def test_what_is_being_installed_has_arrived_before_storing_looks():
    lspt = LSPT(100, high_threshold=100)
    lspt.mapped(0, 100)
    with lspt.installing:
        storing, seen = waits(lambda: list(lspt.dirty()))
        come(lspt, 7)
    storing.join(10)
    assert seen == [[(7, 1)]]


def test_storing_is_cancelled_when_lpet_has_ended_or_ends():
    lspt = LSPT(100, high_threshold=100)
    asked = lspt.ask_to_store()
    lspt.stop()
    assert asked.cancelled() and lspt.ask_to_store().cancelled()


def test_refused_pages_are_as_before_and_at_the_end_of_the_order():
    lspt = LSPT(100, high_threshold=100)
    come(lspt, 0, 4)
    candidates = lspt.next_candidates(2)
    held = lspt.hold([(0, 2)])
    lspt.passed(candidates, 2, [])
    lspt.refused([(page, count) for page, count, _ in held])
    assert lspt.state[:4] == bytes((DIRTY,)) * 4
    assert in_order(lspt) == [2, 3, 0, 1]


def test_a_lost_page_is_neither_fetched_nor_evicted_until_it_is_freed():
    lspt = LSPT(100, high_threshold=100)
    lspt.mapped(0, 100, away=[(5, 3)])
    assert lspt.state[4:9] == bytes((NEW, AWAY, AWAY, AWAY, NEW))
    lspt.lost(6)
    with lspt.lock:
        assert lspt.fetchable(range(5, 8)) == range(5, 6)
    assert lspt.hold([(0, 10)]) == []
    lspt.freed(0, 10)
    assert lspt.state[6] == NEW and lspt.resident == 0


def test_stop_ends_every_wait():
    lspt = LSPT(100, high_threshold=4)
    come(lspt, 0, 4)

    def ask():
        with lspt.lock:
            lspt.ask_for_room()

    handler, asked = waits(ask)
    lspt.hold([(1, 1)])
    munmap, held = waits(lambda: lspt.hold_all(0, 8))
    lspt.stop()
    for thread in (handler, munmap):
        thread.join(10)
    assert isinstance(asked[0], Stopped) and isinstance(held[0], Stopped)
    assert not any(lspt.wait_for_work()) and lspt.waiting_since is None


def test_munmap_waits_until_lpet_and_dm_handler_have_let_go():
    lspt = LSPT(100, high_threshold=100)
    come(lspt, 0, 4)
    lspt.hold([(1, 1)])
    with lspt.lock:
        lspt.expect(range(4, 5))
    munmap, held = waits(lambda: lspt.hold_all(0, 8))
    lspt.released([(1, 1)])
    assert munmap.is_alive()
    lspt.arrived(range(4, 5), dirty=False)
    munmap.join(10)
    assert held == [[(0, 4, True), (4, 1, False)]]


def test_freed_pages_are_new_and_their_faults_are_woken():
    lspt = LSPT(100, high_threshold=100)
    come(lspt, 0, 4)
    evict(lspt, [1])
    lspt.hold_all(0, 3)
    lspt.awaited |= {2, 50}
    assert lspt.freed(0, 3) == [2]
    assert lspt.state[:4] == bytes((NEW, NEW, NEW, DIRTY)) and lspt.resident == 1
    assert lspt.awaited == {50}


def test_what_may_be_fetched_together_is_of_one_state_in_one_area_and_fits():
    lspt = LSPT(100, high_threshold=10)

    def fetchable(wanted):
        with lspt.lock:
            return lspt.fetchable(wanted)

    assert len(fetchable(range(5))) == 0  # no area
    lspt.mapped(10, 20)
    lspt.mapped(30, 5)
    assert fetchable(range(10, 15)) == range(10, 15)
    assert fetchable(range(27, 40)) == range(27, 30)
    assert fetchable(range(10, 70, 3)) == range(10, 30, 3)
    come(lspt, 16)
    assert fetchable(range(10, 40)) == range(10, 16)
    assert fetchable(range(10, 40, 3)) == range(10, 16, 3)
    evict(lspt, [16])
    assert fetchable(range(10, 20)) == range(10, 16)
    assert fetchable(range(16, 20)) == range(16, 17)
    come(lspt, 40, 8)
    assert fetchable(range(20, 30)) == range(20, 22)
    lspt.unmapped(10, 20)
    assert len(fetchable(range(20, 30))) == 0


def test_what_may_be_fetched_together_downward_ends_at_the_page_that_faults():
    lspt = LSPT(100, high_threshold=10)

    def fetchable(wanted):
        with lspt.lock:
            return lspt.fetchable(wanted)

    assert len(fetchable(range(7, -1, -1))) == 0  # no area
    assert len(fetchable(range(-1, -9, -1))) == 0  # a stream has come to the space's start
    lspt.mapped(0, 5)
    lspt.mapped(10, 20)
    assert fetchable(range(3, -5, -1)) == range(4)
    assert fetchable(range(14, 6, -1)) == range(10, 15)
    come(lspt, 20, 3)
    assert fetchable(range(25, 10, -1)) == range(23, 26)
    assert fetchable(range(29, 10, -1)) == range(23, 30)
    evict(lspt, [20, 21, 22])
    assert fetchable(range(22, 10, -1)) == range(20, 23)
    come(lspt, 40, 8)
    assert fetchable(range(18, 10, -1)) == range(17, 19)


def test_a_write_beside_pages_that_were_just_written_takes_as_many_neighbours_along():
    lspt = LSPT(1000, high_threshold=1000)

    def written(page):
        with lspt.lock:
            return lspt.written(page)

    come(lspt, 100, 100, dirty=False)
    assert [written(page) for page in (110, 112, 111)] == [range(p, p + 1) for p in (110, 112, 111)]
    assert written(113) == range(113, 117)  # three behind it, three before it
    assert lspt.state[117] == CLEAN and lspt.state[113:117] == bytes((DIRTY,)) * 4
    assert written(109) == range(102, 110)  # downward: seven behind it
    assert written(117) == range(117, 133)
    assert written(133) == range(133, 165)
    assert written(165) == range(165, 200)  # what is not here stays as it is
    assert lspt.state[99] == lspt.state[200] == NEW
