"""Four threads write, read and verify random pages under constant eviction.

Each thread owns a quarter of every page, and knows what it last wrote there. A fifth one syncs, and
maps and unmaps another area.
"""

import ctypes
import os
import random
import sys
import threading
import time

import edm

libc = ctypes.CDLL(None)  # these calls let go of the GIL, so that all threads really run
for call in (libc.memcpy, libc.memcmp):
    call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)

# Every rank tells its process id here. argv: that file, seconds, the idle tracker, a disk to keep.
pids, seconds, tracker = sys.argv[1], float(sys.argv[2]), sys.argv[3]
disk = sys.argv[4] if len(sys.argv) > 4 else None
with open(pids, "a") as file:
    print(os.getpid(), file=file)

PAGE, PAGES, THREADS = edm.PAGE_SIZE, 200, 4
QUARTER = PAGE // THREADS


def taken(pid):
    """KiB of memory that the process has, apart from files' pages."""
    with open(f"/proc/{pid}/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))


def app(space):
    with open(pids) as file:
        ranks = sorted(map(int, file.read().split()))
    space.mmap(PAGES * PAGE)
    base = space.areas()[0][0]
    wrong, done = [], [0] * THREADS
    until = time.monotonic() + seconds

    def work(number):
        dice = random.Random(number)
        versions = [0] * PAGES
        while time.monotonic() < until and not wrong:
            # Now and then a sequential walk, for readahead to be in it.
            start, length = dice.randrange(PAGES), dice.choice((1, 1, 1, 1, 20))
            for page in range(start, min(start + length, PAGES)):
                at = base + page * PAGE + number * QUARTER
                expected = versions[page].to_bytes(8, "little") * (QUARTER // 8)
                if libc.memcmp(at, expected, QUARTER):
                    wrong.append((number, page, versions[page]))
                if dice.random() < 0.5:
                    versions[page] += 1
                    written = versions[page].to_bytes(8, "little") * (QUARTER // 8)
                    libc.memcpy(at, written, QUARTER)
            done[number] += 1

    def syncs():
        while time.monotonic() < until and not wrong:
            other = space.mmap(20 * PAGE)
            address = max(space.areas())[0]
            if libc.memcmp(address, bytes(20 * PAGE), 20 * PAGE):
                wrong.append("pages that were mapped anew are not zeros")
            libc.memset(address, 7, 20 * PAGE)
            space.sync()
            if libc.memcmp(address, b"\7" * (20 * PAGE), 20 * PAGE):
                wrong.append("pages beside the others are not as written")
            space.munmap(other)
            time.sleep(0.1)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    threads.append(threading.Thread(target=syncs))
    for thread in threads:
        thread.start()
    time.sleep(seconds / 2)  # by then every buffer is in use
    before = [taken(pid) for pid in ranks]
    for thread in threads:
        thread.join()
    after = [taken(pid) for pid in ranks]
    print("steps", sum(done), "KiB", before, after, space.figures())
    if wrong:
        sys.exit(f"(thread, page, version) that were not as written: {wrong}")
    if any(now > then + 1024 for then, now in zip(before, after, strict=True)):
        sys.exit("the memory of DMS or pager has grown")
    print("soak SUCCESS")


config = edm.Config(
    high_threshold=130, low_threshold=100, idle_tracker=tracker, disk=disk, keep=bool(disk)
)
edm.main(app, config)
