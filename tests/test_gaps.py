"""Gaps of address_space.py: where there is room for an area."""

import random
import sys
import time

import pytest

from edm.address_space import PAGE_SIZE, Gaps

PAGES = 200  # of the space, which begins at page 1


def runs(taken):
    """(length, start) of each run of pages that are not taken: the gaps as they should be."""
    found, page = [], 1
    for run in taken.decode().split("\1"):
        if run:
            found.append((len(run) * PAGE_SIZE, page * PAGE_SIZE))
        page += len(run) + 1
    return sorted(found)


def mark(taken, addr, length, value):
    first, count = addr // PAGE_SIZE - 1, length // PAGE_SIZE
    assert set(taken[first : first + count]) == {1 - value}
    taken[first : first + count] = bytes([value]) * count


@pytest.mark.parametrize("seed", range(10))
def test_gaps_are_as_a_map_of_the_pages_says(seed):
    dice, gaps = random.Random(seed), Gaps(PAGE_SIZE, (PAGES + 1) * PAGE_SIZE)
    taken, areas = bytearray(PAGES), []
    for _ in range(500):
        if areas and dice.random() < 0.5:
            addr, length = areas.pop(dice.randrange(len(areas)))
            gaps.flip(addr, length)
            mark(taken, addr, length, 0)
            continue
        length, largest = dice.randint(1, 20) * PAGE_SIZE, dice.random() < 0.3
        fit = [gap for gap in runs(taken) if gap[0] >= length]
        gap = gaps.find(length, largest)
        assert (gap and (len(gap), gap.start)) == (fit[-1 if largest else 0] if fit else None)
        if gap:
            start, end = gap.start, gap.stop
            addr = dice.randrange(start, end - length + 1, PAGE_SIZE)
            assert gaps.has(addr, length) and gaps.has(start, end - start)
            assert not gaps.has(addr, end - addr + PAGE_SIZE)
            gaps.flip(addr, length)
            mark(taken, addr, length, 1)
            areas.append((addr, length))
            assert not gaps.has(addr, PAGE_SIZE)
            assert not gaps.has(addr - PAGE_SIZE, 2 * PAGE_SIZE)
            end = addr + length
            free = [length for length, start in runs(taken) if start == end]
            assert gaps.has(end, free[0]) if free else not gaps.has(end, PAGE_SIZE)
            assert not free or not gaps.has(end, free[0] + PAGE_SIZE)
    for area in areas:
        gaps.flip(*area)
    whole = PAGES * PAGE_SIZE
    assert gaps.find(whole) == range(PAGE_SIZE, PAGE_SIZE + whole) and gaps.has(PAGE_SIZE, whole)


class Alarm(Exception):
    pass


@pytest.mark.parametrize("seed", range(50))
def test_whenever_a_signal_handler_raises_no_address_is_given_to_two_and_few_are_lost(seed):
    dice, gaps, areas, left = random.Random(seed), Gaps(0, PAGES * PAGE_SIZE), {}, 0
    lost = 0  # bytes of the areas that were taken or given back then

    def trace(frame, event, _):
        nonlocal left
        frame.f_trace_opcodes = True
        left -= event == "opcode"
        if not left:
            raise Alarm
        return trace

    def interrupted(call, *arguments):
        nonlocal left
        left = dice.randint(1, 200)  # bytecodes until the handler raises; a call has about 100
        sys.settrace(trace)
        try:
            call(*arguments)
        finally:
            sys.settrace(None)

    for _ in range(300):
        try:
            if areas and dice.random() < 0.5:
                addr = dice.choice(list(areas))
                length = areas.pop(addr)
                interrupted(gaps.flip, addr, length)
            elif gap := gaps.find(length := dice.randint(1, 10) * PAGE_SIZE):
                addr = gap.stop - length
                assert all(addr + length <= at or at + n <= addr for at, n in areas.items())
                interrupted(gaps.flip, addr, length)
                areas[addr] = length
        except Alarm:
            lost += length
        if lost > PAGES * PAGE_SIZE // 2:
            break
    gaps.find(PAGE_SIZE)
    free = sum(length for length, _ in gaps._lengths)
    assert free >= PAGES * PAGE_SIZE - sum(areas.values()) - lost
    edges = gaps._edges
    assert gaps._lengths == sorted((end - start, start) for start, end in zip(*[iter(edges)] * 2))
    assert edges == sorted(set(edges))  # they lie apart


@pytest.mark.undisturbed
def test_an_area_costs_the_same_however_many_there_are():
    dice, gaps, areas = random.Random(1), Gaps(0, 1 << 45), []

    def replace(count):
        began = time.perf_counter()
        for _ in range(count):
            if len(areas) >= live:
                index = dice.randrange(live)
                areas[index], areas[-1] = areas[-1], areas[index]
                gaps.flip(*areas.pop())
            length = dice.randint(256, 2000) * PAGE_SIZE
            gap = gaps.find(length)
            areas.append((gap.stop - length, length))
            gaps.flip(*areas[-1])
        return (time.perf_counter() - began) / count

    live = 1000
    replace(10 * live)
    few = min(replace(1000) for _ in range(3))
    live = 20_000
    replace(2 * live)
    assert min(replace(1000) for _ in range(3)) < max(20 * few, 1e-4)
