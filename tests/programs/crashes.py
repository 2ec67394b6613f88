"""Writes and syncs without end, and is killed in the midst of it. argv: the kept disk, and of several
DMSs, how many; then each line begins with the rank that tells it.

Every step writes some pages with bytes that the step's number determines; page 0 has the number of
the last step before a sync. A resumed run first compares the whole memory with what the steps up to
that number give.
"""

import os
import random
import sys

import edm
from edm.edm import launched

disk, *dms = sys.argv[1:]
who = launched()[:1] if dms else ()
PAGE = edm.PAGE_SIZE
PAGES = 150


def tell(*words):
    """A line, in one piece, although other ranks write lines there, too."""
    os.write(1, f"{' '.join(map(str, words))}\n".encode())


def pages_of(step):
    """What this step writes: {page: its new bytes}."""
    dice = random.Random(step)
    return {
        dice.randrange(1, PAGES): step.to_bytes(8, "little") * (PAGE // 8)
        for _ in range(dice.randint(1, 12))
    }


def app(space):
    area = space.mmap(PAGES * PAGE)
    done = area[:8].cast("Q")[0]
    expected = {}
    for step in range(1, done + 1):
        expected.update(pages_of(step))
    for page in range(1, PAGES):
        if area[page * PAGE : (page + 1) * PAGE] != expected.get(page, bytes(PAGE)):
            sys.exit(f"page {page} is not as it was after step {done}")
    tell(*who, "found", done)
    step = done
    while True:
        step += 1
        for page, content in pages_of(step).items():
            area[page * PAGE : (page + 1) * PAGE] = content
        if step % 3 == 0:
            area[:8].cast("Q")[0] = step
            space.sync()
            tell(*who, "synced", step)


START = 0x10_0000_0000
edm.main(
    app,
    edm.Config(
        START,
        START + PAGES * PAGE,
        high_threshold=24,
        low_threshold=12,
        disk=disk,
        keep=True,
        dms=int(dms[0]) if dms else None,
    ),
)
