"""Carry out a list of operations on a kept disk, and compare with a plain bytearray: the oracle.

The arguments are a JSON file of operations, and a file in which the oracle as of the last sync and the
number of the next operation are kept over a crash. An operation is [name, numbers...], see below.
"""

import argparse
import json
import os
import pickle
import random
import signal
import sys

import parts

import edm

parser = argparse.ArgumentParser()
for name in ("operations", "saved"):
    parser.add_argument(name)
PAGE, PAGES, START = edm.PAGE_SIZE, 64, 0x10_0000_0000


class State:
    """The application's memory as it should be: {first page: (pages, the oracle's bytes)}."""

    def __init__(self):
        self.areas = {}
        self.next = 0  # operation

    def copy_areas(self):
        return {first: (pages, bytearray(bytes_)) for first, (pages, bytes_) in self.areas.items()}

    def save(self, synced, then):
        with open(args.saved + ".new", "wb") as file:
            pickle.dump((synced, then), file)
        os.rename(args.saved + ".new", args.saved)


def app(space):
    state, synced, views = State(), {}, {}
    if os.path.exists(args.saved):
        with open(args.saved, "rb") as file:
            synced, state.next = pickle.load(file)
        state.areas = {first: (pages, bytearray(old)) for first, (pages, old) in synced.items()}
        for first, (pages, _) in state.areas.items():
            views[first] = space.mmap(pages * PAGE, addr=START + first * PAGE)
    with open(args.operations) as file:
        operations = json.load(file)

    def check(first):
        _, expected = state.areas[first]
        if views[first] != expected:
            wrong = next(n for n in range(len(expected)) if views[first][n] != expected[n])
            sys.exit(f"operation {number}: byte {wrong} of the area of page {first} is wrong")

    def pick(n):
        return sorted(state.areas)[n % len(state.areas)]

    for first in state.areas:
        number = state.next
        check(first)
    for number in range(state.next, len(operations)):
        name, *numbers = operations[number]
        if name == "map":
            first, pages = numbers
            pages = min(pages, PAGES - first)
            if all(first + pages <= at or first >= at + n for at, (n, _) in state.areas.items()):
                views[first] = space.mmap(pages * PAGE, addr=START + first * PAGE)
                state.areas[first] = (pages, bytearray(pages * PAGE))
        elif name == "sync":
            space.sync()
            synced = state.copy_areas()
        elif name == "crash":
            state.save(synced, number + 1)
            for pid in parts.pids(space, args.saved + ".dms"):
                os.kill(pid, signal.SIGKILL)
            signal.pause()  # the pager's end is the application's
        elif not state.areas:
            continue
        elif name == "unmap":
            first = pick(numbers[0])
            del state.areas[first]
            space.munmap(views.pop(first))
        elif name == "write":
            which, at, length, seed = numbers
            first = pick(which)
            expected = state.areas[first][1]
            at %= len(expected)
            new = random.Random(seed).randbytes(min(length, len(expected) - at))
            views[first][at : at + len(new)] = new
            expected[at : at + len(new)] = new
        elif name == "read":
            which, at, length = numbers
            first = pick(which)
            expected = state.areas[first][1]
            at %= len(expected)
            if views[first][at : at + length] != expected[at : at + length]:
                sys.exit(f"operation {number}: {length} bytes at {at} of page {first} are wrong")
        elif name == "compare":  # which evicts nearly everything else
            check(pick(numbers[0]))
    for first in state.areas:
        check(first)
    parts.check_resident(space)
    print("operations SUCCESS", space.figures())


args, config = edm.parse_arguments(
    parser, start_addr=START, end_addr=START + PAGES * PAGE, high_threshold=6, low_threshold=3, keep=True
)  # fmt: skip
parts.tell(args.saved + ".dms")
edm.main(app, config)
