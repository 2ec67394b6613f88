"""Sequential readers, each with its readahead, beside a writer; and munmap in the middle of it."""

import argparse
import ctypes
import random
import sys
import threading

import parts

import edm

libc = ctypes.CDLL(None)  # these calls let go of the GIL, so that all threads really run
for call in (libc.memcpy, libc.memcmp):
    call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

PAGE = edm.PAGE_SIZE
PAGES, READERS, ROUNDS = 2400, 3, 2


def content(page):
    return page.to_bytes(8, "little") * (PAGE // 8)


def app(space):
    area = space.mmap(PAGES * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for page in range(PAGES):
        libc.memcpy(base + page * PAGE, content(page), PAGE)
    wrong = []

    def read(number):
        """Forwards from its own place, round and round; the last word of each page is left out."""
        for n in range(ROUNDS * PAGES):
            page = (n + number * PAGES // READERS) % PAGES
            if libc.memcmp(base + page * PAGE, content(page), PAGE - 8):
                wrong.append(page)

    def write():
        """The last word of every 7th page."""
        for page in range(0, PAGES, 7):
            libc.memcpy(base + page * PAGE + PAGE - 8, (page + 1).to_bytes(8, "little"), 8)

    def stride():
        """The first word of every 11th page, from each of the first pages on."""
        for start in range(11):
            for page in range(start, PAGES, 11):
                if libc.memcmp(base + page * PAGE, content(page), 8):
                    wrong.append(page)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(READERS)]
    threads += [threading.Thread(target=write), threading.Thread(target=stride)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for page in range(PAGES):
        last = page if page % 7 else page + 1
        if area[page * PAGE + PAGE - 8 : (page + 1) * PAGE] != last.to_bytes(8, "little"):
            wrong.append(page)
    figures = space.figures()
    faults = figures["faults_first_access"] + figures["faults_refetch"]
    print(figures)
    if wrong:
        sys.exit(f"wrong pages: {sorted(set(wrong))}")
    if figures["fetched"] < 2 * faults:
        sys.exit(f"{figures['fetched']} pages for {faults} faults: there was no readahead")

    parts.check_resident(space)

    # Downward: read, and then read and written from the last byte to the first.
    before = space.figures()
    for page in reversed(range(PAGES)):
        if libc.memcmp(base + page * PAGE, content(page), PAGE - 8):
            sys.exit(f"wrong page, downward: {page}")
    for page in reversed(range(PAGES)):
        if area[page * PAGE : page * PAGE + 8] != content(page)[:8]:
            sys.exit(f"wrong page, downward, second time: {page}")
        area[page * PAGE : page * PAGE + 8] = content(page + 1)[:8]
    after = space.figures()
    for page in range(PAGES):
        if area[page * PAGE : page * PAGE + 16] != content(page + 1)[:8] + content(page)[:8]:
            sys.exit(f"wrong page after writing downward: {page}")
    limits = {"faults_refetch": PAGES // 4}
    if config.clean_tracking != "events":  # there every page that was read ahead has a first write
        limits["faults_write_protect"] = PAGES // 8
    for figure, most in limits.items():
        count = after[figure] - before[figure]
        if count > most:
            sys.exit(f"{count} {figure} for {PAGES} pages downward")

    parts.check_resident(space)

    # Windows end where pages that were written meet pages that never were, and the reader skips some.
    patches = space.mmap(PAGES * PAGE)
    at = ctypes.addressof(ctypes.c_ubyte.from_address(space.areas()[-1][0]))
    for page in range(PAGES):
        if page // 13 % 2:
            libc.memcpy(at + page * PAGE, content(page), PAGE)
        else:
            libc.memcmp(at + page * PAGE, bytes(PAGE), PAGE)
    dice = random.Random(1)
    for _ in range(4):
        page = 0
        while page < PAGES:
            expected = content(page) if page // 13 % 2 else bytes(PAGE)
            if libc.memcmp(at + page * PAGE, expected, PAGE):
                sys.exit(f"wrong page: {page}")
            page += dice.choice((1, 1, 1, 1, 1, 5, 11))
    parts.check_resident(space)
    space.munmap(patches)

    # A stream is cut off by munmap, and then reads zeros.
    for length in (10, 30, 100, 300):
        part = space.mmap(PAGES * PAGE)
        at = ctypes.addressof(ctypes.c_ubyte.from_address(space.areas()[-1][0]))
        for page in range(length):
            libc.memcpy(at + page * PAGE, content(page + 1), PAGE)
        space.munmap(part)
        part = space.mmap(PAGES * PAGE)
        if any(part[: 400 * PAGE]):
            sys.exit("a page mapped again does not read as zeros")
        space.munmap(part)
    print("streams SUCCESS")


_, config = edm.parse_arguments(argparse.ArgumentParser(), high_threshold=1024)
edm.main(app, config)
