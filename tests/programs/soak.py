"""Four threads write, read and verify random pages under constant eviction.

Each thread owns a quarter of every page, and knows what it last wrote there. A fifth one syncs, and
maps and unmaps another area.
"""

import argparse
import ctypes
import random
import sys
import threading
import time

import parts

import edm

libc = ctypes.CDLL(None)  # these calls let go of the GIL, so that all threads really run
for call in (libc.memcpy, libc.memcmp):
    call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)

PAGE, PAGES, THREADS = edm.PAGE_SIZE, 200, 4
QUARTER = PAGE // THREADS


def taken(pid):
    """KiB of memory that the process has, apart from files' pages."""
    with open(f"/proc/{pid}/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))


def app(space):
    pids = parts.pids(space, args.pids)
    space.mmap(PAGES * PAGE)
    base = space.areas()[0][0]
    wrong, done, syncs = [], [0] * THREADS, []
    versions = [[0] * PAGES for _ in range(THREADS)]
    threading.excepthook = lambda failed: wrong.append(repr(failed.exc_value))
    until = time.monotonic() + args.seconds

    def content(number, page):
        return versions[number][page].to_bytes(8, "little") * (QUARTER // 8)

    def work(number):
        dice = random.Random(number)
        while time.monotonic() < until and not wrong:
            # Now and then a sequential walk, for readahead to be in it.
            start, length = dice.randrange(PAGES), dice.choice((1, 1, 1, 1, 20))
            for page in range(start, min(start + length, PAGES)):
                at = base + page * PAGE + number * QUARTER
                if libc.memcmp(at, content(number, page), QUARTER):
                    wrong.append((number, page, versions[number][page]))
                if dice.random() < 0.5:
                    versions[number][page] += 1
                    libc.memcpy(at, content(number, page), QUARTER)
            done[number] += 1

    def sync():
        while time.monotonic() < until and not wrong:
            other = space.mmap(20 * PAGE)
            address = max(space.areas())[0]
            if libc.memcmp(address, bytes(20 * PAGE), 20 * PAGE):
                wrong.append("pages that were mapped anew are not zeros")
            libc.memset(address, 7, 20 * PAGE)
            syncs.append(space.sync())
            if libc.memcmp(address, b"\7" * (20 * PAGE), 20 * PAGE):
                wrong.append("pages beside the others are not as written")
            space.munmap(other)
            time.sleep(0.1)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    threads.append(threading.Thread(target=sync))
    for thread in threads:
        thread.start()
    time.sleep(args.seconds / 2)  # by then every buffer is in use, or nearly
    # KiB. Over MPI, another message under way than ever before takes 2 MiB.
    growth = 1 << 10 if args.seconds > 60 else 4 << 10
    before = [taken(pid) for pid in pids]
    for thread in threads:
        thread.join()
    after = [taken(pid) for pid in pids]
    for page in range(PAGES):
        expected = b"".join(content(number, page) for number in range(THREADS))
        if libc.memcmp(base + page * PAGE, expected, PAGE):
            wrong.append(("at the end", page))
    parts.check_resident(space)
    if not all(done) or not sum(syncs) or space.figures()["refused"]:
        wrong.append(f"steps {done}, pages synced {syncs}, {space.figures()['refused']} refused")
    print("steps", sum(done), "KiB", before, after, space.figures())
    if wrong:
        sys.exit(f"(thread, page, version) that were not as written, and errors: {wrong}")
    if any(now > then + growth for then, now in zip(before, after, strict=True)):
        sys.exit("the memory of a process of EDM's has grown")
    print("soak SUCCESS")


parser = argparse.ArgumentParser()
parser.add_argument("pids", help="a file where the DMS tells its process id")
parser.add_argument("seconds", type=float)
# From a high_threshold of 128 on there is readahead.
args, config = edm.parse_arguments(parser, high_threshold=130, low_threshold=97)
parts.tell(args.pids)
edm.main(app, config)
