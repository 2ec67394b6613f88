"""Threads write to the same pages, without the GIL, while LPET evicts all the time.

Each thread owns a 64-bit word of every page. Round after round it takes a page at random, compares
its word with what it wrote last, and writes the next number. One lost update, and a word differs.
"""

import argparse
import ctypes
import random
import sys
import threading
import time

import edm

libc = ctypes.CDLL(None)  # these calls let go of the GIL, so that all threads really run
for call in (libc.memcpy, libc.memcmp):
    call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

PAGES, THREADS = 24, 3


def app(space):
    area = space.mmap(PAGES * edm.PAGE_SIZE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    until = time.monotonic() + args.seconds
    lost, writes = [], []

    def write(thread):
        dice = random.Random(thread)
        mine = [ctypes.c_uint64(0) for _ in range(PAGES)]
        count = 0
        while time.monotonic() < until and not lost:
            page = dice.randrange(PAGES)
            at = base + page * edm.PAGE_SIZE + 8 * thread
            if libc.memcmp(at, ctypes.addressof(mine[page]), 8):
                lost.append((thread, page, mine[page].value))
            if dice.random() < 0.5:
                mine[page].value += 1
                libc.memcpy(at, ctypes.addressof(mine[page]), 8)
                count += 1
        for page in range(PAGES):
            at = base + page * edm.PAGE_SIZE + 8 * thread
            if libc.memcmp(at, ctypes.addressof(mine[page]), 8):
                lost.append((thread, page, mine[page].value))
        writes.append(count)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    figures = space.figures()
    print("writes", sum(writes), figures)
    if lost:
        sys.exit(f"lost updates: (thread, page, number) {lost}")
    clean = config.clean_tracking != "none"
    if figures["evicted_dirty"] < 100 or figures["evicted_clean"] < 10 * clean or min(writes) < 50:
        sys.exit("that was too little eviction to prove anything")


parser = argparse.ArgumentParser()
parser.add_argument("--seconds", type=float, default=1.5)
args, config = edm.parse_arguments(parser, high_threshold=8, low_threshold=4)
edm.main(app, config)
